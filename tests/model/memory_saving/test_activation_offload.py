from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from onecard.config.base_model import ModelOptions
from onecard.config.lora import LoraOptions
from onecard.errors import ConfigError
from onecard.model.chunked_loss import summed_loss
from onecard.model.hardware import Hardware
from onecard.model.load import LoadedBase, load_base
from onecard.model.lora.adapter import add_lora, save_adapter
from onecard.model.memory_saving import activation_offload as offload_module
from onecard.model.memory_saving import embeddings_in_ram
from onecard.model.memory_saving.activation_offload import ActivationOffload
from onecard.model.memory_saving.embeddings_in_ram import embeddings_to_ram
from tests import tiny
from tests.model.live_tensors import LiveTensors
from tests.model.model_families import save_family, small_batch

CHUNK = 1000  # bytes; no tensor is a multiple of it


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def with_adapters(base: nn.Module) -> nn.Module:
    model = add_lora(base, LoraOptions(lora_r=4)).train()
    with torch.no_grad():
        for parameter in trained(model):
            parameter.normal_(0, 0.05)
    return model


def loss_and_gradients(model: nn.Module, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    model.zero_grad()
    loss, _ = summed_loss(model, batch)
    loss.backward()
    return [loss.detach(), *[parameter.grad.clone() for parameter in trained(model)]]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) > 1 and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize(("family", "bits"), [("llama", 32), ("llama", 4), ("gemma2", 32), ("gpt2", 16)])
def test_losses_and_gradients_are_bitwise_the_same(
    family: str, bits: int, ahead: bool, load_family: Callable[..., LoadedBase]
) -> None:
    model = with_adapters(load_family(family, bits).model)
    offload = ActivationOffload(model, "cpu", 1, ahead=ahead, chunk_bytes=CHUNK)
    for length in (12, 9, 12):
        expected = loss_and_gradients(model, small_batch(length=length))
        with offload:
            got = loss_and_gradients(model, small_batch(length=length))
        assert same(got, expected) and bool(got[1].any())
        assert offload.n_packed >= 2


def test_without_checkpointing_every_saved_tensor_goes_and_comes(load_family: Callable[..., LoadedBase]) -> None:
    model = with_adapters(load_family("llama", gradient_checkpointing=False).model)
    offload = ActivationOffload(model, "cpu", 1, chunk_bytes=CHUNK)
    expected = loss_and_gradients(model, small_batch())
    with offload:
        got = loss_and_gradients(model, small_batch())
    assert same(got, expected) and offload.n_packed > 40


@pytest.mark.parametrize("layers", [1, 5])
def test_one_tensor_per_layer_and_one_outside(layers: int, tmp_path: Path, cpu: Hardware) -> None:
    path = save_family("llama", tmp_path, num_hidden_layers=layers)
    model = with_adapters(load_base(ModelOptions(model_path=str(path), bits=32), cpu).model)
    batch = small_batch(length=60)
    batch["labels"][:, :40] = -100  # few logits: (3, 20, 128) would be as large as a layer's input
    batch["labels"][:, 45:] = -100
    offload = ActivationOffload(model, "cpu", 3 * 60 * 64 * 4, chunk_bytes=CHUNK)
    with offload:
        loss_and_gradients(model, batch)
        # The final norm saves its input, in fp32, twice in a row: it travels once. Nothing inside a layer is seen.
        assert offload.n_packed == layers + 1
    small = ActivationOffload(model, "cpu", 1, chunk_bytes=CHUNK)
    with small:
        loss_and_gradients(model, batch)
        # Also: the norm's inverse root, and so its input once more; the loss's log-probabilities and their count.
        assert small.n_packed == layers + 1 + 2 + 2


def deep(width: int = 96, depth: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(width, width) for _ in range(depth))


