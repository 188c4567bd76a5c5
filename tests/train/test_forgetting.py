"""Forgetting: the divergence from the base by a formula of its own, its texts, its cost, and a run that measures it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from onecard.config.lora import LoraOptions
from onecard.model import divergence
from onecard.model.divergence import BaseStates, kl_from_base, kl_of_rounding
from onecard.model.lora.adapter import add_lora
from onecard.objectives.preference import adapter_off
from onecard.recipes import finetune
from onecard.train import build, forgetting, validation
from onecard.train.forgetting import FEWEST_TEXTS, affordable_rows, forgetting_texts, measure_forgetting, noise_floor
from onecard.train.trackers import read_log
from tests import tiny
from tests.model.model_families import save_family
from tests.runs import assert_same_end, run_and_stop

CPU = torch.device("cpu")
ROWS = [[1, 7, 9, 30, 12], [1, 5], [1, 44, 8, 21, 33, 2, 60], [1, 3, 3]]


def tuned(base: Path, seed: int = 3) -> Any:
    """A model with an adapter that has moved, its head included where it has one of its own."""
    model: Any = add_lora(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraOptions(lora_r=4))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tiny_llama(tmp_path_factory.mktemp("forgetting") / "base")


def by_formula(model: Any) -> float:
    """Row by row, all logits at once, in fp64."""
    total = 0.0
    for row in ROWS:
        ids = torch.tensor([row])
        with torch.no_grad():
            q = model(input_ids=ids).logits[0, :-1].double().softmax(-1)
            with model.disable_adapter():
                p = model(input_ids=ids).logits[0, :-1].double().softmax(-1)
        total += float((p * (p / q).log()).sum())
    return total


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])  # gemma2: a capped head
@pytest.mark.parametrize("chunk_tokens", [3, 64])
def test_divergence_is_that_of_the_formula(family: str, chunk_tokens: int, tmp_path: Path) -> None:
    model = tuned(save_family(family, tmp_path / family)).eval()
    total, n_tokens = kl_from_base(model, ROWS, CPU, adapter_off, chunk_tokens=chunk_tokens)
    expected = by_formula(model)
    assert n_tokens == 13 and expected > 1e-3
    assert total == pytest.approx(expected, rel=1e-4)


def test_a_head_that_is_not_known_gives_the_same(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tuned(base).eval()
    expected = kl_from_base(model, ROWS, CPU, adapter_off)[0]
    monkeypatch.setattr(divergence, "states_and_head", lambda *_: None)
    assert kl_from_base(model, ROWS, CPU, adapter_off)[0] == pytest.approx(expected, rel=1e-4)


def test_the_base_is_asked_once_and_its_answer_stays(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, known, asked = tuned(base), BaseStates(), []
    expected = measure_forgetting(model, ROWS, CPU, adapter_off, rows_at_once=2)
    real = divergence.states_and_head
    monkeypatch.setattr(divergence, "states_and_head", lambda *each: (asked.append(1), real(*each))[1])
    assert measure_forgetting(model, ROWS, CPU, adapter_off, known, rows_at_once=2) == expected and len(asked) == 4
    assert measure_forgetting(model, ROWS, CPU, adapter_off, known, rows_at_once=2) == expected and len(asked) == 6
    with torch.no_grad():
        next(each for name, each in model.named_parameters() if "lora_B" in name).mul_(3)
    moved = measure_forgetting(model, ROWS, CPU, adapter_off, known, rows_at_once=2)
    assert moved == measure_forgetting(model, ROWS, CPU, adapter_off, rows_at_once=2) != expected


def test_an_untrained_adapter_has_forgotten_nothing(base: Path) -> None:
    model: Any = add_lora(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraOptions())
    model.train()
    found = measure_forgetting(model, ROWS, CPU, adapter_off)
    assert found is not None and (found.kl, found.n_tokens) == (0.0, 13)
    assert model.training
    floor = noise_floor(model, ROWS, CPU, adapter_off)
    assert floor is not None and abs(floor) < 1e-5  # rounding of fp32 alone
    assert kl_of_rounding(tuned(base).eval(), ROWS, CPU, adapter_off)[0] == pytest.approx(0, abs=1e-4)


def test_memory_that_runs_out_makes_the_batches_smaller(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, real, asked = tuned(base), kl_from_base, []
    expected = measure_forgetting(model, ROWS, CPU, adapter_off)

    def failing(model: Any, rows: Any, *rest: Any) -> Any:
        asked.append(len(rows))
        if len(rows) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, rows, *rest)

    monkeypatch.setattr(forgetting, "kl_from_base", failing)
    most = 1
    found = measure_forgetting(model, ROWS, CPU, adapter_off)
    assert asked == [4, 2, 1, 1, 2, 1, 1]
    assert found is not None and expected is not None and found.kl == pytest.approx(expected.kl, rel=1e-4)
    most = 0
    assert measure_forgetting(model, ROWS, CPU, adapter_off) is None
    monkeypatch.setattr(forgetting, "kl_from_base", lambda *_: [][0])  # a fault that is none of memory
    with pytest.raises(IndexError):
        measure_forgetting(model, ROWS, CPU, adapter_off)


def test_texts_are_of_both_languages_from_the_first_on() -> None:
    texts = forgetting_texts()
    assert len(texts) == len(set(texts)) >= 200
    for part in (texts[:FEWEST_TEXTS], texts):
        chinese = sum(any("一" <= letter <= "鿿" for letter in text) for text in part)
        assert 0.4 <= chinese / len(part) <= 0.6


def test_texts_cost_no_more_than_their_share(base: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    everything = affordable_rows(tokenizer, 10**9, 4)
    assert len(everything) == len(forgetting_texts())
    some = affordable_rows(tokenizer, 200_000, 4)
    assert 0 < len(some) < len(everything) and some == everything[: len(some)]
    passes = sum(map(len, some)) * 4 * 2  # four evaluations, the base and the tuned model
    assert 0.01 < passes / (200_000 * 3) <= 0.02
    assert affordable_rows(tokenizer, 5_000, 4) == []  # fewer than the fewest would say nothing


@pytest.fixture
def affordable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run as short as those of the tests measures forgetting all the same."""
    monkeypatch.setattr(build, "affordable_rows", lambda *_, **__: [ROWS[0]] * 3)


