from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint

from onecard.config.base_model import ModelOptions
from onecard.config.lora import LoraOptions
from onecard.errors import ModelError
from onecard.model.chunked_loss import summed_loss
from onecard.model.hardware import Hardware
from onecard.model.load import LoadedBase, load_base
from onecard.model.lora.adapter import add_lora, restore_adapter, save_adapter
from onecard.model.lora.peft_model import remove_adapter
from onecard.model.memory_saving.activation_offload import ActivationOffload
from onecard.model.memory_saving.tiled_mlp import TiledMLP, tile_mlps, untile_mlps
from tests.model.live_tensors import LiveTensors
from tests.model.model_families import FAMILIES, N_FAMILIES, save_family, small_batch

# Bloom's block takes the residual stream as well.
TILED = tuple(family for family in FAMILIES if family != "bloom")


def with_adapters(base: nn.Module, **options: float) -> nn.Module:
    model = add_lora(base, LoraOptions(lora_r=4, **options)).train()
    with torch.no_grad():
        for parameter in trained(model):
            parameter.normal_(0, 0.05)
    return model


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def loss_and_gradients(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[float, list[torch.Tensor]]:
    torch.manual_seed(5)  # dropout
    model.zero_grad()
    loss, n_tokens = summed_loss(model, batch)
    (loss / n_tokens).backward()
    return loss.item() / n_tokens, [parameter.grad.clone() for parameter in trained(model)]


def worst(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    assert len(one) == len(other) > 1 and any(bool(gradient.any()) for gradient in one)
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_the_same_tile_by_tile(family: str, load_family: Callable[..., LoadedBase]) -> None:
    assert len(FAMILIES) == N_FAMILIES == len(TILED) + 1
    model = with_adapters(load_family(family).model)
    names = [name for name, _ in model.named_parameters()]
    batch = small_batch()  # 36 tokens, so the last tile of 5 has one
    loss, gradients = loss_and_gradients(model, batch)
    assert tile_mlps(model, 5) == (2 if family in TILED else 0)
    assert [name for name, _ in model.named_parameters()] == names
    tiled_loss, tiled_gradients = loss_and_gradients(model, batch)
    assert abs(tiled_loss - loss) < 1e-6
    assert worst(tiled_gradients, gradients) < 1e-5
    with torch.no_grad():
        logits = model.eval()(input_ids=batch["input_ids"]).logits
        assert untile_mlps(model) == (2 if family in TILED else 0)
        assert float((model(input_ids=batch["input_ids"]).logits - logits).abs().max()) < 1e-5


@pytest.mark.parametrize(("bits", "dtype"), [(4, "fp32"), (8, "fp32"), (16, "bf16"), (4, "bf16")])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_quantised_bases_and_autocast(
    bits: int, dtype: str, checkpointing: bool, load_family: Callable[..., LoadedBase]
) -> None:
    base = load_family("llama", bits, dtype=dtype, gradient_checkpointing=checkpointing).model
    model = with_adapters(base)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
        loss, gradients = loss_and_gradients(model, small_batch())
        assert tile_mlps(model, 7) == 2
        tiled_loss, tiled_gradients = loss_and_gradients(model, small_batch())
    if dtype == "fp32":
        assert abs(tiled_loss - loss) < 1e-6
        assert worst(tiled_gradients, gradients) < 1e-5
    else:  # sums over tokens are rounded to bf16 once per tile: 8 bits of precision
        largest = max(float(gradient.abs().max()) for gradient in gradients)
        assert abs(tiled_loss - loss) < 2e-2
        assert worst(tiled_gradients, gradients) < 2e-2 * largest


class _Block(nn.Module):
    """A decoder layer as far as this module is concerned, with dropout inside."""

    def __init__(self, hidden: int = 8, wide: int = 24, dropout: float = 0.5) -> None:
        super().__init__()
        self.self_attn = nn.Identity()
        self.mlp = _Mlp(hidden, wide, dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(x)


class _Mlp(nn.Module):
    def __init__(self, hidden: int, wide: int, dropout: float) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(hidden, wide), nn.Linear(wide, hidden)
        self.act = nn.SiLU()
        self.p = dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dropped = nn.functional.dropout(self.up(x), self.p, self.training)  # the block's own mode, not a child's
        return self.down(self.act(dropped))


def test_recomputed_tiles_draw_the_same_masks() -> None:
    """The gradient of the block against that of the same tiles run without any recomputation."""
    block, x = _Block(), torch.randn(3, 7, 8, requires_grad=True)
    model = nn.ModuleList([block])
    assert tile_mlps(model, 4) == 1
    for nested in (False, True):
        torch.manual_seed(1)
        output = checkpoint(block, x, use_reentrant=False) if nested else block(x)
        after = torch.rand(3)
        got = torch.autograd.grad(output.pow(2).sum(), [x, *block.parameters()])
        torch.manual_seed(1)
        inner = block.mlp.restored()
        expected = x + torch.cat([inner(tile) for tile in x.view(1, 21, 8).split(4, dim=1)], 1).view(3, 7, 8)
        assert torch.equal(after, torch.rand(3))  # as many random numbers were drawn as without recomputation
        assert torch.equal(output, expected)
        wanted = torch.autograd.grad(expected.pow(2).sum(), [x, *block.parameters()])
        assert worst(list(got), list(wanted)) < 1e-5


def test_lora_dropout_is_repeatable(load_family: Callable[..., LoadedBase]) -> None:
    model = with_adapters(load_family("llama").model, lora_dropout=0.5)
    plain = loss_and_gradients(model, small_batch())
    tile_mlps(model, 5)
    one, other = loss_and_gradients(model, small_batch()), loss_and_gradients(model, small_batch())
    assert one[0] == other[0] and worst(one[1], other[1]) == 0
    assert one[0] != plain[0]  # other masks, drawn tile by tile: said in the docstring
    direct = load_family("llama", gradient_checkpointing=False).model
    direct = with_adapters(direct, lora_dropout=0.5)
    direct.load_state_dict(model.state_dict())
    tile_mlps(direct, 5)
    unnested = loss_and_gradients(direct, small_batch())
    assert one[0] == unnested[0] and worst(one[1], unnested[1]) < 1e-6


def test_the_block_inside_follows_the_mode() -> None:
    block, x = _Block(), torch.randn(1, 9, 8)
    tile_mlps(nn.ModuleList([block]), 4)
    block.eval()
    tile_mlps(nn.ModuleList([block]), 4)
    assert not block.mlp.training  # a new tiled block has the mode of the one inside
    assert not block.mlp.restored().training and torch.equal(block(x), block(x))
    block.train()
    assert block.mlp.restored().training and not torch.equal(block(x), block(x))


def test_short_inputs_pass_straight_through() -> None:
    block = _Block(dropout=0.0)
    tile_mlps(nn.ModuleList([block]), 6)
    seen: list[tuple[int, ...]] = []
    block.mlp.restored().register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape)))
    block(torch.randn(2, 3, 8))
    assert seen == [(2, 3, 8)]
    block(torch.randn(1, 7, 8))
    with torch.no_grad():
        block(torch.randn(7, 1, 8))
    assert seen[1:] == [(6, 8), (1, 8)] * 2


