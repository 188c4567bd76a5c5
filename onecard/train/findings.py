"""What a run found out about itself, read from its directory: the comparison with the base, and what was forgotten.

Imports no torch: `onecard evaluate ship` reads it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onecard.config.given_paths import SCORES
from onecard.errors import DataError
from onecard.train.trackers import FORGETTING, LOG_NAME, REWARD, read_log

COMPARISON_NAME = "base_comparison.json"
BEFORE, AFTER = Path("evaluation", "before"), Path("evaluation", "after")  # what --eval_suites found, in the run


@dataclass(frozen=True)
class RunFindings:
    """Losses of the held-out records under base and result, in order; KL(base || result) in nats per token."""

    records: tuple[str, ...] = ()
    base: tuple[float, ...] = ()
    tuned: tuple[float, ...] = ()
    forgetting: float | None = None
    noise: float = 0.0
    """KL by rounding alone."""
    of_rewards: bool = False
    """Whether it learned from rewards, so that there are no losses to compare."""
    gives_rewards: bool = False
    """Whether it is a reward model, which writes no text: it forgets none, and onecard evaluate cannot ask it."""


def read_findings(run_dir: Path) -> RunFindings:
    """The findings of a run; without what it did not measure. Raises DataError for a broken file, or no run."""
    if not any((run_dir / name).is_file() for name in (COMPARISON_NAME, LOG_NAME)):
        raise DataError(
            f"there is neither {COMPARISON_NAME} nor {LOG_NAME}: is this the directory of a run?", str(run_dir)
        )
    rows = read_log(run_dir)
    published = _content(run_dir / "trainer_state.json").get("step")
    kl = [row[FORGETTING] for row in rows if FORGETTING in row and (published is None or row["step"] <= published)]
    noise = [row["noise"] for row in rows if row.get("event") == FORGETTING and "noise" in row]
    content = _content(run_dir / COMPARISON_NAME)
    try:
        series = [tuple(content.get(name, ())) for name in ("records", "base", "tuned")]
        if series[2] and len({len(one) for one in series}) > 1:
            raise ValueError
        base, tuned = (tuple(map(float, one)) for one in series[1:])
    except (TypeError, ValueError):
        raise DataError(
            "does not hold a loss of base and result for each record", str(run_dir / COMPARISON_NAME)
        ) from None
    return RunFindings(
        series[0], base, tuned, kl[-1] if kl else None, noise[-1] if noise else 0.0,
        of_rewards=any(REWARD in row for row in rows),
        gives_rewards=_content(run_dir / "adapter_config.json").get("task_type") == SCORES,
    )  # fmt: skip


def _content(path: Path) -> dict[str, Any]:
    """The object of a JSON file; empty where there is none. Raises DataError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as reason:
        raise DataError(f"cannot be read ({reason})", str(path)) from None
    if not isinstance(content, dict):
        raise DataError("is no JSON object", str(path))
    return content
