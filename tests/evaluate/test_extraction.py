"""Extraction: planted answers as JSON and tuples get the known precision, recall and F1."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from onecard.data.extraction import ExtractionRow, ExtractionSchema, read_schema, to_row
from onecard.errors import DataError
from onecard.evaluate.extraction import ExtractedItem, ExtractionTask, items_of, n_matched, parsed_answer

ENTITIES = ExtractionSchema("entities", ("人物", "地点"))
RELATIONS = ExtractionSchema("relations", ("born in", "works for"))
EVENTS = read_schema([{"event_type": "结婚", "trigger": True, "arguments": ["时间", "人物"]}])


def task_of(tmp_path: Path, *rows: ExtractionRow) -> ExtractionTask:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(to_row(row), ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return ExtractionTask(file)


def answered(task: ExtractionTask, *answers: str) -> dict:
    rows = [
        {"key": item.key, "answer": text, "finish_reason": "stop"}
        for item, text in zip(task.items, answers, strict=True)
    ]
    return task.report(rows)


def test_known_figures_strict_and_relaxed_by_type_and_unparsed_apart(tmp_path: Path) -> None:
    found = {"人物": ["李白", "杜甫"], "地点": ["四川省成都市"]}
    rows = [ExtractionRow(ENTITIES, "文", found), ExtractionRow(ENTITIES, "文", {"人物": ["王维"], "地点": []})]
    report = answered(task_of(tmp_path, *rows), '结果：{"人物": ["李白", "苏轼"], "地点": ["成都市"]}', "我不知道")
    total, person, place = (measure["values"] for measure in report["measures"])
    assert total == {
        "precision": round(1 / 3, 6), "recall": 0.25, "f1": round(2 / 7, 6), "relaxed_precision": round(2 / 3, 6),
        "relaxed_recall": 0.5, "relaxed_f1": round(4 / 7, 6), "unparsed": 1,
    }  # fmt: skip
    assert (person["f1"], place["f1"], place["relaxed_f1"]) == (0.4, 0.0, 1.0)
    assert [record["key"] for record in report["worst"]] == ["2", "1"], "the one with nothing right first"


def test_relations_and_events_of_both_languages(tmp_path: Path) -> None:
    relation = ExtractionRow(RELATIONS, "text", {"born in": [{"subject": "Ada", "object": "London"}], "works for": []})
    event = {"trigger": "婚礼", "arguments": {"时间": "周五", "人物": ["甲", "乙"]}}
    task = task_of(tmp_path, relation, ExtractionRow(EVENTS, "文", {"结婚": [event]}))
    same = [to_row(item.row)["output"] for item in task.items]
    assert answered(task, *same)["measures"][0]["values"]["f1"] == 1.0
    tuples = answered(task, "(Ada, born in, London)", "（结婚，触发词，婚礼）、（结婚，时间，周五）（结婚，人物，丙）")
    assert [measure["values"]["f1"] for measure in tuples["measures"]] == [round(2 / 3, 6), 1.0, round(4 / 7, 6)]


@pytest.mark.parametrize(
    ("schema", "text", "found"),
    [
        (ENTITIES, "(人物, 李白)；(成都, 地点)", {"人物": ["李白"], "地点": ["成都"]}),
        (ENTITIES, '```json\n{"人物": ["李白"]}\n```', {"人物": ["李白"], "地点": []}),
        (ENTITIES, '{"人物": "李白"}', None),
        (ENTITIES, "没有", None),
        (RELATIONS, "[Ada | born in | London]", {"born in": [{"subject": "Ada", "object": "London"}], "works for": []}),
        (RELATIONS, "(Ada, London)", None),
        (EVENTS, "(结婚, 地点, 北京)", None),
    ],
)
def test_answers_as_json_and_tuples(schema: ExtractionSchema, text: str, found: dict | None) -> None:
    assert parsed_answer(schema, text) == found


def test_relaxed_pairs_do_not_depend_on_the_order() -> None:
    wanted = [ExtractedItem("x", ("ab",)), ExtractedItem("x", ("c",))]  # the second goes with the longer one only
    got = [ExtractedItem("x", ("abc",)), ExtractedItem("x", ("ab",))]
    for one in (wanted, wanted[::-1]):
        for other in (got, got[::-1]):
            assert n_matched(one, other) == 2
    assert n_matched(wanted, [ExtractedItem("y", ("ab",))]) == 0
    assert items_of({"x": ["a", " a", ""]}) == [ExtractedItem("x", ("a",))]


def test_a_file_of_another_form_is_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"instruction": "Say hello", "output": "hello"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the instruction is no JSON with a schema"):
        ExtractionTask(file)
    file.write_text(
        '{"text": "Ada was born in London", "relation": [{"head": "Ada", "relation": "born in", "tail": "London"}]}\n'
    )
    assert ExtractionTask(file).items[0].row.found == {"born in": [{"subject": "Ada", "object": "London"}]}
