"""Answers that are being written in the batch, as the thread that computes it and those that read them see them.

A row is one answer, a request has one or several. What is done to the scores of a row, where it ends and what of it is
shown is decided by the same code as in a call of `model.generate` (call.py).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList

from onecard.config.inference import SamplingOptions
from onecard.inference.call import Chunk, GenerateCall, ModelBundle, PromptRow, StreamingOptions, Usage
from onecard.inference.grammar import GrammarError
from onecard.inference.stopping import StopAtText
from onecard.model.lora.routing import AdapterRouter, AdapterSpan

LOOK_SECONDS = 0.05  # how soon a reader notices that it was cancelled
# Of all readers together: each update takes time from the thread that computes. None is rarer than ten a second.
UPDATES_PER_SECOND = 60
LONGEST_INTERVAL_SECONDS = 0.1


class BatchRow:
    """One answer: its new ids so far. Only the computing thread changes it."""

    def __init__(self, name: str, answer: BatchedAnswer, call: GenerateCall) -> None:
        self.name, self.answer, self.call = name, answer, call
        self.row = call.rows[0]
        self.new_ids: list[int] = []
        self.is_done = False
        self.n_read = 0  # tokens that were computed for it
        self._stop = StopAtText(call.stop_texts, call.bundle.tokenizer, 0) if call.stop_texts else None
        self.begin()

    def begin(self) -> int:
        """Make ready to be computed, perhaps once more from what it has; the number of tokens that it has."""
        self.n_before = len(self.new_ids)
        # Called one by one: a list of transformers' looks at the signature of each of them at every step.
        self._processors = list(self.call.step_processors(self.n_before))
        ids = [*self.row.ids, *self.new_ids]
        n_left = max(self.row.max_new_tokens - self.n_before, 0) if self._processors else 0
        self._ids = torch.tensor([ids + [0] * n_left], device=self.call.bundle.model.device)
        if self.call.logprobs:
            del self.call.logprobs.rows[0][self.n_before :]
        return self.n_before

    def change(self, scores: Tensor) -> None:
        """Do to the scores (1, vocab), in place, all that this row wants."""
        if not self.new_ids:
            self.call.n_cached = max(len(self.row.ids) - self.n_read, 0)
        if not self._processors:
            return
        ids, changed = self._ids[:, : len(self.row.ids) + len(self.new_ids)], scores
        try:
            for processor in self._processors:
                changed = processor(ids, changed)
        except GrammarError as reason:  # the fault of this answer alone
            self.answer.fail(reason)
        if self.call.logprobs:
            self.call.logprobs.take(changed.argmax(dim=-1))
        scores.copy_(changed)

    def take(self, generated: Sequence[int], *, ended: bool) -> None:
        """What was generated since `begin`."""
        self.new_ids = [*self.new_ids[: self.n_before], *generated]
        if self._processors and generated:
            self._ids[0, len(self.row.ids) + len(self.new_ids) - 1] = generated[-1]
        self.is_done = ended or (self._stop is not None and self._stop.is_in(self.new_ids))
        self.answer.tell()


class BatchedAnswer:
    """A request in the batch: one row per answer, and the one thread that reads them."""

    def __init__(
        self,
        names: Sequence[str],
        bundle: ModelBundle,
        rows: Sequence[PromptRow],
        sampling: SamplingOptions,
        streaming: StreamingOptions,
    ) -> None:
        self._streaming = streaming
        self._changed = threading.Condition()
        self._n_told = 0
        self._is_awaited = False  # the reader wants to know of the next token
        self._error: BaseException | None = None
        self.rows = [
            BatchRow(name, self, GenerateCall(bundle, [row], sampling, streaming))
            for name, row in zip(names, rows, strict=True)
        ]

    def tell(self) -> None:
        """Wake the reader, where it waits for a token, or nothing follows any more."""
        with self._changed:
            self._n_told += 1
            if self._is_awaited or self._is_over:
                self._changed.notify()

    def fail(self, error: BaseException) -> None:
        """Let the reader raise this."""
        self._error = error
        self.tell()

    @property
    def _is_over(self) -> bool:
        return self._error is not None or all(row.is_done for row in self.rows)

    def chunks(self, cancel: threading.Event, n_running: Callable[[], int]) -> Iterator[list[Chunk]]:
        """As `stream_rows`: one chunk per row, at most once per interval, the last of which have a `finish_reason`.

        n_running: how many answers are being written, this one included. Raises what `fail` was given.
        """
        deadline = time.monotonic() + self._streaming.max_seconds
        chunks = [Chunk(usage=Usage(len(row.row.ids))) for row in self.rows]
        n_seen = 0
        while not cancel.is_set() and time.monotonic() < deadline:
            begun = time.monotonic()
            with self._changed:
                self._is_awaited = True
                self._changed.wait_for(lambda: self._n_told > n_seen, LOOK_SECONDS)  # noqa: B023
                self._is_awaited = False
                is_new, n_seen = self._n_told > n_seen, self._n_told
            if self._error is not None:
                raise self._error
            is_done = all(row.is_done for row in self.rows)
            if is_done:
                yield [
                    row.call.last_chunks([row.new_ids], [old], cancelled=False)[0] for row, old in self._with(chunks)
                ]
                return
            if is_new:
                chunks = [row.call.chunks([row.new_ids], [old])[0] for row, old in self._with(chunks)]
                yield chunks
                self._rest(begun + self._interval(n_running()), cancel)
        was_cancelled = cancel.is_set()
        yield [row.call.last_chunks(None, [old], cancelled=was_cancelled)[0] for row, old in self._with(chunks)]

    def _with(self, chunks: list[Chunk]) -> list[tuple[BatchRow, Chunk]]:
        return list(zip(self.rows, chunks, strict=True))

    def _interval(self, n_running: int) -> float:
        """Seconds between two updates: longer where many answers are read."""
        shared = min(n_running / UPDATES_PER_SECOND, LONGEST_INTERVAL_SECONDS)
        return max(self._streaming.interval_seconds, shared)

    def _rest(self, end: float, cancel: threading.Event) -> None:
        """Sleep until `end`, unless the answer ends or fails."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_over or cancel.is_set(), max(end - time.monotonic(), 0))


class ScoresOfRows(ContinuousBatchingLogitsProcessorList):
    """What the batch does to its scores: each row's own processors, the same as in `model.generate`.

    transformers' own ones know three options, and no random numbers of a request's own.
    """

    def __init__(self, rows: Mapping[str, BatchRow], router: AdapterRouter | None) -> None:
        super().__init__(LogitsProcessorList())
        self.do_processing = True
        self._rows, self._router = rows, router
        self._states: list[Any] = []

    def prepare_tensor_args(self, requests_in_batch: list[Any], arg_storage: Tensor) -> Tensor:
        """Note which requests the rows of the next scores belong to, and whose adapter reads which tokens."""
        spans, start = [], 0
        for request in requests_in_batch:
            end = start + request.query_length
            if (row := self._rows.get(request.state.request_id)) is not None:
                row.n_read += request.query_length
                spans.append(AdapterSpan(start, end, row.call.bundle.adapter))
            start = end
        if self._router is not None:
            self._router.route(spans)
        self._states = [request.state for request in requests_in_batch if request.has_new_token]
        return arg_storage

    def __call__(self, input_ids: Tensor, scores: Tensor, logits_processor_args: Tensor) -> Tensor:
        """scores (rows, vocab) -> the same shape; the token of the highest one is taken."""
        for k, state in enumerate(self._states):
            row = self._rows.get(state.request_id)
            if row is not None:
                row.change(scores[k : k + 1])
        return scores
