"""What the page may name as data or as a base: files within the roots, entries of the catalogue, Hub ids.

Knows paths and names. Opens no data, and asks no network.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from onecard.config.base_model import DEFAULT_BASE
from onecard.config.data import BUILT_IN_TEMPLATES, LARGEST_AMOUNT, DataPortion
from onecard.config.given_paths import DATA_SUFFIXES, HUB_ID, shipped_file
from onecard.serve.http_error import ApiError, bad_request
from onecard.studio.context import StudioContext, leads_within
from onecard.studio.folders import folders_below

MOST_SOURCES = 50
FIRST_ROWS = 500  # of a data set that is not on this disk, unless more are asked for
MOST_ROWS = 20_000  # of one
MOST_ENTRIES = 500  # of a folder
MOST_LOOKED_AT = 5_000  # folders, for models
LONGEST_PATH = 4096
DEEPEST = 4  # folders below a root, for models
NO_MODELS = (".", "checkpoint-", "node_modules")  # beginnings of names of folders that are not looked into


class NamedData(NamedTuple):
    """Options of DataOptions for what the page names: as the page reads it, and as a run does.

    remote: the names of what comes over the network, of which the page reads the first records only.
    """

    for_page: dict[str, Any]
    for_run: dict[str, Any]
    remote: list[str]


def named_data(context: StudioContext, sources: Any, reading: dict[str, Any]) -> NamedData:
    """The data of [{"name", "amount", "limit"}], read with these options.

    Raises ApiError: nothing of this name, outside the roots, no number.
    """
    if not isinstance(sources, list) or not 0 < len(sources) <= MOST_SOURCES:
        raise bad_request(f"sources must be a list of 1 to {MOST_SOURCES} sources", "sources")
    if prompt := reading.get("prompt_type"):
        reading = {**reading, "prompt_type": _template(context, str(prompt))}
    portions = [_portion(context, source, f"sources[{number}]") for number, source in enumerate(sources)]
    remote = [portion.name for portion, is_remote in portions if is_remote]
    read = [portion._replace(limit=min(portion.limit or FIRST_ROWS, MOST_ROWS)) if is_remote else portion
            for portion, is_remote in portions]  # fmt: skip
    as_typed = [portion for portion, _ in portions]
    return NamedData({**reading, **_options(read)}, {**reading, **_options(as_typed)}, remote)


def _options(portions: list[DataPortion]) -> dict[str, Any]:
    """--data_path for files that are read whole, once; else --data."""
    if any(portion.suffix or not Path(portion.name).is_absolute() for portion in portions):
        return {"data": _one_or_all([portion.name + portion.suffix for portion in portions])}
    return {"data_path": _one_or_all([portion.name for portion in portions])}


def _one_or_all(texts: list[str]) -> str | list[str]:
    return texts[0] if len(texts) == 1 else texts


def _portion(context: StudioContext, source: Any, param: str) -> tuple[DataPortion, bool]:
    """One source, and whether it comes over the network."""
    if not isinstance(source, dict) or not isinstance(source.get("name"), str):
        raise bad_request("a source is an object with a name", param)
    amount, limit = source.get("amount", 1), source.get("limit", 0)
    if not isinstance(amount, (int, float)) or not 0 < amount <= LARGEST_AMOUNT:
        raise bad_request(f"the amount must be between 0 and {LARGEST_AMOUNT:,}: 0.2 is a fifth, 3 is thrice", param)
    if type(limit) is not int or not 0 <= limit < 10**9:
        raise bad_request("the limit must be a whole number of records; 0: all", param)
    name, is_remote = data_name(context, source["name"].strip(), param)
    return DataPortion(name, limit, float(amount)), is_remote


def data_name(context: StudioContext, text: str, param: str) -> tuple[str, bool]:
    """The path, entry of the catalogue or Hub id that a text means, and whether it comes over the network."""
    from onecard.data.catalogue.entries import entries
    from onecard.data.catalogue.place import downloaded

    if path := existing_path(context, text):
        refuse_links_out(path, context.readable, param)
        return str(path), False
    known = entries()
    if entry := known.get(text) or known.get(text.lower()):
        return entry.name, downloaded(entry.name) is None
    if is_hub_id(text) and Path(text).suffix not in DATA_SUFFIXES:
        return text, True
    raise bad_request(f"{text[:200]}: there is no such file in the data roots, no such collection and no Hub id of "
                      "the form owner/name", param, "no_such_data")  # fmt: skip


def base_name(context: StudioContext, text: Any) -> str:
    """The directory, known name or Hub id of a base that the page names. Raises ApiError."""
    if not isinstance(text, str) or not text.strip():
        raise bad_request("--model_path: is empty; give a directory or a Hub id", "--model_path")
    if path := existing_path(context, text.strip()):
        return str(path)
    if HUB_ID.fullmatch(text.strip()):
        return text.strip()
    message = f"--model_path: {text[:200]} is neither a directory in the data roots nor a Hub id"
    raise bad_request(message, "--model_path", "no_such_model")


def existing_path(context: StudioContext, text: str) -> Path | None:
    """What exists under this name in the roots; None where it means no path here.

    Raises ApiError: 400 for a path of nothing, 403 for one that lies elsewhere.
    """
    if not text or "\0" in text or len(text) > LONGEST_PATH:
        raise bad_request("this is no path", code="bad_path")
    path = Path(shipped_file(text))
    found = context.safe_path(str(path), context.readable)
    if _exists(found):
        return found
    if path.is_absolute() or "\\" in text or text.startswith((".", "~")):
        raise bad_request(f"{text[:200]}: there is no such file or folder", code="no_such_path")
    if _exists(path):  # in the folder where the studio was started, into which the kit would look
        return context.safe_path(str(path.resolve()), context.readable)
    return None


def refuse_links_out(folder: Path, roots: Sequence[Path], param: str) -> None:
    """Raise ApiError (403) where something in a folder of data is a link that leads out of the roots."""
    for place, folders, files in os.walk(folder):
        for path in (Path(place, name) for name in (*folders, *files)):
            if path.is_symlink() and not leads_within(path, roots):
                text = (f"{path} is a link that leads out of the data roots; start the studio with --data_root "
                        "to read there")  # fmt: skip
                raise ApiError(403, text, param=param, code="outside_roots")


def is_hub_id(text: str) -> bool:
    """Whether a text has the form owner/name."""
    return "/" in text and bool(HUB_ID.fullmatch(text))


def folder_entries(folder: Path, roots: Sequence[Path]) -> list[dict[str, Any]]:
    """Folders and data files in a folder, by name; hidden ones, links that lead out of `roots` and others left out."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            is_folder = entry.is_dir()
            if entry.name.startswith(".") or not (is_folder or Path(entry.name).suffix.lower() in DATA_SUFFIXES):
                continue
            if entry.is_symlink() and not leads_within(Path(entry.path), roots):
                continue
            size = None if is_folder else entry.stat().st_size
            found.append({"name": entry.name, "path": str(folder / entry.name), "bytes": size})
    return sorted(found, key=lambda each: (each["bytes"] is not None, str(each["name"]).lower()))[:MOST_ENTRIES]


