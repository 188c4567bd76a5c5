"""What a page says about settings and errors, in the language of the page."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from onecard.data.messages import Turn
from onecard.inference.chat_file import SavedChat, to_json
from onecard.inference.history import ChatHistory
from onecard.serve.web.ask import AskPage
from onecard.serve.web.chat import ChatPage
from onecard.serve.web.i18n import word
from onecard.serve.web.script import TOO_LARGE
from onecard.serve.web.settings import NAMES
from tests.fake_engine import FakeEngine, Script
from tests.serve.web.test_pages import CHINESE_SIGN, START, asked, question, shown


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(Script(delay_seconds=0.002))


@pytest.fixture
def page(engine: FakeEngine) -> ChatPage:
    return ChatPage(engine, "", START)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("seed", -5, "Seed: -5 is not allowed here; 0 was used instead. Allowed: 0 to 4294967295."),
        ("seed", None, "Seed: an empty field is not allowed here; 42 was used instead."),
        ("seed", 1.5, "Seed: 1.5 is not allowed here; 2 was used instead."),
        ("temperature", 99, "Temperature: 99 is not allowed here; 2.0 was used instead. Allowed: 0 to 2."),
        ("min_new_tokens", 100, "Min new tokens: 100 is not allowed here; 64 was used instead. Allowed: 0 to 64."),
        ("num_beams", 0, "Beams: 0 is not allowed here; 1 was used instead. Allowed: 1 to 8."),
        ("adapter", "gone", "Adapter: gone is not allowed here; tiny-llama was used instead. Allowed: tiny-llama, pir"),
        ("prompt_type", "x", "Prompt type: x is not allowed here; the adapter's own () was used instead. Allowed: "),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(page: ChatPage, name: str, given: Any, words: str) -> None:
    values = page.start.values()
    values[NAMES.index(name)] = given
    assert words in (shown(page.submit(asked(page, settings=values), "Hello")).note or "")
    note = shown(page.submit(asked(page, settings=values, language="zh"), "Hello")).note or ""
    assert note.startswith(word("zh", name)) and "可用的值" in note


def test_errors_are_told_in_chinese_on_the_chinese_page(page: ChatPage, engine: FakeEngine, tmp_path: Path) -> None:
    zh = asked(page, language="zh")
    notes = [
        page.undo(zh).note, shown(page.regenerate(zh)).note, shown(page.edit(zh, 7, "x")).note,
        shown(page.edit(replace(zh, chat=to_json(SavedChat(ChatHistory("", (Turn("user", "a"),))))), 0, " ")).note,
    ]  # fmt: skip
    message = '{"role": "user", "content": "a"}'
    for text in (
        "{", "[" * 100_000, "3", '{"messages": 3}', '{"onecard_chat": 9}', "{}", '{"messages": [3]}',
        '{"messages": [{"role": "x"}]}', '{"messages": [{"role": "user"}]}', f'{{"messages": [{message}, {message}]}}',
        '{"messages": [{"role": "user", "content": 3}]}', '{"messages": [{"role": "user", "content": [{}]}]}',
        '{"messages": [], "title": 3}', '{"messages": [], "sampling": 3}', '{"messages": [], "sampling": {"seed": ""}}',
        '{"messages": [], "sampling": {"temperature": 500}}', '{"messages": [], "sampling": {"stop": 1}}',
        '{"messages": [], "sampling": {"seed": -1}}', '{"messages": [], "tittle": ""}', '{"messages": [], "wxyz": 1}',
        '{"messages": [], "prompt_type": "wrong"}', '{"messages": [], "system": "\\ud800"}', TOO_LARGE,
    ):  # fmt: skip
        notes.append(page.load(zh, text)[0].note)
    engine.context_limit = 20
    notes.append(shown(page.submit(zh, "many words " * 40)).note)
    ask = AskPage(engine, "", START, flag_path=tmp_path / "no" / "x.jsonl")  # type: ignore[arg-type]
    list(ask.ask(question(ask, "Hello")))
    notes.append(ask.flag("tab", "", "zh"))
    for note in notes:
        assert note and CHINESE_SIGN.search(note)
        # Names of keys, roles and what was given may stay; a sentence may not.
        assert not re.search(r"[A-Za-z]{2,}( [A-Za-z]+){2,}", note.replace(" user 和 assistant ", "")), note
