"""Shares and means with their intervals, and the difference of two paired series: what is noise, and what is not.

Knows numbers only. Every interval is of 95 % unless told otherwise, and the same seed gives the same interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
RESULTS = {1: "better", -1: "worse", 0: "no difference beyond noise"}
_BLOCK = 2**20  # numbers drawn at once


class Estimate(NamedTuple):
    """A value between its lower and its upper limit."""

    value: float
    low: float
    high: float


def wilson_interval(n_right: float, n: int, level: float = 0.95) -> Estimate:
    """The share n_right / n with Wilson's score interval (https://doi.org/10.1080/01621459.1927.10502953).

    NaN for n = 0.
    """
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan)
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share = n_right / n
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return Estimate(share, max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale))


def mean_interval(
    values: Sequence[float], *, seed: int = 0, level: float = 0.95, resamples: int = RESAMPLES
) -> Estimate:
    """The mean of records with its bootstrap interval, bias-corrected and accelerated (BCa, Efron 1987,
    https://doi.org/10.1080/01621459.1987.10478410).

    One value, or equal ones, have no spread to be seen: the limits are the mean. NaN without values.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0:
        return Estimate(math.nan, math.nan, math.nan)
    mean = float(data.mean())
    deviations = data - mean
    spread = float(np.square(deviations).sum())
    if spread <= 1e-18 * max(1.0, mean * mean) * data.size:
        return Estimate(mean, mean, mean)
    random = np.random.Generator(np.random.PCG64(seed))
    at_once = max(1, _BLOCK // data.size)
    counts = [min(at_once, resamples - start) for start in range(0, resamples, at_once)]
    blocks = [data[random.integers(0, data.size, (count, data.size))].mean(axis=1) for count in counts]
    means = np.sort(np.concatenate(blocks))
    normal = NormalDist()
    # Ties count half, or a share of few records would look biased.
    below = float(np.searchsorted(means, mean) + np.searchsorted(means, mean, side="right")) / (2 * resamples)
    bias = normal.inv_cdf(min(max(below, 1 / resamples), 1 - 1 / resamples))
    acceleration = float((deviations**3).sum()) / (6 * spread**1.5)
    half = _t_quantile(0.5 + level / 2, data.size - 1) * math.sqrt(data.size / (data.size - 1))
    limits = []
    for quantile in (-half, half):
        z = bias + quantile
        limits.append(float(np.quantile(means, normal.cdf(bias + z / (1 - acceleration * z)))))
    return Estimate(mean, *limits)


def _t_quantile(probability: float, freedom: int) -> float:
    """Student's t, by the expansion of Cornish and Fisher: resampled means of few records vary too little, and what is
    cut off their tails makes good for it (Hesterberg 2015, https://doi.org/10.1080/00031305.2015.1089789)."""
    z = NormalDist().inv_cdf(probability)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def paired_difference(
    before: Sequence[float], after: Sequence[float], *, seed: int = 0, level: float = 0.95, resamples: int = RESAMPLES
) -> Estimate:
    """The mean of after - before over the same records in the same order, with its bootstrap interval over records.

    Raises ValueError for series of different lengths.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} records before and {len(after)} after: they are not the same ones")
    difference = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    return mean_interval(difference.tolist(), seed=seed, level=level, resamples=resamples)


class PairedTest(NamedTuple):
    """The mean difference of the same records with its interval, and whether it is more than noise."""

    difference: Estimate
    n: int
    n_up: int
    n_down: int
    direction: int  # 1: up, -1: down, 0: no difference beyond noise

    def told(self, level: float, is_better: int) -> str:
        """In words; is_better: the direction that is, 1 or -1. level: of the interval."""
        value, low, high = self.difference
        interval = f"{100 * level:g} % interval {low:+.4f} to {high:+.4f}, {self.n} records"
        return f"difference {value:+.4f} ({interval}): {RESULTS[self.direction * is_better]}"


def paired_test(
    before: Sequence[float], after: Sequence[float], *, seed: int = 0, level: float = 0.95, resamples: int = RESAMPLES
) -> PairedTest:
    """Whether records went up or down: their interval does not hold 0, and so many of them changed that chance alone
    would not have moved them all one way.

    Of scores that are 0 or 1 the exact sign test has to agree (McNemar's, exact): resampling takes four more right
    answers among a hundred for proof. Raises ValueError for series of different lengths.
    """
    found = paired_difference(before, after, seed=seed, level=level, resamples=resamples)
    n_up = sum(new > old for old, new in zip(before, after, strict=True))
    n_down = sum(new < old for old, new in zip(before, after, strict=True))
    n_changed, is_binary = n_up + n_down, {*before, *after} <= {0, 1}
    fewer = min(n_up, n_down) if is_binary else 0
    chance = min(1.0, 2 * sum(math.comb(n_changed, k) for k in range(fewer + 1)) / 2**n_changed)
    direction = (found.low > 0) - (found.high < 0)
    return PairedTest(found, len(before), n_up, n_down, direction if chance <= 1 - level else 0)
