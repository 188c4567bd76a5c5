"""Errors that the person at the keyboard can mend: each says what, where, which value and what to do next."""

from __future__ import annotations

from collections.abc import Sequence


class OneCardError(Exception):
    """Something the person at the keyboard can mend. The text says what, where, which value and what to do next.

    `exit_code` is what the process ends with: 1 for a failed run, 2 for settings that cannot work.
    """

    exit_code = 1


class ConfigError(OneCardError):
    """A setting that cannot work; carries the flag's name, such as ``--lora_r``.

    `problems` are all that were found together, as (flag, text).
    """

    exit_code = 2

    def __init__(self, flag: str, message: str, problems: Sequence[tuple[str, str]] = ()) -> None:
        self.flag, self.problems = flag, tuple(problems) or ((flag, message),)
        super().__init__(f"{flag}: {message}" if flag else message)


class DataError(OneCardError):
    """Data that cannot be used; carries the file and, where one is to blame, the line (counted from 1)."""

    def __init__(self, message: str, file: str | None = None, line: int | None = None) -> None:
        self.file, self.line = file, line
        place = f"{file}:{line}: " if file and line else f"{file}: " if file else ""
        super().__init__(place + message)


class CheckpointError(OneCardError):
    """A checkpoint that cannot be written or trusted. `disk_full` is true where room or rights were missing."""

    def __init__(self, message: str, *, disk_full: bool = False) -> None:
        self.disk_full = disk_full
        super().__init__(message)


class ModelError(OneCardError):
    """A base model or an adapter that cannot be loaded, trained or saved."""


class Stopped(OneCardError):
    """The run was asked to stop and has saved itself; `exit_code` is 130 (Ctrl-C) or 143 (SIGTERM)."""

    def __init__(self, message: str, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__(message)
