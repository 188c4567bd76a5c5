from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from onecard.config.base_model import ModelOptions
from onecard.config.lora import LoraOptions
from onecard.errors import ConfigError, ModelError
from onecard.model.chunked_loss import summed_loss
from onecard.model.hardware import Hardware
from onecard.model.load import load_base
from onecard.model.lora.adapter import add_lora
from onecard.model.memory_saving import streamed_layers as module
from onecard.model.memory_saving.streamed_layers import StreamedLayers, stream_layers, tensors_in_turn
from onecard.model.model_layers import decoder_layers
from tests.model.every_family import save_small
from tests.model.model_families import small_batch

FAMILIES = ("llama", "qwen3", "gemma3_text", "qwen3_moe")
Load = Callable[..., nn.Module]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory, cpu: Hardware) -> Load:
    """A base of some layers with adapters that differ from zero, the same at each call."""
    saved: dict[tuple[str, int, int], Path] = {}

    def load(
        family: str, bits: int, n_layers: int = 4, checkpointing: bool = True, n_experts: int = 0, **lora: Any
    ) -> nn.Module:
        place = family, n_layers, n_experts
        if place not in saved:
            sizes = {"num_hidden_layers": n_layers, **({"num_local_experts": n_experts} if n_experts else {})}
            saved[place] = save_small(family, tmp_path_factory.mktemp(family), **sizes)
        options = ModelOptions(model_path=str(saved[place]), bits=bits, gradient_checkpointing=checkpointing)  # type: ignore[arg-type]
        base = load_base(options, cpu).model
        torch.manual_seed(0)
        model = add_lora(base, LoraOptions(**{"lora_r": 4, **lora})).train()
        with torch.no_grad():
            for parameter in trained(model):
                parameter.normal_(0, 0.05)
        return model

    return load


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def batch(step: int) -> dict[str, torch.Tensor]:
    return {name: tensor % 50 for name, tensor in small_batch(rows=2, length=10 + step % 3, seed=step).items()}


def learn(model: nn.Module, n_steps: int) -> list[torch.Tensor]:
    """Losses and gradients of all steps, and the weights after the last one; it evaluates once on the way."""
    optimizer, seen = torch.optim.AdamW(trained(model), lr=1e-2), []
    for step in range(n_steps):
        loss, _ = summed_loss(model, batch(step))
        loss.backward()
        seen += [loss.detach(), *[p.grad.clone() for p in trained(model)]]  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
        if step == n_steps // 2:
            seen += [answer(model)]
    return [*seen, *[p.detach().clone() for p in trained(model)]]


def answer(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.inference_mode():
        logits = model(**{name: batch(0)[name] for name in ("input_ids", "attention_mask")}).logits.clone()
    model.train()
    return logits


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) > 1 and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def streams_bitwise(load: Load, family: str, bits: int, n_steps: int) -> None:
    expected = learn(load(family, bits), n_steps)
    model = load(family, bits)
    streamed = stream_layers(model, "cpu", chunk_bytes=10_000)
    assert same(learn(model, n_steps), expected)
    assert streamed.n_copies > n_steps * 2 * (4 - module.N_SLOTS)


@pytest.mark.parametrize(("family", "bits"), [("llama", 4), ("qwen3", 8), ("gemma3_text", 16), ("qwen3_moe", 4)])
def test_steps_are_bitwise_those_of_resident_layers(family: str, bits: int, load: Load) -> None:
    streams_bitwise(load, family, bits, 2)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8, 16, 32])
@pytest.mark.parametrize("family", FAMILIES)
def test_twenty_steps_are_bitwise_those_of_resident_layers(family: str, bits: int, load: Load) -> None:
    streams_bitwise(load, family, bits, 20)


