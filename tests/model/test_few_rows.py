"""Linear layers for few rows give what nn.Linear gives, in the places of those of a model."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from onecard.model import few_rows
from onecard.model.few_rows import FewRowsLinear, quicken_few_rows


@pytest.mark.parametrize("has_bias", [False, True])
def test_any_number_of_rows_in_any_shape(has_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    plain, n_products, product = nn.Linear(24, 40, bias=has_bias), [], torch.mm
    monkeypatch.setattr(few_rows.torch, "mm", lambda *sides: n_products.append(1) or product(*sides))
    layer = FewRowsLinear(plain)
    for shape in ((24,), (1, 1, 24), (2, 24), (1, 5, 24), (4, 2, 24), (1, 9, 24), (0, 24)):
        x = torch.randn(shape)
        got = layer(x)
        assert got.is_contiguous() and got.shape == (*shape[:-1], 40)
        torch.testing.assert_close(got, plain(x), rtol=1e-5, atol=1e-6)
    assert len(n_products) == 3, "2, 5 and 8 rows are multiplied the other way round"


def test_the_layers_of_a_model_take_its_weights_and_leave_adapters(tiny_base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False)).eval()
    ids, weights = torch.tensor([[5, 6, 7, 8]]), {id(weight) for weight in tuned.parameters()}
    with torch.inference_mode():
        before = tuned(input_ids=ids).logits
        n_layers = len(model.model.layers)
        assert quicken_few_rows(tuned) == 7 * n_layers + 1 and quicken_few_rows(tuned) == 0
        torch.testing.assert_close(tuned(input_ids=ids).logits, before, rtol=1e-4, atol=1e-5)
    assert {id(weight) for weight in tuned.parameters()} == weights
    kinds = {name: type(module) for name, module in tuned.named_modules()}
    assert {kind for name, kind in kinds.items() if "lora_A.default" in name} == {nn.Linear}
    assert quicken_few_rows(model.to(torch.bfloat16)) == 0
