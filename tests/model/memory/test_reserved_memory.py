"""What is reserved beyond the tensors: all layers' requests from those of a few, and the limit that they need."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.plan_accuracy import toy_config
from onecard.model.memory import reserved_memory
from onecard.model.memory.activation_peak import find_peak
from onecard.model.memory.architecture import architecture_of
from onecard.model.memory.caching_allocator import MIB, CachingAllocator, Requests
from onecard.model.memory.estimate import CUDA_CONTEXT_BYTES, FIXED_SLACK, SLACK, MemoryConfig, account, held_bytes
from onecard.model.memory.loading import loading, preparing

SETUP = MemoryConfig(4, 2, 1, 600, loss_chunk=128, repeats_kv=True, expandable_segments=False)
LLAMA = toy_config("llama", num_hidden_layers=6, hidden_size=256, vocab_size=4000)
GEMMA = toy_config("gemma3_text", num_hidden_layers=9, sliding_window=64,
                   layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 3)  # fmt: skip


@pytest.mark.parametrize(("config", "changes"), [
    (LLAMA, {}),
    (LLAMA, {"length": 5000, "offload_activations": True}),
    (LLAMA, {"bits": 16, "gradient_checkpointing": False}),
    pytest.param(LLAMA, {"bits": 8, "rows": 3, "mlp_tile": 500}, marks=pytest.mark.slow),
    pytest.param(LLAMA, {"loss_chunk": 0, "train_embeddings": True}, marks=pytest.mark.slow),
    pytest.param(GEMMA, {}, marks=pytest.mark.slow),
])  # fmt: skip
def test_the_requests_of_all_layers_hold_as_much_at_once_as_the_plan_says(
    config: dict[str, Any], changes: dict[str, Any]
) -> None:
    model, setup = architecture_of(config), replace(SETUP, **changes)
    found = reserved_memory._samples_with_requests(model, setup)
    step, ends = reserved_memory.requests_of_step(found[0], found[-1])
    assert step.most_alive() == pytest.approx(find_peak(model, setup).n_bytes, rel=reserved_memory.LARGEST_LEAK)
    assert len(ends) == model.n_layers and step.left() == 0
    slack = next(part.n_bytes for part in account(model, setup).parts if part.name == SLACK)
    assert slack not in (0, FIXED_SLACK[1]) and slack < 80 * MIB, "replayed; such a small model has few segments"


def test_what_lies_still_is_what_the_plan_says() -> None:
    """Weights, adapter and optimizer of the requests of loading, and the gradients after them."""
    model = architecture_of(LLAMA)
    for changes in ({}, {"bits": 8, "optimizer": "adamw_8bit", "rank": 64}, {"bits": 16, "head_bits": 8},
                    {"stream_layers": True, "offload_embeddings": True}):  # fmt: skip
        setup = replace(SETUP, **changes)
        (beside, gradients), base = preparing(model, setup), loading(model, setup)
        still = held_bytes(model, setup) - CUDA_CONTEXT_BYTES
        assert base.left() + beside.left() + sum(map(sum, gradients)) == pytest.approx(still, rel=0.005), changes


def test_the_smallest_limit_is_between_the_tensors_and_what_is_reserved_without_one() -> None:
    """A free segment of 40 MiB that is of no use to 50 is given back under the limit, and kept without one."""
    step = Requests()
    step.let_go(step.take(40 * MIB))
    step.take(50 * MIB)
    assert reserved_memory.smallest_limit(CachingAllocator(), step, step.most_alive()) == pytest.approx(50 * MIB, 0.02)


def test_what_is_not_known_is_given_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    model = architecture_of(LLAMA)
    of_two = replace(SETUP, n_cards=2)
    assert reserved_memory.reserved_beyond_tensors(model, of_two, 10**7) is None
    assert reserved_memory.reserved_beyond_tensors(model, SETUP, 10**9) is None, "other tensors than in the trace"
    monkeypatch.setattr(reserved_memory, "smallest_limit", None)
    reserved_memory.reserved_beyond_tensors.cache_clear()
    rough = account(model, SETUP, within=1)
    moving = sum(part.n_bytes for part in rough.parts if part.transient and part.place == "card")
    slack = next(part.n_bytes for part in rough.parts if part.name == SLACK)
    assert slack == FIXED_SLACK[1] + int(FIXED_SLACK[0] * moving)
