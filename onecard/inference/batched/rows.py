"""Answers that are being written in the batch, as the thread that computes it and those that read them see them.

A row is one answer, a request has one or several. What is done to the scores of a row, where it ends and what of it is
shown is decided by the same code as in a call of `model.generate` (call.py).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList

from onecard.config.inference import SamplingOptions
from onecard.inference.call import Chunk, GenerateCall, ModelBundle, PromptRow, StreamingOptions, Usage
from onecard.inference.grammar import GrammarError
from onecard.inference.stopping import StopAtText
from onecard.model.lora.routing import AdapterRouter, Stretch

LOOK_SECONDS = 0.05  # how soon a reader notices that it was cancelled


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
        self._processors = self.call.step_processors(self.n_before)
        if self.call.logprobs:
            del self.call.logprobs.rows[0][self.n_before :]
        return self.n_before

    def scores(self, ids: list[int], scores: Tensor) -> Tensor:
        """The scores (1, vocab) after all that changes them; `ids` are those of the prompt and the answer so far."""
        if not self.new_ids:
            self.call.n_cached = max(len(ids) - self.n_read, 0)
        if self._processors:
            try:
                scores = self._processors(torch.tensor([ids], device=scores.device), scores)  # type: ignore[arg-type]
            except GrammarError as reason:  # the fault of this answer alone
                self.answer.fail(reason)
        if self.call.logprobs:
            self.call.logprobs.take(scores.argmax(dim=-1))
        return scores

    def take(self, generated: Sequence[int], *, ended: bool) -> None:
        """What was generated since `begin`."""
        self.new_ids = [*self.new_ids[: self.n_before], *generated]
        self.is_done = ended or self._has_stop()
        self.answer.tell()

    def _has_stop(self) -> bool:
        return self._stop is not None and bool(self._stop(torch.tensor([self.new_ids[-self._stop.n_tail :]]), None))


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
        self._error: BaseException | None = None
        self.rows = [
            BatchRow(name, self, GenerateCall(bundle, [row], sampling, streaming))
            for name, row in zip(names, rows, strict=True)
        ]

    def tell(self) -> None:
        """Wake the reader."""
        with self._changed:
            self._n_told += 1
            self._changed.notify()

    def fail(self, error: BaseException) -> None:
        """Let the reader raise this."""
        self._error = error
        self.tell()

    def chunks(self, cancel: threading.Event) -> Iterator[list[Chunk]]:
        """As `stream_rows`: one chunk per row, at most once per interval, the last of which have a `finish_reason`.

        Raises what `fail` was given.
        """
        deadline = time.monotonic() + self._streaming.max_seconds
        chunks = [Chunk(usage=Usage(len(row.row.ids))) for row in self.rows]
        n_seen = 0
        while not cancel.is_set() and time.monotonic() < deadline:
            begun = time.monotonic()
            with self._changed:
                self._changed.wait_for(lambda: self._n_told > n_seen, LOOK_SECONDS)  # noqa: B023
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
                self._rest(begun, cancel)
        was_cancelled = cancel.is_set()
        yield [row.call.last_chunks(None, [old], cancelled=was_cancelled)[0] for row, old in self._with(chunks)]

    def _with(self, chunks: list[Chunk]) -> list[tuple[BatchRow, Chunk]]:
        return list(zip(self.rows, chunks, strict=True))

    def _rest(self, begun: float, cancel: threading.Event) -> None:
        """Sleep through what is left of the interval, unless the answer ends or fails."""
        with self._changed:
            left = begun + self._streaming.interval_seconds - time.monotonic()
            self._changed.wait_for(
                lambda: self._error is not None or cancel.is_set() or all(row.is_done for row in self.rows),
                max(left, 0),
            )


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
        stretches, start = [], 0
        for request in requests_in_batch:
            end = start + request.query_length
            if (row := self._rows.get(request.state.request_id)) is not None:
                row.n_read += request.query_length
                stretches.append(Stretch(start, end, row.call.bundle.adapter))
            start = end
        if self._router is not None:
            self._router.route(stretches)
        self._states = [request.state for request in requests_in_batch if request.has_new_token]
        return arg_storage

    def __call__(self, input_ids: Tensor, scores: Tensor, logits_processor_args: Tensor) -> Tensor:
        """scores (rows, vocab) -> the same shape; the token of the highest one is taken."""
        for k, state in enumerate(self._states):
            row = self._rows.get(state.request_id)
            if row is not None:
                scores[k] = row.scores(state.initial_tokens + state.generated_tokens, scores[k : k + 1])[0]
        return scores
