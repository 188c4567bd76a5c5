"""A preference pair as one row, in which the prompt stands once; prefix sharing, arXiv:2410.20305.

    prompt 5 6 7, answers 8 9 and 4    ids        5 6 7 8 9 7 4
                                       positions  0 1 2 3 4 2 3
                                       segments   0 0 1 1 1 2 2

The last token of the prompt begins both answers, so that the first token of each is predicted in a place of its own.
Knows rows; does not know the mask that keeps the answers apart (model/shared_prompt.py), nor when that is worth it
(train/shared_prompt.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from onecard.data.batches import collate
from onecard.data.dataset import EncodedDataset
from onecard.data.encode import IGNORE_INDEX, LabelledSample
from onecard.model.shared_prompt import CHOSEN, PADDING, PROMPT, REJECTED

Pair = tuple[LabelledSample, LabelledSample, int]  # chosen, rejected, tokens that stand once


def shared_tokens(dataset: EncodedDataset, pairs: np.ndarray) -> np.ndarray:
    """Tokens of the prompt that stand once, int32 (n,), for pairs (n, 2) of rows of the data set.

    All of it but its last token; 0 where the prompts are encoded differently, which loses nothing but tokens.
    """
    starts = dataset.first_learned[pairs].min(axis=1) - 1
    alike = [
        n > 0 and np.array_equal(dataset.ids(one)[:n], dataset.ids(other)[:n])
        for n, (one, other) in zip(starts.tolist(), pairs.tolist(), strict=True)
    ]
    shared: np.ndarray = np.where(alike, starts, 0).astype(np.int32)
    return shared


def pair_lengths(lengths: np.ndarray, n_shared: np.ndarray | None = None) -> np.ndarray:
    """Tokens that pairs of answers of these lengths (n, 2), each with its prompt, add to a micro-batch, (n,).

    As two rows the shorter one is padded; in one, n_shared (n,) tokens stand once.
    """
    found: np.ndarray = 2 * lengths.max(axis=1) if n_shared is None else lengths.sum(axis=1) - n_shared
    return found


def collate_pairs(pairs: Sequence[Pair]) -> dict[str, torch.Tensor]:
    """A row for each pair, padded on the right: what `collate` gives, and position_ids and segments (batch, seq)."""
    rows = [_row(*pair) for pair in pairs]
    batch = collate(rows, pad_id=0)
    positions = torch.zeros_like(batch["input_ids"])
    segments = torch.full_like(positions, PADDING)
    for number, (chosen, rejected, n) in enumerate(pairs):
        end, last = len(chosen.input_ids), len(rows[number].input_ids)
        positions[number, :end] = torch.arange(end)
        positions[number, end:last] = torch.arange(n, len(rejected.input_ids))
        segments[number, :n], segments[number, n:end], segments[number, end:last] = PROMPT, CHOSEN, REJECTED
    return {**batch, "position_ids": positions, "segments": segments}


def _row(chosen: LabelledSample, rejected: LabelledSample, n_shared: int) -> LabelledSample:
    ids = [*chosen.input_ids, *rejected.input_ids[n_shared:]]
    # What begins the second answer is not learned: the end of the first one predicts nothing.
    labels = [*chosen.labels, IGNORE_INDEX, *rejected.labels[n_shared + 1 :]]
    return LabelledSample(ids, labels, chosen.record, chosen.group)
