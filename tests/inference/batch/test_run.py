"""A file of questions is answered in order, and a killed job ends with the answers of an undisturbed one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from onecard.config.inference import SamplingOptions
from onecard.data.messages import Turn
from onecard.errors import ConfigError, DataError, ModelError, Stopped
from onecard.inference.batch import run as answers_module
from onecard.inference.batch.results import AnswerFile
from onecard.inference.batch.run import BatchJob, answer_questions, answer_safely, survey, with_system
from onecard.inference.generate import answer_rows, prepare
from tests import tiny

GREEDY = SamplingOptions(max_new_tokens=6)


@pytest.fixture(scope="module")
def question_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """19 questions of ragged length: at batches of 2 that is one whole window of 16 and a part of one."""
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    rows = [{"id": n, "instruction": f"Count to {n}. " * (1 + n * 7 % 5), "output": "ignored"} for n in range(19)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


def run(bundle, data: Path, output: Path, sampling: SamplingOptions = GREEDY, **settings: Any):
    job = BatchJob(bundle, str(data), survey(str(data)), sampling, **{"batch_size": 2} | settings)
    with AnswerFile(output, {"job": str(sampling)}) as answers:
        return answer_questions(job, answers)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_record_is_answered_in_order_with_its_own_fields(bundle, question_file, tmp_path: Path) -> None:
    tally = run(bundle, question_file, tmp_path / "a.jsonl")
    rows = rows_of(tmp_path / "a.jsonl")
    assert [row["id"] for row in rows] == list(range(19))
    assert tally.n_answers == 19
    assert {row["reference_output"] for row in rows} == {"ignored"}
    for row in rows:
        prepared = prepare(bundle, [Turn("user", row["instruction"])], GREEDY)
        assert row["output"] == answer_rows(bundle, [prepared], GREEDY)[0].text
        assert list(row) == ["id", "instruction", "reference_output", "output", "finish_reason"]


def test_batches_hold_questions_of_like_length(bundle, question_file, tmp_path: Path, monkeypatch) -> None:
    batches: list[list[int]] = []

    def watch(bundle, rows, sampling):
        batches.append([len(row.ids) for row in rows])
        return answer_rows(bundle, rows, sampling)

    monkeypatch.setattr(answers_module, "answer_rows", watch)
    run(bundle, question_file, tmp_path / "a.jsonl")
    lengths = [tiny.flatten(batches[:8]), tiny.flatten(batches[8:])]
    assert [len(window) for window in lengths] == [16, 3]
    assert all(window == sorted(window, reverse=True) for window in lengths)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0}, {"num_beams": 2, "temperature": 1.0}], ids=["greedy", "sample", "beam-sample"]
)
def test_a_job_killed_anywhere_ends_with_the_same_bytes(bundle, question_file, tmp_path: Path, options) -> None:
    sampling = SamplingOptions(max_new_tokens=3, **options)
    output = tmp_path / "a.jsonl"
    run(bundle, question_file, output, sampling)
    whole = output.read_bytes()
    ends = [i for i, byte in enumerate(whole) if byte == 10]
    kills = [0, 5, *(end + shift for end in ends[::6] for shift in (0, 1, 9)), len(whole)]
    for kill in kills:
        output.write_bytes(whole[:kill])
        n_done = whole[:kill].count(b"\n")
        tally = run(bundle, question_file, output, sampling)
        assert output.read_bytes() == whole, f"cut at byte {kill}"
        assert tally.n_answers == 19 - n_done
    assert len(kills) == 15


def test_what_is_answered_is_not_answered_again(bundle, question_file, tmp_path: Path, monkeypatch) -> None:
    output = tmp_path / "a.jsonl"
    run(bundle, question_file, output)
    lines = output.read_bytes().splitlines(keepends=True)
    asked: list[int] = []

    def watch(bundle, rows, sampling):
        asked.extend(row.number for row in rows)
        return answer_rows(bundle, rows, sampling)

    monkeypatch.setattr(answers_module, "answer_rows", watch)
    run(bundle, question_file, output)
    assert asked == []
    output.write_bytes(b"".join(lines[:17]))
    run(bundle, question_file, output)
    assert set(asked) >= {17, 18}
    assert min(asked) >= 16


def test_ctrl_c_keeps_what_is_written_and_says_how_to_go_on(bundle, question_file, tmp_path: Path, monkeypatch) -> None:
    run(bundle, question_file, tmp_path / "undisturbed.jsonl")
    calls = 0

    def interrupted(bundle, rows, sampling):
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        return answer_rows(bundle, rows, sampling)

    with monkeypatch.context() as patch, pytest.raises(Stopped, match=r"16 of 19 answers .* same command") as stopped:
        patch.setattr(answers_module, "answer_rows", interrupted)
        run(bundle, question_file, tmp_path / "a.jsonl")
    assert stopped.value.exit_code == 130
    run(bundle, question_file, tmp_path / "a.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "undisturbed.jsonl").read_bytes()


def test_a_question_that_cannot_be_asked_keeps_its_line(bundle, tmp_path: Path) -> None:
    data = tmp_path / "questions.jsonl"
    texts = ["Hi", "fox!" * 200, "Bye", "fox?" * 200]
    data.write_text("\n".join(json.dumps({"instruction": text}) for text in texts), encoding="utf-8")
    tally = run(bundle, data, tmp_path / "a.jsonl")
    rows = rows_of(tmp_path / "a.jsonl")
    assert [row["finish_reason"] for row in rows] == ["length", "error", "length", "error"]
    assert [row["output"] is None for row in rows] == [False, True, False, True]
    assert "reads at most 512" in rows[1]["error"]
    assert (tally.n_answers, tally.n_errors) == (4, 2)
    assert run(bundle, data, tmp_path / "a.jsonl").n_answers == 0


def test_a_file_of_nothing_but_unaskable_questions_ends(bundle, tmp_path: Path) -> None:
    data = tmp_path / "questions.jsonl"
    data.write_text("\n".join([json.dumps({"instruction": "fox!" * 200})] * 5), encoding="utf-8")
    assert run(bundle, data, tmp_path / "a.jsonl").n_errors == 5
    assert len(rows_of(tmp_path / "a.jsonl")) == 5


def test_a_batch_too_large_for_the_card_is_halved(bundle, questions, monkeypatch) -> None:
    rows = [prepare(bundle, question, GREEDY, number=n) for n, question in enumerate(questions)]
    expected = answer_rows(bundle, rows, GREEDY)
    sizes: list[int] = []

    def small_card(bundle, rows, sampling):
        sizes.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError
        return answer_rows(bundle, rows, sampling)

    monkeypatch.setattr(answers_module, "answer_rows", small_card)
    assert answer_safely(bundle, rows, GREEDY) == expected
    assert sizes == [6, 3, 1, 2, 3, 1, 2]


def test_one_question_too_large_for_the_card_is_an_error_with_advice(bundle, questions, monkeypatch) -> None:
    def no_card(bundle, rows, sampling):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(answers_module, "answer_rows", no_card)
    rows = [prepare(bundle, question, GREEDY) for question in questions]
    with pytest.raises(ModelError, match="--bits"):
        answer_safely(bundle, rows, GREEDY)


def test_skipped_records_are_said_before_anything_is_loaded(tmp_path: Path, capsys) -> None:
    data = tmp_path / "questions.jsonl"
    data.write_text('{"instruction": "Hi"}\n{"instruction": ""}\n{"x": 1}\n', encoding="utf-8")
    assert survey(str(data)) == 1
    said = capsys.readouterr().out
    assert "questions.jsonl:2" in said
    assert "questions.jsonl:3" in said
    data.write_text("{}\n", encoding="utf-8")
    with pytest.raises(DataError):
        survey(str(data))


def test_more_lines_than_questions_are_refused(bundle, question_file, tmp_path: Path) -> None:
    output = tmp_path / "a.jsonl"
    run(bundle, question_file, output)
    with output.open("ab") as stream:
        stream.write(b"{}\n")
    with pytest.raises(ConfigError, match="20 lines for 19 answers"):
        run(bundle, question_file, output)


def test_a_system_text_stands_in_front_unless_there_is_one() -> None:
    user, own = Turn("user", "Hi"), Turn("system", "own")
    assert with_system([user], "Be brief.") == (Turn("system", "Be brief."), user)
    assert with_system([own, user], "Be brief.") == (own, user)
    assert with_system([user], "") == (user,)
