"""What is reserved beyond the tensors: all layers' requests from those of a few, and the limit that they need."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from benchmarks.machine import RESULTS
from benchmarks.plan_accuracy import toy_config
from onecard.model.chunked_loss import ROWS_AT_ONCE
from onecard.model.files import read_json
from onecard.model.memory import activation_peak, estimate, extrapolate, fake_model, reserved_memory, simulate
from onecard.model.memory.activation_peak import find_peak, nameless, samples_of_step
from onecard.model.memory.architecture import architecture_of
from onecard.model.memory.caching_allocator import MIB, CachingAllocator, Requests
from onecard.model.memory.estimate import CUDA_CONTEXT_BYTES, FIXED_SLACK, SLACK, MemoryConfig, account, held_bytes
from onecard.model.memory.fake_kernels import FusedAttention
from onecard.model.memory.loading import _attach, _quantise, loading, preparing
from onecard.model.memory.tensor_sizes import streamed_layer_bytes
from onecard.model.memory_saving.streamed_layers import N_SLOTS

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
    step, ends, first_product = reserved_memory.requests_of_step(found[0], found[-1], setup)
    assert 0 < first_product < ends[0]
    assert step.most_alive() == pytest.approx(find_peak(model, setup).n_bytes, rel=reserved_memory.LARGEST_LEAK)
    assert len(ends) == model.n_layers and step.left() == 0
    slack = next(part.n_bytes for part in account(model, setup).parts if part.name == SLACK)
    assert slack not in (0, FIXED_SLACK[1]) and slack < 80 * MIB, "replayed; such a small model has few segments"


@pytest.mark.parametrize("length", [300, 900])  # 3 chunks of 128 tokens, and 8, the last ones of 43 and of 3
def test_chunks_of_the_loss_that_are_not_traced_ask_for_what_they_would(
    monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    model, setup = architecture_of(LLAMA), replace(SETUP, length=length)
    few = reserved_memory._with_all_chunks(reserved_memory._samples_with_requests(model, setup)[-1], setup)
    monkeypatch.setattr(simulate, "CHUNKS", 100)
    extrapolate.traced.cache_clear()
    every = extrapolate.sample_at_size(nameless(model), setup, simulate.Part.LOSS)
    extrapolate.traced.cache_clear()
    assert len(every.trace.chunks) == (length - 1) // 128 + 1
    assert few.trace.events == every.trace.events
    assert few.blocks == pytest.approx(every.blocks, abs=8 * 512), "but for the list of those that were traced"


def test_the_backward_pass_of_attention_asks_for_sums_in_fp32() -> None:
    """As the simulated card logs it: 4 bytes for each number of the queries, and 4 for each query."""
    query = torch.empty(2, 4, 64, 32, dtype=torch.float16, requires_grad=True)
    with Counted() as counted:
        FusedAttention.apply(query, query, query, None).sum().backward()
    assert {2 * 4 * 64 * 4, 2 * 4 * 64 * 32 * 4} <= set(counted.sizes)


def test_the_backward_pass_of_attention_holds_all_that_was_saved_until_it_is_through() -> None:
    """Also the output, which nothing else needs any more where the layer was computed again."""
    made: dict[int, tuple[StorageWeakRef, int]] = {}
    at_sums: list[int] = []

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            storage = out.untyped_storage()
            made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
            if out.dtype == torch.float32 and out.dim() == 4:
                at_sums.append(sum(2 * size == out.nbytes for held, size in made.values() if not held.expired()))
            return out

    def layer(hidden: torch.Tensor) -> torch.Tensor:
        return FusedAttention.apply(hidden * 1, hidden * 2, hidden * 3, None) * 4.0

    hidden = torch.empty(2, 4, 64, 32, dtype=torch.float16, requires_grad=True)
    with Watched():
        checkpoint(layer, hidden, use_reentrant=False).sum().backward()
    assert at_sums == [8], "query, key, value, output, and a gradient of each"


def test_the_gradient_of_the_hidden_states_is_there_until_the_first_layer_is_through() -> None:
    """All layers add to it where it lies; those that were traced are fewer than the model's six."""
    model = architecture_of(LLAMA)
    found = reserved_memory._samples_with_requests(model, SETUP)
    step, ends, _ = reserved_memory.requests_of_step(found[0], found[-1], SETUP)
    of_chunk, of_hidden = SETUP.loss_chunk * model.vocab_size * 4, SETUP.tokens * model.hidden_size * 2
    after_loss = max(place for place, event in enumerate(step.events) if step.sizes[event] == of_chunk and event >= 0)
    first = [event for event in step.events[after_loss : ends[0]] if event >= 0 and step.sizes[event] == of_hidden]
    assert any(ends[-2] <= step.events.index(~request) < ends[-1] for request in first)


