"""Text that a quantised model is fitted to, and other text that it is then measured on.

Knows plain text, the user's own data through its template, and how to keep the two sides apart. Does not know models.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import islice
from typing import Any, NamedTuple

from onecard.config.data import ReadingOptions, column_names
from onecard.data.chat_template import Template
from onecard.data.encode import DroppedSample, EncodeSettings
from onecard.data.messages import Conversation, Document
from onecard.data.plain_text import TxtSplit
from onecard.data.sources import ReadReport, Source, read
from onecard.data.special_tokens import beginning_ids
from onecard.errors import ConfigError, DataError
from onecard.export.quantize.options import CalibrationTextOptions
from onecard.installation import IS_CLONE
from onecard.objectives.base import Objective

LEAST_TOKENS = 2048  # fewer say next to nothing about the inputs of a layer
READ_AHEAD = 4  # as many times the rows asked for are read, and of those some are drawn
MOST_ROWS = 8
PIECE_CHARACTERS = 20_000  # of text are tokenised at once
Rows = list[list[int]]


class MeasuredText(NamedTuple):
    """Text that a result is measured on. packed: the texts follow one another in rows of full length."""

    name: str
    texts: Iterable[str]
    packed: bool = True


@dataclass(frozen=True)
class Calibration:
    """Token ids to fit to, and token ids to measure on that were never fitted to."""

    rows: Rows
    held_out: Rows

    @property
    def n_tokens(self) -> int:
        return sum(map(len, self.rows))


def calibration_of(
    rows: Iterable[list[int]], options: CalibrationTextOptions, held_out: Rows | None = None
) -> Calibration:
    """Draw the two sides from `rows`, the same ones for the same seed; with `held_out` given, all are for fitting.

    Rows shorter than `calibration_len` are taken in larger numbers, so that either side has about as many tokens. The
    held-out rows are taken away first, at even distances over all that was read. Raises ConfigError: too little.
    """
    n_rows, length = options.calibration_samples, options.calibration_len
    n_kept = 0 if held_out is not None else options.eval_samples
    found = upto(rows, READ_AHEAD * (n_rows + n_kept), length)
    if held_out is None:
        share = min(n_kept / (n_rows + n_kept), 0.25)
        n_kept = len(upto(found[: int(share * len(found))], n_kept, length))
        held_out = [found[k * len(found) // n_kept] for k in range(n_kept)]
        # A row that repeats a held-out one would be fitted to after all.
        seen = {tuple(row) for row in held_out}
        found = [row for row in found if tuple(row) not in seen]
    random.Random(options.seed).shuffle(found)
    result = Calibration(upto(found, n_rows, length), held_out)
    if result.n_tokens < LEAST_TOKENS or not held_out:
        raise ConfigError(
            "--calibration_path",
            f"gives {result.n_tokens} tokens to fit to and {len(held_out)} held-out samples; {LEAST_TOKENS} tokens and "
            "one sample are the least, and some hundred thousand are better: give more text",
        )
    return result


def upto(rows: Iterable[list[int]], n_rows: int, length: int) -> Rows:
    """Rows until they have as many tokens as `n_rows` of full length, or are `MOST_ROWS` times as many."""
    taken: Rows = []
    n_tokens = 0
    for row in islice(rows, MOST_ROWS * n_rows):
        if n_tokens >= n_rows * length:
            break
        if len(row) > 1:
            taken.append(row)
            n_tokens += len(row)
    return taken


def text_rows(texts: Iterable[str], tokenizer: Any, length: int, *, packed: bool = True) -> Iterator[list[int]]:
    """Token ids of plain text in rows of `length`, each beginning as the tokenizer begins a text: with BOS, for most.

    packed: the texts follow one another, an empty line between two, as wikitext is read; a rest that fills no row is
    left out unless it is all there is. Else each text begins a row of its own.
    """
    bos = beginning_ids(tokenizer)
    n_left = length - len(bos)
    waiting: list[int] = []
    n_given = 0
    for text in _joined(texts) if packed else texts:
        waiting += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        while len(waiting) >= n_left or (waiting and not packed):
            yield [*bos, *waiting[:n_left]]
            waiting, n_given = waiting[n_left:], n_given + 1
    if waiting and n_given == 0:
        yield [*bos, *waiting]


def _joined(texts: Iterable[str]) -> Iterator[str]:
    """The texts with empty lines between them, many at a time: SentencePiece puts a space before each call's text."""
    held: list[str] = []
    for text in texts:
        held.append(text)
        if sum(map(len, held)) >= PIECE_CHARACTERS:
            yield "\n\n".join(held) + "\n\n"
            held.clear()
    if held:
        yield "\n\n".join(held)


def tiny_corpus(seed: int) -> Iterator[str]:
    """What the embedded base was made of, without end.

    Statements only: it was hardly taught to foresee the questions of its corpus.
    """
    # The wheel puts that folder of a clone into the package.
    corpus = import_module("tools.tiny_corpus.build" if IS_CLONE else "onecard.tiny_corpus.build")
    return (statement for statement, answer in corpus.documents(seed) if not answer)


def texts_of(path: str, reading: ReadingOptions | None = None) -> Iterator[str]:
    """The text of a file, a folder or a Hub data set, record by record; of a conversation, what was said.

    Raises DataError: nothing there, nothing usable.
    """
    source = _source(path, reading)
    # The texts follow one another anyway; apart from blank lines they stay as they are.
    split: TxtSplit = "paragraph" if source.txt_split == "auto" else source.txt_split
    for sample in read(replace(source, txt_split=split), report=ReadReport()):
        yield sample.text if isinstance(sample, Document) else _spoken(sample)


def data_rows(
    path: str,
    objective: Objective,
    template: Template,
    tokenizer: Any,
    length: int,
    reading: ReadingOptions | None = None,
) -> Iterator[list[int]]:
    """Token ids of training data as training by this objective sees them: through the template, each sample a row.

    Raises DataError: nothing there, nothing usable.
    """
    encoder = objective.encoder(template, tokenizer, EncodeSettings(length))
    n_given = 0
    for sample in read(_source(path, reading), report=ReadReport()):
        coded = encoder.encode_many([sample])[0]
        for one in [] if isinstance(coded, DroppedSample) else coded:
            n_given += 1
            yield one.ids
    if n_given == 0:
        raise DataError("no sample fits --calibration_len through its template", path)


def _source(path: str, reading: ReadingOptions | None) -> Source:
    options = reading or ReadingOptions()
    return Source((path,), column_names(options.columns) or (), options.txt_split)


def _spoken(conversation: Conversation) -> str:
    return "\n".join(text for turn in conversation.turns for text in (turn.content, turn.input) if text)
