"""Plans for many ranks and numbers of rows follow from traces at two of each, and are the same to the byte."""

from __future__ import annotations

import itertools
import math
from contextvars import copy_context
from dataclasses import replace

import pytest

from onecard.model.memory import activation_peak, extrapolate
from onecard.model.memory.architecture import architecture_of
from onecard.model.memory.estimate import MemoryConfig, MemoryEstimate, account

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 688,
    "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 5000,
    "max_position_embeddings": 8192,
}  # fmt: skip
# Below and beyond the two ranks that are traced, of one row, of a number of rows between the two that are traced, and
# of one beyond.
RANKS_AND_SIZES = ((4, 1, 300), (100, 3, 300), (4, 8, 300), (100, 8, 300))


@pytest.mark.parametrize(
    ("of_model", "of_setup"),
    [
        ({}, {"use_dora": True}),
        # More tokens than positions: the loss is then traced in as many rows.
        ({"max_position_embeddings": 512}, {"gradient_checkpointing": False}),
    ],
)
def test_ranks_and_rows_follow_from_two(of_model, of_setup):
    model = architecture_of(LLAMA | {"num_hidden_layers": 2} | of_model, name="some llama")
    setup = MemoryConfig(4, 2, 1, 300, loss_chunk=128, **of_setup)
    setups = [replace(setup, rank=rank, rows=rows, length=length) for rank, rows, length in RANKS_AND_SIZES]
    plain = [account(model, each).tensor_bytes for each in setups]
    assert len(set(plain)) == len(setups)

    def with_few_traces() -> list[int]:
        extrapolate.ASKS_FOR_MANY.set(True)
        return [account(model, each).tensor_bytes for each in setups]

    assert copy_context().run(with_few_traces) == plain

    def of_another_rank() -> int:
        extrapolate.ASKS_FOR_MANY.set(True)
        before = extrapolate.traced.cache_info().misses
        account(model, replace(setup, rank=33))
        return extrapolate.traced.cache_info().misses - before

    assert copy_context().run(of_another_rank) < 2  # 4 without


def test_long_rows_follow_from_rows_that_are_scaled_in_as_many_pieces() -> None:
    """A gradient is scaled 1,024 rows at a time: lengths of two pieces say nothing of the requests of three."""
    model = architecture_of(LLAMA | {"hidden_size": 512})
    setup = MemoryConfig(4, 2, 1, 5000, loss_chunk=128, offload_activations=True, repeats_kv=True)
    found = extrapolate.sample(model, setup, extrapolate.Part.LAYERS)
    n_traces = extrapolate.traced.cache_info().misses
    assert extrapolate.sample(model, replace(setup, length=7000), extrapolate.Part.LAYERS).trace.events
    assert extrapolate.traced.cache_info().misses == n_traces
    own = extrapolate.sample_at_size(model, setup, extrapolate.Part.LAYERS)
    assert extrapolate.traced.cache_info().misses == n_traces + 1
    assert found.trace.events and found.trace.events == own.trace.events
    assert found.live == pytest.approx(own.live)
    assert sum(abs(found.blocks - own.blocks) > 1) == 1, "the last piece is taken for a whole one"


@pytest.mark.parametrize("of_setup", [{}, {"rows": 3, "length": 100}, {"offload_activations": True}])
def test_the_loss_is_traced_once_for_all_ranks_and_bits(of_setup):
    model, loss = architecture_of(LLAMA), extrapolate.Part.LOSS
    setup = replace(MemoryConfig(4, 2, 1, 300, loss_chunk=128, gradient_checkpointing=True), **of_setup)
    setups = [replace(setup, rank=rank, bits=bits) for rank, bits in ((8, 4), (64, 4), (8, 8), (8, 16))]
    assert len({extrapolate.relevant(model, each, loss) for each in setups}) == 1
    traces = [extrapolate.traced(model, each, loss) for each in setups]
    for each in traces[1:]:
        first, other = (
            replace(one.trace, blocks=[], events=[], chunks=[])
            for one in (traces[0], each)  # those are of all phases
        )
        assert first == other and each.kinds == traces[0].kinds
    for other in ({"n_new_tokens": 4}, {"train_embeddings": True}, {"targets": "q_proj,lm_head"}):
        changed = [extrapolate.relevant(model, replace(each, **other), loss) for each in setups]
        assert len(set(changed)) == len(setups), "what is trained beside the layers"


def test_what_gives_way_keeps_its_traces_and_is_the_same_afterwards():
    """While the model is built, and in the middle of a trace: forward, backward, and of layers computed again."""
    model = architecture_of(LLAMA | {"hidden_size": 320, "num_attention_heads": 10, "num_key_value_heads": 5})
    setup = MemoryConfig(4, 2, 1, 300, loss_chunk=128)
    n_kept = {}

    def asked(gives_way_at: float) -> tuple[MemoryEstimate, int]:
        n_asked = itertools.count()
        extrapolate.GIVES_WAY.set(lambda: next(n_asked) >= gives_way_at)
        for cached in (extrapolate.traced, extrapolate._built, activation_peak._cached_peak):
            cached.cache_clear()
        return account(model, setup), next(n_asked)

    undisturbed, n_questions = copy_context().run(asked, math.inf)
    for share in (0.02, 0.3, 0.7):
        with pytest.raises(extrapolate.GaveWay):
            copy_context().run(asked, share * n_questions)
        n_kept[share] = extrapolate.traced.cache_info().currsize
    assert n_kept[0.02] == 0 < n_kept[0.7], n_kept
    assert account(model, setup) == undisturbed
