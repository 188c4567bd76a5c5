"""What the buttons of the chat page do: from what the browser holds to what it should show next.

The conversation lives in the browser, which sends it along with every step: so a reload keeps it, a restart of the
server loses nothing, and two tabs know nothing of one another. Here it is checked each time like a stranger's file.
Knows sessions, settings and answers. It does not know gradio, nor where anything stands on the page (app.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from onecard.errors import DataError, OneCardError
from onecard.inference.chat_file import SavedChat, now, read_chat, to_json
from onecard.inference.engine import GenerationRequest, InferenceEngine, QueueFull
from onecard.inference.history import ChatHistory, fit_history, prompt_budget
from onecard.serve.web.answer import AnsweringPage, AnswerStep, answer_steps, failure_words
from onecard.serve.web.i18n import LANGUAGES, language_of, word
from onecard.serve.web.sanitize import original, plain_markdown
from onecard.serve.web.script import TOO_LARGE
from onecard.serve.web.settings import PageSettings, moved_words, template_variables
from onecard.serve.web.undo import kept, taken
from onecard.storage import json_object
from onecard.translation import translated

MAX_REGENERATIONS = 1_000_000


@dataclass(frozen=True)
class ChatView:
    """What the page shows next; None leaves a part as it is.

    chat: the conversation as JSON, without the answer that is being written; partial: that answer so far.
    messages: what the conversation looks like; box: text that comes back to the input box, before what was typed there
    meanwhile. sent: a number and the text that was taken from the box; the browser empties the box if this is still
    what stands there.
    toast: a line that goes away by itself.
    number: how many answers to the last question there have been before this one.
    earlier: the versions of the conversation that Undo can bring back, as JSON (see undo.py).
    """

    chat: str | None = None
    partial: str | None = None
    messages: list[dict[str, Any]] | None = None
    box: str | None = None
    status: str | None = None
    note: str | None = None
    beams: tuple[str, ...] | None = None
    running: bool | None = None
    number: int | None = None
    sent: str | None = None
    toast: str | None = None
    earlier: str | None = None


@dataclass(frozen=True)
class ChatInputs:
    """What the browser sends with every step.

    browser: its session's id. number: as in `ChatView`; with another one, the same seed gives another answer.
    """

    browser: str
    chat: str
    partial: str
    settings: Sequence[Any]
    language: str = "en"
    number: int = 0
    earlier: str = ""


@dataclass(frozen=True)
class RestoredPage:
    """The page after it was loaded anew."""

    view: ChatView
    settings: PageSettings
    language: str


class ChatPage(AnsweringPage):
    """The handlers of the chat page, for all browsers at once; nothing of a conversation is kept here."""

    def submit(self, asked: ChatInputs, text: str) -> Iterator[ChatView]:
        """Ask `text`."""
        if not text.strip():
            return
        yield from self._guarded(replace(asked, number=0), lambda before: before.ask(text), text)

    def regenerate(self, asked: ChatInputs) -> Iterator[ChatView]:
        """Answer the last question once more."""
        asked = replace(asked, number=asked.number + 1)
        yield from self._guarded(asked, lambda before: before.regenerate(), None, is_new=False)

    def edit(self, asked: ChatInputs, index: int, text: str) -> Iterator[ChatView]:
        """Put another question in the place of message `index` (as the view numbers them), and answer it."""
        asked = replace(asked, number=0)
        text = original(text)
        yield from self._guarded(asked, lambda before: before.edit(index, text), text, is_new=False)

    def undo(self, asked: ChatInputs) -> ChatView:
        """Bring back what Clear, an edit, Regenerate or a loaded file replaced; else take the last exchange back.

        The question of an exchange that is taken back returns to the box.
        """
        return self._at_rest(asked, _undone)

    def clear(self, asked: ChatInputs) -> ChatView:
        """Forget the conversation, until Undo brings it back; system prompt and settings stay."""
        return self._at_rest(asked, _cleared)

    def save(self, asked: ChatInputs) -> tuple[str, str]:
        """Name and text of the file that the browser offers to the user. Raises DataError for a forged conversation."""
        chat = self._chat(asked)
        settings, _ = self.reader.read(asked.settings)
        chat = replace(
            chat, session=chat.session.with_system(settings.system), sampling=settings.sampling,
            adapter=settings.adapter, prompt_type=settings.prompt_type or "auto", created=chat.created or now(),
        )  # fmt: skip
        stamp = "".join(sign for sign in chat.created[:19] if sign.isdigit())
        return f"onecard-chat-{stamp[:8]}-{stamp[8:]}.json", to_json(chat)

    def load(self, asked: ChatInputs, text: str) -> tuple[ChatView, PageSettings]:
        """The chat in a file that the user gave, and the settings that it was held with."""
        settings, _ = self.reader.read(asked.settings)
        if not text:
            return ChatView(), settings
        if text == TOO_LARGE:
            return ChatView(note=word(asked.language, "note.too_large")), settings
        if asked.browser in self.running:
            return ChatView(toast=word(asked.language, "note.busy")), settings
        try:
            chat, remarks = read_chat(text)
        except DataError as reason:
            return ChatView(note=failure_words(reason, asked.language)), settings
        notes = [word(asked.language, "note.loaded", n=len(chat.session.turns))]
        notes += [translated(remark, asked.language) for remark in remarks]
        settings, more = self._settings_of(chat, settings, asked.language)
        try:
            replaced = self._chat(asked)
        except DataError:
            replaced = SavedChat()  # what cannot be read is no loss
        earlier = kept(asked.earlier, replaced, chat)
        notes += [word(asked.language, "note.replaced")] if replaced.session.turns else []
        view = ChatView(**_shown(chat), note="\n".join([*notes, *more]), status="", beams=(), earlier=earlier)
        return view, settings

    def restore(self, stored: str, browser_language: str, wanted: str = "auto") -> RestoredPage:
        """The page as this browser last saw it, out of its own storage; anything broken in there counts as absent."""
        memory = json_object(stored)
        language = remembered_language(stored, browser_language, wanted)
        settings = self.reader.stored(memory)
        names = ("chat", "partial", "box", "earlier")
        texts = {key: memory[key] if isinstance(memory.get(key), str) else "" for key in names}
        try:
            chat = _merged(texts["chat"], texts["partial"])
        except DataError:
            chat = SavedChat()
        return RestoredPage(ChatView(**_shown(chat), box=texts["box"], earlier=texts["earlier"]), settings, language)

    def _guarded(self, asked: ChatInputs, step: Any, text: str | None, *, is_new: bool = True) -> Iterator[ChatView]:
        """Answer what `step` makes of the session, unless an answer is being written or the step cannot be made.

        text: what the person typed for it; is_new: it is a new question, out of the box.
        """
        cancel = self.running.begin(asked.browser)
        if cancel is None:
            # Not as a note: the answer that is being written has the notes.
            yield ChatView(toast=word(asked.language, "note.busy"), box=None if is_new else text)
            return
        try:
            chat = self._chat(asked)
            settings, moved = self.reader.read(asked.settings)
            before = chat.session.with_system(settings.system)
            answering = _Answering(self.engine, asked, settings, replace(chat, session=before), text, is_new)
            note = moved_words(moved, asked.language)
            for view in answering.views(step(before), cancel, note):
                if view.running is False:
                    # Before the page learns of it: it may ask the next question at once.
                    self.running.end(asked.browser)
                yield view
        except OneCardError as reason:
            yield ChatView(box=text, note=failure_words(reason, asked.language), running=False, messages=_seen(asked))
        finally:
            self.running.end(asked.browser)

    def _at_rest(self, asked: ChatInputs, change: Callable[[SavedChat, ChatInputs], ChatView]) -> ChatView:
        if asked.browser in self.running:
            return ChatView(toast=word(asked.language, "note.busy"))
        try:
            return replace(ChatView(status="", note="", beams=()), **_said(change(self._chat(asked), asked)))
        except DataError as reason:
            return ChatView(note=failure_words(reason, asked.language))

    def _chat(self, asked: ChatInputs) -> SavedChat:
        return _merged(asked.chat, asked.partial)

    def _settings_of(self, chat: SavedChat, settings: PageSettings, language: str) -> tuple[PageSettings, list[str]]:
        notes = []
        if chat.adapter and not self.engine.has(chat.adapter):
            notes.append(word(language, "note.no_adapter", name=chat.adapter))
        adapter = chat.adapter if chat.adapter in self.engine.names else settings.adapter
        prompt_type = "" if chat.prompt_type == "auto" else chat.prompt_type or settings.prompt_type
        settings = replace(settings, adapter=adapter, prompt_type=prompt_type, system=chat.session.system)
        settings, moved = self.reader.with_sampling(settings, chat.sampling)
        return settings, [*notes, *moved_words(moved, language).splitlines()]


@dataclass(frozen=True)
class _Answering:
    """One answer on its way into a chat. `before`: the chat as it was; `text`, `is_new`: as in `_guarded`."""

    engine: InferenceEngine
    asked: ChatInputs
    settings: PageSettings
    before: SavedChat
    text: str | None
    is_new: bool

    def views(self, session: ChatHistory, cancel: Any, note: str) -> Iterator[ChatView]:
        fitted = fit_history(session.prompt, self._count, self._budget())
        if fitted.n_dropped:
            note = "\n".join([*note.splitlines(), word(self.asked.language, "note.dropped", n=fitted.n_dropped)])
        request = GenerationRequest(
            fitted.turns, sampling=self.settings.sampling, adapter=self.settings.adapter,
            prompt_type=self.settings.prompt_type, number=self.asked.number,
            show_beams=self.settings.show_beams, template_variables=template_variables(self.engine, self.settings),
        )  # fmt: skip
        begun = replace(self.before, session=session)
        # Until the first words come, a regenerated or edited answer still stands in the browser's memory.
        is_new = self.is_new
        sent = f"{time.time_ns()} {self.text}" if is_new else None
        yield ChatView(
            chat=to_json(begun) if is_new else None, partial="", messages=messages_of(session, "…"), sent=sent,
            status="", note=note, beams=(), running=True, number=self.asked.number,
        )  # fmt: skip
        is_kept, answered = is_new, replace(begun, session=session.answer(""))
        for step in answer_steps(self.engine, request, cancel, self.asked.language):
            if step.is_last:
                yield self._last(begun, step, note)
                return
            chunk = step.chunk
            yield ChatView(
                chat=None if is_kept or not chunk.text else to_json(begun), partial=chunk.text,
                messages=messages_of(session, chunk.text or "…"), status=step.status, beams=chunk.beams,
                earlier=None if is_kept or not chunk.text else self._earlier(answered),
            )  # fmt: skip
            is_kept = is_kept or bool(chunk.text)

    def _last(self, begun: SavedChat, step: AnswerStep, note: str) -> ChatView:
        language, text = self.asked.language, step.chunk.text
        notes = note.splitlines()
        chat, box = begun, None
        if step.failure is not None:
            notes.append(failure_words(step.failure, language))
        if text or step.chunk.finish_reason in ("stop", "length"):
            chat = replace(begun, session=begun.session.answer(text))
            notes += [word(language, "note.kept")] if step.failure is not None else []
        elif step.failure is not None:
            chat, box = self.before, self.text
            if self.text is not None and not isinstance(step.failure, QueueFull):
                notes.append(word(language, "note.returned"))
        else:
            chat, box = (begun, None) if self.is_new else (self.before, self.text)
            notes.append(word(language, "note.nothing_yet" if box is None else "note.returned"))
        n_lost = len(self.before.session.turns) - len(chat.session.turns)
        if n_lost > 0:
            notes.append(word(language, "note.edited", n=n_lost))
        status = step.status if step.chunk.usage.n_new_tokens else ""
        return ChatView(
            **_shown(chat), box=box, status=status, note="\n".join(notes), beams=step.chunk.beams, running=False,
            earlier=self._earlier(chat),
        )  # fmt: skip

    def _earlier(self, chat: SavedChat) -> str | None:
        """What Undo can bring back once `chat` stands there; a new question replaces nothing."""
        is_replaced = not self.is_new and chat is not self.before
        return kept(self.asked.earlier, self.before, chat) if is_replaced else None

    def _count(self, turns: Any) -> int:
        return self.engine.count_tokens(turns, self.settings.adapter, self.settings.prompt_type)

    def _budget(self) -> int:
        limits = self.engine.limits
        return prompt_budget(self.engine.context_limit, self.settings.sampling.max_new_tokens, limits.max_prompt_tokens)


def messages_of(session: ChatHistory, partial: str | None = None) -> list[dict[str, Any]]:
    """The conversation for a chat view, escaped; `partial` is the answer that is being written."""
    turns = [(turn.role, turn.one_text("\n\n")) for turn in session.turns]
    if partial is not None:
        turns.append(("assistant", partial))
    return [{"role": role, "content": [{"type": "text", "text": plain_markdown(text)}]} for role, text in turns]


def remembered_language(stored: str, browser_language: str, wanted: str = "auto") -> str:
    """The language that was chosen in this browser before, else the one that the owner or the browser wants."""
    language = json_object(stored).get("language")
    return language if isinstance(language, str) and language in LANGUAGES else language_of(browser_language, wanted)


def _cleared(chat: SavedChat, asked: ChatInputs) -> ChatView:
    cleared = replace(chat, session=chat.session.clear(), created="")
    if not chat.session.turns:
        return ChatView(**_shown(cleared))
    earlier = kept(asked.earlier, chat, cleared)
    return ChatView(**_shown(cleared), earlier=earlier, note=word(asked.language, "note.cleared"))


def _undone(chat: SavedChat, asked: ChatInputs) -> ChatView:
    version, earlier = taken(asked.earlier, chat)
    if version is not None:
        return ChatView(**_shown(version), earlier=earlier, note=word(asked.language, "note.restored"))
    session, text = chat.session.undo()
    return ChatView(**_shown(replace(chat, session=session)), box=text)


def _seen(asked: ChatInputs) -> list[dict[str, Any]] | None:
    """What the view shows when a step could not be made: without the words that were typed into it."""
    try:
        return messages_of(_merged(asked.chat, asked.partial).session)
    except DataError:
        return None


def _said(view: ChatView) -> dict[str, Any]:
    return {part.name: value for part in fields(ChatView) if (value := getattr(view, part.name)) is not None}


def _shown(chat: SavedChat) -> dict[str, Any]:
    return {"chat": to_json(chat), "partial": "", "messages": messages_of(chat.session)}


def _merged(chat: str, partial: str) -> SavedChat:
    """The conversation with the piece of an answer that a reload or a dead server left."""
    if not chat.strip():
        return SavedChat()
    merged = read_chat(chat).chat
    if partial and merged.session.awaits_answer:
        merged = replace(merged, session=merged.session.answer(partial))
    return merged
