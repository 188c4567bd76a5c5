"""What the buttons of the page for single questions do: one instruction, one answer, and a file for those worth noting.

Knows requests, settings and the owner's file of flagged answers. It does not know gradio, nor conversations.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from onecard.config.inference import SamplingOptions
from onecard.data.messages import Turn
from onecard.errors import OneCardError
from onecard.inference.chat_file import now
from onecard.inference.engine import GenerationRequest, InferenceEngine
from onecard.serve.web.answer import AnsweringPage, answer_steps, failure_words
from onecard.serve.web.i18n import word
from onecard.serve.web.settings import (
    MAX_TEXT_CHARS,
    PageSettings,
    moved_words,
    template_variables,
)
from onecard.storage import json_object
from onecard.translation import translated

FLAG_FILE = "flagged.jsonl"


@dataclass(frozen=True)
class AnswerView:
    """What the page shows next; None leaves a part as it is."""

    answer: str | None = None
    beams: tuple[str, ...] | None = None
    status: str | None = None
    note: str | None = None
    toast: str | None = None
    running: bool | None = None


@dataclass(frozen=True)
class AskInputs:
    """What the browser sends."""

    browser: str
    instruction: str
    input: str
    settings: Sequence[Any]
    language: str = "en"


class AskPage(AnsweringPage):
    """The handlers of the page, for all browsers at once. `flag_path` is the owner's; no request can name one."""

    def __init__(
        self, engine: InferenceEngine, system: str, sampling: SamplingOptions, *, show_beams: bool = False,
        flag_path: Path = Path(FLAG_FILE),
    ) -> None:  # fmt: skip
        super().__init__(engine, system, sampling, show_beams=show_beams)
        self.flag_path = flag_path
        self._writing = threading.Lock()
        self._finished: dict[str, dict[str, Any]] = {}  # browser -> its newest finished answer, which it may flag

    def ask(self, question: AskInputs) -> Iterator[AnswerView]:
        """Answer the instruction."""
        language = question.language
        instruction, extra = question.instruction, question.input
        if not instruction.strip():
            return
        cancel = self.running.begin(question.browser)
        if cancel is None:
            yield AnswerView(toast=word(language, "note.busy"))
            return
        try:
            settings, moved = self.reader.read(question.settings)
            turns: tuple[Turn, ...] = (Turn("user", instruction, extra),)
            if settings.system.strip():
                turns = (Turn("system", settings.system), *turns)
            request = GenerationRequest(
                turns, sampling=settings.sampling, adapter=settings.adapter, prompt_type=settings.prompt_type,
                show_beams=settings.show_beams, template_variables=template_variables(self.engine, settings),
            )  # fmt: skip
            note = moved_words(moved, language)
            yield AnswerView("", (), "", note, running=True)
            for step in answer_steps(self.engine, request, cancel, language):
                chunk = step.chunk
                view = AnswerView(chunk.text, chunk.beams, step.status)
                if step.failure is not None:
                    kept = [word(language, "note.kept")] if chunk.text else []
                    words = "\n".join([failure_words(step.failure, language), *kept])
                    view = AnswerView(chunk.text, note=words, running=False)
                elif step.is_last:
                    self._finished[question.browser] = _entry(question, settings, chunk.text, chunk.finish_reason)
                    view = replace(view, running=False)
                if view.running is False:
                    # Before the page learns of it: it may ask the next question at once.
                    self.running.end(question.browser)
                yield view
        except OneCardError as reason:
            yield AnswerView(note=failure_words(reason, language), running=False)
        finally:
            self.running.end(question.browser)

    def restore(self, stored: str) -> tuple[dict[str, str], PageSettings]:
        """The texts and the settings that this tab stored last; what is broken counts as absent."""
        memory = json_object(stored)
        texts = {name: text for name, text in memory.items() if isinstance(text, str) and text}
        return texts, self.reader.stored(memory)

    def leave(self, browser: str) -> None:
        super().leave(browser)
        self._finished.pop(browser, None)

    def flag(self, browser: str, comment: str, language: str = "en") -> str:
        """Append this browser's finished answer with a comment to the owner's file; what to tell about it."""
        entry = self._finished.get(browser)
        if entry is None:
            return word(language, "note.nothing_to_flag")
        entry = {"time": now(), **entry, "comment": comment[:MAX_TEXT_CHARS]}
        try:
            number = self._append(json.dumps(entry, ensure_ascii=False) + "\n")
        except OSError as reason:
            return word(language, "note.flag_failed", reason=translated(reason.strerror or str(reason), language))
        return word(language, "note.flagged", n=number, file=self.flag_path.name)

    def _append(self, line: str) -> int:
        """Add a line, and count the lines there are now."""
        with self._writing:
            with self.flag_path.open("ab") as stream:
                stream.write(line.encode("utf-8", "replace"))
            with self.flag_path.open("rb") as stream:
                return sum(1 for _ in stream)


def _entry(question: AskInputs, settings: PageSettings, answer: str, finish_reason: str | None) -> dict[str, Any]:
    """A finished answer in the alpaca shape that training reads, with what it was made with."""
    return {
        "instruction": question.instruction,
        "input": question.input,
        "output": answer,
        "finish_reason": finish_reason,
        "system": settings.system,
        "adapter": settings.adapter,
        "prompt_type": settings.prompt_type or "auto",
        "sampling": asdict(settings.sampling),
    }
