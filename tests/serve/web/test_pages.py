"""What the buttons of the pages do, without a browser: plain generators over the fake engine, and over the real one."""

from __future__ import annotations

import json
import re
import threading
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from onecard.config.inference import LimitOptions, SamplingOptions
from onecard.data.chat_template import load_template
from onecard.data.messages import Turn
from onecard.inference.chat_file import SavedChat, read_chat, to_json
from onecard.inference.history import ChatHistory
from onecard.serve.web.answer import as_html
from onecard.serve.web.ask import AskInputs, AskPage
from onecard.serve.web.chat import ChatInputs, ChatPage, ChatView
from onecard.serve.web.events import repeating
from onecard.serve.web.examples import examples_in, first_messages, questions
from onecard.serve.web.i18n import LANGUAGES, all_words, language_of, word
from onecard.serve.web.sanitize import INVISIBLE, original, plain_markdown
from onecard.serve.web.script import TOO_LARGE, head
from onecard.serve.web.settings import NAMES, NUMBERS
from onecard.serve.web.undo import MAX_CHARS, kept
from tests.fake_engine import HOSTILE, FakeEngine, Script

SAYS = Script().say
CHINESE_SIGN = re.compile("[\u4e00-\u9fff]")
START = SamplingOptions(max_new_tokens=64, temperature=0.7)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(Script(delay_seconds=0.002))


@pytest.fixture
def page(engine: FakeEngine) -> ChatPage:
    return ChatPage(engine, "", START)  # type: ignore[arg-type]


def asked(page: ChatPage, view: ChatView | None = None, **changes: Any) -> ChatInputs:
    """What a browser that shows `view` sends."""
    settings = changes.pop("settings", page.start.values())
    view = view or ChatView()
    state = ChatInputs("tab", view.chat or "", view.partial or "", settings, "en", view.number or 0, view.earlier or "")
    return replace(state, **changes)


def shown(views: Any) -> ChatView:
    """What a browser shows after these views."""
    state = ChatView()
    for view in views:
        state = replace(
            state, **{f.name: value for f in fields(ChatView) if (value := getattr(view, f.name)) is not None}
        )
    return state


def texts(view: ChatView) -> list[str]:
    assert view.messages is not None
    return [message["content"][0]["text"] for message in view.messages]


def turns_of(view: ChatView) -> tuple[Turn, ...]:
    assert view.chat is not None
    return read_chat(view.chat).chat.session.turns


def test_an_answer_grows_and_ends(page: ChatPage) -> None:
    views = []
    for view in page.submit(asked(page), "Hello"):
        views.append(view)
        assert ("tab" in page.running) is (view.running is not False), "the last view may be answered at once"
    assert (views[0].box, views[0].running, views[0].chat is not None) == (None, True, True)
    assert (views[0].sent or "").endswith(" Hello")
    partials = [view.partial for view in views[1:-1] if view.partial]
    assert all(SAYS.startswith(partial) for partial in partials) and len(partials) >= 1
    last = shown(views)
    assert turns_of(last) == (Turn("user", "Hello"), Turn("assistant", SAYS))
    assert (last.partial, last.running, last.note) == ("", False, "")
    assert "tab" not in page.running


def test_the_piece_that_a_reload_left_joins_the_chat(page: ChatPage) -> None:
    begun = to_json(SavedChat(ChatHistory("", (Turn("user", "Hello"),))))
    state = ChatInputs("tab", begun, "a piece of", page.start.values())
    last = shown(page.submit(state, "And?"))
    assert [turn.content for turn in turns_of(last)] == ["Hello", "a piece of", "And?", SAYS]


