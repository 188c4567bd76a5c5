"""Two tensors to their difference and back, by bit pattern or by value, and rows for tokens that only one of them has.

Knows single tensors; no models and no files.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

NewRows = Literal["zeros", "mean"]
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def subtract_bits(tuned: Tensor, base: Tensor) -> Tensor:
    """Bit patterns of `tuned` minus those of `base`, modulo 2^bits, as integers of the same width.

    >>> subtract_bits(torch.tensor([1.0]), torch.tensor([1.0]))
    tensor([0], dtype=torch.int32)
    """
    return _from_unsigned(_unsigned(tuned) - _unsigned(base), tuned)


def add_bits(base: Tensor, difference: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor of `dtype` whose bit patterns are those of `base` plus `difference`: undoes `subtract_bits`."""
    return _from_unsigned(_unsigned(base) + _unsigned(difference), difference).view(dtype)


def subtract_floats(tuned: Tensor, base: Tensor) -> Tensor:
    """tuned - base in fp32 (fp64 where either is), rounded once to the tuned model's numbers."""
    wide = _wide(tuned, base)
    return (tuned.to(wide) - base.to(wide)).to(tuned.dtype)


def add_floats(base: Tensor, difference: Tensor) -> Tensor:
    """base + difference in fp32 (fp64 where either is), rounded once to the difference's numbers."""
    wide = _wide(base, difference)
    return (base.to(wide) + difference.to(wide)).to(difference.dtype)


def fit_rows(base: Tensor, n_rows: int, new_rows: NewRows = "zeros") -> Tensor:
    """The first `n_rows` rows of `base`; rows that it lacks are zeros, or the mean of its own, computed in fp32."""
    n_new = n_rows - base.shape[0]
    if n_new <= 0:
        return base[:n_rows]
    fill = torch.zeros_like(base[:1])
    if new_rows == "mean" and base.is_floating_point():
        fill = base.float().mean(dim=0, keepdim=True).to(base.dtype)
    return torch.cat([base, fill.expand(n_new, *base.shape[1:])])


def _wide(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _unsigned(tensor: Tensor) -> np.ndarray:
    size = tensor.dtype.itemsize
    return tensor.contiguous().flatten().view(INTEGERS[size]).numpy().view(UNSIGNED[size])


def _from_unsigned(numbers: np.ndarray, like: Tensor) -> Tensor:
    # numpy's unsigned numbers wrap around by definition; signed overflow in C is nobody's promise.
    integers = INTEGERS[like.dtype.itemsize]
    return torch.from_numpy(numbers.view(f"i{integers.itemsize}")).reshape(like.shape)
