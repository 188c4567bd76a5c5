"""The page for single questions, and a chat, in Chromium over the real engine: the tiny base model of the project."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from onecard.serve.web.sanitize import original
from tests.browser.conftest import held_back, serving, shot, wait_until

REPOSITORY = Path(__file__).resolve().parents[2]
PICTURES_OF = os.environ.get("ONECARD_SCREENSHOTS") or None  # a run directory, such as that of scripts/quickstart.sh


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    from onecard.config.base_model import ModelOptions
    from onecard.config.inference import InferenceOptions, LimitOptions
    from onecard.inference.engine import open_engine

    model = ModelOptions(
        model_path=str(REPOSITORY / "sample" / "tiny-llama"), bits=32, device="cpu", gradient_checkpointing=False
    )
    engine = open_engine(model, InferenceOptions(lora_path=PICTURES_OF), LimitOptions(max_beams=4))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def flagged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("flags") / "flagged.jsonl"


@pytest.fixture(scope="module")
def url(engine: Any, flagged: Path) -> Iterator[str]:
    from onecard.config.inference import PageOptions, SamplingOptions
    from onecard.serve.web import app as web
    from onecard.serve.web import examples as page_examples

    blocks = web.ask_page(
        engine, SamplingOptions(max_new_tokens=24), PageOptions(), examples=page_examples.questions(), flag_path=flagged
    )
    with serving(blocks) as address:
        yield address


def set_number(page: Any, name: str, value: float) -> None:
    box = page.locator(f"#oc-{name} input[type=number]")
    box.fill(str(value))
    box.press("Tab")


def finished(page: Any) -> str:
    """Waits for the answer's end: what the model wrote, from what the tab keeps."""
    wait_until(lambda: "tokens/s" in page.inner_text("#oc-status") and page.is_visible("#oc-submit"), 20)
    page.wait_for_timeout(400)
    return original(page.evaluate("JSON.parse(sessionStorage.getItem('onecard.question')).answer"))


def test_formulas_tables_and_code_are_drawn(open_page: Any) -> None:
    from onecard.config.inference import PageOptions, SamplingOptions
    from onecard.serve.web import app as web
    from tests.fake_engine import FORMULAS, FakeEngine

    engine = FakeEngine()
    with serving(web.ask_page(engine, SamplingOptions(), PageOptions())) as address:  # type: ignore[arg-type]
        page = open_page(address, locale="en-US")
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        answer = page.locator("#oc-answer")
        for question, drawn, n_drawn in (("formula", ".katex", 3), ("table", "td", 5), ("code", "pre code", 1)):
            n_ended = len(engine.ended)
            page.fill("#oc-instruction textarea", question)
            page.click("#oc-submit")
            wait_until(lambda n_ended=n_ended: len(engine.ended) > n_ended)
            parts = answer.locator(drawn)
            wait_until(lambda parts=parts, n_drawn=n_drawn: parts.count() == n_drawn, what=question)
            text = finished(page)
            assert parts.count() == n_drawn, question
            if question == "formula":
                assert text == FORMULAS
                page.click("#oc-answer button[title='Copy the answer']")
                assert page.evaluate("navigator.clipboard.readText()") == FORMULAS
                wait_until(lambda: r"\frac{-b \pm \sqrt{b^2}}{2a}" in page.inner_text("#oc-live"))
                assert answer.locator("img").count() == 0
        before = answer.inner_text()
        page.reload()
        wait_until(lambda: answer.inner_text() == before, what="the answer is there after a reload")


def test_a_question_with_all_beams(open_page: Any, url: str, engine: Any) -> None:
    from onecard.config.inference import SamplingOptions
    from onecard.data.messages import Turn
    from onecard.inference.engine import GenerationRequest

    page = open_page(url)
    page.click("text=Find the job in the text.")
    wait_until(lambda: "nurse" in page.input_value("#oc-input textarea"))
    set_number(page, "num_beams", 3)
    page.check("#oc-show_beams input")
    page.click("#oc-submit")
    answer = finished(page)
    turns = (Turn("user", "Find the job in the text.", page.input_value("#oc-input textarea")),)
    request = GenerationRequest(turns, sampling=SamplingOptions(max_new_tokens=24, num_beams=3), show_beams=True)
    last = list(engine.stream(request))[-1][0]
    assert answer == last.text
    assert page.locator("#oc-beams textarea:visible").count() == 3
    shown = page.locator("#oc-beams textarea:visible").evaluate_all("all => all.map(area => area.value)")
    assert tuple(shown) == last.beams


