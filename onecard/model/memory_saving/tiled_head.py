"""A quantised output head that is dequantised some rows at a time, forward and backward.

bitsandbytes dequantises a whole matrix for each product of many tokens: of a head with 128,256 rows of 4,096 weights
that is 1 GiB in 16 bits. Knows rows and gradients; the forms of the weights are `quantization.py`'s, and which layer is
the head is `lm_head.py`'s.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from onecard.model.quantization import NF4_BLOCK, NF4_SUPERBLOCK, dense_rows, product_with_rows

TILE_BYTES = 64 << 20  # of dequantised rows: 8,192 of 4,096 weights in 16 bits. What is quickest was not measured


def dequantise_in_tiles(layer: nn.Module, *, tile_bytes: int = TILE_BYTES, at_most: int | None = None) -> None:
    """Let a frozen quantised linear layer compute with `tile_bytes` of dequantised rows at a time.

    at_most: how many tiles are computed, the last one among them; for the memory plan, to which others are alike.
    Outputs are those of the layer; the gradient of its input is summed over the tiles in fp32, so it is the layer's up
    to rounding, and bit for bit where one tile holds all rows. The weights themselves learn nothing.
    """

    class Tiled(type(layer)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            tiles = _tiles(self, x, tile_bytes)
            if at_most is not None:
                del tiles[at_most - 1 : -1]
            return _Product.apply(x, self, tiles)

    layer.__class__ = Tiled


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any, tiles: list[slice]) -> Tensor:
        """x: (..., in); returns (..., out) in the dtype of x."""
        ctx.layer, ctx.tiles, ctx.shape = layer, tiles, x.shape
        output = x.new_empty(*x.shape[:-1], layer.out_features)
        for rows in tiles:
            output[..., rows] = product_with_rows(layer, x, rows)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        total = gradient.new_zeros(ctx.shape, dtype=torch.float32)
        for rows in ctx.tiles:
            weights = dense_rows(ctx.layer, rows, gradient.dtype)
            total += gradient[..., rows].to(weights.dtype) @ weights
            del weights  # not two tiles at once
        return total.to(gradient.dtype), None, None


def _tiles(layer: Any, like: Tensor, tile_bytes: int) -> list[slice]:
    """Rows of `tile_bytes` in the dtype of `like`, cut where a block of 4-bit weights and one of their scales begin."""
    step = NF4_BLOCK * NF4_SUPERBLOCK // math.gcd(NF4_BLOCK * NF4_SUPERBLOCK, layer.in_features)
    at_once = max(step, tile_bytes // (layer.in_features * like.element_size()) // step * step)
    return [slice(start, min(start + at_once, layer.out_features)) for start in range(0, layer.out_features, at_once)]
