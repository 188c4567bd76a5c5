"""Documents, chains of thought and labelled texts become rows, and answers of extraction labelled texts again."""

from __future__ import annotations

import json
import random
import zipfile
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from onecard.config.curation import CotOptions, DocumentsOptions, ExtractionOptions
from onecard.console import run_main
from onecard.curation.convert import convert_cot, convert_documents, convert_extraction
from onecard.data.documents import document_text, joined_lines, page_list, tidied
from onecard.data.extraction import (
    EventType,
    ExtractionRow,
    ExtractionSchema,
    checked,
    from_instructie,
    from_row,
    read_answer,
    to_row,
    to_rows,
)
from onecard.data.formats import to_sample
from onecard.data.messages import Document
from onecard.data.sources import ReadReport, read
from onecard.data.values import UnusableRecord
from onecard.data.wordings import CotRow, language_of, read_cot_tsv, worded, wordings
from onecard.errors import DataError

needs_pdfminer = pytest.mark.skipif(
    find_spec("pdfminer") is None, reason="pdfminer.six is not installed (requirements-data.txt)"
)
needs_markitdown = pytest.mark.skipif(
    find_spec("markitdown") is None, reason="markitdown is not installed (requirements-data.txt)"
)


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# Information extraction

NAMES = {
    "en": ["Ada", "Mount Fuji", 'a "quoted" name', "O'Neil {x}", "12 March", "NANTES", "x\\y", "Zoë"],
    "zh": ["北京", "小明", "长江大桥", "“春晚”", "二〇二四年", "A公司", "阿里·巴巴", "数，学"],
}
TYPES = {
    "en": ["person", "place", "date", "founded by", "capital of", "part of", "works for", "subject"],
    "zh": ["人物", "地点", "时间", "创始人", "首都", "属于", "职业", "毕业院校"],
}


def generated(draw: random.Random, language: str, kind: str) -> ExtractionRow:
    """A random schema, text and labels."""
    names, types = NAMES[language], draw.sample(TYPES[language], draw.randint(1, 8))
    text = ("，" if language == "zh" else ", ").join(draw.choices(names, k=6)) + ("。" if language == "zh" else ".")
    some = lambda most: draw.choices(names, k=draw.randint(0, most))  # noqa: E731
    if kind == "entities":
        return ExtractionRow(ExtractionSchema("entities", tuple(types)), text, {name: some(3) for name in types})
    if kind == "relations":
        found = {name: [{"subject": head, "object": draw.choice(names)} for head in some(3)] for name in types}
        return ExtractionRow(ExtractionSchema("relations", tuple(types)), text, found)
    roles = [tuple(draw.sample(types, draw.randint(0, len(types)))) for _ in types]
    events = tuple(EventType(f"{a} event", b, draw.random() < 0.7) for a, b in zip(types, roles, strict=True))
    found = {}
    for event in events:
        found[event.name] = [
            {
                **({"trigger": draw.choice(names)} if event.trigger and draw.random() < 0.8 else {}),
                "arguments": {role: draw.choice([draw.choice(names), draw.sample(names, 2)])
                              for role in event.arguments if draw.random() < 0.6},
            }
            for _ in range(draw.randint(0, 2))
        ]  # fmt: skip
    return ExtractionRow(ExtractionSchema("events", events), text, found)


