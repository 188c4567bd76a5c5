"""Activation offload, embeddings in RAM and tiled feed-forward blocks with real streams and pinned memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from onecard.config.base_model import ModelOptions
from onecard.config.lora import LoraOptions
from onecard.model.chunked_loss import summed_loss
from onecard.model.hardware import detect
from onecard.model.load import load_base
from onecard.model.lora.adapter import add_lora
from onecard.model.memory_saving.activation_offload import ActivationOffload
from onecard.model.memory_saving.embeddings_in_ram import embeddings_to_ram
from onecard.model.memory_saving.tiled_mlp import tile_mlps
from tests.model.model_families import VOCAB, save_family
from tests.simcard import is_simulated

pytestmark = pytest.mark.gpu

LAYERS, TOKENS = 12, 2048
LENGTH = 256 if is_simulated() else TOKENS  # where gradients are computed, which a simulated card does on the CPU


@pytest.fixture
def model(tmp_path: Path) -> torch.nn.Module:
    base = save_family(
        "llama", tmp_path, num_hidden_layers=LAYERS, intermediate_size=1024, max_position_embeddings=TOKENS
    )
    loaded = load_base(ModelOptions(model_path=str(base), bits=4, dtype="fp16"), detect("cuda")).model
    return add_lora(loaded, LoraOptions(lora_r=4)).train()


def batch(length: int = LENGTH) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCAB, (4, length), generator=torch.Generator().manual_seed(length)).cuda()
    labels = ids.clone()
    labels[:, :-8] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def gradients(model: torch.nn.Module, length: int = LENGTH) -> list[torch.Tensor]:
    model.zero_grad()
    with torch.autocast("cuda", torch.float16):
        loss, _ = summed_loss(model, batch(length))
    loss.backward()
    return [loss.detach().float(), *[p.grad.clone() for p in model.parameters() if p.requires_grad]]


def peak_of(model: torch.nn.Module, length: int = LENGTH) -> int:
    gradients(model, length)  # libraries take their workspaces
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    gradients(model, length)
    return torch.cuda.max_memory_allocated()


def close(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    # Attention's backward adds up in another order each time, and tiles round their sums to fp16 one by one.
    pairs = list(zip(one, other, strict=True))
    return len(pairs) > 1 and all(torch.allclose(a, b, rtol=2e-2, atol=1e-2 * float(b.abs().max())) for a, b in pairs)


def test_offload_changes_no_gradient_at_any_length(model: torch.nn.Module) -> None:
    offload = ActivationOffload(model, "cuda", 1, chunk_bytes=1 << 20)
    for length in (LENGTH, 100, LENGTH // 3, LENGTH, 100):
        expected = gradients(model, length)
        with offload:
            got = gradients(model, length)
        assert close(got, expected) and offload.n_packed > LAYERS
        assert all(chunk.is_pinned() for chunk in offload._pool.all)
    assert offload.host_bytes == offload.peak_host_bytes > 0


def test_what_comes_back_is_bitwise_what_was_saved() -> None:
    offload = ActivationOffload(torch.nn.Linear(1, 1), "cuda", 1, chunk_bytes=1 << 20)
    x = torch.randn(3_000_001, device="cuda", requires_grad=True)
    with offload:
        hidden = [x * 1.0]
        for _ in range(20):  # each factor is saved, and the memory of those that left is used again meanwhile
            hidden.append(hidden[-1] * hidden[-1].detach().cos())
        total = hidden[-1].sum()
        del hidden
        total.backward()
        got, x.grad = x.grad, None
    value = x * 1.0
    for _ in range(20):
        value = value * value.detach().cos()
    value.sum().backward()
    assert torch.equal(got, x.grad) and offload.n_packed >= 20


@pytest.mark.shapes_only
def test_layer_inputs_leave_the_card(model: torch.nn.Module) -> None:
    before = peak_of(model, TOKENS)
    one_input = 4 * TOKENS * 64 * 2
    peaks = {}
    for ahead in (True, False):
        offload = ActivationOffload(model, "cuda", one_input, ahead=ahead)
        with offload:
            peaks[ahead] = peak_of(model, TOKENS)
    assert before - peaks[True] > (LAYERS - 4) * one_input
    assert peaks[False] <= peaks[True] <= peaks[False] + 2 * one_input


def test_out_of_memory_inside_the_block_gives_everything_back(model: torch.nn.Module) -> None:
    offload = ActivationOffload(model, "cuda", 1, chunk_bytes=1 << 20)
    expected = gradients(model)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError), offload:
            summed_loss(model, batch())
            torch.empty(1 << 50, device="cuda")
        assert len(offload._pool.free) == len(offload._pool.all) > 0
        with offload:
            assert close(gradients(model), expected)


def test_embeddings_in_ram_free_their_bytes(model: torch.nn.Module) -> None:
    expected = gradients(model)
    weight = model.get_input_embeddings().weight
    before = torch.cuda.memory_allocated()
    freed = embeddings_to_ram(model, "cuda")
    assert freed == weight.numel() * weight.element_size()
    assert before - torch.cuda.memory_allocated() >= freed
    assert embeddings_to_ram(model, "cuda") == 0
    assert model.get_input_embeddings().weight.device.type == "cpu"
    assert close(gradients(model), expected)


def test_tiles_lower_the_peak_and_keep_the_gradients(model: torch.nn.Module) -> None:
    expected, before = gradients(model), peak_of(model)
    assert tile_mlps(model, 512) == LAYERS
    assert close(gradients(model), expected)
    assert peak_of(model) < before
