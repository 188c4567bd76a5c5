"""One call of `model.generate`: what goes in for some prompts, and the reading of what comes out.

The same call serves answers that are typed live and answers that are given whole; looking in changes nothing.
Prompts are padded on the left by hand and masked; `model.generate` derives the positions from the mask. Knows ids,
modes and texts. It does not know conversations, limits of the model or who asks: `generate.py` and `engine.py` do.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import Cache, LogitsProcessorList, SequenceBiasLogitsProcessor, StoppingCriteriaList

from onecard.config.inference import SamplingOptions
from onecard.data.chat_template import Template
from onecard.inference.grammar import CompiledGrammar, HoldToGrammar
from onecard.inference.model_limits import check_generation
from onecard.inference.prefix_cache import PrefixCache, expanded
from onecard.inference.sampling import CacheOptions, generation_config, logits_processors, penalties, seeded
from onecard.inference.stopping import (
    FinishedAnswer,
    FinishReason,
    MaxNewTokensPerRow,
    StopAtText,
    answer_so_far,
    answer_text,
    ended_answer,
)
from onecard.inference.streamer import (
    BeamStreamer,
    CancelCriteria,
    EachStep,
    GenerationCancelled,
    LogprobsStreamer,
    StreamState,
    TokenLogprob,
    leaving_early,
)

# Thirty updates a second look continuous, and leave the processor to the model.
INTERVAL_SECONDS = 1 / 30
CONTEXT_TOKENS = 8  # of a prompt: enough for a character and the space behind it


@dataclass(frozen=True)
class Usage:
    """Tokens of the prompt, of the answer so far with its end token, and those of the prompt that were cached."""

    n_prompt_tokens: int = 0
    n_new_tokens: int = 0
    n_cached_tokens: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Chunk:
    """An answer so far.

    text: the whole best answer so far, because beams rewrite themselves; with one beam each text begins with the one
        before it. beams: all running beams, the best first, if they were asked for.
    finish_reason: None until the last chunk, whose text is what `model.generate` returned.
    logprobs: of the tokens shown so far, if they were asked for.
    place: above 0 while the request waits for its turn: so many are in front of it, itself included.
    path: "batched" or "serial", where an engine has both.
    sources: in the last chunk, what an answer out of documents was shown, as JSON has it.
    """

    text: str = ""
    beams: tuple[str, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage = field(default_factory=Usage)
    logprobs: tuple[TokenLogprob, ...] = ()
    place: int = 0
    path: str = field(default="", compare=False)
    sources: tuple[Mapping[str, Any], ...] = field(default=(), compare=False)


class ModelTurn(Protocol):
    """The right to compute with a model that a batch computes with as well; a context manager of one thread."""

    def __enter__(self) -> object: ...

    def __exit__(self, *error: object) -> None: ...

    def give_way(self) -> None:
        """Let the batch make its next step, if it has one."""


@dataclass(frozen=True)
class ModelBundle:
    """A model that answers, with the tokenizer and the template that it was trained with.

    prefixes: what it has read before as this `adapter`, or by `prefix_key` where its name may be another's later; None:
    each prompt is read from its beginning. objective: the name of what it was trained for. turn: to be held while it
    computes, where a batch uses the model, too. context: what it computes in, by the thread that does.
    """

    model: Any
    tokenizer: Any
    template: Template
    cache: CacheOptions = field(default_factory=CacheOptions)
    prefixes: PrefixCache | None = None
    adapter: str = ""
    objective: str = "sft"
    turn: ModelTurn | None = None
    prefix_key: str = ""
    context: Callable[[], AbstractContextManager[Any]] = torch.inference_mode


@dataclass(frozen=True)
class PromptRow:
    """One prompt: ids (n_prompt,), the most new tokens it may get, and its number, which chooses its random numbers.

    continues: the answer goes on in the prompt's text, and is no text of its own. lead: what is not shown at its
    beginning; see `encode.Prompt` for both. hidden: control tokens that are not shown, None for all of them. grammar:
    what the answer is held to.
    """

    ids: list[int]
    max_new_tokens: int
    number: int = 0
    continues: bool = False
    lead: str = ""
    hidden: frozenset[int] | None = None
    grammar: CompiledGrammar | None = None

    @property
    def before(self) -> list[int]:
        """The ids behind which the answer's text begins."""
        return self.ids[-CONTEXT_TOKENS:] if self.continues else []