def test_stop_before_and_while_it_writes(page: ChatPage, engine: FakeEngine) -> None:
    views = []
    for view in page.submit(asked(page), "a long one"):
        views.append(view)
        if "word3" in (view.partial or ""):
            page.stop("tab")
    last = shown(views)
    assert turns_of(last)[-1].content.startswith("word0 word1 word2 word3")
    assert engine.ended == ["cancelled"]
    assert "stopped" in (last.status or "")
    ticket = engine.queue.join()
    views = []
    for view in page.submit(asked(page, last), "waits"):
        views.append(view)
        if "in front" in (view.status or ""):
            page.stop("tab")
    engine.queue.leave(ticket)
    waited = shown(views)
    assert turns_of(waited)[-1] == Turn("user", "waits")
    assert waited.note == word("en", "note.nothing_yet")


def test_regenerate_keeps_the_old_answer_until_there_is_a_new_one(page: ChatPage, engine: FakeEngine) -> None:
    first = shown(page.submit(asked(page), "Hello"))
    views = list(page.regenerate(asked(page, first)))
    assert views[0].chat is None
    assert turns_of(shown([first, *views]))[-1].content == f"{SAYS} (attempt 1)"
    assert engine.asked[-1].number == 1
    ticket = engine.queue.join()
    for view in page.regenerate(asked(page, first)):
        assert view.chat is None or view.running is False, "nothing new stands there yet"
        if "in front" in (view.status or ""):
            page.stop("tab")
    assert turns_of(view) == turns_of(first)
    line = [engine.queue.join() for _ in range(2)]
    refused = shown([first, *page.regenerate(asked(page, first))])
    for one in (ticket, *line):
        engine.queue.leave(one)
    assert turns_of(refused) == turns_of(first)
    assert "not sent" in (refused.note or "")


def test_what_fails_loses_nothing(page: ChatPage) -> None:
    first = shown(page.submit(asked(page), "Hello"))
    for question, words in (("memory", "Lower Max new tokens"), ("broken", "ValueError: nobody foresaw this")):
        last = shown([first, *page.submit(asked(page, first), question)])
        assert turns_of(last) == turns_of(first)
        assert (last.box, last.running) == (question, False)
        assert words in (last.note or "")
    half = shown(page.submit(asked(page, first), "half"))
    assert turns_of(half)[-1].content == "The quick brown fox"
    assert turns_of(shown(page.submit(asked(page, half), "Go on")))[-1].content == SAYS


def test_one_answer_at_a_time_per_browser(page: ChatPage, engine: FakeEngine) -> None:
    stream = page.submit(asked(page), "a long one")
    next(stream), next(stream)
    second = list(page.submit(asked(page), "And now?"))
    assert second == [ChatView(toast=word("en", "note.busy"))]
    assert page.clear(asked(page)) == page.undo(asked(page)) == second[0]
    assert shown(page.submit(asked(page, browser="other", settings=page.start.values()), "")) == ChatView()
    page.leave("tab")
    wait(lambda: engine.ended == ["cancelled"])
    stream.close()


def test_the_status_names_who_answers_where_there_are_several(page: ChatPage) -> None:
    settings = replace(page.start, adapter="pirate").values()
    assert (shown(page.submit(asked(page, settings=settings), "Hello")).status or "").startswith("pirate · ")
    assert (shown(page.submit(asked(page), "Hello")).status or "").startswith("tiny-llama · ")
    alone = ChatPage(FakeEngine(names=("one",)), "", START)  # type: ignore[arg-type]
    assert "one" not in (shown(alone.submit(asked(alone), "Hello")).status or "")


def test_an_abandoned_stream_frees_the_model(page: ChatPage, engine: FakeEngine) -> None:
    """gradio may simply stop asking a generator for more, and keep it."""
    stream = page.submit(asked(page), "a long one")
    for _ in range(3):
        next(stream)
    page.leave("tab")
    wait(lambda: engine.ended == ["cancelled"])
    assert shown(page.submit(asked(page, browser="other"), "Hello")).running is False