def test_a_thousand_generated_rows_go_to_instructions_and_back() -> None:
    draw = random.Random(11)
    seen: Counter[tuple[str, str]] = Counter()
    for number in range(1002):
        language, kind = ("en", "zh")[number % 2], ("entities", "relations", "events")[number % 3]
        row = generated(draw, language, kind)
        written = to_row(row)
        assert from_row(json.loads(json.dumps(written))) == row
        assert list(json.loads(written["instruction"])) == ["instruction", "schema", "input"]
        assert language_of(json.loads(written["instruction"])["instruction"].replace("schema", "")) == language
        assert to_sample(written, "x:1").shape == "instruction/input/output"
        # In parts, as IEPile has them, nothing is lost either.
        parts = [from_row(part) for part in to_rows(row, types_per_row=3)]
        assert len(parts) == -(-len(row.schema.types) // 3)
        assert {name: found for part in parts for name, found in part.found.items()} == row.found
        assert sum((part.schema.types for part in parts), ()) == row.schema.types
        seen[language, kind] += 1
    assert set(seen.values()) == {167}


def test_rows_of_iepile_are_read_as_they_are() -> None:
    asked = {"instruction": "Extract.", "schema": ["person", "company"], "input": "Ada works at Acme."}
    row = {
        "task": "NER",
        "source": "x",
        "instruction": json.dumps(asked),
        "output": '{"person": ["Ada"], "company": []}',
    }
    assert from_row(row) == ExtractionRow(
        ExtractionSchema("entities", ("person", "company")), "Ada works at Acme.", {"person": ["Ada"], "company": []}
    )
    asked["schema"] = ["works at"]
    row = {"instruction": json.dumps(asked), "output": '{"works at": [{"subject": "Ada", "object": "Acme"}]}'}
    assert from_row(row).schema.kind == "relations"
    events = [{"event_type": "hire", "trigger": True, "arguments": ["who", "where"]}]
    output = '{"hire": [{"trigger": "works", "arguments": {"who": "Ada", "where": "NAN"}}]}'
    row = {"task": "EE", "instruction": json.dumps({**asked, "schema": events}), "output": output}
    read = from_row(row)
    assert read.schema == ExtractionSchema("events", (EventType("hire", ("who", "where")),))
    assert read.found == {"hire": [{"trigger": "works", "arguments": {"who": "Ada"}}]}
    assert json.loads(to_row(read)["output"]) == json.loads(output)


def test_rows_of_instructie_are_read() -> None:
    row = {
        "id": "1",
        "cate": "person",
        "text": "Ada was born in London.",
        "relation": [
            {"head": "Ada", "head_type": "person", "relation": "born in", "tail": "London", "tail_type": "place"}
        ],
    }
    pairs = [{"subject": "Ada", "object": "London"}]
    assert from_instructie(row).found == {"born in": pairs}
    wide = from_instructie(row, ("died in", "born in"))
    assert (wide.found, wide.schema.names) == ({"died in": [], "born in": pairs}, ("died in", "born in"))
    with pytest.raises(UnusableRecord, match="no relation"):
        from_instructie({"text": "x", "relation": []})
    with pytest.raises(UnusableRecord, match="a relation is"):
        from_instructie({"text": "x", "relation": [{"head": "a"}]})


def test_answers_of_a_model_are_read_with_care() -> None:
    schema = ExtractionSchema("entities", ("person", "place"))
    answer = 'Of course:\n```json\n{"person": ["Ada"], "animal": ["cat"]}\n```'
    assert read_answer(schema, answer) == {"person": ["Ada"], "place": []}
    assert read_answer(schema, {"person": None}) == {"person": [], "place": []}
    for wrong, says in {
        "none": "holds no whole JSON object",
        '{"person": ["Ada"': "holds no whole JSON object",
        '{"person": "Ada"}': "a list is expected",
        '{"person": [{"subject": "a"}]}': "one of the entities is",
    }.items():
        with pytest.raises(UnusableRecord, match=says):
            read_answer(schema, wrong)
    with pytest.raises(UnusableRecord, match="'animal' is not in the schema"):
        checked(schema, {"animal": []})


def test_extraction_files_go_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labelled = tmp_path / "instructie.jsonl"
    relations = [[{"head": f"H{n}", "relation": f"r{n % 2}", "tail": "T"}] for n in range(4)]
    rows = [{"text": f"Text {n}", "relation": relation} for n, relation in enumerate(relations)]
    labelled.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"text": "x"}, 5]), encoding="utf-8")
    convert_extraction(
        ExtractionOptions(str(labelled), str(tmp_path / "rows.jsonl"), types="r0,r1,r2", types_per_row=2)
    )
    made = rows_of(tmp_path / "rows.jsonl")
    assert len(made) == 8
    told = capsys.readouterr()
    assert "4 records gave 8 rows; 2 cannot be used" in told.out
    assert "instructie.jsonl:5: " in told.err
    assert "instructie.jsonl:6: the record is no object" in told.err
    convert_extraction(ExtractionOptions(str(tmp_path / "rows.jsonl"), str(tmp_path / "back.jsonl"), back=True))
    back = rows_of(tmp_path / "back.jsonl")
    assert back[0] == {"text": "Text 0", "schema": ["r0", "r1"], "relations": {"r0": [{"subject": "H0", "object": "T"}],
                                                                           "r1": []}}  # fmt: skip
    with pytest.raises(DataError, match="none of its 1 records can be used"):
        (tmp_path / "bad.jsonl").write_text('{"a": 1}\n', encoding="utf-8")
        convert_extraction(ExtractionOptions(str(tmp_path / "bad.jsonl"), str(tmp_path / "none.jsonl")))
    assert not (tmp_path / "none.jsonl").exists()


