"""The runs that the fault tests disturb."""

from __future__ import annotations

import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.faults.fork_server import ForkServer, Start

# 20 rows to train on, 2 per step: 10 steps per epoch, a checkpoint after each, an evaluation after every third.
OPTIONS = {"total_batch": 2, "test_size": 4, "eval_steps": 3, "lora_dropout": 0.1, "learning_rate": 1e-3}


@dataclass
class Bench:
    """Starts runs of one base and one data file."""

    server: ForkServer
    base: Path
    data: Path

    def start(self, output: Path, *, data: Path | None = None, base: Path | None = None, file_limit_bytes: int = 0,
              **options: Any) -> Start:  # fmt: skip
        return self.server.start(
            base or self.base, data or self.data, output, OPTIONS | options, file_limit_bytes=file_limit_bytes
        )

    def run(self, output: Path, *, expect: int = 0, **more: Any) -> str:
        """One run to its end; returns what it printed."""
        start = self.start(output, **more)
        code = start.wait()
        assert code == expect, f"exit code {code}, not {expect}:\n{start.output()}"
        return start.output()


@pytest.fixture(scope="session")
def bench(fork_server: ForkServer, tiny_base: Path, instructions: Path) -> Bench:
    return Bench(fork_server, tiny_base, instructions)


@pytest.fixture(scope="session")
def undisturbed(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of one epoch that nothing disturbed."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    bench.run(output)
    return output


@pytest.fixture(scope="session")
def half_done(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the same run, stopped by SIGTERM in or after step 5."""
    output = tmp_path_factory.mktemp("half") / "run"
    start = bench.start(output)
    assert start.wait_for("step 5/")
    start.signal(signal.SIGTERM)
    assert start.wait() == 143, start.output()
    return output


@pytest.fixture
def half(half_done: Path, tmp_path: Path) -> Path:
    """A copy of the half-done run that a test may damage."""
    return Path(shutil.copytree(half_done, tmp_path / "run"))


def newest(run: Path) -> Path:
    """The checkpoint with the highest number."""
    numbered = {int(path.name[11:]): path for path in run.glob("checkpoint-*") if path.name[11:].isdigit()}
    return numbered[max(numbered)]


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def assert_as_undisturbed(run: Path, undisturbed: Path, *, n_files: int = 7) -> None:
    """The run ended exactly like the undisturbed one, byte for byte and loss for loss, and left nothing behind."""
    names = [name for name in ("adapter_model.safetensors", "adapter_config.json", "model.safetensors", "config.json")
             if (undisturbed / name).exists()]  # fmt: skip
    pairs = [(run / name, undisturbed / name) for name in names]
    pairs += [(newest(run) / path.name, path) for path in newest(undisturbed).iterdir()]
    assert len(pairs) == n_files
    for ours, expected in pairs:
        assert ours.read_bytes() == expected.read_bytes(), f"{ours} differs from {expected}"
    assert newest(run).name == newest(undisturbed).name
    assert tiny.losses_of(run) == tiny.losses_of(undisturbed)
    hidden = sorted(path.name for path in run.iterdir() if path.name.startswith(".") and path.name != ".run.lock")
    assert hidden == [], "left behind"
    kept, expected_kept = ({step_of(path) for path in end.glob("checkpoint-*[0-9]")} for end in (run, undisturbed))
    assert kept >= expected_kept
    # A stop by a signal saves a step of its own, which is then among the last two.
    assert len(kept - expected_kept) <= 1
