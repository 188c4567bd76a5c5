"""Questions and answers on the terminal: one, or one after another until the person leaves.

Single turns: no answer depends on an earlier one. Knows the keyboard and the screen. It does not know models: it is
given a function that answers.
"""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable

from onecard.console import DataError, error, say, warn
from onecard.talk.generation import Generation

PROMPT = "\n> "
Answer = Callable[[str, int], Generation]  # (instruction, its number from 0) -> answer


def interact(answer: Answer, read_line: Callable[[str], str] | None = None) -> int:
    """Answer each line typed until an empty line, Ctrl-D or Ctrl-C; returns how many were answered."""
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # arrow keys and earlier lines, where the system has it
    say("Type an instruction; an empty line, Ctrl-D or Ctrl-C ends.")
    n_answers = 0
    while True:
        try:
            instruction = (read_line or input)(PROMPT)
            if not instruction.strip():
                return n_answers
            _answer_one(answer, instruction, n_answers)
        except (EOFError, KeyboardInterrupt):
            say()
            return n_answers
        n_answers += 1


def _answer_one(answer: Answer, instruction: str, number: int) -> None:
    begun = time.perf_counter()
    try:
        generation = answer(instruction, number)
    except DataError as reason:  # such as a question longer than the model can read: the next one may be shorter
        error(str(reason))
        return
    seconds = time.perf_counter() - begun
    say(generation.text)
    cut = ", cut at the length limit" if generation.finish_reason == "length" else ""
    say(f"[{generation.n_new_tokens} tokens, {generation.n_new_tokens / seconds:.1f} tokens/s{cut}]")


def answer_once(answer: Answer, instruction: str) -> None:
    """Answer one instruction on standard output, where nothing else is written; a cut answer is warned of."""
    generation = answer(instruction, 0)
    say(generation.text)
    if generation.finish_reason == "length":
        warn(f"the answer was cut after {generation.n_new_tokens} tokens; --max_new_tokens sets the limit")
