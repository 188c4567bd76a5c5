"""Starts of the whole program in well under a second, each in a process of its own that may be killed.

Importing torch takes seconds, and the fault tests start the program hundreds of times. So one server imports
everything once, stays single-threaded, and forks a child for each start; the child does what `finetune.py` does after
parsing and ends with the exit code that the real program would have.

Requests and answers are lines of JSON on standard input and output:
    {"start": {"base", "data", "output", "options", "log", "file_limit_bytes", "environment"}} -> {"pid": 4711}
    {"start": {"tool", "words", "watched", "kill_at", "kill_with", "log", "file_limit_bytes"}} -> {"pid": 4712}
    {"start": {"call", "arguments", "imports", "environment", "terminal", "log"}} -> {"pid": 4713}
    {"wait": 4711} -> {"code": -9}
The second starts `onecard TOOL WORDS`, counts its disk operations under the folder `watched`, and sends it the signal
`kill_with` at operation number `kill_at` (counted from 1; 0: never). The third calls "module:function", with what it
imports imported before the fork, once for all; `terminal` names the terminal that it reads from and writes to, if any.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import onecard
from onecard.config.training import FinetuneConfig
from tests import tiny
from tests.formula import plan_by_formula

REPOSITORY = Path(__file__).resolve().parents[2]
CHILD_LIMIT_S = 120


@dataclass
class Start:
    """One started program."""

    server: ForkServer
    pid: int
    log: Path
    started_s: float = field(default_factory=time.monotonic)

    def wait(self) -> int:
        """The exit code; minus the signal's number for a process that a signal ended."""
        code = self.server.ask({"wait": self.pid})["code"]
        self.server.running.discard(self.pid)
        return code

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> int:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    def has_ended(self) -> bool:
        """True once the process is only waiting to be asked for its exit code."""
        return Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"

    def output(self) -> str:
        """What it has printed until now, on both streams."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def wait_for(self, text: str) -> bool:
        """Return as soon as `text` has been printed, with True; or with False when the program ended without it."""
        until_s = time.monotonic() + CHILD_LIMIT_S
        while text not in self.output():
            if self.has_ended():
                return text in self.output()
            assert time.monotonic() < until_s, f"{text!r} was never printed:\n{self.output()}"
            time.sleep(0.002)
        return True


class ForkServer:
    """The test's side: start programs, wait for them."""

    def __init__(self, scratch: Path) -> None:
        self.scratch, self.n_starts = scratch, 0
        self.running: set[int] = set()
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        threads["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # pyarrow's allocator starts one at import
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.fork_server"], cwd=REPOSITORY, env={**os.environ, **threads},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def start(
        self, base: Path, data: Path, output: Path, options: dict[str, Any], *, file_limit_bytes: int = 0,
        environment: dict[str, str] | None = None,
    ) -> Start:  # fmt: skip
        """Start one run; see `tiny.config_for` for the options."""
        self.n_starts += 1
        log = self.scratch / f"start-{self.n_starts}.log"
        paths = {"base": str(base), "data": str(data), "output": str(output), "log": str(log)}
        order = {**paths, "options": options, "file_limit_bytes": file_limit_bytes, "environment": environment or {}}
        pid = self.ask({"start": order})["pid"]
        self.running.add(pid)
        return Start(self, pid, log)

    def start_tool(
        self, tool: str, words: list[str], *, watched: Path, kill_at: int = 0, kill_with: int = signal.SIGKILL,
        file_limit_bytes: int = 0,
    ) -> Start:  # fmt: skip
        """Start one tool, to be killed at its `kill_at`-th disk operation; its last line counts the operations."""
        self.n_starts += 1
        log = self.scratch / f"start-{self.n_starts}.log"
        order = {"tool": tool, "words": words, "watched": str(watched), "log": str(log)}
        order |= {"kill_at": kill_at, "kill_with": int(kill_with)}
        pid = self.ask({"start": {**order, "file_limit_bytes": file_limit_bytes}})["pid"]
        self.running.add(pid)
        return Start(self, pid, log)

    def start_call(
        self, call: str, *arguments: Any, imports: tuple[str, ...] = (), environment: dict[str, str] | None = None,
        terminal: str = "",
    ) -> Start:  # fmt: skip
        """Start "module:function" with these arguments, which JSON can hold, as the main function of a program."""
        self.n_starts += 1
        log = self.scratch / f"start-{self.n_starts}.log"
        order = {"call": call, "arguments": arguments, "imports": imports, "environment": environment or {}}
        pid = self.ask({"start": {**order, "terminal": terminal, "log": str(log)}})["pid"]
        self.running.add(pid)
        return Start(self, pid, log)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        for pid in self.running:  # a failed test may have left a stopped one, which would hold the pipe for ever
            os.kill(pid, signal.SIGKILL)
        self.process.communicate()


