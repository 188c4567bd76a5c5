"""What the threads of the API do: turn texts into token ids, ask the engine, keep the snapshot of all choices.

Knows the engine. It does not know asyncio, HTTP or the shapes of answers.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from onecard.data.chat_template import PromptRenderer
from onecard.data.thoughts import closing_mark, opened_thought
from onecard.data.tokenization import segment_tokenizer
from onecard.data.tool_answers import CALL_MARKS
from onecard.errors import ConfigError, DataError
from onecard.inference.call import Chunk, Usage
from onecard.inference.detokenize import decode
from onecard.inference.engine import InferenceEngine
from onecard.inference.generate import ContextTooLong
from onecard.inference.streamer import TokenLogprob
from onecard.serve.api.errors import as_api_error
from onecard.serve.api.requests import GenerationParams, Prompt


@dataclass(frozen=True)
class Echo:
    """A prompt that is told again, with the log-probabilities of its tokens if they were asked for."""

    text: str
    scores: tuple[TokenLogprob | None, ...] = ()
    ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Progress:
    """All choices of a request so far, by index: prompt after prompt, `n` of each. Echoes by prompt.

    opened: the thought that the prompt opened and the answers go on with, "" for none.
    """

    chunks: tuple[Chunk, ...]
    echoes: tuple[Echo, ...] = ()
    opened: str = ""

    @property
    def place(self) -> int:
        """Above 0 while the request waits: so many are in front."""
        return max(chunk.place for chunk in self.chunks)

    @property
    def is_cancelled(self) -> bool:
        return any(chunk.finish_reason == "cancelled" for chunk in self.chunks)

    @property
    def path(self) -> str:
        """How the choices were computed, where there are several ways: batched, serial, or both."""
        return ",".join(sorted({chunk.path for chunk in self.chunks if chunk.path}))

    def usage(self, n: int) -> dict[str, Any]:
        """Tokens in OpenAI's names: a prompt counts once for its `n` answers."""
        n_prompt = sum(chunk.usage.n_prompt_tokens for chunk in self.chunks[::n])
        n_new = sum(chunk.usage.n_new_tokens for chunk in self.chunks)
        n_cached = sum(chunk.usage.n_cached_tokens for chunk in self.chunks[::n])
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_new,
            "total_tokens": n_prompt + n_new,
            "prompt_tokens_details": {"cached_tokens": n_cached},
        }


@dataclass(frozen=True)
class EmbeddingsResult:
    """Embeddings in order, and the tokens that were read for them."""

    vectors: list[Sequence[float]]
    n_tokens: int


def answer_chat(engine: InferenceEngine, ask: GenerationParams, cancel: threading.Event) -> Iterator[Progress]:
    """Answer a conversation. Raises ApiError with the field that is to blame, and what the engine raises."""
    template = engine.template(ask.model)
    template = replace(template, variables={**template.variables, **ask.template_variables})
    marks = (ask.thought_mark, closing_mark(ask.thought_mark)) if ask.thought_mark else ()
    opened = ""
    grammar = ask.grammar
    with blaming(ask.texts_field, ask.tokens_field):
        if marks:
            opened = thought_in_prompt(ask, PromptRenderer(template, engine.tokenizer(ask.model)))
            if grammar is not None:
                grammar = replace(grammar, thought=marks[0], closing=marks[1], is_open=bool(opened))
    request = replace(ask, kept_tokens=(*marks, *(CALL_MARKS if ask.tools else ())), grammar=grammar)
    with blaming(ask.texts_field, ask.tokens_field):
        for chunks in engine.stream(request, cancel):
            yield Progress(tuple(chunks), opened=opened)


def thought_in_prompt(ask: GenerationParams, renderer: PromptRenderer) -> str:
    """The thought inside which the answer begins, "" for none."""
    if not ask.continues_answer:
        return opened_thought(renderer.render(ask.turns, prompt=True))
    thought, closed, _ = ask.turns[-1].content.partition(closing_mark(ask.thought_mark))
    return ask.thought_mark if not closed and ask.thought_mark in thought else ""


def answer_prompts(engine: InferenceEngine, ask: GenerationParams, cancel: threading.Event) -> Iterator[Progress]:
    """Go on from each prompt, one after another. Raises like `answer_chat`."""
    progress = Progress(tuple(Chunk() for _ in range(ask.n_choices)))
    with blaming("prompt"):
        prompts = [(prompt, token_ids(engine, ask.model, prompt)) for prompt in ask.prompts]
        for k, (prompt, ids) in enumerate(prompts):
            if ask.echo:
                progress = replace(progress, echoes=(*progress.echoes, echo(engine, ask, prompt, ids, cancel)))
            for chunks in answers_to(engine, ask, ids, k * ask.n, cancel):
                before, after = progress.chunks[: k * ask.n], progress.chunks[(k + 1) * ask.n :]
                progress = replace(progress, chunks=(*before, *chunks, *after))
                yield progress
            if cancel.is_set():
                break
    ended = (chunk if chunk.finish_reason else replace(chunk, finish_reason="cancelled") for chunk in progress.chunks)
    yield replace(progress, chunks=tuple(ended))


def answers_to(
    engine: InferenceEngine, ask: GenerationParams, ids: tuple[int, ...], number: int, cancel: threading.Event
) -> Iterator[list[Chunk]]:
    """The engine's stream for one prompt; a single empty answer where none is wanted."""
    if ask.max_new_tokens == 0:
        if not ids:  # as the engine checks before it answers
            raise DataError("the prompt is empty")
        if len(ids) > engine.prompt_limit:
            raise ContextTooLong(len(ids), engine.prompt_limit + 1)
        yield [Chunk(finish_reason="length", usage=Usage(len(ids)))] * ask.n
        return
    yield from engine.stream(replace(ask, prompt_ids=ids, number=number), cancel)


def embed_texts(
    engine: InferenceEngine, model: str, texts: tuple[Prompt, ...], cancel: threading.Event
) -> Iterator[EmbeddingsResult]:
    """One result: the vectors of all texts. Raises like `answer_chat`."""
    with blaming("input"):
        ids = [token_ids(engine, model, text) for text in texts]
        yield EmbeddingsResult(engine.embed(ids, model, cancel), sum(len(one) for one in ids))


def token_ids(engine: InferenceEngine, model: str, prompt: Prompt) -> tuple[int, ...]:
    """Token ids of a raw text, as training reads a document's beginning; ids stay as they are."""
    if not isinstance(prompt, str):
        return prompt
    return tuple(segment_tokenizer(engine.template(model), engine.tokenizer(model)).text_ids(prompt))


def echo(
    engine: InferenceEngine, ask: GenerationParams, prompt: Prompt, ids: tuple[int, ...], cancel: threading.Event
) -> Echo:
    """The prompt as text, scored where log-probabilities are wanted."""
    text = prompt if isinstance(prompt, str) else decode(ids, engine.tokenizer(ask.model))
    if ask.top_logprobs is None:
        return Echo(text, (), ids)
    return Echo(text, tuple(engine.score(ids, ask.model, ask.top_logprobs, cancel)), ids)


@contextmanager
def blaming(text_field: str, tokens_field: str = "max_tokens") -> Iterator[None]:
    """Turns errors about options and data into ones about the request's fields that hold its texts and its length."""
    try:
        yield
    except (ConfigError, DataError) as reason:
        raise as_api_error(reason, text_field, tokens_field) from None
