"""A loss that is not finite is laid at the door of who made it: the base, some records, or the adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from onecard.objectives import next_token
from onecard.recipes import finetune
from onecard.train.step import NotFinite
from onecard.train.trackers import read_log
from tests import tiny
from tests.runs import final_checkpoint


def base_with_nan(tiny_base: Path, target: Path, name: str, row: int | None = None) -> Path:
    """The tiny base with NaN in one tensor, or in one row of it."""
    shutil.copytree(tiny_base, target)
    weights = load_file(target / "model.safetensors")
    weights[name][slice(None) if row is None else row] = torch.nan
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize("total_batch", [8, 1])
def test_a_base_of_nan_is_not_blamed_on_the_records(
    total_batch: int, tiny_base: Path, instructions: Path, tmp_path: Path
) -> None:
    base = base_with_nan(tiny_base, tmp_path / "base", NORM)
    with pytest.raises(
        NotFinite, match=rf"the loss is nan.*\nIt is not the data.*--model_path.*{NORM}.*again"
    ) as raised:
        finetune(tiny.config_for(base, instructions, tmp_path / "run", total_batch=total_batch))
    assert "instructions.json:" not in str(raised.value)


def test_only_the_record_that_the_base_cannot_compute_is_named(tiny_base: Path, tmp_path: Path) -> None:
    """The others of its step, and the base, are said to be sound."""
    token = AutoTokenizer.from_pretrained(tiny_base)("法", add_special_tokens=False).input_ids[-1]
    base = base_with_nan(tiny_base, tmp_path / "base", "model.embed_tokens.weight", token)
    rows = [{"instruction": f"say {i}", "output": str(i)} for i in range(24)]
    rows[13]["instruction"] = "法"
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    with pytest.raises(NotFinite, match=r"cannot compute these records of the step:\n  .*data\.jsonl:14\nIts tensors "
                       r"model\.embed_tokens\.weight hold NaN") as raised:  # fmt: skip
        finetune(tiny.config_for(base, data, tmp_path / "run", total_batch=24))
    assert str(raised.value).count("data.jsonl:") == 1


def test_an_adapter_that_diverges_is_told_from_both(
    tiny_base: Path, instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = next_token.summed_loss

    def diverged(model: Any, batch: Any, **settings: Any) -> Any:
        loss, n_supervised = real(model, batch, **settings)
        return (loss * torch.nan if torch.is_grad_enabled() else loss), n_supervised

    monkeypatch.setattr(next_token, "summed_loss", diverged)
    with pytest.raises(NotFinite, match=r"alone gives a finite loss for each record.*: lower --learning_rate"):
        finetune(tiny.config_for(tiny_base, instructions, tmp_path / "run"))


def test_an_evaluation_of_nan_is_never_the_best(
    tiny_base: Path, instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Nothing is smaller than NaN: taken once for the best, it would stay."""
    real, losses = next_token.summed_loss, iter([torch.nan, 1.0, 1.0])

    def first_is_nan(model: Any, batch: Any, **settings: Any) -> Any:
        loss, n_supervised = real(model, batch, **settings)
        return (loss if torch.is_grad_enabled() else loss * next(losses)), n_supervised

    monkeypatch.setattr(next_token, "summed_loss", first_is_nan)
    options = {"test_size": 4, "eval_steps": 1, "total_batch": 7, "final_weights": "best"}
    run = finetune(tiny.config_for(tiny_base, instructions, tmp_path / "run", **options))
    best = [row["best_step"] for row in read_log(run) if "eval_loss" in row]
    assert best[0] is None and best[1:] in ([2, 3], [2, 2])
    assert "step 1: the evaluation loss is nan, so this step is not taken for the best" in capsys.readouterr().err
    state = json.loads((final_checkpoint(run) / "trainer_state.json").read_text())
    assert state["best_loss"] > 0
