"""Files on the disk: durable writes, renames, hashes, and what a full disk says."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHUNK_BYTES = 1 << 20
_PARTIAL = re.compile(r"\..+\.(\d+)\.partial")

_DISK_FULL = {errno.ENOSPC, errno.EFBIG, errno.EROFS, getattr(errno, "EDQUOT", errno.ENOSPC)}
# torch.save and safetensors do not raise OSError when the disk is full; this is what they say instead.
_DISK_FULL_WORDS = (
    "no space left",
    "file too large",
    "disk quota exceeded",
    "read-only file system",
    "not enough space on the disk",
    "pytorchstreamwriter failed",
    "unexpected pos",
)


def write_whole(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Write a file that is there whole or not at all; what stands at `path` is replaced. Text is UTF-8.

    durable: wait until it is on the disk. Raises: OSError, after which `path` is as it was.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(data)
            stream.flush()
            if durable:
                _sync(stream.fileno())
        move(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def json_object(text: str | bytes) -> dict[str, Any]:
    """The object in some JSON; empty for whatever else it is."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is none, or it is being written."""
    try:
        return json_object(path.read_bytes())
    except OSError:
        return {}


def is_abandoned(path: Path) -> bool:
    """Whether this is what `write_whole` leaves of a file where its process was killed."""
    import psutil  # only here: few starts find one

    found = _PARTIAL.fullmatch(path.name)
    return found is not None and (int(found[1]) == os.getpid() or not psutil.pid_exists(int(found[1])))


def digest_of(path: Path, digest: Any, moved: Callable[[int], Any] | None = None) -> str:
    """Hex digest of a file, read in pieces into any `hashlib` object, which may have been fed already.

    moved: told the bytes of each piece. Raises: OSError.
    """
    with path.open("rb") as file:
        while piece := file.read(CHUNK_BYTES):
            digest.update(piece)
            if moved is not None:
                moved(len(piece))
    return str(digest.hexdigest())


def sha256_of(path: Path, moved: Callable[[int], Any] | None = None) -> str:
    """Hex SHA-256 of a file; see `digest_of`."""
    return digest_of(path, hashlib.sha256(), moved)


def sync_file(path: Path) -> None:
    """Wait until the file's bytes are on the disk, not in a cache."""
    with path.open("r+b") as file:  # Windows syncs only what is open for writing
        _sync(file.fileno())


def sync_directory(path: Path) -> None:
    """Wait until renames inside `path` are on the disk, where the system can do that (Windows cannot)."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _sync(descriptor)
    except OSError as reason:
        # Some network and FUSE filesystems sync no directories; they order renames themselves.
        if reason.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES):
            raise
    finally:
        os.close(descriptor)


def _sync(descriptor: int) -> None:
    if sys.platform == "darwin":
        import fcntl

        # On macOS fsync stops at the drive's own cache; not every filesystem there knows the stronger call.
        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)


def move(source: Path, target: Path) -> None:
    """Rename; a file takes the place of `target` atomically, a directory needs a free one.

    Raises: OSError. On Windows a virus scanner may hold a file open for a moment, so it is tried for two seconds.
    """
    for _ in range(20 if os.name == "nt" else 0):
        try:
            source.replace(target)
            return
        except PermissionError:
            time.sleep(0.1)
    source.replace(target)


def is_disk_full(reason: BaseException | None) -> bool:
    """True when an error, or the one behind it, says that the disk is full, over quota or read-only."""
    seen: set[int] = set()
    while reason is not None and id(reason) not in seen:
        seen.add(id(reason))
        if isinstance(reason, OSError) and reason.errno in _DISK_FULL:
            return True
        if isinstance(reason, Exception) and any(words in str(reason).lower() for words in _DISK_FULL_WORDS):
            return True
        reason = reason.__cause__ or reason.__context__
    return False
