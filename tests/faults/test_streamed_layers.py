"""Runs whose layers pass through slots: signals, a kill and a full disk leave what they leave with resident layers."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from onecard.train.checkpoint import verify
from tests import tiny
from tests.faults.conftest import Bench, assert_as_undisturbed, newest, step_of
from tests.faults.test_disk_and_signals import resize, small_disk

RESIDENT = {"bits": 4, "gradient_checkpointing": True}
STREAMED = RESIDENT | {"stream_layers": "on"}
THROUGH_SLOTS = "5 layers lie in RAM ("


@pytest.fixture(scope="module")
def deep(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Starts runs of a base that has more layers than there are slots."""
    return Bench(bench.server, tiny.save_tiny_llama(tmp_path_factory.mktemp("deep"), layers=5), bench.data)


@pytest.fixture(scope="module")
def resident(deep: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that nothing disturbed, whose layers stayed where they were."""
    output = tmp_path_factory.mktemp("resident") / "run"
    assert THROUGH_SLOTS not in deep.run(output, **RESIDENT)
    return output


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGKILL", -9)])
def test_cut_off_in_a_streamed_step_it_ends_as_a_resident_run(
    deep: Bench, resident: Path, tmp_path: Path, name: str, code: int
) -> None:
    run = tmp_path / "run"
    start = deep.start(run, **STREAMED, save_steps=1 if name == "SIGKILL" else 100)
    assert start.wait_for("\nstep 3/")
    start.signal(getattr(signal, name))
    assert start.wait() == code, start.output()
    assert THROUGH_SLOTS in start.output()
    assert step_of(newest(run)) >= 2 and verify(newest(run)) == []
    printed = deep.run(run, **STREAMED)
    assert f"going on from {newest(run).parent}" in printed and THROUGH_SLOTS in printed
    assert_as_undisturbed(run, resident)


def test_a_disk_that_fills_up_loses_nothing(deep: Bench, resident: Path, tmp_path: Path) -> None:
    """Room for one checkpoint and half of the next; later for all."""
    one_kb = sum(path.stat().st_size for path in newest(resident).iterdir()) // 1024
    settings_kb = sum(path.stat().st_size for path in resident.glob("tokenizer*")) // 1024
    disk, cache = tmp_path / "disk", {"cache_path": str(tmp_path / "cache")}
    with small_disk(disk, settings_kb + int(1.5 * one_kb) + 60):
        printed = deep.run(disk / "run", expect=1, **STREAMED, **cache)
        assert THROUGH_SLOTS in printed and "Traceback" not in printed
        assert "Training goes on; the previous checkpoint stays." in printed
        assert "checkpoint-10 could not be saved" in printed.split("error: ")[1]
        assert verify(newest(disk / "run")) == []
        resize(disk, 50_000)
        deep.run(disk / "run", **STREAMED, **cache)
        assert_as_undisturbed(disk / "run", resident)
