"""Whole samples in shared rows: which ones share a row, and the row as one sample.

A row is filled in the order of its samples, and the next one begins where a sample no longer fits: so the order alone
says where rows end, and a micro-batch stays a list of samples.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from onecard.data.encode import IGNORE_INDEX, LabelledSample


def packed(indices: np.ndarray, lengths: np.ndarray, row_tokens: int) -> list[np.ndarray]:
    """The samples in rows of at most `row_tokens`, none cut: best fit, longest first. A longer one stands alone.

    lengths [5, 4, 3, 2], 8 tokens -> [0, 2], [1, 3]. A row's first sample did not fit into any row before it.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # what is left in a row, and its number, ascending
    for index in indices[np.argsort(-lengths[indices].astype(np.int64), kind="stable")]:
        length = int(lengths[index])
        best = bisect_left(room, (length, 0))
        left, number = room.pop(best) if best < len(room) else (row_tokens, len(rows))
        if number == len(rows):
            rows.append([])
        rows[number].append(index)
        insort(room, (left - length, number))
    return [np.array(row, dtype=np.int64) for row in rows]


def row_lengths(lengths: Sequence[int] | np.ndarray, row_tokens: int) -> list[int]:
    """Tokens of the rows that samples of these lengths fill in this order: [5, 3, 4, 2], 8 tokens -> [8, 6]."""
    rows: list[int] = []
    for length in map(int, lengths):
        if rows and rows[-1] + length <= row_tokens:
            rows[-1] += length
        else:
            rows.append(length)
    return rows


def padded_tokens(micro: np.ndarray, lengths: np.ndarray, row_tokens: int = 0) -> int:
    """Tokens of one micro-batch, padding included; `micro` are positions in `lengths`."""
    rows = row_lengths(lengths[micro], row_tokens)
    return len(rows) * max(1, *rows)


def in_rows(samples: Sequence[LabelledSample], row_tokens: int) -> list[LabelledSample]:
    """The samples as rows, as `row_lengths` counts them. The first token of each is predicted from nothing."""
    rows: list[list[LabelledSample]] = []
    n_tokens = 0
    for sample in samples:
        n_tokens += len(sample.input_ids)
        if not rows or n_tokens > row_tokens:
            rows.append([])
            n_tokens = len(sample.input_ids)
        rows[-1].append(sample)
    return [_joined(row) if len(row) > 1 else row[0] for row in rows]


def _joined(samples: Sequence[LabelledSample]) -> LabelledSample:
    ids: list[int] = []
    labels: list[int] = []
    weights: list[float] = []
    starts: list[int] = []
    for sample in samples:
        starts += [len(ids), *(len(ids) + start for start in sample.starts)]
        ids += sample.input_ids
        labels += [IGNORE_INDEX, *sample.labels[1:]]
        weights += sample.weights or [1.0] * len(sample.input_ids)
    is_weighted = any(sample.weights for sample in samples)
    first = samples[0]
    return LabelledSample(ids, labels, first.record, first.group, weights=weights if is_weighted else [],
                          starts=starts[1:])  # fmt: skip