# Chains of thought


def test_wordings_are_drawn_by_seed_and_question_and_hold_all_parts() -> None:
    rows = [CotRow(n, f"What is {n} + 1?", f"{n + 1}", f"One more than {n}.") for n in range(200)]
    rows += [CotRow(n, f"{n} 加一是多少？", f"{n + 1}", f"比 {n} 多一。") for n in range(200)]
    made = [worded(row, 42) for row in rows]
    assert made == [worded(row, 42) for row in rows]
    assert sum(a != b for a, b in zip(made, (worded(row, 7) for row in rows), strict=True)) > 300
    for row, instruction in zip(rows, made, strict=True):
        assert row.question in instruction["instruction"]
        assert row.rationale in instruction["output"]
        assert row.answer in instruction["output"]
    for language, half in (("en", made[:200]), ("zh", made[200:])):
        known = wordings()[language]["cot"]
        asked = [row.question for row in rows if language_of(row.question) == language]
        used = {made["instruction"].replace(text, "{question}") for made, text in zip(half, asked, strict=True)}
        assert used == {question for question, _ in known}
        assert len(known) == 8
    assert worded(rows[0], 1, as_thought=True) == {
        "instruction": "What is 0 + 1?",
        "input": "",
        "output": "<think>\nOne more than 0.\n</think>\n\n1",
    }
    assert "{x} is 5" in worded(CotRow(1, "Q {x}?", "5", "{x} is 5"), 1)["output"]


def test_tsv_files_are_read_with_and_without_a_header(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.tsv").write_text('Is "it" so?\\nSay.\tyes\tBecause.\nno tabs\n\nQ\t\tR\n', encoding="utf-8")
    (tmp_path / "b.tsv").write_text("id\trationale\tQuestion\tanswer\n1\tR\tQ\tA\n", encoding="utf-8")
    good, short, empty = read_cot_tsv(tmp_path / "a.tsv")
    assert good == CotRow(1, 'Is "it" so?\nSay.', "yes", "Because.")
    assert str(short) == "a.tsv:2: 1 fields; question, answer and rationale are expected"
    assert str(empty) == "a.tsv:4: the answer is empty"
    assert list(read_cot_tsv(tmp_path / "b.tsv")) == [CotRow(2, "Q", "A", "R")]
    convert_cot(CotOptions([str(tmp_path / "a.tsv"), str(tmp_path / "b.tsv")], str(tmp_path / "out.jsonl")))
    assert len(rows_of(tmp_path / "out.jsonl")) == 2
    assert "2 lines gave 2 rows; 2 cannot be used" in capsys.readouterr().out
    (tmp_path / "gbk.tsv").write_bytes("问\t答\t因\n".encode("gbk"))
    with pytest.raises(DataError, match=r"gbk\.tsv: cannot be read as TSV"):
        list(read_cot_tsv(tmp_path / "gbk.tsv"))


# Documents


def write_pdf(file: Path, pages: list[list[str]]) -> None:
    """A pdf of pages, each of blocks of text in Helvetica."""
    contents = []
    for blocks in pages:
        lines = "".join(
            f"BT /F1 12 Tf 14 TL 72 {760 - 120 * place} Td "
            + " ".join(f"({line}) Tj T*" for line in block.split("\n"))
            + " ET\n"
            for place, block in enumerate(blocks)
        )
        contents.append(lines.encode("latin-1"))
    n = len(pages)
    kids = " ".join(f"{4 + 2 * page} 0 R" for page in range(n))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {n} >>".encode(),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for page, content in enumerate(contents):
        resources = "/Resources << /Font << /F1 3 0 R >> >> /MediaBox [0 0 612 792]"
        objects.append(f"<< /Type /Page /Parent 2 0 R {resources} /Contents {5 + 2 * page} 0 R >>".encode())
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content))
    out, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, start=1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    trailer = b"trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, len(out))
    file.write_bytes(out + b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1) + table + trailer)


