"""Quantised layers train on true gradients, whatever was evaluated before."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from onecard.config.lora import LoraOptions
from onecard.console import _is_worth_saying, quiet_libraries, run_main
from onecard.errors import ConfigError
from onecard.model.chunked_loss import summed_loss
from onecard.model.lora.adapter import add_lora
from onecard.model.model_layers import linear_layers
from onecard.model.quantised_loading import quantization_config
from onecard.model.quantization import (
    dequantize_4bit,
    keep_one_arithmetic_on_cpu,
    n_elements,
    optimizer_class,
    weight_bits,
)
from tests.model.model_families import small_batch


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    summed_loss(model.train(), small_batch())[0].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def adapted(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(3)
    model = add_lora(model, LoraOptions(lora_r=4))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.05)
    return model


def weights_as_computed(layer: torch.nn.Module) -> torch.Tensor:
    if weight_bits(layer) == 4:
        return dequantize_4bit(layer.weight)
    return layer.weight.data.float() * layer.weight.SCB[:, None] / 127


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", ["llama", "phi", "gpt2"])
def test_gradients_are_those_of_the_dequantised_model(family, bits, load_family) -> None:
    """Reference: the same numbers as plain fp32 matrices, differentiated by PyTorch alone."""
    quantised = load_family(family, bits).model
    plain = load_family(family, 32).model
    replaced = 0
    with torch.no_grad():
        for name, layer in linear_layers(quantised).items():
            weight = weights_as_computed(layer)
            plain.get_submodule(name).weight.copy_(weight.T if family == "gpt2" else weight)
            replaced += 1
    assert replaced == {"llama": 14, "phi": 12, "gpt2": 8}[family]
    ours, reference = gradients(adapted(quantised)), gradients(adapted(plain))
    assert ours.keys() == reference.keys() and len(ours) == 2 * replaced
    for name, gradient in ours.items():
        assert (gradient - reference[name]).norm() <= 1e-4 * reference[name].norm(), name


@pytest.mark.parametrize("bits", [4, 8])
def test_evaluating_in_between_changes_nothing(bits, load_family) -> None:
    """bitsandbytes repacks 4-bit weights in eval mode on some CPUs, and then loses gradients; see quantization.py."""
    model = adapted(load_family("llama", bits).model)
    before = gradients(model)
    with torch.no_grad():
        evaluated = summed_loss(model.eval(), small_batch())[0]
        trained = summed_loss(model.train(), small_batch())[0]
    after = gradients(model)
    assert len(before) == 28 and all(torch.equal(after[name], gradient) for name, gradient in before.items())
    assert torch.equal(evaluated, trained)


def test_layers_are_set_to_train_mode_whatever_the_cpu_does(load_family) -> None:
    model = load_family("llama", 4).model.eval()
    layers = linear_layers(model).values()
    assert len(layers) == 14 and not any(layer.training for layer in layers)
    model(torch.tensor([[3, 4]]))
    assert all(layer.training for layer in layers) and not model.training
    plain = torch.nn.Sequential(torch.nn.Linear(4, 4)).eval()
    keep_one_arithmetic_on_cpu(plain)
    plain(torch.zeros(1, 4))
    assert not plain[0].training


def test_int8_says_nothing_about_casts(family_directory, caplog) -> None:
    """A base straight from transformers, since ours does not even meet the sentence on a CPU."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        family_directory("llama"), quantization_config=quantization_config(8, torch.float32), device_map={"": "cpu"}
    )
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    logger.removeFilter(_is_worth_saying)  # another test may have begun it
    with caplog.at_level(logging.WARNING):
        model(torch.tensor([[3, 4]]))
        assert caplog.text.count("inputs will be cast") == 14  # so there is something to keep quiet
        caplog.clear()
        assert run_main(lambda: model(torch.tensor([[3, 4]]))) == 0
        quiet_libraries()
        model(torch.tensor([[3, 4]]))
        logger.warning("another sentence")
        assert [record.message for record in caplog.records] == ["another sentence"]
    assert logger.filters.count(_is_worth_saying) == 1


@pytest.mark.slow  # a process of its own
def test_importing_everything_says_nothing() -> None:
    """On a CPU with AVX512-BF16 bitsandbytes would; elsewhere this holds anyway."""
    script = (
        "import sys; from onecard.console import run_main\n"
        "def main():\n    import onecard.model.lora.adapter\n"
        "assert run_main(main) == 0 and 'bitsandbytes' in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_int8_training_on_cpu_is_quiet_by_itself(load_family, caplog) -> None:
    model = adapted(load_family("llama", 8).model)
    with caplog.at_level(logging.WARNING):
        gradients(model)
        model.eval()(torch.tensor([[3, 4]]))
    assert caplog.records == []


@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_numbers_of_weights(bits, load_family) -> None:
    layer = load_family("llama", bits).model.model.layers[0].mlp.up_proj
    assert n_elements(layer.weight) == 64 * 128 and weight_bits(layer) == bits


def test_nf4_with_double_quantisation() -> None:
    config = quantization_config(4, torch.float16)
    assert config is not None and config.bnb_4bit_quant_type == "nf4" and config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype == torch.float16
    assert quantization_config(16, torch.float16) is None and quantization_config(32, torch.float32) is None


def test_dequantised_4_bit_weights_are_near() -> None:
    import bitsandbytes

    torch.manual_seed(0)
    weight = torch.randn(64, 128)
    parameter = bitsandbytes.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4").to("cpu")
    error = (dequantize_4bit(parameter) - weight).norm() / weight.norm()
    assert 0.05 < error < 0.15  # NF4 on normal numbers: about 9 %


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_optimizers_step(name) -> None:
    parameter = torch.nn.Parameter(torch.ones(64, 64))
    optimizer = optimizer_class(name)([parameter], lr=0.1)
    parameter.grad = torch.ones(64, 64)
    optimizer.step()
    assert torch.allclose(parameter, torch.tensor(0.9), atol=0.02)


def test_unknown_optimizer() -> None:
    with pytest.raises(ConfigError, match="--optimizer"):
        optimizer_class("adam_9bit")
