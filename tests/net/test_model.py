"""The network's model against queueing theory, and its own accounts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from waveos.bench import formulas
from waveos.errors import ConfigError
from waveos.ipu_emulator.net import RequestClass, Setup, simulate

US = 1e-6
ALL = [RequestClass(1.0, 10_000.0)]


def test_equal_seeds_give_equal_results_and_others_do_not() -> None:
    setup = Setup("power_of_two", 4, ALL)
    first, again, other = (simulate(setup, 3e5, requests=5_000, seed=seed).latency for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("bound", [1, 8])
def test_a_single_queue_is_as_busy_as_its_load_and_as_late_as_theory_says(bound: int) -> None:
    outcome = simulate(Setup("jbsq", 1, ALL, params={"bound": bound}), 0.7e5, requests=200_000)
    assert outcome.workers_busy == pytest.approx(0.7, rel=0.03)
    assert outcome.quantile_us(0.9) == pytest.approx(formulas.mmc_quantile(formulas.Exponential(10 * US), 0.7e5, 1, 0.9) / US, rel=0.08)


def test_without_load_the_latency_is_the_sum_of_its_parts() -> None:
    setup = Setup(
        "jbsq",
        4,
        [RequestClass(1.0, 10_000.0, form="fixed")],
        stack_cores=2,
        stack_in_ns=1_000,
        stack_out_ns=500,
        message_ns=200,
        decision_ns=100,
        to_agent_ns=50,
        to_host_ns=800,
        pick_up_ns=300,
    )
    outcome = simulate(setup, 100.0, requests=300)
    assert outcome.quantile_us(0.5) == pytest.approx(10 + 1 + 0.5 + 0.2 + 0.1 + 0.05 + 0.8 + 0.3, rel=0.01)
    assert outcome.stack_cores_busy == pytest.approx(100 * 1.5e-6, rel=0.2)


def test_an_agent_that_is_too_slow_is_where_requests_wait() -> None:
    fast, slow = (simulate(Setup("jbsq", 8, ALL, message_ns=ns), 4e5, requests=20_000) for ns in (10, 1_200))
    assert slow.agent_cores_busy > 0.9 > fast.agent_cores_busy
    assert slow.quantile_us(0.5) > 2 * fast.quantile_us(0.5)


def test_what_knows_the_class_keeps_short_requests_from_waiting_behind_long_ones() -> None:
    classes = [RequestClass(0.98, 10_000.0, form="fixed", slo_ns=100_000), RequestClass(0.02, 1_000_000.0, form="fixed", slo_ns=20_000_000)]
    rss, slo = (simulate(Setup(policy, 8, classes), 0.6 * 8 / 29.8e-6, requests=50_000) for policy in ("rss", "slo_steering"))
    assert slo.quantile_us(0.99, 0) < rss.quantile_us(0.99, 0) / 2


def test_workers_that_take_the_next_deadline_first_serve_the_same_work_with_less_of_it_late() -> None:
    classes = [RequestClass(0.5, 10_000.0, form="fixed", slo_ns=50_000), RequestClass(0.5, 10_000.0, form="fixed", slo_ns=5_000_000)]
    plain = Setup("rss", 4, classes)
    in_order, by_deadline = (simulate(replace(plain, workers_sort=each), 0.8 * 4 / 10e-6, requests=20_000) for each in (False, True))
    assert by_deadline.mean_us == pytest.approx(in_order.mean_us, rel=0.02), "equal work: the order does not change the mean"
    assert by_deadline.quantile_us(0.99, 0) < in_order.quantile_us(0.99, 0) / 1.5
    assert by_deadline.quantile_us(0.99, 1) > in_order.quantile_us(0.99, 1)


def test_shed_requests_are_counted() -> None:
    classes = [RequestClass(1.0, 10_000.0, slo_ns=50_000)]
    outcome = simulate(Setup("admission", 2, classes), 3e5, requests=20_000)
    assert 0.2 < outcome.shed / outcome.counted < 0.6


@pytest.mark.parametrize("setup", [Setup("rss", 0, ALL), Setup("rss", 1_000, ALL), Setup("rss", 2, [RequestClass(1.0, 10.0, form="odd")])])
def test_a_setup_that_cannot_be_is_one_line(setup: Setup) -> None:
    with pytest.raises(ConfigError):
        simulate(setup, 1e5, requests=100)
