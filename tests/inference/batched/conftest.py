"""An engine with a batch, one without, and ways to ask them."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from onecard.config.base_model import ModelOptions
from onecard.config.inference import InferenceOptions, LimitOptions, ParallelOptions, SamplingOptions
from onecard.data.messages import Turn
from onecard.inference.batched.batch import Batch
from onecard.inference.call import Chunk
from onecard.inference.engine import GenerationRequest, InferenceEngine, open_engine

LIMITS = LimitOptions(max_queue=64, max_beams=4)
LONG = SamplingOptions(max_new_tokens=400, min_new_tokens=400)


class Asked(threading.Thread):
    """A request in a thread of its own; `began` is set when its first token is there."""

    def __init__(self, engine: InferenceEngine, request: GenerationRequest) -> None:
        super().__init__(daemon=True)
        self._engine, self._request = engine, request
        self.began, self.cancel = threading.Event(), threading.Event()
        self.chunks: list[Chunk] = []
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            for chunks in self._engine.stream(self._request, self.cancel):
                self.chunks = chunks
                if self.chunks[0].usage.n_new_tokens:
                    self.began.set()
        except Exception as reason:
            self.error = reason

    def result(self) -> list[Chunk]:
        self.join(60)
        assert not self.is_alive()
        if self.error:
            raise self.error
        return self.chunks


def request_of(text: str = "Hi", **changes: Any) -> GenerationRequest:
    return GenerationRequest(
        **{"turns": (Turn("user", text),), "sampling": SamplingOptions(max_new_tokens=8), **changes}
    )


def answers(engine: InferenceEngine, request: GenerationRequest) -> list[Chunk]:
    return list(engine.stream(request))[-1]


def open_parallel(base: Path, n: int, limits: LimitOptions = LIMITS, **parallel: Any) -> InferenceEngine:
    options = ModelOptions(model_path=str(base), bits=32, device="cpu", gradient_checkpointing=False)
    given = ParallelOptions(max_parallel=n, **parallel)
    return open_engine(options, InferenceOptions(prompt_type="alpaca"), limits, parallel=given)


def batch_of(engine: InferenceEngine) -> Batch:
    assert engine._batch is not None
    return engine._batch


def held_blocks(engine: InferenceEngine) -> int:
    """Blocks that belong to requests."""
    cache = batch_of(engine)._manager.batch_processor.cache
    return sum(len(blocks) for part in cache.cache_allocators.values() for blocks in part.block_table.values())


def free_share(engine: InferenceEngine) -> float:
    """Of the cache, with what is kept for common beginnings let go; only while nothing runs."""
    cache = batch_of(engine)._manager.batch_processor.cache
    cache.evict_cached_blocks()
    return float(cache.compute_free_capacity())


def settle(engine: InferenceEngine) -> None:
    """Wait until cancelled requests have left the batch."""
    began = time.monotonic()
    while batch_of(engine).n_running or held_blocks(engine):
        assert time.monotonic() - began < 30
        time.sleep(0.01)


def mixes(engine: InferenceEngine, alone: InferenceEngine, n_mixes: int, adapters: Sequence[str] = ("",)) -> Counter:
    """Ask several at once, some of which are left, and compare with each of them alone; how many, by adapter."""
    chance, compared = random.Random(11), Counter[str]()
    for _ in range(n_mixes):
        asked = []
        for _ in range(chance.randint(2, 10)):
            sampling = SamplingOptions(max_new_tokens=chance.randint(1, 20))
            text = chance.choice(("Hi", "fox", "1 + 2")) * chance.randint(1, 30)
            request = request_of(text, sampling=sampling, adapter=chance.choice(adapters))
            asked.append((request, Asked(engine, request), chance.random() < 0.3))
            time.sleep(chance.random() / 100)
        for _, one, leaves in asked:
            if leaves:
                one.cancel.set()
        for request, one, _ in asked:
            if (found := one.result())[0].finish_reason != "cancelled":
                assert found == answers(alone, request)
                assert found[0].path == "batched"
                compared[request.adapter] += 1
    settle(engine)
    assert free_share(engine) == 1
    return compared


@pytest.fixture(scope="package")
def alone(lively_base: Path) -> InferenceEngine:
    return open_parallel(lively_base, 1)


@pytest.fixture(scope="package")
def engine(lively_base: Path) -> Iterator[InferenceEngine]:
    opened = open_parallel(lively_base, 9)
    yield opened
    opened.close()
