"""The encoded data of several sources as one data set, which knows the source of each sample and its share."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from onecard.data.arrow_cache import DatasetReport
from onecard.data.chat_template import Template
from onecard.data.dataset import EncodedDataset, encode_dataset
from onecard.data.encode import Encoder, EncodeSettings, LabelledSample
from onecard.data.mixture import MixturePart
from onecard.data.sources import BadRecord, ReadReport


class JoinedDataset(EncodedDataset):
    """Encoded data sets one after another.

    parts int32 (n_samples,): the source of each sample. names, amounts: of the sources. The fingerprint is over those
    of the sources and over the amounts.
    """

    def __init__(self, parts: Sequence[MixturePart], datasets: Sequence[EncodedDataset]) -> None:
        self.names, self.amounts = [part.name for part in parts], [part.amount for part in parts]
        self.labels, self._reports = [part.label for part in parts], [dataset.report for dataset in datasets]
        self._keep: Any = datasets
        self.path: Path = datasets[0].path
        self.report = _joined(self.names, self._reports)
        shares = [[dataset.fingerprint, amount] for dataset, amount in zip(datasets, self.amounts, strict=True)]
        self.fingerprint = hashlib.sha256(json.dumps(shares).encode()).hexdigest()
        self._batches = [batch for dataset in datasets for batch in dataset.batches]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        self.lengths = np.concatenate([dataset.lengths for dataset in datasets])
        self.supervised = np.concatenate([dataset.supervised for dataset in datasets])
        self.units = np.concatenate([dataset.units for dataset in datasets])
        self._ends = np.cumsum([len(dataset) for dataset in datasets])
        self.parts = np.repeat(np.arange(len(datasets), dtype=np.int32), [len(dataset) for dataset in datasets])
        # Groups are numbered within each source.
        starts = np.cumsum([0, *(int(dataset.groups.max()) + 1 for dataset in datasets[:-1])])
        self.first_groups = starts.tolist()
        self.groups = np.concatenate([dataset.groups + start for dataset, start in zip(datasets, starts, strict=True)])

    def __getitem__(self, index: int) -> LabelledSample:
        return replace(super().__getitem__(index), record=self.record(index))

    def record(self, index: int) -> str:
        number = int(np.searchsorted(self._ends, index, side="right"))
        return _place(self.names[number], super().record(index))

    def summary_lines(self, names_skipped: bool = True) -> list[str]:
        lines = []
        for label, report in zip(self.labels, self._reports, strict=True):
            lines += [f"{label}:", *(f"  {line}" for line in report.summary_lines(names_skipped))]
        return lines


def encode_parts(
    parts: Sequence[MixturePart], template: Template, tokenizer: Any, settings: EncodeSettings, cache_dir: Path,
    *, encoder: type[Encoder] = Encoder,
) -> EncodedDataset:  # fmt: skip
    """The encoded data of all parts; each is kept by itself, so that another share encodes nothing anew.

    A single part of which every record is learned once is the plain data set. Raises DataError as `encode_dataset`.
    """
    found = [encode_dataset(part.source, template, tokenizer, settings, cache_dir, encoder=encoder) for part in parts]
    return found[0] if len(found) == 1 and parts[0].amount == 1 else JoinedDataset(parts, found)


def _place(name: str, record: str) -> str:
    """A record's place with its source in front, where the place alone does not tell it."""
    return record if record.startswith((f"{name}:", f"{name}/")) else f"{name}/{record}"


def _joined(names: Sequence[str], reports: Sequence[DatasetReport]) -> DatasetReport:
    """The reports of several sources as one."""
    whole = DatasetReport(read=ReadReport())
    for name, report in zip(names, reports, strict=True):
        for key in ("n_samples", "n_cut", "n_tokens", "n_supervised"):
            setattr(whole, key, getattr(whole, key) + getattr(report, key))
        whole.dropped.update(report.dropped)
        whole.dropped_records += [(_place(name, record), reason) for record, reason in report.dropped_records]
        read, of_one = whole.read, report.read
        read.n_good, read.n_bad = read.n_good + of_one.n_good, read.n_bad + of_one.n_bad
        read.bad += [BadRecord(_place(name, bad.file), *bad[1:]) for bad in of_one.bad]
        read.shapes |= {_place(name, file): Counter(counts) for file, counts in of_one.shapes.items()}
        for text, (count, record) in of_one.notes.items():
            read.notes.setdefault(text, [0, _place(name, record)])[0] += count
        read.ignored_fields.update(of_one.ignored_fields)
        read.skipped_files += [_place(name, file) for file in of_one.skipped_files]
    return whole
