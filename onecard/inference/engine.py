"""The one model of this card, shared: requests wait or join the batch, adapters are switched, limits are kept.

Pages, terminal and API ask an `InferenceEngine`; nothing else touches the model. Knows requests, limits and adapters.
It does not know HTTP, pages or conversations' history (`history.py`), nor how tokens are chosen (`generate.py`).
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from onecard.config.base_model import ModelOptions
from onecard.config.inference import InferenceOptions, LimitOptions, ParallelOptions, SamplingOptions
from onecard.data.chat_template import Template
from onecard.data.encode import Prompt, encode_prompt, prompt_for
from onecard.data.messages import Turn
from onecard.data.tokenization import segment_tokenizer
from onecard.errors import ConfigError, DataError, ModelError
from onecard.inference.adapters import AdapterManager, ServedAdapter, open_adapters
from onecard.inference.batched.batch import Batch, PathCounts, open_batch
from onecard.inference.call import Chunk, ModelBundle, PromptRow, StreamingOptions
from onecard.inference.detokenize import hidden_ids
from onecard.inference.embeddings import Check, embed, score
from onecard.inference.generate import ContextTooLong, held_to, longest_sequence, stream_rows
from onecard.inference.grammar import AnswerGrammar
from onecard.inference.out_of_memory import OutOfMemory, memory_errors
from onecard.inference.prefix_cache import PrefixCache
from onecard.inference.queue import QueueFull, RequestQueue
from onecard.inference.streamer import TokenLogprob

__all__ = ["ContextTooLong", "GenerationRequest", "InferenceEngine", "LimitExceeded", "OutOfMemory", "QueueFull"]

MOST_TOP_LOGPROBS = 20
LONGEST_CONTEXT = 1 << 20  # where neither the model nor the limits say
Result = TypeVar("Result")


class LimitExceeded(ConfigError):
    """A request asks for more than a limit allows; `flag` is the option of the request, such as --num_beams."""


@dataclass(frozen=True)
class GenerationRequest:
    """What is asked, and how it is answered.

    turns: the conversation, ending with a user turn; or prompt_ids: token ids to go on from, as they are.
    adapter: a name out of `InferenceEngine.names`; '' is the first of them.
    prompt_type: a built-in template's name; '' is the one that the adapter was trained with.
    template_variables: what the prompt template may read besides the turns.
    n: independent answers at once. number: which stream of random numbers the first of them draws from, the next
        answer from the next one; another number gives another answer to the same seed.
    top_logprobs: None for no log-probabilities, else how many alternatives to tell.
    kept_tokens: control tokens that stay in the text of the answer, such as the marks of tool calls.
    logit_bias: what is added to the scores of tokens, by their ids.
    continues_answer: the last turn is an answer that is gone on with; only what is new is the text.
    grammar: what is held to it, or None.
    """

    turns: tuple[Turn, ...] = ()
    prompt_ids: tuple[int, ...] | None = None
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    adapter: str = ""
    prompt_type: str = ""
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    n: int = 1
    number: int = 0
    show_beams: bool = False
    top_logprobs: int | None = None
    kept_tokens: tuple[str, ...] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    continues_answer: bool = False
    grammar: AnswerGrammar | None = None


class InferenceEngine:
    """A model with its adapters, for many askers at once."""

    def __init__(self, adapters: AdapterManager, limits: LimitOptions, parallel: ParallelOptions | None = None) -> None:
        self.limits = limits
        self._adapters = adapters
        self._prefixes = PrefixCache(limits.prefix_cache_gib)
        self._batch = open_batch(adapters, parallel or ParallelOptions(), limits.prefix_cache_gib)
        self.paths = PathCounts()
        self._queue = RequestQueue(limits.max_queue)
        self._places = RequestQueue(limits.max_queue, self.n_parallel)  # in the batch
        self._cancels: set[threading.Event] = set()  # of all requests that wait or are being answered
        self._is_closed = False

    @property
    def names(self) -> tuple[str, ...]:
        """What `GenerationRequest.adapter` may name, the default first."""
        return self._adapters.names

    @property
    def context_limit(self) -> int:
        """Tokens of prompt and answer together."""
        return longest_sequence(self._adapters.model) or LONGEST_CONTEXT

    @property
    def prompt_limit(self) -> int:
        """Tokens of the longest prompt that is taken; one token is left for the answer."""
        own = self.context_limit - 1
        return min(own, self.limits.max_prompt_tokens) if self.limits.max_prompt_tokens else own

    @property
    def n_parallel(self) -> int:
        """Requests that are answered at once, besides one that takes its turn alone."""
        return self._batch.size.n_parallel if self._batch else 1

    @property
    def n_waiting(self) -> int:
        """Requests that wait for their turn."""
        return self._queue.n_waiting + self._places.n_waiting

    def has(self, adapter: str) -> bool:
        return adapter == "" or adapter in self.names

    def adapter_of(self, name: str) -> str:
        """The adapter that answers by one of the names; by '' the first."""
        return name or self._adapters.names[0]

    def tokenizer(self, adapter: str = "") -> Any:
        return self._served(adapter).tokenizer

    def template(self, adapter: str = "", prompt_type: str = "") -> Template:
        return self._served(adapter, prompt_type).template

    def count_tokens(self, turns: Sequence[Turn], adapter: str = "", prompt_type: str = "") -> int:
        """Tokens of what the model is fed for the next answer to these turns."""
        served = self._served(adapter, prompt_type)
        return len(encode_prompt(turns, served.template, served.tokenizer))

    def prompt_ids(self, request: GenerationRequest) -> list[int]:
        """What the model is fed for this request, however long. Raises DataError."""
        return self._prompt(request, self._served(request.adapter, request.prompt_type)).ids

    def stream(self, request: GenerationRequest, cancel: threading.Event | None = None) -> Iterator[list[Chunk]]:
        """Answer a request: lists with one chunk per answer, the last of which have a `finish_reason`.

        While it waits for its turn the chunks are empty and tell the `place`. Setting `cancel` from any thread, or
        closing the iterator, ends it within a second; the model is then free for the next one, whatever happened.

        Raises LimitExceeded, ContextTooLong, QueueFull, OutOfMemory and ModelError, always instead of the last chunks.
        """
        cancel = cancel or threading.Event()
        rows = self._rows(request)
        with self._held(request.adapter) as is_plain:
            takes = self._batch is not None and is_plain and self._batch.takes(rows, request.sampling)
            yield from self._in_line(request, rows, cancel, self._batch if takes else None)

    def _in_line(
        self, request: GenerationRequest, rows: list[PromptRow], cancel: threading.Event, batch: Batch | None
    ) -> Iterator[list[Chunk]]:
        """Wait for a place in the batch, or for a turn, and answer."""
        waiting = [Chunk() for _ in rows]
        path = "" if self._batch is None else "batched" if batch else "serial"
        line = self._places if batch else self._queue
        ticket = self._enter(line, cancel)
        begun = 0.0
        try:
            for place in line.wait(ticket, cancel):
                yield [replace(chunk, place=place) for chunk in waiting]
            if cancel.is_set():
                yield [replace(chunk, finish_reason="cancelled") for chunk in waiting]
                return
            begun = time.monotonic()
            self.paths.add(path or "serial")
            for chunks in self._answer(request, rows, cancel, batch):
                yield [replace(chunk, path=path) for chunk in chunks] if path else chunks
        finally:
            self._leave(line, ticket, cancel, begun)

    def embed(
        self, prompts: Sequence[Sequence[int]], adapter: str = "", cancel: threading.Event | None = None
    ) -> list[Sequence[float]]:
        """One vector per prompt: the mean of the last hidden states, of length 1. (n, hidden)"""
        most = self.limits.max_embedding_inputs
        if len(prompts) > most:
            raise LimitExceeded("--max_embedding_inputs", f"{len(prompts)} texts at once; {most} are allowed")
        for ids in prompts:
            self._check_prompt(ids)
        return self._alone(adapter, cancel, lambda bundle, check: embed(bundle.model, prompts, check))

    def score(
        self,
        prompt_ids: Sequence[int],
        adapter: str = "",
        top_logprobs: int = 0,
        cancel: threading.Event | None = None,
    ) -> list[TokenLogprob | None]:
        """What the model thinks of each of the prompt's own tokens; None for the first, which follows nothing."""
        self._check_prompt(prompt_ids)
        self._check_top(top_logprobs)
        return self._alone(adapter, cancel, lambda bundle, check: score(bundle.model, prompt_ids, top_logprobs, check))

    def add_adapter(self, name: str, path: str) -> None:
        """Let the adapter of this directory answer by a name of its own. Raises ModelError where it does not load."""
        self._adapters.add(name, path)
        try:
            with self._held(name):
                pass
        except ModelError:
            self._adapters.remove(name)
            raise

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter. Raises ConfigError for the first one, for the base and for one that is answering."""
        shared = self._batch.adapters if self._batch else None
        if shared is not None and not shared.forget(name):
            raise ConfigError("--adapter", f"{name} is answering; ask again when it has ended")
        self._adapters.remove(name)

    def close(self) -> None:
        """Cancel all requests; later ones are refused with ModelError."""
        self._is_closed = True
        for cancel in tuple(self._cancels):
            cancel.set()
        if self._batch:
            self._batch.close()

    def _answer(
        self, request: GenerationRequest, rows: list[PromptRow], cancel: threading.Event, batch: Batch | None
    ) -> Iterator[list[Chunk]]:
        seconds = self.limits.max_request_seconds or math.inf
        streaming = StreamingOptions(
            request.show_beams, request.top_logprobs, max_seconds=seconds, logit_bias=request.logit_bias
        )
        if batch:
            with self._bundle(request.adapter, request.prompt_type) as bundle:
                yield from batch.answer(bundle, rows, request.sampling, streaming, cancel)
            return
        advice = (
            f"{request.n} answers of up to {rows[0].max_new_tokens} tokens to a prompt of {len(rows[0].ids)}, with "
            f"{request.sampling.num_beams} beams each, do not fit into memory; lower --max_new_tokens, --num_beams, n, "
            "shorten the conversation, or load the model in fewer --bits"
        )
        is_shown = False
        try:
            with memory_errors(advice), self._bundle(request.adapter, request.prompt_type) as bundle:
                for chunks in stream_rows(bundle, rows, request.sampling, streaming, cancel):
                    yield chunks
                    is_shown = is_shown or any(chunk.text for chunk in chunks)
            return
        except OutOfMemory:
            if not self._prefixes.clear() or is_shown:
                raise
        # Once more, with the memory of the other conversations.
        with memory_errors(advice), self._bundle(request.adapter, request.prompt_type) as bundle:
            yield from stream_rows(bundle, rows, request.sampling, streaming, cancel)

    def _served(self, adapter: str, prompt_type: str = "") -> ServedAdapter:
        return self._adapters.get(self.adapter_of(adapter), prompt_type)

    def _held(self, adapter: str) -> AbstractContextManager[bool]:
        """Keep a shared adapter at hand; False for one that has to answer alone."""
        shared = self._batch.adapters if self._batch else None
        return shared.held(self.adapter_of(adapter)) if shared else nullcontext(True)

    @contextmanager
    def _bundle(self, adapter: str, prompt_type: str = "") -> Iterator[ModelBundle]:
        """What answers as this adapter. Raises ModelError for one that does not load."""
        name, batch = self.adapter_of(adapter), self._batch
        if batch is None or batch.adapters is None:
            turn = batch.turn() if batch else None
            yield replace(self._adapters.use(name, prompt_type), prefixes=self._prefixes, adapter=name, turn=turn)
        elif batch.adapters.is_plain(name):
            bundle = self._adapters.bundle(name, prompt_type)
            yield replace(bundle, prefixes=self._prefixes, adapter=name, turn=batch.turn(name))
        else:
            with batch.turn():  # the model itself is another one meanwhile
                try:
                    yield replace(self._adapters.use(name, prompt_type), prefixes=self._prefixes, adapter=name)
                finally:
                    self._adapters.take_off()

    def _alone(
        self, adapter: str, cancel: threading.Event | None, work: Callable[[ModelBundle, Check], Result]
    ) -> Result:
        """Do some work on the model when it is free. Raises as the work does; QueueFull; ModelError if cancelled."""
        cancel = cancel or threading.Event()
        self._served(adapter)
        with self._held(adapter):
            ticket = self._enter(self._queue, cancel)
            begun = 0.0
            try:
                for _ in self._queue.wait(ticket, cancel):
                    pass
                begun = time.monotonic()
                return self._worked(adapter, cancel, work, begun + (self.limits.max_request_seconds or math.inf))
            finally:
                self._leave(self._queue, ticket, cancel, begun)

    def _worked(
        self, adapter: str, cancel: threading.Event, work: Callable[[ModelBundle, Check], Result], deadline: float
    ) -> Result:
        def attempt() -> Result:
            advice = "the texts do not fit into memory; send shorter ones, or fewer at once"
            with memory_errors(advice), self._bundle(adapter) as bundle, bundle.turn or nullcontext():
                return work(bundle, lambda: check(bundle))

        def check(bundle: ModelBundle | None = None) -> None:
            if bundle is not None and bundle.turn is not None:
                bundle.turn.give_way()
            if cancel.is_set():
                raise ModelError("the request was cancelled")
            if time.monotonic() >= deadline:
                raise ModelError("this takes longer than --max_request_seconds allows; send less at once")

        check()
        try:
            return attempt()
        except OutOfMemory:
            if not self._prefixes.clear():
                raise
        return attempt()

    def _enter(self, line: RequestQueue, cancel: threading.Event) -> object:
        """Stand in the line. Raises QueueFull."""
        if self._is_closed:
            raise ModelError("the model is being shut down")
        ticket = line.join()
        self._cancels.add(cancel)
        return ticket

    def _leave(self, line: RequestQueue, ticket: object, cancel: threading.Event, begun: float) -> None:
        self._cancels.discard(cancel)
        line.leave(ticket, time.monotonic() - begun if begun else 0.0)

    def _rows(self, request: GenerationRequest) -> list[PromptRow]:
        """The request's prompt, once per answer, after all its limits were checked."""
        served = self._served(request.adapter, request.prompt_type)
        sampling = request.sampling
        for flag, message in sampling.problems():
            raise LimitExceeded(flag, message)
        for flag, value, limit in (
            ("--max_new_tokens", sampling.max_new_tokens, "max_answer_tokens"),
            ("--num_beams", sampling.num_beams, "max_beams"),
            ("--n", request.n, "max_choices"),
        ):
            most = getattr(self.limits, limit)
            if not 1 <= value <= most:
                raise LimitExceeded(flag, f"{value} is not between 1 and {most}, the limit that --{limit} sets")
        if request.top_logprobs is not None:
            self._check_top(request.top_logprobs)
            if sampling.num_beams > 1:
                raise LimitExceeded("--num_beams", "with several beams there are no log-probabilities of tokens")
        n_known = self._adapters.n_tokens
        if unknown := [token_id for token_id in request.logit_bias if not 0 <= token_id < n_known]:
            raise LimitExceeded("--logit_bias", f"the model has no token {unknown[0]} (0 to {n_known - 1})")
        prompt = self._prompt(request, served)
        self._check_prompt(prompt.ids)
        max_new_tokens = min(sampling.max_new_tokens, self.context_limit - len(prompt.ids))
        hidden = hidden_ids(served.tokenizer, request.kept_tokens)
        grammar = held_to(request.grammar, served.template, served.tokenizer, prompt)
        row = PromptRow(prompt.ids, max_new_tokens, 0, prompt.continues, prompt.lead, hidden, grammar)
        return [replace(row, number=request.number + k) for k in range(request.n)]

    def _prompt(self, request: GenerationRequest, served: ServedAdapter) -> Prompt:
        variables = {**served.template.variables, **request.template_variables}
        template = replace(served.template, variables=variables)
        if request.prompt_ids is not None:
            prompt = Prompt(list(request.prompt_ids), continues=True)
        elif request.continues_answer:
            prompt = Prompt(segment_tokenizer(template, served.tokenizer).continued_ids(request.turns), continues=True)
        elif [turn.role for turn in request.turns if turn.role != "system"][-1:] in (["user"], ["tool"]):
            prompt = prompt_for(request.turns, template, served.tokenizer)
        else:
            raise DataError("there is no question: the last message, but for the system's, must be the user's")
        return prompt

    def _check_prompt(self, ids: Sequence[int]) -> None:
        if not ids:
            raise DataError("the prompt is empty")
        n_known = self._adapters.n_tokens
        if not all(0 <= token_id < n_known for token_id in ids):
            raise DataError(f"the prompt holds token ids that the model does not have (0 to {n_known - 1})")
        if len(ids) > self.prompt_limit:
            raise ContextTooLong(len(ids), self.prompt_limit + 1)

    def _check_top(self, top_logprobs: int) -> None:
        if not 0 <= top_logprobs <= MOST_TOP_LOGPROBS:
            raise LimitExceeded("--top_logprobs", f"{top_logprobs} is not between 0 and {MOST_TOP_LOGPROBS}")


def open_engine(
    model: ModelOptions,
    bundle: InferenceOptions,
    limits: LimitOptions,
    adapters_path: str | None = None,
    model_name: str | None = None,
    parallel: ParallelOptions | None = None,
    kind: Callable[[AdapterManager, LimitOptions, ParallelOptions | None], InferenceEngine] = InferenceEngine,
) -> InferenceEngine:
    """Load the model and what can be switched to, into an engine of this kind. Raises ConfigError and ModelError."""
    return kind(open_adapters(model, bundle, adapters_path, model_name), limits, parallel)