def wait(condition: Any) -> None:
    end = time.monotonic() + 2
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_edit_undo_clear(page: ChatPage, engine: FakeEngine) -> None:
    two = shown(page.submit(asked(page, shown(page.submit(asked(page), "One <b>"))), "Two"))
    assert texts(two)[0] == f"One <{INVISIBLE}b>"
    edited = shown(page.edit(asked(page, two), 0, texts(two)[0] + " more"))
    assert [turn.content for turn in turns_of(edited)] == ["One <b> more", SAYS]
    undone = page.undo(asked(page, two))
    assert (undone.box, len(turns_of(undone))) == ("Two", 2)
    assert "nothing to undo" in (page.undo(asked(page)).note or "")
    assert "no message 8" in (shown(page.edit(asked(page, two), 7, "x")).note or "")


def replacing(page: ChatPage, how: str, before: ChatView) -> ChatView:
    """What stands on the page after one of the steps that take a chat's place."""
    state = asked(page, before)
    other = to_json(SavedChat(ChatHistory("", (Turn("user", "Other"), Turn("assistant", "chat")))))
    steps: dict[str, Any] = {
        "clear": lambda: [page.clear(state)], "edit": lambda: page.edit(state, 0, "Instead"),
        "regenerate": lambda: page.regenerate(state), "load": lambda: [page.load(state, other)[0]],
    }  # fmt: skip
    return shown([before, *steps[how]()])


@pytest.mark.parametrize("how", ["clear", "edit", "regenerate", "load"])
def test_what_takes_the_place_of_a_chat_can_be_undone(page: ChatPage, how: str) -> None:
    two = shown(page.submit(asked(page, shown(page.submit(asked(page), "One"))), "Two"))
    replaced = replacing(page, how, two)
    assert turns_of(replaced) != turns_of(two)
    assert how == "regenerate" or "Undo" in (replaced.note or "")
    more = shown([replaced, *page.submit(asked(page, replaced), "Three")])
    for view in (replaced, shown([more, page.undo(asked(page, more))])):
        back = shown([view, page.undo(asked(page, view))])
        assert turns_of(back) == turns_of(two), "first what was asked since then, then what was replaced"
        assert back.note == word("en", "note.restored")
    assert turns_of(shown([back, page.undo(asked(page, back))])) == turns_of(two)[:2]


def test_several_replacements_are_undone_one_after_the_other(page: ChatPage) -> None:
    view = shown(page.submit(asked(page), "One"))
    seen = []
    for how in ("edit", "regenerate", "clear", "load"):
        seen.append(turns_of(view))
        view = replacing(page, how, view)
    stored = json.dumps({"chat": view.chat, "earlier": view.earlier})
    view = page.restore(stored, "en").view
    # Nothing stood there between Clear and the file, so nothing was replaced by it.
    for turns in ((), seen[2], seen[1], seen[0]):
        view = shown([view, page.undo(asked(page, view))])
        assert turns_of(view) == turns


def test_a_step_that_fails_replaces_nothing(page: ChatPage) -> None:
    first = shown(page.submit(asked(page), "One"))
    for text in ("memory", " "):
        failed = shown([first, *page.edit(asked(page, first), 0, text)])
        assert (turns_of(failed), failed.earlier) == (turns_of(first), first.earlier)
        assert failed.messages == first.messages
    assert page.clear(asked(page)).earlier is None


@given(st.one_of(st.text(), st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps)))
@example("[" * 100_000)
@example('[["{", 0]]')
def test_whatever_a_browser_calls_earlier_is_read(earlier: str) -> None:
    page = ChatPage(FakeEngine(), "", START)  # type: ignore[arg-type]
    assert page.undo(asked(page, earlier=earlier)).note


def test_earlier_versions_have_a_bound(page: ChatPage) -> None:
    chat = SavedChat(ChatHistory("", (Turn("user", "x" * 90_000), Turn("assistant", "y"))))
    earlier = ""
    for _ in range(5):
        earlier = kept(earlier, chat, SavedChat())
    assert len(earlier) < MAX_CHARS + 1000
    assert kept("", chat, SavedChat()) != "" == kept("", SavedChat(), chat)


