"""--kl_anchor: its gradient by a formula of its own, texts that nothing else is measured on, and runs with it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from onecard.config.lora import LoraOptions
from onecard.config.problems import problems_of
from onecard.model import divergence
from onecard.model.divergence import kl_from_base, kl_loss
from onecard.model.lora.adapter import add_lora
from onecard.objectives.preference import adapter_off
from onecard.recipes import finetune
from onecard.train import build
from onecard.train.anchor import TEXTS_PER_STEP, Anchor
from onecard.train.forgetting import ANCHORING, MEASURED, forgetting_texts
from onecard.train.trackers import read_log
from tests import tiny
from tests.model.model_families import save_family
from tests.runs import assert_same_end, run_and_stop
from tests.train.test_forgetting import CPU, ROWS, tuned

TEXTS = [*ROWS, [1, 9, 9, 30], [1, 60, 61, 62, 63, 64]]


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def by_formula(model: Any) -> float:
    """The divergence row by row, all logits at once; leaves its gradients in the model."""
    total = torch.zeros(())
    for row in ROWS:
        ids = torch.tensor([row])
        with torch.no_grad(), model.disable_adapter():
            p = model(input_ids=ids).logits[0, :-1].softmax(-1)
        q = model(input_ids=ids).logits[0, :-1].softmax(-1)
        total = total + (p * (p / q).log()).sum()
    total.backward()
    return float(total)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])  # gemma2: a capped head
@pytest.mark.parametrize("knows_head", [True, False])
def test_gradient_is_that_of_the_formula(
    family: str, knows_head: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tuned(save_family(family, tmp_path / family)).eval()
    by_formula(model)
    expected = gradients(model)
    model.zero_grad()
    if not knows_head:
        monkeypatch.setattr(divergence, "states_and_head", lambda *_: None)
    total, n_tokens = kl_loss(model, ROWS, CPU, adapter_off, chunk_tokens=3)
    total.backward()
    assert n_tokens == 13
    assert float(total.detach()) == pytest.approx(kl_from_base(model, ROWS, CPU, adapter_off)[0], rel=1e-4)
    found = gradients(model)
    assert found.keys() == expected.keys() and max(each.abs().max() for each in expected.values()) > 0.1
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4)


def anchored(model: Any, step: int = 0, n_processes: int = 1) -> dict[str, torch.Tensor]:
    """The gradients that the anchor alone adds in a step, in one of several processes."""
    engine = SimpleNamespace(
        gathering=lambda is_last: torch.enable_grad(), backward=lambda loss, is_last: loss.backward()
    )
    accelerator = SimpleNamespace(device=CPU, num_processes=n_processes, autocast=torch.enable_grad)
    run: Any = SimpleNamespace(
        model=model, engine=engine, accelerator=accelerator, offload=None, state=SimpleNamespace(step=step),
        options=SimpleNamespace(seed=1),
    )  # fmt: skip
    model.zero_grad()
    Anchor(TEXTS, 0.5).add_gradients(run)
    return gradients(model)


def test_an_anchor_has_no_dropout_and_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    base = tiny.save_tiny_llama(tmp_path / "base")
    options = LoraOptions(lora_r=4, lora_dropout=0.5)
    model: Any = add_lora(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), options).train()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    first, again, other, half = anchored(model), anchored(model), anchored(model, step=1), anchored(model, 0, 2)
    assert tiny.same_tensors(first, again) and not tiny.same_tensors(first, other)
    assert tiny.same_tensors(first, {name: 2 * each for name, each in half.items()})
    assert all(module.training for module in model.modules())
    assert any(isinstance(module, nn.Dropout) for module in model.modules())


def test_texts_that_anchor_are_not_those_that_are_measured() -> None:
    anchoring, measured = forgetting_texts(ANCHORING), forgetting_texts(MEASURED)
    assert not set(anchoring) & set(measured) and set(anchoring) | set(measured) == set(forgetting_texts())
    assert len(anchoring) > 90 and len(measured) > 90 and TEXTS_PER_STEP > 1


def test_an_anchored_run_forgets_less_and_goes_on_bitwise(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "affordable_rows", lambda *_, **__: TEXTS)
    data = tiny.write_instructions(tmp_path / "data.json")
    common = {"test_size": 4, "num_epoch": 2, "lora_dropout": 0.1, "compare_with_base": False}
    config = {**common, "kl_anchor": 1.0}
    finetune(tiny.config_for(tiny_base, data, tmp_path / "whole", **config))
    stopped = tiny.config_for(tiny_base, data, tmp_path / "stopped", **config)
    run_and_stop(stopped, monkeypatch, after_steps=3)
    finetune(stopped)
    assert_same_end(tmp_path / "whole", tmp_path / "stopped")
    finetune(tiny.config_for(tiny_base, data, tmp_path / "without", **common))
    said = [row["kl_anchor"] for row in read_log(tmp_path / "whole") if "kl_anchor" in row]
    assert len(said) == 6 and said[0] == 0 < min(said[1:])
    assert not any("kl_anchor" in row for row in read_log(tmp_path / "without"))
    kl = [[row["forgetting"] for row in read_log(tmp_path / name) if "forgetting" in row][-1]
          for name in ("whole", "without")]  # fmt: skip
    assert 0 < kl[0] < 0.8 * kl[1]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"kl_anchor": -1.0}, "-1.0 is too little"),
        ({"peft_method": "full"}, "does not go with --peft_method full, which changes the base itself"),
        ({"lora_init": "pissa"}, "does not go with --lora_init pissa, which moves a part of the base"),
        ({"deepspeed": "ds.json"}, "does not go with --deepspeed"),
    ],
)
def test_where_there_is_no_base_the_anchor_is_refused(changes: dict[str, Any], text: str, tmp_path: Path) -> None:
    config = tiny.config_for(tmp_path, tmp_path, tmp_path / "run", **{"kl_anchor": 0.1, **changes})
    assert [problem for problem in problems_of(config) if problem[0] == "--kl_anchor" and text in problem[1]]
