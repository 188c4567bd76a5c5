"""A run that is stopped and resumed is the same run: bit for bit on CPU."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from onecard.recipes import finetune
from onecard.train.trackers import read_log
from tests import tiny
from tests.runs import assert_same_end, run_and_stop

N_STEPS = 12
VARIANTS = {
    "fp32-adamw": {},
    "4bit-paged8bit": {"bits": 4, "optimizer": "paged_adamw_8bit", "lora_r": 64},
}


def settings(variant: str, **more: object) -> dict[str, object]:
    shared = {"total_batch": 4, "num_epoch": 2, "lora_dropout": 0.1, "save_steps": 100, "log_samples": True}
    return {**shared, **VARIANTS[variant], **more}


@pytest.fixture(scope="module", params=list(VARIANTS))
def straight(
    request: pytest.FixtureRequest, tiny_base: Path, instructions: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """(variant, run directory) of a run that nothing disturbed."""
    output = tmp_path_factory.mktemp("straight") / "run"
    return request.param, finetune(tiny.config_for(tiny_base, instructions, output, **settings(request.param)))


FAST_STOPS = (1, N_STEPS // 2, N_STEPS - 2)  # the first step, the end of an epoch, and within the last one
STOPS = [pytest.param(stop, marks=[] if stop in FAST_STOPS else [pytest.mark.slow]) for stop in range(1, N_STEPS)]


@pytest.mark.parametrize("stop", STOPS)
def test_stopped_at_any_step_and_resumed_equals_straight(
    stop: int, straight: tuple[str, Path], tiny_base: Path, instructions: Path, tmp_path: Path, monkeypatch
) -> None:
    variant, undisturbed = straight
    config = tiny.config_for(tiny_base, instructions, tmp_path / "run", **settings(variant))
    run_and_stop(config, monkeypatch, after_steps=stop)
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == [f"checkpoint-{stop}"]
    assert_same_end(finetune(config), undisturbed)


def test_resumed_with_another_micro_batch_stays_within_rounding(
    tiny_base: Path, instructions: Path, tmp_path: Path, monkeypatch
) -> None:
    shared = {"total_batch": 8, "num_epoch": 2, "learning_rate": 1e-3}
    plain = finetune(tiny.config_for(tiny_base, instructions, tmp_path / "plain", micro_batch=8, **shared))
    run_and_stop(
        tiny.config_for(tiny_base, instructions, tmp_path / "run", micro_batch=8, **shared), monkeypatch, after_steps=3
    )
    run = finetune(tiny.config_for(tiny_base, instructions, tmp_path / "run", micro_batch=1, **shared))
    expected, got = tiny.losses_of(plain), tiny.losses_of(run)
    assert len(got) == 6
    assert max(abs(a - b) for (_, a), (_, b) in zip(got, expected, strict=True)) < 1e-6


def test_every_record_exactly_once_per_epoch_over_five_interruptions(
    tiny_base: Path, instructions: Path, tmp_path: Path, monkeypatch
) -> None:
    config = tiny.config_for(
        tiny_base, instructions, tmp_path / "run", total_batch=5, num_epoch=3, log_samples=True, save_steps=2
    )
    for steps in (1, 3, 2, 4, 1):
        run_and_stop(config, monkeypatch, after_steps=steps)
    rows = [row for row in read_log(finetune(config)) if "samples" in row]
    assert [row["step"] for row in rows] == list(range(1, 16))
    for epoch in range(3):
        seen = Counter(tiny.flatten(row["samples"] for row in rows[5 * epoch : 5 * epoch + 5]))
        assert len(seen) == 24
        assert set(seen.values()) == {1}
