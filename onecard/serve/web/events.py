"""Which handler stands behind which button, and how what it says reaches the components.

Components are only handed around here, never made or looked into; app.py makes them, and turns a `Change` into what
gradio understands. Knows the handlers of both pages and the order of what goes in and out. It does not know gradio.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any, Literal

from onecard.config.inference import DOCUMENTS_MODEL
from onecard.data.built_in_templates import BUILT_IN
from onecard.data.chat_template import thought_switch
from onecard.errors import OneCardError
from onecard.inference.engine import InferenceEngine
from onecard.serve.web.answer import as_html
from onecard.serve.web.ask import AnswerView, AskInputs, AskPage
from onecard.serve.web.browsers import SessionRegistry
from onecard.serve.web.chat import MAX_REGENERATIONS, ChatInputs, ChatPage, ChatView, remembered_language
from onecard.serve.web.i18n import word
from onecard.serve.web.sanitize import original, plain_markdown
from onecard.serve.web.settings import NAMES, OWN_PROMPT_TYPE, PageSettings

Words = Callable[[str], Any]  # language -> what a component shows
Change = dict[str, Any] | None  # the properties of a component that change; None leaves it as it is
Changes = list[Change]
On = Callable[..., Any]  # (event, handler, inputs, outputs, ...): calls handler(browser, *values of the inputs)
SWITCHES = ("submit", "stop", "regenerate", "undo", "clear", "load")  # what is to be had only at rest, or not
QUESTION_TEXTS = ("instruction", "input", "comment", "answer")  # what a reload of the page for questions keeps
HIDDEN: Literal["hidden"] = "hidden"  # drawn but not shown: nothing has to be drawn anew when it is
TYPED = ("system", "stop_texts")  # the settings that are texts of the person


class TranslatedComponents:
    """The components that show words, so that all of them can change their language at once."""

    def __init__(self, language: str) -> None:
        self.language = language
        self._entries: list[tuple[Any, dict[str, Words]]] = []

    def __call__(self, kind: Callable[..., Any], words: Mapping[str, str | Words], **arguments: Any) -> Any:
        """Make a component of this kind. `words`: properties that are keys of words.yaml, or made from a language."""
        makers = {name: (partial(word, key=key) if isinstance(key, str) else key) for name, key in words.items()}
        component = kind(**arguments, **{name: make(self.language) for name, make in makers.items()})
        self._entries.append((component, makers))
        return component

    @property
    def components(self) -> list[Any]:
        return [component for component, _ in self._entries]

    def updates(self, language: str) -> Changes:
        """One change per component of `components`."""
        return [{name: make(language) for name, make in makers.items()} for _, makers in self._entries]


@dataclass(frozen=True)
class GradioHooks:
    """What app.py provides: `on` connects an event with a handler, `tell` shows a line for some seconds."""

    on: On
    tell: Callable[[str], None]


class PageWiring:
    """What every page has: two languages, light and dark, and an end when it is closed (`leave`)."""

    def __init__(
        self, parts: dict[str, Any], labels: TranslatedComponents, language: str, gradio: GradioHooks,
        leave: Callable[[str], object] = lambda browser: None,
    ) -> None:  # fmt: skip
        self.parts, self.labels, self.wanted_language = parts, labels, language
        self.on, self.tell = gradio.on, gradio.tell
        self.presence = SessionRegistry(leave)

    def connect_page(self, blocks: Any, outputs: list[Any], opening: str) -> None:
        """`outputs`: what is restored of a page that was loaded anew, by the script `opening`."""
        p = self.parts
        p["language"].input(None, [p["language"]], None, js="(language) => { onecard.speak(language); }")
        p["theme"].click(None, [], None, js="() => { onecard.theme(); }")
        self.on(blocks.load, self.presence.stay, [], [], event="stay")
        known = [p["stored"], p["browser_language"]]
        loading = self.on(blocks.load, self.restore, known, [*outputs, p["language"]], js=opening)
        loading.then(None, [p["language"]], None, js="(language) => { onecard.opened(language); }")

    def restore(self, browser: str, stored: str, browser_language: str) -> Changes:
        raise NotImplementedError


class Wiring(PageWiring):
    """What the pages that ask a model have besides: its settings."""

    def __init__(
        self, page: ChatPage | AskPage, parts: dict[str, Any], labels: TranslatedComponents, language: str,
        gradio: GradioHooks,
    ) -> None:  # fmt: skip
        super().__init__(parts, labels, language, gradio, page.leave)
        self.page = page
        self.settings = [parts[name] for name in NAMES]
        self.typed = [parts[name] for name in TYPED]
        start = dict(zip(NAMES, page.start.values(), strict=True))
        self.typed_start = json.dumps([start[name] for name in TYPED])

    def connect_settings(self, blocks: Any, outputs: list[Any], opening: str) -> None:
        p = self.parts
        texts = [*self.labels.components, p["prompt_type"]]
        asking = asking_first(2, self.typed_start)
        self.on(p["reset"].click, self.reset, [p["stored"], *self.typed, p["language"]], self.settings, js=asking)
        chosen = [p["adapter"], p["language"]]
        self.on(p["adapter"].input, self.prompt_types, chosen, [p["prompt_type"], p["thinking"]])
        self.on(p["prompt_type"].input, self.thinking, [p["adapter"], p["prompt_type"]], [p["thinking"]])
        # However it changes: by hand, with a loaded chat, or with the page that was loaded anew.
        self.on(p["adapter"].change, self.name, [p["adapter"]], [p["model"]])
        if "documents" in p:
            changed = [p["adapter"], p["prompt_type"], p["thinking"]]
            self.on(p["documents"].input, self.documents, [p["documents"], p["language"]], changed)
            self.on(p["adapter"].change, self.is_from_documents, [p["adapter"]], [p["documents"]])
        self.on(p["language"].change, self.speak, [p["language"], p["adapter"]], texts)
        self.connect_page(blocks, [*outputs, *self.settings], opening)

    def reset(self, browser: str, agreed: str, system: str, stop_texts: str, language: str) -> Changes:
        return self.setting_updates(self.page.start, language) if agreed else [None for _ in self.settings]

    def name(self, browser: str, adapter: str) -> Changes:
        return [{"value": as_html(adapter or self.page.start.adapter, "oc-model")}]

    def documents(self, browser: str, is_on: bool, language: str) -> Changes:
        adapter = DOCUMENTS_MODEL if is_on else self.page.start.adapter
        return [{"value": adapter}, *self.prompt_types(browser, adapter, language)]

    def is_from_documents(self, browser: str, adapter: str) -> Changes:
        return [{"value": adapter == DOCUMENTS_MODEL}]

    def prompt_types(self, browser: str, adapter: str, language: str) -> Changes:
        choices = prompt_choices(self.page.engine, adapter, language)
        return [{"choices": choices, "value": OWN_PROMPT_TYPE}, *self.thinking(browser, adapter, OWN_PROMPT_TYPE)]

    def thinking(self, browser: str, adapter: str, prompt_type: str) -> Changes:
        return [{"visible": has_thought_switch(self.page.engine, adapter, prompt_type) or HIDDEN}]

    def speak(self, browser: str, language: str, adapter: str) -> Changes:
        choices = {"choices": prompt_choices(self.page.engine, adapter, language)}
        return [*self.labels.updates(language), choices]

    def stop(self, browser: str) -> Changes:
        self.page.stop(browser)
        return []

    def setting_updates(self, settings: PageSettings, language: str) -> Changes:
        updates: Changes = [{"value": value} for value in settings.values()]
        choices = prompt_choices(self.page.engine, settings.adapter, language)
        updates[NAMES.index("prompt_type")] = {"choices": choices, "value": settings.prompt_type}
        shown = has_thought_switch(self.page.engine, settings.adapter, settings.prompt_type) or HIDDEN
        updates[NAMES.index("thinking")] = {"value": settings.thinking, "visible": shown}
        return updates

    def line_updates(self, status: str | None, note: str | None) -> Changes:
        return [
            None if status is None else {"value": as_html(status or " ", "oc-line")},
            None if note is None else {"value": as_html(note, "oc-notice"), "visible": bool(note) or HIDDEN},
        ]

    def beam_updates(self, beams: tuple[str, ...] | None) -> Changes:
        """For the column of beams and for each of its boxes."""
        boxes = self.parts["beam_boxes"]
        if not beams:
            return [None if beams is None else {"visible": False}, *[None for _ in boxes]]
        texts = [*beams, *[""] * len(boxes)][: len(boxes)]
        shown = [{"value": text, "visible": k < len(beams)} for k, text in enumerate(texts)]
        return [{"visible": True}, *shown]


class ChatWiring(Wiring):
    """The chat's handlers, and the components they read and write."""

    page: ChatPage

    def connect(self, blocks: Any) -> None:
        p = self.parts
        state = [p["chat"], p["partial"], p["earlier"], p["tries"], p["language"], *self.settings]
        names = (
            "chat",
            "partial",
            "earlier",
            "tries",
            "chatbot",
            "returned",
            "sent",
            "status",
            "note",
            *SWITCHES,
            "beams",
        )
        view = [*[p[name] for name in names], *p["beam_boxes"]]
        for trigger in (p["submit"].click, p["box"].submit):
            self.on(trigger, self.submit, [p["box"], *state], view, trigger_mode="multiple")
        self.on(p["regenerate"].click, self.regenerate, state, view, trigger_mode="multiple")
        self.on(p["chatbot"].edit, self.edit, state, view, trigger_mode="multiple", event="edit")
        self.on(p["stop"].click, self.stop, [], [], event="stop")
        self.on(p["undo"].click, self.undo, state, view)
        for trigger in (p["clear"].click, p["chatbot"].clear):
            self.on(trigger, self.clear, state, view)
        saving = self.on(p["save"].click, self.save, state, [p["file"]])
        saving.then(None, [p["file"]], None, js="(file) => { onecard.download(file); }")
        pick = f"async (file, ...rest) => [await onecard.pick(rest.slice(0, 2), {self.typed_start}), ...rest]"
        self.on(p["load"].click, self.load, [p["file"], *self.typed, *state], [*view, *self.settings], js=pick)
        examples = [p["stored"], p["box"]], [p["box"]]
        asking = asking_first(1, json.dumps(p["known"]))
        self.on(p["chatbot"].example_select, self.example, *examples, event="example", js=asking)
        self.connect_settings(blocks, view, "() => onecard.open()")
        for name in ("chat", "partial", "box"):
            p[name].change(None, [p[name]], None, js=f"({name}) => {{ onecard.keep({{{name}}}); }}")
        p["earlier"].change(None, [p["earlier"]], None, js="(earlier) => { onecard.keep_earlier(earlier); }")
        p["sent"].change(None, [p["sent"], p["box"]], [p["box"]], js="(sent, box) => onecard.taken(sent, box)")
        p["returned"].change(
            None, [p["returned"], p["box"]], [p["box"]], js="(line, box) => onecard.returned(line, box)"
        )
        for component in self.settings:
            component.change(None, self.settings, None, js="(...settings) => { onecard.keep({settings}); }")

    def submit(self, browser: str, text: str, *state: Any) -> Iterator[Changes]:
        yield from map(self.updates, self.page.submit(_asked(browser, state), text))

    def regenerate(self, browser: str, *state: Any) -> Iterator[Changes]:
        yield from map(self.updates, self.page.regenerate(_asked(browser, state)))

    def edit(self, browser: str, place: int, text: str, *state: Any) -> Iterator[Changes]:
        yield from map(self.updates, self.page.edit(_asked(browser, state), place, text))

    def undo(self, browser: str, *state: Any) -> Changes:
        return self.updates(self.page.undo(_asked(browser, state)))

    def clear(self, browser: str, *state: Any) -> Changes:
        return self.updates(self.page.clear(_asked(browser, state)))

    def save(self, browser: str, *state: Any) -> Changes:
        name, text = self.page.save(_asked(browser, state))
        return [{"value": json.dumps({"name": name, "text": text})}]

    def load(self, browser: str, text: str, system: str, stop_texts: str, *state: Any) -> Changes:
        asked = _asked(browser, state)
        view, settings = self.page.load(asked, text)
        return [*self.updates(view), *self.setting_updates(settings, asked.language)]

    def example(self, chosen: dict[str, str], agreed: str, box: str) -> Changes:
        return [{"value": chosen["text"]} if agreed else None]

    def restore(self, browser: str, stored: str, browser_language: str) -> Changes:
        restored = self.page.restore(stored, browser_language, self.wanted_language)
        settings = self.setting_updates(restored.settings, restored.language)
        return [*self.updates(restored.view), *settings, {"value": restored.language}]

    def updates(self, view: ChatView) -> Changes:
        """One update for each component of the view, in the order of `connect`."""
        returned = None if view.box is None else f"{time.time_ns()} {view.box}"
        values = [view.chat, view.partial, view.earlier, view.number, view.messages, returned, view.sent]
        kept: Changes = [None if value is None else {"value": value} for value in values]
        lines = self.line_updates(view.status, view.note)
        if view.toast:
            self.tell(view.toast)
        return [*kept, *lines, *_switch_updates(view.running, SWITCHES), *self.beam_updates(view.beams)]


