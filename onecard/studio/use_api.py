"""Chat with the result of a run, and compare: the model's server is started and ended, and asked through the studio.

The browser speaks to one origin and never learns the server's key.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict
from typing import Any

import httpx
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from onecard.data.messages import Turn, turns_to_messages
from onecard.serve.http_error import ApiError, bad_request
from onecard.studio.blind_chat import add_pair, open_votes, view_of
from onecard.studio.chat_server import ChatServer, ChatState
from onecard.studio.context import OWN_FOLDER, StudioContext
from onecard.studio.events import News
from onecard.studio.http import StudioJson, json_body, json_route, route
from onecard.studio.runs import Runs
from onecard.studio.sources import ModelSource, source_at, sources_in
from onecard.studio.token_differences import message_of, token_differences

ROLES = ("system", "user", "assistant")
VOTES = "votes"


def routes(context: StudioContext) -> list[BaseRoute]:
    """The paths of this part, /api/chat and below. News: `chat`, when the server's state changes."""
    server = ChatServer(context.output_root / OWN_FOLDER / "chat", context.output_root, context.jobs.program)
    chat = ChatApi(context, server)
    context.events.watchers.append(chat.news)
    context.events.closers.append(server.stop)  # what nobody can ask any more must not keep the card
    return [
        route("/api/chat", chat.shown),
        json_route("/api/chat/start", chat.start, "source"),
        json_route("/api/chat/stop", chat.stop),
        Route("/api/chat/completions", chat.completions, methods=["POST"]),
        Route("/api/chat/differences", chat.differences, methods=["POST"]),
        route("/api/chat/blind", chat.blind_shown),
        Route("/api/chat/blind/ask", chat.blind_ask, methods=["POST"]),
        Route("/api/chat/blind/vote", chat.blind_vote, methods=["POST"]),
        Route("/api/chat/blind/undo", chat.blind_undo, methods=["POST"]),
    ]


