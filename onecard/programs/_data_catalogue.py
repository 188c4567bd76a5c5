"""The verbs of `onecard data` that know the catalogue: list, show and get."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from onecard.config.parsing import comma_list, missing
from onecard.config.problems import Problem
from onecard.console import say, warn
from onecard.errors import ConfigError, DataError
from onecard.installation import command
from onecard.programs.download import FetchOptions

if TYPE_CHECKING:
    from onecard.data.catalogue.entries import CatalogueEntry

LANGUAGE_TAGS, TASK_TAGS, GENERATION_TAGS = ("EN", "CN", "ML"), ("MT", "TS"), ("HG", "SI", "MIX", "COL")


@dataclass
class ListOptions:
    """Name the collections of the catalogue, one's own with them."""

    search: str = ""
    """Only those with these words in their name or their description."""
    lang: str = ""
    """Only those of a language: EN, CN or ML (many)."""
    task: str = ""
    """Only those of a kind of task: MT (many tasks) or TS (one)."""
    generation: str = ""
    """Only those made by: HG (people), SI (a model), MIX (both) or COL (collected from other sets)."""
    json: bool = False
    """Print one JSON list instead of lines."""

    def problems(self) -> list[Problem]:
        tags = (("lang", LANGUAGE_TAGS), ("task", TASK_TAGS), ("generation", GENERATION_TAGS))
        return [
            (f"--{name}", f"{getattr(self, name)!r} is none of {', '.join(known)}")
            for name, known in tags
            if getattr(self, name) and getattr(self, name).upper() not in known
        ]


@dataclass
class ShowOptions:
    """Say all that is known of one collection."""

    name: str = ""
    """Its name in the catalogue."""
    json: bool = False
    """Print one JSON object instead of text."""

    def problems(self) -> list[Problem]:
        return missing(self, "name")


@dataclass
class GetOptions(FetchOptions):
    """Bring one collection to this disk; --data NAME then learns from there, without a network."""

    name: str = ""
    """Its name in the catalogue."""
    output_path: str = ""
    """Directory that will hold its files; empty: the one where --data NAME looks."""
    hub: Literal["huggingface", "modelscope"] = "huggingface"
    """Where it is fetched from; modelscope needs a package of its own (requirements-modelscope.txt)."""
    include: str = ""
    """Only files like these, with commas between them; empty: all that hold data, and the card (README.md)."""

    def problems(self) -> list[Problem]:
        found = missing(self, "name") + super().problems()
        if self.dry_run and self.hub == "modelscope":
            found.append(("--dry_run", "knows the Hugging Face Hub only; leave out --hub modelscope"))
        return found


def list_entries(options: ListOptions) -> None:
    """Print the entries that fit."""
    from onecard.data.catalogue.entries import entries

    chosen = [entry for entry in entries().values() if _fits(entry, options)]
    if options.json:
        say(json.dumps([_facts(entry) for entry in chosen], ensure_ascii=False, indent=1))
        return
    for entry in chosen:
        say(_line(entry))
    say(f"{len(chosen)} collections; {command('data')} show NAME says more")
    say(f"{command('finetune')} --data NAME learns from one")


def show_entry(options: ShowOptions) -> None:
    """Print one entry."""
    from onecard.data.catalogue.entries import entry_named

    facts = _facts(entry_named(options.name))
    if options.json:
        say(json.dumps(facts, ensure_ascii=False, indent=1))
        return
    for key, value in facts.items():
        if value not in ("", {}, 0, False):
            say(f"{key:<11} {f'{value:,}' if key == 'rows' else value}")


def get_entry(options: GetOptions) -> None:
    """Download one entry and describe its files. Raises ConfigError, ModelError and DataError."""
    from onecard.data.catalogue.entries import entry_named
    from onecard.data.catalogue.place import collections_folder, describe

    entry = entry_named(options.name)
    target = Path(options.output_path).expanduser() if options.output_path else collections_folder() / entry.name
    if target.exists() and not options.overwrite and not options.dry_run:
        raise ConfigError("--overwrite", f"{target} is there already; with this it is fetched anew")
    if entry.licence.lower() == "unknown":
        warn(f"the licence of {entry.name} is not known here; look at {entry.home} before you publish what it taught")
    if not _fetch(entry, target, options):
        return
    describe(target, entry.data)
    say(f"{target}: {entry.name}, licence {entry.licence}")
    folder = f" --data_path {target}" if options.output_path else ""
    say(f"to learn from it: {command('finetune')} --data {entry.name}{folder}")


def _fetch(entry: CatalogueEntry, target: Path, options: GetOptions) -> bool:
    """Whether its files are in `target` now."""
    from onecard.data.readers import SUFFIXES
    from onecard.export.hub.download import directory_place, fetch
    from onecard.export.hub.files import Repository, list_files
    from onecard.export.hub.modelscope import fetch_dataset

    inside = f"{entry.data.folder}/" if entry.data.folder else ""
    include = comma_list(options.include) or [*(f"{inside}*{suffix}" for suffix in SUFFIXES), "README.md"]
    if options.hub == "modelscope":
        if not entry.data.ms_hub_url:
            raise ConfigError("--hub", f"{entry.name} is not known to lie on ModelScope; leave this option out")
        fetch_dataset(entry.data.ms_hub_url, target, include, endpoint=options.endpoint, overwrite=options.overwrite,
                      max_workers=options.max_workers)  # fmt: skip
        return True
    if not entry.data.hf_hub_url:
        raise ConfigError("--hub", f"{entry.name} lies on ModelScope only; give modelscope")
    repository = Repository(entry.data.hf_hub_url, "dataset", options.revision, options.endpoint)
    try:
        listing = list_files(repository, include, comma_list(options.exclude))
    except ConfigError as reason:
        if not reason.flag.endswith("repo_id"):
            raise
        raise DataError(str(reason).partition(": ")[2], entry.name) from reason
    place = directory_place(target)
    say(
        f"{entry.name}: {len(listing.files)} files, {listing.n_bytes / 2**20:,.1f} MiB from {repository.address}; free "
        f"there: {place.free_bytes() / 2**20:,.0f} MiB"
    )
    if options.dry_run:
        return False
    fetch(listing, target, overwrite=options.overwrite, max_workers=options.max_workers)
    return True


def _fits(entry: CatalogueEntry, options: ListOptions) -> bool:
    for asked, tags in ((options.lang, entry.language), (options.task, entry.task),
                        (options.generation, entry.generation)):  # fmt: skip
        if asked and asked.upper() not in tags:
            return False
    text = f"{entry.name} {entry.about}".lower()
    return all(word in text for word in options.search.lower().split())


def _facts(entry: CatalogueEntry) -> dict[str, Any]:
    """What is known of an entry, plain values for JSON."""
    plain = asdict(entry)
    data = {**plain.pop("data"), "columns": dict(entry.data.columns), "tags": dict(entry.data.tags)}
    tags = {key: "/".join(plain[key]) for key in ("language", "task", "generation")}
    return {"name": data.pop("name"), **plain, **tags, **data}


def _line(entry: CatalogueEntry) -> str:
    language, task, generation = ("/".join(tag) for tag in (entry.language, entry.task, entry.generation))
    rows = f"{entry.rows:,}" if entry.rows else ""
    return f"{entry.name:<24}{rows:>11}  {language:<6}{task:<6}{generation:<4} {entry.about}"
