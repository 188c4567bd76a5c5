"""The chat page as a person meets it, in Chromium; what is said comes from the fake engine of tests."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.browser.conftest import serving, wait_until
from tests.fake_engine import FORMULAS, FakeEngine
from tests.faults.fork_server import ForkServer, Start
from tests.launching import free_port

SAYS = FakeEngine().script.say
WATCH = """
window.states = [];
new MutationObserver(() => {
  const text = [...document.querySelectorAll("#oc-chat .bot.message")].map((e) => e.innerText.trim()).pop() || "…";
  if (text !== "…" && text !== window.states.at(-1)) window.states.push(text);
}).observe(document.querySelector("#oc-chat"), {subtree: true, childList: true, characterData: true});
"""
# So many messages are kept, nothing is typed, and the end of the last one is drawn: markup and marks go, letters stay.
ANSWERED = r"""(n) => {
  const value = (name) => document.querySelector(`#oc-${name} textarea`).value, kept = value("kept-chat");
  const messages = kept ? JSON.parse(kept).messages : [], submit = document.querySelector("#oc-submit");
  if (messages.length !== n || value("box") || !submit || !submit.offsetParent) return false;
  const letters = (text) => text.replace(/[^\p{L}\p{N}]/gu, "");
  const shown = [...document.querySelectorAll("#oc-chat .message-row .message")].at(-1);
  return Boolean(shown) && letters(shown.innerText).includes(letters(messages.at(-1).content).slice(-8));
}"""


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture(scope="module")
def url(engine: FakeEngine) -> Iterator[str]:
    from onecard.config.inference import PageOptions, SamplingOptions
    from onecard.serve.web import app as web

    sampling = SamplingOptions(max_new_tokens=512, temperature=0.7, top_p=0.9)
    examples = ["Say something", "Show me code"]
    with serving(web.chat_page(engine, sampling, PageOptions(), examples=examples)) as address:
        yield address


@pytest.fixture(autouse=True)
def quiet(engine: FakeEngine) -> Iterator[None]:
    """Each test begins and ends with nobody talking."""
    yield
    wait_until(lambda: len(engine.ended) >= len(engine.asked) - len(engine.refused), 15, "all answers end")


def send(page: Any, text: str) -> None:
    page.fill("#oc-box textarea", text)
    page.press("#oc-box textarea", "Enter")


def ask(page: Any, text: str) -> str:
    """Send, wait for the end, and return the last answer as it is shown."""
    n_messages = n_kept(page) + 2
    send(page, text)
    page.wait_for_function(ANSWERED, arg=n_messages)
    return bubbles(page)[-1]


def n_kept(page: Any) -> int:
    """How many messages the page has in its memory, where an answer arrives when it is whole."""
    text = page.input_value("#oc-kept-chat textarea")
    return len(json.loads(text)["messages"]) if text else 0


def at_rest(page: Any) -> None:
    page.wait_for_selector("#oc-submit", timeout=20_000)


def bubbles(page: Any) -> list[str]:
    """What is said, from the first bubble to the last."""
    texts = page.locator("#oc-chat .message-row .message").all_inner_texts()
    return [text.strip() for text in texts]


def note(page: Any) -> str:
    return page.inner_text("#oc-note") if page.is_visible("#oc-note") else ""


def note_says(page: Any, words: str) -> None:
    wait_until(lambda: words in note(page), 5, f"the note says {words!r}, not {note(page)!r}")


def set_number(page: Any, name: str, value: float) -> None:
    box = page.locator(f"#oc-{name} input[type=number]")
    box.fill(str(value))
    box.press("Tab")


def choose(page: Any, name: str, option: str) -> None:
    page.click(f"#oc-{name} input")
    page.click(f"ul[role=listbox] li:has-text('{option}')")


def test_an_answer_is_typed_live(open_page: Any, url: str, engine: FakeEngine) -> None:
    """Each of the first words is on the page before the next one is there to be said."""
    page = open_page(url)
    page.evaluate(WATCH)
    engine.gate = threading.Semaphore(0)
    try:
        send(page, "Say something")
        for number in range(1, 6):
            begun = " ".join(SAYS.split(" ")[:number])
            wait_until(lambda begun=begun: bubbles(page)[-1:] == [begun])
            engine.gate.release()
    finally:
        engine.gate.release(len(SAYS))
        engine.gate = None
    wait_until(lambda: n_kept(page) == 2, 15, "the whole answer")
    at_rest(page)
    texts = page.evaluate("window.states")
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    assert texts[-1] == SAYS
    status = page.inner_text("#oc-status")
    assert "tokens/s" in status
    assert "of 2048 tokens" in status


def test_enter_in_the_empty_box_leaves_everything_as_it_is(open_page: Any, url: str) -> None:
    page = open_page(url)
    answer = ask(page, "Say something")
    kept, buttons = page.input_value("#oc-kept-chat textarea"), page.locator("button:visible").all_inner_texts()
    for text in ("", "   "):
        send(page, text)
        page.click("#oc-submit")
        page.wait_for_timeout(700)
        assert bubbles(page)[-1] == answer
        assert page.input_value("#oc-kept-chat textarea") == kept
        assert page.locator("button:visible").all_inner_texts() == buttons
    assert ask(page, "who").startswith("I am tiny-llama")
    assert n_kept(page) == 4


def test_stop_keeps_what_was_said(open_page: Any, url: str, engine: FakeEngine) -> None:
    page = open_page(url)
    send(page, "a long one")
    wait_until(lambda: "word5" in str(bubbles(page)[-1:]))
    page.click("#oc-stop")
    at_rest(page)
    partial = bubbles(page)[-1]
    assert partial.startswith("word0 word1") and "word399" not in partial  # 400 words take 12 seconds
    assert "stopped" in page.inner_text("#oc-status")
    assert engine.ended[-1] == "cancelled"
    assert ask(page, "who").startswith("I am tiny-llama")
    assert partial == bubbles(page)[1]


def test_a_second_message_waits_for_the_first(open_page: Any, url: str, engine: FakeEngine) -> None:
    page = open_page(url)
    send(page, "a long one")
    wait_until(lambda: "word3" in str(bubbles(page)[-1:]))
    asked = len(engine.asked)
    send(page, "and now?")
    page.wait_for_selector(".toast-body:has-text('still answering')")
    assert page.input_value("#oc-box textarea") == "and now?"
    assert len(engine.asked) == asked
    page.click("#oc-stop")
    at_rest(page)
    assert len(bubbles(page)) == 2


def test_regenerate_undo_edit_clear(open_page: Any, url: str, engine: FakeEngine) -> None:
    page = open_page(url)
    assert ask(page, "First") == SAYS
    page.click("#oc-regenerate")
    wait_until(lambda: bubbles(page)[-1].endswith("(attempt 1)"))
    at_rest(page)
    assert len(bubbles(page)) == 2
    ask(page, "Second")
    page.click("#oc-undo")
    wait_until(lambda: len(bubbles(page)) == 2)
    assert page.input_value("#oc-box textarea") == "Second"
    page.fill("#oc-box textarea", "")
    ask(page, "Third <b>")
    page.locator("#oc-chat .message-buttons-right button[title=Edit]").first.click()
    box = page.locator("#oc-chat .edit-textarea")
    box.fill("who <i>are you</i>?")
    page.locator("#oc-chat button[title=Submit]").first.click()
    wait_until(lambda: bubbles(page)[-1:] and bubbles(page)[-1].startswith("I am"))
    at_rest(page)
    assert len(bubbles(page)) == 2
    assert engine.asked[-1].turns[-1].content == "who <i>are you</i>?"
    before = bubbles(page)
    page.click("#oc-clear")
    note_says(page, "Undo brings it back")
    assert bubbles(page) == []
    page.wait_for_timeout(300)
    page.reload()
    page.wait_for_function("window.onecard && onecard.is_ready()")
    page.click("#oc-undo")
    wait_until(lambda: bubbles(page) == before)


def test_save_and_load(open_page: Any, url: str, tmp_path: Path) -> None:
    page = open_page(url)
    page.fill("#oc-system textarea", "You are a parrot")
    set_number(page, "temperature", 1.2)
    ask(page, "Remember <me> & 猫")
    with page.expect_download() as download:
        page.click("#oc-save")
    file = tmp_path / download.value.suggested_filename
    download.value.save_as(file)
    assert file.name.startswith("onecard-chat-") and file.suffix == ".json"
    saved = json.loads(file.read_text(encoding="utf-8"))
    assert saved["messages"] == [
        {"role": "user", "content": "Remember <me> & 猫"}, {"role": "assistant", "content": SAYS},
    ]  # fmt: skip
    assert (saved["system"], saved["sampling"]["temperature"]) == ("You are a parrot", 1.2)

    other = open_page(url)
    load(other, file)
    wait_until(lambda: len(bubbles(other)) == 2)
    assert bubbles(other) == bubbles(page)
    assert other.input_value("#oc-system textarea") == "You are a parrot"
    assert other.input_value("#oc-temperature input[type=number]") == "1.2"
    note_says(other, "Loaded 2 messages")

    broken = tmp_path / "broken.json"
    broken.write_text('{"messages": [{"role": "assistant", "content": "I speak first"}]}', encoding="utf-8")
    load(other, broken)
    note_says(other, "the user begins")
    assert len(bubbles(other)) == 2


def load(page: Any, file: Path) -> None:
    with page.expect_file_chooser() as chooser:
        page.click("#oc-load")
    chooser.value.set_files(str(file))


def test_reload_keeps_the_chat_and_the_settings(open_page: Any, url: str) -> None:
    page = open_page(url)
    ask(page, "First <one>")
    page.fill("#oc-box textarea", "half typed")
    set_number(page, "top_k", 40)
    page.wait_for_timeout(300)
    before = bubbles(page)
    page.reload()
    wait_until(lambda: bubbles(page) == before)
    wait_until(lambda: page.input_value("#oc-box textarea") == "half typed")
    assert page.input_value("#oc-top_k input[type=number]") == "40"
    assert ask(page, "who are you") == "I am tiny-llama, told: First <\u200bone>"


def fields(page: Any) -> tuple[str, str]:
    """What stands in the system text and in the box."""
    return page.input_value("#oc-system textarea"), page.input_value("#oc-box textarea")


@pytest.mark.parametrize("agree", [False, True])
def test_typed_text_is_replaced_only_when_the_person_agrees(
    open_page: Any, url: str, tmp_path: Path, agree: bool
) -> None:
    page = open_page(url)
    example = "#oc-chat button:has-text('Show me code')"
    open_page.agree = agree
    page.click("#oc-reset")
    page.click("#oc-chat button:has-text('Say something')")
    wait_until(lambda: page.input_value("#oc-box textarea") == "Say something")
    page.click(example)
    wait_until(lambda: page.input_value("#oc-box textarea") == "Show me code", what="an example is no typed text")
    assert open_page.questions == []
    file = tmp_path / "chat.json"
    file.write_text('{"system": "A parrot", "messages": [{"role": "user", "content": "Hi"}]}', encoding="utf-8")
    steps = [("reset", lambda: page.click("#oc-reset")), ("example", lambda: page.click(example))]
    for number, (name, step) in enumerate([*steps, ("load", lambda: load(page, file))], 1):
        page.fill("#oc-box textarea", "my words")
        page.fill("#oc-system textarea", "You are a pirate")
        step()
        wait_until(lambda number=number: page.wait_for_timeout(100) or len(open_page.questions) == number, what=name)
        replaced = {"reset": ("", "my words"), "example": ("You are a pirate", "Show me code")}
        wanted = replaced.get(name, ("A parrot", "my words")) if agree else ("You are a pirate", "my words")
        wait_until(lambda wanted=wanted: fields(page) == wanted, what=f"{name}: {wanted}")
        page.wait_for_timeout(400)
        assert fields(page) == wanted  # still
    wait_until(lambda: len(bubbles(page)) == agree)
    assert ["my words" in question for question in open_page.questions] == [False, True, False]


def test_what_comes_back_to_the_box_leaves_what_was_typed_there(open_page: Any, url: str) -> None:
    page = open_page(url)
    ask(page, "First")
    page.fill("#oc-box textarea", "typed")
    page.click("#oc-undo")
    wait_until(lambda: page.input_value("#oc-box textarea") == "First\n\ntyped")
    page.fill("#oc-box textarea", "")
    ask(page, "Second")
    page.locator("#oc-chat .message-buttons-right button[title=Edit]").first.click()
    page.locator("#oc-chat .edit-textarea").fill("memory of <b>")
    page.locator("#oc-chat button[title=Submit]").first.click()
    note_says(page, "memory is full")
    wait_until(lambda: page.input_value("#oc-box textarea") == "memory of <b>", what="an edit that failed comes back")
    page.fill("#oc-box textarea", "")
    with page.expect_request(lambda request: "/queue/join" in request.url):  # the note of before is still there
        send(page, "memory please")
    page.wait_for_timeout(300)
    at_rest(page)
    wait_until(lambda: page.is_visible("#oc-note") and page.input_value("#oc-box textarea") == "memory please")
    page.wait_for_timeout(300)
    assert page.input_value("#oc-box textarea") == "memory please"


def test_another_page_and_back_and_a_closed_tab_lose_nothing(open_page: Any, url: str) -> None:
    page = open_page(url)
    ask(page, "First")
    before = bubbles(page)
    page.fill("#oc-box textarea", "half typed")
    page.wait_for_timeout(300)
    page.goto("about:blank")
    page.go_back()
    wait_until(lambda: page.query_selector("#oc-box") and page.input_value("#oc-box textarea") == "half typed")
    assert bubbles(page) == before
    page.click("#oc-clear")
    wait_until(lambda: bubbles(page) == [])
    page.wait_for_timeout(300)
    page.close()
    other = open_page(url)
    wait_until(lambda: other.input_value("#oc-box textarea") == "half typed", what="the words of the closed tab")


def test_text_is_pasted_plain_and_a_dropped_file_does_not_open(open_page: Any, url: str) -> None:
    page = open_page(url)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.evaluate("""() => {
      const part = (text, type) => new Blob([text], {type});
      const item = {"text/html": part("<b>bold</b> text", "text/html"), "text/plain": part("bold text", "text/plain")};
      return navigator.clipboard.write([new ClipboardItem(item)]);
    }""")
    page.focus("#oc-box textarea")
    page.keyboard.press("Control+V")
    wait_until(lambda: page.input_value("#oc-box textarea") == "bold text")
    stopped = page.evaluate("""() => {
      const file = new DataTransfer(), text = new DataTransfer();
      file.items.add(new File(["{}"], "chat.json", {type: "application/json"}));
      text.setData("text/plain", "words");
      const drop = (where, name, data) => !document.querySelector(where).dispatchEvent(
        new DragEvent(name, {dataTransfer: data, bubbles: true, cancelable: true}));
      const places = ["#oc-box textarea", "#oc-chat", "body"], names = ["dragover", "drop"];
      return [file, text].map((data) => places.flatMap((place) => names.map((name) => drop(place, name, data))));
    }""")
    assert stopped == [[True] * 6, [False] * 6], "files are stopped, words may be dropped"


def test_reload_while_it_answers_keeps_the_piece(open_page: Any, url: str, engine: FakeEngine) -> None:
    page = open_page(url)
    send(page, "a long one")
    wait_until(lambda: "word9" in str(bubbles(page)[-1:]))
    ended = len(engine.ended)
    page.reload()
    wait_until(lambda: len(engine.ended) > ended, 2, "the reload cancels")
    assert engine.ended[-1] == "cancelled"
    wait_until(lambda: len(bubbles(page)) == 2)
    partial = bubbles(page)[-1]
    assert partial.startswith("word0 word1 word2") and "word399" not in partial
    page.wait_for_function("window.onecard && onecard.is_ready()")
    page.click("#oc-regenerate")
    wait_until(lambda: page.is_visible("#oc-stop"))
    page.click("#oc-stop")
    at_rest(page)


def test_a_closed_page_cancels_within_a_second(open_page: Any, url: str, engine: FakeEngine) -> None:
    page = open_page(url)
    send(page, "a long one")
    wait_until(lambda: "word3" in str(bubbles(page)[-1:]))
    ended = len(engine.ended)
    page.close()
    wait_until(lambda: len(engine.ended) > ended, 1.0, "closing the page cancels")
    assert engine.ended[-1] == "cancelled"


def test_two_tabs_do_not_disturb_each_other(open_page: Any, url: str) -> None:
    one = open_page(url)
    two = open_page(url)
    assert bubbles(two) == []
    send(one, "a long one")
    wait_until(lambda: "word3" in str(bubbles(one)[-1:]))
    send(two, "From the second tab")
    wait_until(lambda: "in front of you" in two.inner_text("#oc-status"), 5, "the place in the queue is shown")
    one.bring_to_front()
    one.click("#oc-stop")
    wait_until(lambda: bubbles(two)[-1] == SAYS)
    at_rest(two)
    for tab, first in ((one, "a long one"), (two, "From the second tab")):
        tab.reload()
        wait_until(lambda tab=tab, first=first: bubbles(tab)[:1] == [first])
        assert len(bubbles(tab)) == 2
    kept = bubbles(two)
    two.close()
    three = open_page(url)  # a tab that is opened anew takes up the chat that nobody has open
    wait_until(lambda: bubbles(three) == kept)


def test_what_a_model_says_is_never_run_or_fetched(open_page: Any, url: str) -> None:
    page = open_page(url)
    ask(page, "Something hostile <img src=http://evil.example/x.png onerror='window.hacked=5'>")
    wait_until(lambda: "entity" in bubbles(page)[-1], 15, "the end of the answer is drawn")
    shown = bubbles(page)[-1]
    assert "<" in shown and "script>window.hacked = 1" in shown
    page.wait_for_timeout(300)
    assert page.evaluate("window.hacked") is None
    for tag in ("img", "script", "iframe", "b", "svg.mermaid"):
        assert page.locator(f"#oc-chat .message .prose {tag}, #oc-chat .message .md {tag}").count() == 0, tag
    links = page.eval_on_selector_all("#oc-chat .message a", "all => all.map(a => a.getAttribute('href'))")
    assert links and all(link is None or link.startswith("http://evil.example/") for link in links)
    page.evaluate("window.stopped = []; addEventListener('securitypolicyviolation', e => stopped.push(e.blockedURI))")
    page.evaluate("new Image().src = 'http://127.0.0.2:9/x.png'; fetch('http://127.0.0.2:9/y').catch(() => 0); 0")
    page.wait_for_function("stopped.length === 2")  # the policy stops it, wherever it came from
    assert set(open_page.errors) <= {"http://127.0.0.2:9/x.png", "http://127.0.0.2:9/y"}
    open_page.errors.clear()


def test_code_is_shown_as_it_was_written(open_page: Any, url: str) -> None:
    page = open_page(url)
    ask(page, "What is the capital of France?")
    ask(page, "Show me code")
    assert page.inner_text("#oc-chat .message pre code").strip() == "if a < b:\n    print('<b>')"
    assert "a < b & c" in bubbles(page)[-1]
    box, chat = page.locator("#oc-box").bounding_box(), page.locator("#oc-chat").bounding_box()
    assert 0 < box["y"] - chat["y"] - chat["height"] < 60, "the chat fills the room above the box"


def test_what_is_copied_is_what_was_written(open_page: Any, url: str) -> None:
    page = open_page(url)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    ask(page, "Show me ![x](y) &amp; <b>")
    assert "\u200b" in page.locator("#oc-chat .message").first.inner_text()  # so there is something to lose
    page.click("#oc-chat button[title='Copy message'] >> nth=0")
    assert page.evaluate("navigator.clipboard.readText()") == "Show me ![x](y) &amp; <b>"
    page.evaluate("getSelection().selectAllChildren(document.querySelector('#oc-chat .message'))")
    page.keyboard.press("Control+c")
    assert page.evaluate("navigator.clipboard.readText()").strip() == "Show me !x &amp; <b>"  # as it is drawn


def test_formulas_are_drawn_with_the_server_s_own_files(open_page: Any, url: str) -> None:
    page = open_page(url)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    shown = ask(page, "A formula")
    page.wait_for_selector("#oc-chat .katex")
    assert page.locator("#oc-chat .bot.message .katex").count() == 3
    assert page.locator("#oc-chat .bot.message .katex-display").count() == 2
    assert page.locator("#oc-chat .bot.message pre .katex, #oc-chat .message img, .katex-error").count() == 0
    assert "costs $5 and $6" in shown and r"\frac{1}{3" in shown and r"\(y\)" in shown
    assert page.evaluate("document.fonts.check('16px KaTeX_Main')")
    page.click("#oc-chat button[title='Copy message'] >> nth=1")
    assert page.evaluate("navigator.clipboard.readText()") == FORMULAS
    page.evaluate("getSelection().selectAllChildren(document.querySelector('#oc-chat .bot.message p'))")
    page.keyboard.press("Control+c")
    assert page.evaluate("navigator.clipboard.readText()").startswith(
        r"It is $x = \frac{-b \pm \sqrt{b^2}}{2a}$ and costs"
    )


def test_a_wide_table_scrolls_in_its_bubble(open_page: Any, url: str) -> None:
    page = open_page(url, viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    ask(page, "A wide table")
    table = page.locator("#oc-chat .message table")
    assert table.evaluate("(table) => table.scrollWidth > table.clientWidth + 50")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    words = page.locator("#oc-chat td").first
    assert words.bounding_box()["height"] < 80, "words are not broken letter by letter"


def test_chinese_and_dark(open_page: Any, url: str) -> None:
    page = open_page(url, locale="zh-CN", color_scheme="dark")
    wait_until(lambda: page.inner_text("#oc-submit") == "发送")
    assert "只在累计概率" in page.inner_text("#oc-top_p")
    assert page.evaluate("document.body.classList.contains('dark')")
    ask(page, "你好")
    send(page, "memory")
    note_says(page, "内存已满")
    choose(page, "language", "English")
    wait_until(lambda: page.inner_text("#oc-submit") == "Send")
    page.click("#oc-theme")
    page.reload()
    page.wait_for_function("window.onecard && onecard.is_ready()")
    assert page.inner_text("#oc-submit") == "Send"
    assert not page.evaluate("document.body.classList.contains('dark')")


def test_a_full_queue_loses_nothing(open_page: Any, url: str, engine: FakeEngine) -> None:
    # In two contexts: each opens six connections to one server, and each page that listens takes two.
    pages = [open_page(url, color_scheme=scheme) for scheme in ("light", "dark") for _ in range(2)]
    for number, page in enumerate(pages[:3]):
        send(page, f"a long one {number}")
        wait_until(lambda page=page: page.is_visible("#oc-stop"))
    wait_until(lambda: engine.queue.n_waiting == 2)
    send(pages[3], "Am I too many?")
    note_says(pages[3], "your message was not sent")
    assert pages[3].input_value("#oc-box textarea") == "Am I too many?"
    assert bubbles(pages[3]) == []
    for page in pages[:3]:
        page.bring_to_front()  # behind others a page is drawn once a second, and a click waits for two drawings
        page.click("#oc-stop")
    for page in pages[:3]:
        at_rest(page)
    assert ask(pages[3], "Am I too many?") == SAYS
    assert note(pages[3]) == ""


def test_out_of_memory_and_the_next_answer(open_page: Any, url: str) -> None:
    page = open_page(url)
    send(page, "memory please")
    note_says(page, "Lower Max new tokens or Beams")
    assert page.input_value("#oc-box textarea") == "memory please"
    send(page, "half of it")
    note_says(page, "What was written before is kept")
    at_rest(page)
    assert bubbles(page) == ["half of it", "The quick brown fox"]
    send(page, "broken")
    note_says(page, "ValueError: nobody foresaw this")
    assert ask(page, "Go on") == SAYS


def test_settings_reach_the_engine_and_can_be_reset(open_page: Any, url: str, engine: FakeEngine) -> None:
    page = open_page(url)
    values = {
        "temperature": 0.25, "top_p": 0.5, "top_k": 12, "num_beams": 3, "max_new_tokens": 6, "min_new_tokens": 2,
        "repetition_penalty": 1.3, "no_repeat_ngram_size": 4, "seed": 7,
    }  # fmt: skip
    for name, value in values.items():
        set_number(page, name, value)
    page.fill("#oc-stop_texts textarea", "END\n\\n\\n")
    page.check("#oc-show_beams input")
    choose(page, "prompt_type", "chatml")
    answer = ask(page, "Say something")
    request = engine.asked[-1]
    assert {name: getattr(request.sampling, name) for name in values} == values
    assert request.sampling.stop == ["END", "\n\n"]
    assert (request.prompt_type, request.show_beams) == ("chatml", True)
    assert answer == "The quick brown fox jumps over"
    assert "cut at the longest length" in page.inner_text("#oc-status")
    assert page.locator("#oc-beams textarea:visible").count() == 3
    open_page.agree = True
    page.click("#oc-reset")
    wait_until(lambda: page.input_value("#oc-temperature input[type=number]") == "0.7")
    assert len(open_page.questions) == 1 and "END" in open_page.questions[0]
    ask(page, "Say something")
    assert engine.asked[-1].sampling.max_new_tokens == 512
    assert (engine.asked[-1].prompt_type, engine.asked[-1].sampling.stop) == ("", [])


def test_adapters_are_switched_while_running(open_page: Any, url: str, engine: FakeEngine) -> None:
    page = open_page(url)
    assert not page.is_visible("#oc-thinking")
    assert ask(page, "who are you").startswith("I am tiny-llama")
    choose(page, "adapter", "pirate")
    wait_until(lambda: "vicuna-chat" in page.input_value("#oc-prompt_type input"))
    assert ask(page, "who are you").startswith("I am pirate")
    assert engine.asked[-1].template_variables == {}
    page.click("#oc-thinking label:has-text('off')")
    ask(page, "who are you")
    assert engine.asked[-1].template_variables == {"enable_thinking": False}
    choose(page, "prompt_type", "chatml")  # which has no switch for thoughts
    page.wait_for_selector("#oc-thinking", state="hidden")
    ask(page, "who are you")
    assert engine.asked[-1].template_variables == {}
    other = open_page(url)
    assert not other.is_visible("#oc-thinking")
    assert other.input_value("#oc-adapter input") == "tiny-llama"


def test_examples_fill_the_box(open_page: Any, url: str) -> None:
    page = open_page(url)
    page.click("#oc-chat button:has-text('Show me code')")
    wait_until(lambda: page.input_value("#oc-box textarea") == "Show me code")


def test_a_phone_needs_no_sideways_scrolling(open_page: Any, url: str) -> None:
    page = open_page(url, viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    ask(page, "Say something")
    ask(page, "Show me code")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.evaluate("innerWidth") == 390
    for name in ("#oc-box", "#oc-submit", "#oc-load"):
        box = page.locator(name).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["y"] + box["height"] <= 844, name


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("", 200), ("gradio_api/file=/etc/passwd", 403), ("gradio_api/file=../../etc/passwd", 403),
        ("file=/etc/passwd", 403), ("gradio_api/info", 403), ("gradio_api/proxy=http://evil.example/", 403),
        ("openapi.json", 403), ("docs", 403), ("monitoring", 403), ("gradio_api/runs", 403),
        ("static/../../../etc/passwd", 403),
    ],
)  # fmt: skip
def test_only_the_page_itself_is_served(url: str, path: str, status: int) -> None:
    assert httpx.get(url + path).status_code == status


def test_foreign_names_origins_and_uploads_are_refused(url: str) -> None:
    assert httpx.get(url, headers={"host": "evil.example"}).status_code in (400, 403)
    body = {"fn_index": 0, "data": [], "session_hash": "x"}
    foreign = httpx.post(url + "gradio_api/queue/join", json=body, headers={"origin": "http://evil.example"})
    assert foreign.status_code == 403
    for path in ("gradio_api/upload", "gradio_api/run/submit", "gradio_api/call/submit", "gradio_api/component_server"):
        assert httpx.post(url + path, files={"files": b"x"}).status_code == 403, path
    assert "connect-src 'self'" in httpx.get(url).headers["content-security-policy"]


def serve_fake(port: int) -> None:
    """The program of a process of its own, which a test can kill: the page over the fake engine."""
    from onecard.config.inference import PageOptions, SamplingOptions
    from onecard.serve.web import app as web

    page = PageOptions(port=port)
    sampling = SamplingOptions(max_new_tokens=512, temperature=0.7, top_p=0.9)
    web.launch(web.chat_page(FakeEngine(), sampling, page), page)


@pytest.fixture
def killable(fork_server: ForkServer) -> Iterator[Callable[[], tuple[Start, str]]]:
    """start() -> (server, url), always on one and the same port."""
    port, started = free_port(), []

    def start() -> tuple[Start, str]:
        imports = (__name__, "onecard.serve.web.app")
        started.append(fork_server.start_call(f"{__name__}:serve_fake", port, imports=imports))
        wait_until(lambda: answers(port), 60, "the server starts")
        return started[-1], f"http://127.0.0.1:{port}/"

    yield start
    started[-1].kill()


def answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/").status_code == 200
    except httpx.TransportError:
        return False


def test_a_server_that_dies_and_comes_back(open_page: Any, killable: Callable[[], tuple[Start, str]]) -> None:
    server, url = killable()
    page = open_page(url, locale="zh-CN")
    send(page, "a long one")
    wait_until(lambda: "word9" in str(bubbles(page)[-1:]))
    server.kill()
    wait_until(lambda: page.locator("text=连接已断开").count() > 0, 10, "the page says that the server is gone")
    assert page.locator("text=Connection").count() == 0
    partial = bubbles(page)[-1]
    assert partial.startswith("word0 word1")
    killable()
    wait_until(lambda: page.is_visible("#oc-submit") and len(bubbles(page)) == 2, 15, "the page comes back by itself")
    assert bubbles(page)[-1].startswith("word0 word1")
    page.wait_for_function("window.onecard && onecard.is_ready()")
    assert ask(page, "Say something") == SAYS
    assert bubbles(page)[0] == "a long one"