def test_history_is_cut_with_a_note(engine: FakeEngine) -> None:
    engine.context_limit = 60
    page = ChatPage(engine, "", SamplingOptions(max_new_tokens=8))  # type: ignore[arg-type]
    turns = tuple(Turn("user" if k % 2 == 0 else "assistant", "many words " * 5) for k in range(8))
    last = shown(
        page.submit(ChatInputs("tab", to_json(SavedChat(ChatHistory("", turns))), "", page.start.values()), "Hello")
    )
    assert word("en", "note.dropped", n=6) in (last.note or "")
    assert len(engine.asked[-1].turns) == 3
    assert len(turns_of(last)) == 10


def test_save_and_load_bring_everything_back(page: ChatPage, engine: FakeEngine) -> None:
    settings = replace(page.start, adapter="pirate", prompt_type="chatml", system="Be brief").values()
    settings[NAMES.index("temperature")] = 1.5
    last = shown(page.submit(asked(page, settings=settings), "Hello"))
    name, text = page.save(asked(page, last, settings=settings))
    assert name.startswith("onecard-chat-2") and name.endswith(".json")
    view, loaded = page.load(asked(page), text)
    assert turns_of(view) == turns_of(last)
    assert loaded.values() == settings
    foreign = json.loads(text) | {"adapter": "../../etc/passwd", "sampling": {"temperature": 50, "num_beams": 99}}
    view, loaded = page.load(asked(page), json.dumps(foreign))
    assert (loaded.adapter, loaded.sampling.temperature) == ("tiny-llama", 2)
    assert loaded.sampling.num_beams == engine.limits.max_beams
    assert "Temperature: 50.0 is not allowed here" in (view.note or "") and "etc/passwd" in (view.note or "")
    for broken in ("{", "[]]", TOO_LARGE, '{"messages": 3}'):
        view, _ = page.load(asked(page), broken)
        assert view.note and view.chat is None
    assert page.load(asked(page), "")[0] == ChatView()


def test_the_switch_for_thoughts_goes_to_a_template_that_has_one(page: ChatPage, engine: FakeEngine) -> None:
    for adapter, prompt_type, thinking, variables in (
        ("pirate", "", "on", {"enable_thinking": True}), ("pirate", "", "off", {"enable_thinking": False}),
        ("pirate", "", "auto", {}), ("pirate", "chatml", "off", {}), ("tiny-llama", "", "on", {}),
        ("pirate", "", "maybe", {}),
    ):  # fmt: skip
        settings = replace(page.start, adapter=adapter, prompt_type=prompt_type, thinking=thinking)
        last = shown(page.submit(asked(page, settings=settings.values()), "Hello"))
        assert engine.asked[-1].template_variables == variables
        assert ("Thinking: maybe is not allowed here" in (last.note or "")) == (thinking == "maybe")


def test_settings_stored_before_there_was_a_switch_for_thoughts_are_kept(page: ChatPage) -> None:
    values = replace(page.start, system="Be brief").values()
    restored = page.restore(json.dumps({"settings": values[:-1]}), "en-US")
    assert (restored.settings.system, restored.settings.thinking) == ("Be brief", "auto")


@given(st.one_of(st.text(), st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps)))
@example("[" * 100_000)
@example('{"chat": "{", "partial": 3, "settings": [1], "language": ["zh"]}')
@example(json.dumps({"settings": [None] * len(NAMES), "chat": '{"messages": []}'}))
def test_whatever_a_browser_has_stored_opens_the_page(stored: str) -> None:
    page = ChatPage(FakeEngine(), "", START)  # type: ignore[arg-type]
    restored = page.restore(stored, "en-US")
    assert restored.language == "en"
    assert restored.settings.sampling.problems() == []


def test_a_stored_page_comes_back(page: ChatPage) -> None:
    last = shown(page.submit(asked(page), "Hello"))
    settings = replace(page.start, system="Be brief").values()
    stored = json.dumps({"chat": last.chat, "settings": settings, "box": "half", "language": "zh"})
    restored = page.restore(stored, "en-US", "en")
    assert (restored.language, restored.settings.system, restored.view.box) == ("zh", "Be brief", "half")
    assert turns_of(restored.view) == turns_of(last)
    assert [language_of(tag) for tag in ("zh-Hans-CN", "ZH", "de", "")] == ["zh", "zh", "en", "en"]


