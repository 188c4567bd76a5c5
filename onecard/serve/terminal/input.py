"""What a person types: one line, several lines, a paste, or everything that a pipe brings.

Knows the keyboard and standard input. It does not know chats, commands or the screen.
"""

from __future__ import annotations

import importlib
import re
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

PROMPT, CONTINUED = "> ", ". "
QUOTES = '"""'
# A text in quotes may follow a command: /system """, /edit 3 """
_BLOCK = re.compile(r'(\s*(?:/\w+\s+(?:\d+\s+)?)?)"""(.*)', re.DOTALL)
_PASTE_SECONDS = 0.02  # the next line of a paste is there at once; a person is never so fast
ReadLine = Callable[[str], str]  # prompt -> line without its end; raises EOFError


def read_message(read_line: ReadLine) -> str:
    '''One message: a line; lines that end in a backslash and the one behind them; or lines between """ and """.

    Raises EOFError when nothing was typed. Within a message the end of the input ends the message.
    '''
    text = read_line(PROMPT)
    block = _BLOCK.fullmatch(text)
    if block is not None:
        return block[1] + _rest_of_block(block[2], read_line)
    while text.endswith("\\"):
        following = _next(read_line)
        if following is None:
            return text[:-1]
        text = f"{text[:-1]}\n{following}"
    return text.rstrip("\n")  # a paste often ends with a line's end


def _rest_of_block(text: str, read_line: ReadLine) -> str:
    while not text.rstrip().endswith(QUOTES):
        following = _next(read_line)
        if following is None:
            return text.removeprefix("\n")
        text = f"{text}\n{following}"
    return text.rstrip().removesuffix(QUOTES).removeprefix("\n").removesuffix("\n")


def _next(read_line: ReadLine) -> str | None:
    try:
        return read_line(CONTINUED)
    except EOFError:
        return None


class Keyboard:
    """Reads lines from a person, with arrow keys and earlier lines where the system has readline (in memory only)."""

    def __init__(self) -> None:
        self._readline = _import_readline()
        self._uses_readline = self._readline is not None and sys.stdout.isatty()
        # libedit, and a terminal without readline, hand over a paste line by line.
        self._pastes_whole = self._uses_readline and "libedit" not in (self._readline.__doc__ or "")

    def __call__(self, prompt: str) -> str:
        """One line, or a paste of several. Raises EOFError for Ctrl-D, KeyboardInterrupt for Ctrl-C."""
        lines = [self._line(prompt)]
        while not self._pastes_whole and _is_waiting():
            lines.append(self._line(""))
        return readable("\n".join(lines))

    def prefill(self, text: str) -> bool:
        """Put a text where the next line will be typed; False where that is not possible."""
        if not self._uses_readline:
            return False
        readline = self._readline

        def insert() -> None:
            readline.insert_text(text)
            readline.set_startup_hook(None)

        readline.set_startup_hook(insert)
        return True

    @property
    def was_typing(self) -> bool:
        """Whether something stood in the line when Ctrl-C was pressed."""
        return bool(self._uses_readline and self._readline.get_line_buffer())

    def _line(self, prompt: str) -> str:
        if sys.stdout.isatty():
            return input(prompt)
        # Standard output is for the answers alone.
        sys.stderr.write(prompt)
        sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n")


class PipedInput:
    """Lines that came through a pipe, read as if they were typed."""

    was_typing = False

    def __init__(self, text: str) -> None:
        self._lines = text.split("\n")
        self._next = 0

    def __call__(self, prompt: str) -> str:
        """The next line. Raises EOFError behind the last one."""
        if self._next == len(self._lines):
            raise EOFError
        self._next += 1
        return self._lines[self._next - 1]

    def prefill(self, text: str) -> bool:
        return False


@contextmanager
def silent_keys() -> Iterator[None]:
    """Keys that are pressed inside it are not shown, for they would tear the answer; the next line begins with them."""
    try:
        termios: Any = importlib.import_module("termios")
    except ImportError:  # Windows
        termios = None
    if termios is None or not sys.stdin.isatty():
        yield
        return
    number = sys.stdin.fileno()
    before = termios.tcgetattr(number)
    silent = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    try:
        termios.tcsetattr(number, termios.TCSADRAIN, silent)
        yield
    finally:
        termios.tcsetattr(number, termios.TCSADRAIN, before)


def read_pipe() -> str:
    """Everything on standard input, without the last line's end."""
    text = sys.stdin.buffer.read().decode("utf-8-sig", "replace")
    return text.replace("\r\n", "\n").removesuffix("\n")


def readable(text: str) -> str:
    """The text without half characters, which come from bytes that are not in the terminal's encoding."""
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def _is_waiting() -> bool:
    try:
        return bool(select.select([sys.stdin], [], [], _PASTE_SECONDS)[0])
    except (OSError, ValueError):  # Windows: only sockets can be asked
        return False


def _import_readline() -> Any:
    try:
        readline: Any = importlib.import_module("readline")
    except ImportError:
        return None
    if "libedit" not in (readline.__doc__ or ""):
        readline.parse_and_bind("set enable-bracketed-paste on")
    return readline
