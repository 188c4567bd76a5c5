"""`server_check.json`: a few prompts of a run with what its model answers, made once, compared with any server later.

Knows models and the run's files. It does not know HTTP.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

from onecard.config.inference import SamplingOptions
from onecard.data.encode import encode_prompt
from onecard.data.messages import Turn, turns_to_messages
from onecard.data.questions import Question, read_questions
from onecard.data.sources import ReadReport, Source
from onecard.errors import DataError
from onecard.inference.call import ModelBundle, PromptRow, StreamingOptions
from onecard.inference.generate import longest_sequence, prepare, stream_rows
from onecard.inference.model_limits import go_together
from onecard.installation import SHIPPED
from onecard.model.trained import has_adapter, without_adapter
from onecard.serve.api.logprobs import TokenTexts
from onecard.serve.verify.reading import N_TOP, AnswerReading, merged, plain_token, reading_from_json
from onecard.storage import write_whole

CHECK_NAME, VERSION = "server_check.json", 1
N_PROMPTS, MOST_TOKENS, N_TOLD = 4, 24, 12  # N_TOLD: tokens of an answer whose alternatives are kept
LONGEST_PROMPT = 512  # tokens
MOST_RECORDS, READING_SECONDS, ANSWERING_SECONDS = 2000, 5.0, 20.0
SYSTEM = "You answer in one short sentence."
SAMPLE = Source((str(SHIPPED / "sample" / "held_out.json"),))


@dataclass(frozen=True)
class CheckedPrompt:
    """A conversation, what the model is fed for it, its greedy answer, and the base's where the run has an adapter."""

    record: str
    messages: list[dict[str, str]]
    ids: list[int]
    answer: AnswerReading
    base: AnswerReading | None

    @property
    def turns(self) -> list[Turn]:
        return [Turn(message["role"], message["content"]) for message in self.messages]  # type: ignore[arg-type]


@dataclass(frozen=True)
class ServerCheck:
    """All that is stored: the prompts, and what they depend on."""

    prompts: list[CheckedPrompt]
    about: dict[str, Any]

    def write(self, directory: Path) -> None:
        """Put it into a run's directory. Raises OSError."""
        rows = [
            {"record": one.record, "messages": one.messages, "ids": one.ids, "answer": one.answer.to_json(),
             "base": None if one.base is None else one.base.to_json()}
            for one in self.prompts
        ]  # fmt: skip
        content = {"version": VERSION, **self.about, "prompts": rows}
        write_whole(directory / CHECK_NAME, json.dumps(content, ensure_ascii=False, indent=1))


def read_check(directory: Path) -> ServerCheck | None:
    """What a run has stored; None: nothing, or another version's. Raises DataError where it is damaged."""
    path = directory / CHECK_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("version") != VERSION:
            return None
        prompts = [
            CheckedPrompt(
                row["record"], row["messages"], [int(token_id) for token_id in row["ids"]],
                reading_from_json(row["answer"]), row["base"] and reading_from_json(row["base"]),
            )
            for row in content.pop("prompts")
        ]  # fmt: skip
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as reason:
        raise DataError(f"{path} cannot be read ({reason}); delete it, and it is made again") from reason
    return ServerCheck(prompts, content)


def make_check(
    bundle: ModelBundle, sources: Sequence[Source], held_out: Collection[str], about: Mapping[str, Any], *,
    with_base: bool = True,
) -> ServerCheck:  # fmt: skip
    """Choose prompts and let the model answer them, within some seconds; without readable data, of the sample's.

    held_out: names of records that were not learned; they are preferred. with_base: the model without its adapter
    is the base. Raises DataError where no prompt fits.
    """
    turns_of = chosen_questions(bundle, sources, held_out) or chosen_questions(bundle, [SAMPLE], ())
    if not turns_of:
        raise DataError("no question is short enough for the model")
    sampling = SamplingOptions(max_new_tokens=MOST_TOKENS)
    rows = [prepare(bundle, turns, sampling, number=k) for k, (_, turns) in enumerate(turns_of)]
    deadline = time.monotonic() + ANSWERING_SECONDS
    answers, base = _answers(bundle, rows, deadline), None
    if with_base and has_adapter(bundle.model):
        with without_adapter(bundle.model):
            base = _answers(bundle, rows, deadline)
    prompts = [
        CheckedPrompt(record, turns_to_messages(turns), rows[k].ids,
                      answers[k], base[k] if base else None)
        for k, (record, turns) in enumerate(turns_of)
        if answers[k].tops and (base is None or base[k].tops)  # else it was out of time
    ]  # fmt: skip
    if not prompts:
        raise DataError(f"the model wrote no token within {ANSWERING_SECONDS:g} s")
    template, tokenizer = bundle.template, bundle.tokenizer
    known = {
        "template": template.name,
        "template_sha256": hashlib.sha256(template.jinja.encode("utf-8")).hexdigest(),
        "stop": [template.end_text(tokenizer), *template.stop],
        "max_tokens": MOST_TOKENS,
    }
    return ServerCheck(prompts, {**about, **known})


