"""A data set, encoded once and kept in Arrow files: read through memory maps, never whole in RAM.

Knows what decides the encoded data (the cache key) and how samples are encoded in batches and found again by number.
Does not know templates or masks (encode.py), how the file is kept whole (arrow_cache.py), nor steps (batches.py).
"""

from __future__ import annotations

import gc
import hashlib
import inspect
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import date
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from onecard.console import warn
from onecard.data.arrow_cache import DatasetReport, Row, can_write, read_manifest, remove_stale, write_cache
from onecard.data.chat_template import Template
from onecard.data.encode import (
    DroppedSample,
    EncodedSample,
    Encoder,
    EncodeSettings,
    LabelledSample,
    segments_of,
    to_encoded,
)
from onecard.data.jinja_chat import is_dated
from onecard.data.messages import Conversation, Document
from onecard.data.sources import Source, data_fingerprint, read
from onecard.data.tokenization import tokenizer_fingerprint
from onecard.errors import DataError

BATCH_RECORDS = 2048
# One batch of long documents must not fill the memory.
BATCH_CHARACTERS = 1_000_000


class EncodedDataset:
    """Encoded samples in a memory-mapped Arrow file.

    lengths, supervised: int32 (n_samples,), tokens and learned tokens of each sample. groups: int64 (n_samples,).
    units: (n_samples,), the weights of the learned tokens summed; the same as `supervised` where no answer has one.
    names, amounts, parts: of the sources of a mixture (joined.py); else empty, and None. first_groups: the group of the
    first conversation of each source.
    fingerprint: SHA-256 over all ids and what of them is learned, so two runs with the same one learn the same; with a
    dated template over what the samples are made of, the day aside.
    """

    names: Sequence[str] = ()
    amounts: Sequence[float] = ()
    parts: np.ndarray | None = None
    first_groups: Sequence[int] = (0,)

    def __init__(self, arrow_file: Path, report: DatasetReport, fingerprint: str) -> None:
        self.report, self.fingerprint, self.path = report, fingerprint, arrow_file
        self._keep: Any = None
        reader = pa.ipc.open_file(pa.memory_map(str(arrow_file)))
        self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        self.lengths = self._column(lambda batch: np.diff(batch.column("input_ids").offsets.to_numpy()), np.int32)
        self.supervised = self._column(lambda batch: batch.column("n_supervised").to_numpy(), np.int32)
        self.units = self._units()
        self.groups = self._column(lambda batch: batch.column("group").to_numpy(), np.int64)

    @property
    def batches(self) -> list[Any]:
        """The Arrow record batches, in order."""
        return self._batches

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> LabelledSample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        batch, row = self._place(index)
        ids = self.ids(index).tolist()
        spans = batch.column("spans")[row].values.to_numpy().tolist()
        weights = batch.column("weights")[row].values.to_numpy().tolist()
        cut, fields = batch.column("cut")[row].as_py(), batch.column("fields")[row].as_py()
        coded = EncodedSample(ids, spans, cut, weights, fields)
        return to_encoded(coded, batch.column("record")[row].as_py(), int(self.groups[index]))

    def ids(self, index: int) -> np.ndarray:
        """The token ids of a sample, int32 (n_tokens,), as they lie in the file: no copy."""
        batch, row = self._place(index)
        column = batch.column("input_ids")
        first, last = column.offsets[row].as_py(), column.offsets[row + 1].as_py()
        ids: np.ndarray = column.values.to_numpy()[first:last]
        return ids

    def record(self, index: int) -> str:
        """Where the record of a sample is found."""
        batch, row = self._place(index)
        return str(batch.column("record")[row].as_py())

    @cached_property
    def characters(self) -> np.ndarray:
        """Of each sample that is a text learned whole, int64 (n_samples,); of others 0."""
        return self._column(lambda batch: batch.column("n_characters").to_numpy(), np.int64)

    @cached_property
    def first_learned(self) -> np.ndarray:
        """The place of the first learned token of each sample, int32 (n_samples,); each has one."""
        spans = [batch.column("spans") for batch in self._batches]
        parts = [column.values.to_numpy()[column.offsets.to_numpy()[:-1]] for column in spans]
        return np.concatenate(parts).astype(np.int32) if parts else np.empty(0, np.int32)

    def first_beyond(self, limit: int) -> tuple[int, int] | None:
        """The number of the first sample that holds an id of `limit` or more, and that id; None where none does."""
        for start, batch in zip(self._starts, self._batches, strict=False):
            column = batch.column("input_ids")
            ids = column.values.to_numpy()
            places = np.flatnonzero(ids >= limit)
            if len(places):
                row = int(np.searchsorted(column.offsets.to_numpy(), places[0], side="right")) - 1
                return int(start) + row, int(ids[places[0]])
        return None

    def summary_lines(self, names_skipped: bool = True) -> list[str]:
        return self.report.summary_lines(names_skipped)

    def keep(self, thing: Any) -> None:
        """Hold something, such as a temporary folder, for as long as this data set lives."""
        self._keep = thing

    def _place(self, index: int) -> tuple[Any, int]:
        which = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._batches[which], int(index - self._starts[which])

    def _units(self) -> np.ndarray:
        if not any(len(batch.column("weights").values) for batch in self._batches):
            return self.supervised
        units = self.supervised.astype(np.float64)
        for start, batch in zip(self._starts, self._batches, strict=False):
            spans, weights = batch.column("spans"), batch.column("weights")
            for row in np.flatnonzero(np.diff(weights.offsets.to_numpy())):
                places = spans[int(row)].values.to_numpy()
                units[start + row] = (places[1::2] - places[::2]) @ weights[int(row)].values.to_numpy().astype(float)
        return units

    def _column(self, of: Any, dtype: Any) -> np.ndarray:
        parts = [of(batch) for batch in self._batches]
        return np.concatenate(parts).astype(dtype) if parts else np.empty(0, dtype)


