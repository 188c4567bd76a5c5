"""Templates of reasoning models: what is learned completes the generation prompt, and no empty thought is learned."""

from __future__ import annotations

from typing import Any

import pytest

from onecard.data.chat_template import load_template
from onecard.data.encode import IGNORE_INDEX, EncodeSettings, encode_prompt, encode_sample, prompt_for
from onecard.data.messages import Conversation, Turn
from onecard.data.thoughts import (
    closing_mark,
    completion,
    empty_thought,
    has_thought,
    opened_thought,
    read_thought,
    thought_mark,
)
from tests.data.template_logics import TEMPLATES
from tests.data.tokenizer_kinds import KINDS

QUESTION = Turn("user", "Hi")
THOUGHT = "<think>\nHm.\n</think>\n\nYes"
ROOMY = EncodeSettings(10_000)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return KINDS["llama3"](tmp_path_factory.mktemp("llama3"))


def parts(tokenizer: Any, name: str, *turns: Turn, settings: EncodeSettings = ROOMY) -> list[tuple[str, str, str]]:
    """(what generation is fed, what follows and is not learned, what is learned) of each sample's last answer."""
    tokenizer.chat_template = TEMPLATES[name]
    template = load_template("auto", tokenizer)
    found = []
    for sample in encode_sample(Conversation(turns, "x:1"), template, tokenizer, settings):
        ids, n_learned = sample.input_ids, sum(label != IGNORE_INDEX for label in sample.labels)
        assert all(label != IGNORE_INDEX for label in sample.labels[-n_learned:])
        answers = [k for k, turn in enumerate(turns) if turn.role == "assistant"]
        prompts = [encode_prompt(turns[:k], template, tokenizer) for k in answers]
        prompt = max((p for p in prompts if ids[: len(p)] == p), key=len)
        found.append(tuple(map(tokenizer.decode, (prompt, ids[len(prompt) : -n_learned], ids[-n_learned:]))))
    return found


@pytest.mark.parametrize(
    ("answer", "closed", "learned"),
    [
        (THOUGHT, "", "Hm.\n</think>\n\nYes"),
        ("Hm.\n</think>\n\nYes", "", "Hm.\n</think>\n\nYes"),  # as such a model's own: the prompt opened it
        ("Yes", "\n</think>\n\n", "Yes"),
        ("<think>\n\n</think>\n\nYes", "", "\n</think>\n\nYes"),
    ],
)
@pytest.mark.parametrize(("name", "end"), [("deepseek-r1", "<|eot_id|>"), ("qwen-3-thinking", "<|im_end|>")])
def test_an_opened_thought_is_completed_and_closed(tokenizer, name, end, answer, closed, learned):
    ((prompt, unlearned, found),) = parts(tokenizer, name, QUESTION, Turn("assistant", answer))
    assert prompt.endswith("<think>\n")
    assert unlearned == closed
    assert found == learned + end


def test_an_empty_thought_that_the_template_puts_in_is_not_learned(tokenizer):
    for settings in (ROOMY, EncodeSettings(10_000, "last"), EncodeSettings(24)):
        ((prompt, unlearned, learned),) = parts(
            tokenizer, "qwen-3", QUESTION, Turn("assistant", "Yes " * 9), settings=settings
        )
        assert prompt.endswith("<|im_start|>assistant\n")
        assert unlearned == "<think>\n\n</think>\n\n"
        assert learned.startswith("Yes")
    tokenizer.chat_template = TEMPLATES["qwen-3"]
    sample = Conversation((QUESTION, Turn("assistant", "Yes")), "x:1")
    (everything,) = encode_sample(
        sample, load_template("auto", tokenizer), tokenizer, EncodeSettings(10_000, "everything")
    )
    mark = tokenizer.convert_tokens_to_ids("<think>")
    assert mark in everything.input_ids
    assert mark not in everything.labels