@given(st.lists(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()), min_size=14, max_size=14))
def test_forged_settings_stay_within_bounds(values: list[Any]) -> None:
    engine = FakeEngine()
    page = ChatPage(engine, "", START)  # type: ignore[arg-type]
    settings, _ = page.reader.read(values)
    assert settings.sampling.problems() == []
    assert settings.adapter in engine.names
    assert settings.sampling.num_beams <= engine.limits.max_beams
    assert settings.sampling.max_new_tokens <= engine.limits.max_answer_tokens
    assert page.reader.read(settings.values()) == (settings, ())


def test_every_sampling_option_has_a_slider_with_a_sentence() -> None:
    names = {field.name for field in fields(SamplingOptions)} - {"stop"} | {"stop_texts"}
    assert names <= set(NAMES) and set(NUMBERS) <= names
    assert len(NAMES) == 15
    for name in NAMES:
        for language in ("en", "zh"):
            assert word(language, f"{name}.help")[-1] in ".。", name


def test_what_the_owner_starts_with_is_never_out_of_bounds(engine: FakeEngine) -> None:
    start = SamplingOptions(max_new_tokens=10**6, temperature=3.33, top_p=0.01, repetition_penalty=0.9, num_beams=50)
    page = ChatPage(engine, "", start)  # type: ignore[arg-type]
    sampling = page.start.sampling
    assert (sampling.temperature, sampling.top_p, sampling.repetition_penalty) == (3.33, 0.01, 0.9)
    assert (sampling.max_new_tokens, sampling.num_beams) == (2047, 8)


def test_both_languages_say_everything() -> None:
    english, chinese = all_words()["en"], all_words()["zh"]
    assert all_words().keys() == LANGUAGES.keys()
    assert english.keys() == chinese.keys()
    for key, text in english.items():
        places = [sorted(part.split("}")[0] for part in words.split("{")[1:]) for words in (text, chinese[key])]
        assert places[0] == places[1], key
    assert len(english) > 60


SIGNS = st.text("<>!&[](){}`~ \n\\abz/?#;'\"=-*0$%", max_size=60)


@given(SIGNS)
@example(HOSTILE)
@example("a ` b\nc `![x](u)` d")
@example("\\`![x](u)`")
@example("- a\n  ```\n  x\n![i](u)")
def test_markdown_loses_its_teeth_and_nothing_else(text: str) -> None:
    if INVISIBLE not in text:
        assert original(plain_markdown(text)) == without_drawn_labels(text)


