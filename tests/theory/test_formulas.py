"""The formulas agree with each other where they meet, with known values, and with brute force that shares no code with the engine."""

import collections
import heapq
import itertools
import math

import numpy as np
import pytest
from scipy.integrate import quad

from waveos.bench import theory
from waveos.bench.formulas import (
    Erlang,
    Exponential,
    Fixed,
    Hyperexponential,
    Lognormal,
    fcfs_mean,
    fcfs_quantile,
    fcfs_survival,
    fcfs_variance,
    md1_quantile,
    md1_wait_survival,
    mmc_mean,
    mmc_quantile,
    mmc_survival,
    mmc_variance,
    mmc_wait_probability,
    ps_mean,
    srpt_mean,
    tail_variance,
)
from waveos.ipu_emulator.statistics import mean_interval, quantile_interval, relative_variance

SERVICES = [
    Fixed(1.0),
    Exponential(1.0),
    Erlang(1.0, 4),
    Hyperexponential.balance(1.0, 4.0),
    Hyperexponential.mix((0.9, 0.1), (0.5, 5.5)),
    Lognormal(1.0, 1.5),
]
LOADS = [0.1, 0.5, 0.8, 0.95]
EVERY = pytest.mark.parametrize("service", SERVICES, ids=lambda service: type(service).__name__)
SMOOTH = pytest.mark.parametrize("service", SERVICES[1:], ids=lambda service: type(service).__name__)


def draw(service, n, rng):
    """Service times by numpy's own generators."""
    match service:
        case Fixed():
            return np.full(n, service.mean)
        case Exponential():
            return rng.exponential(service.mean, n)
        case Erlang():
            return rng.gamma(service.stages, service.mean / service.stages, n)
        case Hyperexponential():
            return rng.exponential(rng.choice(service.means, n, p=service.shares))
        case _:
            return rng.lognormal(math.log(service.mean) - service.sigma**2 / 2, service.sigma, n)


def serve_in_order(arrivals, service, servers):
    """Sojourns of a first-come-first-served queue: each request takes the server that is free first."""
    free = [0.0] * servers
    sojourns = np.empty(len(arrivals))
    for i, (arrival, work) in enumerate(zip(arrivals.tolist(), service.tolist(), strict=True)):
        end = max(arrival, free[0]) + work
        heapq.heapreplace(free, end)
        sojourns[i] = end - arrival
    return sojourns


def serve_shortest_first(arrivals, service):
    """Sojourns of one server that always works on what has least left."""
    waiting, sojourns, now = [], np.empty(len(arrivals)), 0.0
    for i, arrival in enumerate([*arrivals.tolist(), math.inf]):
        while waiting and now + waiting[0][0] <= arrival:
            left, which = heapq.heappop(waiting)
            now += left
            sojourns[which] = now - arrivals[which]
        if i < len(arrivals):
            if waiting:
                left, which = waiting[0]
                heapq.heapreplace(waiting, (left - (arrival - now), which))
            now = arrival
            heapq.heappush(waiting, (float(service[i]), i))
    return sojourns


def serve_shared(arrivals, service):
    """Sojourns of one server that gives each of n requests a share 1/n: a clock of attained service orders the departures."""
    present, sojourns, now, attained = [], np.empty(len(arrivals)), 0.0, 0.0
    for i, arrival in enumerate([*arrivals.tolist(), math.inf]):
        while present and now + (present[0][0] - attained) * len(present) <= arrival:
            now += (present[0][0] - attained) * len(present)
            attained, which = heapq.heappop(present)
            sojourns[which] = now - arrivals[which]
        if i < len(arrivals):
            if present:
                attained += (arrival - now) / len(present)
            now = arrival
            heapq.heappush(present, (attained + float(service[i]), i))
    return sojourns


