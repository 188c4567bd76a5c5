"""The path of an older card: fp16 with a scaler over a 4-bit base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from onecard.recipes import finetune
from tests import tiny
from tests.runs import final_checkpoint, run_and_stop

pytestmark = pytest.mark.gpu

TURING = {"device": "cuda", "bits": 4, "dtype": "fp16", "total_batch": 4, "num_epoch": 2, "learning_rate": 1e-3}


def test_fp16_trains_with_a_scaler_whose_state_survives_a_resume(
    tiny_base: Path, instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = finetune(tiny.config_for(tiny_base, instructions, tmp_path / "straight", **TURING))
    config = tiny.config_for(tiny_base, instructions, tmp_path / "run", **TURING)
    run_and_stop(config, monkeypatch, after_steps=5)
    run = finetune(config)
    scalers = [torch.load(final_checkpoint(path) / "scaler.pt", weights_only=True) for path in (straight, run)]
    assert scalers[0] == scalers[1]
    expected, got = tiny.losses_of(straight), tiny.losses_of(run)
    assert len(got) == 12
    assert max(abs(a - b) for (_, a), (_, b) in zip(got, expected, strict=True)) < 1e-3


def test_each_paged_optimizer_trains_on_the_card(tiny_base: Path, instructions: Path, tmp_path: Path) -> None:
    names = ("adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit")
    for name in names:
        run = finetune(tiny.config_for(tiny_base, instructions, tmp_path / name, **TURING, optimizer=name))
        state = json.loads((final_checkpoint(run) / "trainer_state.json").read_text(encoding="utf-8"))
        assert state["step"] == 12
        first, last = tiny.losses_of(run)[0][1], tiny.losses_of(run)[-1][1]
        assert last < first
    assert len(list(tmp_path.iterdir())) == len(names) + 1  # and the cache


def test_a_run_begun_on_the_cpu_goes_on_on_the_card(
    tiny_base: Path, instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = {"bits": 32, "total_batch": 4, "num_epoch": 2, "learning_rate": 1e-3}
    AcceleratorState._reset_state(True)  # accelerate has one device per process
    straight = finetune(tiny.config_for(tiny_base, instructions, tmp_path / "straight", **shared))
    begun = tiny.config_for(tiny_base, instructions, tmp_path / "run", **shared)
    run_and_stop(begun, monkeypatch, after_steps=5)
    AcceleratorState._reset_state(True)
    run = finetune(tiny.config_for(tiny_base, instructions, tmp_path / "run", device="cuda", **shared))
    AcceleratorState._reset_state(True)
    pairs = zip(tiny.losses_of(run), tiny.losses_of(straight), strict=True)
    assert max(abs(a - b) for (_, a), (_, b) in pairs) < 1e-3
