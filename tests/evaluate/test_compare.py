"""`onecard evaluate --compare`: each kind of suite by its own score, over the same records; what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from onecard.console import run_main
from onecard.evaluate.compare import compare_reports
from onecard.evaluate.report import word
from onecard.programs import evaluate
from onecard.statistics import RESULTS

Suites = dict[str, tuple[str, dict[str, Any], list[dict[str, Any]]]]


def measured(folder: Path, suites: Suites) -> Path:
    """A folder of onecard evaluate: of each suite its kind, settings and rows."""
    folder.mkdir()
    told = [{"name": name, "kind": kind, "settings": settings} for name, (kind, settings, _) in suites.items()]
    (folder / "report.json").write_text(json.dumps({"suites": told}), encoding="utf-8")
    rows = [{"suite": name, "key": str(k), **row} for name, (*_, rows) in suites.items() for k, row in enumerate(rows)]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def two(tmp_path: Path) -> tuple[Path, Path]:
    """B is better in free answers, worse on text, and answers one question of ten otherwise."""
    a: Suites = {
        "open/q": ("open", {}, [{"f1": 0.1 * k} for k in range(10)]),
        "text": ("perplexity", {}, [{"log_prob": -10.0 - k, "characters": 10} for k in range(8)]),
        "mmlu": ("mmlu", {"shots": "0"}, [{"score": k % 2} for k in range(10)] + [{"score": None}]),
        "only/a": ("open", {}, [{"f1": 0.0}]),
    }
    b: Suites = {
        "open/q": ("open", {}, [{"f1": 0.1 * k + 0.1} for k in range(9)] + [{"problem": "too long"}]),
        "text": ("perplexity", {}, [{"log_prob": -11.5 - k, "characters": 10} for k in range(8)]),
        "mmlu": ("mmlu", {"shots": "5"}, [{"score": 1}] + [{"score": k % 2} for k in range(1, 10)] + [{"score": 1}]),
    }
    return measured(tmp_path / "a", a), measured(tmp_path / "b", b)


def test_each_suite_is_compared_over_the_records_of_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = two(tmp_path)
    evaluate.main(["--compare", str(a), str(b), "--output_path", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out" / "comparison.json").read_text(encoding="utf-8"))
    assert [suite["result"] for suite in found["suites"]] == ["better", "worse", "no difference beyond noise"]
    answers, text, choice = found["suites"]
    assert (answers["score"], answers["n"], answers["n_apart"], answers["n_up"]) == ("f1", 9, 1, 9)
    assert answers["mean_a"] == pytest.approx(0.4) and answers["difference"][0] == pytest.approx(0.1)
    assert text["difference"][0] == pytest.approx(0.15) and text["mean_a"] == pytest.approx(1.35)
    assert (choice["n"], choice["mean_a"], choice["mean_b"], choice["settings"]) == (
        10,
        0.5,
        0.6,
        {"shots": ["0", "5"]},
    )
    said = capsys.readouterr().out
    assert "open/q: f1 0.4000 in A, 0.5000 in B, difference +0.1000 (95 % interval" in said
    assert "shots is 0 in A and 5 in B" in said and "1 records have a score in one of the two only" in said
    page = (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")
    assert "| open/q | F1 | 9 | 0.4000 | 0.5000 | 0.1000 [0.1000, 0.1000] | 9 | 0 | better / 变好 |" in page
    assert ": 0 / 5\n" in page
    # The other way round it is the other result.
    assert [suite.result for suite in compare_reports(b, a)] == ["worse", "better", "no difference beyond noise"]
    assert all(word(result, 1) != result for result in RESULTS.values())


def test_runs_stand_for_what_they_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for run, part, f1 in (("old", "before", 0.1), ("old", "after", 0.2), ("new", "before", 0.3), ("new", "after", 0.4)):
        Path(run, "evaluation").mkdir(parents=True, exist_ok=True)
        measured(Path(run, "evaluation", part), {"open/q": ("open", {}, [{"f1": f1}] * 10)})
    for words, said in (
        (["old", "new"], "f1 0.2000 in A, 0.4000 in B"),
        (["base", "new"], "f1 0.3000 in A, 0.4000 in B"),
        (["old", "base"], "f1 0.2000 in A, 0.1000 in B"),
        (["new/evaluation/before", "old"], "f1 0.3000 in A, 0.2000 in B"),
    ):
        evaluate.main(["--compare", *words])
        assert said in capsys.readouterr().out


def test_what_cannot_be_compared_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    two(tmp_path)
    measured(Path("other"), {"elsewhere": ("open", {}, [{"f1": 1.0}])})
    measured(Path("plain"), {"open/q": ("open", {}, [{"answer": "x"}])})
    measured(Path("cut"), {"open/q": ("open", {}, [{"f1": 1.0}])})
    with Path("cut/answers.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"suite": "open')
    for words, said in (
        (["a"], "--compare: takes two folders"),
        (["a", "b", "--suite", "x"], "--suite: and --compare contradict"),
        (["a", "none"], "there is no report.json"),
        (["a", "other"], "have no suite in common"),
        (["a", "plain"], "open/q is left out: no record has a score (f1) in both"),
        (["a", "b", "--output_path", "cut/answers.jsonl"], "--output_path: cannot be written"),
        (["a", "cut"], "cut: is no whole evaluation"),
    ):
        assert run_main(lambda words=words: evaluate.main(["--compare", *words])) in (1, 2)  # type: ignore[misc]
        assert said in capsys.readouterr().err
