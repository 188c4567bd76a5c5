"""Every family at every precision: load, attach, one step, save, and plain PEFT gives the same logits."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from onecard.config.lora import LoraOptions
from onecard.model.chunked_loss import summed_loss
from onecard.model.lora.adapter import add_lora, describe_trainable, save_adapter
from onecard.model.model_layers import linear_layers
from onecard.model.quantised_loading import quantization_config
from onecard.model.quantization import keep_one_arithmetic_on_cpu, quantized_linear_types, weight_bits
from tests.model.model_families import FAMILIES, N_FAMILIES, small_batch

BITS = (4, 8, 16, 32)
DTYPE = {4: torch.float32, 8: torch.float32, 16: torch.bfloat16, 32: torch.float32}  # on CPU


def plain_peft(directory: Path, adapter: Path, bits: int) -> torch.nn.Module:
    """The same adapter through transformers and peft alone."""
    arguments = {"dtype": DTYPE[bits], "device_map": {"": "cpu"}}
    if bits < 16:
        arguments["quantization_config"] = quantization_config(bits, DTYPE[bits])
    base = transformers.AutoModelForCausalLM.from_pretrained(directory, **arguments)
    # A base straight from transformers computes quantised layers otherwise in eval mode on some CPUs; see there.
    keep_one_arithmetic_on_cpu(base)
    return peft.PeftModel.from_pretrained(base, adapter).eval()


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    batch = small_batch()
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()


def test_all_families_are_here() -> None:
    assert len(FAMILIES) == N_FAMILIES


def every_family_at_two_precisions() -> list[Any]:
    """All cases; those are fast in which each family meets two of the precisions and each precision half of them."""
    cases = product(enumerate(FAMILIES), enumerate(BITS))
    return [
        pytest.param(family, bits, marks=[] if (number + place) % 2 == 0 else pytest.mark.slow)
        for (number, family), (place, bits) in cases
    ]


@pytest.mark.parametrize(("family", "bits"), every_family_at_two_precisions())
def test_family_trains_saves_and_reopens(family, bits, load_family, family_directory, tmp_path) -> None:
    base = load_family(family, bits)
    linear = linear_layers(base.model)
    model = add_lora(base.model, LoraOptions(lora_r=4))

    # What is quantised, and what stays as it was loaded.
    assert base.dtype == DTYPE[bits]
    assert linear and {weight_bits(layer) for layer in linear.values()} == {bits}
    if bits < 16:
        assert all(isinstance(layer, quantized_linear_types()) for layer in linear.values())
    inner = model.get_base_model()
    assert inner.get_input_embeddings().weight.dtype == DTYPE[bits]
    assert inner.get_output_embeddings().weight.dtype == DTYPE[bits]
    assert not isinstance(inner.get_output_embeddings(), quantized_linear_types())
    assert not hasattr(inner.get_output_embeddings(), "lora_A") and not hasattr(inner.get_input_embeddings(), "lora_A")
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name
        assert not parameter.requires_grad or parameter.dtype == torch.float32, name
    adapted = {
        name.split(".lora_A")[0].removeprefix("base_model.model.")
        for name, _ in model.named_parameters()
        if ".lora_A" in name
    }
    assert adapted == set(linear)  # all linear layers, the head not
    assert f"on {len(linear)} layers" in describe_trainable(model)

    # One step with recomputed layers and a frozen embedding lowers the loss.
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    batch = small_batch()
    before, n_supervised = summed_loss(model, batch)
    assert n_supervised == 9 + 7 + 5 and before.dtype == torch.float32
    (before / n_supervised).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    optimizer.step()
    after, _ = summed_loss(model, batch)
    assert after.item() < before.item()

    # Plain PEFT on the untouched base says the same.
    model.eval()
    save_adapter(model, tmp_path)
    here, there = logits_of(model), logits_of(plain_peft(family_directory(family), tmp_path, bits))
    assert torch.equal(here, there)
    with torch.no_grad(), model.disable_adapter():
        assert not torch.equal(here, logits_of(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_equal_with_and_without_recomputing(family, load_family) -> None:
    gradients = []
    for recompute in (True, False):
        torch.manual_seed(0)
        model = add_lora(load_family(family, gradient_checkpointing=recompute).model, LoraOptions(lora_r=4))
        recomputes = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
        assert bool(recomputes) == recompute
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_B" in name:
                    parameter.normal_(0, 0.1)
        summed_loss(model.train(), small_batch())[0].backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 0
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
        assert gradient.abs().sum() > 0, name
