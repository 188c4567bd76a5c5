from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from onecard.config import LoraOptions
from onecard.console import ModelError
from onecard.model.adapters import add_lora
from onecard.model.loss import summed_loss, takes_positions
from tests.model.model_families import FAMILIES, small_batch


def reference(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten(), reduction="sum")


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_plain_cross_entropy_and_its_gradients(family, load_family) -> None:
    model = add_lora(load_family(family).model, LoraOptions(lora_r=4)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert takes_positions(model)
    with torch.no_grad():
        for parameter in trained:
            parameter.normal_(0, 0.05)
    batch = small_batch()
    loss, n_supervised = summed_loss(model, batch)
    expected = reference(model, batch)
    assert n_supervised == int((batch["labels"][:, 1:] != -100).sum()) == 21
    assert abs(loss.item() - expected.item()) / n_supervised < 1e-6
    for ours, theirs in zip(torch.autograd.grad(loss, trained), torch.autograd.grad(expected, trained), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5, rtol=1e-5)


def test_the_sum_does_not_depend_on_how_a_step_is_cut(load_family) -> None:
    model = load_family("llama").model
    batch = small_batch()
    whole, n_whole = summed_loss(model, batch)
    parts = [summed_loss(model, {key: value[row : row + 1] for key, value in batch.items()}) for row in range(3)]
    assert len(parts) == 3 and sum(n for _, n in parts) == n_whole
    assert abs(sum(loss.item() for loss, _ in parts) - whole.item()) / n_whole < 1e-6


def test_only_supervised_positions_get_logits(load_family) -> None:
    model = load_family("llama").model
    seen: list[torch.Size] = []
    model.get_output_embeddings().register_forward_hook(lambda m, i, output: seen.append(output.shape))
    batch = small_batch()
    batch["labels"][:, :9] = -100  # 12 tokens, the last three of row 0 are learned: positions 8, 9, 10
    _, n_supervised = summed_loss(model, batch)
    assert n_supervised == 4  # row 0: three, row 1 (10 long): one
    assert seen == [torch.Size([3, 3, 128])]


@pytest.mark.parametrize("length", [5, 1])
def test_nothing_to_learn_is_zero_loss_and_zero_gradient(length, load_family) -> None:
    model = add_lora(load_family("llama").model, LoraOptions(lora_r=4)).train()
    ids = torch.full((1, length), 5)
    loss, n_supervised = summed_loss(
        model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.full_like(ids, -100)}
    )
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert n_supervised == 0 and loss.item() == 0.0 and gradients
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_bf16_logits_are_summed_in_fp32(load_family) -> None:
    model = load_family("llama", 16).model
    batch = small_batch()
    loss, _ = summed_loss(model, batch)
    assert loss.dtype == torch.float32
    assert abs(loss.item() - reference(model, batch).item()) < 1e-3


class _Full(torch.nn.Module):
    """A model whose forward knows nothing of positions, as custom code may not."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, input_ids, attention_mask, use_cache):
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


class _Last(_Full):
    """A model that takes a number only and answers a list of positions with everything."""

    def forward(self, input_ids, attention_mask, use_cache, logits_to_keep=0):
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


def test_model_without_positions_falls_back_to_all_logits(load_family) -> None:
    model = load_family("gemma2").model
    full = _Full(model)
    assert not takes_positions(full)
    batch = small_batch()
    assert torch.allclose(summed_loss(full, batch)[0], summed_loss(model, batch)[0])
    with pytest.raises(ModelError, match="12 positions"):
        summed_loss(_Last(model), batch)


DDP = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.model.model_families import small_batch
from onecard.config import LoraOptions, ModelOptions
from onecard.model.adapters import add_lora
from onecard.model.hardware import detect
from onecard.model.load import load_base
from onecard.model.loss import summed_loss, takes_positions
import torch.distributed as dist
torch.set_num_threads(1)
rank = int(sys.argv[4])
dist.init_process_group("gloo", init_method="file://" + sys.argv[5], rank=rank, world_size=2)
torch.manual_seed(0)
model = add_lora(load_base(ModelOptions(model_path=sys.argv[3], bits=32), detect("cpu")).model, LoraOptions(lora_r=4))
with torch.no_grad():
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.normal_(0, 0.05)
batch = small_batch()
single = torch.autograd.grad(summed_loss(model.train(), batch)[0], [p for p in model.parameters() if p.requires_grad])
wrapped = torch.nn.parallel.DistributedDataParallel(model)
assert takes_positions(wrapped)
rows = [0, 1] if rank == 0 else [2]
loss, n = summed_loss(wrapped, {k: v[rows] for k, v in batch.items()})
loss.backward()
shared = [p.grad * 2 for p in model.parameters() if p.requires_grad]  # DDP averages over two processes
assert all(torch.allclose(a, b, atol=1e-5, rtol=1e-5) for a, b in zip(single, shared, strict=True))
model.zero_grad()
batch = {k: v[:1] for k, v in batch.items()}
if rank == 1:
    batch["labels"] = torch.full_like(batch["labels"], -100)
loss, n = summed_loss(wrapped, batch)
loss.backward()  # rank 1 has nothing to learn and must not leave rank 0 waiting
assert (n > 0) == (rank == 0)
total = sum(p.grad.abs().sum() for p in model.parameters() if p.requires_grad)
assert total > 0
print("same", len(shared))
"""


def test_gradient_hooks_of_ddp_fire(family_directory, tmp_path) -> None:
    root = Path(__file__).resolve().parents[2]
    script = tmp_path / "two_processes.py"
    script.write_text(DDP, encoding="utf-8")
    rendezvous = (tmp_path / "rendezvous").as_posix()
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                str(script),
                str(root),
                str(Path(__file__).parent),
                str(family_directory("llama")),
                str(rank),
                rendezvous,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert all("same 28" in output for output in outputs), outputs
