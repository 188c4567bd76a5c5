"""Clients that keep the server waiting: connections without requests, slow requests, and answers nobody reads."""

from __future__ import annotations

import asyncio
import re
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from uvicorn import Config
from uvicorn.server import ServerState

from onecard.serve.connections import ConnectionLimits, LimitedConnection
from onecard.serve.security import NetworkRules, Protection
from tests.serve.bare_server import inside, listening

REPOSITORY = Path(__file__).resolve().parents[2]
HEAD = b"POST / HTTP/1.1\r\nHost: localhost\r\n"
IN_BODY = HEAD + b"Content-Length: 900000\r\n\r\nx"
FOREVER = 1e9


class Clock:
    """A clock that only the test moves; the server looks at it whenever it checks a connection."""

    def __init__(self) -> None:
        self._now, self._n_looks = 1000.0, 0

    def __call__(self) -> float:
        self._n_looks += 1
        return self._now

    def forward(self, seconds: float) -> None:
        """Move on, after the server has looked: a state lasts from the first look that finds it."""
        self.wait_for_looks()
        self.forward_at_once(seconds)

    def forward_at_once(self, seconds: float) -> None:
        self._now += seconds

    def wait_for_looks(self) -> None:
        before = self._n_looks
        for _ in range(6000):
            if self._n_looks >= before + 3:
                return
            time.sleep(0.01)
        raise AssertionError("no connection is left to be looked at")


def limits(**changes: Any) -> ConnectionLimits:
    """Limits that nobody reaches, but for the changes."""
    endless = dict.fromkeys(("head_seconds", "body_seconds", "unread_seconds"), FOREVER)
    return ConnectionLimits(**{**endless, "max_connections": 1000, **changes})


def get(address: tuple[str, int], path: str = "/health") -> bytes:
    with socket.create_connection(address, timeout=60) as client:
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        return b"".join(iter(lambda: client.recv(65536), b""))


def is_ended(client: socket.socket) -> bool:
    with suppress(ConnectionError):
        return client.recv(100) == b""
    return True


@pytest.mark.parametrize(("sent", "limit"), [(b"", "head"), (HEAD, "head"), (IN_BODY, "body")])
def test_requests_that_never_end_are_ended(sent: bytes, limit: str, capsys: pytest.CaptureFixture[str]) -> None:
    bounds = limits(**{f"{limit}_seconds": 0.3})
    with listening(Protection(inside, NetworkRules()), bounds) as address:
        clients = [socket.create_connection(address, timeout=60) for _ in range(5)]
        for client in clients:
            client.sendall(sent)
        for client in clients:
            with client:
                assert is_ended(client)
        bounds.head_seconds = bounds.body_seconds = FOREVER
        assert get(address).startswith(b"HTTP/1.1 200 ")
    # Browsers open connections in advance, without sending anything: no line for those.
    assert capsys.readouterr().err.count("a connection was closed: the client sent no whole") == (1 if sent else 0)


@pytest.mark.parametrize(("sent", "limit"), [(HEAD + b"X-Long: ", "head"), (IN_BODY, "body")])
def test_a_byte_now_and_then_does_not_keep_a_request_alive(sent: bytes, limit: str) -> None:
    with (
        listening(Protection(inside, NetworkRules()), limits(**{f"{limit}_seconds": 0.5})) as address,
        socket.create_connection(address) as client,
    ):
        client.sendall(sent)
        with pytest.raises(ConnectionError):
            for _ in range(1200):
                client.sendall(b"x")
                time.sleep(0.05)


def test_the_time_for_a_head_begins_anew_with_each_request() -> None:
    clock = Clock()
    with (
        listening(inside, limits(head_seconds=20, clock=clock)) as address,
        socket.create_connection(address, timeout=60) as client,
    ):
        for _ in range(3):
            client.sendall(HEAD)
            clock.forward(15)
            clock.wait_for_looks()
            client.sendall(b"Content-Length: 0\r\n\r\n")
            while answer := client.recv(1000):
                if answer.endswith(b"0\r\n\r\n"):
                    break
            assert answer
        client.sendall(HEAD)
        clock.forward(25)
        assert is_ended(client)


def test_an_answer_may_take_longer_than_every_limit() -> None:
    clock, next_part = Clock(), threading.Semaphore(0)

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await receive()
        await asyncio.to_thread(next_part.acquire)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(3):
            await asyncio.to_thread(next_part.acquire)
            await send({"type": "http.response.body", "body": b"part", "more_body": True})
        await send({"type": "http.response.body"})

    bounds = ConnectionLimits(clock=clock)
    with listening(slow, bounds) as address, socket.create_connection(address, timeout=60) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi")
        for _ in range(4):
            clock.forward(100_000)
            clock.wait_for_looks()
            next_part.release()
        assert b"".join(iter(lambda: client.recv(1000), b"")).count(b"part") == 3


