"""The server as a process: it says where it listens, and a signal ends it without a client left wondering."""

from __future__ import annotations

import json
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from onecard.config.inference import LimitOptions, ServeOptions
from onecard.errors import ConfigError
from onecard.serve.api.app import build_app
from onecard.serve.listen import open_socket, run_server, url_of
from tests.faults.fork_server import ForkServer, Start
from tests.serve.api.serving import long_body, open_tiny


def serve_tiny(base: str) -> None:
    """The program of a process of its own."""
    limits = LimitOptions()
    run_server(build_app(open_tiny(Path(base), limits), ServeOptions(), limits), "127.0.0.1", 0)
    print("put away", flush=True)


@pytest.fixture
def process(fork_server: ForkServer, api_base: Path) -> Iterator[tuple[Start, str]]:
    """A server as a process, and its address."""
    child = fork_server.start_call("tests.serve.api.test_process:serve_tiny", str(api_base), imports=(__name__,))
    try:
        assert child.wait_for("(Ctrl-C stops)"), child.output()
        yield child, re.findall(r"http://127\.0\.0\.1:\d+", child.output())[0]
    finally:
        if child.pid in fork_server.running:
            child.kill()


# test_programs.py ends every program by SIGTERM.
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_ends_it_and_the_client_is_told(process: tuple[Start, str], number: signal.Signals) -> None:
    child, url = process
    with httpx.Client(base_url=url, timeout=30) as client:
        assert client.get("/health").status_code == 200
        with client.stream("POST", "/v1/chat/completions", json=long_body(stream=True)) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: {")
            child.signal(number)
            rest = [line for line in lines if line.startswith("data: ")]
        assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "server_stopping"
    assert child.wait() == 0
    assert child.output().splitlines()[-2:] == ["stopped", "put away"]
    assert "Traceback" not in child.output()


def test_a_port_that_is_taken() -> None:
    with open_socket("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port: {port} on 127.0.0.1") as caught:
            run_server(None, "127.0.0.1", port)
    assert caught.value.flag == "--port"


@pytest.mark.parametrize("host", ["no.such.host.invalid", "203.0.113.77"])
def test_an_address_of_somebody_else(host: str) -> None:
    with pytest.raises(ConfigError):
        open_socket(host, 0)


def test_addresses_to_type() -> None:
    with open_socket("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        assert port > 0
        assert url_of(listening, "0.0.0.0") == url_of(listening, "127.0.0.1") == f"http://127.0.0.1:{port}"
        assert url_of(listening, "::1") == url_of(listening, "::") == f"http://[::1]:{port}"
        assert url_of(listening, "localhost") == f"http://localhost:{port}"
    with open_socket("localhost", 0) as listening:
        assert listening.family == socket.AF_INET
