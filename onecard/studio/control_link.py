"""How the studio speaks to a run that goes on: by the files of `onecard.train.control`, or what tests put there."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from onecard.train import control

KINDS = control.KINDS
ASK_FIELDS = ("question", "messages", "system", "max_new_tokens", "temperature")


class ControlLink(Protocol):
    """What can be asked of a run, and what it says of itself."""

    def send(self, run: Path, kind: str, **given: Any) -> str:
        """The id of the request. Raises OneCardError where the run would not carry it out."""

    def reply(self, run: Path, request_id: str) -> dict[str, Any] | None:
        """{state, text, error, step, seconds}; None for an unknown request."""

    def told(self, run: Path) -> dict[str, Any]:
        """{state, step, total_steps, ...}; empty for a run that wrote no status."""


class ControlFiles:
    """The control channel of this kit's runs."""

    def send(self, run: Path, kind: str, **given: Any) -> str:
        return control.send(run, kind, **given)

    def reply(self, run: Path, request_id: str) -> dict[str, Any] | None:
        found = control.reply(run, request_id)
        return None if found is None else asdict(found)

    def told(self, run: Path) -> dict[str, Any]:
        try:
            return asdict(control.status(run))
        except control.NotRunning:
            return {}


def control_of_runs() -> ControlLink:
    """The control channel of this kit's runs."""
    return ControlFiles()
