"""A person at a terminal, for tests: a real pseudo-terminal, a screen that shows what came out, and a model that obeys.

`Paper` draws what a terminal would draw of the few sequences that are used here, Chinese characters two cells wide.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

from rich.cells import cell_len

from onecard.config.inference import LimitOptions
from onecard.inference.call import Chunk, Usage
from onecard.inference.engine import GenerationRequest
from tests.faults.fork_server import Start

PATIENCE_SECONDS = 90.0  # loading torch takes half a minute on a busy machine
SEQUENCE = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])")


class FakeEngine:
    """Answers with what `reply` gives: the texts of the chunks, or an error to raise; one character is one token."""

    names = ("base", "poet")
    context_limit = 200
    limits = LimitOptions()

    def __init__(self, reply: Callable[[GenerationRequest], Iterator[str | Chunk | Exception]] | None = None) -> None:
        self.reply = reply or (lambda request: iter([f"{request.turns[-1].content}!"]))
        self.requests: list[GenerationRequest] = []
        self.n_closed = 0

    def has(self, adapter: str) -> bool:
        return adapter in ("", *self.names)

    def template(self, adapter: str = "", prompt_type: str = "") -> SimpleNamespace:
        return SimpleNamespace(name=prompt_type or "alpaca")

    def count_tokens(self, turns, adapter: str = "", prompt_type: str = "") -> int:
        return sum(len(turn.content) for turn in turns)

    def stream(self, request: GenerationRequest, cancel: threading.Event | None = None) -> Iterator[list[Chunk]]:
        self.requests.append(request)
        n_prompt, text = self.count_tokens(request.turns), ""
        try:
            for piece in self.reply(request):
                if isinstance(piece, Exception):
                    raise piece
                if cancel is not None and cancel.is_set():
                    yield [Chunk(text, (), "cancelled", Usage(n_prompt, len(text)))]
                    return
                chunk = piece if isinstance(piece, Chunk) else Chunk(piece, (), None, Usage(n_prompt, len(piece)))
                text = chunk.text
                yield [chunk]
                if chunk.finish_reason:
                    return
            yield [Chunk(text, (), "stop", Usage(n_prompt, len(text)))]
        finally:
            self.n_closed += 1


def growing(text: str, seconds_each: float = 0.01) -> Iterator[str]:
    """The text as it grows, character by character."""
    for end in range(1, len(text) + 1):
        time.sleep(seconds_each)
        yield text[:end]


class Paper:
    """What a terminal of this size shows, and what has scrolled off it."""

    def __init__(self, columns: int, rows: int) -> None:
        self.columns, self.rows = columns, rows
        self.lines: list[list[str]] = [[]]  # "" stands behind a wide character
        self.row = self.column = 0
        self.wraps = True

    def draw(self, output: str) -> None:
        place = 0
        while place < len(output):
            match = SEQUENCE.match(output, place)
            if match:
                self._obey(match[1], match[2])
                place = match.end()
                continue
            self._put(output[place])
            place += 1

    def text(self) -> str:
        return "\n".join("".join(line).rstrip() for line in self.lines).rstrip()

    def _obey(self, argument: str, what: str) -> None:
        if what in "CD":
            self.column += int(argument or 1) * (1 if what == "C" else -1)
        elif what == "A":
            top = max(0, len(self.lines) - self.rows)
            self.row = max(top, self.row - int(argument or 1))
        elif what == "K":
            self.lines[self.row][0 if argument == "2" else self.column :] = []
        elif what == "J":
            assert argument in ("", "0"), "nothing may clear the screen"
            self.lines[self.row + 1 :] = []
        elif argument == "?7":
            self.wraps = what == "h"
        else:
            assert what in "mhl", f"an unexpected sequence: {argument}{what}"

    def _put(self, character: str) -> None:
        if character == "\r":
            self.column = 0
        elif character == "\n":
            self._next_line()
        elif character == "\b":
            self.column -= 1
        else:
            assert character.isprintable() or character in "\x07\t", repr(character)
            self._print(character, cell_len(character))

    def _print(self, character: str, width: int) -> None:
        if self.column + width > self.columns:
            if not self.wraps:
                return
            self.column = 0
            self._next_line()
        line = self.lines[self.row]
        line += [" "] * (self.column - len(line))
        line[self.column : self.column + width] = [character, *[""] * (width - 1)]
        self.column += width

    def _next_line(self) -> None:
        self.row += 1
        if self.row == len(self.lines):
            self.lines.append([])


class Terminal:
    """The parent's side of a pseudo-terminal in which a function runs in a child process."""

    def __init__(self, pid: int, number: int, columns: int, rows: int, wait: Callable[[], int] | None = None) -> None:
        """wait: gives the exit code of a child that is not this process's own."""
        self.pid, self.number, self.size = pid, number, (columns, rows)
        self._wait_for_child = wait or (lambda: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        self.output = ""
        self.states: list[str] = []
        self._bytes = b""
        self.exit_code: int | None = None

    def send(self, text: str) -> None:
        os.write(self.number, text.encode("utf-8"))

    def until(self, words: str, *, after: int = 0) -> int:
        """Read until these words came out behind place `after` of the words; returns the place behind them."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while words not in self.words[after:]:
            assert time.monotonic() < deadline, f"waited for {words!r}, got:\n{self.output}"
            assert self._read(deadline - time.monotonic()), f"ended before {words!r}, got:\n{self.output}"
        return self.words.index(words, after) + len(words)

    def ask(self, text: str, words: str) -> int:
        """Type a line and wait for these words."""
        after = len(self.words)
        self.send(text + "\r")
        return self.until(words, after=after)

    def ended(self) -> int:
        """The exit code, once the program has left."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self._read(max(0.0, deadline - time.monotonic())):
            pass
        assert time.monotonic() < deadline, f"it did not leave:\n{self.output}"
        return self._wait()

    @property
    def words(self) -> str:
        """What came out, without sequences; a cursor that moves to the right passes over blanks."""
        return SEQUENCE.sub(lambda found: " " * int(found[1] or 1) if found[2] == "C" else "", self.output)

    def paper(self) -> Paper:
        paper = Paper(*self.size)
        paper.draw(self.output)
        return paper

    def _read(self, seconds: float) -> bool:
        if not select.select([self.number], [], [], seconds)[0]:
            return False
        try:
            self._bytes += os.read(self.number, 65536)
        except OSError:  # Linux says so when the other side is closed
            return False
        self.output = self._bytes.decode("utf-8", "ignore")
        self.states.append(self.output)
        return True

    def _wait(self) -> int:
        if self.exit_code is None:
            self.exit_code = self._wait_for_child()
        return self.exit_code

    def close(self) -> None:
        if self.exit_code is None:
            os.kill(self.pid, signal.SIGKILL)
            self._wait()
        os.close(self.number)


@contextmanager
def terminal(main: Callable[[], object], *, columns: int = 60, rows: int = 16) -> Iterator[Terminal]:
    """Run `main` in a child whose standard streams are a new terminal."""
    pid, number = pty.fork()
    if pid == 0:
        _child(main, columns, rows)
    there = Terminal(pid, number, columns, rows)
    try:
        yield there
    finally:
        there.close()


@contextmanager
def terminal_of(start: Callable[..., Start], *, columns: int, rows: int) -> Iterator[Terminal]:
    """`start(terminal=NAME)` starts the program that the fork server gives a new terminal (see `in_terminal`)."""
    number, other_side = pty.openpty()
    process = start(terminal=os.ttyname(other_side))
    os.close(other_side)
    there = Terminal(process.pid, number, columns, rows, process.wait)
    try:
        yield there
    finally:
        there.close()


def _child(main: Callable[[], object], columns: int, rows: int) -> None:
    code = 1
    try:
        in_terminal(main, columns, rows)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def in_terminal(main: Callable[[], object], columns: int, rows: int) -> None:
    """Run `main` as a program that was started in the terminal that the standard streams are."""
    fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
        os.environ.pop(name, None)
    os.environ["TERM"] = "xterm"
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    main()
