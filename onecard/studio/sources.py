"""What can be asked and exported: adapters, their checkpoints and whole models below the output folder.

Reads names of files and small JSON files only. It does not know routes or processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from onecard.config.given_paths import is_tuned_model
from onecard.inference.run_files import ADAPTER_FILES, OPTIONS_NAME
from onecard.storage import read_json_object
from onecard.studio.folders import folders_below

DEEPEST = 3  # folders below the output folder that are looked into
MOST_SOURCES = 2000


@dataclass(frozen=True)
class ModelSource:
    """Something that answers. path: below the output folder, with slashes. kind: adapter, tuned (a run that trained
    the base's own weights), or model (an export). base: what an adapter names as its base."""

    path: str
    kind: str
    base: str = ""


def sources_in(root: Path) -> list[ModelSource]:
    """All below `root`, by path; hidden folders are passed over, and links are not followed."""
    found: list[ModelSource] = []
    for folder in folders_below(root, DEEPEST):
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
        named = read_json_object(folder / ADAPTER_FILES[0]).get("base_model_name_or_path")
        return ModelSource(path, "adapter", str(named or ""))
    if is_tuned_model(folder):
        return ModelSource(path, "tuned")
    has_weights = any(folder.glob("*.safetensors"))
    if has_weights and (folder / "config.json").is_file() and not (folder / OPTIONS_NAME).is_file():
        return ModelSource(path, "model")
    return None
