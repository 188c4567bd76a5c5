"""The dial: each scale is the evaluation with that --adapter_scale, planted scores give the right best scale."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from onecard.errors import ConfigError
from onecard.evaluate import sweep
from onecard.evaluate.answer_loss import AnswerLossTask
from onecard.evaluate.compare import read_evaluation
from onecard.inference.batch.evaluate import mean_loss, read_cases
from onecard.programs import evaluate

MODULES = ["q_proj", "down_proj"]


@pytest.fixture(scope="module")
def adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters with random values: lora, and dora, which has no strength."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, is_dora in (("lora", False), ("dora", True)):
        base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
        model = peft.get_peft_model(base, peft.LoraConfig(target_modules=MODULES, r=4, use_dora=is_dora))
        random = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=random)
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    file = tmp_path / "held_out.jsonl"
    rows = [{"instruction": f"Say {k}", "output": f"{k} it is"} for k in range(6)]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


def typed(tiny_base: Path, adapter: Path, held_out: Path, out: Path, *more: str) -> list[str]:
    return ["--suite", f"loss:{held_out}", "--model_path", str(tiny_base), "--lora_path", str(adapter), "--bits", "32",
            "--device", "cpu", "--prompt_type", "alpaca", "--output_path", str(out), *more]  # fmt: skip


def test_the_loss_of_answers_is_that_of_training(bundle: Any, held_out: Path) -> None:
    task = AnswerLossTask(held_out)
    rows = task.work(bundle, task.items[:2]) + task.work(bundle, task.items[2:])
    cases = read_cases(str(held_out), bundle)
    found = task.report(rows)["measures"][0]
    assert found["n"] == 6
    expected = mean_loss(bundle, [case.sample for case in cases])
    assert found["values"]["nats_per_answer_token"] == pytest.approx(expected, abs=2e-6)
    (longest,) = AnswerLossTask(_long(held_out)).items
    assert "problem" in task.work(bundle, [longest])[0]


def _long(beside: Path) -> Path:
    file = beside.with_name("long.json")
    file.write_text(json.dumps([{"instruction": "Say", "output": "word " * 4000}]), encoding="utf-8")
    return file


def test_each_scale_is_an_evaluation_and_a_kill_changes_nothing(
    tiny_base: Path, adapters: Path, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("onecard.train.forgetting.forgetting_texts", lambda *_: ["A text of English.", "一句中文。"])
    line = typed(tiny_base, adapters / "lora", held_out, tmp_path / "whole", "--sweep_scale", "1,0.3")
    evaluate.main(line)
    out = capsys.readouterr().out
    assert "best scale: 0; 0 is the base: no scale is better" in out  # random values teach nothing
    report = json.loads((tmp_path / "whole" / "report.json").read_text(encoding="utf-8"))
    measures = report["suites"][0]["measures"]
    assert [measure["name"] for measure in measures] == ["0", "0.3", "1"]
    kl = [measure["values"]["forgetting"] for measure in measures]
    assert kl[0] == 0 and 0 < kl[1] < kl[2]
    assert measures[0]["values"]["gain"] == [0, 0, 0] and report["settings"]["best_scale"] == "0"
    page = (tmp_path / "whole" / "report.html").read_text(encoding="utf-8")
    assert page.count("<circle") == 3
    HTMLParser().feed(page)

    alone = typed(tiny_base, adapters / "lora", held_out, tmp_path / "alone", "--adapter_scale", "0.3")
    evaluate.main(alone)
    for name in ("answers.jsonl", "journal.jsonl", "report.json"):
        ours = (tmp_path / "whole" / "scale_0.3" / name).read_bytes()
        assert ours == (tmp_path / "alone" / name).read_bytes(), name
    both = [read_evaluation(tmp_path / "whole" / f"scale_{s}")["loss/held_out.jsonl"]["rows"]["1"] for s in ("0", "1")]
    assert both[0]["log_prob"] != both[1]["log_prob"]

    forgetting_at, calls = sweep.forgetting_at, []

    def killed(*arguments: Any) -> Any:
        calls.append(arguments[1])
        if calls == [0.0, 0.3]:
            raise SystemExit("killed")
        return forgetting_at(*arguments)

    monkeypatch.setattr(sweep, "forgetting_at", killed)
    again = typed(tiny_base, adapters / "lora", held_out, tmp_path / "again", "--sweep_scale", "0.3")
    with pytest.raises(SystemExit, match="killed"):
        evaluate.main(again)
    capsys.readouterr()
    evaluate.main([*again[:-1], "0.3,1"])  # more scales may be added, too
    assert capsys.readouterr().out.count("going on behind 6 of 6 records") == 2
    for name in ("report.json", "report.md", "report.html"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--sweep_scale", "0,x"], "--sweep_scale: '0,x' is no list of numbers"),
        (["--sweep_scale", "0.5,11"], "--sweep_scale: 11 is not between 0"),
        (["--sweep_scale", "1", "--adapter_scale", "0.5"], "--adapter_scale: and --sweep_scale contradict"),
        (["--sweep_scale", "1", "--base_url", "http://x/v1", "--judge_model", "j"], "--base_url: does not go with"),
        (["--sweep_scale", "1"], "--sweep_scale: .*dora is an adapter of the method DoRA, which has no strength"),
    ],
)
def test_a_sweep_that_means_nothing_is_refused(
    more: list[str], message: str, tiny_base: Path, adapters: Path, held_out: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate.main(typed(tiny_base, adapters / "dora", held_out, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()
    line = typed(tiny_base, adapters / "dora", held_out, tmp_path / "out", "--sweep_scale", "1")
    del line[4:6]
    with pytest.raises(ConfigError, match="--sweep_scale: needs an adapter"):
        evaluate.main(line)


def planted(means: dict[float, float], spread: float = 0.05, n: int = 40) -> dict[float, list[dict[str, Any]]]:
    """Rows of a suite of losses whose mean per answer is that of the scale."""
    random = torch.Generator().manual_seed(3)
    return {
        scale: [
            {"key": str(k), "tokens": 1, "log_prob": -mean - spread * float(torch.randn((), generator=random))}
            for k in range(n)
        ]
        for scale, mean in means.items()
    }


def test_the_best_scale_of_planted_scores() -> None:
    kl = {0.0: 0.0, 0.5: 0.02, 1.0: 0.1, 1.5: 0.3}
    # 0.5 is as good as 1 but for noise, and forgets less; 1.5 is worse again.
    task = sweep.swept_suite("loss/a", "loss", planted({0.0: 2.0, 0.5: 1.001, 1.0: 1.0, 1.5: 1.4}), 42)
    assert task is not None and task.gains[1.0].value == pytest.approx(1, abs=0.05)
    assert task.kept == {0.5, 1.0} and sweep.best_scale([task], kl) == 0.5
    # Another suite that only the base is best at: no scale is both.
    other = sweep.swept_suite("loss/b", "loss", planted({0.0: 1.0, 0.5: 1.5, 1.0: 2.0, 1.5: 2.0}), 42)
    assert other is not None and other.kept == {0.0} and sweep.best_scale([task, other], kl) is None
    assert "no scale is best" in sweep.sweep_lines([task, other], kl, None)[-1]
    right = {scale: [{"key": str(k), "score": float(k < n)} for k in range(60)] for scale, n in ((0.0, 20), (1.0, 50))}
    choice = sweep.swept_suite("mmlu/test", "choice", right, 42)
    assert choice is not None and choice.gains[1.0].value == 0.5 and choice.kept == {1.0}
    assert sweep.swept_suite("open/x", "open", {0.0: [{"key": "1"}], 1.0: [{"key": "1"}]}, 42) is None
