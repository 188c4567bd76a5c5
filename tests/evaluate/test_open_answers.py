"""Open answers and their judge: forms of files, known metrics, both orders, nonsense, and a judge that goes away."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from onecard.curation.make.endpoint import Endpoint, EndpointError, EndpointSettings
from onecard.curation.make.journal import Journal
from onecard.curation.make.run import TokenPrices, make
from onecard.errors import ConfigError, DataError
from onecard.evaluate import text_metrics
from onecard.evaluate.judge import criteria_of, grades_in, judge_tasks, judged_measures
from onecard.evaluate.open_answers import OpenTask, read_open
from onecard.evaluate.text_metrics import exact_match, f1, units
from tests.curation.scripted_endpoint import Reply, completion, scripted

has_metrics = find_spec("sacrebleu") is not None and find_spec("rouge_score") is not None
needs_metrics = pytest.mark.skipif(
    not has_metrics, reason="sacrebleu, rouge-score are not installed (requirements-eval.txt)"
)


def written(path: Path, rows: list[dict[str, Any]], *, as_list: bool = False) -> Path:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text(f"[{','.join(lines)}]" if as_list else "\n".join(lines), encoding="utf-8")
    return path


def test_forms_of_files(tmp_path: Path) -> None:
    belle = written(tmp_path / "a.json", [{"question": "问", "class": "math", "std_answer": "4"}], as_list=True)
    ours = written(tmp_path / "b.jsonl", [{"instruction": "Add", "input": "2 2", "class": "math", "reference": "4"}])
    vicuna = written(tmp_path / "c.jsonl", [{"instruction": "西瓜是什么\n"}])
    found = [read_open(path) for path in (belle, ours, vicuna)]
    assert [form for form, _ in found] == ["BELLE", "instruction", "instruction"]
    assert [(q.text, q.kind, q.reference) for _, (q,) in found] == [
        ("问", "math", "4"), ("Add\n2 2", "math", "4"), ("西瓜是什么\n", "", "")
    ]  # fmt: skip
    for rows, message in (
        ([{"x": 1}], "a.json:1: has neither"),
        ([{"instruction": ["a"]}], 'a.json:1: "instruction" is a list'),
    ):
        with pytest.raises(DataError, match=message):
            read_open(written(tmp_path / "a.json", rows))
    (tmp_path / "a.json").write_text('{"instruction": "a"}\n{"instruction": \n', encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.json:2: "):
        read_open(tmp_path / "a.json")


def test_units_exact_match_and_f1() -> None:
    assert units("我有 2 Cats，好。") == ["我", "有", "2", "cats", "好"]
    assert f1("中国的首都是北京", "中国首都是北京。") == pytest.approx(14 / 15)
    assert f1("the cat", "The cat sat down") == pytest.approx(2 / 3)
    assert (f1("", ""), f1("a", ""), exact_match(" a\n", "a"), exact_match("a", "b")) == (1.0, 0.0, 1.0, 0.0)


@needs_metrics
def test_metrics_are_those_of_the_libraries() -> None:
    import sacrebleu

    answer, reference = "中国的首都是北京", "中国首都是北京。"
    found = text_metrics.record_metrics(answer, reference)
    assert found["chrf"] == sacrebleu.sentence_chrf(answer, [reference]).score / 100
    assert found["rouge_1"] == pytest.approx(14 / 16), "a sign counts, as sacrebleu cuts Chinese"
    bleu = text_metrics.corpus_bleu(["the cat sat on a mat"], ["the cat sat on the mat"])
    assert bleu == sacrebleu.corpus_bleu(["the cat sat on a mat"], [["the cat sat on the mat"]]).score / 100
    zh = sacrebleu.corpus_bleu([answer], [[reference]], tokenize="zh").score / 100
    assert text_metrics.corpus_bleu([answer], [reference]) == zh > 0.3


@needs_metrics
def test_planted_answers_get_the_known_score_by_class(tmp_path: Path) -> None:
    rows = [{"question": f"问{k}", "class": "qa" if k < 3 else "math", "std_answer": "北京"} for k in range(4)]
    task = OpenTask(written(tmp_path / "a.json", rows))
    answers = ["北京", "北方", "天", "北京"]
    rows = [{"key": item.key, "answer": text, "finish_reason": "stop", **text_metrics.record_metrics(text, "北京")}
            for item, text in zip(task.items, answers, strict=True)]  # fmt: skip
    report = task.report(rows)
    values = {measure["name"]: measure["values"] for measure in report["measures"]}
    assert [values[name]["exact_match"][0] for name in ("", "qa", "math")] == [0.5, round(1 / 3, 6), 1.0]
    assert [values[name]["f1"][0] for name in ("", "qa", "math")] == [0.625, 0.5, 1.0]
    # "北方" shares one of its two characters with "北京", and no pair of them.
    assert [values[name]["rouge_1"][0] for name in ("", "qa")] == [0.625, 0.5]
    assert [values[name]["rouge_2"][0] for name in ("", "qa")] == [0.5, round(1 / 3, 6)]
    assert [record["key"] for record in report["worst"]] == ["3", "2"]


def test_what_is_not_installed_costs_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)  # an import then fails
    text_metrics._libraries.cache_clear()
    with pytest.raises(ConfigError, match=r"need sacrebleu: pip install -r requirements-eval\.txt"):
        OpenTask(written(tmp_path / "a.jsonl", [{"instruction": "a", "reference": "b"}]))
    assert OpenTask(written(tmp_path / "b.jsonl", [{"instruction": "a"}])).items, "without references nothing is needed"


# --- the judge --------------------------------------------------------------------------------------------------------


def test_grades_in_answers_of_a_judge() -> None:
    assert grades_in('Better. {"1": 7, "2": "8.5"}', 2) == [7, 8.5]
    assert grades_in('{"1": 1} no: {"1": 3}', 1) == [3]
    for text in (
        "7",
        '{"1": 7}',
        '{"1": 11, "2": 3}',
        '{"1": null, "2": 3}',
        '{"1": true, "2": 1}',
        '{"1": "NaN", "2": 1}',
    ):
        assert grades_in(text, 2) is None, text
    assert criteria_of("Open_QA", "en").startswith("Every stated fact") and criteria_of("?", "zh").startswith("看回答")


def judged(tmp_path: Path, url: str, task: OpenTask, answers: dict[str, str]) -> list[Any]:
    settings = EndpointSettings(url, "judge", temperature=0.0, max_attempts=2)
    with Endpoint(settings, wait=lambda _: None) as endpoint, Journal(tmp_path / "judge", {"judge": "m"}) as journal:
        make(endpoint, "judge", journal, judge_tasks([task], {task.name: answers}, journal), TokenPrices())
        return judged_measures(task, journal, 1)


def open_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]]) -> OpenTask:
    monkeypatch.setattr("onecard.evaluate.open_answers.check_metrics", lambda: None)
    return OpenTask(written(tmp_path / "a.jsonl", rows))


def grade_by_content(body: dict[str, Any], _: int) -> Reply:
    """8 for the answer GOOD, 4 for another one, and one more for whatever stands second."""
    text = body["messages"][0]["content"].partition("[Answer 1]\n")[2]
    first, _, second = text.partition("\n\n[Answer 2]\n")
    second = second.partition("\n\n")[0]
    grades = {"1": 8 if first.startswith("GOOD") else 4}
    if second:
        grades["2"] = (8 if second.startswith("GOOD") else 4) + 1
    return completion(f"Because. {json.dumps(grades)}")


def test_both_orders_are_asked_and_its_effect_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"instruction": "Q1", "class": "qa", "reference": "ref"}, {"instruction": "Q2", "class": "brainstorming"}]
    task = open_task(tmp_path, monkeypatch, rows)
    with scripted(grade_by_content) as endpoint:
        total, qa, ideas = judged(tmp_path, endpoint.url, task, {"1": "GOOD", "2": "weak"})
        assert len(endpoint.requests) == 3 and all(request["temperature"] == 0 for request in endpoint.requests)
        assert "The ideas must fit" in endpoint.requests[2]["messages"][0]["content"]
        judged(tmp_path, endpoint.url, task, {"1": "GOOD", "2": "weak"})
        assert len(endpoint.requests) == 3, "what was graded is not asked again"
    assert (qa.values["grade"].value, qa.values["reference_grade"].value) == (8.5, 4.5)
    assert (qa.values["preferred"].value, qa.values["order_effect"].value) == (1.0, 1.0)
    assert (ideas.values["grade"].value, total.values["grade"].value, total.values["ungraded"]) == (4.0, 6.25, 0)
    kept = (tmp_path / "judge" / "journal.jsonl").read_text(encoding="utf-8")
    assert kept.count("Because.") == 3, "raw gradings stay"


def test_a_judge_of_nonsense_and_one_that_goes_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = open_task(tmp_path, monkeypatch, [{"instruction": "Q1"}, {"instruction": "Q2"}])
    answers = {"1": "GOOD", "2": "GOOD"}

    def fails(body: dict[str, Any], number: int) -> Reply:
        return completion("I like it!") if number < 3 else Reply(b"{}", status=500)

    with scripted(fails) as endpoint, pytest.raises(EndpointError, match="in 2 tries"):
        judged(tmp_path, endpoint.url, task, answers)
    with scripted(grade_by_content) as endpoint:
        (total,) = judged(tmp_path, endpoint.url, task, answers)
        assert len(endpoint.requests) == 1, "only what was not asked"
    assert (total.values["ungraded"], total.values["grade"].value) == (1, 8.0)
    assert (tmp_path / "judge" / "journal.jsonl").read_text(encoding="utf-8").count("I like it!") == 3
