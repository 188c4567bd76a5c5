"""The plan's choices at work: what is refused before anything is read, what stays in a run, what changes no result."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from onecard.config import FinetuneConfig
from onecard.console import ConfigError, ModelError
from onecard.model.architecture import known_models
from onecard.model.hardware import detect
from onecard.model.memory import GIB
from onecard.recipes import finetune
from onecard.train import fit, step
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
        fit.settle(config, hardware, first, 30_000)


def test_the_longest_sample_settles_it_anew(capsys: pytest.CaptureFixture[str]) -> None:
    """What --cutoff_len would need is given up only if a sample is that long."""
    config = tiny.with_options(FinetuneConfig(), {"model_path": "Llama-3.1-8B", "cutoff_len": 8192, "vram": 24.0,
                                                  "dtype": "bf16"})  # fmt: skip
    hardware = replace(detect("cpu"), total_bytes=24 * GIB)
    first = fit.first_plan(config, hardware)
    capsys.readouterr()
    settled, plan = fit.settle(config, hardware, first, 300)
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
