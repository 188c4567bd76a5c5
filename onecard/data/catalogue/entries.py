"""The entries of the catalogue: read from the YAML files beside this module and from a file of one's own.

Knows what an entry says and how it is found by name. An entry is a description (data/description.py) and what a person
wants to know before learning from it; it needs no code. Does not read data.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from onecard.console import nearest
from onecard.data.description import DatasetDescription, described
from onecard.errors import DataError
from onecard.installation import command

OWN_FILE = "ONECARD_DATASETS"  # names a file of one's own entries, in the place of ~/.onecard/datasets.yaml
LANGUAGES, TASKS, GENERATIONS = ("EN", "CN", "ML"), ("MT", "TS"), ("HG", "SI", "MIX", "COL")
UNKNOWN = "unknown"
_FACTS = ("about", "rows", "language", "task", "generation", "licence", "home", "shape", "note")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


@dataclass(frozen=True)
class CatalogueEntry:
    """A collection and its facts. Tags are those of Alpaca-CoT: EN, CN, ML; MT, TS; HG, SI, MIX, COL.

    https://github.com/PhoebusSi/Alpaca-CoT#statistics
    """

    data: DatasetDescription
    about: str
    rows: int = 0
    """Records, as its makers count them; 0: not known."""
    language: tuple[str, ...] = ()
    task: tuple[str, ...] = ()
    generation: tuple[str, ...] = ()
    licence: str = UNKNOWN
    home: str = ""
    shape: str = ""
    """The shape of formats.py that its records have once they are read as described."""
    note: str = ""
    is_own: bool = False

    @property
    def name(self) -> str:
        return self.data.name


def own_file() -> Path:
    """Where a person keeps entries of their own."""
    return Path(os.environ.get(OWN_FILE) or Path.home() / ".onecard" / "datasets.yaml").expanduser()


def entries() -> dict[str, CatalogueEntry]:
    """Every entry by name; one's own win over those that come with the program. Raises DataError for a broken file."""
    own = own_file()
    return shipped() | (read_entries(own, is_own=True) if own.is_file() else {})


@lru_cache(maxsize=1)
def shipped() -> dict[str, CatalogueEntry]:
    """Those that come with the program, in the order of their files."""
    found: dict[str, CatalogueEntry] = {}
    for file in sorted(Path(__file__).parent.glob("*.yaml")):
        found |= read_entries(file)
    return found


def entry_named(name: str) -> CatalogueEntry:
    """The entry of this name, in small or large letters. Raises DataError that names the nearest one."""
    known = entries()
    if found := known.get(name) or known.get(name.lower()):
        return found
    raise DataError(f"no collection is called {name!r}{nearest(name.lower(), list(known))}; "
                    f"{command('data')} list shows all")  # fmt: skip


def read_entries(file: Path, *, is_own: bool = False) -> dict[str, CatalogueEntry]:
    """The entries of a YAML file. Raises DataError that names the file and the entry."""
    try:
        plain = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as reason:
        raise DataError(f"cannot be read as YAML: {reason}", str(file)) from reason
    if plain is None:
        return {}
    if not isinstance(plain, dict):
        raise DataError("holds no entries; each is NAME: with indented lines such as hf_hub_url: owner/name", str(file))
    return {name: _entry(name, value, str(file), is_own) for name, value in plain.items()}


def _entry(name: Any, plain: Any, place: str, is_own: bool) -> CatalogueEntry:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise DataError(f"the name {name!r} is not made of small letters, digits, dots, - and _", place)
    where = f'{place}, "{name}"'
    if not isinstance(plain, dict):
        raise DataError("an entry has lines such as hf_hub_url: owner/name", where)
    facts = {key: plain[key] for key in _FACTS if plain.get(key) is not None}
    data = described(name, {key: value for key, value in plain.items() if key not in _FACTS}, place)
    for key, allowed in (("language", LANGUAGES), ("task", TASKS), ("generation", GENERATIONS)):
        tags = tuple(str(facts.get(key, "")).split("/")) if facts.get(key) else ()
        wrong = next((tag for tag in tags if tag not in allowed), None)
        if wrong is not None:
            raise DataError(f"{key} is {wrong!r}; known are {', '.join(allowed)}, several with / between", where)
        facts[key] = tags
    if type(facts.get("rows", 0)) is not int:
        raise DataError(f"rows is {facts['rows']!r}, a number is expected", where)
    facts["licence"] = str(facts.get("licence", UNKNOWN))
    return CatalogueEntry(data, **{"about": "", **facts}, is_own=is_own)
