"""One model, many answers at once: transformers' continuous batching in a thread that outlives every fault.

What a batch that ran out of memory was computing is begun again with fewer at once, from the tokens that it has: no
answer is lost. Knows requests as rows of ids. It does not know adapters, queues or who asks (`engine.py`).
https://huggingface.co/docs/transformers/continuous_batching; the classes are those of transformers 5.23.
"""

from __future__ import annotations

import itertools
import logging
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.continuous_api import (
    BackgroundThreadStatus,
    ContinuousBatchingManager,
    OutputRouter,
)

from onecard.config.inference import ParallelOptions, SamplingOptions
from onecard.console import first_line, say, warn
from onecard.errors import ModelError
from onecard.inference.adapters import AdapterManager
from onecard.inference.batched.rows import BatchedAnswer, BatchRow, ScoresOfRows
from onecard.inference.batched.size import BLOCK_TOKENS, BatchSize, choose_size
from onecard.inference.call import Chunk, ModelBundle, ModelTurn, PromptRow, StreamingOptions
from onecard.inference.out_of_memory import OutOfMemory
from onecard.inference.prefix_cache import can_be_kept
from onecard.inference.shared_adapters import SharedAdapters
from onecard.model.attention import allow_paged_cache
from onecard.model.few_rows import quicken_few_rows
from onecard.model.out_of_memory import give_back_memory, is_out_of_memory
from onecard.model.output_head import positions_in_front

STOP_SECONDS = 10


class Batch:
    """The answers that one model computes together. `check_batched` says whether it can."""

    def __init__(self, model: Any, size: BatchSize, adapters: SharedAdapters | None = None) -> None:
        """Reserve the memory. Raises ModelError where the model cannot do this, or not even one fits."""
        self._model, self.size, self.adapters = model, size, adapters
        self._rows: dict[str, BatchRow] = {}  # those that are not done, in the order in which they came
        self._lock = threading.RLock()
        self._numbers = itertools.count()
        self._is_closed = False
        self._broken = ""  # why nothing is taken any more
        self._manager = self._fitting_manager()
        say(self.size.summary())
        self._thread = threading.Thread(target=self._run, name="onecard-batch", daemon=True)
        self._thread.start()

    @property
    def n_running(self) -> int:
        """Answers that are being written."""
        return len(self._rows)

    def takes(self, rows: Sequence[PromptRow], sampling: SamplingOptions) -> bool:
        """Whether these rows can be answered here: without beams, and where the longest of them fits."""
        longest = max(len(row.ids) + row.max_new_tokens for row in rows)
        return not self._broken and sampling.num_beams == 1 and longest <= self.size.n_tokens

    def answer(
        self,
        bundle: ModelBundle,
        rows: Sequence[PromptRow],
        sampling: SamplingOptions,
        streaming: StreamingOptions,
        cancel: threading.Event,
    ) -> Iterator[list[Chunk]]:
        """As `stream_rows`. Raises OutOfMemory and ModelError."""
        names = [str(next(self._numbers)) for _ in rows]
        answer = BatchedAnswer(names, bundle, rows, sampling, streaming)
        with self._lock:
            if self._is_closed or self._broken:
                raise ModelError(self._broken or "the model is being shut down")
            for row in answer.rows:
                self._rows[row.name] = row
                self._submit(row)
        try:
            yield from answer.chunks(cancel, lambda: self.n_running)
        finally:
            for row in answer.rows:
                self._drop(row)

    def turn(self, adapter: str = "") -> ModelTurn:
        """What another thread holds while it computes with the same model, as one of the shared adapters."""
        return SharedTurn(self, adapter)

    def mark_of(self, name: str) -> int:
        """Tells what rows of one adapter have read from what the others have: 0 without adapters."""
        row = self._rows.get(name)
        return self.adapters.number(row.call.bundle.adapter) if self.adapters and row is not None else 0

    def pause(self) -> AbstractContextManager[None]:
        """The batch makes no step inside. Raises RuntimeError while it begins anew, and computes nothing either."""
        return self._manager.pause()

    def close(self) -> None:
        """End everything; what runs fails."""
        self._is_closed = True
        self._manager.end()
        self._thread.join(STOP_SECONDS)

    def _submit(self, row: BatchRow) -> None:
        # Where the thread is about to end, nothing is taken, and `_recover` submits it once more.
        n_done = row.begin()
        self._manager.add_request(
            row.row.ids + row.new_ids,
            request_id=row.name,
            max_new_tokens=row.row.max_new_tokens - n_done,
            streaming=True,
            eos_token_id=list(row.call.stop_ids) or -1,
        )

    def _drop(self, row: BatchRow) -> None:
        """Forget a row; its blocks are free before the next step."""
        with self._lock:
            if self._rows.pop(row.name, None) is not None:
                self._manager.leave(row.name)

    def take(self, name: str, generated: Sequence[int], *, ended: bool) -> None:
        """The tokens of a row so far, from the computing thread."""
        row = self._rows.get(name)
        if row is None:
            return
        row.take(generated, ended=ended)
        if ended:
            self._rows.pop(name, None)
        elif row.is_done:
            self._drop(row)

    def _run(self) -> None:
        while True:
            self._manager.run()
            error = self._manager.background_thread_status.fatal_error
            if self._is_closed or error is None:
                self._fail_all(ModelError("the model is being shut down"))
                return
            try:
                self._recover(error)
            except Exception as reason:
                self._broken = f"answers cannot be computed at once any more: {first_line(reason)}"
                warn(f"{self._broken}; they are written one after another")
                self._fail_all(ModelError(self._broken))
                return

    def _recover(self, error: Exception) -> None:
        """Begin anew after the batch failed: with fewer at once if memory was full."""
        memory_was_full = is_out_of_memory(error)
        traceback.clear_frames(error.__traceback__)  # they hold the activations
        with self._lock:
            self._manager.forget()
            if not memory_was_full:
                self._fail_all(ModelError(f"the batch failed: {first_line(error)}"))
            elif (smaller := self.size.smaller()) is not None:
                self.size = smaller
                warn(f"memory was full; from now on {smaller.summary()}")
            elif self._rows:
                first = next(iter(self._rows.values()))
                self._fail(first, OutOfMemory(advice(first)))
            self._manager = self._fitting_manager()
            for row in list(self._rows.values()):
                if len(row.row.ids) + row.row.max_new_tokens > self.size.n_tokens:
                    self._fail(row, OutOfMemory(advice(row)))
                else:
                    self._submit(row)

    def _fail(self, row: BatchRow, error: ModelError) -> None:
        for one in row.answer.rows:
            self._rows.pop(one.name, None)
        row.answer.fail(error)

    def _fail_all(self, error: ModelError) -> None:
        with self._lock:
            for row in list(self._rows.values()):
                self._fail(row, error)

    def _fitting_manager(self) -> BatchLoop:
        """A manager whose memory is there, smaller than asked for if it must be. Raises ModelError."""
        while True:
            try:
                with torch.random.fork_rng(devices=[]):  # it seeds torch
                    return BatchLoop(self, self._model, self._rows)
            except (ValueError, AttributeError, NotImplementedError, KeyError) as reason:
                raise ModelError(f"this model cannot answer in a batch: {first_line(reason)}") from reason
            except (RuntimeError, MemoryError) as reason:
                if not is_out_of_memory(reason):
                    raise
                traceback.clear_frames(reason.__traceback__)
                smaller = self.size.smaller()
            if smaller is None:
                raise OutOfMemory("not even one answer fits beside the model; use --max_parallel 1")
            self.size = smaller
            give_back_memory()


