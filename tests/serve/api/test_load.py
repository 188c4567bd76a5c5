"""Many clients, clients that leave, many requests in a row: everybody is served, and nothing is left behind."""

from __future__ import annotations

import asyncio
import gzip
import json
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from onecard.config.inference import LimitOptions
from onecard.inference.engine import InferenceEngine
from tests.serve.api.serving import (
    LONG,
    Running,
    chat_body,
    events_of,
    lines_of,
    long_body,
    open_tiny,
    request_bytes,
    serving,
    wait_until,
)

CHAT = "/v1/chat/completions"


def threads() -> set[str]:
    """Names of threads that belong to an answer."""
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("onecard-")}


def test_fifty_clients_at_once_are_all_served(server: Running) -> None:
    """Half of them stream; each gets the answer to its own question."""
    questions = [f"Count to {k}" for k in range(50)]

    async def ask_all() -> list[str]:
        limits = httpx.Limits(max_connections=50)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
            return await asyncio.gather(*(ask(client, k) for k in range(50)))

    async def ask(client: httpx.AsyncClient, k: int) -> str:
        body = chat_body(questions[k], max_tokens=8, stream=k % 2 == 0)
        answer = await client.post(CHAT, json=body)
        assert answer.status_code == 200, answer.text
        if k % 2:
            return str(answer.json()["choices"][0]["message"]["content"])
        *events, done = events_of(answer.text)
        assert done == "[DONE]"
        return "".join(event["choices"][0]["delta"].get("content", "") for event in events)

    together = asyncio.run(ask_all())
    alone = [server.chat(text, max_tokens=8).json()["choices"][0]["message"]["content"] for text in questions[:6]]
    assert together[:6] == alone
    assert len(together) == 50
    assert all(together)
    wait_until(lambda: not threads() and not server.app.jobs, 2)


def test_more_than_the_queue_takes_are_sent_away_at_once(api_base: Path) -> None:
    limits = LimitOptions(max_queue=3)
    with serving(open_tiny(api_base, limits), limits) as server:
        began = time.monotonic()
        with server.client() as holder, holder.stream("POST", CHAT, json=long_body(stream=True)) as first:
            lines = first.iter_lines()
            assert next(lines)
            answers = asyncio.run(post_many(server.url, chat_body(), 40, n_wanted=37))
            assert time.monotonic() - began < 3
        assert [answer.status_code for answer in answers] == [429] * 37
        for answer in answers:
            assert answer.json()["error"]["code"] == "queue_full"
            assert int(answer.headers["retry-after"]) >= 1
        wait_until(lambda: not server.app.jobs, 2)
        assert server.chat().status_code == 200


async def post_many(url: str, body: Any, n: int, n_wanted: int) -> list[httpx.Response]:
    """The first `n_wanted` answers of `n` requests; the others are left."""
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=httpx.Limits(max_connections=n)) as client:
        asking = [asyncio.create_task(client.post(CHAT, json=body)) for _ in range(n)]
        found: set[asyncio.Task[httpx.Response]] = set()
        while len(found) < n_wanted:
            await asyncio.sleep(0.01)
            found = {task for task in asking if task.done()}
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        return [task.result() for task in found]


