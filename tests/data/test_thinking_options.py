"""What --thinking learns, where thoughts come from, and the switch of templates for asking."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from onecard.data.chat_template import load_template
from onecard.data.encode import (
    NO_THOUGHT,
    DroppedSample,
    EncodeSettings,
    Thinking,
    encode_prompt,
    encode_sample,
    prompt_for,
)
from onecard.data.formats import ANSWERS_THINK, to_sample
from onecard.data.messages import Turn
from onecard.data.thoughts import split_thought
from onecard.errors import ConfigError
from tests.data.test_tool_calls import learned_texts, sample_of
from tests.data.tokenizer_kinds import KINDS
from tests.data.tool_template_logics import TOOL_TEMPLATES

USER = {"role": "user", "content": "Hi"}
INLINE = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes"}
APART = {"role": "assistant", "content": "Yes", "reasoning_content": "Hm."}
BARE = {"role": "assistant", "content": "No"}
THINKING_TEMPLATES = ("qwen-3", "qwen-3-thinking", "deepseek-r1", "gpt-oss")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return KINDS["llama3"](tmp_path_factory.mktemp("llama3"))


def learned(tokenizer: Any, name: str, *messages: dict[str, Any], thinking: Thinking = "auto") -> list[str]:
    tokenizer.chat_template = TOOL_TEMPLATES[name]
    template = load_template("auto", tokenizer)
    coded = encode_sample(
        sample_of({"messages": list(messages)}), template, tokenizer, EncodeSettings(10_000, thinking=thinking)
    )
    if isinstance(coded, DroppedSample):
        return [coded.reason]
    return [text for sample in coded for text in learned_texts(tokenizer, sample)]


@pytest.mark.parametrize("name", TOOL_TEMPLATES)
def test_a_thought_apart_is_the_same_as_one_in_the_text(tokenizer, name):
    apart, inline = (learned(tokenizer, name, USER, answer) for answer in (APART, INLINE))
    assert apart == inline
    assert "Hm." in apart[0] and "Yes" in apart[0]


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_keys_of_thoughts(key):
    shaped = to_sample({"messages": [USER, {**BARE, key: "Hm."}]}, "x:1")
    assert shaped.sample.turns[1] == Turn("assistant", "No", thought="Hm.")
    assert (shaped.notes, shaped.ignored) == ([ANSWERS_THINK], [])
    assert to_sample({"messages": [USER, {**BARE, key: True}]}, "x:1").ignored == [f"messages[].{key}"]


@pytest.mark.parametrize("name", THINKING_TEMPLATES)
@pytest.mark.parametrize("thinking", get_args(Thinking))
def test_no_empty_thought_is_ever_learned(tokenizer, name, thinking):
    texts = learned(tokenizer, name, USER, BARE, USER, APART, USER, BARE, thinking=thinking)
    assert not any(text.lstrip().startswith(("<think>\n\n</think>", "</think>")) for text in texts)
    n_thoughts = sum("Hm." in text for text in texts)
    assert (len(texts), n_thoughts) == {"auto": (3, 1), "drop": (3, 0), "keep": (1, 1)}[thinking]


@pytest.mark.parametrize("name", THINKING_TEMPLATES)
def test_without_thoughts_only_those_with_some_are_left_out(tokenizer, name):
    assert learned(tokenizer, name, USER, BARE, thinking="keep") == [NO_THOUGHT]
    for answer in (APART, INLINE):
        assert learned(tokenizer, name, USER, answer, thinking="drop") == [
            text.replace("No", "Yes") for text in learned(tokenizer, name, USER, BARE)
        ]


def test_the_prompt_with_a_switch_is_what_is_trained(tokenizer):
    tokenizer.chat_template = TOOL_TEMPLATES["qwen-3"]
    template = load_template("auto", tokenizer)
    on, off = template.with_thinking("on"), template.with_thinking("off")
    (trained,) = encode_sample(sample_of({"messages": [USER, BARE]}), template, tokenizer, EncodeSettings(1000))
    prompts = [encode_prompt([Turn("user", "Hi")], each, tokenizer) for each in (template, on, off)]
    assert prompts[0] == prompts[1] != prompts[2]
    assert all(trained.input_ids[: len(prompt)] == prompt for prompt in prompts)
    assert tokenizer.decode(prompts[2]).endswith("<think>\n\n</think>\n\n")
    assert prompt_for([Turn("user", "Hi")], off, tokenizer).lead == ""
    assert template.with_thinking("auto") is template
    tokenizer.chat_template = TOOL_TEMPLATES["llama-3.1"]
    with pytest.raises(ConfigError, match="has no switch for thoughts"):
        load_template("auto", tokenizer).with_thinking("off")


@pytest.mark.parametrize(
    ("content", "opened", "parts"),
    [
        ("<think>\nHm.\n</think>\n\nYes", "", ("Hm.", "Yes")),
        ("[THINK]Hm.[/THINK]Yes", "", ("Hm.", "Yes")),
        ("<think>\n\n</think>\n\nYes", "", ("", "Yes")),
        ("<think>Hm.", "", ("", "<think>Hm.")),
        ("Hm.\n</think>\n\nYes", "<think>\n", ("Hm.", "Yes")),
        ("Close it with </think>.", "", ("", "Close it with </think>.")),
        ("Yes", "<think>\n", ("", "Yes")),
    ],
)
def test_thought_and_answer(content, opened, parts):
    assert split_thought(content, opened) == parts
