"""Where training data comes from: files, folders of files, and data sets of the Hugging Face Hub.

Knows the order of files and the report of what was read, skipped and changed. Does not know how a file is parsed
(readers.py), what a record means (formats.py), nor tokens. Every record seen is either given out or in the report.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from onecard.config.data import column_names
from onecard.data.columns import Columns, thought_hints
from onecard.data.description import DatasetDescription, as_described
from onecard.data.documents import DOCUMENT_SUFFIXES
from onecard.data.formats import ParsedRecord, to_sample
from onecard.data.hub_rows import HubDataset, hub_commit, hub_id_of, hub_rows
from onecard.data.messages import Conversation, Document
from onecard.data.plain_text import RawRecord, TxtSplit
from onecard.data.readers import SUFFIXES, read_file
from onecard.data.values import UnusableRecord, safe
from onecard.errors import DataError
from onecard.installation import command

_KEPT_BAD_RECORDS = 1000
_KEPT_FIELD_NAMES = 50
_SHOWN_BAD_RECORDS = 10
_SHOWN_FILES = 20
_SAMPLE_SEED = 42  # which records a limit takes


@dataclass(frozen=True)
class Source:
    """Files, folders and Hub data sets, read one after another; other names of columns; what cuts a txt into texts.

    description: how the records of a data set that has one are read. limit: at most so many records, drawn evenly from
    all files, of the Hub the first ones; 0: all. collection: its name, where the catalogue named it.
    """

    paths: tuple[str, ...]
    columns: Columns = ()
    txt_split: TxtSplit = "auto"
    description: DatasetDescription | None = None
    limit: int = 0
    collection: str = ""

    @property
    def name(self) -> str:
        return ", ".join(self.paths)


class _ReadingOptions(Protocol):
    data_path: Any
    columns: str
    txt_split: TxtSplit


def source_of(options: _ReadingOptions) -> Source:
    """The source that options such as `config.DataOptions` name."""
    paths = options.data_path if isinstance(options.data_path, list) else [options.data_path]
    return Source(tuple(paths), column_names(options.columns) or (), options.txt_split)


def _as_source(source: str | Source) -> Source:
    return source if isinstance(source, Source) else Source((source,))


class BadRecord(NamedTuple):
    """A record that is not used: its file, the line where it begins (for parquet and the Hub: the row), and why.

    `nth`: as in RawRecord, where several records share the line.
    """

    file: str
    line: int
    reason: str
    nth: int = 0

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}#{self.nth}" if self.nth else f"{self.file}:{self.line}"


class _OpenFile(NamedTuple):
    """A file's name in the names of its records, its place in errors, and its raw records."""

    name: str
    place: str
    records: Iterator[RawRecord]


