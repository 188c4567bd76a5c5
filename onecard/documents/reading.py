"""Documents to the blocks that they are made of: paragraphs, tables and code, each with its page and its headings.

markdown-it knows where blocks of markdown begin and end; html, docx and epub come as markdown (data/documents.py), pdf
as paragraphs of pages. Knows files. Does not know how blocks are searched.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from onecard.data.documents import DOCUMENT_SUFFIXES, document_pages
from onecard.data.values import UnusableRecord

SUFFIXES = (*DOCUMENT_SUFFIXES, ".txt")
_ZIPPED = (".docx", ".epub")
_PLAIN = (".txt", ".pdf")
_MIB = 2**20
# A packed file may unpack to so many times the largest size that a file may have, which text and pictures do not.
_MOST_UNPACKED = 10


class Block(NamedTuple):
    """A piece of a document that belongs together.

    page: from 1; 0 where the format has none. headings: those above it, the outermost first. is_table: its first two
    lines are its head.
    """

    text: str
    page: int = 0
    headings: tuple[str, ...] = ()
    is_table: bool = False


def read_blocks(path: Path, max_mib: float) -> list[Block]:
    """The blocks of a document in order. Raises UnusableRecord with the reason; OSError."""
    size_mib = path.stat().st_size / _MIB
    if size_mib > max_mib:
        raise UnusableRecord(f"{size_mib:.0f} MiB are more than --max_file_mib {max_mib:g}")
    suffix = path.suffix.lower()
    if suffix in _ZIPPED:
        _check_unpacked(path, max_mib * _MOST_UNPACKED)
    elif suffix != ".pdf" and b"\0" in path.read_bytes()[:4096]:
        raise UnusableRecord("it is no text: it holds bytes of value 0")
    pages = document_pages(path)
    if suffix not in _PLAIN:
        return list(_markdown_blocks(pages[0]))
    return [
        Block(paragraph.strip(), number if suffix == ".pdf" else 0)
        for number, page in enumerate(pages, start=1)
        for paragraph in page.split("\n\n")
        if paragraph.strip()
    ]


def _check_unpacked(path: Path, max_mib: float) -> None:
    """Raise UnusableRecord for an archive that unpacks to more than a document has."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked_mib = sum(entry.file_size for entry in archive.infolist()) / _MIB
    except (zipfile.BadZipFile, ValueError) as reason:
        raise UnusableRecord(f"broken: {reason}") from None
    if unpacked_mib > max_mib:
        raise UnusableRecord(f"it unpacks to {unpacked_mib:.0f} MiB, more than ten times --max_file_mib")


def _markdown_blocks(text: str) -> Iterator[Block]:
    """Each top-level block of markdown; a heading is part of what stands below it."""
    from markdown_it import MarkdownIt

    lines, headings = text.split("\n"), dict[int, str]()
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    for token, after in zip(tokens, [*tokens[1:], None], strict=True):
        if token.level or token.map is None:
            continue
        body = "\n".join(lines[token.map[0] : token.map[1]]).strip()
        if token.type == "heading_open" and after is not None:
            level = int(token.tag[1:])
            headings = {rank: title for rank, title in headings.items() if rank < level} | {level: after.content}
        elif body and token.type != "hr":
            titles = tuple(headings[rank] for rank in sorted(headings))
            yield Block(body, 0, titles, token.type == "table_open")
