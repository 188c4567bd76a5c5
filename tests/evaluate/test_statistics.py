"""Intervals: closed forms, and how often they hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from onecard.statistics import mean_interval, paired_difference, wilson_interval


def test_wilson_interval_of_known_shares() -> None:
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    known = ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718))
    for n_right, n, low, high in known:
        found = wilson_interval(n_right, n)
        assert found.value == n_right / n
        assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)
    assert math.isnan(wilson_interval(0, 0).value)


def test_a_mean_without_spread_and_without_values() -> None:
    assert mean_interval([0.1] * 30) == pytest.approx((0.1, 0.1, 0.1))
    assert mean_interval([2.0]) == (2.0, 2.0, 2.0)
    assert math.isnan(mean_interval([]).value)


def test_the_same_seed_gives_the_same_interval_and_pairs_must_match() -> None:
    values = np.random.default_rng(1).normal(size=40).tolist()
    assert mean_interval(values, seed=3) == mean_interval(values, seed=3) != mean_interval(values, seed=4)
    found = paired_difference([0.0] * 40, values)
    assert found.value == pytest.approx(sum(values) / 40)
    with pytest.raises(ValueError, match="40 records before and 1 after"):
        paired_difference(values, [1.0])


@pytest.mark.parametrize("kind", ["losses", "right or wrong"])
def test_the_paired_interval_holds_the_true_difference_in_95_of_100_runs(kind: str) -> None:
    n_held = 0
    for run in range(1000):
        random = np.random.default_rng(run)
        if kind == "losses":
            shared = random.exponential(size=120)
            before, after, truth = shared, 0.9 * shared + 0.1 * random.exponential(size=120), 0.0
        else:
            before = (random.random(120) < 0.5).astype(float)
            after = np.where(random.random(120) < 0.15, 1.0, before)
            truth = 0.075
        found = paired_difference(before.tolist(), after.tolist(), seed=run, resamples=500)
        n_held += found.low <= truth <= found.high
    assert 930 <= n_held <= 970
