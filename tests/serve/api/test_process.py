"""The server as a process: it says where it listens, and a signal ends it without a client left wondering."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from onecard.errors import ConfigError
from onecard.serve.listen import open_socket, run_server, url_of
from tests.serve.api.serving import long_body

REPOSITORY = Path(__file__).resolve().parents[3]


@contextmanager
def process(base: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server of its own and its address."""
    program = f"""
        from pathlib import Path
        from onecard.config.inference import LimitOptions, ServeOptions
        from onecard.serve.api.app import build_app, run_server
        from tests.serve.api.serving import open_tiny
        limits = LimitOptions()
        engine = open_tiny(Path({str(base)!r}), limits)
        run_server(build_app(engine, ServeOptions(), limits), "127.0.0.1", 0)
        print("put away", flush=True)
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=REPOSITORY, text=True, encoding="utf-8",
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert child.stdout is not None
        line = child.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert found, line
        yield child, found[0]
    finally:
        child.kill()
        child.communicate()


# test_programs.py ends every program by SIGTERM.
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_ends_it_and_the_client_is_told(api_base: Path, number: signal.Signals) -> None:
    with process(api_base) as (child, url), httpx.Client(base_url=url, timeout=30) as client:
        assert client.get("/health").status_code == 200
        with client.stream("POST", "/v1/chat/completions", json=long_body(stream=True)) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: {")
            child.send_signal(number)
            rest = [line for line in lines if line.startswith("data: ")]
        assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "server_stopping"
        printed, warned = child.communicate(timeout=60)
    assert child.returncode == 0
    assert printed.splitlines()[-2:] == ["stopped", "put away"]
    assert "Traceback" not in warned


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
