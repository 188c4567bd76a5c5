"""Where collections lie that were brought to this disk: a folder each, beside the encoded data."""

from __future__ import annotations

from pathlib import Path


def collections_folder() -> Path:
    """The folder of all of them, in the user's cache directory."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME).parent / "onecard" / "collections"


def downloaded(name: str) -> Path | None:
    """The folder of one collection, if it is there."""
    folder = collections_folder() / name
    return folder if folder.is_dir() else None
