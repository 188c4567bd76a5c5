"""The verbs of `onecard data` that know the catalogue: list and show."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from onecard.config.parsing import missing
from onecard.config.training import Problem
from onecard.console import say
from onecard.installation import command

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
    debug: bool = False
    """Show tracebacks."""

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
    debug: bool = False
    """Show tracebacks."""

    def problems(self) -> list[Problem]:
        return missing(self, "name")


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