def test_a_thought_of_the_data_is_learned_even_an_empty_one(tokenizer):
    for answer in (THOUGHT, "<think>\n\n</think>\n\nYes"):
        assert parts(tokenizer, "qwen-3", QUESTION, Turn("assistant", answer)) == [
            ("<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "", answer + "<|im_end|>")
        ]


@pytest.mark.parametrize("name", ["qwen-3", "qwen-3-thinking", "deepseek-r1"])
def test_history_is_what_generation_is_fed(tokenizer, name):
    turns = (QUESTION, Turn("assistant", THOUGHT), Turn("user", "And?"), Turn("assistant", "No"))
    first, second = parts(tokenizer, name, *turns)
    assert "Hm." in first[2]
    assert "Hm." not in second[0]
    assert second[2].startswith("No")


@pytest.mark.parametrize(
    ("name", "lead"),
    [("deepseek-r1", "\n</think>\n\n"), ("qwen-3-thinking", "\n</think>\n\n"), ("qwen-3", ""), ("gpt-oss", "final")],
)
def test_what_closes_a_thought_is_no_part_of_the_answer(tokenizer, name, lead):
    tokenizer.chat_template = TEMPLATES[name]
    assert prompt_for([QUESTION], load_template("auto", tokenizer), tokenizer).lead == lead


@pytest.mark.parametrize(
    ("opening", "closing"),
    [
        ("<think>", "</think>"),
        ("[THINK]", "[/THINK]"),
        ("◁think▷", "◁/think▷"),
        ("<seed:think>", "</seed:think>"),
        ("<reasoning>", "</reasoning>"),
        ("<|START_THINKING|>", "<|END_THINKING|>"),
        ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ],
)
def test_marks(opening, closing):
    assert closing_mark(opening) == closing
    assert opened_thought(f"<|x|>{opening}\n") == f"{opening}\n"
    assert opened_thought(f"<|x|>{opening}\n\n{closing}\n\n") == ""
    assert opened_thought(f"{opening} and") == ""
    assert empty_thought(f"{opening}\n\n{closing}\n\n Hi") == f"{opening}\n\n{closing}\n\n"
    assert empty_thought(f"{opening}\nx{closing}") == ""
    assert has_thought(f" {opening}x")
    assert not has_thought(f"x {opening}")
    assert completion(opening, "Hi") == f"\n\n{closing}\n\nHi"
    assert completion(f"{opening}\n\n", "Hi") == f"{closing}\n\nHi"
    assert completion(f"{opening}\n", f"{opening}\nx{closing}Hi") == f"x{closing}Hi"


@pytest.mark.parametrize(
    ("jinja", "mark"),
    [("{{ '<think>\\n' }}", "<think>"), ("{{ m.content.split('</think>')[-1] }}", "<think>"),
     ("{{ '[THINK]' ~ m.thinking ~ '[/THINK]' }}", "[THINK]"), ("{{ m.content }}<|im_end|>", "")],
)  # fmt: skip
def test_the_mark_that_a_template_names(jinja: str, mark: str) -> None:
    assert thought_mark(jinja) == mark


@pytest.mark.parametrize(
    ("text", "mark", "opened", "thought", "answer"),
    [
        ("<think>\nHm.\n</think>\n\nYes ", "<think>", "", "Hm.", "Yes "),
        ("Yes <b>", "<think>", "", "", "Yes <b>"),
        ("\n<thi", "<think>", "", "", "\n<thi"),
        ("<thinking>Hm.</thinking>Yes", "<think>", "", "", "<thinking>Hm.</thinking>Yes"),
        ("<think>\n\n</think>\n\nYes", "<think>", "", "", "Yes"),
        ("<think>Hm </thi", "<think>", "", "Hm </thi", ""),
        ("Hm.\n</think>Yes</think>", "<think>", "<think>\n", "Hm.", "Yes</think>"),
        ("<think>Hm.</think>Yes", "<think>", "<think>\n", "Hm.", "Yes"),
        ("[THINK]Hm.[/THINK]Yes", "[THINK]", "", "Hm.", "Yes"),
        ("<|START_THINKING|>Hm.<|END_THINKING|>Yes", "<|START_THINKING|>", "", "Hm.", "Yes"),
    ],
)  # fmt: skip
def test_a_thought_and_an_answer_only_grow(text: str, mark: str, opened: str, thought: str, answer: str) -> None:
    assert read_thought(text, mark, opened, ended=True) == (thought, answer)
    for end in range(len(text) + 1):
        first, second = read_thought(text[:end], mark, opened, ended=False)
        assert thought.startswith(first)
        assert answer.startswith(second)
