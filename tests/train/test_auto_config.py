"""The plan's choices at work: what is refused before anything is read, what stays in a run, what changes no result."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from accelerate.state import AcceleratorState

from onecard.config.training import FinetuneConfig
from onecard.errors import ConfigError, ModelError
from onecard.model.hardware import detect
from onecard.model.memory.architecture import known_models
from onecard.model.memory.estimate import GIB, LIBRARY_BYTES
from onecard.recipes import finetune
from onecard.train import auto_config as fit
from onecard.train import step
from onecard.train.state import read_state
from tests import tiny
from tests.live_memory import peak_bytes
from tests.runs import assert_same_end, final_checkpoint, run_and_stop

RUN = {"test_size": 3, "eval_steps": 2, "gradient_checkpointing": True, "learning_rate": 1e-4}


@pytest.fixture(scope="module")
def no_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 70 billion weights of which only config.json and a tokenizer are there."""
    directory = tiny.save_sentencepiece_tokenizer(tmp_path_factory.mktemp("seventy"))
    llama = known_models()["Llama-3.1-8B"].config
    config = {**llama, "hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80,
              "num_attention_heads": 64}  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


@pytest.fixture(autouse=True)
def unbounded_heap(monkeypatch: pytest.MonkeyPatch) -> None:
    """What bounds the heap of a process slows all later tests in it."""
    monkeypatch.setattr(fit, "give_back_freed_ram", lambda: False)


def free_ram(monkeypatch: pytest.MonkeyPatch, gib: float) -> None:
    """So much RAM for the run, whatever else uses the machine now."""
    free = SimpleNamespace(available=int(gib * GIB) + fit.RAM_LEFT_ALONE)
    monkeypatch.setattr(fit, "psutil", SimpleNamespace(virtual_memory=lambda: free))


def test_too_large_is_refused_before_weights_are_read(no_weights: Path, instructions: Path, tmp_path: Path) -> None:
    config = tiny.config_for(no_weights, instructions, tmp_path / "run", bits=4, vram=8.0)
    with pytest.raises(ConfigError, match=r"--vram: .* need \d\d\.\d\d GiB of 8\.00 .*--cutoff_len.*--ignore_plan"):
        finetune(config)
    assert not list((tmp_path / "run").glob("checkpoint*"))


def test_ignore_plan(tiny_base: Path, no_weights: Path, instructions: Path, tmp_path: Path) -> None:
    """It goes on to the weights, which the one has not and the other has."""
    with pytest.raises(ModelError, match=r"weights|safetensors"):
        finetune(tiny.config_for(no_weights, instructions, tmp_path / "1", bits=4, vram=8.0, ignore_plan=True))
    options = {"vram": 0.0005, "max_steps": 1}
    with pytest.raises(ConfigError, match="--vram"):
        finetune(tiny.config_for(tiny_base, instructions, tmp_path / "2", **options))
    finetune(tiny.config_for(tiny_base, instructions, tmp_path / "2", **options, ignore_plan=True))
    assert final_checkpoint(tmp_path / "2").name == "checkpoint-1"


def test_unknown_layers_are_refused_by_the_plan(no_weights: Path, instructions: Path, tmp_path: Path) -> None:
    config = tiny.config_for(no_weights, instructions, tmp_path / "run", bits=4, lora_target_modules="q_prj")
    with pytest.raises(ConfigError, match=r"--lora_target_modules: .*q_prj \(did you mean q_proj\?\)"):
        finetune(config)


def test_too_little_ram_for_what_leaves_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    hardware, little = detect("cpu"), SimpleNamespace(available=fit.RAM_LEFT_ALONE + GIB)
    monkeypatch.setattr(fit.psutil, "virtual_memory", lambda: little)
    config = tiny.with_options(FinetuneConfig(), {
        "model_path": "Llama-3.1-8B", "cutoff_len": 30_000, "offload_activations": "on", "vram": 900.0})  # fmt: skip
    first = fit.first_plan(config, hardware)
    with pytest.raises(ConfigError, match=r"\d+\.\d GiB of RAM are needed for what leaves the card"):
        fit.resolve(config, hardware, first, 30_000)


