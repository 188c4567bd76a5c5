"""Runs of the whole recipe inside the test process, and ways to cut them short."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from onecard.config.training import FinetuneConfig
from onecard.errors import Stopped
from onecard.recipes import finetune
from onecard.train import loop
from onecard.train.trackers import read_log
from tests import tiny


def run_and_stop(config: FinetuneConfig, monkeypatch: pytest.MonkeyPatch, *, after_steps: int) -> None:
    """Run until a real SIGINT arrives in the middle of step number `after_steps`, counted from this start."""
    real_step, done = loop.take_step, 0

    def step_then_signal(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        done += 1
        result = real_step(*args, **kwargs)
        if done == after_steps:
            signal.raise_signal(signal.SIGINT)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", step_then_signal)
        with pytest.raises(Stopped) as stopped:
            finetune(config)
    assert stopped.value.exit_code == 130


def final_checkpoint(run: Path) -> Path:
    """The checkpoint with the highest number."""
    numbered = {int(path.name.split("-")[1]): path for path in run.glob("checkpoint-*[0-9]")}
    return numbered[max(numbered)]


def assert_same_end(one: Path, other: Path) -> None:
    """Two runs ended alike: adapter and optimizer bit for bit, and every logged loss and learning rate."""
    adapters = [tiny.tensors_of(run / "adapter_model.safetensors") for run in (one, other)]
    assert adapters[0], "no tensors"
    assert tiny.same_tensors(*adapters)
    states = [
        torch.load(final_checkpoint(run) / "optimizer.pt", map_location="cpu", weights_only=True)
        for run in (one, other)
    ]
    assert tiny.same_values(*states), "optimizer.pt differs"
    assert tiny.losses_of(one) == tiny.losses_of(other)
    rates = [[row["learning_rate"] for row in read_log(run) if "loss" in row] for run in (one, other)]
    assert rates[0] == rates[1]
