"""One answer for a page: from the engine's chunks to what is shown, and from what went wrong to words.

Both pages use it. Knows requests, chunks, speed and the words for them. It does not know gradio, conversations' history
or where anything stands on the page.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from html import escape

from onecard.config.inference import SamplingOptions
from onecard.console import warn
from onecard.errors import OneCardError
from onecard.inference.call import Chunk
from onecard.inference.engine import GenerationRequest, InferenceEngine, OutOfMemory, QueueFull
from onecard.serve.web.i18n import word
from onecard.serve.web.settings import PageSettings, SettingsReader
from onecard.translation import translated

# Each step draws the whole answer anew in the browser; more often than this only makes a long one stutter.
STEP_SECONDS = 0.06


@dataclass(frozen=True)
class AnswerStep:
    """What is known of an answer at a moment. `failure` is why there will be no more of it."""

    chunk: Chunk = field(default_factory=Chunk)
    status: str = ""
    failure: Exception | None = None

    @property
    def is_last(self) -> bool:
        return self.failure is not None or self.chunk.finish_reason is not None


class RunningAnswers:
    """Which browser sessions are being answered, and how to end that: a page has at most one answer at a time."""

    def __init__(self) -> None:
        self._cancels: dict[str, threading.Event] = {}
        self._lock = threading.Lock()

    def begin(self, browser: str) -> threading.Event | None:
        """The event that ends this session's new answer, or None while another one is still being written."""
        with self._lock:
            if browser in self._cancels:
                return None
            return self._cancels.setdefault(browser, threading.Event())

    def end(self, browser: str) -> None:
        """The answer is over, however it ended."""
        with self._lock:
            cancel = self._cancels.pop(browser, None)
        if cancel is not None:
            cancel.set()

    def stop(self, browser: str) -> None:
        """End the answer of this session, if there is one: the Stop button, or a page that was closed."""
        with self._lock:
            cancel = self._cancels.get(browser)
        if cancel is not None:
            cancel.set()

    def __contains__(self, browser: str) -> bool:
        with self._lock:
            return browser in self._cancels


class AnsweringPage:
    """What the handlers of a page have in common, for all browsers at once: engine, settings and running answers."""

    def __init__(
        self, engine: InferenceEngine, system: str, sampling: SamplingOptions, *, show_beams: bool = False
    ) -> None:
        self.engine = engine
        self.reader = SettingsReader(engine, PageSettings(engine.names[0], "", system, sampling, show_beams))
        self.running = RunningAnswers()

    @property
    def start(self) -> PageSettings:
        """What the page begins with, and goes back to."""
        return self.reader.start

    def stop(self, browser: str) -> None:
        """End this browser's answer within a second; what there is of it stays."""
        self.running.stop(browser)

    def leave(self, browser: str) -> None:
        """The page was closed: end its answer and forget the session."""
        self.running.end(browser)


def answer_steps(
    engine: InferenceEngine, request: GenerationRequest, cancel: threading.Event, language: str
) -> Iterator[AnswerStep]:
    """The steps of an answer, at most one every STEP_SECONDS; the last one `is_last`. Raises nothing.

    The engine is drained by a thread of its own: a browser that no longer fetches its steps, or fetches them slowly,
    must not keep the model from the next one.
    """
    newest, came = Newest(maxlen=1), threading.Event()
    draining = partial(_drain, engine, request, cancel, newest, came)
    threading.Thread(target=draining, name="onecard-page", daemon=True).start()
    begun = 0.0
    while True:
        came.wait()
        came.clear()
        chunk, failure = newest[0]
        now = time.monotonic()
        begun = begun or (now if chunk.usage.n_new_tokens else 0.0)
        status = status_line(chunk, now - begun if begun else 0.0, engine.context_limit, language)
        if len(engine.names) > 1 and status:
            status = f"{request.adapter or engine.names[0]} · {status}"
        step = AnswerStep(chunk, status, failure)
        yield step
        if step.is_last:
            return
        time.sleep(STEP_SECONDS)


Newest = deque[tuple[Chunk, Exception | None]]  # of one: a chunk that nobody took in time is forgotten


def _drain(
    engine: InferenceEngine, request: GenerationRequest, cancel: threading.Event, newest: Newest, came: threading.Event
) -> None:
    """Put each chunk of an answer there, and at last why there will be no more."""
    chunk = Chunk()
    try:
        for (chunk,) in engine.stream(request, cancel):
            newest.append((chunk, None))
            came.set()
    except Exception as reason:
        if not isinstance(reason, OneCardError):
            # A page must never end in silence; the terminal gets the type, the page the same words.
            warn(f"while answering on the page: {type(reason).__name__}: {reason}")
        newest.append((chunk, reason))
        came.set()


def status_line(chunk: Chunk, seconds: float, limit: int, language: str) -> str:
    """Tokens, speed and use of the context in words; while it waits, the place in the queue."""
    if chunk.place:
        return word(language, "status.waiting", place=chunk.place)
    tokens = chunk.usage.n_new_tokens
    if not tokens and chunk.finish_reason is None:
        return word(language, "status.starting")
    # The first token came with the prompt; its time is not the speed of writing.
    speed = f"{(tokens - 1) / seconds:.1f}" if tokens > 1 and seconds > 0 else "–"
    used = chunk.usage.n_prompt_tokens + tokens
    parts = [
        word(language, "status.writing", tokens=tokens, speed=speed),
        word(language, "status.context", used=used, limit=limit),
    ]
    endings = {"length": "status.cut", "cancelled": "status.stopped"}
    if chunk.finish_reason in endings:
        parts.append(word(language, endings[chunk.finish_reason]))
    return " · ".join(parts)


def failure_words(reason: Exception, language: str) -> str:
    """What to tell a person about this error, and what to do next."""
    if isinstance(reason, QueueFull):
        return word(language, "note.queue_full", seconds=reason.retry_after_seconds)
    if isinstance(reason, OutOfMemory):
        return word(language, "note.memory")
    if isinstance(reason, OneCardError):
        return word(language, "note.failed", reason=translated(str(reason), language))
    return word(language, "note.failed", reason=f"{type(reason).__name__}: {reason}")


def as_html(text: str, css_class: str) -> str:
    """Plain text as an HTML element of the page; every sign stays the sign it is, those of gradio's templates too."""
    if not text:
        return ""
    return f'<div class="{css_class}">{letters(text).replace(chr(10), "<br>")}</div>'


def letters(text: str) -> str:
    """Plain text for a place in HTML that gradio treats as a template."""
    shown = escape(text)
    for sign in "{}$`":
        shown = shown.replace(sign, f"&#{ord(sign)};")
    return shown
