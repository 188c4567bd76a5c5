"""Two processes (gloo on CPU) give the same run as one; two "machines" do too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from onecard.errors import ConfigError
from onecard.objectives.registry import objective_named
from onecard.recipes import finetune
from onecard.train.trackers import read_log
from tests import tiny
from tests.launching import checkpoints, fail, finish, free_port, launch, torchrun
from tests.runs import assert_same_end, run_and_stop

SHARED = {"total_batch": 5, "micro_batch": 2, "num_epoch": 2, "test_size": 4, "eval_steps": 3, "learning_rate": 1e-3}
# Nothing is saved but at the end and when the run is stopped: so a checkpoint on the way is that of the signal.
STOPPED = {**SHARED, "save_steps": 100, "eval_steps": 100}


def assert_same_run(one: Path, other: Path) -> None:
    expected, got = tiny.losses_of(one), tiny.losses_of(other)
    assert len(got) == 8
    assert [step for step, _ in got] == [step for step, _ in expected]
    assert max(abs(a - b) for (_, a), (_, b) in zip(got, expected, strict=True)) < 1e-6
    weights = [tiny.tensors_of(run / "adapter_model.safetensors") for run in (one, other)]
    assert tiny.largest_difference(*weights) < 1e-5


@pytest.fixture(scope="module")
def one_process(tiny_base: Path, instructions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finetune(tiny.config_for(tiny_base, instructions, tmp_path_factory.mktemp("one") / "run", **SHARED))


@pytest.mark.slow  # in the fast tests: tests/faults/test_two_processes.py, without torchrun
def test_two_processes_equal_one(one_process: Path, tiny_base: Path, instructions: Path, tmp_path: Path) -> None:
    """The last step of each epoch has 5 samples for 2 processes, and 24 - 4 = 20 rows are 4 steps: none fits evenly.

    One clock decides for both when to evaluate and save; else one would wait for the other for ever.
    """
    by_clock = {"eval_steps": 100, "save_steps": 100, "eval_minutes": 1e-9, "save_minutes": 1e-9}
    config = tiny.config_for(tiny_base, instructions, tmp_path / "run", **SHARED | by_clock)
    finish(launch(torchrun(2), config, tmp_path))
    assert_same_run(one_process, tmp_path / "run")
    evaluated = [row["step"] for row in read_log(tmp_path / "run") if "eval_loss" in row]
    assert evaluated[0] == 1 and evaluated[-1] == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"objective": "dpo", "cache_reference": True}, {"objective": "kto", "total_batch": 10}]
)
def test_two_processes_equal_one_for_pairs(options: dict[str, Any], tiny_base: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"Count {i}", "chosen": "one " * (1 + i % 5), "rejected": "no " * (1 + i % 3)} for i in range(24)
    ]
    pairs.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    shared = {**SHARED, **options}
    one = finetune(tiny.config_for(tiny_base, pairs, tmp_path / "one" / "run", **shared))
    finish(launch(torchrun(2), tiny.config_for(tiny_base, pairs, tmp_path / "two" / "run", **shared), tmp_path))
    assert_same_run(one, tmp_path / "two" / "run")
    one_log, other_log = (
        [row[name] for row in read_log(run) for name in objective_named(options["objective"]).metrics if name in row]
        for run in (one, tmp_path / "two" / "run")
    )
    assert len(one_log) >= 5 * 8 - 4 and other_log == pytest.approx(one_log, abs=2e-5)


@pytest.mark.slow
def test_two_processes_stay_near_their_base_as_one_does(tiny_base: Path, instructions: Path, tmp_path: Path) -> None:
    """--kl_anchor: each process computes the divergence of all texts, and their gradients are added up."""
    shared = {**SHARED, "kl_anchor": 1.0, "lora_dropout": 0.0}
    one = finetune(tiny.config_for(tiny_base, instructions, tmp_path / "one" / "run", **shared))
    finish(launch(torchrun(2), tiny.config_for(tiny_base, instructions, tmp_path / "two" / "run", **shared), tmp_path))
    assert_same_run(one, tmp_path / "two" / "run")
    found = [
        [row["kl_anchor"] for row in read_log(run) if "kl_anchor" in row] for run in (one, tmp_path / "two" / "run")
    ]
    assert len(found[0]) == 8 and max(found[0]) > 1e-5
    assert found[1] == pytest.approx(found[0], abs=1e-6)


@pytest.mark.slow
def test_two_machines_equal_one(one_process: Path, tiny_base: Path, instructions: Path, tmp_path: Path) -> None:
    config = tiny.config_for(tiny_base, instructions, tmp_path / "run", **SHARED)
    port = str(free_port())
    machines = []
    for rank in range(2):
        home = tmp_path / f"machine-{rank}"
        launcher = ["torch.distributed.run", "--nnodes", "2", "--node_rank", str(rank), "--nproc_per_node", "1"]
        machines.append(launch([*launcher, "--master_addr", "127.0.0.1", "--master_port", port], config, home))
    finish(*machines)
    assert_same_run(one_process, tmp_path / "run")


@pytest.mark.slow
def test_accelerate_launch_equals_one(one_process: Path, tiny_base: Path, instructions: Path, tmp_path: Path) -> None:
    config = tiny.config_for(tiny_base, instructions, tmp_path / "run", **SHARED)
    launcher = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port())]
    finish(launch(launcher, config, tmp_path))
    assert_same_run(one_process, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"micro_batch": 2}, {"bits": 16}, {"bits": 4}, {"gradient_checkpointing": True, "use_dora": True},
     {"peft_method": "bottleneck", "peft_option": "form=houlsby"}],
    ids=str,
)  # fmt: skip
def test_a_base_over_two_processes_equals_one(options, tiny_base: Path, instructions: Path, tmp_path: Path) -> None:
    """--shard, with the rehearsal and 4 held-out rows, which are no whole number of turns for 2 processes.

    Three rows at once are two micro-batches of a step, one for each process: their gradients are added in the order of
    one process, and the weights are equal to the last bit. Two rows are three, added in another order: 2e-8 apart.
    """
    AcceleratorState._reset_state(True)
    shared = {**SHARED, "rehearsal": True, "micro_batch": 3, **options}
    one = finetune(tiny.config_for(tiny_base, instructions, tmp_path / "one" / "run", **shared))
    config = tiny.config_for(tiny_base, instructions, tmp_path / "two" / "run", **shared, shard=True)
    started = launch(torchrun(2), config, tmp_path)
    output, _ = started.communicate(timeout=300)
    assert started.returncode == 0, output[-4000:]
    assert "2 layers lie over 2 processes" in output
    assert_same_run(one, tmp_path / "two" / "run")
    AcceleratorState._reset_state(True)


@pytest.mark.slow
def test_a_base_over_two_processes_is_killed_and_goes_on_with_one_and_with_two(
    one_process: Path, tiny_base: Path, instructions: Path, tmp_path: Path
) -> None:
    config = tiny.config_for(tiny_base, instructions, tmp_path / "run", **STOPPED, shard=True)
    output = fail(launch(torchrun(2), config, tmp_path, trouble="SIGTERM-to-torchrun", at_step=3))
    assert "after step 4 of 8; checkpoint-4 is saved" in output, output[-4000:]
    again = Path(shutil.copytree(tmp_path / "run", tmp_path / "again" / "run"))
    finetune(tiny.config_for(tiny_base, instructions, again, **STOPPED))
    assert_same_run(one_process, again)
    finish(launch(torchrun(2), config, tmp_path))
    assert_same_run(one_process, tmp_path / "run")


def test_one_process_has_nothing_to_share_the_base_with(tiny_base: Path, instructions: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--shard: needs several processes.*torchrun"):
        finetune(tiny.config_for(tiny_base, instructions, tmp_path / "run", shard=True))


@pytest.fixture(scope="module")
def two_processes(tiny_base: Path, instructions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run of two processes that stopped ones are held against."""
    directory = tmp_path_factory.mktemp("two")
    finish(launch(torchrun(2), tiny.config_for(tiny_base, instructions, directory / "run", **STOPPED), directory))
    return directory / "run"


