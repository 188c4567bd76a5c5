"""Every shape that training reads can be asked, with or without its answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from onecard.data.formats import UnusableRecord
from onecard.data.messages import Conversation, Turn
from onecard.data.questions import Question, read_questions, to_question
from onecard.data.sources import ReadReport, read
from onecard.errors import DataError
from onecard.installation import SHIPPED as REPOSITORY


def user(content: str, second: str = "") -> Turn:
    return Turn("user", content, second)


HI, BYE = {"role": "user", "content": "Hi"}, {"role": "user", "content": "Bye"}
HELLO = {"role": "assistant", "content": "Hello"}
ASKED = [
    ({"instruction": "Add", "input": "2 3"}, [user("Add", "2 3")]),
    ({"instruction": "Add", "input": "2 3", "output": "5"}, [user("Add", "2 3")]),
    ({"instruction": "Add", "input": "2 3", "output": ""}, [user("Add", "2 3")]),
    ({"instruction": "Add", "input": "2 3", "output": None}, [user("Add", "2 3")]),
    ({"instruction": "Add", "context": "2 3", "response": "5"}, [user("Add", "2 3")]),
    ({"instruction": "", "input": "What?"}, [user("What?")]),
    ({"instruction": "Add", "system": "Be brief."}, [Turn("system", "Be brief."), user("Add")]),
    ({"instruction": "c", "history": [["a", "b"]]}, [user("a"), Turn("assistant", "b"), user("c")]),
    ({"input": ["a", "c"], "output": ["b"]}, [user("a"), Turn("assistant", "b"), user("c")]),
    ({"input": ["a", "c"], "output": ["b", "d"]}, [user("a"), Turn("assistant", "b"), user("c")]),
    ({"input": ["a"]}, [user("a")]),
    ({"input": "a"}, [user("a")]),
    ({"prompt": "a"}, [user("a")]),
    ({"prompt": "a", "completion": "b"}, [user("a")]),
    ({"question": "a"}, [user("a")]),
    ({"query": "a", "response": ""}, [user("a")]),
    ({"messages": [HI]}, [user("Hi")]),
    ({"messages": [HI, HELLO]}, [user("Hi")]),
    ({"messages": [HI, HELLO | {"content": ""}]}, [user("Hi")]),
    ({"messages": [HI, HELLO, BYE]}, [user("Hi"), Turn("assistant", "Hello"), user("Bye")]),
    ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, [user("Hi")]),
    ({"conversations": [{"from": "human", "value": "Hi"}]}, [user("Hi")]),
    ({"text": "Once upon"}, [user("Once upon")]),
]  # fmt: skip


@pytest.mark.parametrize(("record", "turns"), ASKED, ids=[json.dumps(record)[:50] for record, _ in ASKED])
def test_what_is_asked(record, turns) -> None:
    before = json.dumps(record)
    question = to_question(record, "q.jsonl:1").sample
    assert isinstance(question, Question)
    assert list(question.turns) == turns
    assert question.fields is record
    assert json.dumps(record) == before, "the record itself was changed"


@pytest.mark.parametrize(
    "record",
    [{}, {"x": 1}, {"output": "5"}, {"instruction": ""}, {"messages": []}, "text", 5, None, {"instruction": "a\0b"},
     {"messages": [{"role": "system", "content": "s"}]}, {"instruction": ["a"]},
     {"input": ["a", "b", "c"], "output": []}],
)  # fmt: skip
def test_what_cannot_be_asked_has_a_reason(record) -> None:
    with pytest.raises(UnusableRecord) as refused:
        to_question(record, "q.jsonl:1")
    assert str(refused.value)


def test_a_file_that_training_reads_asks_what_training_answers() -> None:
    files = [
        file for suffix in ("json", "jsonl", "csv", "parquet") for file in (REPOSITORY / "sample").rglob(f"*.{suffix}")
    ]
    files = sorted(file for file in files if "tiny-llama" not in file.parts)
    n_conversations = 0
    for path in files:
        samples = list(read(str(path), report=ReadReport()))
        questions = list(read_questions(str(path), report=ReadReport()))
        assert [q.record for q in questions] == [s.record for s in samples]
        for question, sample in zip(questions, samples, strict=True):
            if isinstance(sample, Conversation):
                assert question.turns == sample.turns[:-1]
                n_conversations += 1
    assert len(files) >= 8
    assert n_conversations > 400


def test_bad_lines_are_in_the_report(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"instruction": "a"}\nbroken\n{"instruction": ""}\n{"instruction": "d"}\n', encoding="utf-8")
    report = ReadReport()
    assert [question.record for question in read_questions(str(path), report=report)] == ["q.jsonl:1", "q.jsonl:4"]
    assert (report.n_good, [bad.line for bad in report.bad]) == (2, [2, 3])
    with pytest.raises(DataError):
        list(read_questions(str(tmp_path / "missing.jsonl"), report=ReadReport()))