def test_a_second_call_changes_the_size_and_zero_ends_it(load_family: Callable[..., LoadedBase]) -> None:
    model = load_family("llama").model
    originals = [layer.mlp for layer in model.model.layers]
    assert tile_mlps(model, 5) == tile_mlps(model, 9) == 2
    assert [layer.mlp.tile_tokens for layer in model.model.layers] == [9, 9]
    assert tile_mlps(model, 0) == 0
    assert [layer.mlp for layer in model.model.layers] == originals
    assert untile_mlps(model) == 0


@pytest.mark.parametrize("bits", [32, 4])
def test_adapter_files_do_not_know(bits: int, tmp_path: Path, load_family: Callable[..., LoadedBase]) -> None:
    model = with_adapters(load_family("llama", bits).model)
    names = list(model.state_dict())
    save_adapter(model, tmp_path / "plain")
    assert tile_mlps(model, 5) == 2
    assert list(model.state_dict()) == names
    save_adapter(model, tmp_path / "tiled")
    files = sorted(file.name for file in (tmp_path / "plain").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]
    for name in files:
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "tiled" / name).read_bytes()
    expected = loss_and_gradients(model, small_batch())
    with torch.no_grad():
        for parameter in trained(model):
            parameter.zero_()
    restore_adapter(model, tmp_path / "plain")
    got = loss_and_gradients(model, small_batch())
    assert got[0] == expected[0] and worst(got[1], expected[1]) == 0


