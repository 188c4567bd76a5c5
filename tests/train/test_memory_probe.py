"""The memory probe finds the worst micro-batch before the first step, and leaves nothing behind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from onecard.config.run import TrainOptions
from onecard.data.batches import micro_batches
from onecard.data.packing import padded_tokens
from onecard.errors import ModelError
from onecard.model.memory.estimate import GIB
from onecard.model.memory.plan import CardSpec
from onecard.objectives import next_token
from onecard.recipes import finetune
from onecard.train import memory_probe
from onecard.train.memory_probe import LargestMicroBatch, worst_micro_batch
from onecard.train.oom import MicroBatchLimits
from onecard.train.state import TrainerState
from onecard.train.trackers import read_log
from tests import tiny
from tests.runs import assert_same_end, run_and_stop


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=7), st.integers(0, 5), st.integers(0, 150), st.integers(1, 8))
def test_worst_micro_batch_is_that_of_all_steps(lengths: list[int], rows: int, tokens: int, total_batch: int) -> None:
    """Held against every set of samples that a step can have."""
    array, limits = np.array(lengths), MicroBatchLimits(rows, tokens)
    most = 0
    for chosen in range(1, 2 ** len(lengths)):
        step_rows = np.array([i for i in range(len(lengths)) if chosen >> i & 1])
        if len(step_rows) <= total_batch:
            most = max(most, *(padded_tokens(m, array) for m in micro_batches(step_rows, array, **limits.cut)))
    worst = worst_micro_batch(array, limits, total_batch)
    assert worst.tokens == most
    assert worst.length in lengths and worst.rows <= total_batch


def test_examples() -> None:
    lengths = np.array([900, 250, 250, 250, 250])
    assert worst_micro_batch(lengths, MicroBatchLimits(micro_tokens=1000), 32) == LargestMicroBatch(4, 250)
    assert worst_micro_batch(lengths, MicroBatchLimits(micro_tokens=1000), 2) == LargestMicroBatch(1, 900)
    assert worst_micro_batch(
        np.array([4000] + [256] * 50), MicroBatchLimits(micro_tokens=4096), 32
    ) == LargestMicroBatch(16, 256)


@pytest.fixture(scope="module")
def one_long_row(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 short records and one that is many times as long."""
    return write_rows(tmp_path_factory.mktemp("data") / "one_long_row.jsonl", n_numbers=400)


def write_rows(path: Path, *, n_numbers: int) -> Path:
    rows = [{"instruction": f"say {i}", "output": str(i)} for i in range(24)]
    rows[4]["output"] = " ".join(str(i) for i in range(n_numbers))
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


@contextmanager
def room_for(n_tokens: int, *, beside: list[int]) -> Iterator[None]:
    """No micro-batch of more tokens passes, padding included; `beside` collects the tokens of each try."""

    def limited(real: Any) -> Any:
        def forward(model: nn.Module, batch: Any, **options: Any) -> Any:
            def check(_module: nn.Module, args: Any, kwargs: Any) -> None:
                beside.append(kwargs["input_ids"].numel())
                if beside[-1] > n_tokens:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

            hook = model.register_forward_pre_hook(check, with_kwargs=True)
            try:
                return real(model, batch, **options)
            finally:
                hook.remove()

        return forward

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(next_token, "summed_loss", limited(next_token.summed_loss))
        yield


def longest_of(run: Path) -> int:
    return max(row["tokens"] for row in read_log(run) if "tokens" in row)


LONG = {"cutoff_len": 2048, "total_batch": 6, "micro_batch": 0, "micro_tokens": 6000, "learning_rate": 1e-4,
        "test_size": 3, "eval_steps": 2, "rehearsal": True}  # fmt: skip


