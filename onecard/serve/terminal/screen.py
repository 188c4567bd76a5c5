"""An answer as it is typed on the terminal, and everything else that a chat says there.

Nothing that a model or a file says is obeyed: escape sequences and other control characters are shown or dropped, and
there is no markup. Knows the screen and chunks of answers. It does not know chats or commands.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.live import Live
from rich.text import Text

from onecard import console
from onecard.inference.call import Chunk
from onecard.translation import translated

ESCAPE_PICTURES = {code: 0x2400 + code for code in range(32)}
C1_CONTROLS = dict.fromkeys(range(0x80, 0xA0), 0xFFFD)  # 0x9b begins a sequence as ESC [ does
HALF_CHARACTERS = dict.fromkeys(range(0xD800, 0xE000), 0xFFFD)
REPLACED = {
    **ESCAPE_PICTURES, **C1_CONTROLS, **HALF_CHARACTERS,
    ord("\n"): "\n", ord("\t"): "\t", ord("\r"): None, 0x7F: 0x2421, 0x2028: "\n", 0x2029: "\n",
}  # fmt: skip
NO_WRAP, WRAP = "\x1b[?7l", "\x1b[?7h"
TAB = "    "
LINES_OF_OTHER_BEAMS = 2
Show = Callable[[Chunk], None]


def printable(text: str) -> str:
    """The text with nothing in it that a terminal would obey: "\\x1b[2J" -> "␛[2J".

    Each character is looked at alone, so the beginning of a text becomes the beginning of the result.
    """
    return text.translate(REPLACED)


def last_lines(text: str, width: int, n_lines: int) -> list[str]:
    """The end of the text in at most `n_lines` lines of at most `width` cells; Chinese characters take two."""
    if n_lines < 1:
        return []
    shown: list[str] = []
    # The end of the text that may be on the screen; combining characters take no cell, so some are spared.
    paragraphs = text[-4 * width * n_lines :].replace("\t", TAB).split("\n")
    for paragraph in paragraphs[-n_lines:]:
        shown += chop_cells(paragraph, width) if cell_len(paragraph) > width else [paragraph]
    return shown[-n_lines:]


class Screen:
    """Standard output: a live screen where it is a terminal, plain text where it is a pipe or a file.

    quiet: only answers and warnings are said, for programs that read them.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.is_terminal = sys.stdout.isatty()
        self._console = Console(file=sys.stdout, force_terminal=self.is_terminal, highlight=False, emoji=False)
        self.can_redraw = self.is_terminal and not self._console.is_dumb_terminal

    def say(self, text: str = "") -> None:
        """A line that was asked for, such as what a command tells."""
        console.say(printable(text))

    def quote(self, label: str, text: str) -> None:
        """Words of a person or a model behind a label of ours, which alone is translated."""
        console.say(console.escaped(printable(f"{translated(label)} {text}")), is_styled=True)

    def note(self, text: str) -> None:
        """A dim line beside the matter; nothing when quiet or not on a terminal."""
        self._dim(translated(printable(text)))

    def _dim(self, text: str) -> None:
        if not self.quiet and self.is_terminal:
            self._console.print(Text(text, style="dim"), soft_wrap=True)

    def remark(self, text: str) -> None:
        """A dim line where a person sees it, else a warning: what changes the answer must be told to programs too."""
        if self.quiet or not self.is_terminal:
            self.warn(text)
        else:
            self.note(text)

    def warn(self, text: str) -> None:
        """A line on standard error."""
        console.warn(printable(text))

    def error(self, reason: Exception) -> None:
        """An error as one line on standard error."""
        console.error(printable("; ".join(line.strip() for line in str(reason).split("\n"))))

    @contextmanager
    def typing(self, *, rewrites: bool) -> Iterator[Show]:
        """Inside it, each chunk that is given to the result is shown; afterwards the last one stands there whole.

        rewrites: chunks may change what was shown before, as beams do.
        """
        if self.can_redraw and rewrites:
            typing = self._redrawn()
        elif self.is_terminal and not rewrites:
            typing = self._grown()
        else:
            typing = self._at_the_end()
        with typing as show:
            yield show

    @contextmanager
    def _grown(self) -> Iterator[Show]:
        """Each chunk begins with the one before, so only what is new is written; the terminal wraps and scrolls."""
        shown = ""

        def show(chunk: Chunk) -> None:
            nonlocal shown
            text = printable(chunk.text).rstrip("\n")  # blank lines at the end say nothing
            if not text.startswith(shown):  # a change after all: begin anew below
                self._write("\n")
                shown = ""
            self._write(text[len(shown) :])
            shown = text

        try:
            yield show
        finally:
            if shown:
                self._write("\n")

    @contextmanager
    def _redrawn(self) -> Iterator[Show]:
        """The end of the answer is drawn again and again in a part of the screen, which the whole answer replaces.

        What has scrolled off cannot be drawn again, so no more is shown meanwhile than the screen holds.
        """
        last = Chunk()
        live = Live(console=self._console, auto_refresh=False, transient=True, redirect_stdout=False,
                    redirect_stderr=False)  # fmt: skip

        def show(chunk: Chunk) -> None:
            nonlocal last
            last = chunk
            live.update(self._picture(chunk), refresh=True)

        # A character that the terminal draws wider than we think must not begin a line that we do not know of.
        self._write(NO_WRAP)
        try:
            with live:
                yield show
        finally:
            self._write(WRAP)
            self._finish(last)

    @contextmanager
    def _at_the_end(self) -> Iterator[Show]:
        last = Chunk()

        def show(chunk: Chunk) -> None:
            nonlocal last
            last = chunk

        try:
            yield show
        finally:
            self._finish(last)

    def _finish(self, last: Chunk) -> None:
        text = printable(last.text)
        if text:
            self._write((text.rstrip("\n") if self.is_terminal else text) + "\n")
        for number, text in enumerate(last.beams[1:], 2):
            self._dim(printable(f"beam {number}: " + text.strip("\n").replace("\n", "\n        ")))

    def _picture(self, chunk: Chunk) -> Text:
        """What is drawn of a chunk: the end of the best answer and, dim below it, of the other beams."""
        width, height = self._console.size
        n_rows = height - 1
        others: list[str] = []
        for number, text in enumerate(chunk.beams[1:], 2):
            if len(others) + LINES_OF_OTHER_BEAMS > n_rows // 2:
                break
            label = f"beam {number}: "
            lines = last_lines(printable(text), width - 1 - len(label), LINES_OF_OTHER_BEAMS)
            others += [f"{' ' * len(label) if k else label}{line}" for k, line in enumerate(lines)]
        best = last_lines(printable(chunk.text), width - 1, n_rows - len(others))
        answer = Text("\n".join(best), no_wrap=True, overflow="ignore")
        return answer.append("\n" + "\n".join(others), style="dim") if others else answer

    def _write(self, text: str) -> None:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()
