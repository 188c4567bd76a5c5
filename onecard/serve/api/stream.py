"""Answers as server-sent events: pieces while the answer is written, one end per choice, then [DONE].

Greedy and sampled answers only grow, so each piece is what came since the last one. Beams rewrite themselves, and what
was sent cannot be taken back: with several beams the whole text is one piece at the end, and what the best beam says
meanwhile stands in the field `onecard.text` of pieces that add nothing. Joined pieces equal the whole answer, always.

Format: https://html.spec.whatwg.org/multipage/server-sent-events.html. Does not know the engine.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from onecard.serve.api.errors import as_api_error
from onecard.serve.api.jobs import RequestThread, stopping
from onecard.serve.api.log import RequestRecord
from onecard.serve.api.responses import Form, SentSoFar, path_of
from onecard.serve.api.work import Progress
from onecard.serve.http_error import ApiError

KEEP_ALIVE_SECONDS = 5.0  # proxies close what is silent for long
SNAPSHOT_SECONDS = 0.25  # between two snapshots of the best beam, each of which is the whole text
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
DONE = b"data: [DONE]\n\n"


class EventStream(Response):
    """An answer in pieces. What can be refused was refused before; `held` is let go when the last piece is out."""

    media_type = "text/event-stream"

    def __init__(self, pieces: AsyncIterator[bytes], held: AsyncExitStack) -> None:
        super().__init__(headers=HEADERS)
        self._pieces, self._held = pieces, held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]
        async with self._held:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async for piece in self._pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})


class EventWriter(Protocol):
    """Turns snapshots of an answer into events that have not been sent."""

    n: int

    def opening(self) -> list[bytes]:
        """What comes before all snapshots."""

    def pieces(self, progress: Progress) -> list[bytes]:
        """What is new in this snapshot."""

    def ending(self, progress: Progress) -> list[bytes]:
        """The rest of the last snapshot, and what ends the stream."""

    def failing(self, error: ApiError) -> bytes:
        """The event of an error."""


async def events(
    job: RequestThread[Progress], writer: EventWriter, begun: Progress, note: RequestRecord
) -> AsyncIterator[bytes]:
    """The events of one answer, from its first snapshot on. An error becomes an event, and nothing follows it."""
    latest = begun
    try:
        for piece in writer.opening():
            yield piece
        async for progress in snapshots(job, begun):
            latest = progress or latest
            note.saw(latest)
            found = writer.pieces(progress) if progress else [comment(waiting_for(latest))]
            for piece in found:
                yield piece
        if latest.is_cancelled:
            raise stopping()
        for piece in writer.ending(latest):
            yield piece
    except Exception as reason:
        error = stopping() if job.cancel.is_set() else as_api_error(reason)
        note.of_error(error)
        if job.client_left:
            note.outcome = "client_left"
        yield writer.failing(error)
    finally:
        note.of_answer(latest, writer.n)


async def snapshots(job: RequestThread[Progress], begun: Progress) -> AsyncIterator[Progress | None]:
    """`begun` and what follows it; None where nothing came for a while."""
    yield begun
    while True:
        try:
            yield await job.next(KEEP_ALIVE_SECONDS)
        except StopAsyncIteration:
            return


def waiting_for(latest: Progress) -> str:
    """What a client is told while nothing comes."""
    return f"waiting, {latest.place} in front" if latest.place else "working"


class StreamEventBuilder:
    """Turns snapshots of an answer into the pieces that have not been sent."""

    def __init__(self, form: Form, n_choices: int) -> None:
        self._form, self.n = form, form.ask.n
        self._sent = [SentSoFar() for _ in range(n_choices)]
        self._rewrites = form.ask.sampling.num_beams > 1
        self._told_place, self._told_seconds = 0, 0.0

    def opening(self) -> list[bytes]:
        """What comes before all snapshots."""
        pieces = [self._form.opening(index) for index in range(len(self._sent))]
        return [self._event(piece) for piece in pieces if piece is not None]

    def pieces(self, progress: Progress) -> list[bytes]:
        """What is new in this snapshot; whole ends are left to `ending`."""
        found = []
        if progress.place and progress.place != self._told_place:
            found.append(comment(waiting_for(progress)))
        self._told_place = progress.place
        may_tell = time.monotonic() - self._told_seconds >= SNAPSHOT_SECONDS
        for index, sent in enumerate(self._sent):
            chunk = progress.chunks[index]
            if not self._rewrites:
                found += self._new(progress, index, sent)
            elif may_tell and chunk.text and not chunk.finish_reason:
                self._told_seconds = time.monotonic()
                found.append(self._event(self._form.empty(index), {"onecard": {"text": chunk.text}}))
        return found

    def ending(self, progress: Progress) -> list[bytes]:
        """The rest of the last snapshot, one end per choice, and the usage if it was asked for."""
        found = []
        for index, sent in enumerate(self._sent):
            found += self._new(progress, index, sent)
            found.append(self._event(self._form.end(progress, index), path_of(progress)))
        if self._form.ask.include_usage:
            usage = progress.usage(self._form.ask.n)
            found.append(event(self._form.head | {"object": self._form.kind_of_pieces, "choices": [], "usage": usage}))
        return [*found, DONE]

    def failing(self, error: ApiError) -> bytes:
        """The error in the shape of an answer's."""
        return event(error.body)

    def _new(self, progress: Progress, index: int, sent: SentSoFar) -> list[bytes]:
        text = self._form.text(progress, index)
        if not text.startswith(sent.text):
            raise ApiError(500, "the answer changed after it was sent", code="internal_error")
        new_text, sent.text = text[len(sent.text) :], text
        piece = self._form.piece(progress, index, sent, new_text)
        return [] if piece is None else [self._event(piece)]

    def _event(self, choice: dict[str, Any], more: dict[str, Any] | None = None) -> bytes:
        body = self._form.head | {"object": self._form.kind_of_pieces, "choices": [choice]} | (more or {})
        return event(body | {"usage": None} if self._form.ask.include_usage else body)


def event(body: dict[str, Any], name: str = "") -> bytes:
    """One event, perhaps named; JSON has no bare line breaks, so its data is one line."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(body, ensure_ascii=False)}\n\n".encode()


def comment(text: str) -> bytes:
    """A line that clients read over."""
    return f": {text}\n\n".encode()