def serve() -> None:
    """The server's side: answer until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints must not be taken for an answer
    import_everything()
    assert_one_thread()
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            answer = {"pid": fork(request["start"])}
        else:
            answer = {"code": os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def assert_one_thread() -> None:
    threads = len(list(Path("/proc/self/task").iterdir()))
    assert threads == 1, f"{threads} threads: a fork would copy locks that nobody opens"


def import_everything() -> None:
    """Import what the programs import, but not run anything, which would start threads."""
    names = ["transformers.models.llama." + name for name in ("modeling_llama", "tokenization_llama")]
    names += ["transformers.integrations.sdpa_attention", "sentencepiece.sentencepiece_model_pb2", "gguf"]
    names += ["PIL.JpegImagePlugin", "matplotlib.backends.backend_agg", "matplotlib.figure", "torch._dynamo"]
    names += ["pyarrow.dataset", "jsonargparse", "typeshed_client", "tests.tiny", "numpy.ctypeslib", "attrs"]
    names += ["torch.utils.serialization.config", "transformers.models.idefics", "peft.tuners.lora.bnb"]
    for found in pkgutil.walk_packages(onecard.__path__, "onecard."):
        if not found.name.startswith(("onecard.serve.", "onecard.__main__")):
            names.append(found.name)
    for name in names:
        importlib.import_module(name)
    # As in tests/conftest.py: no test takes the power away, and none looks at the picture or at the memory plan.
    os.fsync = lambda _descriptor: None
    importlib.import_module("onecard.train.trackers").draw_loss = lambda _run_dir, _unit="": None
    plan_by_formula(pytest.MonkeyPatch())
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("llama")  # a thousand regular expressions, kept for all families
    gc.collect()
    gc.freeze()  # a child's collector would write into every page that it shares with this process


def config_of(order: dict[str, Any]) -> FinetuneConfig:
    return tiny.config_for(Path(order["base"]), Path(order["data"]), Path(order["output"]), **order["options"])


def fork(order: dict[str, Any]) -> int:
    """Fork a child that does one run; returns its process id."""
    for name in order.get("imports", ()):
        importlib.import_module(name)
    assert_one_thread()
    # Opened here, so that it is open when the test is answered: its reader takes a terminal of nobody for a closed one.
    terminal = os.open(order["terminal"], os.O_RDWR | os.O_NOCTTY) if order.get("terminal") else None
    pid = os.fork()
    if pid:
        if terminal is not None:
            os.close(terminal)
        return pid
    code = 98
    try:
        take_streams(order["log"], terminal)
        signal.alarm(CHILD_LIMIT_S)
        runs = {"tool": run_tool, "call": run_call}
        code = next((run for name, run in runs.items() if name in order), run_once)(order)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise AssertionError("unreachable")


def take_streams(log: str, terminal: int | None) -> None:
    """Read from nothing and write into `log`; or do both with a terminal, whose Ctrl-C then reaches this process."""
    if terminal is None:
        written = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
        streams = (os.open(os.devnull, os.O_RDONLY), written, written)
    else:
        import fcntl
        import termios

        os.setsid()
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
        streams = (terminal,) * 3
    for number, stream in enumerate(streams):
        os.dup2(stream, number)


def run_call(order: dict[str, Any]) -> int:
    """What a program does whose main function is this one."""
    from onecard.console import run_main

    os.environ.update(order["environment"])
    module, _, function = order["call"].partition(":")
    return run_main(lambda: getattr(importlib.import_module(module), function)(*order["arguments"]))


def run_once(order: dict[str, Any]) -> int:
    """What finetune.py does once its options are parsed."""
    from onecard.console import run_main
    from onecard.recipes import finetune

    limit_files(order["file_limit_bytes"])
    os.environ.update(order["environment"])
    config = config_of(order)

    def main() -> None:
        finetune(config)

    return run_main(main)


def run_tool(order: dict[str, Any]) -> int:
    """What `onecard TOOL WORDS` does, killed at the disk operation that was asked for."""
    from onecard.console import run_main

    limit_files(order["file_limit_bytes"])
    tool = importlib.import_module(f"onecard.programs.{order['tool']}")
    watched, n_operations = order["watched"], 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal n_operations
        if event not in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.truncate"):
            return
        if not any(isinstance(one, (str, os.PathLike)) and os.fspath(one).startswith(watched) for one in arguments):
            return
        n_operations += 1
        if n_operations == order["kill_at"]:
            os.kill(os.getpid(), order["kill_with"])

    sys.addaudithook(count)
    code = run_main(lambda: tool.main(order["words"]))
    print(f"\n{n_operations} operations", flush=True)
    return code


def limit_files(n_bytes: int) -> None:
    """Let no file grow over so many bytes, which looks like a full disk; 0: no limit."""
    if n_bytes:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes,) * 2)


if __name__ == "__main__":
    serve()