@pytest.fixture(scope="module")
def stopped(tiny_base: Path, instructions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that SIGTERM to torchrun ended after step 4 of 8."""
    directory = tmp_path_factory.mktemp("stopped")
    config = tiny.config_for(tiny_base, instructions, directory / "run", **STOPPED)
    output = fail(launch(torchrun(2), config, directory, trouble="SIGTERM-to-torchrun", at_step=3))
    assert "after step 4 of 8; checkpoint-4 is saved" in output, output[-4000:]
    assert checkpoints(directory / "run") == ["checkpoint-4"]
    return directory / "run"


@pytest.mark.slow
def test_sigterm_to_torchrun_costs_nothing(
    stopped: Path, two_processes: Path, tiny_base: Path, instructions: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    finish(launch(torchrun(2), tiny.config_for(tiny_base, instructions, run, **STOPPED), tmp_path))
    assert_same_end(two_processes, run)


@pytest.mark.slow
def test_two_processes_go_on_as_one(
    stopped: Path, one_process: Path, tiny_base: Path, instructions: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    finetune(tiny.config_for(tiny_base, instructions, run, **STOPPED))
    assert_same_run(one_process, run)


@pytest.mark.slow
def test_one_process_goes_on_as_two(
    one_process: Path, tiny_base: Path, instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.config_for(tiny_base, instructions, tmp_path / "run", **STOPPED)
    run_and_stop(config, monkeypatch, after_steps=4)
    finish(launch(torchrun(2), config, tmp_path))
    assert_same_run(one_process, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["SIGINT-to-group", "SIGINT-to-one-worker"])
def test_ctrl_c_stops_all_processes_at_one_step(
    trouble: str, two_processes: Path, tiny_base: Path, instructions: Path, tmp_path: Path
) -> None:
    config = tiny.config_for(tiny_base, instructions, tmp_path / "run", **STOPPED)
    fail(launch(torchrun(2), config, tmp_path, trouble=trouble, at_step=3))
    assert checkpoints(tmp_path / "run") == ["checkpoint-4"]
    finish(launch(torchrun(2), config, tmp_path))
    assert_same_end(two_processes, tmp_path / "run")