def without_drawn_labels(text: str) -> str:
    """Labels of fences are cut to a word: compared without them."""
    return original(plain_markdown(original(plain_markdown(text))))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<b> a < b <!-- -->", "<·b> a < b <·!-- -->"),
        ("![x](http://e) [x](y)", "!·[x](http://e) [x](y)"),
        ("&lt; & AT&T;", "&·lt; & AT&·T;"),
        ("`<b>` <b>", "`<b>` <·b>"),
        ("``a `<b>` c`` <b>", "``a `<b>` c`` <·b>"),
        ("```html\n<b>\n```\n<b>", "```html\n<b>\n```\n<·b>"),
        ("~~~\n<b>\n```\n<b>\n~~~~\n<b>", "~~~\n<b>\n```\n<b>\n~~~~\n<·b>"),
        ("```mermaid\ngraph\n```", "```\ngraph\n```"),
        ("``` <b> x\ny", "```\ny"),
        ("a ` b\nc `![x](u)` d\n\n`<b>`", "a ` b\nc `!·[x](u)` d\n\n`<b>`"),
        ("\\`![x](u)`", "\\`!·[x](u)`"),
        ("- a\n  ```\n  <b>\n![i](u)", "- a\n  ```\n  <b>\n!·[i](u)"),
        # Formulas, and what only looks like one; a backslash that Markdown would take away stays.
        (r"is \(x^2 \, y\), so", r"is \(·x^2 \, y·\), so"),
        ("\\[\na \\\\[2pt] b\n\\]", "\\[·\na \\\\[2pt] b\n·\\]"),
        ("$$a<b & c$$ <b>", "$$·a<b & c·$$ <·b>"),
        ("其中$x_1$是，$E=mc^2$.", "其中$·x_1·$是，$·E=mc^2·$."),
        ("it costs $5 and then $6, US$5 or $7", "it costs $5 and then $6, US$5 or $7"),
        ("`$x$` $y$ ```$z$```", "`$x$` $·y·$ ```$z$```"),
        ("```\n$x$ \\(y\\)\n```", "```\n$x$ \\(y\\)\n```"),
        ("$$a\n\nb$$", "$$a\n\nb$$"),
        (r"so far \(x = \frac{-b \pm", r"so far \·(x = \frac{-b \pm"),
        (r"C:\temp\(x86\) \*no\* \$5", r"C:\temp\·(x86\·) \*no\* \$5"),
        ("` $x$ <b>\n`![i](u)`", "` $x$ <·b>\n`!·[i](u)`"),
        ("%%%LATEX_BLOCK_0%%%", "%·%%LATEX_BLOCK_0%%%"),
    ],
)
def test_signs_outside_code_are_escaped(text: str, expected: str) -> None:
    assert plain_markdown(text).replace(INVISIBLE, "·") == expected


@pytest.mark.parametrize("piece", ["\\(", "\\[ \\\\", "$a ", "$$$", "x` ", "x`` y` "])
def test_formulas_are_found_in_linear_time(piece: str) -> None:
    texts = [piece * 2_000, piece * 16_000]
    assert [original(plain_markdown(text)) for text in texts] == texts
    times = [min(cpu_s(text) for _ in range(3)) for text in texts]
    assert times[1] < 24 * max(times[0], 1 / 64)  # linear: 8, quadratic: 64; Windows counts in 64ths of a second


def cpu_s(text: str) -> float:
    """Seconds of this thread's own, so that other work on the machine is not counted."""
    start = time.thread_time()
    plain_markdown(text)
    return time.thread_time() - start


def test_notes_are_letters_only() -> None:
    html = as_html("<img onerror=x> {{value}} ${alert(1)} `x`\nb", "c")
    shown = "&lt;img onerror=x&gt; &#123;&#123;value&#125;&#125; &#36;&#123;alert(1)&#125; &#96;x&#96;<br>b"
    assert html == f'<div class="c">{shown}</div>'


def question(page: AskPage, text: str, **changes: Any) -> AskInputs:
    return replace(AskInputs("tab", text, "", page.start.values()), **changes)


def test_ask_and_flag(engine: FakeEngine, tmp_path: Path) -> None:
    path = tmp_path / "flags.jsonl"
    page = AskPage(engine, "Be brief", START, flag_path=path)  # type: ignore[arg-type]
    assert page.flag("tab", "") == word("en", "note.nothing_to_flag")
    views = []
    for view in page.ask(question(page, "Hello", input="there")):
        views.append(view)
        assert ("tab" in page.running) is (view.running is not False)
    assert (views[-1].answer, views[-1].running) == (SAYS, False)
    assert engine.asked[-1].turns == (Turn("system", "Be brief"), Turn("user", "Hello", "there"))
    assert page.flag("tab", "很好") == word("en", "note.flagged", n=1, file="flags.jsonl")
    assert page.flag("tab", "again") == word("en", "note.flagged", n=2, file="flags.jsonl")
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [entry["comment"] for entry in entries] == ["很好", "again"]
    assert (entries[0]["instruction"], entries[0]["input"], entries[0]["output"]) == ("Hello", "there", SAYS)
    page.leave("tab")
    assert page.flag("tab", "") == word("en", "note.nothing_to_flag")
    views = list(page.ask(question(page, "memory")))
    assert "Lower Max new tokens" in (views[-1].note or "") and views[-1].running is False
    assert list(page.ask(question(page, "  "))) == []
    nowhere = AskPage(engine, "", START, flag_path=tmp_path / "no" / "x.jsonl")  # type: ignore[arg-type]
    list(nowhere.ask(question(nowhere, "Hello")))
    assert "could not be written" in nowhere.flag("tab", "")