def serve_in_turns(arrivals, service, quantum):
    """Sojourns of one server that works in turns of `quantum`; what runs goes on alone until somebody else waits."""
    waiting, left, sojourns = collections.deque(), service.tolist(), np.empty(len(arrivals))
    times = [*arrivals.tolist(), math.inf]
    now, i, turns_end = 0.0, 0, 0.0
    while i < len(arrivals) or waiting:
        if not waiting:
            now = max(now, times[i])
            waiting.append(i)
            i += 1
        which = waiting.popleft()
        turns_end = now + quantum
        while True:
            done = now + left[which]
            stop = min(done, max(now, turns_end)) if waiting else done
            if times[i] < stop:
                left[which] -= times[i] - now
                now = times[i]
                waiting.append(i)
                i += 1
                continue
            left[which] -= stop - now
            now = stop
            if stop == done:
                sojourns[which] = now - arrivals[which]
            else:
                waiting.append(which)
            break
    return sojourns


@SMOOTH
def test_moments_density_and_survival_describe_one_distribution(service):
    end = service.mean
    while service.survival(end) * end**4 > 1e-9:
        end *= 1.5
    points = [x for x in (0.01, 0.1, 1.0, 5.0, 20.0, 100.0) if x < end]
    for k in (1, 2, 3, 4):
        by_density = quad(lambda x, k=k: x**k * service.density(x), 0, end, points=points, limit=500)[0]
        assert service.moment(k) == pytest.approx(by_density, rel=2e-5)
    assert service.moment(1) == pytest.approx(service.mean)
    assert quad(service.survival, 0, end, points=points, limit=500)[0] == pytest.approx(service.mean, rel=1e-6)
    if (phases := service.phases()) is not None:
        assert phases[0] @ np.linalg.solve(-phases[1], np.ones(len(phases[0]))) == pytest.approx(service.mean)


def test_a_balanced_hyperexponential_has_the_scv_that_was_asked_for():
    service = Hyperexponential.balance(3.0, 4.0)
    assert service.scv == pytest.approx(4.0)
    assert service.shares[0] * service.means[0] == pytest.approx(service.shares[1] * service.means[1])
    with pytest.raises(ValueError, match="at least 1"):
        Hyperexponential.balance(1.0, 0.5)
    with pytest.raises(ValueError, match="sum to 1"):
        Hyperexponential.mix((0.5, 0.6), (1.0, 2.0))


@pytest.mark.parametrize("load", LOADS)
def test_exponential_service_makes_all_mean_formulas_one(load):
    service = Exponential(2.0)
    rate = load / 2.0
    mean = 2.0 / (1 - load)
    assert fcfs_mean(service, rate) == pytest.approx(mean)
    assert mmc_mean(service, rate, 1) == pytest.approx(mean)
    assert ps_mean(service, rate) == pytest.approx(mean)
    assert fcfs_mean(Erlang(2.0, 1), rate) == pytest.approx(mean)
    assert fcfs_mean(Hyperexponential.balance(2.0, 1.0), rate) == pytest.approx(mean)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("q", [0.01, 0.5, 0.99, 0.9999])
def test_the_sojourn_in_mm1_is_exponential_by_every_formula(load, q):
    service = Exponential(2.0)
    exact = -math.log(1 - q) * 2.0 / (1 - load)
    assert mmc_quantile(service, load / 2.0, 1, q) == pytest.approx(exact, rel=1e-8)
    assert fcfs_quantile(service, load / 2.0, q) == pytest.approx(exact, rel=1e-8)
    assert fcfs_quantile(Erlang(2.0, 1), load / 2.0, q) == pytest.approx(exact, rel=1e-8)


@EVERY
@pytest.mark.parametrize("load", LOADS)
def test_no_policy_beats_srpt_and_sharing_shields_from_variability(service, load):
    best = srpt_mean(service, load)
    assert service.mean <= best
    assert best <= min(fcfs_mean(service, load), ps_mean(service, load)) * (1 + 1e-9)
    assert (ps_mean(service, load) <= fcfs_mean(service, load) * (1 + 1e-9)) == (service.scv >= 1 - 1e-9)


