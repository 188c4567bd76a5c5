"""What is no training data yet, made into it: documents, chains of thought in TSV, labelled texts; and answers back.

Every row that cannot be used is named. Knows files and the order of the steps; the meaning is in onecard/data.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from onecard.config.curation import ConvertOptions, CotOptions, DocumentsOptions, ExtractionOptions
from onecard.config.parsing import comma_list
from onecard.console import say, warn
from onecard.curation.rows import read_rows
from onecard.data.documents import DOCUMENT_SUFFIXES, document_text, page_list
from onecard.data.extraction import ExtractionRow, from_instructie, from_row, to_rows
from onecard.data.messages import Document
from onecard.data.sources import ReadReport, Source
from onecard.data.values import UnusableRecord
from onecard.data.wordings import CotRow, read_cot_tsv, worded
from onecard.errors import DataError
from onecard.export.io.output import new_file

_SHOWN = 20


class _Named:
    """Counts what was used, and names what was not: the first twenty at once, the rest by their number."""

    def __init__(self) -> None:
        self.n_good, self.n_bad = 0, 0

    def bad(self, place: object, reason: object) -> None:
        self.n_bad += 1
        if self.n_bad <= _SHOWN:
            warn(f"{place}: {reason}")

    def end(self, what: str, source: str, n_rows: int) -> None:
        """Say the counts. Raises DataError where nothing was used."""
        if not self.n_good:
            raise DataError(f"none of its {self.n_bad:,} {what} can be used", source)
        more = f"; {self.n_bad:,} cannot be used" if self.n_bad else ""
        say(f"{self.n_good:,} {what} gave {n_rows:,} rows{more}")


def _write(options: ConvertOptions, rows: Callable[[], Iterable[dict[str, Any]]]) -> None:
    """Write the rows as a new file of JSON lines."""
    with (
        new_file(Path(options.output_path), overwrite=options.overwrite, inputs=options.paths) as partial,
        partial.open("w", encoding="utf-8", newline="\n") as out,
    ):
        for row in rows():
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


def document_files(paths: list[Path]) -> list[tuple[str, Path]]:
    """(name, file) of the documents, sorted by name in each folder. Raises DataError: no such file, or no document."""
    found: list[tuple[str, Path]] = []
    for path in paths:
        if path.is_file() and path.suffix.lower() in DOCUMENT_SUFFIXES:
            found.append((path.name, path))
        elif path.is_dir():
            inside = [(file.relative_to(path), file) for file in path.rglob("*") if file.is_file()]
            visible = [(name, file) for name, file in inside if not any(part.startswith(".") for part in name.parts)]
            found += sorted((n.as_posix(), f) for n, f in visible if f.suffix.lower() in DOCUMENT_SUFFIXES)
        else:
            what = f"is none of {' '.join(DOCUMENT_SUFFIXES)}" if path.exists() else "there is no such file or folder"
            raise DataError(what, str(path))
    if not found:
        raise DataError(f"no document: {' '.join(DOCUMENT_SUFFIXES)} are known", ", ".join(map(str, paths)))
    return found


def convert_documents(options: DocumentsOptions) -> None:
    """Write each document as a row {"text", "document"}; pages without text are named. Raises DataError."""
    named, files = _Named(), document_files(options.paths)

    def rows() -> Iterator[dict[str, Any]]:
        for name, file in files:
            try:
                found = document_text(file)
            except (UnusableRecord, OSError) as reason:
                named.bad(name, reason)
                continue
            if found.empty_pages:
                warn(f"{name}: no text on the pages {page_list(found.empty_pages)}")
            named.n_good += 1
            yield {"text": found.text, "document": name}
        named.end("documents", ", ".join(map(str, options.paths)), named.n_good)

    _write(options, rows)


def convert_cot(options: CotOptions) -> None:
    """Write each row of TSV files as an instruction with a chain of thought. Raises DataError."""
    named = _Named()

    def rows() -> Iterator[dict[str, Any]]:
        for path in options.paths:
            for row in read_cot_tsv(path):
                if isinstance(row, CotRow):
                    named.n_good += 1
                    yield worded(row, options.seed, as_thought=options.as_thought)
                else:
                    named.bad("", row)
        named.end("lines", ", ".join(map(str, options.paths)), named.n_good)

    _write(options, rows)


def convert_extraction(options: ExtractionOptions) -> None:
    """Write labelled texts (rows of InstructIE or IEPile) as instructions, or such rows back as labelled texts.

    Raises DataError.
    """
    source, types = Source(tuple(map(str, options.paths))), tuple(comma_list(options.types))
    named = _Named()
    n_rows = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal n_rows
        # The shape does not matter here: rows of InstructIE are none that training knows.
        for row in read_rows(source, ReadReport(), shape=_any_shape):
            try:
                if row.problem:
                    raise UnusableRecord(row.problem)
                found = _extraction_row(row.value, types)
                made = [_labelled(found)] if options.back else list(to_rows(found, options.types_per_row))
            except UnusableRecord as reason:
                named.bad(row.place, reason)
                continue
            named.n_good += 1
            n_rows += len(made)
            yield from made
        named.end("records", source.name, n_rows)

    _write(options, rows)


def _extraction_row(value: Any, types: tuple[str, ...]) -> ExtractionRow:
    if not isinstance(value, dict):
        raise UnusableRecord("the record is no object")
    return from_instructie(value, types) if "relation" in value else from_row(value)


def _labelled(row: ExtractionRow) -> dict[str, Any]:
    return {"text": row.text, "schema": row.schema.plain(), row.schema.kind: row.found}


def _any_shape(value: Any, record: str, columns: Any) -> Any:
    from onecard.data.formats import ParsedRecord

    return ParsedRecord(Document("", record), "any")
