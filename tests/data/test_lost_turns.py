"""What is put into a template comes out of it, whatever the role and the position; else it is refused."""

from __future__ import annotations

import pytest

from onecard.data.built_in_templates import BUILT_IN
from onecard.data.chat_template import PromptRenderer, load_template
from onecard.data.lost_turns import joined_system_turns
from onecard.data.messages import Turn
from onecard.errors import DataError

ORDERS = ("sua", "ssua", "usa", "uasua", "sussasua", "suasu", "us", "uasu", "uassua")
ROLES = {"s": "system", "u": "user", "a": "assistant"}
# As templates of models that see pictures: a content is a list of parts, and a text has none with a type.
LOOPS_OVER_PARTS = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\n' -}}"
    "{%- for part in message['content'] -%}{%- if part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{{- '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
ONLY_FIRST_SYSTEM = (
    "{%- for message in messages -%}{%- if message['role'] != 'system' or loop.first -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' -}}"
    "{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
NO_SYSTEM = ONLY_FIRST_SYSTEM.replace(" or loop.first", "")
ONLY_LAST = "{{- messages[-1]['content'] + eos_token -}}"


def _turns(order: str) -> list[Turn]:
    return [Turn(ROLES[letter], f"text {k:02d} here") for k, letter in enumerate(order)]


def _written(writer: PromptRenderer, turns: list[Turn]) -> str:
    return "".join(part.text + part.end for part in writer.segments(turns, add_generation_prompt=True))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", BUILT_IN)
def test_no_system_message_is_lost_in_a_built_in_template(sp_tokenizer, name, order):
    turns = _turns(order)
    text = _written(PromptRenderer(load_template(name, sp_tokenizer), sp_tokenizer), turns)
    assert [text.count(turn.content) for turn in turns] == [1] * len(turns)


@pytest.mark.parametrize("name", ("alpaca", "vicuna-chat", "llama-2", "mistral"))
def test_a_system_message_without_a_question_beside_it_is_refused(sp_tokenizer, name):
    writer = PromptRenderer(load_template(name, sp_tokenizer), sp_tokenizer)
    with pytest.raises(DataError, match=r"follows message 2 \(assistant\); put it first, or beside a question"):
        writer.render(_turns("uas"), prompt=True)


@pytest.mark.parametrize("name", ("llama-2", "mistral"))
def test_a_system_message_alone_is_refused(sp_tokenizer, name):
    writer = PromptRenderer(load_template(name, sp_tokenizer), sp_tokenizer)
    with pytest.raises(DataError, match="a system message that no question follows"):
        writer.render(_turns("s"), prompt=True)


# As those of Qwen 2.5 and others: they look at the first message, whoever says it.
LOOKS_AT_THE_FIRST = (
    "{%- if messages[0]['role'] != 'system' -%}{{- '<|im_start|>system\nYou help.<|im_end|>\n' -}}{%- endif -%}"
) + ONLY_FIRST_SYSTEM.replace(" or loop.first", " or true")
WANTS_A_QUESTION = (
    "{%- if not (messages | selectattr('role', 'equalto', 'user') | list) -%}{{- raise_exception('No user query') -}}"
    "{%- endif -%}"
) + LOOKS_AT_THE_FIRST


@pytest.mark.parametrize("order", ("au", "auau", "sau", "aau"))
@pytest.mark.parametrize("jinja", (LOOKS_AT_THE_FIRST, WANTS_A_QUESTION), ids=("first", "question"))
def test_an_answer_may_come_before_any_question(bytelevel_tokenizer, with_template, jinja, order):
    tokenizer = with_template(bytelevel_tokenizer, jinja)
    turns = _turns(order)
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert _written(PromptRenderer(load_template("auto", tokenizer), tokenizer), turns) == rendered


@pytest.mark.parametrize("jinja", (LOOPS_OVER_PARTS, ONLY_FIRST_SYSTEM, NO_SYSTEM), ids=("parts", "first", "none"))
@pytest.mark.parametrize("order", ORDERS)
def test_nothing_is_lost_in_a_template_of_somebody_else(bytelevel_tokenizer, with_template, jinja, order):
    tokenizer = with_template(bytelevel_tokenizer, jinja)
    turns = _turns(order)
    text = _written(PromptRenderer(load_template("auto", tokenizer), tokenizer), turns)
    assert [text.count(turn.content) for turn in turns] == [1] * len(turns)


def test_the_end_is_found_where_contents_are_parts(bytelevel_tokenizer, with_template):
    tokenizer = with_template(bytelevel_tokenizer, LOOPS_OVER_PARTS)
    assert load_template("auto", tokenizer).end == "<|im_end|>"


def test_a_template_that_drops_a_question_or_an_answer_is_refused(bytelevel_bos_tokenizer, with_template):
    tokenizer = with_template(bytelevel_bos_tokenizer, ONLY_LAST)
    writer = PromptRenderer(load_template("auto", tokenizer), tokenizer)
    with pytest.raises(DataError, match=r"leaves out message 1 of 3 \(user\); choose another template with --prompt"):
        writer.render(_turns("uau"), prompt=True)


def test_an_input_stays_between_its_question_and_a_system_message_after_it():
    turns = [Turn("user", "Translate", "cat"), Turn("system", "Be brief.")]
    assert joined_system_turns(turns) == [Turn("user", "Translate", "cat\n\nBe brief.")]
    assert joined_system_turns([*turns, Turn("user", "And?")])[1:] == [Turn("user", "Be brief.\n\nAnd?")]


def test_an_empty_system_message_adds_nothing_where_it_is_joined():
    question, answer = Turn("user", "Why?"), Turn("assistant", "So.")
    for empty in ("", " \n"):
        none, brief = Turn("system", empty), Turn("system", "Be brief.")
        assert joined_system_turns([question, answer, none, question]) == [question, answer, question]
        assert joined_system_turns([question, answer, none, brief, question])[-1].content == "Be brief.\n\nWhy?"
        assert joined_system_turns([question, answer, none]) == [question, answer]
