"""The usual ways in which a server feeds a model another prompt than training did, each as the ids that it makes.

Knows templates and tokenizers. Does not know servers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from onecard.data.built_in_templates import BUILT_IN
from onecard.data.chat_template import PromptRenderer, Template, load_template, own_chat_template, thought_switch
from onecard.data.encode import encode_prompt
from onecard.data.messages import Turn
from onecard.errors import OneCardError
from onecard.model.load import load_tokenizer

IdsOf = Callable[[list[Turn]], list[int]]


@dataclass(frozen=True)
class PromptCause:
    """A way to go wrong: its name, what to do, and the ids of each prompt that it makes."""

    name: str
    words: str
    ids: list[list[int]]


def prompt_causes(
    prompts: Sequence[tuple[list[Turn], list[int]]], template: Template, tokenizer: Any, base: str
) -> list[PromptCause]:
    """Every known cause that changes at least one of these prompts (turns, right ids), the most usual ones first."""
    right = [ids for _, ids in prompts]
    found: list[PromptCause] = []
    for name, words, ids_of in _recipes(template, tokenizer, base):
        try:
            made = [ids_of(turns) for turns, _ in prompts]
        except OneCardError:  # a template that refuses such a conversation
            continue
        if made != right and all(made) and made not in [cause.ids for cause in found]:
            found.append(PromptCause(name, words, made))
    return found


def _recipes(template: Template, tokenizer: Any, base: str) -> Iterator[tuple[str, str, IdsOf]]:
    """(name, words, ids of a conversation) of each cause."""
    bos, has_bos = tokenizer.bos_token_id, tokenizer.bos_token_id is not None

    def through(other: Template) -> IdsOf:
        return lambda turns: encode_prompt(turns, other, tokenizer)

    def with_bos(ids_of: IdsOf) -> IdsOf:
        return lambda turns: ids_of(turns) if ids_of(turns)[:1] == [bos] else [bos, *ids_of(turns)]

    right = through(template)
    if has_bos:
        words = f"{tokenizer.bos_token} stands twice in front: let either the template or the server write it, not both"
        yield "double BOS", words, lambda turns: [bos] * (right(turns)[:1] == [bos]) + right(turns)
        words = f"{tokenizer.bos_token} stands in front: switch that off"
        yield "BOS that training did not have", words, with_bos(right)
        words = f"{tokenizer.bos_token} is missing in front"
        yield "missing BOS", words, lambda turns: right(turns)[right(turns)[:1] == [bos] :]
    words = "the server leaves the system message out"
    yield "missing system text", words, lambda turns: right([turn for turn in turns if turn.role != "system"])
    words = "the server writes the system message into the question"
    yield "joined system text", words, lambda turns: right(_joined(turns))
    words = "the server puts an empty system message in front"
    empty = [Turn("system", "")]
    yield "empty system text", words, lambda turns: right(turns if turns[0].role == "system" else empty + turns)
    writer = PromptRenderer(template, tokenizer)
    words = "what the template writes before an answer is missing"
    plain_ids = partial(tokenizer, add_special_tokens=False)
    yield "missing generation prompt", words, lambda turns: plain_ids(writer.render(turns, prompt=False))["input_ids"]
    if thought_switch(template.jinja) is not None:
        for wanted in ("on", "off"):
            yield f"thinking {wanted}", f"the server has thoughts {wanted}", through(template.with_thinking(wanted))
    for name, other in _other_templates(template, tokenizer, base):
        words = f"the server uses {name}, not chat_template.jinja of the run: give it that file"
        yield "wrong template", words, through(other)
        if has_bos:
            yield "wrong template", words, with_bos(through(other))


def _joined(turns: list[Turn]) -> list[Turn]:
    if turns[0].role != "system" or turns[1].role != "user":
        return turns
    return [Turn("user", f"{turns[0].content}\n\n{turns[1].content}"), *turns[2:]]


def _other_templates(template: Template, tokenizer: Any, base: str) -> list[tuple[str, Template]]:
    """The base's own template, if it has one that is not the run's, and the built-in ones."""
    found = []
    try:
        jinja = own_chat_template(load_tokenizer(base))
        if jinja is not None and jinja != template.jinja:
            found.append(("the base model's own template", replace(template, name="base", jinja=jinja)))
    except (OneCardError, OSError):  # the base is elsewhere
        pass
    for name in BUILT_IN:
        found.append((f"the template {name}", load_template(name, tokenizer)))
    return found