def test_what_is_typed_before_the_page_is_restored_stays(open_page: Any, url: str) -> None:
    page = open_page(url, locale="en-US")
    page.fill("#oc-instruction textarea", "of the last visit")
    set_number(page, "top_k", 41)
    wait_until(lambda: "last visit" in page.evaluate("sessionStorage.getItem('onecard.question') || ''"))
    let_come = held_back(page, "**/queue/join*")
    page.reload()
    page.wait_for_selector("#oc-submit")
    page.fill("#oc-instruction textarea", "last")  # a part of what comes back, as 4 is of 41
    page.locator("#oc-top_k input[type=range]").fill("4")
    set_number(page, "num_beams", 3)
    page.check("#oc-show_beams input")
    page.wait_for_timeout(500)  # until all that a page asks when it opens is held
    let_come()
    page.wait_for_function("onecard.is_ready()")
    wait_until(lambda: page.input_value("#oc-instruction textarea") == "last")
    assert page.input_value("#oc-top_k input[type=number]") == "4"
    assert page.input_value("#oc-num_beams input[type=number]") == "3"
    assert page.is_checked("#oc-show_beams input")
    wait_until(lambda: '"last"' in page.evaluate("sessionStorage.getItem('onecard.question')"))


def test_each_of_four_beams_can_be_read_on_every_screen(open_page: Any, url: str) -> None:
    page = open_page(url)
    set_number(page, "num_beams", 4)
    page.check("#oc-show_beams input")
    page.fill("#oc-instruction textarea", "Name three rivers.")
    page.click("#oc-submit")
    finished(page)
    beams = page.locator("#oc-beams textarea:visible")
    assert beams.count() == 4
    for (width, height), k in product([(1366, 768), (1440, 900), (740, 360), (390, 844)], range(4)):
        page.set_viewport_size({"width": width, "height": height})
        # With the wheel only: a script could also scroll what a person cannot.
        page.locator("#oc-beams").evaluate(
            "(frame, y) => { frame.scrollTop += y - frame.getBoundingClientRect().y - 45 }",
            beams.nth(k).bounding_box()["y"],
        )
        frame, area = page.locator("#oc-beams").bounding_box(), beams.nth(k).bounding_box()
        assert frame["x"] <= area["x"] and area["x"] + area["width"] <= frame["x"] + frame["width"] <= width
        assert area["y"] < frame["y"] + frame["height"] - 20 and area["y"] + area["height"] > frame["y"] + 20


def test_an_empty_question_leaves_the_answer_and_the_buttons(open_page: Any, url: str) -> None:
    page = open_page(url)
    page.fill("#oc-instruction textarea", "Name a colour.")
    page.click("#oc-submit")
    answer = finished(page)
    buttons = page.locator("button:visible").all_inner_texts()
    page.fill("#oc-instruction textarea", "")
    page.click("#oc-submit")
    assert finished(page) == answer
    assert page.locator("button:visible").all_inner_texts() == buttons


def test_a_reload_and_an_example_leave_what_was_typed(open_page: Any, url: str) -> None:
    page = open_page(url)
    typed = {"instruction": "Say <b>", "input": "my words", "comment": "half a comment", "system": "You are a parrot"}
    for name, text in typed.items():
        page.fill(f"#oc-{name} textarea", text)
    page.wait_for_timeout(400)
    page.reload()
    page.wait_for_function("window.onecard && onecard.is_ready()")
    assert {name: page.input_value(f"#oc-{name} textarea") for name in typed} == typed
    page.click("text=Find the job in the text.")
    page.click("#oc-reset")
    page.wait_for_timeout(800)
    assert {name: page.input_value(f"#oc-{name} textarea") for name in typed} == typed
    questions = open_page.questions
    assert len(questions) == 2 and "my words" in questions[0] and "You are a parrot" in questions[1]


