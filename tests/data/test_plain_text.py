"""What separates the texts of a txt file, how that is said, and how long one can become."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from onecard.data import plain_text
from onecard.data.plain_text import AT_BLANK_LINES, CUT, ONE_A_LINE, separator
from onecard.data.questions import read_questions
from onecard.data.sources import ReadReport, Source, data_fingerprint, read
from onecard.export.vocabulary.corpus import Corpus


def texts_in(path: Path, split: str) -> tuple[list[str], ReadReport]:
    report = ReadReport()
    return [sample.text for sample in read(Source((str(path),), txt_split=split), report=report)], report


CASES = [
    (b"a\nb\nc\n", "line", ["a", "b", "c"]),
    (b"a\nb\n\nc\n", "paragraph", ["a\nb", "c"]),
    (b"a\r\nb\r\n\r\nc", "paragraph", ["a\nb", "c"]),
    (b"\n\na\nb\n\n\n", "line", ["a", "b"]),
    (b"\xef\xbb\xbf\xe4\xbd\xa0\n\xe5\xa5\xbd\n", "line", ["你", "好"]),
    (b"a\n" * 60 + b"\n" + b"b\n" * 60, "line", ["a"] * 60 + ["b"] * 60),
    (b"a\n" * 30 + b"\n" + b"b\n" * 30, "paragraph", ["\n".join("a" * 30), "\n".join("b" * 30)]),
]


@pytest.mark.parametrize(("content", "way", "expected"), CASES, ids=[str(content[:20]) for content, _, _ in CASES])
def test_what_separates_texts_is_seen_in_the_file_and_said(content, way, expected, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    assert separator(content) == way
    texts, report = texts_in(path, "auto")
    assert texts == texts_in(path, way)[0] == expected
    assert list(report.notes) == [ONE_A_LINE if way == "line" else AT_BLANK_LINES]
    assert not texts_in(path, way)[1].notes, "what was asked for needs no word"
    whole = "\n".join(line.rstrip() for line in content.decode("utf-8-sig").split("\n")).strip("\n")
    assert texts_in(path, "file")[0] == [whole]


def test_each_text_has_the_line_where_it_begins(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a\nb\n\nc\n\n\nd", encoding="utf-8")
    for split, lines in (("line", [1, 2, 4, 7]), ("paragraph", [1, 4, 7]), ("file", [1]), ("uncut", [1, 4, 7])):
        records = [sample.record for sample in read(Source((str(path),), txt_split=split), report=ReadReport())]
        assert records == [f"a.txt:{line}" for line in lines]


@pytest.mark.parametrize("split", ["paragraph", "file"])
def test_long_texts_are_cut_at_the_ends_of_lines(split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_text, "LONGEST_TEXT", 100)
    lines = [f"{number:03} " + "x" * 26 for number in range(10)]
    path = tmp_path / "a.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    texts, report = texts_in(path, split)
    assert texts == ["\n".join(lines[start : start + 3]) for start in range(0, 10, 3)]
    assert report.notes[CUT][0] == 4
    assert texts_in(path, "uncut")[0] == ["\n".join(lines)], "as runs of earlier versions had it"
    path.write_text("汉" * 250, encoding="utf-8")
    assert texts_in(path, split)[0] == ["汉" * 100, "汉" * 100, "汉" * 50]


@pytest.mark.parametrize("split", ["auto", "paragraph", "file"])
def test_a_text_of_any_size_takes_bounded_memory(split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_text, "LONGEST_TEXT", 2**16)
    monkeypatch.setattr(plain_text, "_PEEK_BYTES", 2**16)
    path = tmp_path / "a.txt"
    path.write_bytes((b"y" * 999 + b"\n") * 4_000)
    tracemalloc.start()
    try:
        longest = max(len(sample.text) for sample in read(Source((str(path),), txt_split=split), report=ReadReport()))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert longest <= 2**16
    assert peak < 10 * 2**16, "the file has 61 times 2**16 bytes"


def test_questions_in_a_txt_come_by_line(tmp_path: Path) -> None:
    path = tmp_path / "questions.txt"
    path.write_text("你好吗？\nName a river.\n", encoding="utf-8")
    report = ReadReport()
    asked = [question.turns[0].content for question in read_questions(Source((str(path),)), report=report)]
    assert asked == ["你好吗？", "Name a river."]


def test_the_fingerprint_is_that_of_old_unless_another_way_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a\nb\n\nc", encoding="utf-8")
    prints = {split: data_fingerprint(Source((str(path),), txt_split=split)) for split in
              ("auto", "paragraph", "uncut", "line", "file")}  # fmt: skip
    assert prints["auto"] == prints["paragraph"] == prints["uncut"] == data_fingerprint(str(path))
    assert len(set(prints.values())) == 3


@pytest.mark.parametrize("form", ["one a line", "one long text"])
def test_a_corpus_holds_something_out_however_it_is_separated(form: str, tmp_path: Path) -> None:
    path = tmp_path / "chinese.txt"
    lines = [f"第{number}句话，说的是第{number * 7}件事。" for number in range(2000)]
    path.write_text("\n".join(lines), encoding="utf-8")
    corpus = Corpus(Source((str(path),), txt_split="auto" if form == "one a line" else "file"))
    learned = list(corpus.lines())
    assert 10 < len(corpus.held_out) < 100
    assert sorted(learned + corpus.held_out) == sorted(lines)


def test_json_in_a_txt_stays_json(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n".join(json.dumps({"text": text}) for text in "ab"), encoding="utf-8")
    assert texts_in(path, "line")[0] == ["a", "b"]