def through(layers: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    for layer in layers:
        hidden = checkpoint(lambda x, layer=layer: torch.tanh(layer(x)), hidden, use_reentrant=False)
    return hidden


@pytest.mark.parametrize(("ahead", "in_backward"), [(True, 3), (False, 2), (None, 9)])
def test_layer_inputs_leave_the_card(ahead: bool | None, in_backward: int) -> None:
    """`None` is without offload: all eight inputs and the output are there when the backward pass starts."""
    layers, size = deep(), 50 * 96 * 4
    offload = ActivationOffload(layers, "cpu", size, ahead=bool(ahead), chunk_bytes=CHUNK)
    live: list[int] = []

    def count(_module: nn.Module, _inputs: object) -> None:
        live.append(tensors.live() // size)

    with LiveTensors(lambda tensor: tensor.untyped_storage().nbytes() == size) as tensors:
        hidden = torch.randn(50, 96) * 1
        for layer in layers:
            layer.register_forward_pre_hook(count)
        if ahead is None:
            through(layers, hidden).sum().backward()
        else:
            with offload:
                total = through(layers, hidden).sum()
                offload.settle()
                del hidden
                total.backward()
    assert len(live) == 16  # each layer in the forward pass, and again when it is recomputed
    forward, backward = live[:8], live[8:]
    if ahead is None:
        assert forward == [*range(1, 9)] and max(backward) >= 8
    else:
        # `hidden` is held by this test; in the forward pass nothing but the running layer's own input is there.
        assert max(forward) == 2
        # The gradient of the layer's output, its input, and with `ahead` the next one's.
        assert max(backward) == max(backward[1:-1]) == in_backward


def test_buffers_are_used_again_whatever_the_length(load_family: Callable[..., LoadedBase]) -> None:
    model = with_adapters(load_family("llama").model)
    offload = ActivationOffload(model, "cpu", 1, chunk_bytes=CHUNK)
    held = []
    for length in (60, 20, 47, 60, 33):
        with offload:
            loss_and_gradients(model, small_batch(rows=2, length=length))
        held.append(offload.host_bytes)
        assert len(offload._pool.free) * CHUNK == offload.host_bytes  # all are back
    assert len(set(held)) == 1 and held[0] == offload.peak_host_bytes > 0
    offload.release()
    assert offload.host_bytes == 0 and offload.peak_host_bytes == held[0]
    with offload:
        loss_and_gradients(model, small_batch(rows=2, length=20))
    assert 0 < offload.host_bytes < held[0]


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_an_exception_leaves_nothing_behind(when: str, load_family: Callable[..., LoadedBase]) -> None:
    model = with_adapters(load_family("llama").model)
    offload = ActivationOffload(model, "cpu", 1, chunk_bytes=CHUNK)
    expected = loss_and_gradients(model, small_batch())
    layer = model.get_base_model().model.layers[1 if when == "forward" else 0]
    calls: list[int] = []

    def fail(_module: nn.Module, _inputs: object) -> None:
        calls.append(1)
        if len(calls) == (1 if when == "forward" else 2):
            raise torch.OutOfMemoryError("pretended")

    handle = layer.mlp.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError), offload:
        loss_and_gradients(model, small_batch())
    handle.remove()
    assert len(offload._pool.free) * CHUNK == offload.host_bytes > 0
    before = offload.host_bytes
    with offload:
        got = loss_and_gradients(model, small_batch())
    assert same(got, expected) and offload.host_bytes <= max(before, offload.peak_host_bytes)
    plain = torch.ones(3, requires_grad=True)  # no hook is left over
    assert type((plain * plain).grad_fn._saved_self) is torch.Tensor


def test_a_graph_that_is_dropped_gives_its_buffers_back_at_once() -> None:
    layers = deep()
    offload = ActivationOffload(layers, "cpu", 1, chunk_bytes=CHUNK)
    gc.disable()  # reference counts alone must do
    try:
        with offload:
            for _ in range(5):
                through(layers, torch.randn(50, 96)).sum()
            used = offload.host_bytes - len(offload._pool.free) * CHUNK
    finally:
        gc.enable()
    per_tensor = -(-50 * 96 * 4 // CHUNK) * CHUNK
    assert used <= per_tensor  # the newest of all may wait for the next one
    assert offload.peak_host_bytes <= 10 * per_tensor
    assert len(offload._pool.free) * CHUNK == offload.host_bytes


def test_backward_after_the_block_is_refused() -> None:
    layers = deep()
    with ActivationOffload(layers, "cpu", 1, chunk_bytes=CHUNK):
        total = through(layers, torch.randn(50, 96)).sum()
    with pytest.raises(RuntimeError, match="call backward inside the offload block"):
        total.backward()


def test_a_block_inside_its_own_block_is_refused() -> None:
    offload = ActivationOffload(nn.Linear(2, 2), "cpu", 1)
    with offload, pytest.raises(RuntimeError, match="one block per micro-batch"), offload:
        pass
    assert type((torch.ones(3, requires_grad=True) ** 2).grad_fn._saved_self) is torch.Tensor


class _Keep(torch.autograd.Function):
    """Saves a tensor and shows what comes back."""

    @staticmethod
    def forward(ctx, tensor, seen):
        ctx.save_for_backward(tensor)
        ctx.seen = seen
        return tensor.sum()

    @staticmethod
    def backward(ctx, gradient):
        (tensor,) = ctx.saved_tensors
        ctx.seen.append(tensor)
        return gradient.expand(tensor.shape), None


FORMS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], bool]] = {
    "plain": (lambda x: x * 1, True),
    "transposed": (lambda x: (x * 1).transpose(0, 2), True),
    "part of a larger one": (lambda x: (x * 1)[2:], True),
    "with gaps": (lambda x: (x * 1)[:, ::2], False),
    "expanded": (lambda x: (x * 1)[:1].expand(6, 10, 8), False),
    "half": (lambda x: x.half(), True),
    "one column": (lambda x: (x * 1)[:, :, :1].contiguous(), True),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("requires_grad", [True, False])
def test_what_comes_back_is_what_was_saved(form: str, requires_grad: bool) -> None:
    make, travels = FORMS[form]
    leaf = torch.randn(6, 10, 8, requires_grad=True)
    seen: list[torch.Tensor] = []
    offload = ActivationOffload(nn.Linear(1, 1), "cpu", 1, chunk_bytes=CHUNK)
    with offload:
        tensor = make(leaf if requires_grad else leaf.detach().requires_grad_())
        copy_of_it = tensor.detach().clone()
        total = _Keep.apply(tensor, seen)
        assert offload.n_packed == travels
        offload.settle()
        total.backward(retain_graph=True)
        total.backward()
    assert len(seen) == 2
    for back in seen:
        assert torch.equal(back, copy_of_it) and back.dtype == tensor.dtype
        assert back.shape == tensor.shape and back.stride() == tensor.stride()
        assert (back.data_ptr() == tensor.data_ptr()) == (not travels)


def test_retained_graphs_and_tensors_saved_twice() -> None:
    results = []
    for use in (False, True):
        torch.manual_seed(3)
        layers, x = deep(8, 3), torch.randn(4, 8, requires_grad=True)
        offload = ActivationOffload(layers, "cpu", 1 if use else 1 << 40, chunk_bytes=CHUNK)
        with offload:
            hidden = through(layers, x)
            total = (hidden * hidden).sum() + (hidden.t() @ hidden).sum()
            first = torch.autograd.grad(total, x, retain_graph=True)[0]
            assert not any(packed.card is not None for packed in offload._alive.values())  # kept in RAM alone
            second = torch.autograd.grad(total, x)[0]
        assert torch.equal(first, second)
        results.append(first)
        assert (offload.n_packed > 0) == use
    assert torch.equal(*results)


@pytest.mark.parametrize("ahead", [True, False])
def test_each_tensor_comes_back_once(ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpointed calls with two tensors ask for the one that was saved first first."""
    back: list[int] = []
    original = ActivationOffload._bring_back

    def counted(self: ActivationOffload, packed: offload_module._Packed) -> None:
        back.append(packed.index)
        original(self, packed)

    monkeypatch.setattr(ActivationOffload, "_bring_back", counted)
    layers = deep()
    offload = ActivationOffload(layers, "cpu", 50 * 96 * 4, ahead=ahead, chunk_bytes=CHUNK)
    with offload:
        hidden, side = torch.randn(50, 96), torch.randn(50, 96)
        for layer in layers:
            side = side * 1
            hidden = checkpoint(lambda x, y, layer=layer: torch.tanh(layer(x)) * y, hidden, side, use_reentrant=False)
        hidden.sum().backward()
    assert offload.n_packed == 16
    assert sorted(back) == list(range(15))  # the newest had not left
    assert offload.host_bytes == 16 * -(-50 * 96 * 4 // CHUNK) * CHUNK


def test_one_tensor_saved_by_two_in_a_row_travels_once() -> None:
    offload = ActivationOffload(nn.Linear(1, 1), "cpu", 1, chunk_bytes=CHUNK)
    x = torch.randn(40, requires_grad=True)
    with offload:
        hidden = x + 1
        (hidden * hidden).sum().backward()
        assert offload.n_packed == 1
        assert torch.equal(x.grad, 2 * hidden)
        seen: list[torch.Tensor] = []
        _Keep.apply(hidden, [])
        with torch.no_grad():
            hidden.add_(1)  # the same memory, other values
        _Keep.apply(hidden, seen).backward()
        assert offload.n_packed == 3 and torch.equal(seen[0], hidden)


def test_an_output_that_stays_is_freed_with_its_graph() -> None:
    x = torch.randn(40, requires_grad=True)
    gc.disable()
    try:
        with ActivationOffload(nn.Linear(1, 1), "cpu", 1 << 20):
            memory = StorageWeakRef(x.exp().untyped_storage())  # exp saves what it returns
            assert memory.expired()
    finally:
        gc.enable()


def test_a_tensor_changed_on_its_way_is_an_error_as_it_is_without() -> None:
    for settled in (True, False):
        offload = ActivationOffload(nn.Linear(1, 1), "cpu", 1, chunk_bytes=CHUNK)
        x = torch.randn(40, requires_grad=True)
        with offload:
            hidden = x + 1
            total = (hidden * 2).pow(2).sum() + hidden.pow(3).sum()
            hidden.detach().add_(1)
            if settled:
                offload.settle()
            with pytest.raises(RuntimeError, match="changed in place"):
                total.backward()


def test_weights_small_tensors_and_integers_stay() -> None:
    layer = nn.Linear(30, 30)
    offload = ActivationOffload(layer, "cpu", 5 * 30 * 4, chunk_bytes=CHUNK)
    with offload:
        x = torch.randn(5, 30, requires_grad=True)
        y = nn.functional.linear(x, layer.weight.t())  # saves the weight as a view
        assert offload.n_packed == 1
        assert (y[:, :29].contiguous() ** 2).requires_grad  # one column less than min_bytes
        assert offload.n_packed == 1
        (y.masked_fill(torch.ones(5, 30, dtype=torch.bool), 0).sum() + y[:, torch.zeros(400).long()].sum()).backward()
        assert offload.n_packed == 1


def test_ordinary_ram_serves_where_none_can_be_pinned(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("here RAM can be pinned")
    layers = deep()
    offload = ActivationOffload(layers, "cpu", 1, chunk_bytes=CHUNK)
    offload._pool.pinned = True  # what a card would ask for
    x = torch.randn(50, 96)
    expected = loss_of(layers, x)
    with offload:
        assert torch.equal(loss_of(layers, x), expected)
    assert capsys.readouterr().err.count("no more RAM could be pinned") == 1


def loss_of(layers: nn.Module, x: torch.Tensor) -> torch.Tensor:
    layers.zero_grad()
    through(layers, x).sum().backward()
    return layers[0].weight.grad.clone()


# --- embeddings in RAM


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma3_text"])
def test_embeddings_give_the_same_rows_from_ram(family: str, load_family: Callable[..., LoadedBase]) -> None:
    model = with_adapters(load_family(family).model)
    expected = loss_and_gradients(model, small_batch())
    assert embeddings_to_ram(model, "cpu") == 0  # no card, nothing freed
    assert same(loss_and_gradients(model, small_batch()), expected)


def untied() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            tie_word_embeddings=False,
        )
    ).requires_grad_(False)  # fmt: skip


class _Wrapper(nn.Module):
    """What DDP looks like from outside."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_ids_go_to_the_weight_and_rows_to_the_card() -> None:
    """The device `meta` plays the card: it has shapes and places, and no values."""
    model = untied()
    embedding = model.get_input_embeddings()
    for _ in range(3):  # once and for all
        embeddings_to_ram(_Wrapper(model), "meta")
    rows = embedding(torch.zeros(2, 5, dtype=torch.long))
    assert rows.device.type == "meta" and rows.shape == (2, 5, 16)
    assert len(embedding._forward_hooks) == len(embedding._forward_pre_hooks) == 1
    moved = embeddings_in_ram._ids_to_weight(nn.Embedding(4, 4, device="meta"), (torch.zeros(1, dtype=torch.long),))
    assert moved[0].device.type == "meta"


def test_bytes_freed_are_those_of_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    model = untied().to("meta")
    embedding = model.get_input_embeddings()
    places: list[str] = []
    monkeypatch.setattr(embedding, "to", places.append)  # meta has no values that could be moved
    assert embeddings_to_ram(model, "meta") == 32 * 16 * 4
    assert places == ["cpu"]


def test_a_tied_head_keeps_the_embedding_until_it_has_its_own_weight() -> None:
    model = untied()
    own = copy.deepcopy(model.lm_head)
    model.lm_head.weight = model.get_input_embeddings().weight
    assert embeddings_to_ram(model, "meta") == 0
    assert not model.get_input_embeddings()._forward_hooks
    model.set_output_embeddings(own)
    embeddings_to_ram(model, "meta")
    assert len(model.get_input_embeddings()._forward_hooks) == 1


def test_a_trained_embedding_is_refused() -> None:
    model = untied()
    model.get_input_embeddings().requires_grad_(True)
    with pytest.raises(ConfigError, match="--offload_embeddings: cannot be used here: the embeddings are trained"):
        embeddings_to_ram(model, "cpu")


def test_adapter_files_do_not_know(tmp_path: Path, load_family: Callable[..., LoadedBase]) -> None:
    model = with_adapters(load_family("llama").model)
    save_adapter(model, tmp_path / "before")
    embeddings_to_ram(model, "cpu")
    save_adapter(model, tmp_path / "after")
    names = ["adapter_config.json", "adapter_model.safetensors"]
    assert sorted(file.name for file in (tmp_path / "after").iterdir()) == names
    assert all((tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes() for name in names)
    assert tiny.tensors_of(tmp_path / "after" / names[1])
