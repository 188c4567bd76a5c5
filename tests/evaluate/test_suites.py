"""Benchmarks in their authors' layouts: found out, read without a conversion, and named where they are broken."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from onecard.errors import ConfigError, DataError, OneCardError
from onecard.evaluate.suites import layout_of, load_choice_suite
from tests.evaluate import layouts


@pytest.mark.parametrize("kind", layouts.LAYOUTS)
def test_each_layout_is_known_by_itself_and_read(kind: str, tmp_path: Path) -> None:
    path = layouts.LAYOUTS[kind](tmp_path / "there")
    assert layout_of(path) == kind
    suite = load_choice_suite("auto", path)
    assert suite.kind == kind
    if kind in ("ceval", "cmmlu", "mmlu"):
        assert [question.answer for question in suite.questions] == list(layouts.RIGHT * 2)
        assert suite.split == ("val" if kind == "ceval" else "test")
        assert {len(examples) for examples in suite.examples.values()} == {6}
        assert all(suite.categories[question.subject] for question in suite.questions)
    assert len({question.key for question in suite.questions}) == len(suite.questions)


def test_a_long_file_of_mmlu_whose_questions_have_several_lines_is_known(tmp_path: Path) -> None:
    path = layouts.mmlu(tmp_path, subjects=("professional_law",))
    file = path / "data" / "test" / "professional_law_test.csv"
    file.write_text('"A case, in\nseveral lines?",a,b,c,d,B\n' * 3000, encoding="utf-8")
    suite = load_choice_suite("auto", path)
    assert (suite.kind, len(suite.questions), suite.questions[0].text[:27]) == (
        "mmlu",
        3000,
        "A case, in\nseveral lines?\nA",
    )


def test_text_options_and_categories_of_a_question(tmp_path: Path) -> None:
    suite = load_choice_suite("cmmlu", layouts.cmmlu(tmp_path))
    first = suite.questions[0]
    assert (first.text, first.letters, first.options) == (
        "问0\nA. 甲0\nB. 乙0\nC. 丙0\nD. 丁0",
        "ABCD",
        ("甲0", "乙0", "丙0", "丁0"),
    )
    assert suite.title("agronomy") == "农学"
    assert suite.categories["chinese_history"] == ("Humanities", "China specific")


def test_several_letters_may_be_right_in_mmcu(tmp_path: Path) -> None:
    suite = load_choice_suite("mmcu", layouts.mmcu_csv(tmp_path))
    found = {(question.subject, question.answer, question.is_multiple) for question in suite.questions}
    assert found == {("心理", "B", False), ("心理", "D", False), ("法律", "AC", True), ("法律", "B", True)}
    assert suite.questions[0].text.startswith(("问三", "问一\nA. 甲\nB. 乙")), "marks in the cells are not doubled"


def test_the_mmcu_of_alpaca_cot(tmp_path: Path) -> None:
    suite = load_choice_suite("auto", layouts.mmcu_json(tmp_path / "test.json"))
    assert (suite.kind, "".join(question.answer for question in suite.questions)) == ("mmcu", layouts.RIGHT[:4])
    assert suite.questions[0].text == "问0\nA. 甲\nB. 乙\nC. 丙\nD. 丁"


def test_gaokao_parts_letters_and_points(tmp_path: Path) -> None:
    suite = load_choice_suite("gaokao", layouts.gaokao(tmp_path))
    found = [(q.subject, q.answer, q.letters, q.part, q.points, q.is_multiple) for q in suite.questions]
    assert found == [
        ("Physics_MCQs", "AC", "ABCD", (1, 1), 6, True),
        ("Physics_MCQs", "B", "ABCD", (1, 1), 6, True),
        ("English_Cloze_Test", "G", "ABCDEFG", (1, 2), 2, False),
        ("English_Cloze_Test", "A", "ABCDEFG", (2, 2), 2, False),
    ]


@pytest.mark.skipif(find_spec("openpyxl") is None, reason="openpyxl is not installed (requirements-eval.txt)")
def test_excel_files_of_mmcu_with_a_sheet_a_subject(tmp_path: Path) -> None:
    import openpyxl

    book = openpyxl.Workbook()
    book.active.title = "外科学"
    for sheet in (book.active, book.create_sheet("药理学")):
        sheet.append(["题目", "A", "B", "C", "D", "答案"])
        sheet.append(["问", "甲", 2, None, "丁", " b "])
    (tmp_path / "test").mkdir()
    book.save(tmp_path / "test" / "医疗.xlsx")
    suite = load_choice_suite("auto", tmp_path)
    assert [(q.subject, q.answer, q.options) for q in suite.questions] == [
        ("外科学", "B", ("甲", "2", "", "丁")), ("药理学", "B", ("甲", "2", "", "丁"))
    ]  # fmt: skip
    assert suite.categories["外科学"] == ("医疗",)
    (tmp_path / "test" / "医疗.xlsx").write_bytes(b"no zip")
    with pytest.raises(DataError, match=r"医疗\.xlsx: is no Excel file"):
        load_choice_suite("mmcu", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"id,question,A,B,C,answer\n0,q,1,2,3,A\n", r"law_val\.csv: the column 'd' is missing; there are id"),
        (b"id,question,A,B,C,D,answer\n0,q,1,2,3,4\n", r"law_val\.csv:2: 6 fields, 7 are expected"),
        (b"id,question,A,B,C,D,answer\n0,q,1,2,3,4,E\n", r"law_val\.csv:2: the answer is 'E', one of A, B"),
        (b'id,question,A,B,C,D,answer\n0,"q,1,2,3,4,A\n', r"law_val\.csv:2: is no CSV: unexpected end"),
        ("id,question,A,B,C,D,answer\n0,问,1,2,3,4,A\n".encode("gbk"), r"law_val\.csv: is no UTF-8"),
        (b"id,question,A,B,C,D,answer\n", r"law_val\.csv: holds no question"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = layouts.ceval(tmp_path)
    (path / "val" / "law_val.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_choice_suite("ceval", path)


def test_a_wrong_folder_split_or_subject_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    path = layouts.cmmlu(tmp_path / "cmmlu")
    for call, message in (
        (lambda: load_choice_suite("auto", tmp_path / "empty"), "has the layout of none of C-Eval"),
        (lambda: load_choice_suite("ceval", tmp_path / "empty"), "has no folder dev, val or test"),
        (lambda: load_choice_suite("cmmlu", path, split="val"), "has no folder val; there are test, dev"),
        (lambda: load_choice_suite("cmmlu", path, subjects=["lore"]), "'lore' is no subject .* agronomy"),
        (lambda: load_choice_suite("gaokao", tmp_path / "empty"), "holds no JSON of GAOKAO-Bench"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()


def test_gaokao_without_its_fields_is_named(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text('{"keywords": "2010_Math_MCQs", "example": [{"question": "q", "answer": ["H"]}]}', encoding="utf-8")
    with pytest.raises(DataError, match=r"x\.json: example 0: the answer is 'H'"):
        load_choice_suite("gaokao", file)
    file.write_text('{"keywords": "2010_Math_MCQs", "example": [{"question": "q"}]}', encoding="utf-8")
    with pytest.raises(OneCardError, match="example 0 has not a text question and a list answer"):
        load_choice_suite("gaokao", file)
