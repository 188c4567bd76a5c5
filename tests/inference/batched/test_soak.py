"""Many requests of any length, of which some are left: the cache is what was planned, and nothing of it is lost."""

from __future__ import annotations

import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import psutil
import pytest

from onecard.config.inference import SamplingOptions
from onecard.inference.batched.size import BLOCK_TOKENS
from onecard.inference.engine import InferenceEngine
from tests.inference.batched.conftest import batch_of, free_share, request_of, settle

MIB = 2**20
LONG_ANSWER = 120


def cache_bytes(engine: InferenceEngine) -> int:
    """Of keys and values."""
    tensor = batch_of(engine)._manager.batch_processor.cache.cache_tensor
    return int(tensor.numel() * tensor.element_size())


def ask(engine: InferenceEngine, number: int) -> str:
    """One request of random lengths: read to its end, closed by its reader, or cancelled; how it ended."""
    chance = random.Random(number)
    sampling = SamplingOptions(max_new_tokens=chance.randint(1, 24), temperature=chance.choice((0.0, 1.2)))
    text = "".join(chance.choice("fox 12+?") for _ in range(chance.randint(1, 300)))
    most = chance.randint(0, 4) if chance.random() < 0.2 else None  # chunks, before it leaves
    if most is not None:  # more tokens than a busy machine puts into so few chunks
        sampling = replace(sampling, max_new_tokens=LONG_ANSWER)
    for n_read, chunks in enumerate(engine.stream(request_of(text, sampling=sampling, number=number))):
        if chunks[0].finish_reason:
            return str(chunks[0].finish_reason)
        if n_read == most:
            return "left"
    raise AssertionError("an answer without an end")


@pytest.mark.parametrize("n", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_requests_of_any_length_leave_nothing_behind(engine: InferenceEngine, n: int) -> None:
    size, process = batch_of(engine).size, psutil.Process()
    planned = size.n_tokens * size.token_bytes
    # transformers adds a block to each layer's cache, into which what is padding is written.
    assert planned <= cache_bytes(engine) <= planned + 2 * BLOCK_TOKENS * size.token_bytes
    ends, peaks = Counter[str](), []
    with ThreadPoolExecutor(12) as clients:  # more than answer at once
        for begun in range(0, n, n // 10):
            ends.update(clients.map(lambda number: ask(engine, number), range(begun, begun + n // 10)))
            settle(engine)
            peaks.append(process.memory_info().rss)
            assert cache_bytes(engine) <= planned + 2 * BLOCK_TOKENS * size.token_bytes
    assert free_share(engine) == 1
    assert ends.total() == n and ends["left"] > n / 20 and ends["length"] > n / 4
    print(dict(ends), "RSS in MiB after each tenth:", [round(peak / MIB) for peak in peaks])
    if n > 1000:  # the first ones take memory that stays: buffers of threads, and of the longest step
        assert max(peaks[2:]) - peaks[1] < 16 * MIB