def test_srpt_of_nearly_equal_jobs_tends_to_first_come_first_served():
    assert srpt_mean(Erlang(1.0, 1000), 0.7) == pytest.approx(fcfs_mean(Fixed(1.0), 0.7), rel=0.1)
    assert srpt_mean(Erlang(1.0, 50), 0.7) < srpt_mean(Erlang(1.0, 200), 0.7) < srpt_mean(Fixed(1.0), 0.7)


@SMOOTH
def test_srpt_equals_schrage_and_millers_double_integral(service):
    rate = 0.7

    def up_to(x, power):
        return quad(lambda t: t**power * service.density(t), 0, x, limit=200)[0]

    def of_size(x):
        waiting = rate * (up_to(x, 2) + x * x * service.survival(x)) / (2 * (1 - rate * up_to(x, 1)) ** 2)
        return waiting + quad(lambda t: 1 / (1 - rate * up_to(t, 1)), 0, x, epsrel=1e-5)[0]

    nodes, weights = np.polynomial.legendre.leggauss(24)
    edges = np.array([0, 0.25, 0.75, 2.0, 6.0, 20.0, 80.0])
    total = sum(
        (b - a)
        / 2
        * sum(
            w * of_size(x) * service.density(x) for x, w in zip((a + b) / 2 + (b - a) / 2 * nodes, weights, strict=True) if service.density(x) > 1e-9
        )
        for a, b in itertools.pairwise(edges)
    )
    assert srpt_mean(service, rate) == pytest.approx(total, rel=2e-4)


def test_erlangs_c_has_its_textbook_values():
    assert mmc_wait_probability(Exponential(1.0), 0.6, 1) == pytest.approx(0.6)
    assert mmc_wait_probability(Exponential(1.0), 1.0, 2) == pytest.approx(1 / 3)  # 2 r² / (1 + r) at r = 1/2
    offered, servers = 8.0, 10
    direct = offered**servers / math.factorial(servers) * servers / (servers - offered)
    direct /= sum(offered**k / math.factorial(k) for k in range(servers)) + direct
    assert mmc_wait_probability(Exponential(1.0), offered, servers) == pytest.approx(direct)


@pytest.mark.parametrize(("servers", "load"), [(1, 0.5), (2, 0.5), (3, 0.9), (8, 0.8), (8, 7 / 8)])
def test_the_sojourn_law_of_mmc_integrates_to_its_mean(servers, load):
    service = Exponential(1.0)
    rate = load * servers
    area = quad(lambda t: mmc_survival(service, rate, servers, t), 0, math.inf, limit=500)[0]
    assert area == pytest.approx(mmc_mean(service, rate, servers), rel=1e-7)


def test_the_sojourn_law_of_mmc_is_continuous_where_its_two_rates_meet():
    service = Exponential(1.0)  # with two servers c mu - rate = mu at rate 1
    around = [mmc_survival(service, rate, 2, 3.0) for rate in (1 - 1e-7, 1.0, 1 + 1e-7)]
    assert around == sorted(around)
    assert around[1] == pytest.approx((around[0] + around[2]) / 2, rel=1e-9)


@pytest.mark.parametrize("load", LOADS)
def test_the_waiting_law_of_md1_is_erlangs_of_1909_where_that_can_be_summed(load):
    for t in (0.0, 0.3, 1.0, 2.5, 5.9):
        alternating = (1 - load) * sum((load * (k - t)) ** k / math.factorial(k) * math.exp(-load * (k - t)) for k in range(math.floor(t) + 1))
        assert md1_wait_survival(Fixed(1.0), load, t) == pytest.approx(1 - alternating, abs=1e-11)


