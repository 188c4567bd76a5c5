"""One run per directory, proven with real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from onecard.errors import CheckpointError
from onecard.train.run_lock import RunLock

REPOSITORY = Path(__file__).resolve().parents[2]
HOLDER = """
import sys, time
from pathlib import Path
from onecard.train.run_lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def holder(run_dir: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run_dir)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_second_run_is_refused_with_the_pid_of_the_first(tmp_path: Path) -> None:
    first = holder(tmp_path / "run")
    with pytest.raises(CheckpointError, match=rf"in use by another run \(process {first.pid} on .*--output_path"):
        RunLock(tmp_path / "run").__enter__()
    second = subprocess.run(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")],
        cwd=REPOSITORY,
        input="\n",
        capture_output=True,
        text=True,
    )
    assert second.returncode != 0 and f"process {first.pid} " in second.stderr
    with RunLock(tmp_path / "other"):  # another directory is free
        pass
    first.communicate("\n")
    assert first.returncode == 0
    with RunLock(tmp_path / "run"):  # and so is this one, once the first has left
        assert str(os.getpid()) in (tmp_path / "run" / ".run.pid").read_text(encoding="utf-8")
    assert not (tmp_path / "run" / ".run.pid").exists()


def test_the_lock_of_a_killed_run_does_not_block(tmp_path: Path) -> None:
    first = holder(tmp_path)
    first.kill()
    first.communicate()
    assert (tmp_path / ".run.pid").exists()
    with RunLock(tmp_path):
        assert f"process {os.getpid()} " in (tmp_path / ".run.pid").read_text(encoding="utf-8")


def test_the_lock_is_free_after_an_error_inside(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)  # held here: it must not be the garbage collector that frees it
    with pytest.raises(ZeroDivisionError), lock:
        raise ZeroDivisionError
    with RunLock(tmp_path):
        pass


def test_two_locks_in_one_process_exclude_each_other(tmp_path: Path) -> None:
    with RunLock(tmp_path), pytest.raises(CheckpointError, match=f"process {os.getpid()} "):
        RunLock(tmp_path).__enter__()


def test_a_directory_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match=r"cannot be written.*--output_path"):
        RunLock(tmp_path / "file" / "run").__enter__()
    with pytest.raises(CheckpointError, match="cannot be written"):
        RunLock(tmp_path / "file").__enter__()


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounting a disk needs root on Linux")
def test_a_read_only_directory_says_so(tmp_path: Path) -> None:
    options = ["mount", "-t", "tmpfs", "-o", "size=1m,ro", "tmpfs", str(tmp_path)]
    if (done := subprocess.run(options, capture_output=True, text=True)).returncode:
        pytest.skip(f"no tmpfs here: {done.stderr.strip()}")
    try:
        with pytest.raises(CheckpointError, match="Read-only file system"):
            RunLock(tmp_path).__enter__()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