class AskWiring(Wiring):
    """The handlers of the page for single questions, and the components they read and write."""

    page: AskPage

    def connect(self, blocks: Any) -> None:
        p = self.parts
        view = [p["answer"], p["status"], p["note"], p["submit"], p["stop"], p["beams"], *p["beam_boxes"]]
        question = [p["instruction"], p["input"], p["language"], *self.settings]
        for trigger in (p["submit"].click, p["instruction"].submit):
            self.on(trigger, self.ask, question, view, trigger_mode="multiple")
        self.on(p["stop"].click, self.stop, [], [], event="stop")
        self.on(p["flag"].click, self.flag, [p["comment"], p["language"]], [p["note"]])
        if "examples" in p:
            fields = [p["instruction"], p["input"]]
            asking = asking_first(2, json.dumps(p["known"]))
            self.on(p["examples"].click, self.example, [p["stored"], *fields, p["examples"]], fields, js=asking)
        texts = [p[name] for name in QUESTION_TEXTS]
        self.connect_settings(blocks, texts, "() => onecard.look()")
        for component in (*texts, *self.settings):
            names = ", ".join(QUESTION_TEXTS)
            keeping = f"({names}, ...settings) => {{ onecard.keep({{{names}, settings}}); }}"
            component.change(None, [*texts, *self.settings], None, js=keeping)

    def ask(self, browser: str, instruction: str, extra: str, language: str, *settings: Any) -> Iterator[Changes]:
        question = AskInputs(browser, instruction or "", extra or "", settings, language)
        yield from map(self.updates, self.page.ask(question))

    def example(self, browser: str, agreed: str, instruction: str, extra: str, chosen: Sequence[str]) -> Changes:
        return [{"value": text} if agreed else None for text in chosen]

    def flag(self, browser: str, comment: str, language: str) -> Changes:
        return self.line_updates(None, self.page.flag(browser, comment or "", language))[1:]

    def restore(self, browser: str, stored: str, browser_language: str) -> Changes:
        language = remembered_language(stored, browser_language, self.wanted_language)
        texts, settings = self.page.restore(stored)
        if "answer" in texts:
            texts["answer"] = plain_markdown(original(texts["answer"]))
        changes: Changes = [{"value": texts[name]} if name in texts else None for name in QUESTION_TEXTS]
        return [*changes, *self.setting_updates(settings, language), {"value": language}]

    def updates(self, view: AnswerView) -> Changes:
        if view.toast:
            self.tell(view.toast)
        answer: Change = None if view.answer is None else {"value": plain_markdown(view.answer)}
        switches = _switch_updates(view.running, SWITCHES[:2])
        return [answer, *self.line_updates(view.status, view.note), *switches, *self.beam_updates(view.beams)]