@pytest.mark.parametrize("load", LOADS)
def test_the_waiting_law_of_md1_integrates_to_pollaczek_and_khinchine(load):
    end = 20 / (1 - load)
    points = list(range(1, min(40, int(end))))
    area = quad(lambda t: md1_wait_survival(Fixed(1.0), load, t), 0, end, points=points, limit=2000, epsrel=1e-8)[0]
    assert 1 + area == pytest.approx(fcfs_mean(Fixed(1.0), load), rel=1e-6)


def test_the_tail_of_md1_stays_monotone_and_exponential_far_out():
    service = Fixed(1.0)
    tail = [md1_wait_survival(service, 0.9, float(t)) for t in range(0, 100, 5)]
    assert all(a > b > 0 for a, b in itertools.pairwise(tail))
    ratios = [b / a for a, b in itertools.pairwise(tail[4:])]
    assert max(ratios) - min(ratios) < 1e-6 * max(ratios)
    assert md1_quantile(service, 0.9, 0.99) == pytest.approx(fcfs_quantile(Erlang(1.0, 30), 0.9, 0.99), rel=0.04)


@pytest.mark.parametrize("service", [s for s in SERVICES if s.phases() is not None], ids=lambda service: type(service).__name__)
def test_the_sojourn_law_of_phase_type_service_integrates_to_its_mean(service):
    area = quad(lambda t: fcfs_survival(service, 0.6, t), 0, 300, limit=500, points=[1, 5, 20, 80])[0]
    assert area == pytest.approx(fcfs_mean(service, 0.6), rel=1e-6)


def test_there_is_no_exact_quantile_for_a_lognormal():
    with pytest.raises(ValueError, match="phase-type"):
        fcfs_quantile(Lognormal(1.0, 1.0), 0.5, 0.99)


@EVERY
def test_theory_ends_at_saturation(service):
    for formula in (fcfs_mean, ps_mean, srpt_mean, fcfs_variance):
        with pytest.raises(ValueError, match="below 1"):
            formula(service, 1.0)
    with pytest.raises(ValueError, match="below 1"):
        mmc_mean(Exponential(1.0), 2.0, 2)


@pytest.mark.parametrize("load", LOADS)
def test_the_variance_that_plans_run_lengths_is_one_in_three_derivations(load):
    whitt = 2 * (1 + load) / (1 - load) ** 2 + 1 - 2 / (1 - load)
    assert relative_variance(load) == pytest.approx(whitt)
    assert fcfs_variance(Exponential(3.0), load / 3.0) == pytest.approx(whitt)
    assert mmc_variance(Exponential(3.0), load / 3.0, 1) == pytest.approx(whitt, rel=1e-6)
    assert mmc_variance(Exponential(3.0), 8 * load / 3.0, 8) < whitt


