"""All that torch says when memory runs out is known while answering, too, and nothing else is taken for it."""

from __future__ import annotations

import pytest

from onecard.errors import ModelError
from onecard.inference.batch.run import in_halves
from onecard.inference.out_of_memory import OutOfMemory, memory_errors

FULL = (MemoryError(), RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))  # fmt: skip


@pytest.mark.parametrize("reason", FULL, ids=repr)
def test_a_request_is_told_what_to_do(reason: Exception) -> None:
    with pytest.raises(OutOfMemory, match="ask for less"), memory_errors("ask for less"):
        raise reason


@pytest.mark.parametrize("reason", FULL, ids=repr)
def test_a_batch_is_halved_until_it_fits(reason: Exception) -> None:
    sizes = []

    def work(items: list[int]) -> list[int]:
        sizes.append(len(items))
        if len(items) > 2 or 7 in items:
            raise reason
        return [-item for item in items]

    assert in_halves(work, list(range(7)), str) == [-item for item in range(7)]
    assert sizes == [7, 3, 1, 2, 4, 2, 2]
    with pytest.raises(ModelError, match=r"^7 is too much$"):
        in_halves(work, [6, 7], lambda item: f"{item} is too much")


def test_another_fault_stays_what_it_is() -> None:
    fault = RuntimeError("CUDA error: an illegal memory access was encountered")

    def work(items: list[int]) -> list[int]:
        raise fault

    with pytest.raises(RuntimeError, match="illegal memory access"), memory_errors("ask for less"):
        raise fault
    with pytest.raises(RuntimeError, match="illegal memory access"):
        in_halves(work, [1, 2], str)