@dataclass
class ReadReport:
    """What one reading saw. `n_good + n_bad` is every record seen; the first 1000 bad ones are kept by name.

    `shapes[file][shape]` counts good records; `notes[text]` is [count, first record] of what was changed to make
    records usable; `ignored_fields` counts the fields that nothing reads; `skipped_files` are of no known format.
    """

    n_good: int = 0
    n_bad: int = 0
    bad: list[BadRecord] = field(default_factory=list)
    shapes: dict[str, Counter[str]] = field(default_factory=dict)
    notes: dict[str, list[Any]] = field(default_factory=dict)
    ignored_fields: Counter[str] = field(default_factory=Counter)
    skipped_files: list[str] = field(default_factory=list)

    @property
    def n_seen(self) -> int:
        return self.n_good + self.n_bad

    def add_good(self, file: str, shape: str) -> None:
        self.n_good += 1
        if file not in self.shapes:
            self.shapes[file] = Counter()
        self.shapes[file][shape] += 1

    def add_bad(self, file: str, line: int, reason: str, nth: int = 0) -> None:
        self.n_bad += 1
        if len(self.bad) < _KEPT_BAD_RECORDS:
            self.bad.append(BadRecord(file, line, reason, nth))

    def add_note(self, text: str, record: str) -> None:
        self.notes.setdefault(text, [0, record])[0] += 1

    def reject(self, record: str, reason: str) -> None:
        """Count a record that was read as good, but which a later step refuses, as bad."""
        file, _, place = record.rpartition(":")
        line, _, nth = place.partition("#")
        self.n_good -= 1
        self.add_bad(file, int(line), reason, int(nth or 0))

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` is the way back."""
        return {
            "n_good": self.n_good,
            "n_bad": self.n_bad,
            "bad": [list(bad) for bad in self.bad],
            "shapes": {file: dict(counts) for file, counts in self.shapes.items()},
            "notes": self.notes,
            "ignored_fields": dict(self.ignored_fields),
            "skipped_files": self.skipped_files,
        }

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> ReadReport:
        report = cls(**plain)
        report.shapes = {file: Counter(counts) for file, counts in plain["shapes"].items()}
        report.ignored_fields = Counter(plain["ignored_fields"])
        report.bad = [BadRecord(*bad) for bad in plain["bad"]]
        return report

    def summary_lines(self, names_skipped: bool = True) -> list[str]:
        """What a person should know about this reading, a line each."""
        shapes: Counter[str] = Counter()
        for counts in self.shapes.values():
            shapes.update(counts)
        seen = ", ".join(f"{shape} {count:,}" for shape, count in shapes.most_common()) or "none usable"
        lines = [f"{self.n_good:,} of {self.n_seen:,} records are usable ({seen})"]
        if len(self.shapes) > 1:
            for file, counts in list(self.shapes.items())[:_SHOWN_FILES]:
                lines.append(f"  {file}: " + ", ".join(f"{shape} {count:,}" for shape, count in counts.most_common()))
            if len(self.shapes) > _SHOWN_FILES:
                lines.append(f"  ... and {len(self.shapes) - _SHOWN_FILES:,} more files")
        for text, (count, record) in self.notes.items():
            lines.append(f"  in {count:,} (first: {record}): {text}")
        if self.ignored_fields:
            lines.append("  fields not used: " + ", ".join(self.ignored_fields))
            lines += [f"  {hint}" for hint in thought_hints(list(self.ignored_fields))]
        if self.skipped_files:
            shown = ", ".join(self.skipped_files[:_SHOWN_BAD_RECORDS])
            lines.append(f"  files not read ({len(self.skipped_files)}; not {' '.join(SUFFIXES)}): {shown}")
        if self.n_bad and not names_skipped:
            lines.append(f"{self.n_bad:,} skipped")
        elif self.n_bad:
            lines.append(f"{self.n_bad:,} skipped:")
            lines += [f"  {bad.place}: {bad.reason}" for bad in self.bad[:_SHOWN_BAD_RECORDS]]
        if names_skipped and self.n_bad > _SHOWN_BAD_RECORDS:
            lines.append(f"  ... and {self.n_bad - _SHOWN_BAD_RECORDS:,} more; {command('inspect')} lists them")
        return lines


def read(
    source: str | Source,
    *,
    report: ReadReport,
    strict: bool = False,
    shape: Callable[[Any, str, Columns], ParsedRecord] = to_sample,
) -> Iterator[Conversation | Document]:
    """The usable samples of files, folders (their files in the order of their names) and Hub data sets, one by one.

    Streams: one record, or one chunk of a file, is held at a time. A bad record is counted in `report`, or ends the
    reading where `strict` is true. `shape` says what a record means; questions.py has one for records without answers.
    Raises DataError: nothing there, no usable record, or with `strict` the first bad record with its file and line.
    """
    source = _as_source(source)
    n_good_before = report.n_good
    for file in _files(source, report):
        yield from _samples(file, report, strict, lambda value, record: _shaped(value, record, source, shape))
    if report.n_good == n_good_before:
        reasons = "".join(f"\n  {bad.place}: {bad.reason}" for bad in report.bad[:_SHOWN_BAD_RECORDS])
        count = f"{report.n_bad:,} were skipped:" if report.n_bad else f"it has no file of {' '.join(SUFFIXES)}"
        raise DataError(f"no usable record; {count}{reasons}", source.name)


def raw_records(source: str | Source, report: ReadReport) -> Iterator[tuple[str, RawRecord]]:
    """(file, record) of every record as it was parsed, bad ones too; nothing is counted but skipped files.

    Raises DataError: nothing there, or a file that cannot be read.
    """
    for file in _files(_as_source(source), report):
        for raw in file.records:
            yield file.name, raw


def data_fingerprint(source: str | Source) -> str:
    """SHA-256 in hex over the names and bytes of the files that `read` would read; for the Hub, over id and commit.

    Names count from the path that was given, so a copy elsewhere has the same fingerprint; what --columns and
    --txt_split change counts, too. Raises DataError.
    """
    source = _as_source(source)
    digest = hashlib.sha256()
    for name, file in _named_files(source.paths, []):
        if file is None:
            digest.update(f"hub {hub_id_of(name)} {hub_commit(_hub_part(name, source))}".encode())
            continue
        digest.update(f"{len(name)} {safe(name, 4096)} {file.stat().st_size} ".encode())
        with file.open("rb") as stream:
            while block := stream.read(2**20):
                digest.update(block)
    if source.columns:
        digest.update(f"columns {source.columns}".encode())
    if source.txt_split in ("line", "file"):  # the others are as it always was, or decided by the bytes
        digest.update(f"split {source.txt_split}".encode())
    if source.description is not None:
        digest.update(f"description {source.description.reading}".encode())
    if source.limit:
        digest.update(f"limit {source.limit}".encode())
    return digest.hexdigest()


def _shaped(
    value: Any, record: str, source: Source, shape: Callable[[Any, str, Columns], ParsedRecord]
) -> ParsedRecord:
    """A record by its description, if it has one, and then by its shape."""
    if source.description is None:
        return shape(value, record, source.columns)
    value, left_out = as_described(source.description, value)
    parsed = shape(value, record, source.columns)
    parsed.ignored += left_out
    return parsed


def _samples(
    file: _OpenFile, report: ReadReport, strict: bool, shape: Callable[[Any, str], ParsedRecord]
) -> Iterator[Conversation | Document]:
    """The samples of one file; a file without a single record counts as one bad record."""
    n_seen_before = report.n_seen
    for raw in file.records:
        try:
            sample = _sample(raw, file.name, report, shape)
        except UnusableRecord as problem:
            _refuse(file, raw, str(problem), report, strict)
        else:
            yield sample
    if report.n_seen == n_seen_before:
        _refuse(file, RawRecord(1), "the file holds no record", report, strict)


def _refuse(file: _OpenFile, raw: RawRecord, reason: str, report: ReadReport, strict: bool) -> None:
    if strict:
        number = f"record {raw.nth}: " if raw.nth else ""
        raise DataError(f"{number}{reason} (--strict ends the run here)", file.place, raw.line)
    report.add_bad(file.name, raw.line, reason, raw.nth)


def _sample(
    raw: RawRecord, name: str, report: ReadReport, shape: Callable[[Any, str], ParsedRecord]
) -> Conversation | Document:
    if raw.problem:
        raise UnusableRecord(raw.problem)
    record = f"{name}:{raw.line}#{raw.nth}" if raw.nth else f"{name}:{raw.line}"
    shaped = shape(raw.value, record)
    report.add_good(name, shaped.shape)
    if raw.note:
        report.add_note(raw.note, record)
    for note in dict.fromkeys(shaped.notes):
        report.add_note(note, record)
    for key in map(safe, shaped.ignored):
        if key in report.ignored_fields or len(report.ignored_fields) < _KEPT_FIELD_NAMES:
            report.ignored_fields[key] += 1
    return shaped.sample


def _files(source: Source, report: ReadReport) -> Iterator[_OpenFile]:
    """Every file and Hub data set, in order."""
    description = source.description
    if description is not None and description.has_parts and Path(source.paths[0]).is_dir():
        rows = hub_rows(HubDataset(source.paths[0], description.subset, description.split))
        yield _OpenFile(description.name, source.paths[0], islice(rows, source.limit or None))
        return
    found = _named_files(source.paths, report.skipped_files)
    taken = _drawn([file for _, file in found if file is not None], source) if source.limit else {}
    for name, file in found:
        if file is None:
            rows = hub_rows(_hub_part(name, source))
            yield _OpenFile(name, name, islice(rows, source.limit or None))
        elif not source.limit:
            yield _OpenFile(safe(name, 4096), str(file), _file_rows(file, source.txt_split))
        elif taken[file]:
            yield _OpenFile(safe(name, 4096), str(file), _some_rows(file, source.txt_split, taken[file]))


def _drawn(files: list[Path], source: Source) -> dict[Path, set[int]]:
    """The numbers of the records that a limit takes from each file, the same ones each time."""
    import numpy as np  # heavy, and only for a limit

    counts = [sum(1 for _ in _file_rows(file, source.txt_split)) for file in files]
    chosen = np.sort(np.random.RandomState(_SAMPLE_SEED).permutation(sum(counts))[: source.limit])
    starts = np.cumsum([0, *counts])
    borders = np.searchsorted(chosen, starts)
    return {
        file: set((chosen[first:last] - start).tolist())
        for file, start, first, last in zip(files, starts, borders, borders[1:], strict=False)
    }


def _some_rows(file: Path, txt_split: TxtSplit, numbers: set[int]) -> Iterator[RawRecord]:
    return (row for number, row in enumerate(_file_rows(file, txt_split)) if number in numbers)


def _hub_part(name: str, source: Source) -> HubDataset:
    description = source.description or DatasetDescription("")
    return HubDataset(hub_id_of(name), description.subset, description.split, description.folder, source.collection)


def _named_files(paths: tuple[str, ...], skipped: list[str]) -> list[tuple[str, Path | None]]:
    """(name, file) of every data file, (id, None) of a Hub data set; a name is that of one file only.

    Raises DataError: a path given twice, no such file, a format that is not known.
    """
    found: list[tuple[str, Path | None]] = []
    twice = next((path for number, path in enumerate(paths) if path in paths[:number]), None)
    if twice is not None:
        raise DataError("is given twice; leave one out", twice)
    for path in paths:
        files = _local_files(Path(path), skipped) if path and Path(path).exists() else [(hub_id_of(path), None)]
        taken = {name for name, _ in found}
        # Two folders may both have a train.json.
        is_unclear = not taken.isdisjoint(name for name, _ in files)
        found += [(f"{Path(path).as_posix()}/{name}" if is_unclear else name, file) for name, file in files]
    return found


def _file_rows(file: Path, txt_split: TxtSplit) -> Iterator[RawRecord]:
    try:
        yield from read_file(file, txt_split)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", str(file)) from error


def _local_files(path: Path, skipped: list[str]) -> list[tuple[str, Path]]:
    """(name, file) of the data files, sorted by name so that every system reads them in one order."""
    if path.is_file():
        # In folders documents are passed over: a README beside the data is not meant to be learned.
        if path.suffix.lower() not in (*SUFFIXES, *DOCUMENT_SUFFIXES):
            found = path.suffix or "a name without a suffix"
            known = " ".join((*SUFFIXES, *DOCUMENT_SUFFIXES))
            raise DataError(f"{found} is no known format; known: {known}", str(path))
        return [(path.name, path)]
    files = []
    for file in path.rglob("*"):
        inside = file.relative_to(path)
        if not file.is_file() or any(part.startswith(".") for part in inside.parts):
            continue
        if file.suffix.lower() in SUFFIXES:
            files.append((inside.as_posix(), file))
        else:
            skipped.append(safe(inside.as_posix()))
    skipped.sort()
    return sorted(files)
