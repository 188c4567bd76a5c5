"""Signals, a full or read-only disk, a second run in one directory, and a record that makes the loss NaN."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from onecard.config.parsing import to_yaml
from onecard.train.checkpoint import verify
from tests import tiny
from tests.faults.conftest import OPTIONS, Bench, assert_as_undisturbed, newest, step_of

REPOSITORY = Path(__file__).resolve().parents[2]


# --- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_finishes_the_step_and_saves_it(
    bench: Bench, undisturbed: Path, tmp_path: Path, name: str, code: int
) -> None:
    run = tmp_path / "run"
    start = bench.start(run, save_steps=100)
    assert start.wait_for("\nstep 3/")
    start.signal(getattr(signal, name))
    assert start.wait() == code, start.output()
    printed = start.output()
    last_step = int(re.findall(r"\nstep (\d+)/", printed)[-1])
    assert f"stopped by {name} after step {last_step} of 10" in printed
    assert step_of(newest(run)) == last_step
    assert verify(newest(run)) == []
    assert not (run / "adapter_model.safetensors").exists(), "a stopped run is not a finished one"
    printed = bench.run(run)
    assert f"going on from {newest(run).parent / f'checkpoint-{last_step}'}" in printed
    assert f"\nstep {last_step + 1}/" in printed
    assert f"\nstep {last_step}/" not in printed
    assert_as_undisturbed(run, undisturbed)


def test_the_second_signal_leaves_at_once(bench: Bench, tmp_path: Path) -> None:
    run = tmp_path / "run"
    # All rows in one step, one by one, so that it is still under way when the second signal comes.
    start = bench.start(run, total_batch=20, micro_batch=1, num_epoch=100, save_steps=1000)
    assert start.wait_for("\nstep 2/")
    start.signal(signal.SIGINT)
    assert start.wait_for("once more leaves at once")
    start.signal(signal.SIGSTOP)  # it must not get on while its clock does
    time.sleep(0.4)
    start.signal(signal.SIGTERM)
    start.signal(signal.SIGCONT)
    assert start.wait() == 143, start.output()
    assert "stopped by" not in start.output()
    assert list(run.glob("checkpoint-*")) == []


def test_control_c_on_the_real_command(bench: Bench, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = tiny.config_for(bench.base, bench.data, run, **OPTIONS, num_epoch=100, save_steps=1000)
    (tmp_path / "run.yaml").write_text(to_yaml(config), encoding="utf-8")
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "finetune.py", "--config", str(tmp_path / "run.yaml")],
            cwd=REPOSITORY, stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
    printed = ""
    until_s = time.monotonic() + 120
    while "\nstep 2/" not in printed and process.poll() is None and time.monotonic() < until_s:
        time.sleep(0.05)
        printed = (tmp_path / "out").read_text(encoding="utf-8")
    process.send_signal(signal.SIGINT)
    code = process.wait(timeout=60)
    printed = (tmp_path / "out").read_text(encoding="utf-8")
    assert code == 130, printed
    assert "The same command goes on from there" in printed
    assert "Traceback" not in printed
    assert verify(newest(run)) == []


# --- the disk --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(at: Path, size_kb: int) -> Iterator[None]:
    at.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_kb}k", "tmpfs", str(at)]
    done = subprocess.run(command, capture_output=True, text=True) if os.geteuid() == 0 else None
    if done is None or done.returncode:
        pytest.skip(f"cannot mount a small disk: {done.stderr.strip() if done else 'needs root'}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


def resize(disk: Path, size_kb: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size_kb}k", str(disk)], check=True)


def test_a_disk_that_fills_up_warns_and_goes_on(bench: Bench, undisturbed: Path, tmp_path: Path) -> None:
    """Room for one checkpoint and half of the next; later for all."""
    one_kb = sum(path.stat().st_size for path in newest(undisturbed).iterdir()) // 1024
    settings_kb = sum(path.stat().st_size for path in undisturbed.glob("tokenizer*")) // 1024
    disk = tmp_path / "disk"
    cache: dict[str, Any] = {"cache_path": str(tmp_path / "cache")}
    with small_disk(disk, settings_kb + int(1.5 * one_kb) + 60):
        printed = bench.run(disk / "run", expect=1, **cache)
        assert "checkpoint-2 could not be saved" in printed
        assert "Training goes on; the previous checkpoint stays." in printed
        assert "\nstep 10/10" in printed
        assert "error: " in printed
        assert "checkpoint-10 could not be saved" in printed.split("error: ")[1]
        assert "Traceback" not in printed
        assert [path.name for path in (disk / "run").glob("checkpoint-*")] == ["checkpoint-1"]
        assert list((disk / "run").glob(".*partial*")) == []
        assert verify(disk / "run" / "checkpoint-1") == []
        resize(disk, 20_000)
        bench.run(disk / "run", **cache)
        assert_as_undisturbed(disk / "run", undisturbed)


def test_a_file_size_limit_leaves_no_partial_and_no_success(bench: Bench, tmp_path: Path) -> None:
    printed = bench.run(tmp_path / "run", expect=1, file_limit_bytes=50_000)
    assert "Training goes on" in printed
    assert "checkpoint-10 could not be saved" in printed
    assert "Traceback" not in printed
    names = [path.name for path in (tmp_path / "run").iterdir()]
    assert [name for name in names if "checkpoint" in name or "partial" in name] == []
    assert "adapter_model.safetensors" not in names


def test_no_room_for_the_final_files_is_no_success(bench: Bench, half: Path, undisturbed: Path) -> None:
    """The last checkpoint is whole; only the copy of its adapter into the run directory meets a full disk."""
    (half / "adapter_model.safetensors").mkdir()  # what cannot be replaced stands for what cannot be written
    (half / "adapter_model.safetensors" / "x").write_text("x")
    printed = bench.run(half, expect=1)
    assert "could not be saved" in printed
    assert "Traceback" not in printed
    assert step_of(newest(half)) == 10
    shutil.rmtree(half / "adapter_model.safetensors")
    bench.run(half)
    assert_as_undisturbed(half, undisturbed)


def test_an_output_that_cannot_be_written_is_reported_before_anything_is_loaded(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    printed = bench.run(tmp_path / "file" / "run", expect=1, cache_path=str(tmp_path / "cache"))
    assert "cannot be written" in printed
    assert "--output_path" in printed
    assert "records are usable" not in printed


def test_a_read_only_output_is_reported_before_anything_is_loaded(bench: Bench, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1000):
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
        for output in (tmp_path / "disk", tmp_path / "disk" / "new"):
            printed = bench.run(output, expect=1, cache_path=str(tmp_path / "cache"))
            assert "cannot be written (Read-only file system)" in printed
            assert "records are usable" not in printed


# --- two runs --------------------------------------------------------------------------------------------------------


def test_a_second_run_in_one_directory_is_refused(bench: Bench, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = bench.start(run)
    assert first.wait_for("\nstep 2/")
    first.signal(signal.SIGSTOP)  # it holds the directory for as long as this test needs
    printed = bench.run(run, expect=1)
    assert f"is in use by another run (process {first.pid} " in printed
    first.signal(signal.SIGCONT)
    assert first.wait() == 0
    assert_as_undisturbed(run, undisturbed)


# --- NaN -------------------------------------------------------------------------------------------------------------

POISON = 17  # the record whose text holds the poisoned token


def test_a_poisoned_record_stops_the_run_and_is_named(bench: Bench, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    base = Path(shutil.copytree(bench.base, tmp_path / "base"))
    weights = tiny.tensors_of(base / "model.safetensors")
    poison = AutoTokenizer.from_pretrained(base)("☠", add_special_tokens=False)["input_ids"][-1]
    weights["model.embed_tokens.weight"][poison] = torch.nan
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    rows = json.loads(bench.data.read_text(encoding="utf-8"))
    rows[POISON]["instruction"] += " ☠"
    data = tmp_path / "poisoned.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")

    run = tmp_path / "run"
    printed = bench.run(run, base=base, data=data, test_size=0, log_samples=True, expect=1)
    assert "the loss is nan" in printed
    assert "Traceback" not in printed
    told = printed.split("cannot compute these records of the step:")[1].split("Its tensors")[0].split()
    assert len(told) == 1, "its neighbour of the same step is sound"
    logged = [row["samples"] for row in map(json.loads, (run / "log.jsonl").read_text().splitlines())]
    assert not set(told) & set(tiny.flatten(logged))
    assert f"poisoned.jsonl:{POISON + 1}" in told
    stopped_at = int(re.findall(r"step (\d+): the loss is nan", printed)[0])
    assert step_of(newest(run)) == stopped_at - 1
    assert verify(newest(run)) == []
    tensors = tiny.tensors_of(newest(run) / "adapter_model.safetensors")
    assert len(tensors) > 10
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert all(math.isfinite(loss) for _, loss in tiny.losses_of(run))
    assert not (run / "adapter_model.safetensors").exists()
    assert "the loss is nan" in bench.run(run, base=base, data=data, test_size=0, log_samples=True, expect=1)
