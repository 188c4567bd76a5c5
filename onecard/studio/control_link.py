"""How the studio speaks to a run that goes on: by the files of `onecard.train.control`, or what tests put there."""

from __future__ import annotations

from dataclasses import asdict, is_dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from onecard.errors import OneCardError

KINDS = ("pause", "continue", "stop", "save", "ask", "give_back", "take_back")
ASK_FIELDS = ("question", "messages", "system", "max_new_tokens", "temperature")


class RunControl(Protocol):
    """What can be asked of a run, and what it says of itself."""

    def send(self, run: Path, kind: str, **given: Any) -> str:
        """The id of the request. Raises OneCardError where the run would not carry it out."""

    def reply(self, run: Path, request_id: str) -> dict[str, Any] | None:
        """{state, text, error, step, seconds}; None for an unknown request."""

    def told(self, run: Path) -> dict[str, Any]:
        """{state, step, total_steps, ...}; empty for a run that wrote no status."""


class ControlFiles:
    """The control channel of this kit's runs."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def send(self, run: Path, kind: str, **given: Any) -> str:
        return str(self._module.send(run, kind, **given))

    def reply(self, run: Path, request_id: str) -> dict[str, Any] | None:
        found = self._module.reply(run, request_id)
        return asdict(found) if is_dataclass(found) and not isinstance(found, type) else None

    def told(self, run: Path) -> dict[str, Any]:
        try:
            found: dict[str, Any] = asdict(self._module.status(run))
        except OneCardError:
            return {}
        return found


def control_of_runs() -> RunControl | None:
    """The control channel, where this version of the kit has one."""
    if find_spec("onecard.train.control") is None:
        return None
    return ControlFiles(import_module("onecard.train.control"))