def test_flags_of_many_at_once_are_whole_lines(engine: FakeEngine, tmp_path: Path) -> None:
    page = AskPage(engine, "", START, flag_path=tmp_path / "flags.jsonl")  # type: ignore[arg-type]
    list(page.ask(question(page, "Hello")))
    notes: list[str] = []
    threads = [threading.Thread(target=lambda: notes.append(page.flag("tab", "x" * 100_000))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = (tmp_path / "flags.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["output"] for line in lines] == [SAYS] * 8
    assert sorted(notes) == [word("en", "note.flagged", n=n, file="flags.jsonl") for n in range(1, 9)]


def test_beams_are_shown_when_asked_for(engine: FakeEngine) -> None:
    page = AskPage(engine, "", replace(START, num_beams=3), show_beams=True)  # type: ignore[arg-type]
    last = list(page.ask(question(page, "Hello")))[-1]
    assert last.beams == (SAYS, f"{SAYS} [1]", f"{SAYS} [2]")


def test_a_long_question_is_asked_whole(engine: FakeEngine) -> None:
    """Whether it fits is for the model's context to say: a cut in the middle would be answered without a word."""
    page = AskPage(engine, "", START)  # type: ignore[arg-type]
    text = "猫" * 100_001
    list(page.ask(replace(question(page, text), input=text)))
    assert (engine.asked[-1].turns[-1].content, engine.asked[-1].turns[-1].input) == (text, text)


def test_what_was_said_once_in_a_stream_is_said_to_its_end() -> None:
    steps = [[{"value": 1}, None], [None, {"visible": True}], [{"value": 2}, None]]
    assert list(repeating([], 3)) == [[None, None, None]]  # gradio clears every component after no step at all
    assert list(repeating(steps, 2)) == [
        [{"value": 1}, None], [{"value": 1}, {"visible": True}], [{"value": 2}, {"visible": True}],
    ]  # fmt: skip


def test_examples_come_from_the_sample_data(tmp_path: Path) -> None:
    assert all(len(pair) == 2 and pair[0] for pair in questions()) and all(first_messages())
    for language, has_chinese in (("en", False), ("zh", True)):
        pairs, messages = examples_in(questions(), language), examples_in(first_messages(), language)
        assert (len(pairs), len(messages)) == (6, 4)
        for text in [*messages, *map("".join, pairs)]:
            assert bool(CHINESE_SIGN.search(text)) is has_chinese
    assert examples_in(["one"], "zh") == ["one"]
    (tmp_path / "odd.json").write_text('[1, {"input": []}, {"instruction": 3}]', encoding="utf-8")
    assert questions(tmp_path / "odd.json") == [["3", ""]]
    assert first_messages(tmp_path / "odd.json") == first_messages(tmp_path / "none.json") == []


def test_the_page_carries_no_foreign_address() -> None:
    assert "http" not in head(1000).replace("http-equiv", "")
    assert "LIMIT = 1000;" in head(1000)


def test_a_stored_template_is_called_by_the_name_that_people_know(sp_tokenizer: Any) -> None:
    own = load_template("vicuna-chat", sp_tokenizer)
    assert replace(own, name="chat_template").known_name == "vicuna-chat"
    assert replace(own, name="mine", jinja="{{ messages }}").known_name == "mine"


def test_limits_of_the_engine_bound_the_sliders() -> None:
    engine = FakeEngine(limits=LimitOptions(max_answer_tokens=100, max_beams=2))
    page = ChatPage(engine, "", START)  # type: ignore[arg-type]
    assert (page.reader.bounds["max_new_tokens"].most, page.reader.bounds["num_beams"].most) == (100, 2)