def encode_dataset(
    source: str | Source,
    template: Template,
    tokenizer: Any,
    settings: EncodeSettings,
    cache_dir: Path,
    *,
    encoder: type[Encoder] = Encoder,
) -> EncodedDataset:
    """The encoded data set, from the cache where it is whole, else encoded now and kept there.

    A dated template writes the day of the first encoding into all samples, and the cache keeps it: after midnight the
    same data mean the same, and their fingerprint is the same on any day. Only asking a model writes the present day.

    Raises DataError when nothing can be learned from the data, or with settings.strict at the first bad record.
    """
    key = cache_key(source, template, tokenizer, settings, encoder)
    dated = _dated_fingerprint(source, template, settings) if is_dated(template.jinja) else None
    target = Path(cache_dir) / f"{key[:32]}.arrow"
    found = read_manifest(target, key)
    if found is not None:
        report, fingerprint = found
        return EncodedDataset(target, report, dated or fingerprint)
    temporary = None
    if not can_write(target.parent):
        temporary = tempfile.TemporaryDirectory(prefix="onecard-", ignore_cleanup_errors=True)
        warn(f"--cache_path {target.parent} cannot be written; encoding into {temporary.name} for this run only")
        target = Path(temporary.name) / target.name
    remove_stale(target.parent)
    samples = encoder(replace(template, day=date.today().isoformat()) if dated else template, tokenizer, settings)
    report = DatasetReport()
    with _cycles_collected_by_batch():
        fingerprint = write_cache(target, key, report, _encoded(source, samples, settings, report))
    dataset = EncodedDataset(target, report, dated or fingerprint)
    dataset.keep(temporary)
    return dataset


def cache_directory(typed: str | None) -> Path:
    """Where encoded data is kept: as typed, or `onecard` in the user's cache directory."""
    if typed:
        return Path(typed).expanduser()
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME).parent / "onecard"


