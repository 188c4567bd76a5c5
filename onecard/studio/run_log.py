"""log.jsonl as curves: read once by its bytes, then only what was added; thinned so that no peak is lost.

A log that a resumed run has written anew is another file and is read from its beginning.
"""

from __future__ import annotations

import math
import os
import threading
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from onecard.storage import json_object
from onecard.train.trackers import FORGETTING, LOG_NAME

# What is drawn. Others of a row (the losses of sources, rewards) are in the file.
SERIES = ("loss", "eval_loss", FORGETTING, "learning_rate", "tokens_per_s", "peak_bytes", "reward", "eval_reward",
          "grad_norm")  # fmt: skip
MOST_POINTS = 20_000
ARROW_FROM_BYTES = 1 << 16  # a megabyte of rows takes 10 ms by Arrow and 50 ms by the json module
TAIL_BYTES = 1 << 16
MOST_STOPS = 50  # that are remembered; a page that stands elsewhere loads anew
PREVIEW_FROM_BYTES, PREVIEW_ROWS = 2_000_000, 300  # what takes longer to read than a page should wait


class Column(NamedTuple):
    """A series: values at steps, of equal length, as doubles."""

    steps: array[float]
    values: array[float]

    @classmethod
    def empty(cls) -> Column:
        return cls(array("d"), array("d"))


Columns = dict[str, Column]
Points = dict[str, tuple[list[float], list[float | None]]]  # as JSON can carry it: None is not finite


@dataclass
class RunLog:
    """The rows of one run's log.jsonl so far, at 16 bytes a value."""

    path: Path
    mark: str = ""  # of the file; another one once it was written anew
    end: int = 0  # bytes of whole lines that were read
    published: str | None = None  # the mark that pages know; None: no page has asked
    stops: list[int] = field(default_factory=list)  # of the last news and of answers since: where pages may stand
    columns: Columns = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def read(self) -> Columns:
        """Take in what was added and return it; all, where the file is another one. Raises OSError."""
        with self.path.open("rb") as stream:
            found = os.fstat(stream.fileno())
            mark = f"{found.st_ino:x}"
            if mark != self.mark or found.st_size < self.end:
                self.mark, self.end, self.columns, self.stops = mark, 0, {}, []
            stream.seek(self.end)
            data = stream.read()
        whole = data[: data.rfind(b"\n") + 1]
        added = columns_of(whole)
        self.end += len(whole)
        for name, column in added.items():
            known = self.columns.setdefault(name, Column.empty())
            known.steps.extend(column.steps)
            known.values.extend(column.values)
        return added

    def between(self, after: int, end: int) -> Columns:
        """The columns of the rows between two bytes, each the end of a line. Raises OSError."""
        with self.path.open("rb") as stream:
            stream.seek(after)
            return columns_of(stream.read(end - after))


class RunLogs:
    """The logs that were asked for, each read once; of those that were asked for longest ago, none are kept."""

    def __init__(self, most: int = 32) -> None:
        self._most, self._logs = most, dict[Path, RunLog]()
        self._lock = threading.Lock()

    def rows(self, run: Path, *, mark: str = "", after: int = 0, most: int = 2000) -> dict[str, Any]:
        """Points behind byte `after` of the file `mark`, or all of them thinned: {mark, next, is_all, series}."""
        with self._lock:
            log = self._logs.pop(run, None) or RunLog(run / LOG_NAME)
            self._logs[run] = log
            if len(self._logs) > self._most:
                self._logs.pop(next(iter(self._logs)))
        with log.lock:
            try:
                log.read()
                goes_on = mark == log.mark and 0 < after <= log.end
                series = points_of(log.between(after, log.end)) if goes_on else points_of(log.columns, most)
            except OSError:
                log.published = log.published or ""
                return {"mark": "", "next": 0, "is_all": True, "series": {}}
            log.published = log.mark if log.published is None else log.published
            if log.end not in log.stops:
                log.stops = [*log.stops[-MOST_STOPS:], log.end]
            return {"mark": log.mark, "next": log.end, "is_all": not goes_on, "series": series}

    def preview(self, run: Path) -> dict[str, Any] | None:
        """A few rows from all over a long log that was not read yet, at once; None where `rows` is as quick."""
        path, log = run / LOG_NAME, self._logs.get(run)
        is_read = log is not None and log.end > 0  # not while another request reads it, which takes seconds
        try:
            if is_read or path.stat().st_size < PREVIEW_FROM_BYTES:
                return None
            lines = spread_lines(path, PREVIEW_ROWS)
        except OSError:
            return None
        return {"mark": "", "next": 0, "is_all": True, "is_preview": True, "series": points_of(columns_of(lines))}

    def news(self, run: Path) -> list[dict[str, Any]]:
        """What was added to a log since the last news of it, in pieces: {mark, from, next, series}.

        A piece ends wherever an answer of `rows` has ended meanwhile, so that every page, whether it was given that
        answer or not, finds the piece that follows on what it has. None where nothing was added, or nobody has asked
        for it. Without series: it was written anew.
        """
        log = self._logs.get(run)
        if log is None:
            return []
        with log.lock:
            try:
                log.read()
                if log.mark != log.published:
                    found = [{"mark": log.mark, "from": 0, "next": log.end, "series": None}]
                else:
                    found = [
                        {"mark": log.mark, "from": after, "next": end, "series": points_of(log.between(after, end))}
                        for after, end in pairwise(sorted({*log.stops, log.end}))
                    ]
            except OSError:
                return []
            log.published, log.stops = log.mark, [log.end]
            return found


