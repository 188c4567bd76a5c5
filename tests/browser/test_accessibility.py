"""Both pages with a keyboard, a screen reader, a phone, an input method; axe-core looks for the rest."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest

from tests.browser.conftest import serving, wait_until
from tests.browser.test_chat_page import ask, at_rest, bubbles, choose, send
from tests.fake_engine import FakeEngine

PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
LYING = {"viewport": {"width": 740, "height": 360}, "is_mobile": True, "has_touch": True}
DESKTOP = {"viewport": {"width": 1366, "height": 768}}
# Buttons, fields and links that a person can aim at; a link in a sentence is excepted by WCAG 2.5.8.
SMALL = """(least) => [...document.querySelectorAll("button, [role=button], input:not([role=combobox]), textarea")]
  .filter((part) => part.offsetParent && part.getBoundingClientRect().width)
  .filter((part) => Math.min(part.getBoundingClientRect().width, part.getBoundingClientRect().height) < least)
  .map((part) => part.outerHTML.slice(0, 100))"""


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture(scope="module")
def chat_url(engine: FakeEngine) -> Iterator[str]:
    from onecard.config.inference import PageOptions, SamplingOptions
    from onecard.serve.web import app as web
    from onecard.serve.web import examples as page_examples

    sampling, examples = SamplingOptions(max_new_tokens=512), page_examples.first_messages()
    with serving(web.chat_page(engine, sampling, PageOptions(), examples=examples)) as address:
        yield address


@pytest.fixture(scope="module")
def ask_url(engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    from onecard.config.inference import PageOptions, SamplingOptions
    from onecard.serve.web import app as web
    from onecard.serve.web import examples as page_examples

    path = tmp_path_factory.mktemp("flags") / "flagged.jsonl"
    page = web.ask_page(engine, SamplingOptions(), PageOptions(), examples=page_examples.questions(), flag_path=path)
    with serving(page) as address:
        yield address


def faults(page: Any) -> list[str]:
    """What axe-core calls serious or critical on what is shown now."""
    axe = pytest.importorskip("axe_playwright_python.base", reason="axe-playwright-python brings axe-core along")
    if not page.evaluate("'axe' in window"):
        page.evaluate(axe.AXE_SCRIPT + "; 0")
    # What is still fading in has other colours for a moment; an animation without an end cannot be finished.
    page.evaluate("document.getAnimations().forEach((one) => { try { one.finish(); } catch {} })")
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    serious = [fault for fault in found if fault["impact"] in ("serious", "critical")]
    return [f"{fault['id']}: {node['html'][:160]} {node['any']}" for fault in serious for node in fault["nodes"]]


# Of twenty seconds each; the two fast ones have every value.
FAST = (("desktop", "en-US", "light"), ("phone", "zh-CN", "dark"))
LOOKS = [
    pytest.param(*look, marks=[pytest.mark.slow] * (look not in FAST))
    for look in product(["desktop", "phone"], ["en-US", "zh-CN"], ["light", "dark"])
]


@pytest.mark.parametrize(("device", "locale", "scheme"), LOOKS)
def test_axe_finds_no_serious_fault(
    open_page: Any, chat_url: str, ask_url: str, device: str, locale: str, scheme: str
) -> None:
    view = DESKTOP if device == "desktop" else PHONE
    page = open_page(chat_url, **view, locale=locale, color_scheme=scheme)
    assert faults(page) == []
    for text in ("A wide table", "A formula", "Show me code"):
        ask(page, text)
    send(page, "a long one")
    page.wait_for_selector("#oc-stop")
    page.wait_for_timeout(300)
    assert faults(page) == []
    page.keyboard.press("Escape")
    at_rest(page)
    page.click("#oc-adapter input")
    assert faults(page) == []

    page = open_page(ask_url, **view, locale=locale, color_scheme=scheme)
    page.fill("#oc-num_beams input[type=number]", "4")
    page.fill("#oc-seed input", "-5")
    page.check("#oc-show_beams input")
    page.fill("#oc-instruction textarea", "Say something")
    page.click("#oc-submit")
    page.locator("#oc-beams textarea:visible").nth(3).wait_for()
    at_rest(page)
    page.wait_for_timeout(300)
    assert page.locator("#oc-beams textarea:visible").count() == 4
    assert faults(page) == []


def test_a_keyboard_and_a_screen_reader_follow_the_chat(open_page: Any, chat_url: str, engine: FakeEngine) -> None:
    page = open_page(chat_url)
    ask(page, "who are you")
    live = page.locator("#oc-live")
    assert live.get_attribute("aria-live") == "polite"
    wait_until(lambda: live.inner_text().startswith("Model: I am tiny-llama"), what="the answer is read out")
    assert page.locator("#oc-chat .oc-unseen").all_inner_texts() == ["You:", "Model:"]
    assert page.locator("#oc-chat [role=log]").get_attribute("aria-live") == "off"
    engine.gate = threading.Semaphore(0)
    page.focus("#oc-regenerate")
    page.keyboard.press("Enter")
    try:
        wait_until(lambda: focused(page) == "oc-stop", what="the focus goes to Stop")
        assert live.inner_text() == "The model is answering."
    finally:
        engine.gate.release(1000)
        engine.gate = None
    at_rest(page)
    wait_until(lambda: focused(page) == "oc-submit", what="the focus goes from Stop to Send")
    send(page, "a long one")
    wait_until(lambda: "word2" in bubbles(page)[-1])
    page.focus("#oc-stop")
    page.keyboard.press("Escape")
    at_rest(page)
    assert "word399" not in bubbles(page)[-1]
    wait_until(lambda: focused(page) == "oc-submit", what="the focus is kept after Stop")
    page.fill("#oc-box textarea", "memory")
    page.keyboard.press("Enter")
    wait_until(lambda: "memory is full" in live.inner_text(), what="what went wrong is read out")


def focused(page: Any) -> str:
    return str(page.evaluate("document.activeElement.id"))


def test_enter_that_ends_a_composition_sends_nothing(open_page: Any, chat_url: str, engine: FakeEngine) -> None:
    page = open_page(chat_url)
    asked = len(engine.asked)
    page.focus("#oc-box textarea")
    client = page.context.new_cdp_session(page)
    client.send("Input.imeSetComposition", {"text": "nihao", "selectionStart": 5, "selectionEnd": 5})
    key = {"key": "Process", "code": "Enter", "windowsVirtualKeyCode": 229, "nativeVirtualKeyCode": 13}
    client.send("Input.dispatchKeyEvent", {"type": "rawKeyDown", **key})
    client.send("Input.insertText", {"text": "你好"})
    # Safari ends the composition first, and then tells of the key.
    page.evaluate("""() => {
      const box = document.querySelector("#oc-box textarea"), common = {key: "Enter", bubbles: true, cancelable: true};
      box.dispatchEvent(new KeyboardEvent("keydown", {...common, keyCode: 229}));
      box.dispatchEvent(new KeyboardEvent("keypress", {...common, keyCode: 13, charCode: 13}));
    }""")
    page.wait_for_timeout(500)
    assert (page.input_value("#oc-box textarea"), len(engine.asked)) == ("你好", asked)
    page.press("#oc-box textarea", "Enter")
    wait_until(lambda: len(engine.asked) == asked + 1)
    at_rest(page)


@pytest.mark.parametrize(("device", "least"), [(DESKTOP, 24), (PHONE, 24), (LYING, 24)], ids=["desk", "phone", "lying"])
def test_targets_are_large_enough(open_page: Any, chat_url: str, device: dict[str, Any], least: int) -> None:
    page = open_page(chat_url, **device)
    ask(page, "Show me code")
    assert page.evaluate(SMALL, least) == []
    if device is not DESKTOP:
        for name in ("submit", "regenerate", "undo", "clear", "save", "load", "theme"):
            assert page.locator(f"#oc-{name}").bounding_box()["height"] >= 44, name


def test_nothing_is_cut_off_on_a_phone_that_lies(open_page: Any, chat_url: str) -> None:
    page = open_page(chat_url, **LYING)
    ask(page, "Say something")
    for name in ("#oc-chat", "#oc-box", "#oc-submit", "#oc-regenerate", "#oc-load"):
        box = page.locator(name).bounding_box()
        assert box["y"] >= 0 and box["y"] + box["height"] <= 360 and box["x"] + box["width"] <= 740, (name, box)
    assert page.locator("#oc-chat").bounding_box()["height"] >= 100
    area = page.locator("#oc-box textarea")
    assert area.evaluate("(area) => area.scrollHeight <= area.clientHeight + 1")


@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
def test_the_hint_in_the_box_fits_on_a_phone(open_page: Any, chat_url: str, locale: str) -> None:
    page = open_page(chat_url, **PHONE, locale=locale)
    width = page.evaluate("""() => {
      const box = document.querySelector("#oc-box textarea"), pen = document.createElement("canvas").getContext("2d");
      pen.font = getComputedStyle(box).font;
      return box.clientWidth - 28 - pen.measureText(box.placeholder).width;
    }""")
    assert width >= 0


def test_a_chinese_page_speaks_chinese(open_page: Any, chat_url: str, ask_url: str) -> None:
    page = open_page(chat_url, locale="zh-CN")
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    examples = page.locator("#oc-chat .example-text")
    wait_until(lambda: all(any("\u4e00" <= sign <= "\u9fff" for sign in text) for text in examples.all_inner_texts()))
    assert examples.count() == 4
    page.click("#oc-undo")
    wait_until(lambda: "没有可以撤销的内容" in page.inner_text("#oc-note"))
    page = open_page(ask_url, locale="zh-CN")
    page.click("#oc-examples tr:has-text('塞尔维亚')")
    wait_until(lambda: page.input_value("#oc-input textarea") == "塞尔维亚")
    assert "Translate" not in page.inner_text("#oc-examples")
    choose(page, "language", "English")
    wait_until(lambda: "Translate morning" in page.inner_text("#oc-examples"))
    page.click("text=Translate morning into Chinese.")
    wait_until(lambda: "morning" in page.input_value("#oc-instruction textarea"))


def test_the_title_names_the_adapter_that_answers(open_page: Any, chat_url: str) -> None:
    page = open_page(chat_url)
    assert page.inner_text("#oc-model") == "tiny-llama"
    choose(page, "adapter", "pirate")
    wait_until(lambda: page.inner_text("#oc-model") == "pirate")
    ask(page, "who are you")
    assert page.inner_text("#oc-status").startswith("pirate")
    page.wait_for_timeout(300)
    page.reload()
    wait_until(lambda: page.inner_text("#oc-model") == "pirate", what="the adapter of before the reload is named")
    page.click("#oc-reset")
    wait_until(lambda: page.inner_text("#oc-model") == "tiny-llama")


@pytest.mark.parametrize(("name", "value"), [("seed", "-5"), ("seed", ""), ("temperature", "99")])
def test_a_value_that_cannot_be_used_is_named(open_page: Any, chat_url: str, name: str, value: str) -> None:
    page = open_page(chat_url)
    page.locator(f"#oc-{name} input[type=number]").fill(value)
    page.fill("#oc-box textarea", "Say something")
    page.press("#oc-box textarea", "Enter")
    page.wait_for_selector("#oc-note:has-text('is not allowed here'):visible, #oc-status:has-text('tokens/s')")
    at_rest(page)
    assert page.locator("[data-testid=toast-body]").count() == 0
    note = page.inner_text("#oc-note") if page.is_visible("#oc-note") else ""
    # The slider's own field moves into its bounds when it is left.
    assert "is not allowed here" in note or (name == "temperature" and note == "")
