"""Keys of an API: a file of names and hashes, and how many requests a minute each may send.

A key is random and long, so a plain SHA-256 of it cannot be searched; the file is of no use to who reads it.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path

from onecard.errors import ConfigError
from onecard.storage import write_whole

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
LINE = re.compile(rf"({NAME.pattern})\s+([0-9a-f]{{64}})")
FLAG = "--api_keys"
MOST_CLIENTS = 10_000  # whose rates are remembered; the one that was seen least lately is forgotten first


def digest_of(key: str | bytes) -> bytes:
    """What is stored and compared instead of a key."""
    return hashlib.sha256(key.encode("utf-8") if isinstance(key, str) else key).digest()


def read_keys(path: str | Path) -> dict[str, bytes]:
    """Digests by name: a line is NAME SHA256; empty lines and what follows # are passed over. Raises ConfigError."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as reason:
        raise ConfigError(FLAG, f"{path} cannot be read: {reason}; --new_key NAME makes it") from reason
    keys: dict[str, bytes] = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].strip()
        if not words:
            continue
        found = LINE.fullmatch(words)
        if found is None:
            raise ConfigError(FLAG, f"{path}, line {number} is not NAME SHA256; --new_key NAME writes such a line")
        if found[1] in keys:
            raise ConfigError(FLAG, f"{path}, line {number}: {found[1]} stands there twice")
        keys[found[1]] = bytes.fromhex(found[2])
    if not keys:
        raise ConfigError(FLAG, f"{path} holds no key, so nobody could come in; --new_key NAME adds one")
    return keys


def add_key(path: str | Path, name: str) -> str:
    """A new key under this name, whose hash is added to the file; the key itself is stored nowhere.

    Raises ConfigError for a name that is taken or cannot be one, and for a file that cannot be read or written.
    """
    if not NAME.fullmatch(name):
        raise ConfigError("--new_key", f"{name!r}: use letters, digits, dots, dashes and underscores, at most 64")
    path = Path(path)
    try:
        before = path.read_text(encoding="utf-8") if path.exists() else "# NAME SHA256-OF-THE-KEY, of onecard serve\n"
    except (OSError, UnicodeDecodeError) as reason:
        raise ConfigError(FLAG, f"{path} cannot be read: {reason}") from reason
    if any(line.split()[:1] == [name] for line in before.splitlines()):
        raise ConfigError("--new_key", f"{name} is in {path} already; delete its line there first")
    key = f"sk-{secrets.token_urlsafe(32)}"
    separator = "" if before.endswith("\n") or not before else "\n"
    try:
        write_whole(path, f"{before}{separator}{name} {digest_of(key).hex()}\n")
    except OSError as reason:
        raise ConfigError(FLAG, f"{path} cannot be written: {reason}") from reason
    return key


def name_of(key: bytes, known: Mapping[str, bytes]) -> str | None:
    """Whose key this is. All are compared, digests of equal length: the time tells nothing."""
    digest = digest_of(key)
    names = [name for name, other in known.items() if hmac.compare_digest(digest, other)]
    return names[0] if names else None


class RequestRates:
    """How many requests each client may still send: a bucket that holds `per_minute` and fills evenly.

    https://en.wikipedia.org/wiki/Token_bucket
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute, self._clock = per_minute, clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # client -> requests left, at this time

    def seconds_to_wait(self, client: str) -> float:
        """0 where a request may be answered, which it then counts as; else how long until one may."""
        now, per_second = self._clock(), self._per_minute / 60
        left, seen = self._left.pop(client, (float(self._per_minute), now))
        left = min(float(self._per_minute), left + (now - seen) * per_second)
        wait = 0.0 if left >= 1 else (1 - left) / per_second
        self._left[client] = (left - (not wait), now)
        if len(self._left) > MOST_CLIENTS:
            self._left.popitem(last=False)
        return wait