def repeating(stream: Iterable[Changes], n_outputs: int) -> Iterator[Changes]:
    """The same changes; what a step leaves as it is, it says again as it was said last.

    gradio's client keeps one list for all steps of a stream and edits it in place, also while the page is still drawing
    an earlier step: a slow browser would never see a property that is named in one step and not in the next. After a
    stream without any step gradio clears every component, so this one says that nothing changes.
    """
    said: Changes = []
    for changes in stream:
        said = [new if new is not None else old for new, old in zip_longest(changes, said)]
        yield said
    if not said:
        yield [None] * n_outputs


def asking_first(n_texts: int, known: str) -> str:
    """A script that asks whether the first `n_texts` inputs may be replaced, unless they are among `known` (JSON)."""
    return f"(agreed, ...rest) => [onecard.agree(rest.slice(0, {n_texts}), {known}), ...rest]"


def prompt_choices(engine: InferenceEngine, adapter: str, language: str) -> list[tuple[str, str]]:
    """(shown, value) of the prompt types: the adapter's own first."""
    try:
        name = engine.template(adapter).known_name
    except OneCardError:
        name = "?"  # an adapter that cannot be read says so when it is asked; the page opens all the same
    own = word(language, "prompt_type.own", name=name)
    return [(own, OWN_PROMPT_TYPE), *[(name, name) for name in BUILT_IN]]


def has_thought_switch(engine: InferenceEngine, adapter: str, prompt_type: str) -> bool:
    """Whether the template that writes the prompts can turn thoughts on and off."""
    try:
        return thought_switch(engine.template(adapter, prompt_type).jinja) is not None
    except OneCardError:  # an adapter that cannot be read, or a template of another server: said when it is asked
        return False


def _switch_updates(running: bool | None, names: Sequence[str]) -> Changes:
    """Submit gives way to Stop while an answer is written; what would change the chat waits until it is over."""
    if running is None:
        return [None for _ in names]
    visible = {"submit": not running or HIDDEN, "stop": running or HIDDEN}
    return [{"visible": visible[name]} if name in visible else {"interactive": not running} for name in names]


def _asked(browser: str, state: Sequence[Any]) -> ChatInputs:
    chat, partial, earlier, tries, language, *settings = state
    number = int(tries) if isinstance(tries, (int, float)) and 0 <= tries < MAX_REGENERATIONS else 0
    return ChatInputs(browser, chat or "", partial or "", settings, language or "en", number, earlier or "")