class PathCounts:
    """How many requests were begun in the batch, and how many in turn."""

    def __init__(self) -> None:
        self._counts = {"batched": 0, "serial": 0}
        self._lock = threading.Lock()

    def add(self, path: str) -> None:
        """Count a request."""
        with self._lock:
            self._counts[path] += 1

    def counts(self) -> dict[str, int]:
        """Requests so far, by path."""
        with self._lock:
            return dict(self._counts)


class BatchLoop(ContinuousBatchingManager):
    """transformers' manager, run by a thread that exists already, with processors of each row's own."""

    def __init__(self, batch: Batch, model: Any, rows: dict[str, BatchRow]) -> None:
        """Raises what transformers raises where the model or the memory does not allow it."""
        size = batch.size
        # Neither graphs nor doubled buffers: the processors run in Python, and see each token when it is chosen.
        config = ContinuousBatchingConfig(
            page_size=BLOCK_TOKENS, num_blocks=size.n_blocks, max_batch_tokens=size.step_tokens, max_memory_percent=1.0,
            max_requests_per_batch=size.n_parallel, max_blocks_per_request=0, use_async_batching=False,
            use_cuda_graph=False, auto_switch_to_flash=False, seed=0,
        )  # fmt: skip
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)  # `_recover` tells what failed
        greedy = GenerationConfig(do_sample=False, eos_token_id=-1)
        super().__init__(inner_model(model), greedy, config)
        self.logit_processor = ScoresOfRows(rows, batch.adapters.router if batch.adapters else None)
        self.output_router = Delivery(batch)
        self.warmup()  # takes the memory; without graphs it computes nothing
        if batch.adapters:
            self._part_adapters(batch)

    def _part_adapters(self, batch: Batch) -> None:
        """Keep adapters from sharing blocks, whose keys and values are others: their token ids are made others."""
        model: Any = self.model
        n_known = int(model.get_input_embeddings().weight.shape[0])
        processor: Any = self.batch_processor
        cache = processor.cache

        def marked(name: str, ids: list[int]) -> list[int]:
            first = batch.mark_of(name) * n_known % (2**31 - n_known)
            return [first + token_id for token_id in ids]

        search = cache.search_prefix_match
        cache.search_prefix_match = lambda name, ids: search(name, marked(name, ids))
        for part in cache.cache_allocators.values():
            part.mark_complete_blocks = _marking(part.mark_complete_blocks, marked)

    def run(self) -> None:
        """Compute in this thread until `end`, or until a step fails: `background_thread_status` then has the error."""
        self._generation_thread = threading.current_thread()  # type: ignore[assignment]
        with torch.inference_mode():
            self._run_generation_loop()

    def end(self) -> None:
        """Let `run` return."""
        self.background_thread_status.request_stop(BackgroundThreadStatus.HARD_STOP, 0)
        self._wake_up_loop.set()

    def leave(self, name: str) -> None:
        """Take a request out and free its blocks before the next step."""
        self.cancel_request(name)
        # Set when a request had to leave its blocks to others, until one of those ends; one that is cancelled counts.
        if self.batch_processor is not None:
            self.batch_processor.scheduler.block_new_requests = False

    def forget(self) -> None:
        """Let all memory go."""
        self.batch_processor = None
        self.background_thread_status.fatal_error = None
        give_back_memory()


