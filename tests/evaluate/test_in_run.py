"""--eval_suites: a run measures base and result as `onecard evaluate` does, once, and `ship` reads what it found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from onecard.config.base_model import ModelOptions
from onecard.config.evaluation import EvaluateOptions
from onecard.errors import ConfigError, Stopped
from onecard.evaluate import open_answers
from onecard.evaluate.report import ANSWERS_FILE, REPORT_FILE
from onecard.evaluate.ship import judge_run, own_reports
from onecard.programs.evaluate import EvaluateConfig, evaluate
from onecard.recipes import finetune
from onecard.train.findings import AFTER, BEFORE
from tests import tiny
from tests.runs import assert_same_end, run_and_stop

MAX_STEPS = 4


@pytest.fixture
def suites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Twelve open questions and a text; answers are short, so that the tests are."""
    rows = [{"instruction": f"Count to {i}", "input": "", "output": " ".join(map(str, range(i)))} for i in range(1, 13)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "prose.txt").write_text("The quick brown fox.\n\n中国的首都是北京。\n", encoding="utf-8")
    real = open_answers.OpenTask.__init__

    def short(task: Any, *arguments: Any, **named: Any) -> None:
        real(task, *arguments, **named | {"max_new_tokens": 8})

    monkeypatch.setattr(open_answers.OpenTask, "__init__", short)
    return [f"open:{tmp_path / 'questions.jsonl'}", f"perplexity:{tmp_path / 'prose.txt'}"]


def config_of(base: Path, tmp_path: Path, name: str, suites: list[str], **changes: Any) -> Any:
    data = tiny.write_instructions(tmp_path / "data.json")
    options = {
        "test_size": 4,
        "num_epoch": 9,
        "max_steps": MAX_STEPS,
        "eval_suites": ",".join(suites),
        "measure_forgetting": False,
    }
    return tiny.config_for(base, data, tmp_path / name, **options | changes)


def answers(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / ANSWERS_FILE).read_text(encoding="utf-8").splitlines()]
    for row in rows:  # the last digits depend on what lies in a batch
        row.update({name: pytest.approx(value, rel=1e-3) for name, value in row.items() if isinstance(value, float)})
    return rows


@pytest.mark.slow
def test_a_run_measures_base_and_result_as_the_program_does(
    tiny_base: Path, tmp_path: Path, suites: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = finetune(config_of(tiny_base, tmp_path, "run", suites))
    said = capsys.readouterr().out
    for suite in ("open/questions.jsonl: f1", "perplexity/prose.txt: nats_per_character"):
        line = next(line for line in said.splitlines() if line.startswith(suite))
        assert " before, " in line and "95 % interval" in line
    model = ModelOptions(model_path=str(tiny_base), bits=32, device="cpu")
    for folder, lora_path in ((BEFORE, None), (AFTER, str(run))):
        options = EvaluateOptions(suites, str(tmp_path / folder.name), lora_path, prompt_type="alpaca", prompt="chat")
        evaluate(EvaluateConfig(options, model))
        assert answers(run / folder) == answers(tmp_path / folder.name)
        assert (run / folder / REPORT_FILE).is_file()
    assert answers(run / BEFORE) != answers(run / AFTER)
    capsys.readouterr()
    assert own_reports(run, None) == (run / BEFORE, run / AFTER)
    verdict = judge_run(run, most_forgetting=0.1, level=0.99)
    reasons = [*verdict.better, *verdict.worse, *verdict.open]
    assert (
        any(reason.startswith("perplexity/prose.txt: nats_per_character") for reason in reasons) and not verdict.missing
    )

    without = finetune(config_of(tiny_base, tmp_path, "without", []))
    assert_same_end(run, without)
    assert own_reports(without, None) is None and own_reports(run, without) is None
    assert own_reports(run, run) == (run / AFTER, run / AFTER)


@pytest.mark.slow
def test_what_is_measured_is_not_measured_again(
    tiny_base: Path, tmp_path: Path, suites: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = open_answers.OpenTask.work, []

    def work(task: Any, bundle: Any, items: Any) -> Any:
        if len(asked) == interrupted:
            asked.append([])
            raise KeyboardInterrupt
        asked.append([item.key for item in items])
        return real(task, bundle, items)

    monkeypatch.setattr(open_answers.OpenTask, "work", work)
    config = config_of(tiny_base, tmp_path, "run", suites)
    interrupted = 1
    with pytest.raises(Stopped):
        finetune(config)
    interrupted = -1
    run_and_stop(config, monkeypatch, after_steps=2)
    assert [len(keys) for keys in asked] == [8, 0, 4]
    before = (tmp_path / "run" / BEFORE / ANSWERS_FILE).read_bytes()
    run = finetune(config)
    assert [len(keys) for keys in asked] == [8, 0, 4, 8, 4]
    finetune(config)  # a run that has ended measures nothing
    assert len(asked) == 5
    finetune(config_of(tiny_base, tmp_path, "run", suites, max_steps=MAX_STEPS + 1))
    assert [len(keys) for keys in asked[5:]] == [8, 4], "other weights"
    assert (run / BEFORE / ANSWERS_FILE).read_bytes() == before


def test_a_suite_that_is_not_there_is_named_before_anything_is_loaded(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--eval_suites: there is no file or folder .*nothing"):
        finetune(config_of(tiny_base, tmp_path, "run", [f"ceval:{tmp_path / 'nothing'}"]))
    assert not (tmp_path / "run").exists()
