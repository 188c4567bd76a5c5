from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import accelerate
import peft
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from torch.nn.functional import cross_entropy

import onecard.model.chunked_loss
from onecard.config.lora import LoraOptions
from onecard.errors import ModelError
from onecard.model.chunked_loss import CAPPED_BYTES_PER_LOGIT, CHUNK_BYTES_PER_LOGIT, summed_loss
from onecard.model.lora.adapter import add_lora
from onecard.model.output_head import takes_positions
from tests.covering import every_pair_fast
from tests.live_memory import peak_bytes
from tests.model.model_families import FAMILIES, save_family, small_batch


def reference(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    # In double precision: in fp32 the sum of 21 losses is itself up to 6e-7 of a token off.
    return cross_entropy(logits[:, :-1].flatten(0, 1).double(), batch["labels"][:, 1:].flatten(), reduction="sum")


def adapted(model: torch.nn.Module) -> torch.nn.Module:
    return shaken(add_lora(model, LoraOptions(lora_r=4)).train())


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in trained(model):
            parameter.normal_(0, 0.05)
    return model


def trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def assert_same(
    model: torch.nn.Module, loss: torch.Tensor, expected: torch.Tensor, n_tokens: int, bar: float = 1e-6
) -> None:
    assert abs(loss.item() - expected.item()) / n_tokens < bar
    parameters = trained(model)
    pairs = list(
        zip(
            torch.autograd.grad(loss, parameters),
            torch.autograd.grad(expected, parameters, retain_graph=True),
            strict=True,
        )
    )
    assert pairs and any(gradient.any() for _, gradient in pairs)
    assert all(torch.allclose(ours, theirs, atol=1e-5, rtol=1e-5) for ours, theirs in pairs)


def test_weights_multiply_the_loss_of_each_token(load_family) -> None:
    for family in ("llama", "gemma2"):
        model = adapted(load_family(family).model)
        batch = small_batch()
        weights = torch.linspace(0.25, 3.0, batch["labels"].numel()).reshape(batch["labels"].shape)
        labels = batch["labels"][:, 1:]
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        losses = cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
        expected = (losses * weights[:, 1:].flatten()).sum()
        n_units = weights[:, 1:][labels != -100].double().sum().item()
        for chunk_tokens in (0, 1, 5, 100):
            loss, n_found = summed_loss(model, {**batch, "loss_weights": weights}, chunk_tokens=chunk_tokens)
            assert n_found == pytest.approx(n_units, rel=1e-12)
            assert_same(model, loss, expected, n_units)
            with torch.no_grad():
                evaluated, _ = summed_loss(model, {**batch, "loss_weights": weights}, chunk_tokens=chunk_tokens)
            assert evaluated.item() == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_plain_cross_entropy_and_its_gradients(family, load_family) -> None:
    model = adapted(load_family(family).model)
    assert takes_positions(model)
    batch = small_batch()
    expected = reference(model, batch)
    loss, n_supervised = summed_loss(model, batch)
    assert n_supervised == int((batch["labels"][:, 1:] != -100).sum()) == 21
    assert_same(model, loss, expected, n_supervised)
    for chunk_tokens in (1, 3, 7, 100):
        loss, n_supervised = summed_loss(model, batch, chunk_tokens=chunk_tokens)
        assert n_supervised == 21
        assert_same(model, loss, expected, n_supervised)
        with torch.no_grad():
            assert summed_loss(model, batch, chunk_tokens=chunk_tokens)[0].item() == loss.item()
        with torch.inference_mode():
            assert summed_loss(model, batch, chunk_tokens=chunk_tokens)[0].item() == loss.item()


@pytest.mark.parametrize("family", FAMILIES)
def test_pads_on_the_right_need_no_mask(family, load_family) -> None:
    """The reference has the mask. Rows are longer than the sliding window of 32, and up to half of one is padding."""
    model = adapted(load_family(family).model)
    batch = small_batch(rows=12, length=44)
    assert batch["attention_mask"].sum(dim=1).tolist() == list(range(44, 20, -2))
    loss, n_supervised = summed_loss(model, batch)
    assert_same(model, loss, reference(model, batch), n_supervised, bar=1e-5)
    flipped = {name: tensor.flip(1) for name, tensor in batch.items()}  # on the left, which never happens, they would
    unmasked = summed_loss(model, flipped)[0].item()
    assert abs(unmasked - reference(model, flipped).item()) > 0.02


def test_gpt2_does_not_ask_for_a_mask(load_family, caplog, monkeypatch) -> None:
    transformers.utils.logging.warning_once.cache_clear()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model = load_family("gpt2").model
    with caplog.at_level(logging.WARNING):
        summed_loss(model, small_batch())
        assert not caplog.records
    logging.getLogger("transformers.modeling_utils").warning("another sentence")
    assert "another sentence" in caplog.text


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_chunks_at_every_precision(bits, load_family) -> None:
    model = adapted(load_family("llama", bits).model)
    batch, tolerance = small_batch(), 2e-2 if bits == 16 else 1e-5  # bf16 has 8 bits

    def backward(chunk_tokens: int) -> tuple[float, list[torch.Tensor]]:
        model.zero_grad()
        loss, n_supervised = summed_loss(model, batch, chunk_tokens=chunk_tokens)
        loss.backward()  # autograd.grad does not look into reentrant checkpoints, which 8 bits have
        return loss.item() / n_supervised, [parameter.grad.clone() for parameter in trained(model)]

    (loss, gradients), (expected_loss, expected) = backward(4), backward(0)
    assert abs(loss - expected_loss) < tolerance
    pairs = zip(gradients, expected, strict=True)
    distances = [((ours - theirs).norm() / theirs.norm()).item() for ours, theirs in pairs]
    assert len(distances) == 28 and max(distances) < tolerance


def lora_on_head(model: torch.nn.Module) -> torch.nn.Module:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    return shaken(peft.get_peft_model(model, config))


def saved_head(model: torch.nn.Module) -> torch.nn.Module:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    return shaken(peft.get_peft_model(model, config))


def plain_head(model: torch.nn.Module) -> torch.nn.Module:
    model.get_output_embeddings().weight.requires_grad_(True)
    return model.train()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", [lora_on_head, saved_head, plain_head])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_trained_heads(family, kind, tied, load_family, tmp_path) -> None:
    directory = save_family(family, tmp_path, tie_word_embeddings=tied)
    model = kind(load_family(family, model_path=str(directory)).model).train()
    head = model.get_output_embeddings()
    assert any(parameter.requires_grad for parameter in head.parameters())
    batch = small_batch()
    for chunk_tokens in (3, 100):
        loss, n_supervised = summed_loss(model, batch, chunk_tokens=chunk_tokens)
        assert_same(model, loss, reference(model, batch), n_supervised)


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
    summed_loss(model, batch, chunk_tokens=8)
    assert [shape.numel() // 128 for shape in seen] == [1, 8, 8, 5]  # the model's own one token, then 21
    seen.clear()
    batch["labels"][:, :9] = -100  # 12 tokens, the last three of row 0 are learned: positions 8, 9, 10
    _, n_supervised = summed_loss(model, batch)
    assert n_supervised == 4  # row 0: three, row 1 (10 long): one
    assert seen == [torch.Size([3, 3, 128])]


@pytest.mark.parametrize("chunk_tokens", [0, 4])
@pytest.mark.parametrize("length", [5, 1])
def test_nothing_to_learn_is_zero_loss_and_zero_gradient(length, chunk_tokens, load_family) -> None:
    model = lora_on_head(load_family("llama").model).train()
    ids = torch.full((1, length), 5)
    loss, n_supervised = summed_loss(
        model, {"input_ids": ids, "labels": torch.full_like(ids, -100)}, chunk_tokens=chunk_tokens
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


def test_unknown_tail_is_not_chunked_and_said_once(load_family, capsys, monkeypatch) -> None:
    """A tail that nothing in its config.json tells of: here Cohere's, hidden from us."""
    model = load_family("cohere").model
    batch = small_batch()
    expected = summed_loss(model, batch)[0].item()
    monkeypatch.delattr(model.config, "logit_scale")  # the model keeps its own copy
    for _ in range(2):
        assert summed_loss(model, batch, chunk_tokens=4)[0].item() == expected
    full = _Full(model)  # a model without a head that can be found
    assert summed_loss(full, batch, chunk_tokens=4)[0].item() == pytest.approx(expected)
    said = capsys.readouterr().err
    assert said.count("CohereForCausalLM") == said.count("_Full") == 1


@pytest.mark.parametrize(
    ("family", "dtype", "learn"),
    every_pair_fast(["llama", "gemma2", "cohere"], [torch.float32, torch.bfloat16], [True, False]),
)
def test_bytes_per_logit(family, dtype, learn, load_family, tmp_path) -> None:
    vocab, bits = 20_000, 32 if dtype == torch.float32 else 16
    directory = save_family(family, tmp_path, vocab_size=vocab)
    model = adapted(load_family(family, model_path=str(directory)).model.to(dtype))
    batch = small_batch(rows=2, length=64)

    def peak(chunk_tokens: int) -> int:
        def step() -> None:
            with torch.autocast("cpu", dtype, bits == 16), torch.set_grad_enabled(learn):
                loss = summed_loss(model, batch, chunk_tokens=chunk_tokens)[0]
            if learn:
                loss.backward()

        step()
        return peak_bytes(step)

    expected = (CAPPED_BYTES_PER_LOGIT if family == "gemma2" else CHUNK_BYTES_PER_LOGIT)[bits]
    small = peak(16)
    assert (peak(32) - small) / (16 * vocab) == pytest.approx(expected, rel=0.01)
    assert small < peak(0) / 3  # 120 tokens


def test_fp16_keeps_small_gradients(load_family, monkeypatch) -> None:
    """A model sure of its answers: without SCALE, the gradient's numbers drown in fp16's smallest, 6e-8."""
    base = load_family("llama").model
    torch.manual_seed(0)  # loading draws numbers the first time only
    model = adapted(base)
    batch = small_batch(rows=12, length=60)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(16)
        sure, best = torch.softmax(model(input_ids=batch["input_ids"]).logits[:, :-1].double(), -1).max(-1)
        keep = (1 - sure < 1e-6) & (1 - sure > 1e-8) & (batch["labels"][:, 1:] != -100)
        batch["labels"][:, 1:] = torch.where(keep, best, -100)
    assert keep.sum() > 5
    model.get_base_model().half()
    for parameter in trained(model):
        parameter.data = parameter.data.float()

    def gradients(chunk_tokens: int) -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.float16):
            loss = summed_loss(model, batch, chunk_tokens=chunk_tokens)[0]
        # The scaler's factor, more than fp16 can hold.
        return [g.double() / 2**24 for g in torch.autograd.grad(loss * 2.0**24, trained(model))]

    def error() -> float:
        pairs = zip(gradients(4), gradients(0), strict=True)
        return max(((ours - theirs).norm() / theirs.norm()).item() for ours, theirs in pairs)

    assert error() < 0.005
    monkeypatch.setattr(onecard.model.chunked_loss, "SCALE", 1.0)
    assert error() > 0.03  # so there was something to lose


@pytest.mark.parametrize("head_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_evaluation_in_16_bits_outside_of_autocast(base_dtype, head_dtype, load_family) -> None:
    """accelerate puts autocast into the model's forward only, so the head may meet an input of another dtype here."""
    model = adapted(load_family("llama").model).eval()
    model.get_base_model().to(base_dtype)
    model.get_output_embeddings().to(head_dtype)
    AcceleratorState._reset_state(True)  # accelerate has one number format per process; other tests have others
    wrapped = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model, evaluation_mode=True)
    AcceleratorState._reset_state(True)
    with torch.no_grad():
        expected, n_supervised = summed_loss(wrapped, small_batch())
        loss, _ = summed_loss(wrapped, small_batch(), chunk_tokens=4)
    assert abs(loss.item() - expected.item()) / n_supervised < 5e-3
    loss, _ = summed_loss(wrapped.train(), small_batch(), chunk_tokens=4)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, trained(wrapped)))