@dataclass(frozen=True)
class StreamingOptions:
    """What is wanted while an answer is being written. top_logprobs: None for no log-probabilities, else how many.

    logit_bias: what is added to the scores of tokens, by their ids.
    """

    show_beams: bool = False
    top_logprobs: int | None = None
    interval_seconds: float = INTERVAL_SECONDS
    max_seconds: float = math.inf
    logit_bias: Mapping[int, float] = field(default_factory=dict)


class GenerateCall:
    """One call of `model.generate` for some rows: its arguments, and the reading of what comes out of it."""

    def __init__(
        self,
        bundle: ModelBundle,
        rows: Sequence[PromptRow],
        sampling: SamplingOptions,
        streaming: StreamingOptions | None = None,
    ) -> None:
        check_generation(bundle.model, len(rows), sampling, bundle.cache)
        self.bundle, self.rows, self.sampling = bundle, rows, sampling
        self.stop_ids = bundle.template.stop_ids(bundle.tokenizer)
        self.stop_texts = [*bundle.template.stop_strings(bundle.tokenizer), *sampling.stop]
        self.pad_id = padding_id(bundle.tokenizer, self.stop_ids)
        self.n_prompt = max((len(row.ids) for row in rows), default=0)
        self.shows_beams = streaming is not None and streaming.show_beams and sampling.num_beams > 1
        wants_logprobs = streaming is not None and streaming.top_logprobs is not None
        self.logprobs = (
            LogprobsStreamer(len(rows), streaming.top_logprobs or 0) if streaming and wants_logprobs else None
        )
        self.logit_bias = streaming.logit_bias if streaming is not None else {}
        self.n_cached = 0  # tokens of the prompt that are not read anew

    def run(self, stream_state: StreamState | None = None) -> list[list[int]]:
        """The new ids of each row, or of its beams, best first, if they are shown; with padding behind the end."""
        bundle, read = self.bundle, self.rows[0].ids
        is_one_prompt = all(row.ids == read for row in self.rows)
        prefixes = None if bundle.cache.static or not is_one_prompt else bundle.prefixes
        key = bundle.prefix_key or bundle.adapter
        past = prefixes.take(bundle.model, key, read) if prefixes else None
        early = (
            nullcontext() if stream_state is None or bundle.cache.compile else leaving_early(bundle.model, stream_state)
        )
        try:
            with bundle.turn or nullcontext(), bundle.context(), early:
                sequences = self._generate(past, stream_state)
            read = sequences[0].tolist()
        finally:
            if prefixes and past is not None:
                prefixes.keep(key, read, past)
        new_ids: list[list[int]] = sequences[:, self.n_prompt :].tolist()
        return new_ids

    def new_ids(self) -> list[list[int]]:
        """As `run`, without `torch.inference_mode`: what a module keeps of it could not be trained with afterwards."""
        new_ids: list[list[int]] = self._generate(None, None)[:, self.n_prompt :].tolist()
        return new_ids

    def _generate(self, past: Cache | None, stream_state: StreamState | None) -> torch.Tensor:
        """Prompts and answers (batch, longest); `past` holds the beginning of the prompt that all rows share."""
        bundle, numbers = self.bundle, [row.number for row in self.rows]
        device = bundle.model.device
        input_ids, attention_mask = pad_left([row.ids for row in self.rows], self.pad_id)
        arguments: dict[str, Any] = {}
        if past is not None:
            self.n_cached = past.get_seq_length()
            n_rows = len(self.rows) * self.sampling.num_beams
            arguments["past_key_values"] = (
                expanded(bundle.model, self.rows[0].ids, past, n_rows) if n_rows > 1 else past
            )
        with seeded(self.sampling, numbers, device):
            sequences: torch.Tensor = bundle.model.generate(
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                generation_config=generation_config(
                    self.sampling,
                    stop_ids=self.stop_ids,
                    pad_id=self.pad_id,
                    max_new_tokens=max(row.max_new_tokens for row in self.rows),
                    num_return_sequences=self.sampling.num_beams if self.shows_beams else 1,
                    cache=bundle.cache,
                ),
                logits_processor=self._processors(stream_state, numbers),
                stopping_criteria=self._criteria(stream_state),
                **arguments,
            )
        return sequences

    def answers(self, new_ids: Sequence[Sequence[int]]) -> list[FinishedAnswer]:
        """What is shown of each row's returned ids (best beams only)."""
        n_beams = len(new_ids) // len(self.rows)
        return [ended_answer(ids, **self._ends(row)) for row, ids in zip(self.rows, new_ids[::n_beams], strict=True)]

    def chunks(self, snapshot: Sequence[Sequence[int]], before: Sequence[Chunk]) -> list[Chunk]:
        """One chunk per row from the ids of a moment, several beams of a row one after another."""
        n_beams = len(snapshot) // len(self.rows)
        chunks = []
        for k, (row, old) in enumerate(zip(self.rows, before, strict=True)):
            beams = snapshot[k * n_beams : (k + 1) * n_beams]
            ended = answer_so_far(beams[0], **self._ends(row))
            texts = self._beam_texts(row, beams, finished=False)
            # A tokenizer whose decode takes something back: with one beam, what was shown stays.
            text = ended.text if n_beams > 1 or ended.text.startswith(old.text) else old.text
            logprobs = self._shown_logprobs(k, beams[0], text)
            chunks.append(Chunk(text, texts, None, Usage(len(row.ids), ended.n_tokens, self.n_cached), logprobs))
        return chunks

    def last_chunks(
        self, new_ids: Sequence[Sequence[int]] | None, before: Sequence[Chunk], *, cancelled: bool
    ) -> list[Chunk]:
        """The chunks that end the answer. `new_ids` is None when generation was left early: what was shown stays."""
        if new_ids is None:
            reason: FinishReason = "cancelled" if cancelled else "length"
            return [Chunk(old.text, old.beams, reason, old.usage, old.logprobs) for old in before]
        n_beams = len(new_ids) // len(self.rows)
        chunks = []
        for k, (row, ended) in enumerate(zip(self.rows, self.answers(new_ids), strict=True)):
            beams = new_ids[k * n_beams : (k + 1) * n_beams]
            texts = self._beam_texts(row, beams, finished=True)
            logprobs = self._shown_logprobs(k, beams[0][: ended.n_tokens], ended.text)
            usage = Usage(len(row.ids), ended.n_tokens, self.n_cached)
            chunks.append(Chunk(ended.text, texts, ended.reason, usage, logprobs))
        return chunks

    def _ends(self, row: PromptRow) -> dict[str, Any]:
        return {
            "tokenizer": self.bundle.tokenizer,
            "stop_ids": self.stop_ids,
            "stop_texts": self.stop_texts,
            "max_new_tokens": row.max_new_tokens,
            "before": row.before,
            "lead": row.lead,
            "hidden": row.hidden,
        }

    def _beam_texts(self, row: PromptRow, beams: Sequence[Sequence[int]], *, finished: bool) -> tuple[str, ...]:
        if not self.shows_beams:
            return ()
        read = ended_answer if finished else answer_so_far
        return tuple(read(ids, **self._ends(row)).text for ids in beams)

    def _shown_logprobs(self, k: int, ids: Sequence[int], text: str) -> tuple[TokenLogprob, ...]:
        """Those of the tokens whose text is shown: not of the end token, nor of what is held back."""
        if self.logprobs is None:
            return ()
        n_shown = min(len(ids), len(self.logprobs.rows[k]))
        n_shown = next((n for n in range(n_shown) if ids[n] in self.stop_ids), n_shown)
        row = self.rows[k]
        ends = (self.bundle.tokenizer, row.before, row.lead, row.hidden)
        while n_shown and len(answer_text(ids[:n_shown], *ends)) > len(text):
            n_shown -= 1
        return tuple(self.logprobs.rows[k][:n_shown])

    def step_processors(self, n_done: int = 0) -> LogitsProcessorList:
        """All that changes the scores of a single row that has `n_done` tokens, where `generate` makes no steps."""
        row = self.rows[0]
        processors = penalties(self.sampling, len(row.ids), self.stop_ids, row.max_new_tokens, self.bundle.model.device)
        processors.extend(self._processors(None, [row.number], n_done))
        return processors

    def _processors(
        self, stream_state: StreamState | None, numbers: Sequence[int], n_drawn: int = 0
    ) -> LogitsProcessorList:
        processors = LogitsProcessorList()
        if self.logit_bias:
            bias: Any = [[[token_id], float(value)] for token_id, value in self.logit_bias.items()]
            processors.append(SequenceBiasLogitsProcessor(sequence_bias=bias))
        if self.logprobs:
            processors.append(self.logprobs)
        if any(row.grammar for row in self.rows):
            grammars = [row.grammar for row in self.rows]
            processors.append(HoldToGrammar(grammars, self.n_prompt, self.stop_ids, self.pad_id))
        processors.extend(logits_processors(self.sampling, numbers, n_drawn))
        if stream_state is not None and self.sampling.num_beams > 1:
            processors.append(BeamStreamer(stream_state))
        return processors

    def _criteria(self, stream_state: StreamState | None) -> StoppingCriteriaList:
        criteria = StoppingCriteriaList([MaxNewTokensPerRow([row.max_new_tokens for row in self.rows], self.n_prompt)])
        if self.stop_texts:
            criteria.append(StopAtText(self.stop_texts, self.bundle.tokenizer, self.n_prompt))
        if self.logprobs:
            take = self.logprobs.take
            criteria.append(EachStep(lambda input_ids: take(input_ids[:, -1])))
        if stream_state is not None:
            criteria.append(CancelCriteria(stream_state, shows=self.sampling.num_beams == 1))
        if self.bundle.turn is not None:
            give_way = self.bundle.turn.give_way
            criteria.append(EachStep(lambda _: give_way()))
        return criteria