@contextmanager
def stalled_reader(clock: Clock, size: int) -> Iterator[socket.socket]:
    """A client whose answer of so many bytes does not fit into the buffers of the network."""

    async def large(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % size)]})
        for _ in range(size // 100_000):
            await send({"type": "http.response.body", "body": b"x" * 100_000, "more_body": True})
        await send({"type": "http.response.body"})

    with (
        listening(large, limits(unread_seconds=300, clock=clock)) as address,
        socket.socket() as client,
    ):
        # Before it connects: a buffer of the system's choice may grow until all of the answer has room in it.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 500_000)
        client.settimeout(60)
        client.connect(address)
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        yield client


def test_a_slow_reader_gets_all_of_its_answer() -> None:
    size, clock = 40_000_000, Clock()
    with stalled_reader(clock, size) as client:
        n_read, more = 0, b"x"
        for part in (4_000_000, 8_000_000, 12_000_000):
            while n_read < part:
                n_read += len(client.recv(1_000_000))
            clock.forward(200)
            clock.wait_for_looks()
        while more:
            more = client.recv(1_000_000)
            n_read += len(more)
    assert size < n_read < size + 1000  # and the headers


class FullTransport:
    """A transport that has the same number of bytes to send whenever it is asked."""

    def __init__(self) -> None:
        self.is_aborted = False

    def get_extra_info(self, name: str) -> Any:
        return {"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)}.get(name)

    def set_protocol(self, protocol: Any) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 100_000

    def abort(self) -> None:
        self.is_aborted = True


@pytest.mark.parametrize("reads", [True, False])
def test_a_buffer_that_is_as_full_as_before_was_read_in_between(reads: bool) -> None:
    clock = Clock()

    async def main() -> bool:
        transport, config = FullTransport(), Config(inside, lifespan="off")
        config.load()
        connection = LimitedConnection(config, ServerState(), {}, limits=limits(unread_seconds=300, clock=clock))
        connection.connection_made(transport)
        connection.pause_writing()
        for _ in range(4):
            connection.check()
            clock.forward_at_once(200)
            if reads:
                connection.resume_writing()
                connection.pause_writing()
        return transport.is_aborted

    assert asyncio.run(main()) != reads


def test_a_client_that_stops_reading_is_ended(capsys: pytest.CaptureFixture[str]) -> None:
    size, clock = 40_000_000, Clock()
    with stalled_reader(clock, size) as client:
        assert client.recv(1000)
        n_read = 0
        told = ""
        while "took nothing of its answer within 300 s" not in told:
            clock.forward(400)  # fails where no connection is left to be looked at
            time.sleep(0.5)
            told += capsys.readouterr().err
            assert clock() < 50_000
        with suppress(ConnectionError):
            while more := len(client.recv(1_000_000)):
                n_read += more
    assert n_read < size


def test_idle_connections_make_room(capsys: pytest.CaptureFixture[str]) -> None:
    with listening(Protection(inside, NetworkRules()), limits(max_connections=20)) as address:
        clients = [socket.create_connection(address, timeout=60) for _ in range(100)]
        assert get(address).startswith(b"HTTP/1.1 200 ")
        assert is_ended(clients[0])  # the oldest ones made room
        for client in clients:
            client.close()
    assert capsys.readouterr().err.count("more than 20 are open, and it was idle longest") == 1


def test_connections_in_use_are_not_closed_for_others() -> None:
    go_on = threading.Event()

    async def waits(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"begun", "more_body": True})
        await asyncio.to_thread(go_on.wait)
        await send({"type": "http.response.body", "body": b"ended"})

    with listening(waits, limits(max_connections=3)) as address:
        clients = [socket.create_connection(address, timeout=60) for _ in range(3)]
        for client in clients:
            client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            client.recv(1)
        with socket.create_connection(address, timeout=60) as newcomer:
            assert is_ended(newcomer)
        go_on.set()
        for client in clients:
            with client:
                assert b"ended" in b"".join(iter(lambda client=client: client.recv(1000), b""))  # type: ignore[misc]


SERVERS = {
    "api": "run_server(Protection(app, NetworkRules()), '127.0.0.1', 0)",
    "page": "serve_page(lambda page: page.mount('/', app), PageOptions(port=0), max_body_bytes=1000, public_link=None)",
}


@contextmanager
def process_with_few_descriptors(serve: str) -> Iterator[tuple[subprocess.Popen[str], tuple[str, int]]]:
    """A server as a process that may open 256 files, and its address."""
    program = f"""
        import resource
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
        from onecard.config.inference import PageOptions
        from onecard.serve.listen import run_server
        from onecard.serve.web.server import serve_page
        from onecard.serve.security import NetworkRules, Protection
        from starlette.responses import PlainTextResponse

        app = PlainTextResponse("well")
        {serve}
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=REPOSITORY, text=True, encoding="utf-8",
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert child.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:(\d+)", child.stdout.readline())
        assert found
        yield child, ("127.0.0.1", int(found[1]))
    finally:
        child.kill()
        child.communicate()


@pytest.mark.parametrize("name", ["api", pytest.param("page", marks=pytest.mark.slow)])
def test_300_idle_connections_and_256_descriptors(name: str) -> None:
    resource = pytest.importorskip("resource")
    if 0 <= resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 400:
        pytest.skip("this process may not open 300 connections itself")
    with process_with_few_descriptors(SERVERS[name]) as (child, address):
        clients = [socket.create_connection(address, timeout=60) for _ in range(300)]
        for _ in range(3):
            assert get(address).startswith(b"HTTP/1.1 200 ")
        child.terminate()
        _, told = child.communicate(timeout=60)
        for client in clients:
            client.close()
    assert told.count("warning: ") == 1
    assert "more than 128 are open" in told
    assert len(told) < 2000
