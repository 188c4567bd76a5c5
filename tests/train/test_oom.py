"""What is given up when memory runs out, in which order, and which exceptions say that it did."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onecard.data.batches import micro_batches
from onecard.data.packing import padded_tokens
from onecard.model.out_of_memory import is_out_of_memory
from onecard.train.oom import SMALLEST_CHUNK, SMALLEST_TILE, MicroBatchLimits, smaller

LENGTHS = st.lists(st.integers(1, 5000), min_size=1, max_size=12).map(np.array)
LIMITS = st.builds(
    MicroBatchLimits, st.integers(0, 6), st.integers(0, 20_000), st.sampled_from([0, 1, 100, 128, 1024]), st.booleans(),
    st.sampled_from([0, 64, 256, 512, 2048]),
)  # fmt: skip


def largest(limits: MicroBatchLimits, lengths: np.ndarray) -> int:
    micros = micro_batches(np.arange(len(lengths)), lengths, **limits.cut)
    return max(padded_tokens(micro, lengths) for micro in micros)


@settings(max_examples=300, deadline=None)
@given(LIMITS, LENGTHS, st.booleans())
def test_each_try_is_smaller_until_the_end(limits: MicroBatchLimits, lengths: np.ndarray, can_offload: bool) -> None:
    """Every try gives up one thing and takes nothing back; at the end each row is as alone as it can be."""
    n_tries = 0
    while (found := smaller(limits, lengths, can_offload=can_offload)) is not None:
        then, words = found
        assert words
        changed = [name for name in vars(then) if getattr(then, name) != getattr(limits, name)]
        assert len(changed) == 1
        before, after = largest(limits, lengths), largest(then, lengths)
        if changed == ["micro_tokens"]:
            assert after < before
            assert after <= max(lengths.max(), before // 2)
        elif changed == ["loss_chunk"]:
            # Not more than the tokens that there are: such a chunk would be no smaller in truth.
            assert SMALLEST_CHUNK <= then.loss_chunk <= min(limits.loss_chunk or before, before) // 2
        elif changed == ["offload_activations"]:
            assert can_offload and not limits.offload_activations
        else:
            assert changed == ["mlp_tile"]
            assert SMALLEST_TILE <= then.mlp_tile < (limits.mlp_tile or lengths.max())
        limits, n_tries = then, n_tries + 1
    assert largest(limits, lengths) == lengths.max()
    assert n_tries < 60


def test_the_order() -> None:
    limits, told = MicroBatchLimits(micro_tokens=4096, loss_chunk=1024), []
    while (found := smaller(limits, np.full(8, 900), can_offload=True, can_recompute=True)) is not None:
        limits, words = found
        told.append(words)
    assert told == [
        "the layers are computed again in the backward pass from now on",
        "1,800 tokens at once instead of 3,600", "900 tokens at once instead of 1,800",
        "logits of 450 tokens at once instead of 900", "logits of 225 tokens at once instead of 450",
        "logits of 112 tokens at once instead of 225", "the inputs of the layers wait in RAM from now on",
        "MLPs take 450 tokens at a time",
    ]  # fmt: skip
    assert limits == MicroBatchLimits(0, 900, 112, True, 450, True)


def test_short_rows_beside_a_long_one_are_cut() -> None:
    """7 rows of 300 pass as 3 x 300 = 900, more than the longest row: the budget is what has to shrink."""
    found = smaller(MicroBatchLimits(micro_tokens=1000), np.array([600] + [300] * 7), can_offload=False)
    assert found is not None
    assert found[0] == replace(MicroBatchLimits(), micro_tokens=600)


@pytest.mark.parametrize(
    "reason",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        MemoryError(),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 99 bytes."),
    ],
)
def test_recognised(reason: Exception) -> None:
    assert is_out_of_memory(reason)


@pytest.mark.parametrize(
    "reason",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
        ValueError("CUDA out of memory"),
        KeyboardInterrupt(),
    ],
)
def test_not_recognised(reason: BaseException) -> None:
    assert not is_out_of_memory(reason)


def test_what_this_torch_really_says() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**62, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)