@pytest.mark.parametrize(("free_gib", "bounded"), [(3.0, True), (30.0, False)])
def test_a_heap_is_bounded_where_ram_is_near(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], free_gib: float, bounded: bool
) -> None:
    """On a CPU the process needs its libraries as well; a heap may keep several times what lies in it."""
    asked: list[bool] = []
    monkeypatch.setattr(fit, "give_back_freed_ram", lambda: asked.append(True) or True)
    free_ram(monkeypatch, free_gib)
    config = FinetuneConfig()
    first = fit.first_plan(replace(config, model=replace(config.model, device="cpu")), detect("cpu"))
    assert ("Python and its libraries", LIBRARY_BYTES) in [(part.name, part.n_bytes) for part in first.account.parts]
    fit.resolve(config, detect("cpu"), first, 256)
    assert asked == [True] * bounded and ("goes back to the system at once" in capsys.readouterr().out) == bounded


def test_the_longest_sample_settles_it_anew(capsys: pytest.CaptureFixture[str]) -> None:
    """What --cutoff_len would need is given up only if a sample is that long."""
    config = tiny.with_options(FinetuneConfig(), {"model_path": "Llama-3.1-8B", "cutoff_len": 8192, "vram": 24.0,
                                                  "dtype": "bf16"})  # fmt: skip
    hardware = replace(detect("cpu"), total_bytes=24 * GIB)
    first = fit.first_plan(config, hardware)
    capsys.readouterr()
    settled, plan = fit.resolve(config, hardware, first, 300)
    assert plan.longest_row == 300 and first.longest_row == 8192
    assert settled.train.micro_tokens == plan.setup.rows * 300 <= 4096
    told = capsys.readouterr().out
    assert "the longest sample has 300 tokens: --micro_tokens 3,900 (fits)" in told
    assert config.train.micro_tokens == 0, "the config that was typed is not changed"
    again = fit._filled(settled, plan)
    assert again == settled
    limits = fit.limits_of(settled)
    assert (limits.micro_batch, limits.micro_tokens, limits.loss_chunk) == (0, 3900, 1024)


