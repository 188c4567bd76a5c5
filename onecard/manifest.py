"""Bytes that survive a power cut, and the list of hashes that proves they did.

A directory is *whole* when its `manifest.json` can be trusted and every file named there has the size and SHA-256
written there. Files beside these are none of our business. Knows nothing of checkpoints, steps or tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onecard.storage import sha256_of, sync_directory, sync_file

MANIFEST = "manifest.json"
FORMAT = 1


class ManifestError(Exception):
    """A manifest that is missing, damaged or of an unknown format."""


def seal(directory: Path) -> None:
    """Make every file under `directory` durable, then write the manifest, durable too, last.

    Raises: OSError where the disk refuses.
    """
    files = {}
    for path in content_files(directory):
        sync_file(path)
        files[path.relative_to(directory).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    write_manifest(directory / MANIFEST, files)
    for folder in (path for path in directory.rglob("*") if path.is_dir()):
        sync_directory(folder)
    sync_directory(directory)


def content_files(directory: Path) -> Iterator[Path]:
    """All files under `directory` but its manifest, in a fixed order."""
    yield from sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / MANIFEST)


def write_manifest(path: Path, files: dict[str, dict[str, Any]]) -> None:
    """Write and sync the manifest of `files`: name -> {"bytes": size, "sha256": hex digest}."""
    text = json.dumps({"format": FORMAT, "files": files, "checksum": _checksum(files)}, indent=1, sort_keys=True)
    path.write_text(text, encoding="utf-8")  # no line end: a lost last byte must show
    sync_file(path)


def read_manifest(directory: Path) -> dict[str, dict[str, Any]]:
    """The files that `directory` should hold: name -> {"bytes": size, "sha256": hex digest}.

    The manifest carries a checksum of itself: one flipped bit could otherwise turn one name into its neighbour
    (`rng_state_0` into `rng_state_1`) and so make a file drop out of the list unseen.

    Raises: ManifestError when it is missing, unreadable, damaged, of another format, or lists no file.
    """
    try:
        content = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ManifestError(f"{MANIFEST} is missing, so it was never finished") from None
    except (OSError, ValueError, RecursionError) as reason:
        raise ManifestError(f"{MANIFEST} is damaged ({str(reason)[:200]})") from None
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        raise ManifestError(f"{MANIFEST} is damaged (it lists no files)")
    if content.get("checksum") != _checksum(content["files"]):
        raise ManifestError(f"{MANIFEST} is damaged (its checksum does not match)")
    if content.get("format") != FORMAT:
        raise ManifestError(f"{MANIFEST} has format {content.get('format')!r}; this version reads {FORMAT}")
    if not content["files"]:
        raise ManifestError(f"{MANIFEST} lists no files")
    return content["files"]


def problems(directory: Path, *, sizes_only: bool = False) -> list[str]:
    """What keeps `directory` from being whole; an empty list means that it is. `sizes_only` skips the hashes."""
    if not directory.is_dir():
        return ["is not a directory" if directory.exists() else "does not exist"]
    try:
        files = read_manifest(directory)
    except ManifestError as reason:
        return [str(reason)]
    found = (_file_problem(directory, name, entry, sizes_only) for name, entry in sorted(files.items()))
    return [problem for problem in found if problem]


def _file_problem(directory: Path, name: str, entry: dict[str, Any], sizes_only: bool) -> str | None:
    path = directory / name
    if not path.is_file():
        return f"{name} is missing"
    try:
        size_bytes = path.stat().st_size
        if size_bytes != entry["bytes"]:
            return f"{name} has {size_bytes} bytes, {entry['bytes']} were written"
        if not sizes_only and sha256_of(path) != entry["sha256"]:
            return f"{name} has changed since it was written (SHA-256 differs)"
    except OSError as reason:
        return f"{name} cannot be read ({reason})"
    return None


def _checksum(files: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
