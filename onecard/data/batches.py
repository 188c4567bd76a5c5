"""Which samples make a step, and how a step is cut into what fits on the card.

Everything here is a pure function of its arguments: no hidden state, so a resumed run finds its place from the step
number alone. Knows indices, lengths and padding. Does not know models, losses or devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch

from onecard.data.encode import IGNORE_INDEX, LabelledSample
from onecard.data.packing import packed, padded_tokens
from onecard.errors import ConfigError

# Matrix products of fewer rows leave a card waiting; below this share of the longest row a row is mostly padding.
BUSY_TOKENS = 1024
SHORTEST_SHARE = 0.8
HELD_OUT, MOST_HELD_OUT = 0.05, 1000  # of the conversations, by default


@dataclass(frozen=True)
class StepSamples:
    """The samples of one optimizer step: indices (n,), n = total_batch except in the last step of an epoch."""

    epoch: int
    step_in_epoch: int
    indices: np.ndarray


def steps_per_epoch(n: int, total_batch: int) -> int:
    """Steps in which `n` samples are seen once each: 10 samples in batches of 4 are 3 steps."""
    return -(-n // total_batch)


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of 0..n-1, int64 (n,): the same for the same arguments on every machine and NumPy version.

    RandomState's streams are frozen by NumPy's policy, those of Generator are not.
    https://numpy.org/doc/stable/reference/random/compatibility.html
    """
    return _cached_order(n, seed, epoch)