PATHS = {
    CHAT: long_body(),
    "/v1/completions": {"model": "tiny", "prompt": "Hi", "max_tokens": LONG, "min_tokens": LONG},
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", [{}, {"stream": True}, {"num_beams": 2, "stream": True}, {"n": 3}])
def test_a_client_that_leaves_frees_the_model(server: Running, path: str, mode: dict[str, Any]) -> None:
    for _ in range(3):
        with server.connect() as connection:
            connection.sendall(request_bytes(PATHS[path] | mode, path))
            if mode.get("stream"):
                assert any(line.startswith(("data: {", ":")) for line in lines_of(connection))
            else:
                wait_until(lambda: len(server.app.jobs) == 1, 2)
                time.sleep(0.1)
        began = time.monotonic()
        assert server.chat(max_tokens=1).status_code == 200
        assert time.monotonic() - began < 1
        wait_until(lambda: not server.app.jobs and not threads(), 1)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_the_queue_gives_up_its_place(
    server: Running, engine: InferenceEngine, stream: bool
) -> None:
    with server.connect() as first, server.connect() as second:
        first.sendall(request_bytes(long_body(stream=True)))
        assert any(line.startswith("data: {") for line in lines_of(first))
        second.sendall(request_bytes(chat_body(stream=stream)))
        wait_until(lambda: engine.n_waiting == 1, 2)
        second.close()
        assert wait_until(lambda: engine.n_waiting == 0, 1) < 1
        wait_until(lambda: len(server.app.jobs) == 1, 1)  # the first one is still being answered
    wait_until(lambda: not server.app.jobs and not threads(), 1)


def test_a_client_that_leaves_an_embedding_in_the_queue(server: Running, engine: InferenceEngine) -> None:
    with server.connect() as first, server.connect() as second:
        first.sendall(request_bytes(long_body(stream=True)))
        assert any(line.startswith("data: {") for line in lines_of(first))
        second.sendall(request_bytes({"model": "tiny", "input": "Hi"}, "/v1/embeddings"))
        wait_until(lambda: engine.n_waiting == 1, 2)
        second.close()
        wait_until(lambda: engine.n_waiting == 0, 1)
    wait_until(lambda: not server.app.jobs and not threads(), 1)


def test_a_client_that_reads_slowly_gets_everything(server: Running) -> None:
    """It does not read for a while; what piled up is one longer piece."""
    body = chat_body(max_tokens=250, min_tokens=250, temperature=0)
    whole = server.post(CHAT, body).json()["choices"][0]["message"]["content"]
    with server.connect() as connection:
        connection.sendall(request_bytes(body | {"stream": True}))
        time.sleep(1)
        lines = [line for line in lines_of(connection) if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    pieces = [json.loads(line[6:])["choices"][0]["delta"].get("content", "") for line in lines[:-1]]
    assert "".join(pieces) == whole


def test_hostile_clients_take_little_memory_and_others_are_served(server: Running) -> None:
    """500 idle connections, 50 heads of which a byte comes now and then, a body of 10 GB and a gzip bomb of 1 GB."""
    resource = pytest.importorskip("resource")
    if 0 <= resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 1400:
        pytest.skip("this process may not open both ends of 550 connections")
    process = psutil.Process()
    assert server.chat(max_tokens=1).status_code == 200
    before = process.memory_info().rss
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    with ExitStack() as stack:
        for _ in range(500):
            stack.enter_context(server.connect())
        slow = [stack.enter_context(server.connect()) for _ in range(50)]
        for place in range(20):
            for client in slow:
                client.sendall(head[place : place + 1])
        large = stack.enter_context(server.connect())
        large.sendall(head + b"Content-Type: application/json\r\nContent-Length: 10000000000\r\n\r\n{")
        assert large.recv(100).startswith(b"HTTP/1.1 413 ")
        bomb = gzip.compress(bytes(10_000_000)) * 100
        headers = {"content-type": "application/json", "content-encoding": "gzip"}
        with server.client() as client:
            assert client.post(CHAT, content=bomb, headers=headers).status_code == 413
        assert server.chat(max_tokens=1).status_code == 200
        grown = process.memory_info().rss - before
    assert grown < 64 * 2**20, f"{grown / 2**20:.1f} MB more"


@pytest.mark.parametrize("n_requests", [300, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_requests_do_not_grow(server: Running, n_requests: int) -> None:
    """Chats, streams, completions with log-probabilities, embeddings, and refusals, in turn."""
    requests: list[tuple[str, Any, int]] = [
        (CHAT, chat_body(max_tokens=2), 200),
        (CHAT, chat_body(max_tokens=2, stream=True, temperature=1), 200),
        ("/v1/completions", {"model": "tiny", "prompt": "Hi", "max_tokens": 1, "logprobs": 2, "echo": True}, 200),
        ("/v1/embeddings", {"model": "tiny", "input": ["a", "b"]}, 200),
        (CHAT, chat_body(tools=[1]), 400),
    ]
    process = psutil.Process()
    with server.client() as client:

        def ask(n: int) -> int:
            for k in range(n):
                path, body, status = requests[k % len(requests)]
                answer = client.post(path, json=body)
                assert answer.status_code == status
            return int(process.memory_info().rss)

        before = ask(100)
        n_threads = process.num_threads()
        grown = ask(n_requests) - before
    assert grown < 8 * 2**20, f"{grown / 2**20:.1f} MB more after {n_requests} requests"
    assert process.num_threads() <= n_threads + 1
    wait_until(lambda: not server.app.jobs and not threads(), 1)