def write_docx(file: Path, paragraphs: list[str]) -> None:
    space = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
    body = "".join(f"<w:p><w:r><w:t>{text}</w:t></w:r></w:p>" for text in paragraphs)
    kinds = (
        '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types"><Default Extension="rels" '
        'ContentType="application/vnd.openxmlformats-package.relationships+xml"/><Override '
        'PartName="/word/document.xml" ContentType="application/vnd.openxmlformats-officedocument.'
        'wordprocessingml.document.main+xml"/></Types>'
    )
    link = (
        '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships"><Relationship Id="rId1" '
        'Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument" '
        'Target="word/document.xml"/></Relationships>'
    )
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("[Content_Types].xml", kinds)
        archive.writestr("_rels/.rels", link)
        archive.writestr("word/document.xml", f"<w:document {space}><w:body>{body}</w:body></w:document>")


def write_epub(file: Path, chapters: list[str]) -> None:
    names = [f"c{number}.xhtml" for number in range(len(chapters))]
    items = "".join(f'<item id="{name}" href="{name}" media-type="application/xhtml+xml"/>' for name in names)
    spine = "".join(f'<itemref idref="{name}"/>' for name in names)
    package = (
        '<package xmlns="http://www.idpf.org/2007/opf" version="2.0"><metadata '
        f'xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:title>Book</dc:title></metadata><manifest>{items}</manifest>'
        f"<spine>{spine}</spine></package>"
    )
    container = (
        '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container" version="1.0"><rootfiles>'
        '<rootfile full-path="book.opf" media-type="application/oebps-package+xml"/></rootfiles></container>'
    )
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("mimetype", "application/epub+zip")
        archive.writestr("META-INF/container.xml", container)
        archive.writestr("book.opf", package)
        for name, text in zip(names, chapters, strict=True):
            archive.writestr(name, f"<html><body><p>{text}</p></body></html>")


@needs_pdfminer
def test_pdf_pages_without_text_are_named_and_paragraphs_are_whole(tmp_path: Path) -> None:
    write_pdf(tmp_path / "a.pdf", [["A fine exam-\nple of\nlines.", "Second block.", "3"], [], ["Last page."], [], []])
    found = document_text(tmp_path / "a.pdf")
    assert found.text == "A fine example of lines.\n\nSecond block.\n\nLast page."
    assert found.empty_pages == (2, 4, 5)
    write_pdf(tmp_path / "scan.pdf", [[], []])
    with pytest.raises(UnusableRecord, match=r"none of its 2 pages holds text: run text recognition"):
        document_text(tmp_path / "scan.pdf")
    (tmp_path / "broken.pdf").write_bytes((tmp_path / "a.pdf").read_bytes()[:200])
    (tmp_path / "no.pdf").write_bytes(b"<html>no pdf</html>")
    for name in ("broken.pdf", "no.pdf"):
        with pytest.raises(UnusableRecord):
            document_text(tmp_path / name)


@needs_markitdown
def test_office_documents_books_and_pages_become_text(tmp_path: Path) -> None:
    write_docx(tmp_path / "a.docx", ["First paragraph.", "第二段。"])
    write_epub(tmp_path / "a.epub", ["Chapter one.", "第二章。"])
    page = (
        "<html><head><title>T</title><script>run()</script></head><body><h1>Head</h1><p>One&nbsp;two.</p></body></html>"
    )
    (tmp_path / "a.html").write_text(page, encoding="utf-8")
    assert document_text(tmp_path / "a.docx").text == "First paragraph.\n\n第二段。"
    book = document_text(tmp_path / "a.epub").text
    assert book.index("Chapter one.") < book.index("第二章。")
    assert document_text(tmp_path / "a.html").text == "# Head\n\nOne two."
    for suffix in ("docx", "epub"):
        (tmp_path / f"broken.{suffix}").write_bytes(b"PK\x03\x04 no archive")
        with pytest.raises(UnusableRecord, match="broken: "):
            document_text(tmp_path / f"broken.{suffix}")


