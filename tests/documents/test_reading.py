"""Documents become blocks with pages and headings, and blocks chunks that are bounded and lose nothing."""

from __future__ import annotations

import random
from importlib.util import find_spec
from pathlib import Path

import pytest

from onecard.data.values import UnusableRecord
from onecard.documents.chunks import chunks_of
from onecard.documents.reading import Block, read_blocks
from onecard.documents.words import names_in, question_words, search_words, size_of
from tests.curation.test_convert import write_docx, write_pdf

MARKDOWN = """intro

# Guide

One paragraph
of two lines.

## Setup ##

| a | b |
|---|---|
| 1 | 2 |

```sh
# no heading

make all
```

- one
- two

Other
=====

Last.
"""


def read(path: Path, text: str) -> list[Block]:
    path.write_text(text, encoding="utf-8")
    return read_blocks(path, 100)


def test_blocks_of_markdown_have_their_headings_and_tables_and_code_stay_whole(tmp_path: Path) -> None:
    found = read(tmp_path / "a.md", MARKDOWN)
    assert [(block.headings, block.text.split("\n")[0], block.is_table) for block in found] == [
        ((), "intro", False),
        (("Guide",), "One paragraph", False),
        (("Guide", "Setup"), "| a | b |", True),
        (("Guide", "Setup"), "```sh", False),
        (("Guide", "Setup"), "- one", False),
        (("Other",), "Last.", False),
    ]
    assert found[3].text.endswith("make all\n```")


def test_a_text_has_paragraphs_and_no_headings(tmp_path: Path) -> None:
    assert read(tmp_path / "a.txt", "# no heading\n\n第二段。") == [Block("# no heading"), Block("第二段。")]


@pytest.mark.skipif(find_spec("pdfminer") is None, reason="pdfminer.six is not installed (requirements-data.txt)")
def test_blocks_of_a_pdf_have_their_pages(tmp_path: Path) -> None:
    write_pdf(tmp_path / "a.pdf", [["First page.", "More."], [], ["Third page."]])
    assert [(block.page, block.text) for block in read_blocks(tmp_path / "a.pdf", 100)] == [
        (1, "First page."), (1, "More."), (3, "Third page."),
    ]  # fmt: skip


@pytest.mark.skipif(find_spec("markitdown") is None, reason="markitdown is not installed (requirements-data.txt)")
def test_html_and_docx_are_read_as_markdown(tmp_path: Path) -> None:
    page = (
        "<html><body><h1>Head</h1><p>One.</p><h2>Sub</h2><table><tr><th>a</th></tr><tr><td>1</td></tr></table></body>"
    )
    found = read(tmp_path / "a.html", page)
    assert [(block.headings, block.is_table) for block in found] == [(("Head",), False), (("Head", "Sub"), True)]
    write_docx(tmp_path / "a.docx", ["First paragraph.", "第二段。"])
    assert [block.text for block in read_blocks(tmp_path / "a.docx", 100)] == ["First paragraph.", "第二段。"]


def test_what_is_no_document_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("a " * 600_000, encoding="utf-8")
    with pytest.raises(UnusableRecord, match="1 MiB are more than --max_file_mib 1"):
        read_blocks(tmp_path / "long.txt", 1)
    (tmp_path / "bytes.html").write_bytes(b"<p>a\0b</p>")
    with pytest.raises(UnusableRecord, match="no text: it holds bytes of value 0"):
        read_blocks(tmp_path / "bytes.html", 1)
    (tmp_path / "broken.docx").write_bytes(b"PK no archive")
    with pytest.raises(UnusableRecord, match="broken: "):
        read_blocks(tmp_path / "broken.docx", 1)


def test_an_archive_that_unpacks_to_very_much_is_not_unpacked(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "bomb.docx", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("word/document.xml", b"a" * (11 << 20))
    with pytest.raises(UnusableRecord, match="unpacks to 11 MiB"):
        read_blocks(tmp_path / "bomb.docx", 1)


def test_chunks_are_bounded_and_lose_no_word() -> None:
    draw, n_cut = random.Random(5), 0
    for number in range(60):
        words = [f"w{k}" if number % 2 else "字" for k in range(draw.randint(1, 400))]
        signs = [draw.choice(["", "", "", ".", "。", ";", "，", "\n"]) for _ in words]
        text = (" " if number % 2 else "").join(word + sign for word, sign in zip(words, signs, strict=True))
        most = draw.randint(20, 60)
        found = chunks_of([Block(text, headings=("A",))], most)
        assert all(size_of(chunk.text) <= most and chunk.headings == ("A",) for chunk in found)
        if number % 2:  # overlaps repeat words in order
            seen = [word for chunk in found for word in chunk.text.replace(".", " ").replace("。", " ").split()]
            assert {word.rstrip(";，") for word in seen} == set(words)
        n_cut += len(found) > 1
    assert n_cut > 30


def test_short_neighbours_share_a_chunk_and_other_headings_or_pages_do_not() -> None:
    blocks = [Block("a", 1), Block("b", 1), Block("c", 2), Block("d", 2, ("H",))]
    assert [chunk.text for chunk in chunks_of(blocks, 20)] == ["a\n\nb", "c", "d"]


def test_a_long_table_is_cut_between_rows_and_keeps_its_head() -> None:
    rows = [f"| {k} | x{k} |" for k in range(50)]
    found = chunks_of([Block("\n".join(["| n | name |", "|---|---|", *rows]), is_table=True)], 30)
    assert len(found) > 3
    assert all(chunk.text.startswith("| n | name |\n|---|---|\n| ") for chunk in found)
    assert [line for chunk in found for line in chunk.text.split("\n")[2:]] == rows


def test_what_is_no_word_is_cut_too() -> None:
    assert max(len(chunk.text) for chunk in chunks_of([Block("a" * 10_000)], 50)) <= 16 * 50


def test_words_are_written_words_and_pairs_of_characters() -> None:
    assert search_words("Smith's Tower 塔身高41米") == ["smith", "tower", "塔身", "身高", "41", "米"]
    assert question_words("How high is the tower?") == ["high", "tower"]
    assert question_words("塔身是多少米？") == ["塔身", "米"]
    assert question_words("What is it?") == ["what", "is", "it"], "where nothing else is left"
    assert names_in("How tall is the Moor Tower? Who knows") == ["moor", "tower"]
    assert size_of("two words 四个字啊") == 6
