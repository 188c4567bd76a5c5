"""Layers that pass through the card, with real streams and pinned memory, beside layers that stay on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from onecard.config.base_model import ModelOptions
from onecard.config.lora import LoraOptions
from onecard.model.chunked_loss import summed_loss
from onecard.model.hardware import detect
from onecard.model.load import load_base
from onecard.model.lora.adapter import add_lora
from onecard.model.memory_saving.activation_offload import ActivationOffload
from onecard.model.memory_saving.streamed_layers import N_SLOTS, stream_layers
from onecard.model.model_layers import decoder_layers
from tests.model.every_family import save_small
from tests.simcard import is_simulated

pytestmark = pytest.mark.gpu

LAYERS = 6
FAMILIES = [("llama", 4), ("qwen3", 8), ("gemma3_text", 4), ("qwen3_moe", 4), ("llama", 16)]


@pytest.fixture(autouse=True)
def repeatable() -> Any:
    """Attention's backward adds up in another order each time unless it is told not to."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def model_of(directory: Path, bits: int, where: str) -> torch.nn.Module:
    options = ModelOptions(model_path=str(directory), bits=bits, dtype="fp32" if bits < 16 else "auto", device="cuda",
                           stream_layers=where)  # type: ignore[arg-type]  # fmt: skip
    base = load_base(options, detect("cuda")).model
    if is_simulated() and is_mixture(base):  # a CPU counts the tokens of each expert in another way
        base.set_experts_implementation("eager")
    torch.manual_seed(0)
    model = add_lora(base, LoraOptions(lora_r=4)).train()
    if where == "on":
        assert all(p.device.type == "cpu" for layer in decoder_layers(model) for p in layer.parameters())
        streamed = stream_layers(model, "cuda")
        assert all(chunk.is_pinned() for chunk in streamed._ram._pool.all)
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    with torch.no_grad():
        for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) / 20)
    return model


def learn(model: torch.nn.Module, n_steps: int, *, offloads: bool = False) -> list[torch.Tensor]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, seen = torch.optim.AdamW(trained, lr=1e-2), []
    offload = ActivationOffload(model, "cuda", 1)
    for step in range(n_steps):
        ids = torch.randint(3, 50, (2, 12), generator=torch.Generator().manual_seed(step)).cuda()
        # Without autocast, in fp32: routers of mixtures turn 16 bits into fp32 in a way that the simulated card lacks.
        with torch.autocast("cuda", torch.float16, enabled=not is_mixture(model)):
            if offloads:
                with offload:
                    loss = backward(model, ids)
            else:
                loss = backward(model, ids)
        seen += [loss.detach().cpu(), *[p.grad.cpu() for p in trained]]  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.inference_mode():
            seen.append(model(input_ids=ids).logits.cpu())
        model.train()
    return [*seen, *[p.detach().cpu() for p in trained]]


def is_mixture(model: torch.nn.Module) -> bool:
    return any("Expert" in type(module).__name__ for module in model.modules())


def backward(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    loss, _ = summed_loss(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()})
    loss.backward()
    return loss


@pytest.mark.parametrize("offloads", [False, True])
@pytest.mark.parametrize(("family", "bits"), FAMILIES)
def test_streamed_layers_are_bitwise_resident_ones(family: str, bits: int, offloads: bool, tmp_path: Path) -> None:
    """With late streams on the simulated card a missing wait shows as NaN."""
    if offloads and (family, bits) != FAMILIES[0]:
        pytest.skip("offload beside streaming is tried once")
    save_small(family, tmp_path, num_hidden_layers=LAYERS)
    n_steps = 3
    runs = [learn(model_of(tmp_path, bits, where), n_steps, offloads=offloads) for where in ("on", "off")]
    assert len(runs[0]) == len(runs[1]) > n_steps and all(bool(t.isfinite().all()) for t in runs[0])
    same = [torch.equal(*pair) for pair in zip(*runs, strict=True)]
    assert all(same) if is_simulated() else sum(same) > len(same) // 2


def test_experts_come_one_by_one_where_few_are_chosen(tmp_path: Path) -> None:
    """Each token chooses 2 of 32; what is not copied holds NaN, with late streams on the simulated card."""
    save_small("qwen3_moe", tmp_path, num_hidden_layers=LAYERS, num_local_experts=32)
    answers = []
    for where in ("on", "off"):
        model = model_of(tmp_path, 4, where).eval()
        with torch.inference_mode():
            answers.append([model(input_ids=torch.tensor([ids], device="cuda")).logits.cpu()
                            for ids in ([5, 6, 7], [8], [9], [*range(3, 45)], [5], [6])])  # fmt: skip
    assert all(bool(logits.isfinite().all()) for logits in answers[0])
    same = [torch.equal(*pair) for pair in zip(*answers, strict=True)]
    assert all(same) if is_simulated() else sum(same) > len(same) // 2


def test_the_card_holds_the_slots_alone(tmp_path: Path) -> None:
    save_small("llama", tmp_path, num_hidden_layers=LAYERS, intermediate_size=4096)
    torch.cuda.synchronize()
    held = {}
    for where in ("off", "on"):
        before = torch.cuda.memory_allocated()
        model = model_of(tmp_path, 4, where)
        held[where] = torch.cuda.memory_allocated() - before
        slot = sum(p.nbytes for p in decoder_layers(model)[0].parameters() if not p.requires_grad)
        del model
    assert held["off"] - held["on"] > (LAYERS - N_SLOTS - 0.5) * slot


def test_the_whole_model_is_never_on_the_card_while_it_loads(tmp_path: Path) -> None:
    save_small("llama", tmp_path, num_hidden_layers=LAYERS, intermediate_size=8192)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = model_of(tmp_path, 4, "on")
    peak = torch.cuda.max_memory_allocated() - before
    layer = sum(p.nbytes for p in decoder_layers(model)[0].parameters() if not p.requires_grad)
    n_rest = sum(p.nbytes for p in model.parameters()) - LAYERS * layer
    # One weight in full before it is quantised (a third of a layer, times eight), and what quantising takes.
    assert peak < n_rest + N_SLOTS * layer + 8 * layer
