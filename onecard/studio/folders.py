"""Folders of the studio: names that every system can have, what lies below one, and how much of it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

# https://learn.microsoft.com/windows/win32/fileio/naming-a-file
RESERVED = re.compile(r"(con|prn|aux|nul|(com|lpt)[\d¹²³])(\..*)?", re.IGNORECASE)
MOST_NAME_BYTES = 200  # file systems take 255; programs of this kit add endings such as .partial


def is_portable(name: str) -> bool:
    """Whether every system takes this name: no reserved one, no full stop or space at its end, not too long."""
    return not RESERVED.fullmatch(name) and name[-1:] not in (".", " ") and len(name.encode()) <= MOST_NAME_BYTES


def folders_below(root: Path, depth: int, passed_over: tuple[str, ...] = (".",)) -> Iterator[Path]:
    """The folders down to so many levels below one, by name; links, and names with these beginnings, are left out."""
    inner: list[Path] = []
    with suppress(OSError), os.scandir(root) as entries:
        inner = [Path(entry) for entry in entries
                 if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(passed_over)]  # fmt: skip
    for folder in sorted(inner):
        yield folder
        if depth > 1:
            yield from folders_below(folder, depth - 1, passed_over)


def bytes_in(folder: Path) -> int:
    """The size of all files in a folder; what links point to does not count."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.stat().st_size if path.is_file() and not path.is_symlink() else 0
    return total