@pytest.mark.parametrize(("n_layers", "extra"), [(1, {}), (2, {}), (5, {"lora_dropout": 0.2}), (5, {"use_dora": True})])
def test_any_number_of_layers_and_kind_of_adapter(n_layers: int, extra: dict[str, Any], load: Load) -> None:
    runs = []
    for streams in (False, True):
        model = load("llama", 4, n_layers, **extra)
        if streams:
            stream_layers(model, "cpu")
        torch.manual_seed(3)
        runs.append(learn(model, 3))
    assert same(*runs)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_all_weights_of_the_layers_lie_in_the_slots(bits: int, load: Load) -> None:
    model = load("llama", bits, 6)
    frozen = [p for layer in decoder_layers(model) for p in layer.parameters() if not p.requires_grad]
    n_bytes = sum(p.nbytes for p in frozen)
    streamed = stream_layers(model, "cpu", chunk_bytes=4096)
    learn(model, 1)
    places = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in frozen}
    assert list(places.values()) == [streamed.slot_bytes] * module.N_SLOTS
    # In RAM: each layer's weights, the constants of quantisation, and what ends of lines waste.
    assert n_bytes <= streamed.ram_bytes <= 6 * streamed.slot_bytes + 4096


def test_each_layer_travels_once_in_each_direction(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[int] = []
    copy = StreamedLayers._copy
    monkeypatch.setattr(StreamedLayers, "_copy", lambda self, index: (order.append(index), copy(self, index))[1])
    model = load("llama", 32, 5)
    stream_layers(model, "cpu")
    for expected in ([0, 1, 2, 3, 4, 2, 1, 0], [2, 3, 4, 2, 1, 0]):
        order.clear()
        summed_loss(model, batch(0))[0].backward()
        assert order == expected
    even = load("llama", 32, 4)
    stream_layers(even, "cpu")
    order.clear()
    for _ in range(2):  # the first layer of the next token comes while the last one computes
        answer(even)
    assert order == [0, 1, 2, 3, 0, 1, 2, 3, 0]


@pytest.mark.parametrize(
    ("bits", "implementation"), [(4, "eager"), (4, "grouped_mm"), (8, "batched_mm"), (16, "grouped_mm")]
)
def test_of_few_chosen_experts_no_others_are_copied(bits: int, implementation: str, load: Load) -> None:
    """A short text chooses 2 x 3 of 32, a long one nearly all, whose gradients must come right after the short one."""
    models = [load("qwen3_moe", bits, 3, n_experts=32, lora_target_modules="q_proj") for _ in range(2)]
    streamed = stream_layers(models[1], "cpu", chunk_bytes=10_000)
    experts = streamed._experts[0]
    n_rest, n_one = experts.start, sum(n_bytes for _, n_bytes in experts.tensors)
    assert len(streamed._experts) == 3 and len(experts.tensors) == 2 and experts.n == 32
    for model in models:
        model.set_experts_implementation(implementation)  # type: ignore[operator]
    for slot in streamed._slots:
        slot.fill_(255)  # NaN, where an expert is read that was not copied
    seen: list[list[torch.Tensor]] = [[], []]
    copied = []
    for tokens in ([7, 8, 9], [7, 8, 9], [5, 3], list(range(3, 45)), [7, 8, 9]):
        for model, found in zip(models, seen, strict=True):
            model.zero_grad()
            before = streamed.copied_bytes
            ids = torch.tensor([tokens])
            loss, _ = summed_loss(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
            loss.backward()
            found += [loss.detach(), *[p.grad.clone() for p in trained(model)]]  # type: ignore[union-attr]
        copied.append(streamed.copied_bytes - before)
    assert same(*seen)
    # A step copies two of the three layers, and of each layer at most what three tokens choose.
    assert copied[-1] <= 2 * n_rest + 3 * 6 * n_one < streamed.slot_bytes < copied[3]
    assert [*tensors_in_turn(models[1])] and not any(streamed._missing)


def test_layers_come_right_after_an_interruption(load: Load) -> None:
    expected = answer(load("llama", 4, 5))
    model = load("llama", 4, 5)
    stream_layers(model, "cpu")

    def fail(_module: nn.Module, _inputs: object) -> None:
        raise KeyboardInterrupt

    for number in (0, 2, 4):
        handle = decoder_layers(model)[number].register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            answer(model)
        handle.remove()
        assert torch.equal(answer(model), expected)


def test_tensors_are_read_with_their_own_values(load: Load) -> None:
    def read(model: nn.Module) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in tensors_in_turn(model)}

    model = load("llama", 16, 5)
    expected = read(model)
    assert expected.keys() == {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    stream_layers(model, "cpu")
    found = read(model)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_graph_without_recomputed_layers_is_refused(load: Load) -> None:
    model = load("llama", 32, 3, checkpointing=False)
    expected = answer(model)
    stream_layers(model, "cpu")
    assert torch.equal(answer(model), expected)
    with pytest.raises(RuntimeError, match="--gradient_checkpointing on"):
        summed_loss(model, batch(0))


def test_what_cannot_be_streamed_is_refused_by_name(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("llama", 32, 3)
    decoder_layers(model)[1].register_buffer("qweight", torch.zeros(4, dtype=torch.int32))
    with pytest.raises(ConfigError, match="--stream_layers: on does not go with GPTQ weights"):
        stream_layers(model, "cpu")
    model = load("llama", 32, 3)
    model.config.num_hidden_layers = 7  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="the decoder layers of PeftModelForCausalLM cannot be told"):
        stream_layers(model, "cpu")

    def full(*_sizes: object, **_options: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = load("llama", 32, 3)
    monkeypatch.setattr(module, "new_slot", full)
    with pytest.raises(ModelError, match=r"the slots of streamed layers \(2 x 0 MiB\) do not fit on cpu"):
        stream_layers(model, "cpu")


class Clock:
    """Two streams by their order of events: when the one that computes and the one that copies are through.

    A simulation with given times per layer, in the real order of copies and waits; no card has been measured.
    """

    def __init__(self, copy_s: float, forward_s: float) -> None:
        self.copy_s, self.forward_s = copy_s, forward_s
        self.computed = self.copied = self.busy_copying = self.busy_computing = 0.0

    def __call__(self, _device: torch.device) -> Clock:
        return self

    def may_write(self, _slot: torch.Tensor) -> None:
        pass

    @contextmanager
    def after_compute(self) -> Iterator[None]:
        self.copied = max(self.copied, self.computed)
        yield

    def mark(self) -> float:
        self.copied += self.copy_s
        self.busy_copying += self.copy_s
        return self.copied

    def let_compute_wait(self, event: float) -> None:
        self.computed = max(self.computed, event)

    def compute(self, seconds: float) -> None:
        self.computed += seconds
        self.busy_computing += seconds


@pytest.mark.parametrize("tokens", [256, 1024, 4096, 16_384])
def test_a_step_takes_as_long_as_the_longer_of_copies_and_arithmetic(
    tokens: int, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Llama-3.1-8B's layers in 4 bits: 112 MiB at 12 GB/s, 2 x weights x tokens operations at 40 TFLOP/s."""
    clock = Clock(0.516 * 218e6 / 12e9, 2 * 218e6 * tokens / 40e12)
    monkeypatch.setattr(module, "SideStream", clock)
    model = load("llama", 32, 12)
    stream_layers(model, "cpu")
    is_backward = False
    for layer in decoder_layers(model):  # called once forward, and once where the layer is computed again
        layer.input_layernorm.register_forward_pre_hook(  # type: ignore[union-attr, operator]
            lambda *_: clock.compute(clock.forward_s * (2 if is_backward else 1))
        )
    for _ in range(3):
        started, copying, computing = clock.computed, clock.busy_copying, clock.busy_computing
        is_backward = False
        loss, _ = summed_loss(model, batch(0))
        is_backward = True
        loss.backward()
    step_s = clock.computed - started
    longer = max(clock.busy_copying - copying, clock.busy_computing - computing)
    assert longer <= step_s * 1.0001 and step_s <= 1.1 * longer
