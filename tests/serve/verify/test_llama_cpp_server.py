"""llama-cpp-python's server on our GGUF files: the same is called the same; the base and a wrong template are not.

Needs `pip install "llama-cpp-python[server]"`, which compiles for some minutes.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from onecard.console import run_main
from onecard.programs import gguf as exporter
from onecard.programs import verify_server as program
from tests.serve.verify.conftest import BASE

pytest.importorskip("llama_cpp.server.app", reason="llama-cpp-python[server] is not installed; it compiles for minutes")
pytestmark = pytest.mark.slow


@contextmanager
def llama_server(file: Path, *words: str) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = [sys.executable, "-m", "llama_cpp.server", "--model", str(file), "--port", str(port), "--n_ctx", "512",
             "--logits_all", "true", "--n_threads", "1", *words]  # fmt: skip
    process = subprocess.Popen(start, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, "the server ended"
            try:
                httpx.get(f"{url}/v1/models", timeout=5)
                break
            except httpx.HTTPError:
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def files(checked_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("gguf")

    def make(kind: str) -> Path:
        words = {
            "f16": ["--lora_path", str(checked_run), "--gguf_type", "f16"],
            "q4_0": ["--lora_path", str(checked_run), "--gguf_type", "q4_0"],
            "base": ["--model_path", str(BASE), "--prompt_type", str(checked_run / "chat_template.jinja")],
            "chatml": ["--lora_path", str(checked_run), "--prompt_type", "chatml"],
        }[kind]
        exporter.main([*words, "--output_path", str(folder / kind)])
        return next((folder / kind).glob("*.gguf"))

    return make


@pytest.mark.parametrize(
    ("kind", "cause"),
    [("f16", ""), ("q4_0", ""), ("base", "adapter not applied"), ("chatml", "wrong template")],
)  # fmt: skip
def test_what_llama_cpp_serves(
    kind: str, cause: str, files: Callable[[str], Path], checked_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with llama_server(files(kind)) as url:
        capsys.readouterr()
        words = [url, "--run", str(checked_run), "--json", "--max_kl", "0.3"]
        code = run_main(lambda: program.main(words), debug=False)
    said = capsys.readouterr()
    found: dict[str, Any] = json.loads(said.out[said.out.index("{") :])
    print(kind, found)
    assert (code, found["same"]) == ((2, "no") if cause else (0, "yes")), said.err
    assert cause == (found["model"]["cause"] or found["template"]["cause"])
