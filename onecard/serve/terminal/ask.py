"""Questions and answers on the terminal: one, or one after another until the person leaves.

Single turns: no answer depends on an earlier one (chat.py is the conversation). Knows the keyboard, and how an
answer is typed out. It does not know models: it is given a function that answers.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from onecard.console import error, say, say_beside, warn
from onecard.errors import DataError, ModelError
from onecard.inference.call import Chunk
from onecard.serve.terminal.input import Keyboard
from onecard.serve.terminal.screen import Screen

PROMPT = "\n> "
Answer = Callable[[str, int], Iterator[Chunk]]  # (instruction, its number from 0) -> the answer as it is being written


def interact(answer: Answer, *, rewrites: bool = False, read_line: Callable[[str], str] | None = None) -> int:
    """Answer each line typed until an empty line, Ctrl-D or Ctrl-C; returns how many were answered.

    Ctrl-C during an answer ends that answer only. rewrites: the answers may change while they are shown, as beams do.
    """
    read_line = read_line or (Keyboard() if sys.stdin.isatty() else input)
    say("Type an instruction; Ctrl-C stops an answer; an empty line or Ctrl-D leaves.")
    screen, n_answers = Screen(), 0
    while True:
        try:
            instruction = read_line(PROMPT)
        except (EOFError, KeyboardInterrupt):
            say()
            return n_answers
        if not instruction.strip():
            return n_answers
        _answer_one(answer, instruction, n_answers, screen, rewrites)
        n_answers += 1


def answer_once(answer: Answer, instruction: str, *, rewrites: bool = False) -> None:
    """Answer one instruction on standard output, where nothing else is written.

    How fast, goes to standard error; a cut answer is warned of there, too.
    """
    begun = time.perf_counter()
    last = _typed(answer(instruction, 0), Screen(quiet=True), rewrites)
    speed = last.usage.n_new_tokens / max(time.perf_counter() - begun, 1e-9)
    say_beside(f"[{last.usage.n_new_tokens} tokens, {speed:.1f} tokens/s]")
    if last.finish_reason == "length":
        warn(f"the answer was cut after {last.usage.n_new_tokens} tokens; --max_new_tokens sets the limit")


def _answer_one(answer: Answer, instruction: str, number: int, screen: Screen, rewrites: bool) -> None:
    begun = time.perf_counter()
    try:
        last = _typed(answer(instruction, number), screen, rewrites)
    except KeyboardInterrupt:
        say("[stopped]")
        return
    except (DataError, ModelError) as reason:  # such as a question longer than the model can read: the next may fit
        error(str(reason))
        return
    seconds = time.perf_counter() - begun
    cut = ", cut at the length limit" if last.finish_reason == "length" else ""
    say(f"[{last.usage.n_new_tokens} tokens, {last.usage.n_new_tokens / seconds:.1f} tokens/s{cut}]")


def _typed(chunks: Iterator[Chunk], screen: Screen, rewrites: bool) -> Chunk:
    """Show the chunks as they come; returns the last one. The iterator is closed whatever happens."""
    last = Chunk()
    with screen.typing(rewrites=rewrites) as show, contextlib.closing(chunks):  # type: ignore[type-var]
        for last in chunks:
            show(last)
    return last
