"""Show what a run with rewards sampled: mean rewards by step, and the answers of a step with what each was worth.

onecard inspect-run --run_path outputs/grpo --step 40
The run must have kept its answers: finetune --log_rollouts.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onecard.config.parsing import parse
from onecard.config.problems import Problem, too_small
from onecard.console import say
from onecard.errors import ConfigError
from onecard.train.step_log import ROLLOUTS_NAME, read_rows

MOST_STEPS = 20  # lines of the table


@dataclass
class InspectRunOptions:
    """Which run, and what of it."""

    run_path: str = "outputs/my-first-adapter"
    """Directory of the run."""
    step: int = 0
    """Step whose answers are shown; 0: the last one."""
    n_shown: int = 2
    """Prompts of that step whose answers are shown, best answers first."""
    json: bool = False
    """Print one JSON object for each answer of the step instead of text."""

    def problems(self) -> list[Problem]:
        return too_small(self, step=0, n_shown=0)


def main(argv: list[str] | None = None) -> None:
    """Run the program with these words, or those of the command line."""
    options = parse(InspectRunOptions, argv, description=__doc__ or "")
    if not (Path(options.run_path) / ROLLOUTS_NAME).is_file():
        raise ConfigError("--run_path", f"there is no {ROLLOUTS_NAME} in {options.run_path}; a run that learns from "
                          "rewards can write it (finetune --objective grpo --log_rollouts)")  # fmt: skip
    totals: dict[int, list[float]] = defaultdict(lambda: [0.0] * 4)  # answers, rewards, tokens, cut off
    rows: list[dict[str, Any]] = []
    for row in read_rows(Path(options.run_path) / ROLLOUTS_NAME):
        added = (1, row["reward"], row["n_tokens"], not row["ended"])
        totals[row["step"]] = [total + more for total, more in zip(totals[row["step"]], added, strict=True)]
        # The last step is known at the end only.
        rows = rows if (rows and rows[0]["step"] == row["step"]) or options.step else []
        if row["step"] == (options.step or row["step"]):
            rows.append(row)
    if not rows:
        steps = f"those of {min(totals)} to {max(totals)}" if totals else "none"
        raise ConfigError("--step", f"there are no answers of step {options.step}, but {steps}")
    if options.json:
        for row in rows:
            say(json.dumps(row, ensure_ascii=False), is_styled=False)
        return
    _show_steps(totals)
    _show_answers(rows, options.n_shown)


def _show_steps(totals: dict[int, list[float]]) -> None:
    steps = sorted(totals)
    every = -(-len(steps) // MOST_STEPS)
    say("  step  answers  mean reward  tokens  cut off")
    for step in sorted({*steps[::every], steps[-1]}):
        n, reward, tokens, cut = totals[step]
        say(f"{step:6,}  {n:7,.0f}  {reward / n:11.4f}  {tokens / n:6.1f}  {cut / n:7.1%}")


def _show_answers(rows: list[dict[str, Any]], n_shown: int) -> None:
    by_record: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_record[row["record"]].append(row)
    for record, group in list(by_record.items())[:n_shown]:
        known = "" if group[0]["reference"] is None else f"; recorded answer: {_quoted(group[0]['reference'])}"
        say(f"\nstep {group[0]['step']}, {record}: {_quoted(group[0]['prompt'])}{known}")
        for row in sorted(group, key=lambda row: -row["reward"]):
            parts = ", ".join(f"{name} {value:g}" for name, value in row["rewards"].items())
            say(f"  {row['reward']:8.4f}  {_quoted(row['answer'])}{'' if row['ended'] else ' [cut off]'}  ({parts})")


def _quoted(text: str) -> str:
    """On one line, control characters escaped."""
    return json.dumps(text, ensure_ascii=False)
