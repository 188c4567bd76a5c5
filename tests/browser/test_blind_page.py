"""The page for blind votes in Chromium: 20 pairs by keyboard, a reload in the middle, and what it says at the end."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from onecard.data.messages import Turn
from onecard.serve.web.votes import BlindVotes, VotedPair
from tests.browser.conftest import serving, wait_until

SHOTS = os.environ.get("ONECARD_BLIND_SHOTS")  # a folder for pictures to be looked at
NAMES = ("base", "outputs/mine")
TRICK = "<img src=https://evil.example/x onerror=alert(1)> better"


def pairs(n: int) -> list[VotedPair]:
    found = []
    for k in range(1, n + 1):
        turns = (Turn("user", f"Question {k}: what is 1/{k}?"),)
        found.append(VotedPair(str(k), turns, f"worse {k}, $\\frac{{1}}{{{k}}}$", f"{TRICK} {k}"))
    return found


def served(folder: Path, n: int) -> Any:
    from onecard.config.inference import PageOptions
    from onecard.serve.web import app as web

    return serving(web.blind_page(BlindVotes(folder, pairs(n), NAMES), PageOptions()))


def n_done(folder: Path) -> int:
    file = folder / "votes.json"
    return len(json.loads(file.read_text(encoding="utf-8"))["votes"]) if file.exists() else 0


def shows(page: Any, selector: str, text: str) -> None:
    """Wait until the part of the page holds the text."""
    told = "([selector, text]) => document.querySelector(selector).innerText.includes(text)"
    page.wait_for_function(told, arg=[selector, text])


def press(page: Any, key: str, folder: Path, after: int, word: str = "of") -> None:
    """Press a key, and wait until the vote is on the disk and the page shows it."""
    page.keyboard.press(key)
    wait_until(lambda: n_done(folder) == after, what=f"{after} votes")
    shows(page, "#oc-status", f"{after} {word}")


@pytest.mark.parametrize(
    "restarts",
    [pytest.param(False, id="reload"), pytest.param(True, id="server anew", marks=pytest.mark.slow)],
)
def test_twenty_pairs_by_keyboard(open_page: Any, tmp_path: Path, restarts: bool) -> None:
    """B is chosen in 14 pairs, A in 4, and 2 are ties; a vote for the wrong one is taken back."""
    votes = BlindVotes(tmp_path, pairs(20), NAMES)
    wanted = ["b"] * 14 + ["a"] * 4 + ["tie"] * 2

    def key_of(number: int) -> str:
        first = "b" if votes.b_is_first(str(number + 1)) else "a"
        return "0" if wanted[number] == "tie" else "1" if wanted[number] == first else "2"

    assert {key_of(number) for number in range(14)} == {"1", "2"}, "the order is mixed"
    with served(tmp_path, 20) as url:
        page = open_page(url, ready="#oc-key-1")
        assert page.is_hidden("#oc-result") and "outputs/mine" not in page.content()
        for number in range(9):
            expected = f"better {number + 1}" if key_of(number) == "1" else f"worse {number + 1}"
            shows(page, "#oc-answer-1", expected)
            press(page, key_of(number), tmp_path, number + 1)
        press(page, "0", tmp_path, 10)
        press(page, "u", tmp_path, 9)
        shows(page, "#oc-question", "Question 10")
        if not restarts:
            page.reload()
            page.wait_for_function("window.onecard && onecard.is_ready()")
            finish(page, tmp_path, key_of)
    if restarts:
        with served(tmp_path, 20) as url:
            finish(open_page(url, ready="#oc-key-1"), tmp_path, key_of)
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert (result["wins_a"], result["wins_b"], result["ties"], result["result"]) == (4, 14, 2, "better")
    rows = [json.loads(line) for line in (tmp_path / "preferences.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 18 and sum("better" in row["chosen"] for row in rows) == 14


def finish(page: Any, folder: Path, key_of: Any) -> None:
    shows(page, "#oc-question", "Question 10")
    for number in range(9, 20):
        press(page, key_of(number), folder, number + 1)
    page.wait_for_selector("#oc-result table")
    text = page.inner_text("#oc-result")
    assert "B was chosen in 78 %" in text and "B is better than A" in text and "18 preference pairs" in text
    page.wait_for_selector("#oc-votes", state="hidden")
    page.wait_for_selector("#oc-pair", state="hidden")


def test_the_result_is_told_on_request_and_words_change(open_page: Any, tmp_path: Path) -> None:
    with served(tmp_path, 3) as url:
        page = open_page(url, ready="#oc-key-1", locale="zh-CN")
        shows(page, "#oc-title", "哪个回答更好")
        page.wait_for_selector(".katex")
        assert page.locator("#oc-pair img").count() == 0
        assert "<img src=" in page.inner_text("#oc-pair").replace("\u200b", "")
        page.click("#oc-key-1")
        shows(page, "#oc-status", "已评 1 / 3")
        page.click("#oc-reveal")
        page.wait_for_selector("#oc-result table")
        assert "outputs/mine" in page.inner_text("#oc-result") and "没有超出噪声" in page.inner_text("#oc-result")
        page.click("#oc-language input")
        page.click("ul[role=listbox] li:has-text('English')")
        shows(page, "#oc-status", "1 of 3")
        assert n_done(tmp_path) == 1 and page.is_visible("#oc-key-0")


@pytest.mark.parametrize(("language", "width", "scheme"), [("en-US", 1280, "light"), ("zh-CN", 390, "dark")])
def test_it_fits(open_page: Any, tmp_path: Path, language: str, width: int, scheme: str) -> None:
    with served(tmp_path, 3) as url:
        size = {"width": width, "height": 844 if width < 500 else 800}
        page = open_page(url, ready="#oc-key-1", locale=language, viewport=size, color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("#oc-votes").bounding_box()["y"] < size["height"]
        if SHOTS:
            page.screenshot(path=f"{SHOTS}/blind_{language}_{scheme}.png")
            for number, key in enumerate("120", 1):
                press(page, key, tmp_path, number, word="of" if language == "en-US" else "/")
            page.screenshot(path=f"{SHOTS}/blind_{language}_{scheme}_end.png")
