"""DeepSpeed's ZeRO gives the same run as one plain process, stops and goes on, and never takes a step that is NaN."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from onecard.config.training import FinetuneConfig
from onecard.recipes import finetune
from tests import tiny
from tests.launching import checkpoints, fail, finish, launch, python_path, torchrun
from tests.runs import assert_same_end

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("deepspeed") is None, reason="deepspeed is not installed (requirements-deepspeed.txt)"
    ),
]

OPTIONS = {"total_batch": 5, "micro_batch": 2, "num_epoch": 2, "test_size": 4, "eval_steps": 100, "learning_rate": 1e-3,
           "save_steps": 100}  # fmt: skip
# As written for the Trainer of transformers; the bucket is smaller than the adapter, so several are filled.
USUAL = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_num_steps": "auto"}},
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 5000, "allgather_bucket_size": 5000, "overlap_comm": True,
                          "contiguous_gradients": True, "round_robin_gradients": True},
    "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "steps_per_print": 2000,
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": False,
}  # fmt: skip
# As the manual of transformers has it, with sizes that cut and prefetch even here.
ZERO3 = {
    **{key: value for key, value in USUAL.items() if key != "zero_optimization"},
    "zero_optimization": {"stage": 3, "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9,
                          "reduce_bucket_size": 5000, "stage3_prefetch_bucket_size": 20000,
                          "stage3_param_persistence_threshold": "auto", "stage3_max_live_parameters": 1e9,
                          "stage3_max_reuse_distance": 1e9, "stage3_gather_16bit_weights_on_model_save": True},
}  # fmt: skip
Configured = Callable[..., FinetuneConfig]


@pytest.fixture(scope="module")
def configured(tiny_base: Path, instructions: Path) -> Configured:
    def make(directory: Path, zero: dict | None = None, **changes: object) -> FinetuneConfig:
        config = tiny.config_for(tiny_base, instructions, directory / "run", **{**OPTIONS, **changes})
        if zero is not None:
            directory.mkdir(exist_ok=True)
            (directory / "zero.json").write_text(json.dumps(zero), encoding="utf-8")
            config.train.deepspeed = str(directory / "zero.json")
        return config

    return make


@pytest.fixture(scope="module")
def one_process(configured: Configured, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finetune(configured(tmp_path_factory.mktemp("one")))


@pytest.fixture(scope="module")
def zero2(configured: Configured, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed ZeRO-2 run of two processes, with the checkpoint of every step."""
    directory = tmp_path_factory.mktemp("zero2")
    finish(launch(torchrun(2), configured(directory, USUAL, save_steps=1, keep_checkpoints=10), directory))
    return directory / "run"


def assert_close(one: Path, other: Path, *, loss: float = 1e-6, file: str = "adapter_model.safetensors") -> None:
    expected, got = tiny.losses_of(one), tiny.losses_of(other)
    assert len(got) == 8
    assert [step for step, _ in got] == [step for step, _ in expected]
    assert max(abs(a - b) for (_, a), (_, b) in zip(got, expected, strict=True)) < loss
    weights = [tiny.tensors_of(run / file) for run in (one, other)]
    assert tiny.largest_difference(*weights) < 1e-4


def test_zero2_equals_one_plain_process(one_process: Path, zero2: Path) -> None:
    assert_close(one_process, zero2)


@pytest.mark.parametrize("stage", [1, 2])
def test_loraplus_and_state_in_ram(stage: int, configured: Configured, tmp_path: Path) -> None:
    """Two parameter groups, and optimizer state that lies in RAM: also the same."""
    plain = finetune(configured(tmp_path / "plain", loraplus_ratio=4.0))
    zero = {"zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu"}}}
    config = configured(tmp_path / "zero", zero, loraplus_ratio=4.0)
    finish(launch(torchrun(2), config, tmp_path / "zero"))
    assert_close(plain, tmp_path / "zero" / "run", loss=2e-6)


@pytest.mark.parametrize(
    ("method", "file"),
    [
        ({"peft_method": "bottleneck", "peft_option": "form=houlsby"}, "adapter_model.safetensors"),
        ({"peft_method": "full"}, "model.safetensors"),
        ({"peft_method": "freeze:1"}, "model.safetensors"),
    ],
    ids=["bottleneck", "full", "freeze:1"],
)
def test_zero2_with_other_methods(method: dict, file: str, configured: Configured, tmp_path: Path) -> None:
    """The whole weights of a base are stopped in between, and go on."""
    plain = finetune(configured(tmp_path / "plain", **method))
    config = configured(tmp_path / "zero", USUAL, **method)
    if file == "model.safetensors":
        fail(launch(torchrun(2), config, tmp_path / "zero", trouble="SIGTERM-to-torchrun", at_step=3))
    finish(launch(torchrun(2), config, tmp_path / "zero"))
    assert_close(plain, tmp_path / "zero" / "run", file=file)


