"""Plans for many ranks and numbers of rows follow from traces at two of each, and are the same to the byte."""

from __future__ import annotations

import itertools
from contextvars import copy_context
from dataclasses import replace

import pytest

from onecard.model.memory import extrapolate
from onecard.model.memory.architecture import architecture_of
from onecard.model.memory.estimate import MemoryConfig, account

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 688,
    "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 5000,
    "max_position_embeddings": 8192,
}  # fmt: skip
SIZES = ((1, 300), (3, 300), (8, 96), (5, 700))
RANKS = (4, 16, 100)


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": False}, {"use_dora": True, "lora_dropout": 0.1}])
def test_ranks_and_rows_follow_from_two(changes):
    model = architecture_of(LLAMA, name="some llama")
    setup = MemoryConfig(4, 2, 1, 300, loss_chunk=128, **changes)
    setups = [replace(setup, rank=rank, rows=rows, length=length)
              for rank, (rows, length) in itertools.product(RANKS, SIZES)]  # fmt: skip
    plain = [account(model, each).tensor_bytes for each in setups]

    def with_few_traces() -> tuple[list[int], int]:
        extrapolate.ASKS_FOR_MANY.set(True)
        before = extrapolate.traced.cache_info().misses
        return [account(model, each).tensor_bytes for each in setups], extrapolate.traced.cache_info().misses - before

    extrapolate.traced.cache_clear()
    found, n_traces = copy_context().run(with_few_traces)
    assert found == plain
    assert len(set(plain)) == len(setups) == 12
    _, n_more = copy_context().run(with_few_traces)
    assert n_more == 0
    assert n_traces < 40
