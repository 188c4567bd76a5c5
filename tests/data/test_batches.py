"""Every sample once per epoch, whatever the cut; nothing but the arguments decides."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onecard.data.batches import (
    auto_test_size,
    collate,
    epoch_order,
    micro_batches,
    share_for_rank,
    split,
    step_samples,
    steps_per_epoch,
)
from onecard.data.encode import IGNORE_INDEX, LabelledSample
from onecard.errors import ConfigError

lengths_lists = st.lists(st.integers(1, 300), min_size=1, max_size=60)


@given(n=st.integers(1, 200), total_batch=st.integers(1, 50), seed=st.integers(0, 2**63), epoch=st.integers(0, 5))
def test_every_index_once_per_epoch(n, total_batch, seed, epoch):
    per_epoch = steps_per_epoch(n, total_batch)
    seen = []
    for step in range(epoch * per_epoch, (epoch + 1) * per_epoch):
        samples = step_samples(step, n, total_batch, seed)
        assert (samples.epoch, samples.step_in_epoch) == (epoch, step - epoch * per_epoch)
        assert len(samples.indices) == min(total_batch, n - samples.step_in_epoch * total_batch)
        seen += samples.indices.tolist()
    assert sorted(seen) == list(range(n))


def test_the_order_is_the_same_on_every_machine():
    # Kept numbers: what numpy.random.RandomState([1234, 0, 2]).permutation(10) printed; NumPy froze this stream.
    assert epoch_order(10, 1234, 2).tolist() == [2, 4, 6, 3, 1, 5, 7, 8, 9, 0]
    assert epoch_order(1000, 7, 0).tolist() != epoch_order(1000, 7, 1).tolist()
    assert epoch_order(1000, 7, 0).tolist() != epoch_order(1000, 8, 0).tolist()
    assert epoch_order(1000, 7, 0).tolist() == epoch_order(1000, 7, 0).tolist()


def test_the_order_cannot_be_changed_by_who_asked_for_it():
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(10, 0, 0)[0] = 5


def test_no_hidden_state():
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    straight = [step_samples(step, 23, 4, 9).indices.tolist() for step in range(18)]
    backwards = [step_samples(step, 23, 4, 9).indices.tolist() for step in reversed(range(18))]
    assert straight == backwards[::-1]
    assert (np.random.get_state()[1] == before).all()


@settings(max_examples=200)
@given(lengths=lengths_lists, rows=st.integers(0, 9), tokens=st.integers(0, 900))
def test_micro_batches_keep_both_limits_and_lose_nothing(lengths, rows, tokens):
    array = np.array(lengths, np.int32)
    indices = np.random.RandomState(0).permutation(len(array))
    micros = micro_batches(indices, array, micro_batch=rows, micro_tokens=tokens)
    assert sorted(np.concatenate(micros).tolist()) == list(range(len(array)))
    longest = [int(array[micro].max()) for micro in micros]
    assert longest == sorted(longest, reverse=True)
    for micro, length in zip(micros, longest, strict=True):
        assert not rows or len(micro) <= rows
        assert not tokens or len(micro) == 1 or len(micro) * length <= tokens
    if not rows and not tokens:
        assert len(micros) == 1


def test_micro_batches_worked_example():
    micros = micro_batches(np.arange(4), np.array([9, 3, 5, 4], np.int32), micro_tokens=10)
    assert [micro.tolist() for micro in micros] == [[0], [2, 3], [1]]


def test_a_budget_does_not_fill_a_micro_batch_with_padding():
    lengths = np.array([400, 390, 380, 200, 150, 100, 90, 80, 70, 60])
    cut = [list(lengths[micro]) for micro in micro_batches(np.arange(10), lengths, micro_tokens=4096)]
    assert cut == [[400, 390, 380], [200, 150, 100, 90, 80, 70], [60]]
    # Rows of nearly one length stay together, and so do those that are too few to keep a card busy.
    assert len(micro_batches(np.arange(9), np.full(9, 400) - np.arange(9), micro_tokens=4096)) == 1
    assert len(micro_batches(np.arange(4), np.array([250, 100, 50, 10]), micro_tokens=4096)) == 1
    # A limit of rows alone is kept as it was given.
    assert [len(micro) for micro in micro_batches(np.arange(10), lengths, micro_batch=5)] == [5, 5]


@given(lengths=lengths_lists, world_size=st.integers(1, 5), tokens=st.integers(1, 900), told=st.booleans())
def test_shares_are_equal_in_number_and_lose_nothing(lengths, world_size, tokens, told):
    array = np.array(lengths, np.int32)
    micros = micro_batches(np.arange(len(array)), array, micro_tokens=tokens)
    shares = [share_for_rank(micros, rank, world_size, array if told else None) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    assert len(shares[0]) == -(-len(micros) // world_size)
    dealt = [micro for share in shares for micro in share if micro is not None]
    assert sorted(np.concatenate(dealt).tolist()) == list(range(len(array)))


def test_shares_are_balanced_by_tokens():
    lengths = np.array([9, 8, 7, 6, 5], np.int32)
    micros = [np.array([i]) for i in range(5)]
    costs = [
        [None if micro is None else int(lengths[micro[0]]) for micro in share_for_rank(micros, rank, 2, lengths)]
        for rank in range(2)
    ]
    assert costs == [[9, 6, 5], [8, 7, None]]


def test_collate_pads_on_the_right_and_a_pad_is_never_a_label():
    eos = 2
    samples = [LabelledSample([5, 6, eos], [-100, 6, eos], "a:1", 0), LabelledSample([7, eos], [-100, eos], "a:2", 1)]
    batch = collate(samples, pad_id=eos)
    assert batch["input_ids"].tolist() == [[5, 6, eos], [7, eos, eos]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 6, eos], [-100, eos, IGNORE_INDEX]]
    assert all(tensor.dtype == torch.long for tensor in batch.values())


@given(
    sizes=st.lists(st.integers(1, 4), min_size=2, max_size=40),
    test_size=st.one_of(st.floats(0.01, 0.9), st.integers(1, 20)),
    seed=st.integers(0, 99),
)
def test_split_parts_no_group(sizes, test_size, seed):
    groups = np.repeat(np.arange(len(sizes)), sizes)
    wanted = int(test_size) if test_size >= 1 else max(1, round(test_size * len(sizes)))
    if wanted >= len(sizes):
        with pytest.raises(ConfigError, match="--test_size"):
            split(groups, test_size, seed)
        return
    train, test = split(groups, test_size, seed)
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(len(groups)))
    assert not set(groups[train]) & set(groups[test])
    assert len(set(groups[test])) == wanted
    assert [part.tolist() for part in split(groups, test_size, seed)] == [train.tolist(), test.tolist()]


def test_what_is_held_out_by_default_is_capped():
    found = [auto_test_size(n) for n in (1, 2, 100, 20_000, 20_001, 694_000)]
    assert found == [0, 0.05, 0.05, 0.05, 1000, 1000]


def test_split_of_nothing():
    train, test = split(np.array([0, 1, 2]), 0, 1)
    assert (train.tolist(), test.tolist()) == ([0, 1, 2], [])
