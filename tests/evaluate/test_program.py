"""`onecard evaluate` as it is typed: several suites, a report that says how, a kill that changes nothing, bad input."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from onecard.curation.make.journal import Journal, JournalEntry
from onecard.errors import ConfigError, DataError
from onecard.evaluate.choice import ChoiceTask
from onecard.evaluate.page import page
from onecard.evaluate.report import build_report, markdown
from onecard.evaluate.run import named_suite
from onecard.programs import _lm_eval, evaluate
from tests.curation.scripted_endpoint import completion, scripted
from tests.evaluate import layouts
from tests.tiny import save_tiny_llama

WRITTEN = ("report.json", "report.md", "report.html", "answers.jsonl")


@pytest.fixture
def words(tiny_base: Path, tmp_path: Path) -> list[str]:
    """A command line with three suites but for its --output_path."""
    (tmp_path / "texts.txt").write_text("The quick brown fox.\n\n中国的首都是北京。\n", encoding="utf-8")
    rows = [{"instruction": f"Say {k}"} for k in range(3)]
    (tmp_path / "open.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    suites = [
        f"cmmlu:{layouts.cmmlu(tmp_path / 'cmmlu')}",
        str(tmp_path / "texts.txt"),
        f"open:{tmp_path / 'open.jsonl'}",
    ]
    typed = [word for suite in suites for word in ("--suite", suite)]
    return [*typed, "--model_path", str(tiny_base), "--bits", "32", "--device", "cpu", "--max_new_tokens", "4",
            "--batch_size", "5"]  # fmt: skip


def test_a_report_says_what_was_asked_and_a_kill_changes_nothing(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate.main([*words, "--output_path", str(tmp_path / "whole")])
    report = json.loads((tmp_path / "whole" / "report.json").read_text(encoding="utf-8"))
    assert [suite["name"] for suite in report["suites"]] == ["cmmlu/test", "perplexity/texts.txt", "open/open.jsonl"]
    assert [suite["measures"][0]["n"] for suite in report["suites"]] == [12, 2, 3]
    assert report["settings"]["bits"] == 32 and report["settings"]["template"] == "alpaca"
    assert report["suites"][0]["settings"]["prompt"] == "base_prompt"
    assert report["versions"]["transformers"] and "accuracy" in capsys.readouterr().out
    lines = (tmp_path / "whole" / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 17
    submission = json.loads((tmp_path / "whole" / "submission_cmmlu_test.json").read_text(encoding="utf-8"))
    assert {name: len(letters) for name, letters in submission.items()} == {"agronomy": 6, "chinese_history": 6}

    work, n_batches = ChoiceTask.work, []

    def killed(self: ChoiceTask, bundle: Any, questions: Any) -> Any:
        n_batches.append(1)
        if len(n_batches) == 2:
            raise SystemExit("killed")
        return work(self, bundle, questions)

    again = [*words, "--output_path", str(tmp_path / "again")]
    monkeypatch.setattr(ChoiceTask, "work", killed)
    with pytest.raises(SystemExit, match="killed"):
        evaluate.main(again)
    with (tmp_path / "again" / "journal.jsonl").open("ab") as stream:
        stream.write(b'{"key": "half a li')
    monkeypatch.setattr(ChoiceTask, "work", work)
    evaluate.main(again)
    assert "going on behind 5 of 17 records" in capsys.readouterr().out
    for name in WRITTEN:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    evaluate.main(["--compare", str(tmp_path / "whole"), str(tmp_path / "again")])
    out, err = capsys.readouterr()
    assert out.count("no difference beyond noise") == 2 and "open/open.jsonl is left out" in err
    with pytest.raises(ConfigError, match="begun with other settings"):
        evaluate.main([*again, "--shots", "1"])


def test_another_batch_size_goes_on_too_and_answers_nothing_twice(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, seen = ChoiceTask.work, []

    def counted(self: ChoiceTask, bundle: Any, questions: Any) -> Any:
        if len(seen) == 5:
            raise SystemExit("killed")
        seen.extend(question.key for question in questions)
        return work(self, bundle, questions)

    monkeypatch.setattr(ChoiceTask, "work", counted)
    typed = [*words[:2], *words[6:], "--output_path", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="killed"):
        evaluate.main(typed)
    seen.append("")  # no longer five
    evaluate.main([*typed, "--batch_size", "2"])
    keys = [key for key in seen if key]
    assert len(keys) == len(set(keys)) == 12
    lines = (tmp_path / "out" / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["key"] for line in lines] == keys


def test_the_grades_of_a_judge_are_in_the_report(words: list[str], tmp_path: Path) -> None:
    typed = [*words[4:], "--output_path", str(tmp_path / "out"), "--judge_model", "judge"]
    with scripted(lambda _, __: completion('{"1": 6.5}')) as endpoint:
        evaluate.main([*typed, "--base_url", endpoint.url])
        evaluate.main([*typed, "--base_url", endpoint.url])
        assert len(endpoint.requests) == 3
    suite = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["suites"][0]
    assert (suite["settings"]["judge"], suite["measures"][0]["values"]) == (
        "judge",
        {"ungraded": 0, "grade": [6.5] * 3},
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--suite", "nowhere"], "--suite: there is no file or folder nowhere"),
        (["--suite", "cevl:{here}"], "--suite: 'cevl' is none of ceval, .*did you mean ceval"),
        (["--cot"], "--cot: needs --method free"),
        (["--shots", "-1"], "--shots: -1 is too little; use 0 or more"),
        (["--window", "8", "--stride", "8"], "--stride: 8 is not below the window of 8 tokens"),
        (["--base_url", "http://127.0.0.1:1/v1"], "--judge_model: and --base_url go together"),
    ],
)
def test_bad_options_are_named_before_a_model_is_loaded(changes: list[str], message: str, tmp_path: Path) -> None:
    layouts.ceval(tmp_path / "there")
    typed = [word.format(here=tmp_path / "there") for word in changes]
    if "--suite" not in typed:
        typed += ["--suite", str(tmp_path / "there")]
    with pytest.raises(ConfigError, match=message):
        evaluate.main([*typed, "--output_path", str(tmp_path / "out"), "--model_path", "no/model"])
    with pytest.raises(ConfigError, match="--suite: is missing"):
        evaluate.main(["--output_path", str(tmp_path / "out")])


def test_kinds_of_files_are_told_by_their_content(tmp_path: Path) -> None:
    texts = {"a.txt": "text", "b.jsonl": '{"question": "q"}', "c.jsonl": '{"instruction": "{\\"schema\\": []}"}',
             "d.json": '[{"题目": "q"}]'}  # fmt: skip
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    kinds = [named_suite(str(tmp_path / name))[0] for name in texts]
    assert kinds == ["perplexity", "open", "extraction", "auto"]
    assert named_suite(f"open:{tmp_path / 'a.txt'}") == ("open", tmp_path / "a.txt")
    with pytest.raises(DataError, match="holds no question"):
        evaluate.main(["--suite", f"open:{_empty(tmp_path)}", "--output_path", str(tmp_path / "out")])


def _empty(folder: Path) -> Path:
    (folder / "empty.jsonl").write_bytes(b"")
    return folder / "empty.jsonl"


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "rect", "path"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_asks_nobody_and_what_is_foreign_stays_text() -> None:
    bad = '<script src="https://example.org/x.js"></script>'
    worst = [{"key": bad, "question": bad, "expected": "`A` | B", "got": bad}] * 25
    measures = [{"group": group, "name": bad, "n": 4, "values": {"accuracy": [0.5, 0.2, 0.8], "unparsed": 1}}
                for group in ("total", "subject", "subject")]  # fmt: skip
    suite = {"name": bad, "kind": "choice", "settings": {"path": bad}, "notes": {bad: 1, "cut": 2}}
    report = build_report(
        {"model": bad, "template": "auto", "thinking": "auto"}, [{**suite, "measures": measures, "worst": worst}]
    )
    assert len(report["suites"][0]["worst"]) == 20 and report["suites"][0]["n_worse"] == 25
    text = page(report)
    tags = Tags()
    tags.feed(text)
    assert tags.open == [] and {"svg", "table", "details"} <= {tag for tag, _ in tags.seen}
    assert "script" not in {tag for tag, _ in tags.seen}
    assert not [attrs for _, attrs in tags.seen if {"src", "href"} & set(attrs)] and "url(" not in text
    assert ("meta", {"name": "viewport", "content": "width=device-width,initial-scale=1"}) in tags.seen
    assert 'class="bars"' in text and "<text" not in text, "what a plot says does not shrink with it on a phone"
    assert text.count('class="one"') == 1 and text.count("<small>") == 20
    assert 'class="zh" lang="zh">按学科<' in text and 'class="en">By subject<' in text
    assert text.count("the tokenizer's own") + text.count("the tokenizer&#x27;s own") == 1
    assert 'class="en">2 answers were cut at' in text and 'class="zh" lang="zh">2 个回答在' in text
    assert "<script" not in re.sub(r"\\<", "", markdown(report))


@pytest.fixture
def lm_eval_config(tmp_path: Path):
    base = save_tiny_llama(tmp_path / "base")
    config = _lm_eval.LmEvalConfig()
    config.lm_eval.tasks, config.model.model_path, config.model.device = "arc_easy,boolq", str(base), "cpu"
    return config


def test_the_harness_is_told_what_it_has_to_know(lm_eval_config: Any) -> None:
    config, base = lm_eval_config, lm_eval_config.model.model_path
    config.model.bits, config.lm_eval.limit, config.lm_eval.num_fewshot = 4, 10, 0
    words = _lm_eval.command_of(config)
    assert words[1:] == [
        "-m", "lm_eval", "--model", "hf", "--tasks", "arc_easy,boolq", "--model_args",
        f"pretrained={base},add_bos_token=True,load_in_4bit=True", "--batch_size", "8", "--device", "cpu",
        "--num_fewshot", "0", "--limit", "10",
    ]  # fmt: skip
    config.lm_eval.base_url, config.lm_eval.served_model = "http://127.0.0.1:8000/v1", "mine"
    arguments = _lm_eval.command_of(config)[8]
    assert arguments == (
        f"base_url=http://127.0.0.1:8000/v1/completions,tokenizer={base},model=mine,tokenizer_backend=huggingface,"
        "add_bos_token=True"
    )
    with pytest.raises(ConfigError, match="--served_model: and --base_url go together"):
        evaluate.main(["lm-eval", "--tasks", "boolq", "--base_url", "http://127.0.0.1:8000/v1"])


def test_a_journal_of_another_program_is_left_alone(words: list[str], tmp_path: Path) -> None:
    with Journal(tmp_path / "out", {"verb": "think"}) as journal:
        journal.add(JournalEntry("1"))
    with pytest.raises(ConfigError, match="begun with other settings"):
        evaluate.main([*words, "--output_path", str(tmp_path / "out")])


def test_after_a_refusal_the_same_folder_takes_the_right_options(words: list[str], tmp_path: Path) -> None:
    typed = [*words[2:4], *words[6:], "--output_path", str(tmp_path / "out")]
    with pytest.raises(ConfigError, match="--window: 100000 tokens are more than the 512"):
        evaluate.main([*typed, "--window", "100000"])
    evaluate.main([*typed, "--window", "8"])
    assert json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["suites"]


def test_a_place_that_cannot_take_a_report_is_named_before_a_model_is_loaded(tmp_path: Path) -> None:
    text = tmp_path / "texts.txt"
    text.write_text("The quick brown fox.\n", encoding="utf-8")
    for place, message in ((text, "is a file; give a folder"), (tmp_path, "holds other files")):
        with pytest.raises(ConfigError, match=f"--output_path: .*{message}"):
            evaluate.main(["--suite", str(text), "--output_path", str(place), "--model_path", "no/model"])
