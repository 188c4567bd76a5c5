"""Clean a data set: read it once, leave out what fails a check or repeats an earlier record, say what went and why.

Writes a new directory: data.jsonl with the records that stay, and report/ with removed.jsonl (each record that went:
place, reason, what was seen), summary.json and summary.log. Memory does not grow with the data but for about 100 bytes
a record.

Knows the order of the steps. Does not know how a check decides.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from onecard.config.curation import CleanOptions
from onecard.config.data import column_names
from onecard.config.parsing import comma_list
from onecard.console import say, warn
from onecard.curation.clean.checks import (
    Check,
    EvaluationOverlap,
    Objection,
    encoding_repair,
    language_check,
    length_check,
    lost_characters,
)
from onecard.curation.rows import RecordPlace, RecordRow, read_rows
from onecard.curation.sketches import SKETCH_FILES, Sketches, require_rensa
from onecard.curation.words import texts_of
from onecard.data.messages import Conversation, Document
from onecard.data.readers import SUFFIXES
from onecard.data.sources import ReadReport, Source, source_of
from onecard.errors import DataError
from onecard.export.io.output import new_directory

DATA_FILE, REPORT_FOLDER = "data.jsonl", "report"
_PASSED = "passed"
_ONLY_FOR_WORK = (_PASSED, *SKETCH_FILES)
_TOLD_EVERY = 100_000
_SHOWN = 5
_TOLD_SETTINGS = ("fix_encoding", "languages", "min_chars", "max_chars", "near_duplicates", "compare", "ngram")


@dataclass
class CleanSummary:
    """What was read, kept and left out; `removed` counts by reason, `examples` names the first of each."""

    n_read: int = 0
    n_kept: int = 0
    n_repaired: int = 0
    removed: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    skipped_files: list[str] = field(default_factory=list)

    def remove(self, out: TextIO, place: RecordPlace, objection: Objection, **more: Any) -> None:
        """Count a record that went, and write its line."""
        self.removed[objection.reason] += 1
        shown = self.examples.setdefault(objection.reason, [])
        if len(shown) < _SHOWN:
            shown.append(f"{place}: {objection.detail}")
        entry = {**place._asdict(), "reason": objection.reason, "detail": objection.detail, **more}
        out.write(json.dumps(entry, ensure_ascii=True) + "\n")

    def lines(self) -> list[str]:
        """What a person should know, a line each."""
        found = [f"{self.n_kept:,} of {self.n_read:,} records stay; the encoding of {self.n_repaired:,} was repaired"]
        for reason, count in self.removed.most_common():
            found.append(f"  {reason}: {count:,}")
            found += [f"    {example[:200]}" for example in self.examples[reason]]
        if self.skipped_files:
            found.append(f"  files not read: {', '.join(self.skipped_files[:10])}")
        return found


class _Places:
    """The places of many records, 16 bytes each."""

    def __init__(self) -> None:
        self._files: dict[str, int] = {}
        self._names: list[str] = []
        self._file, self._line, self._nth = array("I"), array("Q"), array("I")

    def append(self, place: RecordPlace) -> None:
        if place.file not in self._files:
            self._files[place.file] = len(self._names)
            self._names.append(place.file)
        self._file.append(self._files[place.file])
        self._line.append(place.line)
        self._nth.append(place.nth)

    def __iter__(self) -> Iterator[RecordPlace]:
        return map(self.__getitem__, range(len(self._line)))

    def __getitem__(self, row: int) -> RecordPlace:
        return RecordPlace(self._names[self._file[row]], self._line[row], self._nth[row])


def clean(options: CleanOptions) -> CleanSummary:
    """Write the cleaned data set and its report as a new directory.

    Raises ConfigError (a package that is not installed, the target), DataError (nothing to read, nothing left),
    ModelError (no room).
    """
    if options.near_duplicates:
        require_rensa()
    repair = encoding_repair() if options.fix_encoding else None
    source, target = source_of(options), Path(options.output_path)
    evaluation = _evaluation(options)
    checks = _checks(options, evaluation)
    paths = [*source.paths, *evaluation.paths]
    report, summary = ReadReport(), CleanSummary()
    with new_directory(target, overwrite=options.overwrite, inputs=[Path(path) for path in paths]) as partial:
        folder = partial / REPORT_FOLDER
        folder.mkdir()
        with (
            Sketches(partial, options.near_duplicates) as sketches,
            (folder / "removed.jsonl").open("w", encoding="utf-8", newline="\n") as removed,
        ):
            rows = _counted(read_rows(source, report, repair), summary)
            places = _check_all(rows, checks, options.compare, sketches, partial, summary, removed)
            _without_duplicates(partial, sketches, places, summary, removed)
        for name in _ONLY_FOR_WORK:
            (partial / name).unlink(missing_ok=True)
        summary.skipped_files = report.skipped_files
        if not summary.n_read:
            raise DataError(f"it holds no record in files of {' '.join(SUFFIXES)}", source.name)
        if not summary.n_kept:
            raise DataError("no record is left:\n" + "\n".join(summary.lines()), source.name)
        _write_summary(folder, _plain(options, source, evaluation), summary)
    say(f"the records that stay: {target / DATA_FILE}")
    return summary


def _check_all(
    rows: Iterator[RecordRow],
    checks: list[Check],
    compare: str,
    sketches: Sketches,
    partial: Path,
    summary: CleanSummary,
    removed: TextIO,
) -> _Places:
    """Put aside the lines of the records that pass by themselves; their places, in order."""
    places = _Places()
    with (partial / _PASSED).open("w", encoding="utf-8", newline="\n") as lines:
        for row in rows:
            objection = _objection(row, checks)
            if row.sample is None or objection is not None:
                summary.remove(removed, row.place, objection or Objection("unusable", row.problem))
                continue
            summary.n_repaired += row.was_changed
            places.append(row.place)
            sketches.add(_compared(row.sample, compare))
            lines.write(row.line() + "\n")
    return places


def _evaluation(options: CleanOptions) -> Source:
    """Whose questions must not be learned; without paths where there is none."""
    paths = [options.evaluation_path] if isinstance(options.evaluation_path, str) else options.evaluation_path
    return Source(tuple(filter(None, paths)), column_names(options.columns) or ())


def _plain(options: CleanOptions, source: Source, evaluation: Source) -> dict[str, Any]:
    """The settings for the report."""
    chosen = {name: getattr(options, name) for name in _TOLD_SETTINGS} | {"languages": comma_list(options.languages)}
    return {"data_path": source.paths, **chosen, "evaluation_path": evaluation.paths}


def _checks(options: CleanOptions, evaluation: Source) -> list[Check]:
    checks: list[Check] = [length_check(options.min_chars, options.max_chars)]
    if options.fix_encoding:
        checks.append(lost_characters)
    if options.languages:
        checks.append(language_check(comma_list(options.languages)))
    if evaluation.paths:
        overlap = EvaluationOverlap(evaluation, options.ngram)
        say(f"{overlap.n_questions:,} questions of evaluations are looked for")
        checks.append(overlap)
    return checks


def _counted(rows: Iterator[RecordRow], summary: CleanSummary) -> Iterator[RecordRow]:
    for row in rows:
        summary.n_read += 1
        if summary.n_read % _TOLD_EVERY == 0:
            say(f"{summary.n_read:,} records read")
        yield row


def _objection(row: RecordRow, checks: list[Check]) -> Objection | None:
    if row.sample is None:
        return None
    return next((found for check in checks if (found := check(row.sample)) is not None), None)


def _compared(sample: Conversation | Document, compare: str) -> str:
    """The text by which duplicates are found; shared system texts and lists of tools make no records alike."""
    texts = texts_of(sample, with_frame=False)
    if compare == "question" and texts[0][0]:
        texts = [(role, text) for role, text in texts if role == "user"]
    return "\n".join(text for _, text in texts)


def _without_duplicates(
    partial: Path, sketches: Sketches, places: _Places, summary: CleanSummary, removed: TextIO
) -> None:
    """Copy the lines that repeat no earlier one."""
    say(f"{sketches.n_rows:,} records passed the checks; looking for duplicates among them")
    found = sketches.duplicates()
    with (
        (partial / _PASSED).open(encoding="utf-8", newline="\n") as lines,
        (partial / DATA_FILE).open("w", encoding="utf-8", newline="\n") as out,
    ):
        for row, (line, place) in enumerate(zip(lines, places, strict=True)):
            like = int(found.like[row])
            if like < 0:
                summary.n_kept += 1
                out.write(line)
            elif found.is_exact[row]:
                objection = Objection("exact duplicate", f"of {places[like]}")
                summary.remove(removed, place, objection, like=str(places[like]))
            else:
                alike = round(float(found.similarity[row]), 3)
                objection = Objection("near-duplicate", f"of {places[like]}, similarity {alike}")
                summary.remove(removed, place, objection, like=str(places[like]), similarity=alike)


def _write_summary(folder: Path, settings: dict[str, Any], summary: CleanSummary) -> None:
    counted = {name: value for name, value in vars(summary).items() if name != "examples"}
    plain = {**counted, "removed": dict(summary.removed.most_common()), "settings": settings}
    text = json.dumps(plain, ensure_ascii=False, indent=2)
    (folder / "summary.json").write_text(text + "\n", encoding="utf-8")
    (folder / "summary.log").write_text("\n".join(summary.lines()) + "\n", encoding="utf-8")
    for line in summary.lines():
        say(line)
    if summary.skipped_files:
        warn(f"{len(summary.skipped_files)} files are of no known format and were not read")
