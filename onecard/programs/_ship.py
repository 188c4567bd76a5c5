"""`onecard evaluate ship`: the verdict on a run, with an exit code for scripts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from onecard.config.parsing import missing, parse
from onecard.config.problems import Problem, too_small
from onecard.console import say
from onecard.errors import ConfigError


@dataclass
class ShipOptions:
    """Which run, and against what."""

    run: str = ""
    """Directory of the run."""
    baseline: str = ""
    """Directory of another run, with the same held-out records, to compare with. Empty: the base model."""
    reports: str | list[str] = ""
    """Two folders of onecard evaluate, BEFORE AFTER: no suite in them may have become worse. Empty: those that the run
    wrote by finetune --eval_suites, if it did."""
    most_forgetting: float = 0.1
    """Most KL(base || result) in nats per token on general texts. At 0.1, text that the base writes is 10.5 % more
    perplexing to the result (exp(0.1) - 1)."""
    level: float = 0.99
    """Level of the intervals. At 0.95 one run in twenty that changed nothing would be called better or worse."""

    def problems(self) -> list[Problem]:
        found = missing(self, "run") + too_small(self, most_forgetting=0)
        if self.reports and (isinstance(self.reports, str) or len(self.reports) != 2):
            found.append(("--reports", "takes two folders: BEFORE AFTER"))
        if not 0.5 <= self.level < 1:
            found.append(("--level", f"{self.level} is not from 0.5 to below 1"))
        return found


def main(words: list[str]) -> None:
    """Run the verb with these words. Raises SystemExit: 0 ship, 2 do not ship, 3 undecided; what cannot be judged is an
    error, which ends with 1, so that no script takes it for a verdict."""
    from onecard.evaluate.ship import EXIT_CODES, judge_run

    about = (
        "Whether to ship a run: better on its held-out records beyond noise, and worse nowhere else. Exit code: 0 "
        "ship, 2 do not ship, 3 undecided, 1 an error."
    )
    try:
        options = parse(ShipOptions, words, description=about, verb="ship")
        baseline = Path(options.baseline).expanduser() if options.baseline else None
        folders = [Path(folder).expanduser() for folder in options.reports]
        verdict = judge_run(
            Path(options.run).expanduser(), baseline, (folders[0], folders[1]) if folders else None,
            most_forgetting=options.most_forgetting, level=options.level,
        )  # fmt: skip
    except ConfigError as reason:
        reason.exit_code = 1
        raise
    for reasons in (verdict.worse, verdict.missing, verdict.better, verdict.open):
        for text in reasons:
            say(text)
    say(f"verdict: {verdict.word}")
    if EXIT_CODES[verdict.word]:
        raise SystemExit(EXIT_CODES[verdict.word])
