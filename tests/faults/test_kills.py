"""SIGKILL at random moments of the whole program: the same command goes on, and ends with the same bits."""

from __future__ import annotations

import os
import random
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from onecard.train.checkpoint import verify
from tests.faults.conftest import Bench, assert_as_undisturbed, newest, step_of
from tests.faults.fork_server import Start

SEED = int(os.environ.get("ONECARD_KILL_SEED", "20261120"))
N_STEPS = 30  # three epochs


@dataclass
class Killer:
    """Starts one command again and again and kills it at moments that its seed decides."""

    bench: Bench
    moments: random.Random
    step_s: float
    """How long an undisturbed step with its checkpoint takes here and now."""
    options: dict[str, Any]
    n_killed: int = 0
    n_resumed: int = 0

    def run_until_done(self, run: Path, n_kills: int) -> None:
        """Run to the end, killing on the way until `n_kills` are reached in all."""
        reached = 0
        while True:
            start = self.bench.start(run, **self.options)
            if self.n_killed < n_kills:
                phase, delay_s = self._wait(start, run.parent / "cache")
                code = start.kill()
            else:
                code = start.wait()
            resumed = [int(step) for step in re.findall(r"going on from .*checkpoint-(\d+)", start.output())]
            saved = sorted(step_of(path) for path in run.glob("checkpoint-*"))
            self.n_resumed += bool(resumed)
            told = f"seed {SEED} kill {self.n_killed + 1}"
            assert code in (0, -9), f"{told}: exit code {code}\n{start.output()}"
            assert resumed in ([], [reached]), f"{told}: {reached} was the newest\n{start.output()}"
            assert max(saved, default=0) >= reached, f"{told}: {reached} is lost\n{start.output()}"
            if code == 0:
                return
            self.n_killed += 1
            print(f"{told}: {delay_s:.3f} s after {phase}, checkpoints {saved}")
            reached = max(saved, default=0)

    def _wait(self, start: Start, cache: Path) -> tuple[str, float]:
        if self.moments.random() < 0.3:  # while it reads, encodes, loads or tidies up
            shutil.rmtree(cache, ignore_errors=True)
            phase, delay_s = "the start", self.moments.uniform(0, 1)
        else:  # while it trains and saves
            start.wait_for("\nstep ")
            phase, delay_s = "the first step", self.moments.uniform(0, 5 * self.step_s)
        time.sleep(delay_s)
        return phase, delay_s


@pytest.mark.parametrize("n_kills", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_with_the_same_bits(bench: Bench, tmp_path: Path, n_kills: int) -> None:
    straight, options = tmp_path / "straight", {"num_epoch": 3}
    start = bench.start(straight, **options)
    assert start.wait_for("\nstep 1/")
    first_s = time.monotonic()
    assert start.wait_for(f"\nstep {N_STEPS}/"), start.output()
    killer = Killer(bench, random.Random(SEED), (time.monotonic() - first_s) / (N_STEPS - 1), options)
    assert start.wait() == 0
    n_ended = 0
    while killer.n_killed < n_kills:
        run = tmp_path / f"run-{n_ended}"
        killer.run_until_done(run, n_kills)
        n_ended += 1
        assert_as_undisturbed(run, straight)
        assert list(run.glob("*.broken*")) == []
        assert verify(run) == []
    print(f"seed {SEED}: {n_kills} kills, {killer.n_resumed} starts from a checkpoint, {n_ended} runs ended alike")
    assert killer.n_killed == n_kills
    assert killer.n_resumed >= n_kills // 3, "it was hardly ever killed after a checkpoint, which proves little"
    assert n_ended >= 1


def test_a_finished_run_given_again_changes_nothing(bench: Bench, undisturbed: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    printed = bench.run(run)
    assert f"going on from {newest(run)}" in printed
    assert "already done" in printed
    assert_as_undisturbed(run, undisturbed)
