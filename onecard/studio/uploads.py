"""Files from the browser: streamed to disk, under a name that is safe on every system, whole or not at all."""

from __future__ import annotations

import re
import secrets
import threading
import time
import unicodedata
from collections.abc import AsyncIterable
from contextlib import suppress
from pathlib import Path

from starlette.concurrency import run_in_threadpool

from onecard.config.given_paths import DATA_SUFFIXES
from onecard.serve.http_error import ApiError, bad_request
from onecard.storage import move
from onecard.studio.folders import RESERVED

PARTIAL = ".partial"
STALE_S = 3600.0  # a partial upload without a new byte for so long is that of a studio that was killed
LONGEST_NAME = 80
_naming = threading.Lock()


def safe_name(text: str) -> str:
    """A file's name without folders, control characters and signs that some system forbids.

    "../../etc/我的 data?.jsonl" -> "我的_data_.jsonl"    Raises ApiError for a kind of file that is not read.
    """
    name = unicodedata.normalize("NFC", text).replace("\\", "/").rpartition("/")[2]
    name = re.sub(r"[^\w.()+-]", "_", name).strip("._ ")
    stem, suffix = Path(name).stem, Path(name).suffix.lower()
    if suffix not in DATA_SUFFIXES or not stem:
        raise bad_request(f"{text[:80]!r} is no data file; known are {' '.join(DATA_SUFFIXES)}", "name", "bad_name")
    stem = ("_" if RESERVED.fullmatch(stem) else "") + stem
    while len((stem + suffix).encode()) > 2 * LONGEST_NAME or len(stem) > LONGEST_NAME:
        stem = stem[:-1]
    return stem + suffix


async def save_upload(pieces: AsyncIterable[bytes], name: str, folder: Path, most_bytes: int) -> Path:
    """Write a body to `folder` and return the file; one that is there keeps its name, the new one gets a number.

    Raises ApiError: 413 for too much, 507 where the disk is full. Nothing stays of what ended early.
    """
    name = safe_name(name)
    partial = folder / f".{secrets.token_hex(8)}{PARTIAL}"
    try:
        if not await _write(partial, pieces, most_bytes):
            raise bad_request(f"{name} is empty", "name", "empty_file")
        with _naming:
            target = _free(folder, name)
            move(partial, target)
            return target
    except OSError as reason:
        if isinstance(reason, ConnectionError):  # the browser has gone
            raise
        raise ApiError(507, f"{folder}: {reason.strerror or reason}; make room there", code="cannot_write") from reason
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


async def _write(partial: Path, pieces: AsyncIterable[bytes], most_bytes: int) -> int:
    """Write all pieces; returns how many bytes they were. Raises ApiError (413)."""
    n_bytes = 0
    with partial.open("xb") as file:
        async for piece in pieces:
            n_bytes += len(piece)
            if n_bytes > most_bytes:
                text = f"the file is larger than {most_bytes / 1e6:g} MB (--upload_max_mb); name its path instead"
                raise ApiError(413, text, code="body_too_large")
            await run_in_threadpool(file.write, piece)
    return n_bytes


def remove_stale(folder: Path) -> None:
    """Remove partial uploads that nobody writes any more."""
    for partial in folder.glob(f".*{PARTIAL}"):
        with suppress(OSError):
            if time.time() - partial.stat().st_mtime > STALE_S:
                partial.unlink()


def _free(folder: Path, name: str) -> Path:
    """A path that does not exist: NAME, NAME-2, ..."""
    path, number = folder / name, 2
    while path.exists():
        path = folder / f"{Path(name).stem}-{number}{Path(name).suffix}"
        number += 1
    return path
