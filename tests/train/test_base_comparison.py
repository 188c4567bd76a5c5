"""Before and after: the scores of base and result on the same records, their difference, and what a resume keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from onecard.recipes import finetune
from onecard.train import base_comparison
from onecard.train.base_comparison import FILE_NAME
from tests import tiny
from tests.objectives.test_preference import pair_file
from tests.runs import run_and_stop

OPTIONS: dict[str, Any] = {"test_size": 6, "num_epoch": 4, "eval_steps": 2}


def stored(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / FILE_NAME).read_text(encoding="utf-8"))
    return content


def by_hand(model: Any, samples: list[Any]) -> list[float]:
    """The mean cross-entropy of the learned tokens of each sample."""
    found = []
    for sample in samples:
        ids, labels = torch.tensor([sample.input_ids]), torch.tensor([sample.labels])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[:, :-1]
        found.append(float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())))
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_instructions(tmp_path_factory.mktemp("comparison") / "data.json")


@pytest.mark.parametrize("final_weights", ["last", "best"])
def test_scores_are_those_of_base_and_result(
    final_weights: str, tiny_base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    seen: list[Any] = []
    real = base_comparison.BaseComparison.before
    monkeypatch.setattr(base_comparison.BaseComparison, "before",
                        lambda self: (seen.extend(self.run.test_samples), real(self))[1])  # fmt: skip
    # So high a rate that the last weights are not the best ones.
    rate = 1e-2 if final_weights == "last" else 0.3
    config = tiny.config_for(tiny_base, data, tmp_path / "run", **OPTIONS, final_weights=final_weights,
                             learning_rate=rate)  # fmt: skip
    finetune(config)
    found = stored(tmp_path / "run")
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    assert found["base"] == pytest.approx(by_hand(base, seen), rel=1e-5)
    tuned = PeftModel.from_pretrained(base, str(tmp_path / "run")).eval()
    assert found["tuned"] == pytest.approx(by_hand(tuned, seen), rel=1e-5)
    assert found["records"] == [sample.record for sample in seen]
    assert found["difference"]["value"] == pytest.approx(found["mean_tuned"] - found["mean_base"])
    said = capsys.readouterr().out
    assert f"mean loss {found['mean_base']:.4f} with the base, {found['mean_tuned']:.4f} with the result" in said
    assert f"better in {found['n_better']} of 6 records" in said


def test_a_resumed_run_compares_with_what_its_first_start_scored(
    tiny_base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiny.config_for(tiny_base, data, tmp_path / "whole", **OPTIONS)
    finetune(whole)
    cut = tiny.config_for(tiny_base, data, tmp_path / "cut", **OPTIONS)
    run_and_stop(cut, monkeypatch, after_steps=2)
    assert set(stored(tmp_path / "cut")) == {"records", "base"}
    finetune(cut)
    assert stored(tmp_path / "cut") == stored(tmp_path / "whole")
    (tmp_path / "cut" / FILE_NAME).write_text("{", encoding="utf-8")  # of an older version, or damaged
    finetune(cut)
    assert stored(tmp_path / "cut")["base"] == pytest.approx(stored(tmp_path / "whole")["base"], rel=1e-6)


def test_noise_is_called_noise_and_nothing_is_said_unasked(
    tiny_base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune(tiny.config_for(tiny_base, data, tmp_path / "run", **{**OPTIONS, "num_epoch": 1, "learning_rate": 1e-9}))
    assert "no difference from the base beyond noise" in capsys.readouterr().out
    off = {**OPTIONS, "num_epoch": 1, "compare_with_base": False}
    finetune(tiny.config_for(tiny_base, data, tmp_path / "off", **off))
    assert "held-out records" not in capsys.readouterr().out
    assert not (tmp_path / "off" / FILE_NAME).exists()


def test_a_start_that_moves_the_base_is_scored_as_it_starts(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    short = {**OPTIONS, "num_epoch": 1}
    finetune(tiny.config_for(tiny_base, data, tmp_path / "plain", **short))
    finetune(tiny.config_for(tiny_base, data, tmp_path / "pissa", **short, lora_init="pissa"))
    assert stored(tmp_path / "pissa")["base"] == pytest.approx(stored(tmp_path / "plain")["base"], rel=1e-4)


def test_pairs_are_compared_too(tiny_base: Path, tmp_path: Path) -> None:
    pairs = pair_file(tmp_path / "pairs.jsonl", 16)
    options = {**OPTIONS, "objective": "dpo", "prompt_type": "chatml", "cutoff_len": 96}
    finetune(tiny.config_for(tiny_base, pairs, tmp_path / "run", **options))
    found = stored(tmp_path / "run")
    assert found["base"] == pytest.approx([0.693147] * 6, abs=1e-5)  # against itself
    assert found["difference"]["high"] < 0
