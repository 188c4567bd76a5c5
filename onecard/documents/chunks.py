"""Blocks to chunks: neighbours under the same headings together, up to a size; what is longer is cut where it may be.

Tables stay whole, or are cut between rows with their head again; long paragraphs are cut between sentences and overlap
by the last of them. Knows blocks. Does not know files or indexes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from onecard.documents.reading import Block
from onecard.documents.words import size_of

# Where a sentence ends, or at least a clause: behind the sign, so that joined pieces are the text again.
_SENTENCE = re.compile(r"(?<=[。！？；!?])|(?<=[.;] )|(?<=\n)")
_ANYWHERE = re.compile(r"(?<=[\s，、,])")
_OVERLAP = 0.2  # most of a chunk that may stand in the one before it, too
_TABLE_HEAD = 2  # lines: the names, and the line below them


class TextChunk(NamedTuple):
    """What is found and cited: a text with its page (0: none) and the headings above it."""

    text: str
    page: int
    headings: tuple[str, ...]


def chunks_of(blocks: Sequence[Block], most: int) -> list[TextChunk]:
    """The chunks of a document, each of at most `most` words (`size_of`), but for a row of a table that is longer."""
    found: list[TextChunk] = []
    for (page, headings), group in groupby(blocks, lambda block: (block.page, block.headings)):
        pieces = [(piece, block) for block in group for piece in _pieces(block, most)]
        text, size, last = "", 0, None
        for piece, block in pieces:
            n = size_of(piece)
            # Pieces of one block are chunks of their own: they overlap, or each has the table's head.
            if text and (size + n > most or block is last):
                found.append(TextChunk(text, page, headings))
                text, size = "", 0
            text, size, last = (f"{text}\n\n{piece}" if text else piece), size + n, block
        found.append(TextChunk(text, page, headings))
    return found


def _pieces(block: Block, most: int) -> list[str]:
    """The text of a block in pieces of at most `most` words."""
    if size_of(block.text) <= most:
        return [block.text]
    if block.is_table:
        lines = block.text.split("\n")
        head = "\n".join(lines[:_TABLE_HEAD])
        rows = _joined([f"{line}\n" for line in lines[_TABLE_HEAD:]], most - size_of(head), overlap=0)
        return [f"{head}\n{part}".rstrip() for part in rows]
    return [part.strip() for part in _joined(list(_cut(block.text, most)), most, round(most * _OVERLAP))]


def _cut(text: str, most: int) -> Iterator[str]:
    """Sentences; of one that is too long, its clauses, and at last characters."""
    for sentence in filter(None, _SENTENCE.split(text)):
        if size_of(sentence) <= most:
            yield sentence
            continue
        for clause in filter(None, _ANYWHERE.split(sentence)):
            yield from (clause[k : k + most] for k in range(0, len(clause), most))


def _joined(parts: list[str], most: int, overlap: int) -> list[str]:
    """Neighbours joined to pieces of at most `most` words; a piece begins with the end of the one before it."""
    found: list[list[str]] = [[]]
    for part in parts:
        size = sum(map(size_of, found[-1]))
        if found[-1] and size + size_of(part) > most:
            last = found[-1][-1]
            repeated = [last] if len(found[-1]) > 1 and size_of(last) <= overlap else []
            found.append(repeated if sum(map(size_of, (*repeated, part))) <= most else [])
        found[-1].append(part)
    return ["".join(piece) for piece in found]
