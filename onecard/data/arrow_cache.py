"""Encoded samples as an Arrow file with a manifest that vouches for it.

Knows how it is written so that a kill leaves nothing that looks whole, and how damage is found. Does not know what
was encoded, nor under which key it is looked for (dataset.py).
"""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from onecard.console import warn
from onecard.data.encode import EncodedSample
from onecard.data.sources import ReadReport
from onecard.errors import DataError, OneCardError
from onecard.storage import move, sha256_of, sync_file, write_whole

# (coded sample, where its record is found, its group)
Row = tuple[EncodedSample, str, int]

_KEPT_DROPPED_RECORDS = 1000
_STALE_PARTIAL_S = 24 * 3600
_CANNOT_WRITE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT}
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("spans", pa.list_(pa.int32())),
        ("weights", pa.list_(pa.float32())),
        ("n_supervised", pa.int32()),
        ("record", pa.string()),
        ("group", pa.int64()),
        ("cut", pa.bool_()),
        ("fields", pa.string()),
        ("n_characters", pa.int32()),
    ]
)


@dataclass
class DatasetReport:
    """What became of the data. `read` counts records; `dropped[reason]` counts good records that teach nothing."""

    read: ReadReport = field(default_factory=ReadReport)
    n_samples: int = 0
    n_cut: int = 0
    n_tokens: int = 0
    n_supervised: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    dropped_records: list[tuple[str, str]] = field(default_factory=list)

    def add_dropped(self, record: str, reason: str) -> None:
        """Count a good record that teaches nothing; the first 1000 are kept by name."""
        self.dropped[reason] += 1
        if len(self.dropped_records) < _KEPT_DROPPED_RECORDS:
            self.dropped_records.append((record, reason))

    def summary_lines(self, names_skipped: bool = True) -> list[str]:
        """What a person should know before training on this, a line each."""
        lines = self.read.summary_lines(names_skipped)
        lines.append(
            f"{self.n_samples:,} samples, {self.n_tokens:,} tokens, {self.n_supervised:,} of them learned; "
            f"{self.n_cut:,} samples are cut to fit"
        )
        lines += [f"{count:,} dropped: {reason}" for reason, count in self.dropped.most_common()]
        return lines

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` is the way back."""
        counts = {key: value for key, value in vars(self).items() if isinstance(value, int)}
        return {
            **counts,
            "dropped": dict(self.dropped),
            "dropped_records": self.dropped_records,
            "read": self.read.as_dict(),
        }

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> DatasetReport:
        report = cls(**{**plain, "read": ReadReport.from_dict(plain["read"])})
        report.dropped = Counter(plain["dropped"])
        report.dropped_records = [(record, reason) for record, reason in plain["dropped_records"]]
        return report


def write_cache(target: Path, key: str, report: DatasetReport, batches: Iterable[list[Row]]) -> str:
    """Arrow file first, then the manifest that vouches for it; each under another name until it is complete.

    Returns the fingerprint of what was written.
    """
    partial = target.with_name(f"{target.stem}.{os.getpid()}.partial")
    try:
        content = _write_samples(partial, report, batches)
        if not report.n_samples:
            reasons = "; ".join(report.summary_lines())
            raise DataError(f"nothing can be learned from it: {reasons}")
        sync_file(partial)
        manifest = {
            "key": key,
            "bytes": partial.stat().st_size,
            "sha256": sha256_of(partial),
            "fingerprint": content.fingerprint(),
            "report": report.as_dict(),
        }
        move(partial, target)
        write_whole(target.with_suffix(".json"), json.dumps(manifest, ensure_ascii=False))
        return content.fingerprint()
    except OSError as reason:
        if reason.errno not in _DISK_FULL | _CANNOT_WRITE:
            raise
        raise OneCardError(
            f"--cache_path {target.parent}: the encoded data could not be written ({reason.strerror or reason}). "
            "Make room there, or give another folder."
        ) from reason
    finally:
        partial.unlink(missing_ok=True)


def _write_samples(path: Path, report: DatasetReport, batches: Iterable[list[Row]]) -> _Content:
    content = _Content()
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
        for batch in map(_record_batch, batches):
            gc.collect(1)
            if batch.num_rows:
                content.add(batch)
                _count(batch, report)
                writer.write_batch(batch)
    return content


def _record_batch(rows: list[Row]) -> pa.RecordBatch:
    spans = [coded.spans for coded, _, _ in rows]
    columns = [
        _lists([coded.ids for coded, _, _ in rows]),
        _lists(spans),
        _lists([coded.weights for coded, _, _ in rows], np.float32),
        pa.array([sum(span[1::2]) - sum(span[::2]) for span in spans], pa.int32()),
        pa.array([record for _, record, _ in rows], pa.string()),
        pa.array([group for _, _, group in rows], pa.int64()),
        pa.array([coded.cut for coded, _, _ in rows], pa.bool_()),
        pa.array([coded.fields for coded, _, _ in rows], pa.string()),
        pa.array([coded.n_characters for coded, _, _ in rows], pa.int32()),
    ]
    return pa.record_batch(columns, schema=_SCHEMA)


def _count(batch: pa.RecordBatch, report: DatasetReport) -> None:
    report.n_samples += batch.num_rows
    report.n_cut += batch.column("cut").true_count
    report.n_tokens += len(batch.column("input_ids").values)
    report.n_supervised += int(batch.column("n_supervised").to_numpy().sum())


def content_fingerprint(batches: Iterable[pa.RecordBatch]) -> str:
    """The hash that `write_cache` gives, over samples that are there already; of dated templates the ids themselves."""
    content = _Content()
    for batch in batches:
        content.add(batch)
    return content.fingerprint()


class _Content:
    """A hash over samples, not over files: the same whatever the batches, the code or the version of Arrow."""

    def __init__(self) -> None:
        self._streams = {name: hashlib.sha256() for name in ("input_ids", "spans", "n_ids", "n_spans")}
        # Only of data that have some: all other data keep the hash that they had.
        self._weights: Any = None
        self._fields: Any = None
        self._n_samples = 0

    def add(self, batch: pa.RecordBatch) -> None:
        for name, sizes in (("input_ids", "n_ids"), ("spans", "n_spans")):
            column = batch.column(name)
            self._streams[name].update(column.values.to_numpy().astype("<i4").data)
            self._streams[sizes].update(np.diff(column.offsets.to_numpy()).astype("<i4").data)
        weights = batch.column("weights")
        n_weights = np.diff(weights.offsets.to_numpy())
        for row in np.flatnonzero(n_weights):
            self._weights = self._weights or hashlib.sha256()
            self._weights.update(f"{self._n_samples + row} ".encode())
            self._weights.update(weights[int(row)].values.to_numpy().astype("<f4").data)
        for text in filter(None, batch.column("fields").to_pylist()):
            self._fields = self._fields or hashlib.sha256()
            self._fields.update(f"{len(text)} {text}".encode())
        self._n_samples += batch.num_rows

    def fingerprint(self) -> str:
        streams = [*self._streams.values(), *filter(None, (self._weights, self._fields))]
        return hashlib.sha256("".join(stream.hexdigest() for stream in streams).encode()).hexdigest()


def _lists(lists: Sequence[Sequence[float]], dtype: Any = np.int32) -> pa.ListArray:
    """[[5, 6], [7]] -> one Arrow array of values [5, 6, 7] and offsets [0, 2, 3]."""
    offsets = np.zeros(len(lists) + 1, np.int32)
    np.cumsum([len(items) for items in lists], out=offsets[1:])
    values = np.fromiter(chain.from_iterable(lists), dtype, count=int(offsets[-1]))
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def read_manifest(target: Path, key: str) -> tuple[DatasetReport, str] | None:
    """Report and fingerprint of the cached data, or None when there is none or it is damaged, which is said."""
    manifest_file = target.with_suffix(".json")
    if not manifest_file.is_file() or not target.is_file():
        return None
    try:
        manifest = json.loads(manifest_file.read_text(encoding="utf-8"))
        report = DatasetReport.from_dict(manifest["report"])
        fingerprint = str(manifest["fingerprint"])
        whole = (
            manifest["key"] == key
            and target.stat().st_size == manifest["bytes"]
            and sha256_of(target) == manifest["sha256"]
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        warn(f"the encoded data in {target} is damaged; it is made anew")
        return None
    return report, fingerprint


def can_write(folder: Path) -> bool:
    """Whether files can be made there; the folder is made if need be. Trying is the only test that never lies."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError as reason:
        if reason.errno in _CANNOT_WRITE:
            return False
        raise OneCardError(f"--cache_path {folder}: {reason.strerror or reason}. Give another folder.") from reason


def remove_stale(folder: Path) -> None:
    """Partial files of runs that were killed; a living run's partial file is never a day old without a write."""
    for partial in folder.glob("*.partial"):
        try:
            if time.time() - partial.stat().st_mtime > _STALE_PARTIAL_S:
                partial.unlink()
        except OSError:
            continue
