"""Whole lines of one job, whatever happened to the process that wrote them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from onecard.data.json_records import NumberText
from onecard.errors import CheckpointError, ConfigError
from onecard.inference.batch.results import AnswerFile, answer_row, as_line, whole_lines

JOB = {"questions": "abc", "temperature": 0.5, "ids": (1, 2)}


def write(path: Path, n: int, job: dict = JOB) -> None:
    with AnswerFile(path, job) as answers:
        answers.append([{"n": number} for number in range(answers.n_done, n)])


def test_a_cut_last_line_is_dropped_wherever_it_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "answers.jsonl"
    write(path, 3)
    whole = path.read_bytes()
    n_cuts = 0
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        n_whole = whole[:cut].count(b"\n")
        with AnswerFile(path, JOB) as answers:
            assert answers.n_done == n_whole
            answers.append([{"n": number} for number in range(n_whole, 3)])
        assert path.read_bytes() == whole
        n_cuts += 1
    assert n_cuts == 28


def test_nuls_after_a_power_cut_are_dropped_too(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    write(path, 2)
    with path.open("ab") as stream:
        stream.write(b"\0" * 5000)
    write(path, 3)
    assert [json.loads(line)["n"] for line in path.read_text(encoding="utf-8").splitlines()] == [0, 1, 2]


def test_another_job_is_refused_and_what_differs_is_named(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    write(path, 2)
    before = path.read_bytes()
    with pytest.raises(ConfigError) as refused:
        write(path, 3, JOB | {"temperature": 0.7, "system": "Be brief."})
    text = str(refused.value)
    assert "temperature: then 0.5, now 0.7" in text
    assert "system: then None, now Be brief." in text
    assert "questions:" not in text
    assert path.read_bytes() == before
    write(path, 3)


def test_a_file_that_is_not_ours_is_refused_untouched(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    for notes in ('{"all": "in one line"}', "my notes\n"):
        path.write_text(notes, encoding="utf-8")
        with pytest.raises(ConfigError, match="does not say what was asked"):
            write(path, 1)
        assert path.read_text(encoding="utf-8") == notes
    (tmp_path / "answers.jsonl.settings.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"settings\.json is damaged"):
        write(path, 1)


def test_an_empty_file_begins_anew_whatever_lay_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    write(path, 2)
    path.write_bytes(b'{"n": 0')  # killed inside the first line, then started with other settings
    write(path, 1, JOB | {"temperature": 0.9})
    assert path.read_bytes() == b'{"n": 0}\n'
    with pytest.raises(ConfigError):
        write(path, 2)


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with AnswerFile(path, JOB), pytest.raises(ConfigError, match="another process is writing"):
        write(path, 1)
    write(path, 1)


def test_a_refusal_lets_go_of_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    write(path, 1)
    with pytest.raises(ConfigError):
        write(path, 2, {"other": 1})
    write(path, 2)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write(tmp_path / "file" / "answers.jsonl", 1)
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(CheckpointError, match="cannot be written"):
        write(tmp_path / "folder.jsonl", 1)


def test_a_records_own_fields_stay_under_another_name() -> None:
    row = answer_row({"output": "old", "reference_output": "older", "id": 7, "error": None}, "new", "stop")
    assert row == {
        "reference_output": "old", "reference_reference_output": "older", "id": 7, "reference_error": None,
        "output": "new", "finish_reason": "stop",
    }  # fmt: skip
    assert answer_row({}, None, "error", "too long") == {"output": None, "finish_reason": "error", "error": "too long"}


def test_values_are_written_as_json_that_any_program_reads() -> None:
    row = {"猫": "line\u2028\nbreak", "n": NumberText("1.50"), "big": NumberText("12345678901234567890"),
           "list": (1, None), "nan": float("nan"), "nested": {"deep": NumberText("3")}, "bytes": b"x",
           "yes": True}  # fmt: skip
    line = as_line(row)
    assert line.count(b"\n") == 1
    assert "猫".encode() in line
    expected = {"猫": "line\u2028\nbreak", "n": 1.5, "big": 12345678901234567890, "list": [1, None], "nan": None,
                "nested": {"deep": 3}, "bytes": "b'x'", "yes": True}  # fmt: skip
    assert json.loads(line, parse_constant=pytest.fail) == expected
    assert json.loads(as_line({"half": "\ud83d"}))["half"] == "\ud83d"


def test_lines_are_counted_across_blocks(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_bytes(b"x" * 2**20 + b"\n" + b"y" * (2**20 - 1) + b"\n" + b"z" * 2**20)
    assert whole_lines(path) == (2, 2**21 + 1)
    assert whole_lines(tmp_path / "missing") == (0, 0)
