"""What a person reads: messages on the terminal and errors that say what to do next.

Knows nothing of models or data. Everything the library prints goes through :func:`say` and :func:`warn`; everything
it refuses is an :class:`~onecard.errors.OneCardError`, which :func:`run_main` turns into one readable
message and an exit code.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from onecard.errors import OneCardError, Stopped
from onecard.translation import translated

# Control characters but tab and line feed, and marks that turn the direction of writing: in a name from the network or
# a file they would rewrite the screen. https://www.unicode.org/reports/tr36/#Bidirectional_Text_Spoofing
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
# Parts of sentences, by the logger that says them:
# - at every layer of every step in 8 bits, that inputs are cast to fp16. The cast is the method.
# - when bitsandbytes is imported (peft does that) on a CPU with AVX512-BF16, that it cannot fetch a kernel for the
#   packed weights which `keep_one_arithmetic_on_cpu` of model/quantization.py avoids.
# - when peft imports torchao, which gptqmodel brings along, that its kernels of other cards and Pythons do not load
#   here, and that it uses torch in a way that will be an error some day.
IDLE_WORDS = {
    "bitsandbytes.autograd._functions": ("inputs will be cast",),
    "bitsandbytes.backends.cpu.ops": ("from kernels-community",),
    "torchao": ("Failed to load",),
    "torch.utils._pytree": ("is an Enum subclass",),
}


def say(message: str = "", *, is_styled: bool = False) -> None:
    """Print one line on standard output, at once; only the first process of several speaks.

    is_styled: the message holds colours of our own, and its foreign text is escaped already.
    """
    if not quiet_rank():
        _write(sys.stdout, message if is_styled else escaped(translated(message)))


def say_beside(message: str) -> None:
    """Say something on standard error, where standard output is an answer and nothing else."""
    if not quiet_rank():
        _write(sys.stderr, escaped(translated(message)))


def warn(message: str) -> None:
    """Print one line on standard error, marked as a warning; only the first process of several speaks."""
    if not quiet_rank():
        _mark(message, "warning:", "33")


def error(message: str) -> None:
    """Print one line on standard error, marked as an error."""
    _mark(message, "error:", "31")


def escaped(text: str) -> str:
    """The text with control characters as JSON writes them, so that JSON stays JSON: ESC becomes ``\\u001b``."""
    return UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def rendered(*shown: Any, soft_wrap: bool = False) -> str:
    """What rich makes of tables and texts for standard output, ready for `say` with is_styled."""
    from rich.console import Console

    console = Console(soft_wrap=soft_wrap)
    with console.capture() as captured:
        for each in shown:
            console.print(each)
    return captured.get().rstrip("\n")


def quiet_rank() -> bool:
    """True on every process of a multi-process run but the first, whose words are enough."""
    return int(os.environ.get("RANK", "0")) > 0


def nearest(name: str, known: Sequence[str], cutoff: float = 0.6) -> str:
    """The words ' (did you mean X?)' for the closest of `known`, or an empty string when none is close."""
    match = get_close_matches(name, known, n=1, cutoff=cutoff)
    return f" (did you mean {match[0]}?)" if match else ""


def first_line(reason: BaseException) -> str:
    """What an error of a library says, in one line; its type where it says nothing."""
    return str(reason).strip().partition("\n")[0] or type(reason).__name__


def few(names: Sequence[str], most: int = 3) -> str:
    """The first names with commas between them, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def quiet_libraries() -> None:
    """Keep libraries from saying, from now on, what nobody can act on (`IDLE_WORDS`). May be called again."""
    for name in IDLE_WORDS:
        logging.getLogger(name).addFilter(_is_worth_saying)  # the same one is added once only


def _is_worth_saying(record: logging.LogRecord) -> bool:
    return not any(words in str(record.msg) for words in IDLE_WORDS[record.name])


def run_main(main: Callable[[], None], *, debug: bool | None = None) -> int:
    """Run `main` and turn what it raises into an exit code; tracebacks are shown only with ``--debug``.

    An error the library foresaw is one message. One it did not foresee is one message too, with the advice to run
    again with ``--debug``; hiding it would be worse than a long text, so its type is named.
    """
    debug = "--debug" in sys.argv if debug is None else debug
    quiet_libraries()
    try:
        main()
        return 0
    except OneCardError as reason:
        if debug:
            raise
        tell = warn if isinstance(reason, Stopped) else error
        tell(str(reason))
        _tell_launcher(str(reason))
        return reason.exit_code
    except KeyboardInterrupt:
        error("interrupted: nothing unfinished was kept")
        return 130
    except BrokenPipeError:
        # The reader of our output left (`... | head`); nothing of ours is broken.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as reason:
        if debug:
            raise
        error(f"{type(reason).__name__}: {reason}")
        _tell_launcher(f"{type(reason).__name__}: {reason}")
        error("this was not foreseen; run again with --debug for the traceback")
        return 1


def _tell_launcher(message: str) -> None:
    """Leave the error where torchrun looks for it: it ends its own thirty lines with what it finds there.

    https://docs.pytorch.org/docs/stable/elastic/errors.html
    """
    file, text = os.environ.get("TORCHELASTIC_ERROR_FILE"), escaped(translated(message))
    if file:
        more = {"py_callstack": text, "timestamp": str(int(time.time()))}
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": {"message": text, "extraInfo": more}}), encoding="utf-8")


def _mark(message: str, word: str, colour: str) -> None:
    word = translated(word)
    _write(sys.stderr, _coloured(f"{word} ", colour, sys.stderr) + escaped(translated(message)))


def _coloured(text: str, code: str, stream: object) -> str:
    is_terminal = getattr(stream, "isatty", lambda: False)()
    return f"\x1b[{code}m{text}\x1b[0m" if is_terminal and "NO_COLOR" not in os.environ else text


def _write(stream: object, message: str) -> None:
    # A Windows console in a legacy code page cannot show Chinese; losing a character beats losing the run.
    encoding = getattr(stream, "encoding", None) or "utf-8"
    safe = message.encode(encoding, "replace").decode(encoding)
    print(safe, file=stream, flush=True)  # type: ignore[call-overload]