def local_models(context: StudioContext) -> list[str]:
    """Directories of base models in the roots, then those of the Hub's cache as ids; the default base first."""
    found = dict.fromkeys([DEFAULT_BASE])
    n_left = MOST_LOOKED_AT
    for root in context.readable:
        for folder in chain([root], folders_below(root, DEEPEST, NO_MODELS)):
            n_left -= 1
            if n_left < 0:
                break
            if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
                found[str(folder)] = None
    return [*found, *cached_models()]


def cached_models() -> list[str]:
    """Hub ids of models whose config.json and weights lie in the cache of huggingface_hub."""
    from huggingface_hub.constants import HF_HUB_CACHE

    found = []
    for folder in sorted(Path(HF_HUB_CACHE).glob("models--*")):
        snapshots = folder / "snapshots"
        if any(snapshots.glob("*/config.json")) and any(snapshots.glob("*/*.safetensors")):
            found.append(folder.name.removeprefix("models--").replace("--", "/"))
    return found


def _template(context: StudioContext, text: str) -> str:
    """A template's name, or its file within the roots."""
    if text in ("auto", *BUILT_IN_TEMPLATES):
        return text
    path = existing_path(context, text)
    if path is None or path.suffix not in (".jinja", ".jinja2", ".j2"):
        raise bad_request(f"--prompt_type: {text[:200]} is no template", "--prompt_type")
    return str(path)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False
