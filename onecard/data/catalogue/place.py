"""Where collections lie that were brought to this disk: a folder each, with a dataset_info.json that describes it."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

from onecard.data.dataset_info import FILE_NAME
from onecard.data.description import DatasetDescription

_ELSEWHERE = ("name", "file_name", "hf_hub_url", "ms_hub_url", "folder")
_BLANK = DatasetDescription("")


def collections_folder() -> Path:
    """The folder of all of them, in the user's cache directory."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME).parent / "onecard" / "collections"


def downloaded(name: str) -> Path | None:
    """The folder of one collection, if it is there."""
    folder = collections_folder() / name
    return folder if (folder / FILE_NAME).is_file() else None


def describe(folder: Path, told: DatasetDescription) -> None:
    """Write into a folder that holds the files of a data set how they are read, so that `--data NAME` finds them."""
    plain = {each.name: getattr(told, each.name) for each in fields(told) if each.name not in _ELSEWHERE}
    kept = {key: value for key, value in plain.items() if value and value != getattr(_BLANK, key)}
    # Subsets and splits are found by the card, which lies at the top.
    inside = told.folder if told.folder and not told.has_parts and (folder / told.folder).is_dir() else "."
    text = json.dumps({told.name: {"file_name": inside, **kept}}, ensure_ascii=False, indent=2)
    (folder / FILE_NAME).write_text(text + "\n", encoding="utf-8")