@pytest.mark.parametrize(
    ("typed", "flag"), [({"optimizer": "adamw_8bit"}, "--optimizer"), ({"head_bits": "16"}, "--head_bits")]
)
def test_choices_stay_in_a_run(
    typed: dict[str, Any], flag: str, tiny_base: Path, instructions: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Another card would choose otherwise; the run goes on as it began."""
    config = tiny.config_for(tiny_base, instructions, tmp_path / "run", **RUN, optimizer="adamw", head_bits="8")
    run_and_stop(config, monkeypatch, after_steps=1)
    stored = read_state(final_checkpoint(tmp_path / "run")).choices
    assert stored == {"optimizer": "adamw", "head_bits": "8"}
    free = {"optimizer": "auto", "head_bits": "auto"}
    with pytest.raises(ConfigError, match=flag):
        finetune(tiny.config_for(tiny_base, instructions, tmp_path / "run", **{**RUN, **free, **typed}))
    finetune(tiny.config_for(tiny_base, instructions, tmp_path / "run", **RUN, **free))
    assert read_state(final_checkpoint(tmp_path / "run")).choices == stored
    whole = tiny.config_for(tiny_base, instructions, tmp_path / "whole", **RUN, optimizer="adamw", head_bits="8")
    assert_same_end(finetune(whole), tmp_path / "run")


SETTINGS = [{"head_bits": "4"}, {"mlp_tile": 64}, {"offload_activations": "on"}, {"offload_embeddings": "on"},
            {"loss_chunk": 16}]  # fmt: skip


@pytest.fixture(scope="module")
def plain_run(tiny_base: Path, instructions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finetune(tiny.config_for(tiny_base, instructions, tmp_path_factory.mktemp("plain") / "run", **RUN))


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: next(iter(setting)))
def test_each_setting_trains_and_resumes(
    setting: dict[str, Any], plain_run: Path, tiny_base: Path, instructions: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    real = step.ActivationOffload
    monkeypatch.setattr(step, "ActivationOffload", lambda model, device: real(model, device, min_bytes=1))
    whole = finetune(tiny.config_for(tiny_base, instructions, tmp_path / "whole" / "run", **RUN, **setting))
    weights = [tiny.tensors_of(run / "adapter_model.safetensors") for run in (plain_run, whole)]
    difference = tiny.largest_difference(*weights)
    assert (difference > 1e-6) if "head_bits" in setting else (difference < 1e-6)
    stopped = tiny.config_for(tiny_base, instructions, tmp_path / "stopped" / "run", **RUN, **setting)
    run_and_stop(stopped, monkeypatch, after_steps=2)
    assert_same_end(whole, finetune(stopped))


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_peak_after_resume(
    optimizer: str, tiny_base: Path, instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the start of the program to the end of a step: never more than before, whatever is loaded on the way."""
    config = tiny.config_for(tiny_base, instructions, tmp_path / "run", **RUN, optimizer=optimizer, lora_r=32)
    before = peak_bytes(lambda: run_and_stop(config, monkeypatch, after_steps=2))
    assert final_checkpoint(tmp_path / "run").name == "checkpoint-2"
    after = peak_bytes(lambda: finetune(config))
    assert final_checkpoint(tmp_path / "run").name == "checkpoint-3"
    assert after <= before


# --- chosen by the number of rows


@pytest.mark.parametrize(("n_rows", "expected"), [
    (1, 4), (38, 4), (258, 4), (1599, 4), (1600, 8), (1900, 8), (3200, 16), (6399, 16), (6400, 32), (10**6, 32),
])  # fmt: skip
def test_samples_per_step_by_the_number_of_rows(n_rows: int, expected: int) -> None:
    assert fit.auto_total_batch(n_rows) == expected


def test_the_chosen_batch_is_recorded_and_stays(
    tiny_base: Path, instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Chosen once: what would be chosen otherwise later is no matter, and what was typed at first stays too."""
    chosen = tiny.config_for(tiny_base, instructions, tmp_path / "chosen", **RUN, total_batch=0)
    run_and_stop(chosen, monkeypatch, after_steps=1)
    assert "4 samples per optimizer step, for 21 training rows; --total_batch" in capsys.readouterr().out
    typed = tiny.config_for(tiny_base, instructions, tmp_path / "typed", **RUN, total_batch=7)
    run_and_stop(typed, monkeypatch, after_steps=1)
    monkeypatch.setattr(fit, "auto_total_batch", lambda n_rows: 16)
    for name, expected in (("chosen", 4), ("typed", 7)):
        run = finetune(tiny.config_for(tiny_base, instructions, tmp_path / name, **RUN, total_batch=0))
        assert f"{expected} samples per optimizer step, as the run began" in capsys.readouterr().out
        assert yaml.safe_load((run / "onecard.yaml").read_text(encoding="utf-8"))["total_batch"] == expected
        state = read_state(final_checkpoint(run))
        assert (state.identity["batch"]["total_batch"], state.step) == (expected, -(-21 // expected))


# --- layers computed again


@pytest.fixture
def any_number_format() -> Iterator[None]:
    """Accelerate fixes the number format once per process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.usefixtures("any_number_format")
@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_recomputed_layers_give_the_same_bits(bits: int, tiny_base: Path, instructions: Path, tmp_path: Path) -> None:
    """So a run may be begun with them and go on without, and the other way round."""
    options = {"bits": bits, "lora_dropout": 0.1, "total_batch": 4, "test_size": 3, "micro_batch": 2, "max_steps": 2}
    runs = [
        finetune(tiny.config_for(tiny_base, instructions, tmp_path / str(recompute) / "run", **options,
                                 gradient_checkpointing=recompute))
        for recompute in (True, False)
    ]  # fmt: skip
    assert_same_end(*runs)


# --- several processes


def test_the_processes_of_a_run_choose_for_the_smallest_of_their_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is cut by the budget: cut in two ways, some of its samples would pass twice and some never."""
    config = tiny.with_options(FinetuneConfig(), {"model_path": "Llama-3.1-8B", "dtype": "bf16", "cutoff_len": 2048})
    free_ram(monkeypatch, 24)
    hardware = replace(detect("cpu"), total_bytes=24 * GIB)
    first = fit.first_plan(config, hardware)
    plans = []
    for others_gib in (24, 8):
        monkeypatch.setattr(fit, "gather_object", lambda mine: [*mine, replace(mine[0], total_bytes=others_gib * GIB)])  # noqa: B023
        for own_gib in (24, 8):
            hardware = replace(hardware, total_bytes=own_gib * GIB)
            _, plan = fit.resolve(config, hardware, first, 2048, SimpleNamespace(num_processes=2))
            plans.append(plan.setup)
    assert plans[0] != plans[1] == plans[2] == plans[3]


def test_settings_larger_than_the_run_are_reported_when_it_starts(capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny.with_options(FinetuneConfig(), {"total_batch": 64, "warmup_steps": 50, "num_epoch": 2})
    resolved = fit.resolve_lengths(config, 38, 2).train
    told = capsys.readouterr()
    assert "--total_batch: 64 is more than the 38 training rows" in told.err and "--warmup_steps: " in told.err
    assert "an evaluation every step or 10 minutes, at most 2% of the time (the run has 2; --eval_steps" in told.out
    assert (resolved.eval_steps, resolved.save_steps) == (1, 1)
