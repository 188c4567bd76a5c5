"""A quantised head: near the original, trained through, tied or not, and nobody ties it again."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from onecard.config.lora import LoraOptions
from onecard.errors import ConfigError, ModelError
from onecard.model.chunked_loss import summed_loss
from onecard.model.lora.adapter import add_lora, load_adapter, save_adapter
from onecard.model.memory_saving.lm_head import quantize_head
from onecard.model.memory_saving.tiled_head import dequantise_in_tiles
from onecard.model.quantization import (
    compute_as_on_a_card,
    quantize_linear,
    quantized_linear_types,
    stored_bytes,
    weight_bits,
)
from tests.covering import every_pair_fast
from tests.model.model_families import FAMILIES, VOCAB, save_family, small_batch

# Relative error of NF4 and of int8 on normal numbers, and the bytes of 128 x 64 weights with their constants: NF4 keeps
# one byte per 64 weights, one fp32 number per 256 of those, two tables and an offset; int8 one fp32 number per row.
ERROR = {4: (0.05, 0.15), 8: (0.001, 0.02)}
BYTES = {4: VOCAB * 64 // 2 + VOCAB + 4 + 4 * (16 + 256) + 4, 8: VOCAB * 64 + 4 * VOCAB}


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(small_batch()["input_ids"]).logits


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize(("family", "tied", "bits"), every_pair_fast(FAMILIES, [False, True], [4, 8]))
def test_trains_through_a_quantised_head(family, tied, bits, load_family, tmp_path) -> None:
    directory = save_family(family, tmp_path / "base", tie_word_embeddings=tied)
    base = load_family(family, 4, model_path=str(directory)).model
    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    assert (head.weight is embeddings.weight) == tied
    embedded, before = embeddings.weight.clone(), logits_of(base)
    saved = quantize_head(base, bits, torch.float32)
    after = logits_of(base)
    low, high = ERROR[bits]
    assert weight_bits(base.get_output_embeddings()) == bits and low < distance(after, before) < high
    assert base.get_input_embeddings() is embeddings and torch.equal(embeddings.weight, embedded)
    assert saved == (0 if tied else embeddings.weight.nbytes) - BYTES[bits]
    base.tie_weights()
    assert torch.equal(logits_of(base), after)
    assert quantize_head(base, bits, torch.float32) == 0  # it is done already

    model = add_lora(base, LoraOptions(lora_r=4)).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.normal_(0, 0.05)
    expected, _ = summed_loss(model, small_batch())
    loss, n_supervised = summed_loss(model, small_batch(), chunk_tokens=4)
    assert abs(loss.item() - expected.item()) / n_supervised < 1e-5
    pairs = list(zip(torch.autograd.grad(loss, trained), torch.autograd.grad(expected, trained), strict=True))
    assert pairs and all(theirs.any() and torch.allclose(ours, theirs, atol=1e-5) for ours, theirs in pairs)


@pytest.mark.parametrize("tied", [False, True])
def test_adapters_of_a_quantised_head_fit_the_plain_base(tied, load_family, tmp_path) -> None:
    directory = str(save_family("llama", tmp_path / "base", tie_word_embeddings=tied))
    base = load_family("llama", model_path=directory).model
    quantize_head(base, 4, torch.float32)
    model = add_lora(base, LoraOptions(lora_r=4))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.05)
    save_adapter(model, tmp_path / "adapter")
    plain = load_family("llama", model_path=directory).model
    opened = load_adapter(plain, tmp_path / "adapter", trainable=False).model.eval()
    assert distance(logits_of(opened), logits_of(model.eval())) < 0.15
    assert weight_bits(opened.get_output_embeddings()) == 32


@pytest.mark.parametrize("bits", [4, 8])
def test_gradient_of_the_input_is_that_of_the_dequantised_layer(bits) -> None:
    layer = torch.nn.Linear(64, 96)
    copy = quantize_linear(layer, bits, torch.float32)
    assert not any(parameter.requires_grad for parameter in copy.parameters())
    assert copy.weight.device == layer.weight.device and layer.weight.dtype == torch.float32
    x = torch.randn(5, 64, requires_grad=True)
    weights = (copy.eval()(torch.eye(64)) - layer.bias).T.detach()  # the hook keeps training's arithmetic in eval mode
    assert distance(weights, layer.weight) < ERROR[bits][1]
    assert torch.allclose(copy(x), x @ weights.T + layer.bias, atol=1e-5)
    direction = torch.randn(5, 96)
    (gradient,) = torch.autograd.grad(copy(x), x, direction)
    assert torch.allclose(gradient, direction @ weights, atol=1e-5)
    assert stored_bytes(copy) < stored_bytes(layer) / (5 if bits == 4 else 3)


def test_refusals(load_family) -> None:
    model = load_family("llama").model
    model.get_output_embeddings().requires_grad_(True)
    with pytest.raises(ConfigError, match=r"--head_bits.*trained"):
        quantize_head(model, 4, torch.float32)
    model.requires_grad_(False)
    quantize_head(model, 8, torch.float32)
    with pytest.raises(ConfigError, match=r"--head_bits.*8 bits already"):
        quantize_head(model, 4, torch.float32)
    with pytest.raises(ModelError, match="no output head"):
        quantize_head(model.model, 4, torch.float32)


class LargestDense(TorchDispatchMode):
    """Counts the elements of the largest floating-point result of any operation."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(each, torch.Tensor) and each.is_floating_point():
                self.elements = max(self.elements, each.numel())
        return result


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [64, 192, 512])
@pytest.mark.parametrize("as_on_a_card", [False, True])
def test_rows_in_tiles_give_the_whole_layer(bits, width, as_on_a_card) -> None:
    """Widths whose tiles begin at every 256th, 256th and 32nd row; 1,300 rows are no multiple of these."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(width, 1300)
    whole, tiled = (quantize_linear(layer, bits, torch.float32) for _ in range(2))
    dequantise_in_tiles(tiled, tile_bytes=1)
    if as_on_a_card:
        compute_as_on_a_card(torch.nn.ModuleList([whole, tiled]))
    assert weight_bits(tiled) == bits and isinstance(tiled, quantized_linear_types())
    x = torch.randn(2, 3, width, requires_grad=True)
    direction = torch.randn(2, 3, 1300)
    (expected,) = torch.autograd.grad(whole(x), x, direction)
    with LargestDense() as counted:
        output = tiled(x)
        (gradient,) = torch.autograd.grad(output, x, direction)
    assert torch.allclose(output, whole(x), atol=1e-5) and torch.allclose(gradient, expected, atol=1e-4)
    assert counted.elements < 1300 * width, "the whole matrix was dequantised"
    with torch.no_grad():
        assert torch.allclose(tiled(x[:, :1]), whole(x[:, :1]), atol=1e-5)
        assert tiled(x[:0]).shape == (0, 3, 1300)


@pytest.mark.parametrize(("n_tiles", "computed"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (5, [0, 1, 4])])
def test_of_many_tiles_a_plan_computes_three_and_none_twice(n_tiles: int, computed: list[int]) -> None:
    layer = torch.nn.Linear(64, 256 * n_tiles, bias=False)
    whole, tiled = (quantize_linear(layer, 8, torch.float32) for _ in range(2))
    dequantise_in_tiles(tiled, tile_bytes=1, at_most=3)
    x = torch.randn(5, 64, requires_grad=True)
    direction = torch.zeros(5, n_tiles, 256)
    direction[:, computed] = 1
    (expected,) = torch.autograd.grad(whole(x), x, direction.flatten(1))
    (gradient,) = torch.autograd.grad(tiled(x).sum(), x)
    assert torch.allclose(gradient, expected, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_one_tile_gives_the_bits_of_the_whole_layer(bits) -> None:
    layer = torch.nn.Linear(64, 96, bias=False)
    whole, tiled = (quantize_linear(layer, bits, torch.float16) for _ in range(2))
    dequantise_in_tiles(tiled)
    x = torch.randn(5, 64, dtype=torch.float16, requires_grad=True)
    direction = torch.randn(5, 96, dtype=torch.float16)
    (expected,), (gradient,) = (torch.autograd.grad(each(x), x, direction) for each in (whole, tiled))
    assert torch.equal(tiled(x), whole(x)) and torch.equal(gradient, expected)
