"""Ask a run something while it trains, pause and stop it, and take its card for a while.

onecard control status --run outputs/mine
onecard control ask --run outputs/mine --question "What is the capital of France?"
onecard control pause --run outputs/mine
onecard control give-back --run outputs/mine
The run does it between two of its steps; where it ends, and what it learns, stays what it would have been.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from onecard.config.inference import SamplingOptions
from onecard.config.parsing import missing, parse_verb
from onecard.config.problems import Problem
from onecard.console import escaped, say
from onecard.errors import OneCardError
from onecard.train.control import reply, send, status

POLL_S = 0.1


@dataclass
class RunChoice:
    """Which run."""

    run: str = "outputs/my-first-adapter"
    """Directory of the run (its --output_path)."""

    def problems(self) -> list[Problem]:
        return missing(self, "run")


@dataclass
class Status(RunChoice):
    """Say what the run does, and at which step."""


@dataclass
class Ask(SamplingOptions, RunChoice):
    """Let the present weights answer a question; it is kept in the run's questions.jsonl."""

    question: str = ""
    """What is asked."""
    system: str = ""
    """System prompt."""

    def problems(self) -> list[Problem]:
        return [*missing(self, "run", "question"), *super().problems()]


@dataclass
class Save(RunChoice):
    """Write a checkpoint of the present step."""


@dataclass
class Pause(RunChoice):
    """Let it wait behind its present step; its memory stays where it is."""


@dataclass
class Continue(RunChoice):
    """Let a run that waits go on, from RAM, too."""


@dataclass
class Stop(RunChoice):
    """Save and end, as Ctrl-C does; the same command goes on from there."""


@dataclass
class GiveBack(RunChoice):
    """Move all that the run holds on the card to RAM, and wait: the card is free for something else."""


@dataclass
class TakeBack(RunChoice):
    """Move it back onto the card, bit for bit, and go on."""


VERBS = {
    "status": Status, "ask": Ask, "save": Save, "pause": Pause, "continue": Continue, "stop": Stop,
    "give-back": GiveBack, "take-back": TakeBack,
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Run the program with these words, or those of the command line."""
    verb, options = parse_verb(VERBS, argv, description=__doc__ or "", above="control")
    run = Path(options.run)
    if verb == "status":
        say(f"{run}: {status(run).sentence}")
        return
    if isinstance(options, Ask):
        ask(options)
        return
    say(f"{run}: {_wait(run, send(run, verb.replace('-', '_')), streams=False)}")


def ask(options: Ask) -> None:
    """Ask, and type the answer out while it is written."""
    sampling = {each.name for each in fields(SamplingOptions)}
    given = {name: value for name, value in asdict(options).items() if name in sampling}
    given |= {"question": options.question} | ({"system": options.system} if options.system else {})
    run = Path(options.run)
    _wait(run, send(run, "ask", **given), streams=True)


def _wait(run: Path, request_id: str, *, streams: bool) -> str:
    """Wait for the end of a request, and type its text while it grows. Raises OneCardError where it fails."""
    shown = ""
    while True:
        found = reply(run, request_id)
        if found is None:
            raise OneCardError(f"{run} has no reply to give: it was started anew, or its disk is full; ask again")
        if streams and found.text.startswith(shown) and found.text != shown:
            sys.stdout.write(escaped(found.text[len(shown) :]))
            sys.stdout.flush()
            shown = found.text
        if found.is_final:
            break
        time.sleep(POLL_S)
    if streams and found.state == "done":
        sys.stdout.write(f"\n{escaped(found.text)}\n" if found.text != shown else "\n")  # beams may rewrite themselves
        sys.stdout.flush()
    if found.state == "failed":
        raise OneCardError(found.error)
    return found.text
