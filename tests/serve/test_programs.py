"""The programs that listen, started as a person starts them: what they serve, whom they refuse, how they end."""

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

KEY = "a-key-of-the-tests"


@contextmanager
def started(*words: str, key: str = "") -> Iterator[str]:
    """The address of a program that listens on a free port; ended by SIGTERM, which must be a clean end."""
    environment = {**os.environ, "ONECARD_API_KEY": key, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, *words, "--port", "0", "--bits", "32", "--device", "cpu"], cwd=REPOSITORY, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        printed = []
        assert process.stdout is not None
        for line in process.stdout:
            printed.append(line)
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                break
        else:
            pytest.fail("".join(printed))
        yield found[0]
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def ask(url: str, body: object = None, **headers: str) -> tuple[int, str]:
    """Status and text of an answer."""
    data = None if body is None else json.dumps(body).encode()
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        with urlopen(Request(url, data, {"content-type": "application/json", **names}), timeout=30) as reply:
            return reply.status, reply.read().decode()
    except HTTPError as reply:
        return reply.code, reply.read().decode()


def test_api_and_page_on_one_port_with_a_key_and_adapters(adapters_folder: Path) -> None:
    with started("tools/serve.py", "--web", "--adapters_path", str(adapters_folder), key=KEY) as address:
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


@pytest.mark.parametrize("words", [pytest.param(["chat.py"], marks=pytest.mark.slow), ["generate.py", "--web"]])
def test_a_page_by_itself(lively_base: Path, words: list[str]) -> None:
    with started(*words, "--model_path", str(lively_base)) as address:
        status, page = ask(address + "/")
        assert status == 200
        assert "gradio" in page
        assert ask(address + "/", Host="evil.example")[0] == 403
        assert ask(address + "/gradio_api/file=/etc/passwd")[0] == 403


def test_a_page_with_a_password(lively_base: Path) -> None:
    with started("chat.py", "--model_path", str(lively_base), "--auth", "me:secret") as address:
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
