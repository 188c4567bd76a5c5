"""What operations take on fake tensors, where torch has no shape function or no card to ask.

Stand-ins for products over experts and, on a card, for attention, dropout and the casts of autocast that a CPU does
not make; and the memory that comes and goes inside one operation, which a dispatch mode does not see. Knows functions
of torch and bitsandbytes; does not know models.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from onecard.model.chunked_loss import row_pieces
from onecard.model.memory_saving.tiled_mlp import TiledMLP

# Operations for which a CPU makes copies of operands in another type than the result's; a card does not.
MIXED = ("aten::add", "aten::sub", "aten::mul", "aten::div", "aten::where", "aten::addcmul")
FEW_PIECES = 3  # of a gradient that is scaled in pieces, so that long rows make the same requests
aten = torch.ops.aten


def bytes_inside(func: Any, args: Any, out: Any, on_gpu: bool) -> list[int]:
    """Bytes that come and go inside one operation: of bitsandbytes, and of a CPU that computes with mixed types.

    A number for each tensor on a card; for a CPU, whose allocator is not modelled, their sum.
    """
    name = func._name.partition(".")[0]
    if name == "bitsandbytes::gemm_4bit":
        n_out, n_in = args[2]
        scales = n_out * n_in // 16  # in fp32, without their offset and with it
        return [scales, scales, n_out * n_in * args[0].element_size()]
    if name == "bitsandbytes::int8_scaled_mm":
        return [out.numel() * 4]
    if on_gpu or name.rstrip("_") not in MIXED or not isinstance(out, Tensor):
        return []
    tensors = [value for value in args if isinstance(value, Tensor) and value.dim()]
    widest = max((tensor.element_size() for tensor in tensors), default=0)
    narrow = [tensor for tensor in (*tensors, out) if tensor.element_size() < widest]
    return [widest * sum(tensor.numel() for tensor in narrow)]


class KernelStandIns(TorchFunctionMode):
    """Stand-ins by the function that is called: for products over experts, and for what a card does its own way."""

    FP32_FUNCTIONS = ("layer_norm", "softmax", "log_softmax", "pow", "rsqrt", "exp", "sum", "cumsum", "norm")

    def __init__(self, on_gpu: bool, flash: bool) -> None:
        super().__init__()
        self.on_gpu, self.flash = on_gpu, flash

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("grouped_mm", "_grouped_mm"):  # its shape function knows bf16 alone
            return GroupedProduct.apply(args[0], args[1])
        if name == "sparse_coo_tensor":
            values = args[1].view_as(args[1])
            values.of_sparse_matrix = True
            return values
        if name == "add_" and hasattr(args[1], "of_sparse_matrix"):
            return SparseSum.apply(args[0], args[1], 2 if self.on_gpu else 1)
        if func is row_pieces:
            every = func(*args, **kwargs)  # those between take what the second does, one after the other
            return every if len(every) <= FEW_PIECES else (*every[: FEW_PIECES - 1], every[-1])
        if not self.on_gpu:
            return func(*args, **kwargs)
        if name == "scaled_dot_product_attention":
            return self._attention(*args, **kwargs)
        if name == "dropout" and kwargs.get("training", True):
            return torch.native_dropout(args[0], kwargs.get("p", 0.5), True)[0]
        if name in self.FP32_FUNCTIONS and torch.is_autocast_enabled("cpu") and args and isinstance(args[0], Tensor):
            args = tuple(a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
            kwargs = {key: a.float() if isinstance(a, Tensor) and a.is_floating_point() else a
                      for key, a in kwargs.items()}  # fmt: skip
        return func(*args, **kwargs)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
                   dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
                   enable_gqa: bool = False) -> Any:  # fmt: skip
        if torch.is_autocast_enabled("cpu"):
            query, key, value = (side.to(torch.get_autocast_dtype("cpu")) for side in (query, key, value))
        shared = query.shape[1] != key.shape[1]
        fused = query.dim() == 4 and max(query.shape[-1], value.shape[-1]) <= 256
        flash = self.flash and attn_mask is None and query.dtype != torch.float32 and query.shape[-1] == value.shape[-1]
        if fused and (flash or not shared):
            return FusedAttention.apply(query, key, value, attn_mask)
        return aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]


class GroupedProduct(torch.autograd.Function):
    """Rows of tokens (tokens, in), sorted by expert, times the weights of each (experts, in, out)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weight)
        return rows.new_empty(len(rows), weight.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        of_rows = grad_outputs[0].new_empty(len(grad_outputs[0]), weight.shape[1])
        return of_rows, torch.empty_like(weight) if rows is not None else None


class SparseSum(torch.autograd.Function):
    """dense (rows, columns) += a sparse matrix of `values` (n): aten's sums in the wider of two types, and their masks.

    https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/sparse/SparseTensorMath.cpp, and beside it
    cuda/SparseCUDATensorMath.cu, whose sum is beside the widened matrix.
    """

    @staticmethod
    def forward(ctx: Any, dense: Tensor, values: Tensor, n_wide: int) -> Tensor:
        ctx.mark_dirty(dense)
        ctx.save_for_backward(values.new_empty(2, len(values), dtype=torch.int64), values)
        _wide = [dense.to(values.dtype) for _ in range(n_wide) if dense.dtype != values.dtype]
        return dense

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of `values`, read at their places from the dense one, in their type."""
        places, values = ctx.saved_tensors
        wide = grad_outputs[0].to(values.dtype)
        found, _copy = wide.flatten().index_select(0, places[0]), places.clone()
        return None, found * values, None


class FusedAttention(torch.autograd.Function):
    """FlashAttention or the memory-efficient kernel: its inputs, its output and one number per query are kept."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """(batch, heads, seq, dim) each; the output lies as (batch, seq, heads, dim) does."""
        n_rows, n_heads, length, _ = query.shape
        out = query.new_empty(n_rows, length, n_heads, value.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(query, key, value, out, query.new_empty(n_rows, n_heads, length, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """A new gradient for each input; those of 16-bit queries are added up in fp32, beside a number per query.

        https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/transformers/cuda/attention_backward.cu
        """
        query, key, value, _out, _numbers = ctx.saved_tensors  # all of them are there until the kernel is through
        gradients = [torch.empty_like(side) for side in (query, key, value)]
        _per_query = query.new_empty(query.shape[:3], dtype=torch.float32)
        if query.dtype != torch.float32:
            _sums = query.new_empty(query.shape, dtype=torch.float32)
        return (*gradients, None)


class SkippedComputation(torch.autograd.Function):
    """The output and the gradient of something without what they are made of."""

    @staticmethod
    def forward(ctx: Any, tile: Tensor) -> Tensor:
        return torch.empty_like(tile)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return torch.empty_like(grad_outputs[0])


class FewTiles(TiledMLP):
    """The first tile and the last; those between take the same, one after the other, and are not computed."""

    def _learned(self, inner: nn.Module, flat: Tensor) -> list[Tensor]:
        n_between = len(flat) - 2 * self.tile_tokens
        if n_between <= 0:
            return super()._learned(inner, flat)
        first, between, last = flat.split([self.tile_tokens, n_between, self.tile_tokens])
        return [self._checkpointed(inner, first), self._checkpointed(SkippedComputation.apply, between),
                self._checkpointed(inner, last)]  # fmt: skip


def autocast(setup: Any) -> Any:
    """As accelerate's."""
    dtype = torch.float16 if setup.repeats_kv else torch.bfloat16
    return torch.autocast("cpu", dtype, cache_enabled=False) if setup.element_bytes == 2 else nullcontext()


@contextmanager
def flag_of_cuda(wanted: bool) -> Iterator[None]:
    """The flag of autocast for a card, which peft asks for, forward and where a layer is computed again."""
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", wanted)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before)
