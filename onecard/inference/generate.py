"""Answers from a model: prompts in, answers out, whole or while they are being written.

One generator for page, terminal and API: `stream` types an answer live, `answer_rows` gives many whole ones, both by
the same call of `model.generate` (call.py) with the same settings.

What the model is fed comes from `prompt_for`, the same function that training uses. Does not know files
(inference/batch/run.py), queues and adapters (engine.py) or terminals.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from onecard.config.inference import SamplingOptions
from onecard.data.chat_template import Template
from onecard.data.encode import Prompt, prompt_for
from onecard.data.messages import Turn
from onecard.errors import ConfigError, DataError
from onecard.inference.call import Chunk, GenerateCall, GenerateThread, ModelBundle, PromptRow, StreamingOptions, Usage
from onecard.inference.grammar import AnswerGrammar, CompiledGrammar, compiled
from onecard.inference.model_limits import go_together
from onecard.inference.stopping import FinishReason
from onecard.inference.streamer import StreamState
from onecard.model.input_limits import embedding_rows, no_row
from onecard.model.output_head import positions_in_front
from onecard.model.rope_scaling import context_limit


class ContextTooLong(DataError):
    """A prompt that leaves no room for an answer. `limit` counts prompt and answer together, in tokens."""

    def __init__(self, n_prompt_tokens: int, limit: int) -> None:
        self.n_prompt_tokens, self.limit = n_prompt_tokens, limit
        super().__init__(
            f"the prompt has {n_prompt_tokens} tokens, and the model reads at most {limit}, answer included: shorten it"
        )


@dataclass(frozen=True)
class Generation:
    """One answer. `n_new_tokens` counts the end token too, although it is not shown."""

    text: str
    finish_reason: FinishReason
    n_prompt_tokens: int
    n_new_tokens: int


def stream(
    bundle: ModelBundle,
    turns: Sequence[Turn],
    sampling: SamplingOptions,
    streaming: StreamingOptions | None = None,
    cancel: threading.Event | None = None,
    *,
    number: int = 0,
    grammar: AnswerGrammar | None = None,
) -> Iterator[Chunk]:
    """Answer the last user turn, chunk by chunk; the last chunk has a `finish_reason`.

    number, grammar: as of `prepare`. Closing the iterator, or setting `cancel` from any thread, stops the model within
    a second. Raises what `prepare` and `model.generate` do, such as ContextTooLong and `torch.OutOfMemoryError`.
    """
    row = prepare(bundle, turns, sampling, number=number, grammar=grammar)
    for (chunk,) in stream_rows(bundle, [row], sampling, streaming, cancel):
        yield chunk


def stream_rows(
    bundle: ModelBundle,
    rows: Sequence[PromptRow],
    sampling: SamplingOptions,
    streaming: StreamingOptions | None = None,
    cancel: threading.Event | None = None,
) -> Iterator[list[Chunk]]:
    """`stream` for several prepared rows at once: one list per step, with one chunk per row."""
    streaming = streaming or StreamingOptions()
    if streaming.top_logprobs is not None and sampling.num_beams > 1:
        raise ConfigError("--num_beams", "with several beams there are no log-probabilities of single tokens")
    call = GenerateCall(bundle, rows, sampling, streaming)
    stream_state = StreamState(call.n_prompt, cancel or threading.Event(), time.monotonic() + streaming.max_seconds)
    thread = GenerateThread(call, stream_state)
    thread.start()
    chunks = [Chunk(usage=Usage(len(row.ids))) for row in rows]
    try:
        for snapshot in stream_state.snapshots(streaming.interval_seconds):
            if stream_state.must_end:
                break
            chunks = call.chunks(snapshot, chunks)
            yield chunks
    finally:
        stream_state.abandoned = True
        thread.join()
    yield call.last_chunks(thread.result(), chunks, cancelled=stream_state.cancel.is_set())


def prepare(
    bundle: ModelBundle,
    turns: Sequence[Turn],
    sampling: SamplingOptions,
    *,
    number: int = 0,
    grammar: AnswerGrammar | None = None,
) -> PromptRow:
    """The row for a conversation, with what its answer is held to.

    Raises ContextTooLong when its prompt leaves no room for an answer, DataError for a token that the base lacks,
    GrammarError.
    """
    prompt = prompt_for(turns, bundle.template, bundle.tokenizer)
    ids = prompt.ids
    n_rows = embedding_rows(bundle.model)
    if max(ids, default=0) >= n_rows:
        raise DataError(no_row(bundle.tokenizer, max(ids), n_rows))
    limit = longest_sequence(bundle.model)
    max_new_tokens = sampling.max_new_tokens if limit is None else min(sampling.max_new_tokens, limit - len(ids))
    if limit is not None and max_new_tokens < 1:
        raise ContextTooLong(len(ids), limit)
    held = held_to(grammar, bundle.template, bundle.tokenizer, prompt)
    return PromptRow(ids, max_new_tokens, number, prompt.continues, prompt.lead, grammar=held)


def held_to(
    grammar: AnswerGrammar | None, template: Template, tokenizer: Any, prompt: Prompt
) -> CompiledGrammar | None:
    """The grammar over the tokens of an answer to this prompt. Raises GrammarError."""
    if grammar is None:
        return None
    return compiled(
        grammar,
        tokenizer,
        stop_ids=template.stop_ids(tokenizer),
        end_texts=template.stop_strings(tokenizer),
        lead=prompt.lead,
        continues=prompt.continues,
    )


def answer_rows(bundle: ModelBundle, rows: Sequence[PromptRow], sampling: SamplingOptions) -> list[Generation]:
    """Answer prepared rows in one call of `model.generate`, in order; one by one where padding would change them."""
    if not rows:
        return []
    if not go_together(bundle.model, [len(row.ids) for row in rows]):
        return [answer for row in rows for answer in answer_rows(bundle, [row], sampling)]
    call = GenerateCall(bundle, rows, sampling)
    return [
        Generation(ended.text, ended.reason or "length", len(row.ids), ended.n_tokens)
        for row, ended in zip(rows, call.answers(call.run()), strict=True)
    ]


def longest_sequence(model: Any) -> int | None:
    """How many tokens the model can read, prompt and answer together, or None where its config sets no limit."""
    limit = context_limit(model.config)
    return None if limit is None else limit - positions_in_front(model)
