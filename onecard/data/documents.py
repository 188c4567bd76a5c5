"""Documents to clean text: pdf, docx, html, epub and markdown.

pdfminer.six reads pdf page by page, so that pages without text (pictures of text) can be named; markitdown reads the
others. Both are optional (requirements-data.txt); a markdown file needs neither.

Knows files and their text. Does not know what the text is for.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile, ZipFile, is_zipfile

from onecard.data.values import UnusableRecord, safe

DOCUMENT_SUFFIXES = (".pdf", ".docx", ".md", ".markdown", ".html", ".htm", ".epub")
_CONVERTERS = {".docx": "DocxConverter", ".html": "HtmlConverter", ".htm": "HtmlConverter", ".epub": "EpubConverter"}
_TEXT_PARTS = (".xml", ".rels", ".html", ".xhtml", ".htm", ".opf", ".ncx")  # pictures are not unpacked
_MOST_UNPACKED = 2**28  # bytes: the text of a long book is some 2**20
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff\u200b]")
_FRONT_MATTER = re.compile(r"\A---[ \t]*\n.*?\n(?:---|\.\.\.)[ \t]*\n", re.DOTALL)
_CJK = re.compile("[\u3000-\u30ff\u3400-\u9fff\uff00-\uffef]")


class DocumentText(NamedTuple):
    """The text of a document, and its pages (from 1) that hold none."""

    text: str
    empty_pages: tuple[int, ...] = ()


def document_text(path: Path) -> DocumentText:
    """The text of one document, paragraphs apart by blank lines.

    Raises UnusableRecord: a package is missing, the file is broken or locked, there is no text in it; OSError.
    """
    pages = document_pages(path)
    empty = tuple(number for number, text in enumerate(pages, start=1) if not text)
    return DocumentText("\n\n".join(filter(None, pages)), empty)


def document_pages(path: Path) -> list[str]:
    """The text of each page of a pdf; of any other document the whole, in markdown, as one page.

    Raises as `document_text` does.
    """
    suffix = path.suffix.lower()
    if suffix == ".pdf":
        pages = _from_pdf(path)
    elif suffix in _CONVERTERS:
        pages = [_converted(path, _CONVERTERS[suffix])]
    else:
        try:
            pages = [_FRONT_MATTER.sub("", path.read_text(encoding="utf-8-sig"), count=1)]
        except UnicodeDecodeError as reason:
            raise UnusableRecord(f"not valid UTF-8: byte {reason.start + 1} (save it as UTF-8)") from None
    pages = [tidied(page) for page in pages]
    if suffix == ".pdf" and pages and not any(pages):
        raise UnusableRecord(f"none of its {len(pages)} pages holds text: run text recognition (OCR) first")
    if not any(pages):
        raise UnusableRecord("it holds no text")
    return pages


def tidied(text: str) -> str:
    """The text without control characters, blanks at line ends, and more than one blank line in a row."""
    text = _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n").replace("\xa0", " "))
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", text)).strip()


def page_list(pages: tuple[int, ...]) -> str:
    """(1, 2, 3, 7) -> "1-3, 7"."""
    parts: list[list[int]] = []
    for page in pages:
        if parts and parts[-1][1] == page - 1:
            parts[-1][1] = page
        else:
            parts.append([page, page])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def _required(package: str, name: str) -> None:
    if find_spec(package) is None:
        raise UnusableRecord(f"needs {name}: pip install -r requirements-data.txt")


def _from_pdf(path: Path) -> list[str]:
    _required("pdfminer", "pdfminer.six")
    from pdfminer.high_level import extract_pages
    from pdfminer.pdfdocument import PDFEncryptionError, PDFPasswordIncorrect
    from pdfminer.pdfparser import PDFSyntaxError
    from pdfminer.psexceptions import PSException

    pages: list[str] = []
    try:
        for page in extract_pages(path):
            pages.append(_page_text(page))
    except (PDFEncryptionError, PDFPasswordIncorrect):
        raise UnusableRecord("it is locked with a password: save it without one") from None
    except (PDFSyntaxError, PSException, ValueError, TypeError, KeyError, IndexError, AttributeError) as reason:
        raise UnusableRecord(f"broken behind page {len(pages)}: {type(reason).__name__}: {safe(str(reason))}") from None
    return pages


def _page_text(page: Any) -> str:
    """The blocks of text of one page; a block that is a number only is the page's own."""
    blocks = [joined_lines(block.get_text()) for block in page if hasattr(block, "get_text")]
    return "\n\n".join(block for block in blocks if block and not re.fullmatch(r"[-– ]*\d{1,4}[-– ]*", block))


def joined_lines(block: str) -> str:
    """The lines of a printed paragraph as one: a word cut at a line's end is whole again, Chinese has no blanks.

    "A fine exam-\\nple of\\nlines." -> "A fine example of lines."
    """
    found = ""
    for line in filter(None, (line.strip() for line in block.splitlines())):
        if re.search(r"[a-z]-$", found) and line[0].islower():
            found = found[:-1] + line
        elif found and _CJK.match(found[-1]) and _CJK.match(line[0]):
            found += line
        else:
            found += f" {line}" if found else line
    return found


def _converted(path: Path, name: str) -> str:
    if is_zipfile(path):
        _refuse_bomb(path)
    _required("markitdown", "markitdown")
    import markitdown
    from markitdown import converters

    converter = getattr(converters, name)()
    try:
        with path.open("rb") as stream:
            return str(converter.convert(stream, markitdown.StreamInfo(extension=path.suffix.lower())).markdown)
    except OSError:
        raise
    except markitdown.MissingDependencyException:
        raise UnusableRecord("needs markitdown[docx]: pip install -r requirements-data.txt") from None
    except Exception as reason:  # each library beneath has errors of its own for a file that is broken
        raise UnusableRecord(f"broken: {type(reason).__name__}: {safe(str(reason))}") from None


def _refuse_bomb(path: Path) -> None:
    """Raise UnusableRecord for an archive whose texts unpack to more than any document holds."""
    try:
        with ZipFile(path) as archive:
            unpacked = sum(part.file_size for part in archive.infolist() if part.filename.endswith(_TEXT_PARTS))
    except BadZipFile as reason:
        raise UnusableRecord(f"broken: {safe(str(reason))}") from None
    if unpacked > _MOST_UNPACKED:
        raise UnusableRecord(f"its text unpacks to {unpacked >> 20:,} MiB, over {_MOST_UNPACKED >> 20:,}: split it")
