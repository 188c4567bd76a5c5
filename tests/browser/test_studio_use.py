"""Chat, comparison and exports in a real Chromium, with stubs in place of the programs; axe-core looks for faults."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import Studio, held_back, press_until, serving_studio
from tests.browser.test_accessibility import DESKTOP, PHONE, faults

STUB = Path(__file__).resolve().parents[1] / "studio" / "stub_use.py"


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    """One with one run in it."""
    folder = tmp_path_factory.mktemp("studio")
    program = (sys.executable, str(STUB), str(folder / "stub"))
    with serving_studio(folder, program=program, data_root=[str(folder)]) as found:
        run = found.context.output_root / "my-run"
        run.mkdir()
        (run / "adapter_config.json").write_text('{"base_model_name_or_path": "base"}', encoding="utf-8")
        yield found


def load(page: Any) -> None:
    """Load the model where it is not."""
    page.wait_for_selector("#chat-source option", state="attached")
    if page.is_hidden("#chat-question"):
        page.click("#chat-start")
    page.wait_for_selector("#chat-question", state="visible")


def ask(page: Any, text: str, n_answers: int) -> None:
    page.fill("#chat-question", text)
    page.keyboard.press("Enter")
    page.wait_for_function("(n) => document.querySelectorAll('.answer[aria-busy=false]').length === n", arg=n_answers)


def test_chat_compare_and_vote_by_keyboard_alone(open_view: Any) -> None:
    page = open_view("chat")
    page.wait_for_selector("#chat-source option", state="attached")
    press_until(page, "#chat-start")
    page.keyboard.press("Enter")
    page.wait_for_selector("#chat-question", state="visible")
    press_until(page, "#chat-question")
    page.keyboard.type("abc")
    page.keyboard.press("Enter")
    page.wait_for_selector(".answer[aria-busy=false] .text:has-text('cba')")

    page.reload()
    page.wait_for_selector(".answer .text:has-text('cba')")  # a reload loses nothing
    press_until(page, "input[name=chat-mode]")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("#chat-model-1", state="visible")
    press_until(page, "#chat-question")
    page.keyboard.type("xyz")
    page.keyboard.press("Enter")
    page.wait_for_selector(".answer >> nth=1 >> text=xyz")
    page.wait_for_selector(".answer >> nth=0 >> text=zyx")
    press_until(page, ".colour", "Shift+Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector(".pieces span.p4")
    press_until(page, ".pieces", "Shift+Tab")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector(".value:has-text('\"y\": +2 nats')")
    assert faults(page) == []

    press_until(page, "input[name=chat-mode]", "Shift+Tab")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("#blind-result", state="visible")
    press_until(page, "#chat-question")
    page.keyboard.type("which")
    page.keyboard.press("Enter")
    page.wait_for_selector("#vote-1:focus")
    shown = {page.inner_text("#blind-first"), page.inner_text("#blind-second")}
    assert shown == {"which", "hcihw"}
    page.keyboard.press("Enter")
    page.wait_for_selector("#chat-question:focus")
    press_until(page, "#blind-result", "Shift+Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("#blind-told:has-text('preferences.jsonl')")


def test_a_model_that_is_loaded_before_the_page_is_answered_can_be_asked(open_view: Any) -> None:
    page = open_view("chat")
    load(page)
    page.click("#chat-stop")
    page.wait_for_selector("#chat-question", state="hidden")
    let_come = held_back(page, "**/api/chat/start")
    page.click("#chat-start")
    page.wait_for_selector("#chat-question", state="visible")  # it was heard
    let_come()
    page.wait_for_timeout(300)
    ask(page, "abc", 1)
    assert page.inner_text(".answer .text") == "cba"


def test_a_question_that_is_typed_while_another_is_answered_blindly_stays(open_view: Any) -> None:
    page = open_view("chat")
    load(page)
    page.check("input[name=chat-mode][value=blind]")
    page.wait_for_selector("#blind-result", state="visible")
    let_come = held_back(page, "**/api/chat/blind/ask")
    page.fill("#chat-question", "one")
    page.keyboard.press("Enter")
    page.wait_for_selector("#chat-send:disabled")
    page.fill("#chat-question", "another")
    let_come()
    page.wait_for_selector("#vote-1:enabled")
    page.click("#vote-1")
    page.wait_for_selector("#chat-question", state="visible")
    assert page.input_value("#chat-question") == "another"


def test_a_name_that_is_typed_while_an_export_is_started_stays(open_view: Any) -> None:
    page = open_view("export")
    page.wait_for_selector("#export-source option", state="attached")
    page.fill("#export-name", "one-export")
    let_come = held_back(page, "**/api/export")
    page.click("#export-start")
    page.fill("#export-name", "the-next")
    let_come()
    page.wait_for_selector("li[data-job=one-export] .state:has-text('done')")
    page.wait_for_selector("#export-start:enabled")
    assert page.input_value("#export-name") == "the-next"


@pytest.mark.slow
def test_an_answer_is_stopped_and_the_server_ended(open_view: Any) -> None:
    page = open_view("chat")
    load(page)
    page.fill("#chat-question", "slow")
    page.keyboard.press("Enter")
    page.wait_for_selector(".answer .text:has-text('wols')")
    page.click("#chat-halt")
    page.wait_for_selector(".answer .bad:has-text('stopped')")
    page.click("#chat-stop")
    page.wait_for_selector("#chat-question", state="hidden")
    assert page.inner_text("#chat-state") == "not loaded"


@pytest.mark.slow
def test_an_export_goes_on_without_the_page_and_a_second_one_sees_it(open_view: Any) -> None:
    page = open_view("export")
    page.wait_for_selector("#export-source option", state="attached")
    page.fill("#export-name", "waits")
    page.click("#export-start")
    page.wait_for_selector("li[data-job=waits] progress")
    page.close()
    page = open_view("export", locale="zh-CN")
    page.wait_for_selector("li[data-job=waits] .state:has-text('进行中')")
    page.fill("#export-name", "second")
    page.click("#export-start")
    page.wait_for_selector("#export-problem:has-text('waits')")
    page.click("li[data-job=waits] .cancel")
    page.wait_for_selector("li[data-job=waits] .state:has-text('已取消')")
    for name, state in (("fails", "失败"), ("made", "完成")):
        page.fill("#export-name", name)
        page.click("#export-start")
        page.wait_for_selector(f"li[data-job={name}] .state:has-text('{state}')")
    page.wait_for_selector("li[data-job=fails] >> text=no room; make some")
    page.wait_for_selector("li[data-job=made] >> text=5 B")
    page.fill("#export-name", "made")
    page.click("#export-start")
    page.wait_for_selector("#export-name[aria-invalid=true]")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "locale", "scheme"), product(["desktop", "phone"], ["en-US", "zh-CN"], ["light", "dark"])
)
def test_axe_finds_no_serious_fault(open_view: Any, device: str, locale: str, scheme: str) -> None:
    view = DESKTOP if device == "desktop" else PHONE
    page = open_view("chat", **view, locale=locale, color_scheme=scheme)
    load(page)
    page.check("input[value=two]")
    ask(page, "abc", 2)
    page.click(".colour")
    page.wait_for_selector(".pieces span.p4")
    assert faults(page) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it is wider than the screen"
    page.check("input[value=blind]")
    page.wait_for_selector("#blind-result", state="visible")
    if page.is_hidden("#vote-1"):
        page.fill("#chat-question", "which")
        page.click("#chat-send")
        page.wait_for_selector("#vote-1", state="visible")
    assert faults(page) == []
    page.evaluate("location.hash = 'export'")
    name = f"made-{device}-{locale}-{scheme}".lower()
    page.fill("#export-name", name)
    page.click("#export-start")
    page.wait_for_selector(f"li[data-job={name}] .state.good")
    page.click(f"li[data-job={name}] button")
    page.wait_for_selector(f"li[data-job={name}] pre")
    assert faults(page) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it is wider than the screen"
