"""Rounding that keeps on the mean what a grid of 16 bits is too coarse for."""

from __future__ import annotations

import pytest
import torch

from onecard.errors import ModelError
from onecard.export.merge.rounding import DoesNotFit, check_fits_fp16, rounded, rounded_sum

TYPES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", TYPES)
def test_a_difference_below_the_grid_is_kept_on_the_mean(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base = (torch.randn(500, 800) * 0.1).to(dtype).float()
    assert torch.equal(rounded_sum("w", base, dtype).float(), base)
    for difference in (1e-5, -1e-5):
        error = rounded_sum("w", base + difference, dtype).float() - base - difference
        assert abs(float(error.mean())) < 0.05 * abs(difference)
        assert abs(float((rounded("w", base + difference, dtype).float() - base).mean())) < 0.7 * abs(difference)
    powers = torch.tensor([sign * 2.0**n for n in range(-24, 15) for sign in (1, -1)] + [0.0])
    assert torch.equal(rounded_sum("w", powers, dtype).float(), powers)
    small = torch.rand(10**6) * 1e-6  # subnormal in fp16
    assert float(rounded_sum("w", small, dtype).float().mean()) == pytest.approx(5e-7, rel=0.02)


@pytest.mark.parametrize("dtype", TYPES)
def test_the_same_name_gives_the_same_bits(dtype: torch.dtype) -> None:
    values = torch.rand(3000, 700, generator=torch.Generator().manual_seed(1))
    assert torch.equal(rounded_sum("a", values, dtype), rounded_sum("a", values, dtype))
    assert not torch.equal(rounded_sum("a", values, dtype), rounded_sum("b", values, dtype))
    assert torch.equal(rounded_sum("a", values, torch.float32), values)


def test_what_does_not_fit_is_named() -> None:
    for round_it in (rounded, rounded_sum):
        with pytest.raises(DoesNotFit, match=r"layer has values up to 7e\+04.*use bf16 or fp32 \(--dtype"):
            round_it("layer", torch.tensor([7e4]), torch.float16)
        with pytest.raises(ModelError, match="layer holds NaN or Inf in the base"):
            round_it("layer", torch.tensor([torch.nan]), torch.bfloat16)
        with pytest.raises(DoesNotFit, match="of at most 1e-07, of which fp16 loses"):
            round_it("layer", torch.full((4,), 1e-7), torch.float16, strict=True)
    check_fits_fp16("zeros", torch.zeros(3))
    check_fits_fp16("usual", torch.tensor([1e-7, 0.5]))
