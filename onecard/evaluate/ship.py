"""Ship, do not ship, or undecided: the verdict on a run, from what it and its evaluations found. No model is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from onecard.errors import DataError
from onecard.evaluate.compare import compare_reports
from onecard.evaluate.report import REPORT_FILE
from onecard.statistics import paired_test
from onecard.train.findings import AFTER, BEFORE, COMPARISON_NAME, RunFindings, read_findings

SHIP, DO_NOT_SHIP, UNDECIDED = "ship", "do not ship", "undecided"
EXIT_CODES = {SHIP: 0, DO_NOT_SHIP: 2, UNDECIDED: 3}
RESAMPLES = 10_000  # so that the tails of 99 % are seen
# What must be the same in two runs for their losses to be of the same tokens.
_TEXT_FILES = ("chat_template.jinja", "tokenizer.json")


@dataclass
class ShipVerdict:
    """What was found better, worse, or open; `word` follows from it."""

    better: list[str] = field(default_factory=list)
    worse: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)  # neither, though it was measured
    missing: list[str] = field(default_factory=list)  # without which nothing is shipped

    @property
    def word(self) -> str:
        """Worse anywhere: do not ship. Better somewhere, and all was measured: ship."""
        if self.worse:
            return DO_NOT_SHIP
        return SHIP if self.better and not self.missing else UNDECIDED

    def add(self, direction: int, reason: str) -> None:
        """A reason by its direction: 1 is better, -1 worse, 0 open."""
        {1: self.better, -1: self.worse, 0: self.open}[direction].append(reason)


def judge_run(
    run: Path, baseline: Path | None = None, reports: tuple[Path, Path] | None = None, *,
    most_forgetting: float, level: float,
) -> ShipVerdict:  # fmt: skip
    """The verdict on a run against its base, or against another run of the same held-out records.

    reports: folders of `onecard evaluate`, measured with what the run is compared with, and with the run; None: those
    that the runs hold themselves.
    Raises DataError, and ConfigError for reports that cannot be compared.
    """
    verdict, found = ShipVerdict(), read_findings(run)
    reports = reports or own_reports(run, baseline)
    other = None if baseline is None else read_findings(baseline)
    _judge_task(verdict, found, other, level, has_reports=reports is not None)
    if baseline is not None:
        _check_texts(verdict, run, baseline)
    _judge_forgetting(verdict, found, other, most_forgetting)
    if reports is not None:
        for suite in compare_reports(*reports, level=level):
            verdict.add(suite.test.direction * suite.is_better, suite.told(level, "before", "now"))
    if found.forgetting is None and reports is None and not found.gives_rewards:
        verdict.missing.append("nothing tells what else has become worse: the run did not measure forgetting; give "
                               "--reports BEFORE AFTER, two folders of onecard evaluate")  # fmt: skip
    return verdict


def own_reports(run: Path, baseline: Path | None) -> tuple[Path, Path] | None:
    """What a run measured itself by --eval_suites, and what it is compared with; None where either is missing."""
    before = run / BEFORE if baseline is None else baseline / AFTER
    both = before, run / AFTER
    return both if all((folder / REPORT_FILE).is_file() for folder in both) else None


def _judge_task(
    verdict: ShipVerdict, found: RunFindings, other: RunFindings | None, level: float, *, has_reports: bool
) -> None:
    """The losses of the held-out records, paired."""
    if not found.tuned or (other is not None and not other.tuned):
        which, without = ("the run", found) if not found.tuned else ("the baseline", other)
        if without is not None and without.of_rewards:
            advice = "" if has_reports else (
                "; what it gained is in two folders of onecard evaluate, --reports BEFORE AFTER"
            )  # fmt: skip
            verdict.open.append(f"held-out records: {which} learned from rewards and has no losses to compare{advice}")
            return
        verdict.open.append(f"held-out records: {which} has no result in {COMPARISON_NAME}; it has not ended, or "
                            "compared nothing (finetune --test_size 0, or --compare_with_base false)")  # fmt: skip
        return
    before = found.base if other is None else other.tuned
    if other is not None and other.records != found.records:
        raise DataError("the two runs held out other records, so their losses cannot be compared: train both on the "
                        "same data and hold out the same part (finetune --test_size and --seed)")  # fmt: skip
    if not all(map(math.isfinite, (*before, *found.tuned))):
        verdict.missing.append("held-out records: the loss of one is no number")
        return
    test = paired_test(before, found.tuned, level=level, resamples=RESAMPLES)
    text = f"held-out records: mean loss {fmean(before):.4f} before, {fmean(found.tuned):.4f} now"
    verdict.add(-test.direction, f"{text}, {test.told(level, -1)}")


def _check_texts(verdict: ShipVerdict, run: Path, baseline: Path) -> None:
    """Losses per token are of the same tokens only with the same tokenizer and template."""
    for name in _TEXT_FILES:
        one, other = run / name, baseline / name
        if one.is_file() and other.is_file() and one.read_bytes() != other.read_bytes():
            verdict.missing.append(f"the two runs have another {name}, so their losses are not of the same tokens; "
                                   "give --reports BEFORE AFTER")  # fmt: skip


def _judge_forgetting(verdict: ShipVerdict, found: RunFindings, other: RunFindings | None, most: float) -> None:
    """Against the limit, or against what the baseline forgot where that is more; below the noise it means nothing."""
    if found.forgetting is None:
        return
    accepted = other.forgetting if other is not None and other.forgetting is not None else 0.0
    limit = max(most, accepted)
    has_forgotten = found.forgetting > max(limit, found.noise)
    against = "more than" if has_forgotten else "within"
    verdict.add(-1 if has_forgotten else 0, f"forgetting: {found.forgetting:.2g} nats per token, {against} the limit "
                f"of {limit:.2g} (rounding alone gives {found.noise:.1g})")  # fmt: skip
