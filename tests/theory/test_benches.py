"""The benches judge: they simulate what users simulate, and they say so when the engine and theory part."""

import math
from dataclasses import replace

import numpy as np
import pytest

from waveos.bench import theory
from waveos.bench.formulas import Erlang, Exponential, Fixed, Hyperexponential, Lognormal, Service
from waveos.bench.machine import describe_machine
from waveos.errors import ConfigError, WaveError
from waveos.ipu_emulator.profile import load_host, load_link
from waveos.ipu_emulator.sched import simulate
from waveos.policy import policy_names


def order_for(system, seed=1, requests=20_000):
    return system.order(seed)._replace(requests=requests)


def see(order):
    """What one run finds, in this process."""
    measured = theory.Measured(order, 0)
    while not measured.advance(50_000_000):
        pass
    return measured.result()


def find(name):
    return next(system for system in theory.systems() if system.name == name)


def test_there_are_at_least_20_cases_of_all_kinds():
    systems = theory.systems()
    assert sum(1 + (not math.isnan(system.p99_ns)) for system in systems) >= 20
    assert {type(system.service) for system in systems} == {Fixed, Exponential, Erlang, Hyperexponential, Lognormal}
    assert {system.policy for system in systems} == {"fifo", "round_robin", "srpt"}
    assert {system.policy for system in systems} <= set(policy_names())
    assert {system.workers for system in systems} >= {1, 2, 8}


def test_nothing_costs_anything_and_nothing_is_special():
    for system in theory.systems():
        setup = theory.setup_for(order_for(system))
        assert (setup.host, setup.link, setup.placement, setup.message_ns) == ("ideal", "ideal", "offload", 0)
    for profile in (load_host("ideal"), load_link("ideal")):
        numbers = [
            value
            for key, value in _leaves(profile.model_dump())
            if isinstance(value, int | float) and not isinstance(value, bool) and key.endswith("_ns")
        ]
        assert numbers
        assert not any(numbers)


def _leaves(table):
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _leaves(value)
        else:
            yield key, value


@pytest.mark.parametrize(
    "service",
    [Fixed(1e5), Exponential(1e5), Erlang(1e5, 4), Hyperexponential.balance(1e5, 2.0), Lognormal(1e5, 1.0)],
    ids=lambda service: type(service).__name__,
)
def test_the_engine_draws_the_service_times_that_the_formulas_mean(service):
    order = theory.Order("fifo", {}, 64, 64 * 0.02 / service.mean * 1e9, service, 3, 60_000, False)  # nobody waits: a sojourn is a service time
    samples = simulate(theory.setup_for(order)).samples["sojourn_ns"].astype(float)
    error = math.sqrt((service.moment(2) - service.mean**2) / len(samples))
    assert samples.mean() == pytest.approx(service.mean, abs=4 * error + 1)
    for q in (0.1, 0.5, 0.9, 0.99):
        below = np.mean(samples <= np.quantile(samples, q))
        exact = 1 - service.survival(float(np.quantile(samples, q)) + 1)
        assert exact == pytest.approx(below, abs=5 * math.sqrt(q * (1 - q) / len(samples)) + 1e-4)


def test_the_engine_draws_no_distribution_it_does_not_know():
    with pytest.raises(ValueError, match="draws no Service"):
        theory.engine_service(Service(1.0))


@pytest.mark.parametrize("name", ["M/M/1", "M/M/8", "M/D/1", "M/H2/1", "M/M/1-PS", "M/LN/1-SRPT"])
def test_short_runs_hold_the_theory(name):
    system = find(name)
    runs = [see(order_for(system, seed, 40_000)) for seed in range(5)]
    for row in theory._judge(system, runs):
        assert row["covered"] >= 3
        assert abs(row["bias_share"]) < 0.1


def test_a_theory_that_is_5_percent_off_is_not_held():
    system = find("M/M/8")
    runs = [see(order_for(system, seed, 60_000)) for seed in range(4)]
    wrong = replace(system, mean_ns=1.05 * system.mean_ns, p99_ns=0.95 * system.p99_ns)
    assert [row["covered"] for row in theory._judge(wrong, runs)] == [0, 0]


def test_the_verdict_names_what_fell_short():
    metrics = {"max_half_width_share_mean": 0.008, "max_half_width_share_p99": 0.018, "covered_share": 0.95, "pairs": 1000}
    assert theory._conclude(metrics).startswith("agrees")
    for key, value in (("max_half_width_share_mean", 0.011), ("max_half_width_share_p99", 0.03), ("covered_share", 0.9)):
        assert theory._conclude(metrics | {key: value}).startswith("does not agree")


def test_an_overloaded_queue_is_an_error_and_no_row():
    overloaded = replace(find("M/M/1"), load=3.0)
    with pytest.raises(WaveError, match="not one of a queue in balance"):
        see(order_for(overloaded, requests=40_000))


def test_run_lengths_are_fixed_beforehand_and_grow_with_the_load():
    for name in ("M/M/1", "M/M/8", "M/D/1", "M/M/1-SRPT"):
        lengths = [system.requests for system in theory.systems() if system.name == name]
        assert lengths == sorted(lengths)
        assert lengths[0] >= 50 * theory.BATCHES


def test_the_machine_is_described():
    machine = describe_machine()
    assert machine["cores"] >= 1
    assert machine["cpu"]
    assert machine["kernel"]
    assert str(machine["numba"])[0].isdigit()


class TestEngine:
    """bench/engine.py, where SimPy is installed."""

    @pytest.fixture
    def engine(self):
        pytest.importorskip("simpy")
        from waveos.bench import engine

        return engine

    def test_both_simulators_find_the_same_queue(self, engine):
        ours = [engine.simulate_mmc(60_000, seed) for seed in range(3)]
        theirs = [engine.simulate_with_simpy(20_000, seed) for seed in range(3)]
        means = engine._check_agreement(ours, theirs)
        assert abs(means[0].value - means[1].value) < 0.1 * means[1].value

    def test_speeds_of_different_queues_are_not_compared(self, engine):
        ours = [engine.simulate_mmc(60_000, seed) for seed in range(3)]
        theirs = [timed._replace(sojourns_ns=timed.sojourns_ns * 1.2) for timed in ours]
        with pytest.raises(WaveError, match="not the same queue"):
            engine._check_agreement(ours, theirs)

    def test_it_prints_flat_numbers(self, engine):
        result = engine.run(rounds=1, jobs=40_000, simpy_jobs=10_000, requests=20_000, scenario="ghost-rocksdb", load=0.5)
        assert set(result) >= {"name", "metrics", "machine", "timing"}
        assert result["timing"] == "measured"
        assert {"mmc_jobs_per_s", "simpy_mmc_jobs_per_s", "mmc_ratio", "offload_requests_per_s"} <= set(result["metrics"])
        assert all(isinstance(value, int | float) and value > 0 for value in result["metrics"].values())

    def test_a_load_beyond_capacity_is_refused(self, engine):
        with pytest.raises(ConfigError, match="load"):
            engine.run(load=1.5)