def test_copy_and_flag(open_page: Any, url: str, flagged: Path) -> None:
    page = open_page(url)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click("#oc-flag")
    wait_until(lambda: page.is_visible("#oc-note") and "no finished answer" in page.inner_text("#oc-note"))
    assert not flagged.exists()
    page.fill("#oc-instruction textarea", "Translate morning into Chinese. <b>")
    page.click("#oc-submit")
    answer = finished(page)
    page.click("#oc-answer .top-panel button")
    assert page.evaluate("navigator.clipboard.readText()") == answer
    page.fill("#oc-comment textarea", "很好")
    page.click("#oc-flag")
    wait_until(lambda: "entry 1 of flagged.jsonl" in page.inner_text("#oc-note"))
    entry = json.loads(flagged.read_text(encoding="utf-8"))
    assert (entry["instruction"], entry["output"], entry["comment"]) == (
        "Translate morning into Chinese. <b>", answer, "很好",
    )  # fmt: skip
    assert entry["sampling"]["max_new_tokens"] == 24


def test_the_real_engine_in_a_chat(open_page: Any, engine: Any) -> None:
    from onecard.config.inference import PageOptions, SamplingOptions
    from onecard.serve.web import app as web
    from tests.browser.test_chat_page import ask, at_rest, bubbles, send

    sampling = SamplingOptions(max_new_tokens=400, min_new_tokens=400, temperature=1.0)
    with serving(web.chat_page(engine, sampling, PageOptions())) as address:
        page = open_page(address)
        send(page, "What is the capital of France?")
        wait_until(lambda: len(bubbles(page)) == 2 and len(bubbles(page)[-1]) > 30)
        page.click("#oc-stop")
        at_rest(page)
        partial = bubbles(page)[-1]
        assert "stopped" in page.inner_text("#oc-status")
        set_number(page, "min_new_tokens", 0)
        set_number(page, "max_new_tokens", 12)
        ask(page, "And the capital of Brazil?")
        assert bubbles(page)[1] == partial
        assert "context" in page.inner_text("#oc-status")


def test_a_password_is_asked_for(browser: Any, engine: Any) -> None:
    import httpx

    from onecard.config.inference import PageOptions, SamplingOptions
    from onecard.serve.web import app as web

    page = PageOptions(auth="me:secret")
    with serving(web.ask_page(engine, SamplingOptions(), page), auth="me:secret") as address:
        for path in ("config", "gradio_api/queue/data?session_hash=x"):
            assert httpx.get(address + path).status_code == 401, path
        refused = httpx.post(address + "gradio_api/queue/join", json={"fn_index": 0, "data": [], "session_hash": "x"})
        assert refused.status_code == 401
        assert httpx.post(address + "login", data={"username": "me", "password": "wrong"}).status_code == 400
        context = browser.new_context()
        tab = context.new_page()
        tab.goto(address)
        tab.fill("input[type=text], textarea", "me")
        tab.fill("input[type=password]", "secret")
        tab.click("button")
        tab.wait_for_selector("#oc-submit", timeout=20_000)
        context.close()


@pytest.mark.skipif(PICTURES_OF is None, reason="ONECARD_SCREENSHOTS=<run directory> renews the pictures in docs/")
def test_pictures_for_the_documents(open_page: Any, url: str, engine: Any) -> None:
    from onecard.config.inference import PageOptions, SamplingOptions
    from onecard.serve.web import app as web
    from tests.browser.test_chat_page import ask

    page = open_page(url, viewport={"width": 1280, "height": 940})
    page.click("text=Translate morning into Chinese.")
    wait_until(lambda: "morning" in page.input_value("#oc-instruction textarea"))
    set_number(page, "num_beams", 3)
    page.check("#oc-show_beams input")
    page.click("#oc-submit")
    finished(page)
    shot(page, "ask_beams.png")
    # One question each: what the quickstart teaches is single questions.
    english, chinese = ["What is the capital of France?"], ["法国的首都是哪里？"]
    phone = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
    dark = {"locale": "zh-CN", "color_scheme": "dark"}
    with serving(web.chat_page(engine, SamplingOptions(max_new_tokens=200), PageOptions())) as address:
        for name, options, questions in (
            ("chat.png", {"locale": "en-US"}, english), ("chat_zh_dark.png", dark, chinese),
            ("chat_phone.png", phone, english),
        ):  # fmt: skip
            page = open_page(address, **options)
            for question in questions:
                ask(page, question)
            shot(page, name)