def test_markdown_is_read_without_any_package_and_tidied(tmp_path: Path) -> None:
    text = "\ufeff---\ntitle: T\n---\n# Head\r\n\r\n\r\n\r\ntext  \n\x07end\n\n---\n\nafter a line"
    (tmp_path / "a.md").write_text(text, encoding="utf-8", newline="")
    assert document_text(tmp_path / "a.md").text == "# Head\n\ntext\nend\n\n---\n\nafter a line"
    (tmp_path / "empty.md").write_text(" \n", encoding="utf-8")
    (tmp_path / "gbk.md").write_bytes("你好".encode("gbk"))
    for name, says in {"empty.md": "it holds no text", "gbk.md": "not valid UTF-8"}.items():
        with pytest.raises(UnusableRecord, match=says):
            document_text(tmp_path / name)


def test_folders_of_documents_are_read_in_order_and_bad_ones_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "docs"
    (folder / ".git").mkdir(parents=True)
    for name, text in {"b.md": "B.", "a.markdown": "A.", ".git/c.md": "C.", "d.md": " ", "e.json": "{}"}.items():
        (folder / name).write_text(text, encoding="utf-8")
    convert_documents(DocumentsOptions(str(folder), str(tmp_path / "out.jsonl")))
    assert rows_of(tmp_path / "out.jsonl") == [
        {"text": "A.", "document": "a.markdown"},
        {"text": "B.", "document": "b.md"},
    ]
    told = capsys.readouterr()
    assert "d.md: it holds no text" in told.err
    assert "2 documents gave 2 rows; 1 cannot be used" in told.out
    for path, says in {
        folder / "e.json": "is none of .pdf",
        tmp_path / "gone": "no such file",
        folder / ".git": "",
    }.items():
        options = DocumentsOptions(str(path), str(tmp_path / "more.jsonl"))
        assert run_main(lambda options=options: convert_documents(options), debug=False) == (1 if says else 0)
        assert says in capsys.readouterr().err


def test_a_document_that_is_named_is_data_and_one_in_a_folder_is_not(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# About\n\nThese are data.", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"text": "row"}\n', encoding="utf-8")
    report = ReadReport()
    (sample,) = read(str(tmp_path / "README.md"), report=report)
    assert sample == Document("# About\n\nThese are data.", "README.md:1")
    assert [sample.record for sample in read(str(tmp_path), report=report)] == ["a.jsonl:1"]
    assert report.skipped_files == ["README.md"]
    (tmp_path / "long.md").write_text("x" * (2**20 + 5), encoding="utf-8")
    assert [len(sample.text) for sample in read(str(tmp_path / "long.md"), report=report)] == [2**20, 5]
    (tmp_path / "gbk.md").write_bytes("你好".encode("gbk"))
    with pytest.raises(DataError, match="not valid UTF-8"):
        list(read(str(tmp_path / "gbk.md"), report=report))


@needs_pdfminer
def test_pages_without_text_are_reported_where_a_pdf_is_read(tmp_path: Path) -> None:
    write_pdf(tmp_path / "a.pdf", [["First page."], [], ["Last page."]])
    report = ReadReport()
    (sample,) = read(str(tmp_path / "a.pdf"), report=report)
    assert sample.text == "First page.\n\nLast page."
    assert "  in 1 (first: a.pdf:1): no text on the pages 2" in report.summary_lines()


def test_small_parts_of_documents() -> None:
    assert page_list((1, 2, 3, 7, 9, 10)) == "1-3, 7, 9-10"
    assert page_list(()) == ""
    assert joined_lines("中文第一行\n第二行。\nEnglish word") == "中文第一行第二行。 English word"
    assert joined_lines("well-\nKnown\n\nand-\nso") == "well- Known andso"
    assert tidied("a\u200b \n\n\n\nb\xa0c\x0c") == "a\n\nb c"
