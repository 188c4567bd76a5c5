"""Advice at the end of a run: what its own figures prove, each with the figure that says so.

Functions of the rows of log.jsonl and of what the run found out; nothing here is measured, and imports no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from onecard.console import say, warn
from onecard.errors import DataError
from onecard.statistics import paired_test
from onecard.storage import write_whole
from onecard.train.findings import RunFindings, read_findings
from onecard.train.trackers import read_log

ADVICE_NAME = "advice.json"
LEAST_CHANGE = 0.01  # of an evaluation loss: less between two evaluations is not called a rise or a fall
LEARNED_BY_HEART = 0.5  # training loss over evaluation loss
DIVERGED = 1.05  # median training loss of the last quarter over that of the first
FEWEST_LOGGED = 8  # rows of training loss, so that a quarter has two
LEAST_CUT = 0.01  # of the samples


class LoggedLoss(NamedTuple):
    """A loss of log.jsonl."""

    step: int
    loss: float


@dataclass(frozen=True)
class Advice:
    """What was found, in words and as figures; `name` is for programs."""

    name: str
    text: str
    figures: dict[str, float]


@dataclass(frozen=True)
class LearnedData:
    """The rows that were learned, and how many samples of all were cut to --cutoff_len."""

    n_rows: int
    n_samples: int = 0
    n_cut: int = 0


def advice_of(rows: Sequence[Mapping[str, Any]], found: RunFindings, data: LearnedData) -> list[Advice]:
    """All that the figures of a run prove, most urgent first."""
    losses, tests = _series(rows, "loss"), _series(rows, "eval_loss")
    parts = (
        _too_high_rate(losses, found), _overfitting(losses, tests), _too_few_rows(losses, tests, data),
        _undertrained(tests), _cut(data), _too_few_held_out(found),
    )  # fmt: skip
    return [part for part in parts if part is not None]


def _series(rows: Sequence[Mapping[str, Any]], name: str) -> list[LoggedLoss]:
    return [LoggedLoss(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]


def _too_high_rate(losses: Sequence[LoggedLoss], found: RunFindings) -> Advice | None:
    """The training loss ended higher than it began, or, with a result that is worse, than that of the base."""
    if len(losses) < FEWEST_LOGGED:
        return None
    quarter = len(losses) // 4
    first, last = (median(row.loss for row in part) for part in (losses[:quarter], losses[-quarter:]))
    figures = {"first": first, "last": last}
    if 0 < DIVERGED * first < last:
        return Advice("learning_rate_too_high", f"the learning rate is too high: the training loss rose from "
                      f"{first:.4f} in the first quarter of the run to {last:.4f} in the last (medians); lower "
                      "--learning_rate", figures)  # fmt: skip
    if not _is_whole(found) or paired_test(found.base, found.tuned).direction < 1:
        return None
    base = sum(found.base) / len(found.base)
    if last <= base:
        return None
    return Advice("learning_rate_too_high", f"the learning rate is too high: held-out records became worse, and the "
                  f"training loss of the last quarter, {last:.4f}, is above the base's on held-out records, "
                  f"{base:.4f}; lower --learning_rate", {**figures, "base": base})  # fmt: skip


def _overfitting(losses: Sequence[LoggedLoss], tests: Sequence[LoggedLoss]) -> Advice | None:
    """Two evaluations or more behind the best one, each above the one before, while the training loss fell."""
    if len(tests) < 3:
        return None
    best = min(tests, key=lambda row: row.loss)
    after = [row for row in tests if row.step >= best.step]
    rises = all(new.loss > old.loss for old, new in pairwise(after))
    if len(after) < 3 or not rises or after[-1].loss - best.loss < LEAST_CHANGE * abs(best.loss):
        return None
    start = max((row.step for row in tests if row.step < best.step), default=0)
    then, now = _mean(losses, start, best.step), _mean(losses, tests[-2].step, tests[-1].step)
    if not now < (1 - LEAST_CHANGE) * then:
        return None
    return Advice("overfitting", f"overfitting since step {best.step}: the evaluation loss rose from {best.loss:.4f} "
                  f"there to {after[-1].loss:.4f} at step {after[-1].step}, while the training loss fell; "
                  f"--final_weights best takes step {best.step}, or use a smaller --num_epoch",
                  {"step": best.step, "eval_loss": best.loss, "last_eval_loss": after[-1].loss})  # fmt: skip


def _mean(losses: Sequence[LoggedLoss], start: int, end: int) -> float:
    """The mean training loss of the steps behind `start` up to `end`; NaN where none was logged."""
    found = [row.loss for row in losses if start < row.step <= end]
    return sum(found) / len(found) if found else math.nan


def _too_few_rows(losses: Sequence[LoggedLoss], tests: Sequence[LoggedLoss], data: LearnedData) -> Advice | None:
    """Overfitting, and the rows are known far better than those that were held out: they were learned by heart."""
    if _overfitting(losses, tests) is None:
        return None
    learned, held_out = _mean(losses, tests[-2].step, tests[-1].step), tests[-1].loss
    if learned >= LEARNED_BY_HEART * held_out:
        return None
    return Advice("too_few_rows", f"too few rows: the {data.n_rows:,} rows were learned by heart (training loss "
                  f"{learned:.4f}, evaluation loss {held_out:.4f}); more rows help",
                  {"rows": data.n_rows, "loss": learned, "eval_loss": held_out})  # fmt: skip


def _undertrained(tests: Sequence[LoggedLoss]) -> Advice | None:
    """The last three evaluations fell, the last time by more than the least change."""
    if len(tests) < 3:
        return None
    first, old, new = tests[-3:]
    if not first.loss > old.loss > new.loss or old.loss - new.loss < LEAST_CHANGE * abs(old.loss):
        return None
    return Advice("undertrained", f"undertrained: the evaluation loss was still falling at the end, from "
                  f"{old.loss:.4f} at step {old.step} to {new.loss:.4f} at step {new.step}; a larger --num_epoch may "
                  "lower it further",
                  {"step": old.step, "eval_loss": old.loss, "last_eval_loss": new.loss})  # fmt: skip


def _cut(data: LearnedData) -> Advice | None:
    if data.n_cut <= LEAST_CUT * data.n_samples:
        return None
    return Advice("answers_cut", f"{data.n_cut:,} of {data.n_samples:,} samples were cut to --cutoff_len: turns "
                  "or the ends of answers were not learned; a larger one keeps them",
                  {"cut": data.n_cut, "samples": data.n_samples})  # fmt: skip


def _too_few_held_out(found: RunFindings) -> Advice | None:
    """No difference beyond noise between base and result: which difference could have been seen."""
    if not _is_whole(found):
        return None
    test = paired_test(found.base, found.tuned)
    if test.direction:
        return None
    half = (test.difference.high - test.difference.low) / 2
    return Advice("too_few_held_out", f"{test.n} held-out records do not tell whether training helped: they show a "
                  f"difference of {half:.4f} or more, and found {test.difference.value:+.4f}; a larger --test_size "
                  "shows less", {"records": test.n, "visible": half, "difference": test.difference.value})  # fmt: skip


def _is_whole(found: RunFindings) -> bool:
    return bool(found.tuned) and all(map(math.isfinite, (*found.base, *found.tuned)))


def advise(run_dir: Path, data: LearnedData) -> None:
    """Say the advice on a run that has ended, and write it into its directory."""
    try:
        found = advice_of(read_log(run_dir), read_findings(run_dir), data)
        write_whole(run_dir / ADVICE_NAME, json.dumps([asdict(one) for one in found], indent=1) + "\n")
    except (OSError, DataError) as reason:
        warn(f"{ADVICE_NAME} was not written ({reason})")
        return
    for one in found:
        say(one.text)