def lindley(service, load, n, seed):
    """Sojourns of M/G/1 by Lindley's recursion, the first tenth left out."""
    rng = np.random.default_rng(seed)
    work = draw(service, n, rng)
    walk = np.concatenate([[0.0], np.cumsum(work[:-1] - rng.exponential(1 / load, n - 1))])
    return (walk - np.minimum.accumulate(walk) + work)[n // 10 :]


@EVERY
@pytest.mark.parametrize("load", [0.3, 0.7])
def test_brute_force_first_come_first_served_finds_the_means_and_tails(service, load):
    run = lindley(service, load, 1_000_000, seed=12)
    mean = mean_interval(run, batches=64, confidence=0.999)
    assert mean.holds(fcfs_mean(service, load))
    assert mean.half_width < 0.08 * mean.value
    if not isinstance(service, Lognormal):
        tail = quantile_interval(run, 0.99, batches=64, confidence=0.999)
        assert tail.holds(fcfs_quantile(service, load, 0.99))
        assert tail.half_width < 0.1 * tail.value


@EVERY
def test_brute_force_finds_the_variance_that_plans_run_lengths(service):
    runs = [lindley(service, 0.5, 100_000, seed) for seed in range(60)]
    means = np.array([run.mean() for run in runs])
    seen = means.var(ddof=1) * len(runs[0]) / fcfs_mean(service, 0.5) ** 2
    assert seen == pytest.approx(fcfs_variance(service, 0.5), rel=0.5)  # 60 runs know a variance to some 18 %


@pytest.mark.parametrize("service", [s for s in SERVICES if not isinstance(s, Lognormal)], ids=lambda service: type(service).__name__)
def test_the_planned_variance_of_a_p99_is_about_that_of_brute_force(service):
    run = lindley(service, 0.5, 1_000_000, seed=5)
    exact = fcfs_quantile(service, 0.5, 0.99)
    half_width = quantile_interval(run, 0.99, batches=128).half_width
    seen = (half_width / 1.98 / exact) ** 2 * len(run)
    assert (
        0.6 * seen
        < tail_variance(lambda t: fcfs_survival(service, 0.5, t), exact, 0.99, fcfs_variance(service, 0.5), fcfs_mean(service, 0.5))
        < 2.5 * seen
    )


@pytest.mark.parametrize(("servers", "load"), [(2, 0.7), (8, 0.8)])
def test_brute_force_with_many_servers_finds_mmc(servers, load):
    rng = np.random.default_rng(3)
    n = 200_000
    run = serve_in_order(np.cumsum(rng.exponential(1 / (load * servers), n)), rng.exponential(1.0, n), servers)[n // 10 :]
    assert mean_interval(run, confidence=0.999).holds(mmc_mean(Exponential(1.0), load * servers, servers))
    assert quantile_interval(run, 0.99, confidence=0.999).holds(mmc_quantile(Exponential(1.0), load * servers, servers, 0.99))


@EVERY
@pytest.mark.parametrize(("serve", "formula"), [(serve_shared, ps_mean), (serve_shortest_first, srpt_mean)])
def test_brute_force_sharing_and_shortest_first_find_their_means(service, serve, formula):
    rng = np.random.default_rng(4)
    n = 100_000
    run = serve(np.cumsum(rng.exponential(1 / 0.6, n)), draw(service, n, rng))[n // 10 :]
    interval = mean_interval(run, confidence=0.999)
    assert interval.holds(formula(service, 0.6))
    assert interval.half_width < 0.1 * interval.value


SHARED = [system for system in theory.systems() if system.policy == "round_robin" and system.workers == 1]
UNPLANNED = [system for system in theory.systems() if system.policy in ("round_robin", "srpt") and system.workers == 1]


def requests_of(system, n, seed):
    """Arrivals and service times, in mean service times."""
    rng = np.random.default_rng(seed)
    return np.cumsum(rng.exponential(1 / system.load, n)), draw(system.service, n, rng) / system.service.mean


@pytest.mark.parametrize("system", SHARED, ids=lambda system: system.name)
def test_the_quanta_of_the_theory_bench_are_small_enough_to_be_processor_sharing(system):
    arrivals, work = requests_of(system, 60_000, seed=6)
    exact = serve_shared(arrivals, work)
    turns = serve_in_turns(arrivals, work, system.params["quantum_us"] * 1000 / system.service.mean)
    bias = mean_interval(turns - exact, confidence=0.999)
    assert abs(bias.value) < 0.001 * exact.mean() + bias.half_width
    assert bias.half_width < 0.001 * exact.mean()


@pytest.mark.parametrize("system", UNPLANNED, ids=lambda system: f"{system.name} {system.load}")
def test_the_variances_in_the_theory_bench_are_those_of_brute_force(system):
    serve = serve_shared if system.policy == "round_robin" else serve_shortest_first
    seen = []
    for seed in range(3):
        run = serve(*requests_of(system, 50_000, seed))[2_000:]
        seen.append((mean_interval(run, batches=64).half_width / 1.998) ** 2 * len(run) / (system.mean_ns / system.service.mean) ** 2)
    assert system.mean_variance == pytest.approx(np.mean(seen), rel=0.5)