def test_one_long_row_among_short_ones(
    tiny_base: Path, one_long_row: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What does not fit is found before step 1, and never met again; the weights are those of a larger card."""
    tried: list[int] = []
    whole = finetune(tiny.config_for(tiny_base, one_long_row, tmp_path / "whole" / "run", **LONG))
    capsys.readouterr()
    with room_for(1700, beside=tried):
        run = finetune(tiny.config_for(tiny_base, one_long_row, tmp_path / "small" / "run", **LONG))
    printed = capsys.readouterr().out
    rows = read_log(run)
    events = [row for row in rows if row.get("event") == "out_of_memory"]
    assert events and rows[: len(events)] == events, "they come before the first step"
    assert all(row["step"] == 1 and "tokens at once instead of" in row["change"] for row in events)
    assert sum(n > 1700 for n in tried) == len(events) == printed.count("out of memory; ")
    assert printed.index("rehearsed ") < printed.index("step 1: out of memory") < printed.index("step 1/4")
    assert max(n for n in tried if n <= 1700) > 1000, "the long row is not in it"
    weights = [tiny.tensors_of(path / "adapter_model.safetensors") for path in (whole, run)]
    assert tiny.largest_difference(*weights) < 1e-6


def test_the_largest_rows_are_held_out(tiny_base: Path, tmp_path: Path) -> None:
    """Found before step 1 as well, and not tried again in each of the evaluations."""
    tried: list[int] = []
    data = write_rows(tmp_path / "data.jsonl", n_numbers=150)  # the short ones together are longer
    options = {**LONG, "test_size": 20, "eval_steps": 1, "micro_tokens": 100_000, "total_batch": 2}
    with room_for(900, beside=tried):
        run = finetune(tiny.config_for(tiny_base, data, tmp_path / "run", **options))
    events = [row for row in read_log(run) if row.get("event") == "out_of_memory"]
    assert [row["step"] for row in events] == [0] * sum(n > 900 for n in tried)
    assert events
    assert sum("eval_loss" in row for row in read_log(run)) == 2


def test_the_longest_row_is_tried_too(
    tiny_base: Path, one_long_row: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many short rows have more tokens, but the attention of the long one may be larger."""
    seen: list[tuple[int, ...]] = []
    real = memory_probe.accumulate

    def watched(run: Any, data: Any, micros: Any, supervised: int) -> Any:
        seen.append(tuple(int(n) for n in run.train_samples.lengths[micros[0]]))
        assert all(module.training for module in run.model.modules()), "layers would not be computed again"
        return real(run, data, micros, supervised)

    monkeypatch.setattr(memory_probe, "accumulate", watched)
    options = {**LONG, "total_batch": 32, "micro_tokens": 2100, "gradient_checkpointing": True, "test_size": 0}
    finetune(tiny.config_for(tiny_base, one_long_row, tmp_path / "run", **options, max_steps=1))
    assert len(seen) == 4 and len(seen[0]) == len(seen[1]) > 10 and max(seen[0]) < 200
    assert [len(rows) for rows in seen[2:]] == [1, 1] and max(seen[2]) > 1000


@pytest.mark.parametrize("variant", [
    {}, {"bits": 4, "gradient_checkpointing": True}, {"optimizer": "adamw_8bit", "lora_dropout": 0.2},
])  # fmt: skip
def test_it_leaves_nothing_behind(
    variant: dict[str, Any], tiny_base: Path, instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run with it equals one without it bit for bit; after a resume as well."""
    options = {"test_size": 3, "eval_steps": 2, "rehearsal": True, **variant}
    one = finetune(tiny.config_for(tiny_base, instructions, tmp_path / "1" / "run", **{**options, "rehearsal": False}))
    config = tiny.config_for(tiny_base, instructions, tmp_path / "2" / "run", **options)
    run_and_stop(config, monkeypatch, after_steps=2)
    assert_same_end(one, finetune(config))


def test_not_even_the_smallest_fits(tiny_base: Path, instructions: Path, tmp_path: Path) -> None:
    tried: list[int] = []
    config = tiny.config_for(tiny_base, instructions, tmp_path / "run", rehearsal=True)
    with room_for(20, beside=tried), pytest.raises(ModelError, match=r"step 1 with nothing left .*GiB were planned"):
        finetune(config)
    assert len(tried) >= 5
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_evaluation_that_needs_more_room(
    tiny_base: Path, instructions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its rows are taken in smaller pieces, with the same loss; one event for each time that it did not fit."""
    options = {
        "test_size": 8,
        "eval_steps": 100,
        "micro_batch": 8,
        "total_batch": 1,
        "max_steps": 2,
        "rehearsal": False,
    }
    losses, tried = [], list[int]()
    for room in (10_000, 400):
        config = tiny.config_for(tiny_base, instructions, tmp_path / str(room) / "run", **options)
        tried.clear()
        with room_for(room, beside=tried):
            rows = read_log(finetune(config))
        losses.append([row["eval_loss"] for row in rows if "eval_loss" in row])
    events = [row for row in rows if row.get("event") == "out_of_memory"]
    assert [row["step"] for row in events] == [2] * sum(n > 400 for n in tried)
    assert events
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert capsys.readouterr().out.count("evaluation after step 2: out of memory") == len(events)


class EqualRows:
    lengths = np.full(24, 100)
    n_per_epoch = 24

    def __len__(self) -> int:
        return len(self.lengths)


@pytest.mark.parametrize(("steps", "planned_gib", "wanted", "expected"), [
    (3, 1, "auto", False), (400, 1, "auto", True), (3, 9, "auto", True), (3, 1, True, True), (400, 1, False, False),
])  # fmt: skip
def test_on_a_cpu_it_takes_little_of_the_run_or_memory_is_short(
    steps: int, planned_gib: int, wanted: Any, expected: bool, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A step has 800 tokens; a probe takes 8 x 100 twice. Of 16 GiB more than half are enough room."""
    done: list[Any] = []
    monkeypatch.setattr(memory_probe, "probe_memory", done.append)
    card = CardSpec("CPU", 20 * GIB, 16 * GIB, is_gpu=False)
    run: Any = SimpleNamespace(
        state=TrainerState(total_steps=steps), options=TrainOptions(total_batch=8), limits=MicroBatchLimits(),
        plan=SimpleNamespace(card=card), planned_bytes=planned_gib * GIB, train_samples=EqualRows(),
    )  # fmt: skip
    memory_probe.probe_if_wanted(run, wanted)
    assert bool(done) == expected
    said = "no rehearsal: it would take 67% of the time of this run, and 1.00 of 16.0 GiB are planned"
    assert (said in capsys.readouterr().out) == (wanted == "auto" and not expected)
