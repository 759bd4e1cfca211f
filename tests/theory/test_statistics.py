"""Intervals hold the truth as often as they say, also where successive samples depend on each other."""

import math

import numpy as np
import pytest

from waveos.ipu_emulator.statistics import Interval, length_for, mean_interval, quantile_interval, relative_variance, requests_for


def sojourns(seed, load, n, warmup=20_000):
    """Successive sojourn times of M/M/1 with mean service 1, by Lindley's recursion written as a running minimum."""
    rng = np.random.default_rng(seed)
    service = rng.exponential(1.0, n + warmup)
    gaps = rng.exponential(1 / load, n + warmup)
    walk = np.concatenate([[0.0], np.cumsum(service[:-1] - gaps[1:])])
    return (walk - np.minimum.accumulate(walk) + service)[warmup:]


def test_an_interval_of_independent_samples_is_students():
    samples = np.array([3.0, 5.0, 4.0, 8.0])
    interval = mean_interval(samples, batches=4)
    assert interval.value == 5.0
    assert interval.half_width == pytest.approx(3.182446305 * samples.std(ddof=1) / 2)
    assert interval.holds(5.0)
    assert not interval.holds(-5.0)


def test_samples_that_fill_no_batch_are_the_oldest_ones():
    assert mean_interval(np.array([1000.0, 1.0, 2.0, 3.0, 4.0]), batches=2).value == 2.5


def test_equal_samples_have_an_interval_of_no_width():
    same = np.full(100, 7)
    assert mean_interval(same) == Interval(7, 7, 7)
    assert quantile_interval(same, 0.99) == Interval(7, 7, 7)


def test_one_sample_bounds_nothing():
    assert mean_interval(np.array([5])) == Interval(5, -math.inf, math.inf)
    assert quantile_interval(np.array([5]), 0.5) == Interval(5, -math.inf, math.inf)


def test_a_quantile_that_the_run_is_too_short_for_has_no_upper_end():
    rng = np.random.default_rng(1)
    interval = quantile_interval(rng.exponential(1.0, 300), 0.99, batches=10)
    assert interval.high == math.inf
    assert 0 < interval.low <= interval.value


def test_quantiles_of_independent_samples_are_their_order_statistics():
    interval = quantile_interval(np.arange(1, 101), 0.9, batches=100)
    assert interval.value == 90
    assert interval.low < 90 < interval.high
    assert interval.half_width == pytest.approx(1.984 * 0.3 * 100 / math.sqrt(100), abs=1.0)  # n q(1-q) has the standard deviation 3


@pytest.mark.parametrize("bad", [0.0, 1.0, -0.5, 99])
def test_a_quantile_outside_0_to_1_is_refused(bad):
    with pytest.raises(ValueError, match="between 0 and 1"):
        quantile_interval(np.arange(10), bad)


def test_an_empty_run_and_a_single_batch_are_refused():
    with pytest.raises(ValueError, match="no samples"):
        mean_interval(np.array([]))
    with pytest.raises(ValueError, match="2 batches"):
        mean_interval(np.arange(10), batches=1)


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_intervals_of_a_queue_hold_the_truth_in_95_of_100_runs(load):
    n = length_for(0.03, relative_variance(load))
    runs = [sojourns(seed, load, n) for seed in range(300)]
    truth = 1 / (1 - load)
    covered_mean = np.mean([mean_interval(run).holds(truth) for run in runs])
    covered_p99 = np.mean([quantile_interval(run, 0.99).holds(truth * math.log(100)) for run in runs])
    # 300 runs: the standard error of a share of 0.95 is 0.0126
    assert 0.912 <= covered_mean <= 0.988
    assert 0.912 <= covered_p99 <= 0.988


def test_the_interval_of_independent_samples_would_be_far_too_narrow_for_a_queue():
    runs = [sojourns(seed, 0.7, 40_000) for seed in range(40)]
    naive = np.mean([mean_interval(run, batches=len(run)).holds(1 / 0.3) for run in runs])
    assert naive < 0.6


@pytest.mark.parametrize("load", [0.3, 0.5, 0.7])
def test_a_planned_run_has_the_half_width_that_was_wished(load):
    n = requests_for(0.02, load)
    widths = [mean_interval(sojourns(seed, load, n), batches=64).half_width * (1 - load) for seed in range(60)]
    assert np.mean(widths) == pytest.approx(0.02, rel=0.08)


def test_run_lengths_grow_with_load_variability_and_precision():
    base = requests_for(0.01, 0.5)
    assert requests_for(0.01, 0.8) > 5 * base
    assert requests_for(0.01, 0.5, scv=4.0) > 2 * base
    assert requests_for(0.005, 0.5) == pytest.approx(4 * base, rel=1e-4)
    assert requests_for(0.01, 0.0, scv=0.0) == 0


def test_a_load_at_saturation_has_no_run_length():
    with pytest.raises(ValueError, match="below 1"):
        requests_for(0.01, 1.0)
    with pytest.raises(ValueError, match="positive"):
        requests_for(0.0, 0.5)