class GenerateThread(threading.Thread):
    """Runs a call beside the thread that reads the answer."""

    def __init__(self, call: GenerateCall, stream_state: StreamState) -> None:
        super().__init__(name="onecard-generate", daemon=True)
        self._call, self._state = call, stream_state
        self._new_ids: list[list[int]] | None = None
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            new_ids = self._call.run(self._state)
            # Out of time, `generate` returns what it has, and the answer counts as cut.
            self._new_ids = new_ids if not self._state.must_end else None
        except GenerationCancelled:
            pass
        except BaseException as reason:
            self._error = reason
        finally:
            self._state.finish()

    def result(self) -> list[list[int]] | None:
        """The new ids, or None when generation was left early. Raises what generation raised."""
        error, self._error = self._error, None  # an exception that keeps itself alive would keep its tensors alive
        if error is not None:
            raise error
        return self._new_ids


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and attention_mask, each (batch, longest row).

    [[5, 6, 7], [8]], pad 0  ->  [[5, 6, 7],   [[1, 1, 1],
                                  [0, 0, 8]]    [0, 0, 1]]
    """
    longest = max(len(ids) for ids in rows)
    input_ids = [[pad_id] * (longest - len(ids)) + list(ids) for ids in rows]
    mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in rows]
    return torch.tensor(input_ids), torch.tensor(mask)


def padding_id(tokenizer: Any, stop_ids: Sequence[int]) -> int:
    """An id for padding: BOS where there is one, for it stands in every prompt anyway.

    The mask hides padding from the model, but not from the repetition penalty: padded with the end token, only the
    shorter rows of a batch would be made to end later.
    """
    for token_id in (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id):
        if token_id is not None and token_id not in stop_ids:
            return int(token_id)
    return next(token_id for token_id in range(len(stop_ids) + 1) if token_id not in stop_ids)