def _marking(complete: Callable[..., None], marked: Callable[[str, list[int]], list[int]]) -> Callable[..., None]:
    return lambda name, ids, n_blocks: complete(name, marked(name, ids), n_blocks)


class Delivery(OutputRouter):
    """Hands what was generated to the batch at once, in the computing thread."""

    def __init__(self, batch: Batch) -> None:
        super().__init__()
        self._batch = batch

    def deliver(self, output: Any) -> None:
        """One output; a request whose batch failed is begun again, so that is none."""
        if output.error is None:
            self._batch.take(output.request_id, output.generated_tokens, ended=output.is_finished())

    def deliver_batch(self, outputs: list[Any]) -> None:
        """Those of a step."""
        for output in outputs:
            self.deliver(output)


class SharedTurn:
    """Holds the batch still while another thread computes, step by step: neither waits for more than one step."""

    def __init__(self, batch: Batch, adapter: str) -> None:
        self._batch, self._adapter = batch, adapter
        self._pause: AbstractContextManager[None] | None = None

    def __enter__(self) -> SharedTurn:
        self._take()
        self._read_as(self._adapter)
        return self

    def __exit__(self, *error: object) -> None:
        self._read_as("")
        self._let_go()

    def give_way(self) -> None:
        """Let the batch make its next step, if it has one."""
        if self._batch.n_running:
            self._let_go()
            self._take()

    def _read_as(self, adapter: str) -> None:
        if self._batch.adapters is not None:
            self._batch.adapters.router.read_as(adapter)

    def _take(self) -> None:
        pause = self._batch.pause()
        try:
            pause.__enter__()
            self._pause = pause
        except RuntimeError:  # it ended, or is about to begin anew: it computes nothing
            self._pause = None

    def _let_go(self) -> None:
        if self._pause is not None:
            self._pause.__exit__(None, None, None)
            self._pause = None


def open_batch(adapters: AdapterManager, parallel: ParallelOptions, prefix_cache_gib: float) -> Batch | None:
    """The batch for several answers at once, where that is wanted and this model can do it; a warning says why not."""
    if parallel.max_parallel == 1:
        return None
    try:
        allow_paged_cache(inner_model(adapters.model))
        check_batched(adapters.model)
        quicken_few_rows(inner_model(adapters.model))
        size = choose_size(adapters.model, parallel.max_parallel, parallel.kv_cache_gib, prefix_cache_gib)
        shared = adapters.share() if len(adapters.names) > 1 else None
        return Batch(adapters.model, size, shared)
    except ModelError as error:
        warn(f"--max_parallel {parallel.max_parallel}: answers are written one after another, for {error}")
        return None


def check_batched(model: Any) -> None:
    """Raises ModelError for a model whose answers would be others in a batch of packed rows, or that cannot do it."""
    inner = inner_model(model)
    attention = getattr(inner.config, "_attn_implementation", None)
    reason = ""
    if attention != "sdpa":
        reason = f"its attention is {attention}, and sdpa is needed"
    elif len({parameter.device for parameter in inner.parameters()}) > 1:
        reason = "its layers do not all lie on the device"
    elif positions_in_front(model):
        reason = "its adapter puts virtual tokens in front of every text"
    elif not can_be_kept(inner):
        reason = "it does not read a text in pieces, or its positions depend on the length of the text"
    if reason:
        raise ModelError(f"this model cannot answer in a batch: {reason}")


def inner_model(model: Any) -> Any:
    """The model of transformers, with an adapter's layers in their places."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def advice(row: BatchRow) -> str:
    """What somebody reads whose answer does not fit."""
    return (
        f"an answer of up to {row.row.max_new_tokens} tokens to a prompt of {len(row.row.ids)} does not fit into "
        "memory; lower --max_new_tokens, shorten the conversation, or load the model in fewer --bits"
    )