def chosen_questions(
    bundle: ModelBundle, sources: Sequence[Source], held_out: Collection[str]
) -> list[tuple[str, list[Turn]]]:
    """Short questions by the names of their records: held-out ones first, one of them with a system text."""
    found: list[tuple[bool, bool, int, str, list[Turn]]] = []
    for record, turns in _readable(sources):
        try:
            n_tokens = len(encode_prompt(turns, bundle.template, bundle.tokenizer))
        except DataError:
            continue
        limit = (longest_sequence(bundle.model) or LONGEST_PROMPT + MOST_TOKENS) - MOST_TOKENS
        if 0 < n_tokens <= min(LONGEST_PROMPT, limit):
            found.append((record not in held_out, turns[0].role != "system", len(found), record, turns))
    taken = sorted(found, key=lambda one: one[:1] + one[2:3])[:N_PROMPTS]
    if taken and all(one[1] for one in taken):  # whether a server drops a system text shows only where there is one
        record, turns = taken[-1][3:]
        with_system = [Turn("system", SYSTEM), *turns]
        if _reads_system(bundle, turns, with_system):
            taken[-1] = (*taken[-1][:3], record, with_system)
    return [(record, turns) for *_, record, turns in taken]


def _reads_system(bundle: ModelBundle, turns: list[Turn], with_system: list[Turn]) -> bool:
    try:
        asked = [encode_prompt(each, bundle.template, bundle.tokenizer) for each in (turns, with_system)]
    except DataError:
        return False
    return asked[0] != asked[1]


def _readable(sources: Sequence[Source]) -> Iterator[tuple[str, list[Turn]]]:
    """The first questions of each source as messages of an API, for some seconds."""
    deadline = time.monotonic() + READING_SECONDS
    for source in sources:
        questions = islice(read_questions(source, report=ReadReport()), MOST_RECORDS // len(sources))
        with suppress(DataError):  # moved or deleted since
            in_time = takewhile(lambda _: time.monotonic() < deadline, questions)
            yield from ((one.record, _as_messages(one)) for one in in_time if _is_plain(one))


def _is_plain(question: Question) -> bool:
    return all(turn.role in ("system", "user", "assistant") for turn in question.turns)


def _as_messages(question: Question) -> list[Turn]:
    """The turns with an alpaca record's input below its instruction: messages of an API have one text."""
    return [Turn(turn.role, turn.one_text()) for turn in question.turns]


def _answers(bundle: ModelBundle, rows: list[PromptRow], deadline: float) -> list[AnswerReading]:
    """The greedy answer of each row; empty ones where the time was over."""
    if not go_together(bundle.model, [len(row.ids) for row in rows]):
        return [one for row in rows for one in _answered(bundle, [row], deadline)]
    return _answered(bundle, rows, deadline)


def _answered(bundle: ModelBundle, rows: list[PromptRow], deadline: float) -> list[AnswerReading]:
    sampling = SamplingOptions(max_new_tokens=MOST_TOKENS)
    streaming = StreamingOptions(top_logprobs=N_TOP, max_seconds=max(deadline - time.monotonic(), 0.01))
    texts = TokenTexts(bundle.tokenizer)
    *_, last = stream_rows(bundle, rows, sampling, streaming)
    return [
        AnswerReading(
            chunk.text,
            str(chunk.finish_reason),
            tuple(plain_token(texts.text_of(one.token_id)) for one in chunk.logprobs),
            tuple(
                merged([(texts.text_of(token_id), logprob) for token_id, logprob in one.top])
                for one in chunk.logprobs[:N_TOLD]
            ),
            len(row.ids),
        )
        for row, chunk in zip(rows, last, strict=True)
    ]
