"""Loss is the one that training measures; exact match counts what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from onecard.config.base_model import ModelOptions
from onecard.errors import DataError
from onecard.inference.batch import evaluate as scoring
from onecard.inference.batch.evaluate import mean_loss, read_cases, score
from onecard.inference.generate import Generation
from onecard.inference.load import load_bundle


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("score") / "known.jsonl"
    rows = [{"instruction": f"Count to {n}", "output": " ".join(map(str, range(n)))} for n in range(1, 8)]
    said = [("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "See you")]
    rows.append({"messages": [{"role": role, "content": text} for role, text in said]})
    rows += [{"text": "a document has no answer"}, {"instruction": "long", "output": "fox " * 600}]
    rows += [{"prompt": "Hi", "completion": "Go away", "label": False}]  # no reference
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_loss_is_the_mean_over_all_answer_tokens(bundle, data, monkeypatch) -> None:
    monkeypatch.setattr(scoring, "MICRO_TOKENS", 200)  # several micro-batches, of different weight
    cases = read_cases(str(data), bundle)
    assert len(cases) == 8
    assert cases[-1].reference == "See you"
    total, n_tokens = 0.0, 0
    for case in cases:  # transformers' own loss, a sample at a time
        labels = torch.tensor([case.sample.labels])
        n = int((labels != -100).sum())
        total += float(bundle.model(torch.tensor([case.sample.input_ids]), labels=labels).loss.detach()) * n
        n_tokens += n
    assert mean_loss(bundle, [case.sample for case in cases]) == pytest.approx(total / n_tokens, rel=1e-5)


def test_the_question_is_asked_with_its_history_and_room_for_the_answer(bundle, data) -> None:
    cases = read_cases(str(data), bundle)
    for case in cases:
        n_prompt = len(case.row.ids)
        assert case.sample.input_ids[:n_prompt] == case.row.ids
        n_answer = len(case.sample.input_ids) - n_prompt
        assert case.row.max_new_tokens == 2 * n_answer + 16


def test_exact_match_counts_answers_in_their_order(bundle, data, monkeypatch) -> None:
    cases = read_cases(str(data), bundle)
    right = {case.row.number for case in cases[::2]}

    def knowing(bundle, rows, sampling):
        assert sampling.temperature == 0
        texts = [f" {cases[row.number].reference}\n" if row.number in right else "wrong" for row in rows]
        return [Generation(text, "stop", 1, 1) for text in texts]

    monkeypatch.setattr(scoring, "answer_safely", knowing)
    result = score(bundle, cases, batch_size=3)
    assert result.exact_match == 0.5
    assert [answer.strip() == case.reference for answer, case in zip(result.answers, cases, strict=True)] == [
        True, False,
    ] * 4  # fmt: skip


def test_switched_off_the_adapter_scores_as_the_base(run_dir, lively_base, data) -> None:
    with_adapter, _ = load_bundle(ModelOptions(model_path="auto", bits=32, device="cpu"), str(run_dir), "alpaca")
    base, _ = load_bundle(ModelOptions(model_path=str(lively_base), bits=32, device="cpu"), None, "alpaca")
    cases = read_cases(str(data), base)
    expected = score(base, cases, batch_size=8)
    with with_adapter.model.disable_adapter():
        assert score(with_adapter, cases, batch_size=8) == expected
    assert score(with_adapter, cases, batch_size=8).loss != pytest.approx(expected.loss, rel=1e-3)


def test_a_file_without_answers_is_an_error(bundle, tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("only text\n", encoding="utf-8")
    with pytest.raises(DataError, match="no question with an answer"):
        read_cases(str(path), bundle)


def test_the_tool_scores_before_and_after(run_dir, data, monkeypatch, capsys) -> None:
    from onecard.programs import score as tool

    command = ["score.py", "--data_path", str(data), "--lora_path", str(run_dir), "--device", "cpu"]
    monkeypatch.setattr("sys.argv", [*command, "--json", "--examples", "2", "--limit", "4"])
    tool.main()
    result = json.loads(capsys.readouterr().out)
    assert result["n_questions"] == 4
    assert result["before"]["loss"] != result["after"]["loss"]
    assert [set(example) for example in result["examples"]] == [{"question", "expected", "before", "after"}] * 2
    monkeypatch.setattr("sys.argv", [*command, "--with_base", "false"])
    tool.main()
    said = capsys.readouterr().out
    assert "8 questions of known.jsonl" in said
    assert "before" not in said