@lru_cache(maxsize=4)
def _cached_order(n: int, seed: int, epoch: int) -> np.ndarray:
    # Asked for at every step; a million indices take milliseconds to shuffle. Read-only, because it is shared.
    order = np.random.RandomState([seed % 2**32, seed // 2**32 % 2**32, epoch]).permutation(n)
    order.setflags(write=False)
    return order


class SampleOrder:
    """Which samples an epoch has, and in which order, where sources have shares.

    parts int (n,): the source of each sample. amounts: how often each of a source's samples is in an epoch: 3 is
    thrice, 0.2 a fifth of them, which are others in each epoch until all have been. Of a source with n samples every
    epoch has round(amount x n), and at least one.
    """

    def __init__(self, parts: np.ndarray, amounts: Sequence[float]) -> None:
        self._members = [np.flatnonzero(parts == number) for number in range(len(amounts))]
        self.counts = [
            max(1, round(amount * len(held))) if len(held) else 0
            for amount, held in zip(amounts, self._members, strict=True)
        ]
        self._kept: tuple[tuple[int, int], np.ndarray] | None = None

    def __len__(self) -> int:
        """Samples of one epoch."""
        return sum(self.counts)

    def epoch(self, seed: int, epoch: int) -> np.ndarray:
        """The samples of an epoch, int64 (len,): a pure function of its arguments."""
        if self._kept is None or self._kept[0] != (seed, epoch):
            chosen = [self._of_source(number, seed, epoch) for number in range(len(self._members))]
            self._kept = (seed, epoch), np.concatenate(chosen)[epoch_order(len(self), seed, epoch)]
        return self._kept[1]

    def _of_source(self, number: int, seed: int, epoch: int) -> np.ndarray:
        """A source's samples in an epoch: the next `count` of an endless row of permutations of all that it has.

        5 samples, 2 an epoch: epoch 0 takes a, b, epoch 1 c, d, epoch 2 e and the first of the next permutation.
        """
        members, count = self._members[number], self.counts[number]
        if not count:
            return members
        first = epoch * count
        rounds = range(first // len(members), (first + count - 1) // len(members) + 1)
        endless = np.concatenate([_round_order(len(members), seed, number, each) for each in rounds])
        skipped = first - rounds[0] * len(members)
        return members[endless[skipped : skipped + count]]


def _round_order(n: int, seed: int, source: int, each: int) -> np.ndarray:
    """As `epoch_order`, of one source: no stream of numbers is used twice."""
    return np.random.RandomState([seed % 2**32, seed // 2**32 % 2**32, each, source + 1]).permutation(n)


def step_samples(step: int, n: int | SampleOrder, total_batch: int, seed: int) -> StepSamples:
    """The samples of optimizer step `step`, counted from 0 over all epochs; every index once per epoch, or as often as
    its source's share says.

    n=5, total_batch=2: steps 0, 1, 2 are epoch 0 with 2, 2 and 1 samples; step 3 begins epoch 1.
    """
    n_samples = n if isinstance(n, int) else len(n)
    epoch, step_in_epoch = divmod(step, steps_per_epoch(n_samples, total_batch))
    first = step_in_epoch * total_batch
    order = epoch_order(n, seed, epoch) if isinstance(n, int) else n.epoch(seed, epoch)
    return StepSamples(epoch, step_in_epoch, order[first : first + total_batch])


def micro_batches(
    indices: np.ndarray, lengths: np.ndarray, *, micro_batch: int = 0, micro_tokens: int = 0, row_tokens: int = 0
) -> list[np.ndarray]:
    """The step's samples, longest first, cut into what is run at once.

    row_tokens: samples share rows of so many tokens, as `packing.packed` puts them; 0: each is a row.

    micro_batch limits rows, micro_tokens limits rows x longest (padding counts); 0 is no limit. A row longer than the
    budget stands alone. The longest come first, so that a step that does not fit fails at once. With a token budget a
    micro-batch also ends before rows that would be mostly padding, once it holds enough to keep a card busy.

    lengths [9, 3, 5, 4], indices [0, 1, 2, 3], micro_tokens 10 -> [0], [2, 3], [1]    (9; 2 x 5; 3)
    """
    if row_tokens:
        rows = packed(indices, lengths, min(row_tokens, micro_tokens or row_tokens))
        sums = np.array([lengths[row].sum() for row in rows])
        cuts = micro_batches(np.arange(len(rows)), sums, micro_batch=micro_batch, micro_tokens=micro_tokens)
        return [np.concatenate([rows[number] for number in np.sort(cut)]) for cut in cuts]
    order = indices[np.argsort(-lengths[indices].astype(np.int64), kind="stable")]
    micros: list[np.ndarray] = []
    start = 0
    while start < len(order):
        longest = max(1, int(lengths[order[start]]))
        n_rows = len(order) - start
        if micro_batch:
            n_rows = min(n_rows, micro_batch)
        if micro_tokens:
            n_rows = min(n_rows, max(1, micro_tokens // longest))
            n_rows = _without_padding(lengths[order[start : start + n_rows]])
        micros.append(order[start : start + n_rows])
        start += n_rows
    return micros


def _without_padding(lengths: np.ndarray) -> int:
    """How many of these rows, longest first, go together: all, or those before the first that is much shorter.

    lengths [400, 390, 380, 200, 150] -> 3, since 3 x 400 tokens are enough and 200 is less than 0.8 x 400.
    """
    enough = -(-BUSY_TOKENS // max(1, int(lengths[0])))
    shorter = np.flatnonzero(lengths < SHORTEST_SHARE * lengths[0])
    return int(max(enough, shorter[0])) if len(shorter) and enough < len(lengths) else len(lengths)


def by_source(micros: Sequence[np.ndarray], parts: np.ndarray) -> list[np.ndarray]:
    """The micro-batches, cut so that each has samples of one source only: its loss is then known by source."""
    return [micro[parts[micro] == part] for micro in micros for part in np.unique(parts[micro])]


def share_for_rank(
    micros: Sequence[np.ndarray], rank: int, world_size: int, lengths: np.ndarray | None = None, row_tokens: int = 0
) -> list[np.ndarray | None]:
    """This rank's micro-batches; every rank gets the same number, filled up with None (a dummy of weight zero).

    Each rank runs one micro-batch at a time and waits for the others, so the k-th ones should cost alike: they are
    dealt in order of padded tokens, to and fro. Without `lengths` rows are counted instead of tokens.

    costs [9, 8, 7, 6, 5], 2 ranks -> rank 0: 9, 6, 5    rank 1: 8, 7, None
    """
    costs = [len(micro) if lengths is None else padded_tokens(micro, lengths, row_tokens) for micro in micros]
    by_cost = sorted(range(len(micros)), key=lambda i: (-costs[i], i))
    mine: list[np.ndarray | None] = []
    for first in range(0, len(by_cost), world_size):
        deal = by_cost[first : first + world_size]
        seat = rank if (first // world_size) % 2 == 0 or len(deal) < world_size else world_size - 1 - rank
        mine.append(micros[deal[seat]] if seat < len(deal) else None)
    return mine


def collate(samples: Sequence[LabelledSample], pad_id: int) -> dict[str, torch.Tensor]:
    """Rows padded on the right to the longest: input_ids, attention_mask, labels, each LongTensor (batch, seq).

    With them `loss_weights`, a FloatTensor (batch, seq), where a sample has weights, and `position_ids`, which begin at
    0 with each text, where a row holds several: transformers makes masks of them that keep attention within each.

    ids [5, 6, 2] and [7, 2], pad 0:
        input_ids [[5, 6, 2], [7, 2, 0]]  attention_mask [[1, 1, 1], [1, 1, 0]]  labels [[-100, 6, 2], [-100, 2, -100]]
    A pad is never a label, also where the pad token is the eos token.
    """
    shape = (len(samples), max(len(sample.input_ids) for sample in samples))
    input_ids = torch.full(shape, pad_id, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORE_INDEX, dtype=torch.long)
    for row, sample in enumerate(samples):
        n = len(sample.input_ids)
        input_ids[row, :n] = torch.tensor(sample.input_ids, dtype=torch.long)
        attention_mask[row, :n] = 1
        labels[row, :n] = torch.tensor(sample.labels, dtype=torch.long)
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    if any(sample.weights for sample in samples):
        batch["loss_weights"] = torch.ones(shape)
        for row, sample in enumerate(samples):
            if sample.weights:
                batch["loss_weights"][row, : len(sample.weights)] = torch.tensor(sample.weights)
    if any(sample.starts for sample in samples):
        batch["position_ids"] = torch.stack([_positions(sample, shape[1]) for sample in samples])
    return batch


def _positions(sample: LabelledSample, n: int) -> torch.Tensor:
    """Positions within each text of a row of n tokens, its padding being one more: starts [3] of 5, n 7 -> 0120101."""
    borders = [0, *sample.starts, *[len(sample.input_ids)] * (len(sample.input_ids) < n), n]
    return torch.cat([torch.arange(end - start) for start, end in pairwise(borders)])


def auto_test_size(n_conversations: int) -> float:
    """What --test_size auto keeps for evaluation: 5 %, at most 1,000 conversations, and none of a single one.

    The error of their mean loss is a 30th of the spread between rows; more rows take their time from training.
    """
    if n_conversations < 2:
        return 0
    return HELD_OUT if HELD_OUT * n_conversations <= MOST_HELD_OUT else MOST_HELD_OUT


def split(
    groups: np.ndarray, test_size: float, seed: int, clusters: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of training and test samples, each ascending; samples of one group never part.

    groups int64 (n,). test_size: below 1 a fraction of the groups (at least one), from 1 on a count of them, 0 none.
    groups [0, 0, 1, 2], test_size 1 -> for one seed ([0, 1, 3], [2])
    clusters int (n_groups,): the first group of each group's cluster, none of which part either; where they are too
    large fewer groups are held out. Without clusters of several groups nothing changes.
    Raises ConfigError when it leaves nothing to train on.
    """
    everything = np.arange(len(groups))
    if test_size == 0:
        return everything, everything[:0]
    names = np.unique(groups)
    n_test = int(test_size) if test_size >= 1 else max(1, round(test_size * len(names)))
    if n_test >= len(names):
        raise ConfigError(
            "--test_size", f"{test_size:g} takes {n_test} of {len(names)} conversations; none is left to train on"
        )
    is_test = np.isin(groups, _held_out(names, n_test, seed, clusters))
    return everything[~is_test], everything[is_test]


def _held_out(names: np.ndarray, n_test: int, seed: int, clusters: np.ndarray | None) -> np.ndarray:
    """The first `n_test` of these groups (ascending) in a seeded order.

    With clusters: whole ones in the order of their first groups, while they fit; so each has the same chance, and one
    of several rows does not come first for having many.
    """
    order = epoch_order(len(names), seed, 0)
    if clusters is None:
        return names[order[:n_test]]
    _, firsts, which, sizes = np.unique(clusters[names], return_index=True, return_inverse=True, return_counts=True)
    cluster_of_first = dict(zip(firsts.tolist(), range(len(firsts)), strict=True))
    chosen = np.zeros(len(firsts), dtype=bool)
    for place in order.tolist():
        cluster = cluster_of_first.get(place)
        if cluster is not None and sizes[cluster] <= n_test:
            chosen[cluster] = True
            n_test -= int(sizes[cluster])
    return names[chosen[which]]


def split_by_source(
    groups: np.ndarray, parts: np.ndarray, amounts: Sequence[float], test_size: float, seed: int,
    clusters: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """As `split`, with as many groups held out of each source as its part of an epoch asks for.

    parts int (n,): the source of each sample. A source keeps at least one group to train on. A cluster over several
    sources is held out where it is wholly among those of each, else trained on.
    Raises ConfigError when it leaves nothing to train on.
    """
    of_source = [np.unique(groups[parts == number]) for number in range(len(amounts))]
    weights = [min(1.0, amount) * len(names) for amount, names in zip(amounts, of_source, strict=True)]
    wanted = test_size if test_size >= 1 else test_size * sum(weights)
    if test_size >= 1 and test_size >= sum(map(len, of_source)):
        split(groups, test_size, seed)  # raises
    counts = [min(max(0, len(names) - 1), round(wanted * weight / sum(weights)))
              for weight, names in zip(weights, of_source, strict=True)]  # fmt: skip
    if wanted and not any(counts):
        counts[int(np.argmax(weights))] = int(max(map(len, of_source)) > 1)
    chosen = [_held_out(names, count, seed, clusters) for names, count in zip(of_source, counts, strict=True)]
    is_test = np.isin(groups, np.concatenate(chosen))
    if clusters is not None:
        is_test &= ~np.isin(clusters[groups], clusters[groups[~is_test]])
    everything = np.arange(len(groups))
    return everything[~is_test], everything[is_test]
