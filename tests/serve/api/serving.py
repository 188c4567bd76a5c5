"""A real server for the tests: the real engine with a tiny model, uvicorn, a socket of its own."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai

from onecard.config.base_model import ModelOptions
from onecard.config.inference import InferenceOptions, LimitOptions, SamplingOptions, ServeOptions
from onecard.inference.call import Chunk, Usage
from onecard.inference.engine import GenerationRequest, InferenceEngine, open_engine
from onecard.inference.stopping import FinishReason
from onecard.serve.api.app import Api, build_app
from onecard.serve.listen import Server, open_socket
from tests import tiny

LONG = 4000  # tokens: about four seconds of answering on one core


class Running:
    """A server in a thread; `url` is its root."""

    def __init__(self, app: Api) -> None:
        self.app, self.engine = app, app.engine
        self.socket = open_socket("127.0.0.1", 0)
        self.port = int(self.socket.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = Server(app, app.stop_answers)
        self._thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self._thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        self.server.should_exit = True
        self._thread.join(10)
        frames = sys._current_frames().get(self._thread.ident or 0)
        where = "".join(traceback.format_stack(frames)) if frames else ""
        assert not self._thread.is_alive(), f"the server did not stop; it stands here:\n{where}"

    def client(self, **changes: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **changes)

    def post(self, path: str, body: Any, **changes: Any) -> httpx.Response:
        with self.client() as client:
            return client.post(path, json=body, **changes)

    def chat(self, content: str = "Hi", **changes: Any) -> httpx.Response:
        """A chat request with one message; `changes` are fields of the body."""
        return self.post("/v1/chat/completions", chat_body(content, **changes))

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)


def chat_body(content: str = "Hi", **changes: Any) -> dict[str, Any]:
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 8}
    return body | changes


def long_body(**changes: Any) -> dict[str, Any]:
    """A chat request that takes seconds: the end token is kept away."""
    return chat_body("Hi", max_tokens=LONG, min_tokens=LONG, **changes)


def long_context_base(directory: Path) -> Path:
    """A tiny model that reads 8192 tokens, so that answers can be long enough to be left."""
    tiny.save_tiny_llama(directory, initializer_range=0.15, seed=3)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config["max_position_embeddings"] = 8192
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def open_tiny(base: Path, limits: LimitOptions, prompt_type: str = "alpaca", **options: Any) -> InferenceEngine:
    model = ModelOptions(model_path=str(base), bits=32, device="cpu", gradient_checkpointing=False)
    return open_engine(model, InferenceOptions(prompt_type=prompt_type, **options), limits, model_name="tiny")


@contextmanager
def serving(
    engine: InferenceEngine, limits: LimitOptions, options: ServeOptions | None = None, **defaults: Any
) -> Iterator[Running]:
    sampling = SamplingOptions(max_new_tokens=16, temperature=1.0)
    running = Running(build_app(engine, options or ServeOptions(), limits, sampling, **defaults))
    try:
        yield running
    finally:
        running.stop()


def events_of(text: str) -> list[Any]:
    """The data of each event: JSON, or the text [DONE]."""
    lines = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def wait_until(condition: Any, seconds: float) -> float:
    """Seconds until the condition held; fails when it does not in time."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"still not so after {seconds} s"
        time.sleep(0.005)
    return time.monotonic() - began


def request_bytes(body: dict[str, Any], path: str = "/v1/chat/completions") -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return head.encode() + f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode() + content


def read_all(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65536), b""))


def lines_of(connection: socket.socket) -> Iterator[str]:
    with connection.makefile("r", encoding="utf-8", newline="\n") as file:
        yield from (line.strip() for line in file)


class Breaking:
    """The real engine, until a stream's third picture: then `reason` is raised."""

    def __init__(self, engine: InferenceEngine, reason: Exception, after: int) -> None:
        self._engine, self._reason, self._after = engine, reason, after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def stream(self, request: Any, cancel: threading.Event | None = None) -> Iterator[Any]:
        for k, chunks in enumerate(self._engine.stream(request, cancel)):
            if k == self._after:
                raise self._reason
            yield chunks


class Scripted:
    """The real engine, which checks and encodes what it is asked; its answers are `text`, three characters a step."""

    def __init__(self, engine: InferenceEngine) -> None:
        self._engine, self.text = engine, ""
        self.reason: FinishReason = "stop"
        self.requests: list[GenerationRequest] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def stream(self, request: GenerationRequest, cancel: threading.Event | None = None) -> Iterator[list[Chunk]]:
        rows = self._engine._rows(request)
        self.requests.append(request)
        for end in range(0, len(self.text), 3):
            yield [Chunk(self.text[:end])] * len(rows)
        yield [Chunk(self.text, finish_reason=self.reason, usage=Usage(5, 7))] * len(rows)


def scripted(base: Path, jinja: Path | str, **options: Any) -> Scripted:
    return Scripted(open_tiny(base, LimitOptions(), str(jinja), **options))


def client_of(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def say(server: Running, text: str, reason: str = "stop") -> Any:
    """Let the model answer this from now on."""
    engine: Any = server.engine
    engine.text, engine.reason = text, reason
    engine.requests.clear()
    return engine
