"""Fields under other names, pairs of turns in one object, lists of answers, thoughts, and several files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from onecard.config import data as config
from onecard.config.base_model import DEFAULT_BASE
from onecard.config.data import column_names, toy_base_problem
from onecard.data.columns import renamed
from onecard.data.formats import _SHAPES, to_sample
from onecard.data.messages import Turn
from onecard.data.questions import to_question
from onecard.data.sources import ReadReport, Source, data_fingerprint, read
from onecard.data.turn_objects import FIRST_OF_SEVERAL
from onecard.data.values import UnusableRecord
from onecard.errors import DataError
from onecard.installation import SHIPPED as REPOSITORY


def user(text: str, second: str = "") -> Turn:
    return Turn("user", text, second)


def bot(text: str) -> Turn:
    return Turn("assistant", text)


HISTORIES = [
    [["a", "b"]],
    [{"human": "a", "assistant": "b"}],
    [{"question": "a", "answer": "b"}],
    [{"instruction": "a", "output": "b"}],
    [{"prompt": "a", "response": "b"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
]


@pytest.mark.parametrize("history", HISTORIES, ids=str)
def test_a_history_is_read_in_every_usual_form(history) -> None:
    sample = to_sample({"instruction": "c", "output": "d", "history": history}, "a:1").sample
    assert sample.turns == (user("a"), bot("b"), user("c"), bot("d"))
    if isinstance(history[0], dict):
        whole = to_sample({"conversation": [*history, {"human": "c", "assistant": "d"}]}, "a:1")
        assert (whole.sample.turns, whole.ignored) == (sample.turns, [])
        asked = to_question({"conversation": [*history, {"human": "c", "assistant": "d"}]}, "a:1").sample
        assert asked.turns == sample.turns[:3]


def test_a_history_that_cannot_be_read_says_why() -> None:
    for entry, words in (
        ({"human": "a"}, 'entry 1 has "human"'),
        ({"human": "a", "assistant": ""}, 'entry 1, "assistant", is empty'),
        (["a"], "a list of 1"),
    ):
        with pytest.raises(UnusableRecord, match=words):
            to_sample({"instruction": "c", "output": "d", "history": [entry]}, "a:1")
    system = [{"role": "user", "content": "a"}, {"role": "system", "content": "s"}]
    with pytest.raises(UnusableRecord, match="system turn"):
        to_sample({"instruction": "c", "output": "d", "history": system}, "a:1")


@pytest.mark.parametrize(
    ("record", "question", "answer"),
    [
        ({"kind": "Cot", "input": "q", "target": "a"}, "q", "a"),
        ({"inputs": "q", "targets": "a"}, "q", "a"),
        ({"department": "d", "title": "t", "ask": "q", "answer": "a"}, "q", "a"),
        ({"instruction": "q", "output": ["a"]}, "q", "a"),
        ({"prompt": "q", "response": [{"type": "text", "text": "a"}]}, "q", "a"),
        ({"question": "q", "answer": ["a", "b"]}, "q", "a"),
    ],
    ids=str,
)
def test_records_of_other_kits_are_read(record, question, answer) -> None:
    shaped = to_sample(record, "a:1")
    assert shaped.sample.turns == (user(question), bot(answer))
    assert (FIRST_OF_SEVERAL in shaped.notes) == ("b" in str(record.get("answer")))


def test_columns_of_other_names_are_read_in_records_and_turns() -> None:
    columns = column_names("问:instruction, 答:output")
    assert columns == (("问", "instruction"), ("答", "output"))
    assert to_sample({"问": "q", "答": "a"}, "a:1", columns).sample.turns == (user("q"), bot("a"))
    record = {"dialog": [{"speaker": "user", "said": "q"}, {"speaker": "bot", "said": "a"}]}
    columns = column_names("dialog:messages,speaker:role,said:content")
    assert to_sample(record, "a:1", columns).sample.turns == (user("q"), bot("a"))
    question = to_question({"问": "q", "答": "a"}, "a:1", column_names("问:instruction,答:output")).sample
    assert (question.turns, question.fields) == ((user("q"),), {"问": "q", "答": "a"})


def test_columns_that_cannot_be_meant_are_refused() -> None:
    for wrong in ("ask", "ask:", ":output", "ask:instrucion", "a:output,b:output", "a:output,a:input"):
        assert column_names(wrong) is None
        (problem,) = config.DataOptions(columns=wrong).problems()
        assert problem[0] == "--columns" and "instruction" in problem[1]
    with pytest.raises(UnusableRecord, match='two of its fields would be read as "output"'):
        renamed({"output": "a", "reply": "b"}, (("reply", "output"),))
    with pytest.raises(UnusableRecord, match="--columns query_text:instruction,reply:output"):
        to_sample({"query_text": "q", "reply": "a"}, "a:1")
    with pytest.raises(UnusableRecord, match="--columns NAME:output"):
        to_sample({"instruction": "q", "reply_text": "a"}, "a:1")


def test_every_name_that_is_read_can_be_given_by_columns() -> None:
    read_names = {key for shape in _SHAPES for key in (*shape.required, *shape.optional)}
    assert set(config.COLUMN_NAMES) == read_names | {"role", "content", "from", "value", "thought", "margin"}


@pytest.mark.parametrize("name", ["cot", "rationale", "Complex_CoT", "thought"])
def test_thoughts_are_named_with_the_option_that_learns_them(name: str, tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "a", name: "Hm."}
    records = [
        {"question": "q", "answer": "a", name: "Hm."},
        {"messages": [{"role": "user", "content": "q"}, answer]},
    ]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    report = ReadReport()
    assert [sample.turns[-1] for sample in read(str(path), report=report)] == [bot("a"), bot("a")]
    assert report.summary_lines()[-1] == (
        f'  "{name}" looks like thoughts: --columns {name}:thought learns it in front of the answer'
    )
    report = ReadReport()
    source = Source((str(path),), column_names(f"{name}:thought"))
    expected = bot("<think>\nHm.\n</think>\n\na")
    assert [sample.turns[-1] for sample in read(source, report=report)] == [expected, expected]
    assert not report.ignored_fields


def test_an_answer_keeps_a_thought_of_its_own() -> None:
    record = {"question": "q", "answer": "<think>\nMine.\n</think>\n\na", "cot": "Hm."}
    sample = to_sample(record, "a:1", (("cot", "thought"),)).sample
    assert sample.turns[-1] == bot(record["answer"])


def test_bad_records_on_one_line_have_their_number(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"}, {"txt": "b"}, {"text": "c"}, {"text": ""}]', encoding="utf-8")
    report = ReadReport()
    list(read(str(path), report=report))
    assert [bad.place for bad in report.bad] == ["a.json:1#2", "a.json:1#4"]
    assert [line for line in report.summary_lines() if "a.json:1#4" in line]
    assert ReadReport.from_dict(json.loads(json.dumps(report.as_dict()))) == report
    with pytest.raises(DataError, match="1: record 2: "):
        list(read(str(path), report=ReadReport(), strict=True))


def test_several_sources_are_read_in_the_order_they_were_given(tmp_path: Path) -> None:
    for folder, text in (("b", "first"), ("a", "second")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.json").write_text(json.dumps([{"text": text}]), encoding="utf-8")
    paths = tuple(str(tmp_path / name) for name in ("b/train.json", "a"))
    report = ReadReport()
    samples = list(read(Source(paths), report=report))
    assert [sample.text for sample in samples] == ["first", "second"]
    assert len({sample.record for sample in samples}) == len(report.shapes) == 2
    assert data_fingerprint(Source(paths)) != data_fingerprint(Source(paths[::-1]))
    assert data_fingerprint(paths[0]) == data_fingerprint(Source(paths[:1])), "one file is what it always was"
    assert data_fingerprint(Source(paths[:1], (("text", "text"),))) != data_fingerprint(paths[0])
    with pytest.raises(DataError, match="given twice"):
        data_fingerprint(Source((paths[0], paths[0])))


def test_own_data_on_the_toy_base_is_warned_of(tmp_path: Path) -> None:
    own, sample = str(tmp_path / "mine.json"), str(REPOSITORY / "sample" / "shapes")
    assert "toy" in toy_base_problem(DEFAULT_BASE, own)
    assert "toy" in toy_base_problem(DEFAULT_BASE, [sample, own])
    assert toy_base_problem(DEFAULT_BASE, sample) == toy_base_problem("Qwen/Qwen2.5-7B", own) == ""
