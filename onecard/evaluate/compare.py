"""Two evaluations side by side: of each suite the difference over the same records, and whether it is noise.

Reads the folders that `onecard evaluate` wrote; no model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onecard.console import warn
from onecard.curation.make.journal import JOURNAL_FILE
from onecard.errors import ConfigError, DataError
from onecard.evaluate.report import ANSWERS_FILE, REPORT_FILE
from onecard.statistics import RESULTS, PairedTest, paired_test
from onecard.train.findings import AFTER, BEFORE


@dataclass(frozen=True)
class SuiteScore:
    """The figure of one record by which evaluations are compared; None where a row has none."""

    name: str
    of: Callable[[Mapping[str, Any]], float | None]
    is_better: int = 1  # -1: less is better


_F1 = SuiteScore("f1", lambda row: row.get("f1"))
SCORES = {
    "open": _F1, "extraction": _F1,
    "perplexity": SuiteScore("nats_per_character", lambda row: -row["log_prob"] / max(row["characters"], 1), -1),
    "loss": SuiteScore(
        "nats_per_answer_token", lambda row: -row["log_prob"] / row["tokens"] if "log_prob" in row else None, -1
    ),
}  # fmt: skip
CHOICE_SCORE = SuiteScore("accuracy", lambda row: None if row.get("score") is None else float(row["score"] == 1))


@dataclass(frozen=True)
class ComparedSuite:
    """One suite of both evaluations. `test` is of B - A."""

    name: str
    score: str
    mean_a: float
    mean_b: float
    test: PairedTest
    n_apart: int  # records that only one of them has a score for
    settings: dict[str, tuple[str, str]]  # those that differ
    is_better: int  # the direction that is better

    @property
    def result(self) -> str:
        """Whether B is better than A, in words."""
        return RESULTS[self.test.direction * self.is_better]

    def told(self, level: float, a: str, b: str) -> str:
        """One line; a, b: what the two evaluations are called."""
        means = f"{self.score} {self.mean_a:.4f} {a}, {self.mean_b:.4f} {b}"
        return f"{self.name}: {means}, {self.test.told(level, self.is_better)}"

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        named = self.test._asdict()
        interval = [round(part, 6) for part in named.pop("difference")]
        means = {"mean_a": round(self.mean_a, 6), "mean_b": round(self.mean_b, 6)}
        return {
            "name": self.name, "score": self.score, **means, "difference": interval, **named, "n_apart": self.n_apart,
            "settings": {name: list(both) for name, both in self.settings.items()}, "result": self.result,
        }  # fmt: skip


def folders_of(a: str, b: str) -> tuple[Path, Path]:
    """Where two evaluations lie, each named by its folder, by a run that has measured itself (--eval_suites), or as
    "base", which is that of the other run's base."""
    return _folder_of(a, b), _folder_of(b, a)


def _folder_of(side: str, other: str) -> Path:
    folder = Path(side).expanduser()
    if (folder / REPORT_FILE).is_file():
        return folder
    if side == "base":
        return Path(other).expanduser() / BEFORE
    return folder / AFTER if (folder / AFTER).is_dir() else folder


def compare_reports(a: Path, b: Path, *, level: float = 0.95, seed: int = 0) -> list[ComparedSuite]:
    """The suites that both folders hold. Raises DataError, and ConfigError where they cannot be compared."""
    first, second = read_evaluation(a), read_evaluation(b)
    names = [name for name in first if name in second]
    if not names:
        raise ConfigError("", f"{a} and {b} have no suite in common: {', '.join(first)} and {', '.join(second)}")
    found = [_compared(name, first[name], second[name], level, seed) for name in names]
    suites = [suite for suite in found if suite is not None]
    if not suites:
        raise DataError(f"no record of {', '.join(names)} has a score in both {a} and {b}")
    return suites


def _compared(name: str, a: dict[str, Any], b: dict[str, Any], level: float, seed: int) -> ComparedSuite | None:
    digests = {side["digest"] for side in (a, b)} - {None}
    if a["kind"] != b["kind"] or len(digests) > 1:
        raise ConfigError("", f"{name}: the two evaluations read other data; measure both on the same files")
    score = SCORES.get(a["kind"], CHOICE_SCORE)
    left, right = ({key: value for key, row in side["rows"].items() if (value := score.of(row)) is not None}
                   for side in (a, b))  # fmt: skip
    keys = [key for key in left if key in right]
    if not keys:
        warn(f"{name} is left out: no record has a score ({score.name}) in both evaluations; answers without a "
             "reference have none, nor has extraction that an earlier version measured")  # fmt: skip
        return None
    before, after = [left[key] for key in keys], [right[key] for key in keys]
    test = paired_test(before, after, level=level, seed=seed)
    settings = {
        key: (str(a["settings"].get(key, "-")), str(b["settings"].get(key, "-")))
        for key in {**a["settings"], **b["settings"]}
        if a["settings"].get(key) != b["settings"].get(key)
    }
    return ComparedSuite(
        name, score.name, sum(before) / len(keys), sum(after) / len(keys), test,
        len({*left} ^ {*right}), settings, score.is_better,
    )  # fmt: skip


def read_evaluation(folder: Path) -> dict[str, dict[str, Any]]:
    """Of each suite its kind, settings, digest of the data, and rows by key. Raises DataError."""
    try:
        report = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
        lines = (folder / ANSWERS_FILE).read_text(encoding="utf-8").split("\n")
        journal = folder / JOURNAL_FILE
        head = json.loads(journal.read_text(encoding="utf-8").partition("\n")[0]) if journal.is_file() else {}
        data = head.get("suites", {})
        found = {
            suite["name"]: {
                "kind": suite["kind"], "settings": suite["settings"], "rows": {},
                "digest": data.get(suite["name"], {}).get("digest"),
            }
            for suite in report["suites"]
        }  # fmt: skip
        for line in filter(None, lines):
            row = json.loads(line)
            found[row["suite"]]["rows"][row["key"]] = row
    except FileNotFoundError as reason:
        raise DataError(f"there is no {Path(reason.filename).name}; onecard evaluate writes it when it has ended, and "
                        "finetune --eval_suites in a run", str(folder)) from None  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as reason:
        raise DataError(f"is no whole evaluation ({type(reason).__name__}: {reason})", str(folder)) from None
    return found


def comparison_lines(suites: Sequence[ComparedSuite], level: float) -> list[str]:
    """What is said on the screen: a line for each suite, and what was asked in another way."""
    lines = []
    for suite in suites:
        lines.append(suite.told(level, "in A", "in B"))
        lines += [f"  {name} is {a} in A and {b} in B" for name, (a, b) in suite.settings.items()]
        if suite.n_apart:
            lines.append(f"  {suite.n_apart} records have a score in one of the two only, and are left out")
    return lines
