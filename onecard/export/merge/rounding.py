"""Numbers of 32 bits to 16: to the nearest, or for a learned sum so that no part of it is lost on average.

A base stored in 16 bits lies on the grid of its type. What an adapter adds is often less than half a step of that
grid, and rounding to the nearest takes all of that away again. Stochastic rounding (https://arxiv.org/abs/1502.02551)
takes the upper neighbour as often as the value is close to it, so that the mean error is zero and what was learned
stays; tests/real/test_exports.py holds it to 99 % of the gain in NLL. Knows tensors; no models.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from onecard.errors import ModelError
from onecard.export.io.weights import own_memory
from onecard.installation import command

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
EXPONENT_BITS = 0x7F800000  # of a float32
# Below the smallest normal number of fp16 its steps grow coarser in proportion. Where even the largest value of a
# tensor is not far above that, its error is computed.
SMALL_IN_FP16 = 2.0**-12
CHUNK_VALUES = 1 << 20  # are rounded at once, so that the fp32 values on the way are few
LARGEST_LOSS = 0.01  # of a tensor of tiny values, root mean square over root mean square


class DoesNotFit(ModelError):
    """Weights or activations of a model that fp16 cannot hold."""


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; twenty times faster than torch.isfinite, which fills a tensor of bools."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def rounded(name: str, tensor: Tensor, dtype: torch.dtype, *, strict: bool = False) -> Tensor:
    """The tensor in `dtype`, each value the nearest. Raises ModelError, by its name, for NaN, Inf and overflow.

    strict: also DoesNotFit for a tensor whose values are so small that fp16 loses what another type keeps.
    """
    if strict and dtype == torch.float16:
        check_fits_fp16(name, tensor)
    result = tensor if tensor.dtype == dtype else own_memory(tensor.shape, dtype).copy_(tensor)
    if dtype.is_floating_point and not is_finite(result):
        _refuse(name, tensor, dtype)
    return result


def rounded_sum(name: str, tensor: Tensor, dtype: torch.dtype, *, strict: bool = False) -> Tensor:
    """A learned fp32 tensor in `dtype`, stochastically rounded, the same bits each time for the same name.

    A value that `dtype` holds exactly stays as it is. Raises as `rounded` does.
    """
    if dtype.itemsize >= tensor.dtype.itemsize:
        return rounded(name, tensor, dtype)
    if strict and dtype == torch.float16:
        check_fits_fp16(name, tensor)
    info = torch.finfo(dtype)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    result, flat = own_memory(tensor.shape, dtype), tensor.contiguous().flatten()
    for some, target in zip(flat.split(CHUNK_VALUES), result.flatten().split(CHUNK_VALUES), strict=True):
        # As many chances as a step of `dtype` has steps of fp32 in it, so that every sum below is exact.
        n_chances = int(info.eps / torch.finfo(torch.float32).eps)
        step = (some.view(torch.int32) & EXPONENT_BITS).view(torch.float32).clamp_(min=info.tiny).mul_(info.eps)
        chance = torch.empty(some.shape).random_(0, n_chances, generator=generator).div_(n_chances)
        target.copy_(chance.add_(some / step).floor_().mul_(step))
    if not is_finite(result):
        _refuse(name, tensor, dtype)
    return result


def check_fits_fp16(name: str, tensor: Tensor) -> None:
    """Raise DoesNotFit where all values of a tensor are so small that fp16 loses what another type keeps."""
    if tensor.dtype == torch.float16 or not tensor.is_floating_point() or tensor.numel() == 0:
        return
    largest = max(abs(float(value)) for value in torch.aminmax(tensor))
    if 0 < largest < SMALL_IN_FP16:
        exact = tensor.double()
        loss = float((exact - tensor.half().double()).norm() / exact.norm())
        if loss > LARGEST_LOSS:
            raise DoesNotFit(f"{name} has values of at most {largest:.3g}, of which fp16 loses {loss:.0%}")


def _refuse(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if not is_finite(tensor):
        raise ModelError(f"{name} holds NaN or Inf in the base; copy or download the base again")
    raise DoesNotFit(
        f"{name} has values up to {float(tensor.abs().max()):.3g}, which do not fit into {NAMES.get(dtype, dtype)} "
        f"(65504 is the most); use bf16 or fp32 (--dtype of {command('merge')}, --gguf_type of {command('gguf')})"
    )