def test_adapters_that_are_taken_off_are_off_inside_too(load_family: Callable[..., LoadedBase]) -> None:
    base = load_family("llama").model
    ids = small_batch()["input_ids"]
    with torch.no_grad():
        expected = base(ids).logits
        model = with_adapters(base)
        tile_mlps(model, 5)
        assert not torch.allclose(model.eval()(ids).logits, expected)
        bare = remove_adapter(model)
        assert torch.allclose(bare(ids).logits, expected, atol=1e-5)
        untile_mlps(bare)
        assert torch.equal(bare(ids).logits, expected)


def test_mixtures_of_experts_are_left_alone() -> None:
    sizes = {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }  # fmt: skip
    mixtral = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, num_local_experts=2))
    assert tile_mlps(mixtral, 4) == 0
    config = transformers.Qwen3MoeConfig(
        **sizes, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8, mlp_only_layers=[1], head_dim=8
    )
    assert tile_mlps(transformers.Qwen3MoeForCausalLM(config), 4) == 1  # its one dense layer


class _Odd(_Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).sum(1)


class _Own(_Mlp):
    def __init__(self) -> None:
        super().__init__(8, 16, 0.0)
        self.scale = nn.Parameter(torch.ones(8))


class _Two(_Mlp):
    def forward(self, x: torch.Tensor, router_mask: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x)


def test_whatever_is_not_plain_is_left_alone() -> None:
    def tiled(mlp: nn.Module, name: str = "mlp", attention: str = "self_attn") -> int:
        layer = nn.ModuleDict({name: mlp, attention: nn.Identity()})
        return tile_mlps(nn.ModuleList([layer]), 4)

    plain = (8, 16, 0.0)
    assert [tiled(_Mlp(*plain), name) for name in ("mlp", "feed_forward", "ffn", "mixer")] == [1, 1, 1, 0]
    assert tiled(_Mlp(*plain), attention="norm") == 0  # not a decoder layer: a vision tower's projector, say
    assert tiled(_Own()) == tiled(_Two(*plain)) == tiled(nn.Linear(8, 8)) == 0
    narrow = _Mlp(*plain)
    narrow.down = nn.Identity()
    assert tiled(narrow) == 0  # one linear layer: nothing wide lies between
    convolving = _Mlp(*plain)
    convolving.act = nn.Conv1d(16, 16, 3)
    assert tiled(convolving) == 0


def test_a_block_of_another_shape_is_named() -> None:
    odd = TiledMLP(_Odd(8, 16, 0.0), 4)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(ModelError, match="_Odd makes"):
            odd(torch.randn(1, 9, 8))


# --- memory


def backward_peak(model: nn.Module, tokens: int) -> int:
    batch = small_batch(rows=1, length=tokens)
    batch["labels"][:, :-4] = -100  # a small loss, so that a layer is the peak
    model.zero_grad()
    with LiveTensors() as tensors:
        loss, _ = summed_loss(model, batch)
        tensors.peak = 0
        loss.backward()
    return tensors.peak


@pytest.fixture
def wide_model(tmp_path: Path, cpu: Hardware) -> nn.Module:
    path = save_family("llama", tmp_path, intermediate_size=1024, max_position_embeddings=512)
    return with_adapters(load_base(ModelOptions(model_path=str(path), bits=32), cpu).model)


def test_the_peak_of_a_backward_pass_falls_as_planned(wide_model: nn.Module) -> None:
    """fp32: 6 activations of 1024 x 4 bytes per token in the block, of 64 x 4 elsewhere."""
    tokens, tile, wide = 400, 50, 1024 * 4
    plain = backward_peak(wide_model, tokens)
    tile_mlps(wide_model, tile)
    tiled = backward_peak(wide_model, tokens)
    saved = (plain - tiled) / ((tokens - tile) * wide)
    assert 4 < saved < 8, saved
    tile_mlps(wide_model, 2 * tile)
    assert 4 < (backward_peak(wide_model, tokens) - tiled) / (tile * wide) < 8


def test_tiles_and_offload_together(wide_model: nn.Module) -> None:
    batch = small_batch(rows=1, length=300)
    loss, gradients = loss_and_gradients(wide_model, batch)
    tile_mlps(wide_model, 64)
    offload = ActivationOffload(wide_model, "cpu", 300 * 64 * 4, chunk_bytes=10_000)
    with offload:
        both_loss, both = loss_and_gradients(wide_model, batch)
    assert abs(both_loss - loss) < 1e-6 and worst(both, gradients) < 1e-5
    assert offload.n_packed >= 3