class ChatApi:
    """What each path does."""

    def __init__(self, context: StudioContext, server: ChatServer) -> None:
        self._context, self._server = context, server
        self._votes = context.output_root / OWN_FOLDER / VOTES
        self._published: ChatState | None = None
        self._voting, self._starting = asyncio.Lock(), threading.Lock()

    def news(self) -> Iterator[News]:
        """`chat`: the server's state, when it is another one than a second ago.

        A server that is idle is ended, and one that was not started beside a training when a run begins: `ended_for`.
        """
        self._server.stop_if_idle()
        ended_for = trainings(self._context) if self._server.gives_way else []
        if ended_for:
            self._server.stop()
        state = self._server.state()
        if state != self._published:
            self._published = state
            yield "chat", {**asdict(state), "ended_for": ended_for}

    def shown(self, request: Request) -> dict[str, Any]:
        """The server's state, what could be asked, and which runs are being trained."""
        root = self._context.output_root
        return {**asdict(self._server.state()), "training": trainings(self._context),
                "sources": list(map(asdict, sources_in(root)))}  # fmt: skip

    def start(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """{source, bits?, anyway?}: load a model. 409 while a run is trained, unless `anyway`."""
        source, anyway = source_of(self._context, body["source"]), bool(body.get("anyway"))
        if not anyway:
            refuse_while_training(self._context)
        with self._starting:
            self._server.start(source, bits=body.get("bits"), beside_training=anyway)
        return self._changed()

    def stop(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """Give the card back."""
        self._server.stop()
        return self._changed()

    def _changed(self) -> dict[str, Any]:
        """The state after a request, which is news even where it is ready again within a second."""
        self._published = None
        return asdict(self._server.state())

    async def completions(self, request: Request) -> Response:
        """An OpenAI chat request, passed on; what comes back is passed on as it comes."""
        body = await json_body(request, "model", "messages")
        client = await asyncio.to_thread(self._server.client)
        try:
            answer = await begun_answer(client, body)
        except BaseException:
            await client.aclose()
            raise
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(pieces_of(client, answer), media_type=answer.headers["content-type"], headers=headers)

    async def differences(self, request: Request) -> Response:
        """{messages, answer, tuned, base}: the answer's pieces with log p(tuned) - log p(base)."""
        body = await json_body(request, "messages", "answer", "tuned", "base")
        turns, tuned, base = turns_of(body["messages"]), text_of(body, "tuned"), text_of(body, "base")
        messages, answer = turns_to_messages(turns), text_of(body, "answer")
        async with await asyncio.to_thread(self._server.client) as client:
            try:
                found = await token_differences(client, messages, answer, tuned, base)
            except httpx.HTTPError as reason:
                raise gone(reason) from None
        pieces = [{"text": one.text, "tuned": one.tuned, "base": one.base, "difference": one.difference}
                  for one in found]  # fmt: skip
        return StudioJson({"pieces": pieces})

    def blind_shown(self, request: Request) -> dict[str, Any]:
        """?a=&b=&result=1: the pair that waits for a vote; with `result`, what the votes so far say."""
        names = two_names(request.query_params)
        return view_of(open_votes(self._votes, names), with_result="result" in request.query_params)

    async def blind_ask(self, request: Request) -> Response:
        """{a, b, messages, max_tokens?, temperature?}: ask both, and show their answers without their names."""
        body = await json_body(request, "messages")
        turns, names = turns_of(body["messages"]), two_names(body)
        asked = {key: body[key] for key in ("max_tokens", "temperature") if body.get(key) is not None}
        asked["messages"] = turns_to_messages(turns)
        async with self._voting:
            waiting = open_votes(self._votes, names)
            if waiting.current is not None:  # asked twice: the first pair is voted on first
                return StudioJson(view_of(waiting))
            async with await asyncio.to_thread(self._server.client) as client:
                try:
                    answers = await asyncio.gather(*(whole_answer(client, {**asked, "model": n}) for n in names))
                except httpx.HTTPError as reason:
                    raise gone(reason) from None
            votes = add_pair(self._votes, turns, dict(zip(names, answers, strict=True)))
        return StudioJson({**view_of(votes), "is_same": votes.current is None})

    async def blind_vote(self, request: Request) -> Response:
        """{a, b, key, place}: 1 the first, 2 the second, 0 neither is better."""
        body = await json_body(request, "key", "place")
        if body["place"] not in (0, 1, 2) or isinstance(body["place"], bool):
            raise bad_request("place is 1, 2 or 0", "place")
        async with self._voting:
            votes = open_votes(self._votes, two_names(body))
            votes.vote(text_of(body, "key"), body["place"])
        return StudioJson(view_of(votes))

    async def blind_undo(self, request: Request) -> Response:
        """{a, b}: take the last vote back."""
        body = await json_body(request)
        async with self._voting:
            votes = open_votes(self._votes, two_names(body))
            votes.undo()
        return StudioJson(view_of(votes))


def source_of(context: StudioContext, text: Any) -> ModelSource:
    """The source of a path from the browser, which lies below the output folder. Raises ApiError."""
    path = context.safe_path(text, (context.output_root,))
    source = source_at(path, context.output_root) if path.is_dir() and path != context.output_root else None
    if source is None:
        raise ApiError(404, f"{text} holds no adapter and no model; choose one of the list", param="source",
                       code="no_such_source")  # fmt: skip
    return source


def trainings(context: StudioContext) -> list[str]:
    """The runs that hold the card now; one that has given it back holds nothing."""
    runs = Runs(context.output_root, context.jobs)
    return [runs.id_of(run) for run in runs.running() if runs.state(run)[0] != "given_back"]


def refuse_while_training(context: StudioContext) -> None:
    """Raises ApiError (409) while a run of this folder is trained: there is one card."""
    training = trainings(context)
    if training:
        message = f"{', '.join(training)} is training on this card; ask it in the Train view, or start this anyway"
        raise ApiError(409, message, code="card_in_use")


def turns_of(messages: Any) -> tuple[Turn, ...]:
    """The turns of an OpenAI conversation of plain texts that ends with the user's. Raises ApiError."""
    if not isinstance(messages, list) or not messages:
        raise bad_request("messages is a list of {role, content}", "messages")
    for message in messages:
        is_plain = isinstance(message, dict) and message.keys() == {"role", "content"}
        if not is_plain or message["role"] not in ROLES or not isinstance(message["content"], str):
            raise bad_request("a message is {role, content}, of system, user or assistant, with a text", "messages")
    if messages[-1]["role"] != "user":
        raise bad_request("the last message is the user's", "messages")
    return tuple(Turn(message["role"], message["content"]) for message in messages)


def text_of(body: Any, name: str) -> str:
    """A text of the body that is not empty. Raises ApiError."""
    value = body.get(name)
    if not isinstance(value, str) or not value:
        raise bad_request(f"{name} is a text", name)
    return value


def two_names(given: Any) -> tuple[str, str]:
    """The names a and b of two models. Raises ApiError."""
    a, b = (text_of(given, name) for name in ("a", "b"))
    if a == b or max(len(a), len(b)) > 100:
        raise bad_request("a and b are the names of two models", "b")
    return a, b


async def begun_answer(client: httpx.AsyncClient, body: dict[str, Any]) -> httpx.Response:
    """An answer whose body has not been read yet. Raises ApiError with what the server says."""
    try:
        answer = await client.send(client.build_request("POST", "/v1/chat/completions", json=body), stream=True)
        if answer.status_code == 200:
            return answer
        refusal = await answer.aread()
    except httpx.HTTPError as reason:
        raise gone(reason) from None
    raise ApiError(answer.status_code, message_of(refusal), code="model_refused")


async def pieces_of(client: httpx.AsyncClient, answer: httpx.Response) -> AsyncIterator[bytes]:
    """The body as it comes. When the page leaves, the connection is closed, and the server ends the answer."""
    try:
        async for piece in answer.aiter_raw():
            yield piece
    except httpx.HTTPError as reason:
        yield b"data: " + gone(reason).json + b"\n\n"
    finally:
        await answer.aclose()
        await client.aclose()


async def whole_answer(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    """The text of an answer. Raises ApiError with what the server says."""
    answer = await client.post("/v1/chat/completions", json=body)
    if answer.status_code != 200:
        raise ApiError(answer.status_code, message_of(answer.content), code="model_refused")
    return str(answer.json()["choices"][0]["message"]["content"] or "")


def gone(reason: httpx.HTTPError) -> ApiError:
    """The server has ended, or does not answer."""
    return ApiError(502, f"the model does not answer ({type(reason).__name__}); it may have ended: start it again",
                    code="model_gone")  # fmt: skip
