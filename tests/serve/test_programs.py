"""The programs that listen, each a process of its own: what they serve, whom they refuse, how they end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from onecard.installation import SHIPPED as REPOSITORY
from tests.faults.fork_server import ForkServer

KEY = "a-key-of-the-tests"


@contextmanager
def started(server: ForkServer, *words: str, key: str = "") -> Iterator[str]:
    """The address of `onecard WORDS`, which listens on a free port; ended by SIGTERM, which must be a clean end."""
    typed = [*words, "--port", "0", "--bits", "32", "--device", "cpu"]
    process = server.start_call(
        "onecard.__main__:run", typed, imports=("onecard.serve.web.app",), environment={"ONECARD_API_KEY": key}
    )
    try:
        assert process.wait_for("(Ctrl-C stops)"), process.output()
        yield re.findall(r"http://127\.0\.0\.1:\d+", process.output())[0]
        process.signal(signal.SIGTERM)
    except BaseException:
        process.kill()
        raise
    assert process.wait() == 0, process.output()


def ask(url: str, body: object = None, **headers: str) -> tuple[int, str]:
    """Status and text of an answer."""
    data = None if body is None else json.dumps(body).encode()
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        with urlopen(Request(url, data, {"content-type": "application/json", **names}), timeout=30) as reply:
            return reply.status, reply.read().decode()
    except HTTPError as reply:
        return reply.code, reply.read().decode()


def test_api_and_page_on_one_port_with_a_key_and_adapters(fork_server: ForkServer, adapters_folder: Path) -> None:
    with started(fork_server, "serve", "--web", "--adapters_path", str(adapters_folder), key=KEY) as address:
        closed = ("/", "/v1/models", "/config", "/gradio_api/queue/data", "/nowhere", "/openapi.json")
        assert [ask(address + path)[0] for path in closed] == [401] * 6
        assert ask(address + "/health")[0] == 200
        with_key = {"authorization": f"Bearer {KEY}"}
        status, listed = ask(address + "/v1/models", **with_key)
        names = [model["id"] for model in json.loads(listed)["data"]]
        assert status == 200
        assert names[:2] == ["first", "second"]
        answers = set()
        for name in (*names, "first"):
            body = {"model": name, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, "temperature": 0}
            status, text = ask(address + "/v1/chat/completions", body, **with_key)
            assert status == 200, text
            answers.add((name, json.loads(text)["choices"][0]["message"]["content"]))
        assert len(answers) == 3, "each adapter answers by itself, and the same after another one"
        assert len({text for _, text in answers}) == 3
        status, page = ask(address + "/", **with_key)
        assert status == 200
        assert "gradio" in page
        for path in ("/gradio_api/file=/etc/passwd", "/gradio_api/file=onecard.yaml", "/gradio_api/upload"):
            assert ask(address + path, **with_key)[0] == 403
        assert ask(address + "/v1/models", Host="evil.example", **with_key)[0] == 403
        assert ask(address + "/", {}, Origin="https://evil.example", **with_key)[0] == 403


@pytest.mark.parametrize("words", [pytest.param(["chat"], marks=pytest.mark.slow), ["generate", "--web"]])
def test_a_page_by_itself(fork_server: ForkServer, lively_base: Path, words: list[str]) -> None:
    with started(fork_server, *words, "--model_path", str(lively_base)) as address:
        status, page = ask(address + "/")
        assert status == 200
        assert "gradio" in page
        assert ask(address + "/", Host="evil.example")[0] == 403
        assert ask(address + "/gradio_api/file=/etc/passwd")[0] == 403


def test_a_page_with_a_password(fork_server: ForkServer, lively_base: Path) -> None:
    with started(fork_server, "chat", "--model_path", str(lively_base), "--auth", "me:secret") as address:
        assert ask(address + "/config")[0] == 401
        status, page = ask(address + "/")
        assert status == 200
        assert "gradio" in page, "it asks for the password"
        assert ask(address + "/", Host="evil.example")[0] == 403


@pytest.mark.parametrize("program", ["chat.py", "generate.py", "tools/serve.py"])
def test_another_address_without_a_key_is_refused_before_anything_is_loaded(program: str) -> None:
    command = [sys.executable, program, "--host", "0.0.0.0"]
    environment = {name: value for name, value in os.environ.items() if name != "ONECARD_API_KEY"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--host" in done.stderr
