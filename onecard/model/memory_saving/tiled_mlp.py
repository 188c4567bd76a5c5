"""Feed-forward blocks that run over a few thousand tokens at a time, so that their wide activations never all exist.

Knows modules and tokens. It does not know adapters or bits: the children of a block may be plain, quantised or LoRA
layers. Parameter names, state dicts and adapter files are the same with and without tiles.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from onecard.console import warn
from onecard.errors import ModelError
from onecard.model.quantization import weight_bits

MLP_NAMES = ("mlp", "feed_forward", "ffn")


class TiledMLP(nn.Module):
    """A feed-forward block whose forward and backward hold the wide activations of one tile of tokens.

    (batch, seq, hidden) -> the same shape and values as the block inside, whose children it shows under their names.
    Inputs of at most `tile_tokens` tokens pass straight through. Longer ones are cut along the flattened token axis;
    each tile is recomputed in the backward pass, with the random numbers of the forward pass.

    The outputs of all tiles exist beside the result while `torch.cat` joins them: hidden x tokens once more, for the
    length of one copy. Writing into slices of one tensor instead would clone its whole gradient once per tile.
    With lora_dropout above 0 the masks are drawn tile by tile, so they are others than without tiles.
    """

    def __init__(self, inner: nn.Module, tile_tokens: int) -> None:
        super().__init__()
        self.tile_tokens = tile_tokens
        # As for whole layers (`load.py`): an 8-bit layer keeps its input where no other checkpoint sees it.
        self._reentrant = any(weight_bits(layer) == 8 for layer in inner.modules() if isinstance(layer, nn.Linear))
        self._inner = (inner,)  # in a tuple it is no child, so no name in the state dict changes
        for name, child in inner.named_children():
            self.add_module(name, child)
        self.training = inner.training

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states (batch, seq, hidden) -> (batch, seq, hidden)."""
        inner = self.restored()
        n_tokens = hidden_states.shape[:-1].numel()
        if n_tokens <= self.tile_tokens:
            return inner(hidden_states)
        # Two dimensions: rows of a (1, tokens, hidden) tensor would be multiplied by a copy of each weight (bmm).
        flat = hidden_states.reshape(n_tokens, hidden_states.shape[-1])
        if not torch.is_grad_enabled():
            return self._joined(inner, flat.split(self.tile_tokens)).view(hidden_states.shape)
        return torch.cat(self._learned(inner, flat)).view(hidden_states.shape)

    def _learned(self, inner: nn.Module, flat: Tensor) -> list[Tensor]:
        """The output of each tile, which is computed again for its gradients."""
        return [self._checkpointed(inner, tile) for tile in flat.split(self.tile_tokens)]

    def _checkpointed(self, inner: Any, tile: Tensor) -> Tensor:
        return self._checked(checkpoint(inner, tile, use_reentrant=self._reentrant), tile)

    def train(self, mode: bool = True) -> TiledMLP:
        """Switch the block inside too: some ask for their own mode in their forward."""
        self._inner[0].train(mode)
        return super().train(mode)

    def restored(self) -> nn.Module:
        """The block inside, with the children as they are now: peft replaces some when it merges or unloads."""
        inner = self._inner[0]
        for name, child in self.named_children():
            if inner.get_submodule(name) is not child:
                inner.add_module(name, child)
        return inner

    def _joined(self, inner: nn.Module, tiles: tuple[Tensor, ...]) -> Tensor:
        """Without gradients there is no history to keep, so each tile is written where it belongs."""
        first = self._checked(inner(tiles[0]), tiles[0])
        joined = first.new_empty(sum(len(tile) for tile in tiles), first.shape[1])
        start = len(first)
        joined[:start] = first
        for tile in tiles[1:]:
            joined[start : start + len(tile)] = inner(tile)
            start += len(tile)
        return joined

    def _checked(self, output: Any, tile: Tensor) -> Tensor:
        if isinstance(output, Tensor) and output.shape == tile.shape:
            return output
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ModelError(
            f"{type(self._inner[0]).__name__} makes {shape} of {tuple(tile.shape)}: it cannot run tile by tile; "
            "turn the tiles off for this model"
        )


def tile_mlps(model: nn.Module, tile_tokens: int, kind: type[TiledMLP] = TiledMLP) -> int:
    """Let each decoder layer's feed-forward block run over `tile_tokens` tokens at a time; returns how many now do.

    Call it after the adapters are attached; call it again for another size; 0 takes the tiles away. Left alone are
    mixtures of experts, blocks that take more than the hidden states (Bloom), and whatever else is not plainly
    linear layers and activations. Under LLM.int8 a tile finds its own outliers, so the last digits may differ.
    """
    untile_mlps(model)
    if tile_tokens <= 0:
        return 0
    found = plain_mlps(model)
    for path, inner in found.items():
        model.set_submodule(path, kind(inner, tile_tokens))
    if not found:
        warn("--mlp_tile changes nothing here: no feed-forward block of this model can run over a part of the tokens")
    return len(found)


def plain_mlps(model: nn.Module) -> dict[str, nn.Module]:
    """The feed-forward blocks that can run in tiles, by name."""
    return {
        f"{path}.{name}" if path else name: block
        for path, layer in model.named_modules()
        if _is_decoder_layer(layer)
        for name, block in _blocks(layer)
        if _is_plain_mlp(block)
    }


def untile_mlps(model: nn.Module) -> int:
    """Put the blocks back as they were; returns how many were tiled."""
    tiled = [(path, module) for path, module in model.named_modules() if isinstance(module, TiledMLP)]
    for path, module in tiled:
        model.set_submodule(path, module.restored())
    return len(tiled)


def _is_decoder_layer(module: nn.Module) -> bool:
    """A feed-forward block and attention side by side; both names are the same in all families so far."""
    names = [name for name, _ in module.named_children()]
    return any(name in MLP_NAMES for name in names) and any("attn" in name or "attention" in name for name in names)


def _blocks(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The feed-forward blocks of a layer, by name; inside the adapter where one stands beside the whole block."""
    for name, child in layer.named_children():
        if name in MLP_NAMES:
            inside = getattr(child, "base_layer", None)
            yield (name, child) if inside is None else (f"{name}.base_layer", inside)


def _is_plain_mlp(module: nn.Module) -> bool:
    """Takes the hidden states alone; its children are linear layers, at least two, and others without weights."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    if len(parameters) != 1 or parameters[0].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        return False
    if any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.buffers(recurse=False)):
        return False
    children = list(module.children())
    linear = [child for child in children if isinstance(getattr(child, "base_layer", child), nn.Linear | Conv1D)]
    others = [child for child in children if child not in linear]
    return len(linear) >= 2 and all(next(child.parameters(), None) is None for child in others)