DDP = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.model.model_families import small_batch
from onecard.config.base_model import ModelOptions
from onecard.config.lora import LoraOptions
from onecard.model.lora.adapter import add_lora
from onecard.model.hardware import detect
from onecard.model.load import load_base
from onecard.model.chunked_loss import summed_loss
from onecard.model.output_head import takes_positions
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
model.get_output_embeddings().weight.requires_grad_(True)  # a trained head, outside of the model's own forward
single = torch.autograd.grad(summed_loss(model.train(), batch)[0], [p for p in model.parameters() if p.requires_grad])
wrapped = torch.nn.parallel.DistributedDataParallel(model)
assert takes_positions(wrapped)
rows = [0, 1] if rank == 0 else [2]
for chunk_tokens in (0, 4):
    model.zero_grad()
    loss, n = summed_loss(wrapped, {k: v[rows] for k, v in batch.items()}, chunk_tokens=chunk_tokens)
    loss.backward()
    shared = [p.grad * 2 for p in model.parameters() if p.requires_grad]  # DDP averages over two processes
    assert all(torch.allclose(a, b, atol=1e-5, rtol=1e-5) for a, b in zip(single, shared, strict=True))
    model.zero_grad()
    some = {k: v[:1].clone() for k, v in batch.items()}
    if rank == 1:
        some["labels"].fill_(-100)
    loss, n = summed_loss(wrapped, some, chunk_tokens=chunk_tokens)
    loss.backward()  # rank 1 has nothing to learn and must not leave rank 0 waiting
    assert (n > 0) == (rank == 0)
    assert sum(p.grad.abs().sum() for p in model.parameters() if p.requires_grad) > 0
print("same", len(shared))
"""


@pytest.mark.slow
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
    assert all("same 29" in output for output in outputs), outputs