def test_ctrl_c_and_on(configured: Configured, zero2: Path, tmp_path: Path) -> None:
    config = configured(tmp_path, USUAL)
    fail(launch(torchrun(2), config, tmp_path, trouble="SIGINT-to-group", at_step=3))
    assert checkpoints(tmp_path / "run") == ["checkpoint-4"]
    finish(launch(torchrun(2), config, tmp_path))
    assert_same_end(zero2, tmp_path / "run")


@pytest.fixture(scope="module")
def zero3(configured: Configured, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed ZeRO-3 run of two processes, with the checkpoint of every step."""
    directory = tmp_path_factory.mktemp("zero3")
    finish(launch(torchrun(2), configured(directory, ZERO3, save_steps=1, keep_checkpoints=10), directory))
    return directory / "run"


def test_zero3_equals_one_plain_process(one_process: Path, zero3: Path) -> None:
    assert_close(one_process, zero3)
    stored = [torch.load(run / "checkpoint-8" / "optimizer.pt", weights_only=True) for run in (one_process, zero3)]
    assert stored[0]["state"].keys() == stored[1]["state"].keys()
    for number, entry in stored[0]["state"].items():
        assert entry["step"] == stored[1]["state"][number]["step"] == 8
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.allclose(stored[1]["state"][number][name], entry[name], rtol=1e-3, atol=1e-6), (number, name)


@pytest.mark.parametrize(
    "options",
    [
        # Evaluation between the steps, of a number of rows that is no whole number of turns, and recomputed layers.
        {"eval_steps": 3, "gradient_checkpointing": True},
        {"loss_chunk": 3, "lora_dropout": 0.0, "use_rslora": True},  # how often the head is called depends on the rows
        {"peft_method": "bottleneck", "peft_option": "form=houlsby"},
    ],
    ids=str,
)
def test_zero3_equals_one_plain_process_for(options: dict, configured: Configured, tmp_path: Path) -> None:
    plain = finetune(configured(tmp_path / "plain", **options))
    config = configured(tmp_path / "zero", ZERO3, **options)
    finish(launch(torchrun(2), config, tmp_path / "zero"))
    assert_close(plain, tmp_path / "zero" / "run", loss=1e-5)


def test_16_bits(configured: Configured, tmp_path: Path) -> None:
    """Three rows at once are two micro-batches of a step, whose gradients are added in the order of one process.

    ZeRO-3 puts a function of its own around each module, so gradients of one tensor meet in another order than without
    it, and bf16 rounds them: one process under ZeRO-3 is what two are held against.
    """
    AcceleratorState._reset_state(True)
    options = {"bits": 16, "micro_batch": 3}
    plain = finetune(configured(tmp_path / "plain", **options))
    AcceleratorState._reset_state(True)
    runs = {}
    for name, zero, n_processes in (("2", USUAL, 2), ("3", ZERO3, 2), ("3 in one process", ZERO3, 1)):
        config = configured(tmp_path / name, zero, **options)
        finish(launch(torchrun(n_processes), config, tmp_path / name))
        runs[name] = tmp_path / name / "run"
    assert_close(plain, runs["2"])
    assert_close(runs["3 in one process"], runs["3"])
    off = [abs(a - b) for (_, a), (_, b) in zip(tiny.losses_of(plain), tiny.losses_of(runs["3"]), strict=True)]
    assert off[0] == 0 and max(off) < 1e-3


def test_zero3_with_all_in_ram(configured: Configured, tmp_path: Path) -> None:
    """Weights and optimizer state, in two parameter groups, over three processes, whose parts are padded."""
    plain = finetune(configured(tmp_path / "plain", loraplus_ratio=4.0))
    in_ram = {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
    zero = {"zero_optimization": {**ZERO3["zero_optimization"], **in_ram}}
    config = configured(tmp_path / "zero", zero, loraplus_ratio=4.0)
    fail(launch(torchrun(3), config, tmp_path / "zero", trouble="SIGTERM-to-torchrun", at_step=3))
    finish(launch(torchrun(3), config, tmp_path / "zero"))
    assert_close(plain, tmp_path / "zero" / "run", loss=1e-5)


def test_zero3_is_killed_and_goes_on_with_one_and_with_two(
    configured: Configured, one_process: Path, zero3: Path, tmp_path: Path
) -> None:
    config = configured(tmp_path, ZERO3)
    output = fail(launch(torchrun(2), config, tmp_path, trouble="SIGTERM-to-torchrun", at_step=3))
    assert "after step 4 of 8; checkpoint-4 is saved" in output, output[-4000:]
    again = Path(shutil.copytree(tmp_path / "run", tmp_path / "again" / "run"))
    finetune(configured(tmp_path / "again"))
    assert_close(one_process, again)
    finish(launch(torchrun(2), config, tmp_path))
    assert_same_end(zero3, tmp_path / "run")


def cut(run: Path, directory: Path, step: int) -> Path:
    """A copy of a run as if it had been killed right after `step` was saved."""
    copy = Path(shutil.copytree(run, directory))
    for path in copy.glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)
    return copy


def test_zero_goes_on_without_deepspeed(configured: Configured, zero2: Path, one_process: Path, tmp_path: Path) -> None:
    run = cut(zero2, tmp_path / "run", 4)
    finetune(configured(tmp_path))
    assert_close(one_process, run)


@pytest.mark.parametrize("zero", [USUAL, ZERO3], ids=["stage 2", "stage 3"])
def test_plain_run_goes_on_as_zero(zero: dict, configured: Configured, one_process: Path, tmp_path: Path) -> None:
    whole = finetune(configured(tmp_path / "plain", save_steps=1, keep_checkpoints=10))
    run = cut(whole, tmp_path / "run", 4)
    finish(launch(torchrun(2), configured(tmp_path, zero), tmp_path))
    assert_close(one_process, run)


def test_another_learning_rate_and_decay_are_used_when_it_goes_on(
    configured: Configured, zero2: Path, tmp_path: Path
) -> None:
    """The same as without DeepSpeed."""
    changed = {"learning_rate": 5e-3, "weight_decay": 0.3}
    run = cut(zero2, tmp_path / "zero" / "run", 4)
    finish(launch(torchrun(2), configured(tmp_path / "zero", USUAL, **changed), tmp_path / "zero"))
    plain = cut(zero2, tmp_path / "plain" / "run", 4)
    finetune(configured(tmp_path / "plain", **changed))
    assert_close(plain, run)
    assert tiny.losses_of(run)[5:] != tiny.losses_of(zero2)[5:]


@pytest.mark.parametrize(
    ("trouble", "told", "zero"),
    [
        ("nan-loss", "the loss is nan", USUAL), ("nan-gradient", "the gradient norm is", USUAL),
        ("nan-gradient", "the gradient norm is", ZERO3),
    ],
    ids=["loss", "gradient", "gradient in stage 3"],
)  # fmt: skip
def test_nan_ends_the_run_and_is_not_taken(
    trouble: str, told: str, zero: dict, configured: Configured, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    undisturbed = request.getfixturevalue("zero2" if zero is USUAL else "zero3")
    output = fail(launch(torchrun(2), configured(tmp_path, zero), tmp_path, trouble=trouble, at_step=4))
    assert f"step 4: {told}" in output, output[-4000:]
    assert "instructions.json" in output
    assert checkpoints(tmp_path / "run") == ["checkpoint-3"]
    expected, kept = undisturbed / "checkpoint-3", tmp_path / "run" / "checkpoint-3"
    for name in ("adapter_model.safetensors", "optimizer.pt"):
        assert (expected / name).read_bytes() == (kept / name).read_bytes(), name


@pytest.mark.parametrize(
    ("zero", "told"),
    [
        ({"zero_optimization": {"stage": 2, "reduce_bukket_size": 5}}, "DeepSpeed refuses this configuration"),
    ],
)
def test_refused(zero: dict, told: str, configured: Configured, tmp_path: Path) -> None:
    output = fail(launch(torchrun(1), configured(tmp_path, zero), tmp_path))
    assert "error: --deepspeed" in output
    assert told in output


@pytest.mark.parametrize("stage", ["2", "3"])
def test_fp16_scale(stage: str, tmp_path: Path) -> None:
    """No 16-bit run on CPU uses fp16, so the scale is tried on a model of one layer."""
    script = Path(__file__).parent / "zero_fp16.py"
    command = [sys.executable, "-m", *torchrun(1), str(script), stage]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": python_path()}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "OK" in done.stdout
