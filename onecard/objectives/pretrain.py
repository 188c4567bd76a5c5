"""Continued pretraining: every text is learned whole, in blocks of --cutoff_len tokens that documents flow through.

A row of the encoded data is a whole document with the end token behind it; blocks are views of the rows, so that
another length encodes nothing anew, and none of them lies in RAM. Knows documents and where blocks begin; does not know
how attention is kept within a document (data/batches.py).
"""

from __future__ import annotations

from itertools import chain

import numpy as np

from onecard.config.training import FinetuneConfig
from onecard.data.dataset import EncodedDataset
from onecard.data.encode import (
    IGNORE_INDEX,
    DroppedSample,
    EncodedSample,
    Encoder,
    LabelledSample,
    Sample,
    SamplePlan,
)
from onecard.data.messages import Conversation, Turn
from onecard.objectives.base import SampleView
from onecard.objectives.next_token import SupervisedFineTuning

CONVERSATION = (
    "the record is a conversation, and pretraining learns texts; written by the template it is learned whole "
    "(finetune --train_on everything)"
)


class WholeTextEncoder(Encoder):
    """One row for each text: what the tokenizer puts in front, the text, the end token. Nothing is cut."""

    cuts = False

    def plan(self, sample: Sample) -> list[SamplePlan] | DroppedSample:
        if isinstance(sample, Conversation) and self.settings.train_on != "everything":
            return DroppedSample(CONVERSATION, bad=True)
        return super().plan(sample)

    def _drafts(self, turns: tuple[Turn, ...]) -> list[SamplePlan]:
        return super()._drafts(turns)[-1:]  # where a template rewrites the history, the others are parts of the last

    def _fit(self, draft: SamplePlan, ids: list[list[int]]) -> list[EncodedSample] | DroppedSample:
        beginning, text = self.tokens.beginning_of(draft.segments[0].text), list(chain.from_iterable(ids))
        if not text:
            return DroppedSample("the text is empty")
        if self.tokens.eos_id is not None and text[-1] != self.tokens.eos_id:
            text.append(self.tokens.eos_id)
        whole, in_front = [*beginning, *text], self.tokens.beginning  # which some templates write themselves
        spans = [len(in_front) if whole[: len(in_front)] == in_front else 0, len(whole)]
        return [EncodedSample(whole, spans, n_characters=sum(len(s.text) for s in draft.segments))]


class BlockView(SampleView):
    """Blocks of at most `length` tokens over the documents in some rows, one after another; each token is in one.

    flows: blocks go on from one document to the next of the same source, so that all but the last of a source are full;
    else each document begins a block. apart: nothing of a document is predicted from the one before it.
    lengths, units, parts (n_blocks,). Documents of 5 and 4 tokens, length 4: `aaaa abbb b`, or `aaaa a bbbb`.
    """

    def __init__(self, dataset: EncodedDataset, rows: np.ndarray, length: int, *, flows: bool, apart: bool) -> None:
        self.dataset, self.rows, self.length = dataset, rows, length
        self.flows, self.apart = flows, flows and apart
        n_tokens = dataset.lengths[rows].astype(np.int64)
        self._starts = np.concatenate([[0], np.cumsum(n_tokens)])  # of documents; the last one is the end
        in_front = n_tokens - dataset.supervised[rows]  # what the tokenizer puts there is not learned
        self.n_text_tokens = int(dataset.supervised[rows].sum())
        self._unlearned = _places(self._starts[:-1], np.maximum(in_front, 1) if apart else in_front)
        parts = None if dataset.parts is None else dataset.parts[rows]
        borders = self._starts
        if flows:
            changes = np.flatnonzero(np.diff(parts)) + 1 if parts is not None else np.zeros(0, np.int64)
            borders = self._starts[np.concatenate([[0], changes, [len(rows)]]).astype(np.int64)]
        self._firsts, self._lasts = _cut(borders, length)
        self.lengths = (self._lasts - self._firsts).astype(np.int32)
        n_unlearned = np.searchsorted(self._unlearned, self._lasts) - np.searchsorted(self._unlearned, self._firsts)
        # The first token of a block is predicted from nothing.
        self.units = (self.lengths - n_unlearned - ~np.isin(self._firsts, self._unlearned)).astype(np.int32)
        self.parts = None if parts is None else parts[np.searchsorted(self._starts, self._firsts, side="right") - 1]

    def __len__(self) -> int:
        return len(self._firsts)

    def __getitem__(self, position: int) -> LabelledSample:
        first, last = int(self._firsts[position]), int(self._lasts[position])
        document = int(np.searchsorted(self._starts, first, side="right")) - 1
        pieces: list[np.ndarray] = []
        begins: list[int] = []
        of = [document]
        while self._starts[document] < last:
            start, end = int(self._starts[document]), int(self._starts[document + 1])
            row = self.dataset.ids(int(self.rows[document]))
            pieces.append(row[max(first, start) - start : min(last, end) - start])
            begins += [start - first] if start > first else []
            of = [of[0], document]
            document += 1
        ids = np.concatenate(pieces)
        labels = ids.astype(np.int64)
        among = np.searchsorted(self._unlearned, [first, last])
        labels[self._unlearned[slice(*among)] - first] = IGNORE_INDEX
        labels[0] = IGNORE_INDEX
        names = dict.fromkeys(self.dataset.record(int(self.rows[number])) for number in of)
        starts = begins if self.apart else []
        return LabelledSample(ids.tolist(), labels.tolist(), " to ".join(names), position, starts=starts)

    @property
    def fingerprint(self) -> str:
        """What is learned: the documents, and how they are cut."""
        return f"{self.dataset.fingerprint} {self.length} {self.flows} {self.apart}"

    @property
    def longest_sample(self) -> LabelledSample:
        return self[int(np.argmax(self.lengths))]

    @property
    def summary(self) -> str:
        """How documents become blocks, in words."""
        n_documents = len(self.rows)
        if not self.flows:
            return f"{n_documents:,} documents, each in blocks of up to {self.length:,} tokens of its own"
        attention = "within each document" if self.apart else "over the whole block"
        return f"{n_documents:,} documents flow through blocks of {self.length:,} tokens; attention {attention}"

    @property
    def tokens_per_character(self) -> float | None:
        """Tokens of the texts, end tokens included, for each of their characters."""
        n_characters = int(self.dataset.characters[self.rows].sum())
        return self.n_text_tokens / n_characters if n_characters else None


class Pretraining(SupervisedFineTuning):
    """Texts are learned whole; see the module."""

    name = "pretrain"
    unit = "token"
    encoder = WholeTextEncoder

    def view(self, dataset: EncodedDataset, rows: np.ndarray, config: FinetuneConfig) -> SampleView:
        train = config.train
        apart = not train.packs or train.pack_attention == "document"
        return BlockView(dataset, rows, config.data.cutoff_len, flows=train.packs, apart=apart)


def _places(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The first `counts` places from each start on: starts [0, 5], counts [1, 2] -> [0, 5, 6]."""
    skipped = np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(starts, counts) + np.arange(int(counts.sum())) - skipped


def _cut(borders: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Ranges between borders in pieces of `length`: borders [0, 5, 9], length 4 -> [0, 4, 5], [4, 5, 9]."""
    n_pieces = -(-np.diff(borders) // length)
    nth = _places(np.zeros(len(n_pieces), np.int64), n_pieces)
    firsts = np.repeat(borders[:-1], n_pieces) + nth * length
    return firsts, np.minimum(firsts + length, np.repeat(borders[1:], n_pieces))
