"""What can be asked and exported: adapters, their checkpoints and whole models below the output folder.

Reads names of files and small JSON files only. It does not know routes or processes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onecard.config.given_paths import is_tuned_model
from onecard.inference.run_files import ADAPTER_FILES, OPTIONS_NAME

DEEPEST = 3  # folders below the output folder that are looked into
MOST_SOURCES = 2000


@dataclass(frozen=True)
class ModelSource:
    """Something that answers. path: below the output folder, with slashes. kind: adapter, tuned (a run that trained
    the base's own weights), or model (an export). base: what an adapter names as its base."""

    path: str
    kind: str
    base: str = ""

    def to_json(self) -> dict[str, str]:
        return {"path": self.path, "kind": self.kind, "base": self.base}


def sources_in(root: Path) -> list[ModelSource]:
    """All below `root`, by path; hidden folders are passed over, and links are not followed."""
    found: list[ModelSource] = []
    for folder in _folders(root, DEEPEST):
        source = source_at(folder, root)
        if source is not None:
            found.append(source)
        if len(found) >= MOST_SOURCES:
            break
    return sorted(found, key=lambda one: one.path)


def source_at(folder: Path, root: Path) -> ModelSource | None:
    """What the folder holds, or None."""
    path = folder.relative_to(root).as_posix()
    if (folder / ADAPTER_FILES[0]).is_file():
        named = _json_of(folder / ADAPTER_FILES[0]).get("base_model_name_or_path")
        return ModelSource(path, "adapter", str(named or ""))
    if is_tuned_model(folder):
        return ModelSource(path, "tuned")
    has_weights = any(folder.glob("*.safetensors"))
    if has_weights and (folder / "config.json").is_file() and not (folder / OPTIONS_NAME).is_file():
        return ModelSource(path, "model")
    return None


def _folders(root: Path, depth: int) -> Iterator[Path]:
    inner: list[Path] = []
    with suppress(OSError), os.scandir(root) as entries:
        inner = [Path(entry) for entry in entries if entry.is_dir(follow_symlinks=False) and entry.name[:1] != "."]
    for folder in sorted(inner):
        yield folder
        if depth > 1:
            yield from _folders(folder, depth - 1)


def _json_of(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
