"""Intervals: against resampling one prompt at a time, and how often they hold the truth."""

import numpy as np
import pytest

from jaxhybrid.evaluate.bootstrap import mean_interval, over_runs, ratio_interval, resampled, wilson


def test_resampling_is_that_of_drawing_prompts_one_by_one():
    rng = np.random.default_rng(1)
    tops, bottoms = rng.random(30) * 3, rng.integers(1, 5, 30).astype(float)
    drawn = rng.integers(0, 30, (4000, 30))
    plain = np.quantile([tops[d].sum() / bottoms[d].sum() for d in drawn], [0.025, 0.975])
    np.testing.assert_allclose(resampled(tops, bottoms), plain, rtol=0.03)
    assert resampled(tops, bottoms) == resampled(tops, bottoms)


def test_prompts_that_count_nothing_are_left_out():
    found = ratio_interval(np.array([1.0, 0.0, 0.0, 2.0]), np.array([1.0, 2.0, 0.0, 2.0]))
    assert found["share"] == pytest.approx(3 / 5)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_prompts_that_all_agree_are_not_sure_to_the_last_digit(value):
    found = mean_interval(np.full(40, value))
    assert found["share"] == value
    assert (found["low"], found["high"]) == wilson(value, 40)
    assert found["high"] - found["low"] > 0.05


def test_intervals_hold_the_true_mean_nineteen_times_in_twenty():
    rng, inside = np.random.default_rng(0), 0
    for _ in range(100):
        found = mean_interval((rng.random((80, 4)) < 0.8).mean(1))
        inside += found["low"] <= 0.8 <= found["high"]
    assert 0.90 <= inside / 100 <= 1.0


def test_runs_have_students_interval():
    found = over_runs([0.1, 0.2, 0.6])
    assert found["mean"] == pytest.approx(0.3)
    # mean 0.3, deviation 0.2646, 2 degrees of freedom: t 4.303
    assert (found["low"], found["high"]) == pytest.approx((0.3 - 0.6572, 0.3 + 0.6572), abs=1e-3)
    assert over_runs([0.5]) == {"mean": 0.5, "low": None, "high": None}