def cache_key(
    source: str | Source, template: Template, tokenizer: Any, settings: EncodeSettings, encoder: type[Encoder] = Encoder
) -> str:
    """SHA-256 over everything that decides the encoded data, so that no stale cache is ever taken."""
    parts = {
        "data": data_fingerprint(source),
        "split": source.txt_split if isinstance(source, Source) else "auto",
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "template": [template.jinja, template.end, template.stop],
        "settings": asdict(settings),
        "code": _code_fingerprint(encoder),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _dated_fingerprint(source: str | Source, template: Template, settings: EncodeSettings) -> str:
    """Stands for the ids where they differ from day to day: encoded anew, a run that goes on would be refused."""
    parts = [data_fingerprint(source), template.jinja, settings.cutoff_len, settings.train_on]
    parts += [settings.thinking] if settings.thinking != "auto" else []
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _code_fingerprint(encoder: type[Encoder]) -> str:
    """The source of this package and the encoder, and the libraries that tokenise: no version number to forget."""
    digest = hashlib.sha256()
    own = Path(__file__).resolve().parent
    beyond = {Path(inspect.getfile(each)).resolve() for each in encoder.__mro__[:-1]} - {own / "encode.py"}
    digest.update(encoder.__qualname__.encode())
    for source in [*sorted(own.glob("*.py")), *sorted(beyond)]:
        digest.update(source.name.encode() + source.read_bytes())
    for library in ("tokenizers", "sentencepiece", "jinja2"):
        try:
            digest.update(version(library).encode())
        except PackageNotFoundError:
            digest.update(b"none")
    return digest.hexdigest()


def _encoded(
    source: str | Source, encoder: Encoder, settings: EncodeSettings, report: DatasetReport
) -> Iterator[list[Row]]:
    """Batches of coded samples. While one batch is tokenised in a thread, the next one is read and rendered."""
    group = 0
    waiting: tuple[list[Conversation | Document], Any, Future[list[list[list[int]]]]] | None = None
    with ThreadPoolExecutor(max_workers=1) as pool:
        samples = read(source, report=report.read, strict=settings.strict, shape=encoder.reads)
        for batch in _in_batches(samples):
            plans = [encoder.plan(sample) for sample in batch]
            ahead = (batch, plans, pool.submit(encoder.tokens.ids, segments_of(plans)))
            if waiting is not None:
                yield _rows(waiting[0], encoder.assemble(waiting[1], waiting[2].result()), group, settings, report)
                group += len(waiting[0])
            waiting = ahead
        if waiting is not None:
            yield _rows(waiting[0], encoder.assemble(waiting[1], waiting[2].result()), group, settings, report)
    for note in encoder.untrue_notes:
        report.read.notes.pop(note, None)


@contextmanager
def _cycles_collected_by_batch() -> Iterator[None]:
    """Python looks for reference cycles after every few hundred new objects; here that is a quarter of the time.

    Nothing made per record has cycles; what a template may leave behind `write_cache` collects once per batch.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _in_batches(samples: Iterable[Conversation | Document]) -> Iterator[list[Conversation | Document]]:
    batch: list[Conversation | Document] = []
    n_characters = 0
    for sample in samples:
        batch.append(sample)
        n_characters += _n_characters(sample)
        if len(batch) >= BATCH_RECORDS or n_characters >= BATCH_CHARACTERS:
            yield batch
            batch, n_characters = [], 0
    if batch:
        yield batch


def _n_characters(sample: Conversation | Document) -> int:
    if isinstance(sample, Document):
        return len(sample.text)
    return sum(
        len(turn.content) + len(turn.input) + len(turn.thought) + sum(len(call.arguments) for call in turn.tool_calls)
        for turn in sample.turns
    )


def _rows(
    samples: list[Conversation | Document],
    results: list[list[EncodedSample] | DroppedSample],
    first_group: int,
    settings: EncodeSettings,
    report: DatasetReport,
) -> list[Row]:
    rows: list[Row] = []
    for group, (sample, result) in enumerate(zip(samples, results, strict=True), start=first_group):
        if not isinstance(result, DroppedSample):
            rows += [(coded, sample.record, group) for coded in result]
        elif not result.bad:
            report.add_dropped(sample.record, result.reason)
        elif settings.strict:
            raise DataError(f"{sample.record}: {result.reason} (--strict ends the run here)")
        else:
            report.read.reject(sample.record, result.reason)
    return rows
