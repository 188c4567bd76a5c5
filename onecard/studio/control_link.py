"""How the studio speaks to a run that goes on: by the files of `onecard.train.control`, in plain values for JSON."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from onecard.train import control

KINDS = control.KINDS
ASK_FIELDS = ("question", "messages", "system", "max_new_tokens", "temperature")


def send(run: Path, kind: str, **given: Any) -> str:
    """The id of the request. Raises OneCardError where the run would not carry it out."""
    return control.send(run, kind, **given)


def reply(run: Path, request_id: str) -> dict[str, Any] | None:
    """{state, text, error, step, seconds}; None for an unknown request."""
    found = control.reply(run, request_id)
    return None if found is None else asdict(found)


def status(run: Path) -> dict[str, Any]:
    """{state, step, total_steps, ...}; empty for a run that wrote no status."""
    try:
        return asdict(control.status(run))
    except control.NotRunning:
        return {}
