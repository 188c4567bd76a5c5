"""Small benchmarks in the layouts of their authors, every question with a known answer; all texts are made here."""

from __future__ import annotations

import csv
import json
from pathlib import Path

RIGHT = "BDACBD"  # of the questions of each subject, in order


def _table(file: Path, header: list[str], rows: list[list[object]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([header, *rows] if header else rows)


def ceval(root: Path, n: int = 6) -> Path:
    for subject in ("law", "physician"):
        for split, more in (("dev", ["answer", "explanation"]), ("val", ["answer"]), ("test", [])):
            rows = [
                [k, f"第{k}题，选？", f"甲{k}", f"乙{k}", f"丙{k}", f"丁{k}", RIGHT[k % 6], "如此"] for k in range(n)
            ]
            columns = ["id", "question", "A", "B", "C", "D", *more]
            _table(root / split / f"{subject}_{split}.csv", columns, [row[: len(columns)] for row in rows])
    return root


def cmmlu(root: Path, n: int = 6) -> Path:
    for subject in ("agronomy", "chinese_history"):
        for split in ("dev", "test"):
            rows = [[k, f"问{k}", f"甲{k}", f"乙{k}", f"丙{k}", f"丁{k}", RIGHT[k % 6]] for k in range(n)]
            _table(root / split / f"{subject}.csv", ["", "Question", "A", "B", "C", "D", "Answer"], rows)
    return root


def mmlu(root: Path, n: int = 6, right: str = RIGHT, subjects: tuple[str, ...] = ("anatomy", "sociology")) -> Path:
    for subject in subjects:
        for split in ("dev", "val", "test"):
            rows = [[f"Which, of {k}?", f"a{k}", f"b{k}", f"c{k}", f"d{k}", right[k % len(right)]] for k in range(n)]
            _table(root / "data" / split / f"{subject}_{split}.csv", [], rows)
    return root


def mmcu_csv(root: Path) -> Path:
    """As MMCU has it in Excel: option marks in the cells, wide letters, one subject with several answers."""
    for split in ("dev", "test"):
        rows = [["问一", "A、甲", "B、乙", "C、丙", "D、丁", "Ｂ"], ["问二", "甲", "乙", "丙", "丁", "D"]]
        _table(root / split / "心理.csv", ["题目", "A", "B", "C", "D", "正确答案"], rows)
        rows = [["问三", "甲", "乙", "丙", "丁", "A、C"], ["问四", "甲", "乙", "丙", "丁", "B"]]
        _table(root / split / "法律.csv", ["题目", "A", "B", "C", "D", "正确答案"], rows)
    return root


def mmcu_json(file: Path) -> Path:
    """As Alpaca-CoT's evaluation has it."""
    rows = [{"类别": "心理", "题目": f"问{k}", "选项": "A:甲\nB:乙\nC:丙\nD:丁", "答案": RIGHT[k]} for k in range(4)]
    file.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return file


def gaokao(root: Path) -> Path:
    folder = root / "Objective_Questions"
    folder.mkdir(parents=True)
    options = "\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n"
    one = [
        {"year": "2010", "question": f"1. 问{options}", "answer": ["AC"], "analysis": "解", "index": 0, "score": 6},
        {"year": "2011", "question": f"2. 问{options}", "answer": ["B"], "analysis": "解", "index": 1, "score": 6},
    ]
    seven = "\n".join(f"{letter}. text {letter}" for letter in "ABCDEFG")
    two = [{"year": "2012", "question": f"____ and ____\n{seven}", "answer": ["G", "A"], "index": 0, "score": 2}]
    for name, examples in (("2010-2022_Physics_MCQs", one), ("2012-2022_English_Cloze_Test", two)):
        text = json.dumps({"keywords": name, "example": examples}, ensure_ascii=False)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    return root


LAYOUTS = {"ceval": ceval, "cmmlu": cmmlu, "mmlu": mmlu, "mmcu": mmcu_csv, "gaokao": gaokao}