def columns_of(lines: bytes) -> Columns:
    """The series in whole lines of JSON; what is no row is passed over."""
    found = _columns_by_arrow(lines) if len(lines) > ARROW_FROM_BYTES else None
    if found is not None:
        return found
    columns: Columns = {}
    for row in rows_of(lines):
        for name in SERIES:
            value = row.get(name)
            if isinstance(value, (int, float)):
                column = columns.setdefault(name, Column.empty())
                column.steps.append(row["step"])
                column.values.append(value)
    return columns


def rows_of(lines: bytes) -> list[dict[str, Any]]:
    """The rows with a step in these lines."""
    return [row for row in map(json_object, lines.splitlines()) if isinstance(row.get("step"), (int, float))]


def spread_lines(path: Path, n: int) -> bytes:
    """`n` lines of a file at equal distances, the last one among them. Raises OSError."""
    found = []
    with path.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        for k in range(n):
            stream.seek(max(0, size * k // n - 1))
            stream.readline()  # the rest of a line, but for the first of the file
            found.append(stream.readline())
        stream.seek(max(0, size - TAIL_BYTES))
        found += stream.read().splitlines(keepends=True)[-1:]
    return b"".join(line for line in found if line.endswith(b"\n"))


def last_rows(run: Path) -> list[dict[str, Any]]:
    """The rows in the last `TAIL_BYTES` of a run's log; none where it has no log."""
    return rows_of(end_of(run / LOG_NAME, TAIL_BYTES))


def end_of(path: Path, most: int) -> bytes:
    """The last bytes of a file, at most so many; none where there is no file."""
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - most))
            return stream.read()
    except OSError:
        return b""


def _columns_by_arrow(lines: bytes) -> Columns | None:
    """The same by Arrow; None for rows that it does not take, such as those with NaN."""
    import pyarrow as pa
    from pyarrow import compute
    from pyarrow import json as arrow_json

    schema = pa.schema([(name, pa.float64()) for name in ("step", *SERIES)])
    parsing = arrow_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    reading = arrow_json.ReadOptions(block_size=max(len(lines), 1 << 20))
    try:
        table = arrow_json.read_json(pa.BufferReader(lines), reading, parsing)
    except pa.ArrowInvalid:
        return None
    columns: Columns = {}
    for name in SERIES:
        known = compute.and_(compute.is_valid(table["step"]), compute.is_valid(table[name]))
        rows = table.select(["step", name]).filter(known)
        if rows.num_rows:
            columns[name] = Column(array("d", rows["step"].to_numpy().tobytes()),
                                   array("d", rows[name].to_numpy().tobytes()))  # fmt: skip
    return columns


def points_of(columns: Mapping[str, Column], most: int = MOST_POINTS) -> Points:
    """Every series as JSON can carry it, thinned to at most `most` points."""
    return {name: thinned(column, max(10, min(most, MOST_POINTS))) for name, column in columns.items()}


def thinned(column: Column, most: int) -> tuple[list[float], list[float | None]]:
    """At most `most` points: of each stretch its lowest and its highest, in order, and the first and the last."""
    n = len(column.steps)
    if n <= most:
        return list(column.steps), [value if math.isfinite(value) else None for value in column.values]
    import numpy as np

    steps, values = np.array(column.steps), np.array(column.values)
    is_finite = np.isfinite(values)
    bounds = np.linspace(0, n, (most - 2) // 2 + 1).astype(np.int64)
    places = bounds[:-1, None] + np.arange(int(np.diff(bounds).max()))[None, :]
    # Stretches differ by one in length: a place behind the end of its own counts as not finite.
    known = (places < bounds[1:, None]) & is_finite[np.minimum(places, n - 1)]
    places = np.minimum(places, n - 1)
    every = np.arange(len(places))
    lowest = places[every, np.where(known, values[places], np.inf).argmin(axis=1)]
    highest = places[every, np.where(known, values[places], -np.inf).argmax(axis=1)]
    kept = np.unique(np.concatenate([lowest, highest, [0, n - 1]]))
    shown: list[float | None] = values[kept].tolist()
    return steps[kept].tolist(), [value if ok else None for value, ok in zip(shown, is_finite[kept], strict=True)]