@pytest.mark.usefixtures("affordable")
def test_a_run_that_measures_forgetting_is_the_run_that_does_not(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tiny.write_instructions(tmp_path / "data.json")
    config = {"test_size": 4, "num_epoch": 3, "eval_steps": 2, "lora_dropout": 0.1}
    measured = tiny.config_for(base, data, tmp_path / "measured", **config)
    finetune(measured)
    said = capsys.readouterr().out
    assert "forgetting is measured on 3 texts; rounding alone gives" in said
    assert "nats per token" in said
    found = [row["forgetting"] for row in read_log(tmp_path / "measured") if "eval_loss" in row]
    assert len(found) == 5 and 0 < found[0] < found[-1]
    stopped = tiny.config_for(base, data, tmp_path / "stopped", **config)
    run_and_stop(stopped, monkeypatch, after_steps=4)
    finetune(stopped)
    assert [row["forgetting"] for row in read_log(tmp_path / "stopped") if "eval_loss" in row] == found
    finetune(tiny.config_for(base, data, tmp_path / "silent", measure_forgetting=False, **config))
    assert not any("forgetting" in row for row in read_log(tmp_path / "silent"))
    for other in ("stopped", "silent"):
        assert_same_end(tmp_path / "measured", tmp_path / other)


@pytest.mark.usefixtures("affordable")
def test_memory_that_takes_no_text_ends_the_measuring_and_not_the_run(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(validation, "measure_forgetting", lambda *_: None)
    data = tiny.write_instructions(tmp_path / "data.json")
    finetune(tiny.config_for(base, data, tmp_path / "run", test_size=4, eval_steps=1))
    assert capsys.readouterr().out.count("out of memory: forgetting is not measured") == 1


def test_why_forgetting_is_not_measured_is_said(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tiny.write_instructions(tmp_path / "data.json")
    finetune(tiny.config_for(base, data, tmp_path / "short", test_size=4, max_steps=1))
    assert "forgetting is not measured: it would take more than 2% of so short a run" in capsys.readouterr().out
    finetune(tiny.config_for(base, data, tmp_path / "moved", test_size=4, max_steps=1, lora_init="pissa"))
    assert "forgetting is not measured: pissa moves a part of the base" in capsys.readouterr().out