class Counted(TorchDispatchMode):
    """Bytes of each result."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.sizes += [out.nbytes] if isinstance(out, torch.Tensor) else []
        return out


def test_an_adapter_comes_in_16_bits_and_is_made_fp32_when_all_of_it_is_there() -> None:
    """As peft does it: two tensors of 8 MiB in fp32 are 8 MiB in all in 16 bits, with one more at a time."""
    requests = Requests()
    _attach(requests, [[8 * MIB], [8 * MIB]], on_card=True, element_bytes=2)
    assert [requests.sizes[event] for event in requests.events if event >= 0] == [
        4 * MIB, 8 * MIB, 4 * MIB, 8 * MIB, 8 * MIB, 8 * MIB
    ]  # fmt: skip
    assert requests.left() == 16 * MIB and requests.most_alive() == 20 * MIB


def test_a_weight_is_quantised_by_requests_in_the_order_of_bitsandbytes() -> None:
    """`functional.quantize_4bit`: scales, numbers, the scales without their mean, and these in 8 bits."""
    requests, n_weights = Requests(), 64 * 256 * 256
    _quantise(requests, 64 * 256, 256, 4, 2)
    whole, scales, centred = 0, 1, 5
    n_scales = n_weights // 64
    assert requests.sizes == [2 * n_weights, 4 * n_scales, n_weights // 2, 64, 4,
                              4 * n_scales, 4 * n_scales // 256, n_scales, 1024]  # fmt: skip
    assert requests.events == [*range(9), ~centred, ~scales, ~whole]


@pytest.mark.parametrize(("streams", "reserved"), [(False, 92), (True, 20)])
def test_the_adapter_finds_room_in_what_loading_left(
    monkeypatch: pytest.MonkeyPatch, streams: bool, reserved: int
) -> None:
    """Free segments are given back when all is there: 9 MiB lie in the 92 MiB in which a weight was quantised. Where
    layers are streamed they are given back before their slots are taken, too."""
    base, beside = Requests(), Requests()
    base.let_go(base.take(92 * MIB))
    beside.take(9 * MIB)
    monkeypatch.setattr(reserved_memory, "loading", lambda *_: base)
    monkeypatch.setattr(reserved_memory, "preparing", lambda *_: (beside, [[]]))
    setup = replace(SETUP, stream_layers=streams)
    allocator, still, _ = reserved_memory._made_ready.__wrapped__(architecture_of(LLAMA), setup)
    assert allocator.reserved == reserved * MIB and still == 9 * MIB


def test_the_slots_of_streamed_layers_are_taken_before_the_adapter() -> None:
    model, setup = architecture_of(LLAMA), replace(SETUP, stream_layers=True)
    assert preparing(model, setup)[0].sizes[:N_SLOTS] == [streamed_layer_bytes(model, setup)] * N_SLOTS


def test_where_segments_grow_the_rests_of_loading_are_used_up_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of 20 MiB: one with a weight of 3, of which nothing more is counted on; one with the gradient of 5, whose
    other 15 hold 13 of a micro-batch; and one for its other 4."""
    base, beside = Requests(), Requests()
    base.take(3 * MIB)
    step = Requests([5 * MIB, 8 * MIB, 4 * MIB], [0, 1, 2, ~2, ~1, ~0])
    monkeypatch.setattr(reserved_memory, "loading", lambda *_: base)
    monkeypatch.setattr(reserved_memory, "preparing", lambda *_: (beside, [[5 * MIB], []]))
    known = SimpleNamespace(trace=SimpleNamespace(events=step.events), kinds=[0])
    monkeypatch.setattr(reserved_memory, "_samples_with_requests", lambda *_: [known])
    monkeypatch.setattr(reserved_memory, "requests_of_step", lambda *_: (step, [len(step.events)], -1))
    reserved_memory._made_ready.cache_clear()
    setup = replace(SETUP, expandable_segments=True)
    found = reserved_memory.reserved_beyond_tensors.__wrapped__(architecture_of(LLAMA), setup, step.most_alive())
    reserved_memory._made_ready.cache_clear()
    assert found == (3 * 20 - 3 - 5 - 17) * MIB


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
    step.let_go(step.take(50 * MIB))
    assert reserved_memory.smallest_limit(CachingAllocator(), step, step.most_alive()) == pytest.approx(50 * MIB, 0.02)


def test_the_second_of_two_micro_batches_in_a_row_may_need_more() -> None:
    """The first gives 12 MiB back for 24, and runs in 36; the second splits those 24, so that it takes 24 more."""
    step = Requests([12 * MIB, 12 * MIB, 24 * MIB], [0, 1, ~0, 2, ~1, ~2])
    assert step.most_alive() == 36 * MIB
    assert reserved_memory.smallest_limit(CachingAllocator(), step, step.most_alive()) == 48 * MIB


