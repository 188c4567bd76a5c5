"""Numbers of 32 bits to 16: to the nearest, or for a learned sum so that no part of it is lost on average.

A base stored in 16 bits lies on the grid of its type. What an adapter adds is often less than half a step of that
grid, and rounding to the nearest takes all of that away again. Stochastic rounding (https://arxiv.org/abs/1502.02551)
takes the upper neighbour as often as the value is close to it, so that the mean error is zero and what was learned
stays; tests/real/test_exports.py holds it to 99 % of the gain in NLL. Knows tensors; no models.
"""

from __future__ import annotations

import math
import zlib

import numpy as np
import torch
from torch import Tensor

from onecard.errors import ModelError
from onecard.export.io.weights import own_memory
from onecard.installation import command

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Below the smallest normal number of fp16 its steps grow coarser in proportion. Where even the largest value of a
# tensor is not far above that, its error is computed.
SMALL_IN_FP16 = 2.0**-12
CHUNK_VALUES = 1 << 18  # are rounded at once, so that what is computed on the way stays in the processor's cache
LARGEST_LOSS = 0.01  # of a tensor of tiny values, root mean square over root mean square


class DoesNotFit(ModelError):
    """Weights or activations of a model that fp16 cannot hold."""


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; twenty times faster than torch.isfinite, which fills a tensor of bools."""
    return not tensor.is_floating_point() or math.isfinite(_largest(tensor))


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
    largest = _largest(tensor)
    if not math.isfinite(largest):
        _refuse(name, tensor, dtype)
    if strict and dtype == torch.float16 and largest < SMALL_IN_FP16:
        check_fits_fp16(name, tensor)
    result, flat = own_memory(tensor.shape, dtype), tensor.contiguous().flatten()
    stream, scratch = np.random.SFC64(zlib.crc32(name.encode())), torch.empty(CHUNK_VALUES, dtype=torch.int32)
    for some, target in zip(flat.split(CHUNK_VALUES), result.flatten().split(CHUNK_VALUES), strict=True):
        # 16 random bits for each value
        chances = torch.from_numpy(stream.random_raw(-(-len(some) // 4)).view(np.int16))[: len(some)]
        _round_stochastically(some, chances, target, scratch[: len(some)])
    if largest > torch.finfo(dtype).max and not is_finite(result):
        _refuse(name, tensor, dtype)
    return result


def _round_stochastically(values: Tensor, chances: Tensor, target: Tensor, scratch: Tensor) -> None:
    """Add to each fp32 number a random one below a step of the target's type, and cut off what is below a step.

    All in `scratch`: new memory would cost more than the arithmetic.
    """
    info = torch.finfo(target.dtype)
    n_chances = int(info.eps / torch.finfo(torch.float32).eps)  # steps of fp32 in a step of the target
    bits = scratch.copy_(chances).bitwise_and_(n_chances - 1).add_(values.view(torch.int32)).bitwise_and_(-n_chances)
    target.copy_(bits.view(torch.float32))
    if info.tiny > torch.finfo(torch.float32).tiny:
        # Below the smallest normal number of fp16 all steps are of one size. Few values are so small.
        magnitude = torch.abs(values, out=scratch.view(torch.float32)).numpy()
        few = torch.from_numpy(np.flatnonzero(magnitude < info.tiny))
        step, chance = info.tiny * info.eps, (chances[few].to(torch.int32) & (n_chances - 1)) / n_chances
        target[few] = ((values[few] / step + chance).floor_() * step).to(target.dtype)


def check_fits_fp16(name: str, tensor: Tensor) -> None:
    """Raise DoesNotFit where all values of a tensor are so small that fp16 loses what another type keeps."""
    if tensor.dtype == torch.float16 or not tensor.is_floating_point():
        return
    largest = _largest(tensor)
    if 0 < largest < SMALL_IN_FP16:
        exact = tensor.double()
        loss = float((exact - tensor.half().double()).norm() / exact.norm())
        if loss > LARGEST_LOSS:
            raise DoesNotFit(f"{name} has values of at most {largest:.3g}, of which fp16 loses {loss:.0%}")


def _largest(tensor: Tensor) -> float:
    """The largest absolute value; NaN where one is, 0 of nothing."""
    if tensor.numel() == 0:
        return 0.0
    low, high = map(float, torch.aminmax(tensor))
    return math.nan if math.isnan(low) or math.isnan(high) else max(-low, high)


def _refuse(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if not is_finite(tensor):
        raise ModelError(f"{name} holds NaN or Inf in the base; copy or download the base again")
    raise DoesNotFit(
        f"{name} has values up to {float(tensor.abs().max()):.3g}, which do not fit into {NAMES.get(dtype, dtype)} "
        f"(65504 is the most); use bf16 or fp32 (--dtype of {command('merge')}, --gguf_type of {command('gguf')})"
    )
