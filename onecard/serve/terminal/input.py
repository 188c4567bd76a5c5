"""What a person types: one line, several lines, a paste, or everything that a pipe brings.

Knows the keyboard and standard input. It does not know chats, commands or the screen.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

PROMPT, CONTINUED = "> ", ". "
QUOTES = '"""'
# A text in quotes may follow a command: /system """, /edit 3 """
_BLOCK = re.compile(r'(\s*(?:/\w+\s+(?:\d+\s+)?)?)"""(.*)', re.DOTALL)
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
    """Reads lines from a person: arrow keys, earlier lines (in memory only), a paste of several lines as one."""

    def __init__(self) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.output import create_output
        from prompt_toolkit.utils import is_dumb_terminal

        self._prefilled = ""
        # Standard output is for the answers alone where it is no terminal.
        output: Any = create_output(sys.stdout if sys.stdout.isatty() else sys.stderr)
        output.enable_cpr = False  # not every terminal answers where its cursor is, and nothing here needs it
        # Without an output of its own it writes no sequences to a terminal that knows none, and no default either.
        self._is_dumb = is_dumb_terminal() and sys.stdout.isatty()
        self._session: Any = PromptSession(output=None if self._is_dumb else output, enable_suspend=True)

    def __call__(self, prompt: str) -> str:
        """One line, or a paste of several. Raises EOFError for Ctrl-D, KeyboardInterrupt for Ctrl-C."""
        text, self._prefilled = self._prefilled, ""
        return readable(self._session.prompt(prompt, default=text))

    def prefill(self, text: str) -> bool:
        """Put a text where the next line will be typed; False where that is not possible."""
        self._prefilled = "" if self._is_dumb else text
        return not self._is_dumb

    @property
    def was_typing(self) -> bool:
        """Whether something stood in the line when Ctrl-C was pressed."""
        return bool(self._session.default_buffer.text)


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