def test_the_first_gradients_stay_where_they_were_computed() -> None:
    """Of two layers, the last one first: 3 MiB each, of which that of the other layer is not among the requests."""
    step = Requests([5 * MIB, 3 * MIB, 4 * MIB, 4 * MIB], [0, 1, ~1, ~0, 2, ~2, 3, ~3])
    first = reserved_memory._first_micro_batch(step, [4, 8], 1, [[3 * MIB], [3 * MIB], [7]])
    assert first.events == [0, 4, 1, ~0, 2, ~2, 3, ~3, 5, 6], "workspace behind the first request; 1 is not let go of"
    assert first.sizes[4:] == [reserved_memory.CUBLAS_WORKSPACE_BYTES, 3 * MIB, 7]


def test_one_replay_stands_for_all_limits_under_which_it_goes_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that goes one way under all limits it is tried with: replayed without one, and once under one."""
    n_replays, copy, step = [], CachingAllocator.copy, Requests()
    step.let_go(step.take(300 * MIB), step.take(70 * MIB))
    step.let_go(step.take(400 * MIB))
    monkeypatch.setattr(CachingAllocator, "copy", lambda *args: n_replays.append(1) or copy(*args))
    assert reserved_memory.smallest_limit(CachingAllocator(), step, step.most_alive()) == pytest.approx(400 * MIB, 0.02)
    assert len(n_replays) == 2


def test_rows_longer_than_the_model_knows_make_the_same_requests_at_all_lengths(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A gradient is scaled in pieces of so many rows; of long ones a few pieces stand for all."""
    model = architecture_of({**LLAMA, "max_position_embeddings": 2048})
    monkeypatch.setattr(reserved_memory, "sample_at_size", None)
    layers, _ = reserved_memory._samples_with_requests(model, replace(SETUP, length=50_000))
    assert layers.trace.events and model.source.windows == (2048,)


@pytest.mark.slow
def test_few_tiles_of_a_quantised_head_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model = architecture_of(toy_config("llama", num_hidden_layers=2, hidden_size=2048, vocab_size=128_000))
    setup, found = replace(SETUP, head_bits=8, length=300), []
    for n_tiles in (fake_model.FEW_TILES, 1000):
        monkeypatch.setattr(fake_model, "FEW_TILES", n_tiles)
        for cached in (extrapolate.traced, extrapolate._built, activation_peak._cached_peak,
                       reserved_memory.reserved_beyond_tensors):  # fmt: skip
            cached.cache_clear()
        estimated, loss = account(model, setup), samples_of_step(nameless(model), setup)[-1]
        found.append((estimated, len(loss.trace.events)))
    assert found[0][0] == found[1][0] and found[1][1] > 1.3 * found[0][1]


def test_pieces_of_other_tensors_are_all_there() -> None:
    """Tiles of the feed-forward layers are joined again, and may be as long as the pieces of a gradient."""
    setup = MemoryConfig(8, 2, 2, 4096, loss_chunk=512, head_bits=8, mlp_tile=ROWS_AT_ONCE, repeats_kv=True)
    (layers, *_) = samples_of_step(architecture_of(LLAMA), setup)
    assert layers.kinds and layers.trace.events


def test_a_plan_fits_where_the_step_runs_in_what_the_card_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest context asks only that; its plan may not say otherwise, though the smallest limit is looked for."""
    model, smallest = architecture_of(LLAMA), 90 * MIB
    tensors = held_bytes(model, SETUP) + find_peak(model, SETUP).n_bytes

    def found(_model: Any, _setup: Any, _moving: int, spare: int | None = None) -> int:
        return 100 * MIB if spare is None else spare + (spare < smallest)

    monkeypatch.setattr(estimate, "reserved_beyond_tensors", found)
    for spare, slack in ((89, 100), (95, 95), (200, 100)):
        card = tensors + spare * MIB
        assert account(model, SETUP, card).card_bytes == pytest.approx(tensors + slack * MIB, abs=8)
        assert (account(model, SETUP, card, only_fits=True).card_bytes <= card) is (slack <= spare), spare


def test_a_card_with_ample_room_is_not_asked_by_a_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only whether it fits is asked. The room is more than any step of the benchmark needs."""
    model, replayed = architecture_of(LLAMA), []
    monkeypatch.setattr(estimate, "reserved_beyond_tensors", lambda *_: replayed.append(1) or 0)
    for is_growing, share in enumerate(reversed(estimate.AMPLE_SHARES)):
        setup = replace(SETUP, expandable_segments=bool(is_growing))
        moving = find_peak(model, setup).n_bytes
        tensors = held_bytes(model, setup) + moving
        ample = estimate.AMPLE_BYTES + int(share * moving) + 512
        for room, n_replays in ((ample, 0), (ample - MIB, 1)):
            replayed.clear()
            assert account(model, setup, tensors + room, only_fits=True).card_bytes <= tensors + room
            assert len(replayed) == n_replays
        account(model, setup, tensors + ample)
        assert len(replayed) == 2
    measured = read_json(RESULTS / "reserved_memory.json")["rows"]
    assert len(measured) == 62
    for row in measured:
        needed = row["limit_bytes"] - row["tensor_bytes"]
        assert needed < estimate.AMPLE_BYTES + 0.12 * row["tensor_bytes"]


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
