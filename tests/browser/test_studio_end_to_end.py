"""The studio from end to end, with the real programs on the embedded base, as a newcomer would use it.

From a file to a plan, a run that is asked while it trains, a chat beside the base, the table of runs, an export. Once
by mouse (the keyboard types texts and numbers), once by keyboard alone, each in English and in Chinese.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from onecard.console import say
from onecard.installation import SHIPPED
from tests.browser.conftest import Studio, press_until, serving_studio, set_option

pytestmark = pytest.mark.slow
LONGEST_S = 240  # from the opened page to an answer of the tuned model, on two cores
N_ROWS, N_STEPS = 120, 60
QUESTION = "What is the capital of Poland?"
LANGUAGES = [("en-US", "done"), ("zh-CN", "完成")]  # and the word for what has ended well
STEP_MS = 150_000  # of waiting for one thing; the machine may be busy


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[Studio]:
    """One on an empty folder, with a file of the sample's first rows to read."""
    rows = json.loads((SHIPPED / "sample" / "merge_sample.json").read_text(encoding="utf-8"))[:N_ROWS]
    (tmp_path / "rows.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    with serving_studio(tmp_path, data_root=[str(tmp_path)]) as found:
        yield found


class Stopwatch:
    """Says how long each part took."""

    def __init__(self) -> None:
        self.began = self.last = time.monotonic()

    def passed(self, part: str) -> float:
        """Seconds since the beginning."""
        now = time.monotonic()
        say(f"{part}: {now - self.last:.1f} s, {now - self.began:.1f} s since the page opened")
        self.last = now
        return now - self.began


@pytest.mark.parametrize(("locale", "done"), LANGUAGES)
def test_by_mouse(open_view: Any, studio: Studio, tmp_path: Path, locale: str, done: str) -> None:
    stopwatch, page = Stopwatch(), open_view("data", locale=locale)
    page.set_default_timeout(STEP_MS)
    page.set_input_files("#view-data input[type=file]", tmp_path / "rows.json")
    page.wait_for_selector("#view-data .sources .name")
    page.click("#read-data")
    page.wait_for_selector("#view-data .tokens .token")
    stopwatch.passed("the data are read")
    page.click("#use-data")
    page.wait_for_selector("#view-model .stack")
    stopwatch.passed("the plan is made")
    page.click("#use-plan")
    page.fill("#run-name", "mine")
    set_option(page, "max_steps", str(N_STEPS))
    page.wait_for_selector(f"#command:has-text('--max_steps={N_STEPS}')")
    page.click("#add-run")
    page.wait_for_selector("#question", state="visible")
    stopwatch.passed("it trains")
    page.fill("#question", QUESTION)
    page.click("#ask")
    page.wait_for_selector(f"#view-train caption:has-text('{QUESTION}')")
    stopwatch.passed("the running training has answered")
    page.wait_for_selector(f"ol.queue .badge:has-text('{done}')")
    page.wait_for_selector("#chart-loss canvas")
    stopwatch.passed("it is trained")

    page.click("#tab-chat")
    page.wait_for_selector("#chat-source option[value=mine]", state="attached")
    page.click("#chat-start")
    page.wait_for_selector("#chat-question", state="visible")
    page.fill("#chat-question", QUESTION)
    page.click("#chat-send")
    page.wait_for_selector(".answer[aria-busy=false] .text")
    assert page.inner_text(".answer .text").strip()
    assert stopwatch.passed("the tuned model has answered") < LONGEST_S
    page.check("input[value=two]")
    page.fill("#chat-question", QUESTION)
    page.click("#chat-send")
    page.wait_for_selector(".answer[aria-busy=false] >> nth=1")
    page.click("button.colour")
    page.wait_for_selector(".pieces span")
    stopwatch.passed("both have answered, and the difference is shown")

    page.click("#tab-runs")
    page.click("#runs button:has-text('mine')")
    page.wait_for_selector("#details-title:has-text('mine')")
    page.click("#tab-export")
    page.wait_for_selector("#export-source option[value=mine]", state="attached")
    page.click("#export-start")
    page.wait_for_selector(f"li[data-job=mine-merge] .state:has-text('{done}')")
    stopwatch.passed("it is exported")
    assert list((studio.context.output_root / "mine-merge").glob("*.safetensors"))


@pytest.mark.parametrize(("locale", "done"), LANGUAGES)
def test_by_keyboard(open_view: Any, studio: Studio, tmp_path: Path, locale: str, done: str) -> None:
    stopwatch, page = Stopwatch(), open_view("data", locale=locale)
    page.set_default_timeout(STEP_MS)
    keys = page.keyboard
    press_until(page, "#data-name")
    keys.type(str(tmp_path / "rows.json"))
    keys.press("Enter")
    page.wait_for_selector("#view-data .sources .name")
    press_until(page, "#read-data")
    keys.press("Enter")
    page.wait_for_selector("#view-data .tokens .token")
    stopwatch.passed("the data are read")
    press_until(page, "#use-data")
    keys.press("Enter")
    page.wait_for_selector("#tab-model:focus")
    page.wait_for_selector("#view-model .stack")
    stopwatch.passed("the plan is made")
    press_until(page, "#use-plan")
    keys.press("Enter")
    page.wait_for_selector("#tab-train:focus")
    press_until(page, "#run-name")
    keys.type("mine")
    press_until(page, "#more-options")
    keys.type("max_steps")
    keys.press("Enter")
    page.wait_for_selector("#opt-max_steps:focus")
    keys.type(str(N_STEPS))
    keys.press("Tab")
    page.wait_for_selector(f"#command:has-text('--max_steps={N_STEPS}')")
    press_until(page, "#add-run")
    keys.press("Enter")
    page.wait_for_selector("#question", state="visible")
    stopwatch.passed("it trains")
    press_until(page, "#question")
    keys.type(QUESTION)
    keys.press("Enter")
    page.wait_for_selector(f"#view-train caption:has-text('{QUESTION}')")
    assert page.evaluate("document.activeElement.id") == "question"
    stopwatch.passed("the running training has answered")
    page.wait_for_selector(f"ol.queue .badge:has-text('{done}')")
    page.wait_for_selector("#chart-loss canvas")
    stopwatch.passed("it is trained")

    press_until(page, "#tab-train", "Shift+Tab")
    for _ in range(2):
        keys.press("ArrowRight")
    page.wait_for_selector("#tab-chat:focus")
    page.wait_for_selector("#chat-source option[value=mine]", state="attached")
    press_until(page, "#chat-start")
    keys.press("Enter")
    page.wait_for_selector("#chat-question:focus")
    keys.type(QUESTION)
    keys.press("Enter")
    page.wait_for_selector(".answer[aria-busy=false] .text")
    assert page.inner_text(".answer .text").strip()
    assert stopwatch.passed("the tuned model has answered") < LONGEST_S
    press_until(page, "input[name=chat-mode]", "Shift+Tab")
    keys.press("ArrowRight")
    press_until(page, "#chat-question")
    keys.type(QUESTION)
    keys.press("Enter")
    page.wait_for_selector(".answer[aria-busy=false] >> nth=1")
    press_until(page, "button.colour", "Shift+Tab")
    keys.press("Enter")
    page.wait_for_selector(".pieces span")
    stopwatch.passed("both have answered, and the difference is shown")

    press_until(page, "#tab-chat", "Shift+Tab")
    keys.press("ArrowLeft")
    page.wait_for_selector("#runs button:has-text('mine')")
    press_until(page, "#runs button.link")
    keys.press("Enter")
    page.wait_for_selector("#details-title:focus")
    press_until(page, "#tab-runs", "Shift+Tab")
    keys.press("End")
    page.wait_for_selector("#export-source option[value=mine]", state="attached")
    press_until(page, "#export-start")
    keys.press("Enter")
    page.wait_for_selector(f"li[data-job=mine-merge] .state:has-text('{done}')")
    stopwatch.passed("it is exported")
    assert list((studio.context.output_root / "mine-merge").glob("*.safetensors"))
