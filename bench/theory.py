"""The engine against queueing theory: means and 99th percentiles, each with a 95 % interval, over many seeds.

Every system is simulated by the engine as users get it: the compiled policy behind its function pointer, messages and decisions over a link, all costs
0. Its sojourn times are held against `waveos.bench.formulas`. A case is one formula of one system; `covered_share` is the share of all pairs of case
and seed whose interval holds the theory (an honest 95 % interval misses one in twenty), and `max_half_width_share` the widest interval of any
pair of a mean, as a share of the theoretical value; `max_half_width_share_p99` that of any pair of a 99th percentile.

How long a run is, is decided before it from the asymptotic variance (`formulas.fcfs_variance`, `mmc_variance`, `tail_variance`) for half-widths
of 1 % (means) and 2 % (p99) and lengthened by a margin, because the widest of some thousand intervals is meant, and an interval's own width varies; it
never depends on what the run shows. Processor sharing and SRPT have no such formula (and the tail of M/M/8 is far less correlated than
`tail_variance` assumes): their variances stand in the table and come from a brute-force simulation that shares no code with the engine, of which
`tests/theory/test_formulas.py` has a shorter form.

Processor sharing is round robin with a small quantum. Its bias falls with the quantum; with exponential service it is 0 whatever the quantum, since no
order that ignores service times changes the number in system. For the others the quanta are such that the same brute force, paired with exact
processor sharing, finds a bias of at most 0.1 % of the mean, a tenth of the half-width.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from waveos.bench import formulas
from waveos.bench.formulas import Erlang, Exponential, Fixed, Hyperexponential, Lognormal, Service
from waveos.bench.machine import describe_machine
from waveos.errors import WaveError
from waveos.ipu_emulator.statistics import Interval, length_for, mean_interval, quantile_interval

if TYPE_CHECKING:
    from waveos.ipu_emulator.sched import Service as EngineService
    from waveos.ipu_emulator.sched import Setup

OPTIONS = {
    "seed": (1, "seeds of all runs are derived from it"),
    "seeds": (40, "independent runs of each system"),
    "quick": (False, "five runs of each system: for a first look and for CI; the share covered is then known to some 2 %"),
    "processes": (0, "processes that simulate; 0: one a core"),
}
QUICK_SEEDS = 5
MEAN_SHARE, P99_SHARE = 0.01, 0.02
"""Wished half-widths as shares of the theoretical value."""
COVERED_SHARE = 0.93
"""Of the intervals, at least."""
BATCHES = 256
MEAN_MARGIN, P99_MARGIN = 1.8, 2.4
"""By how much runs are longer than the asymptotic variance asks for: an interval's own width varies by some 5 % (means) and 8 % (p99), and the widest of
some thousand is meant. In brute force (200 runs of each system) the widest were 0.89 % and 1.71 %."""
WARMUP_SHARE = 0.03
"""Of a run's requests that come before the first that counts; the longest memory of any system here is some hundred requests."""
SERVICE_NS = 100_000.0
"""Mean service time in every system: long against the nanosecond that times are rounded to."""


@dataclass(frozen=True)
class System:
    """A queue, what serves it, and what theory says about its sojourn times, ns. A variance is n Var / value² as `formulas.fcfs_variance` has it."""

    name: str
    policy: str
    workers: int
    load: float
    service: Service
    mean_ns: float
    mean_variance: float
    p99_ns: float = math.nan
    p99_variance: float = 0.0
    params: dict[str, float] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Arrivals per ns."""
        return self.load * self.workers / self.service.mean

    @property
    def requests(self) -> int:
        """How many requests of a run count."""
        for_mean = MEAN_MARGIN * length_for(MEAN_SHARE, self.mean_variance)
        for_p99 = 0.0 if math.isnan(self.p99_ns) else P99_MARGIN * length_for(P99_SHARE, self.p99_variance)
        return math.ceil(max(for_mean, for_p99, 50 * BATCHES))

    def order(self, seed: int) -> Order:
        """One run of it."""
        tail = not math.isnan(self.p99_ns)
        return Order(self.policy, self.params, self.workers, self.rate * 1e9, self.service, seed, self.requests, tail)


class Order(NamedTuple):
    """One run, as it travels to the process that simulates it."""

    policy: str
    params: dict[str, float]
    workers: int
    per_s: float
    service: Service
    seed: int
    requests: int
    tail: bool  # the 99th percentile is wanted


class Seen(NamedTuple):
    """What one run found."""

    mean: Interval
    p99: Interval | None
    requests: int
    wall_s: float


def run(seed: int = 1, seeds: int = 40, quick: bool = False, processes: int = 0) -> dict[str, Any]:
    """Simulate every system with every seed; metrics, one row a case, and a verdict."""
    chosen = systems()
    found: list[list[Seen]] = [[] for _ in chosen]
    for index, seen in _simulate(chosen, seed, QUICK_SEEDS if quick else seeds, processes):
        found[index].append(seen)
    rows = [row for system, runs in zip(chosen, found, strict=True) for row in _judge(system, runs)]
    widest = {what: max(row["half_width_share"] for row in rows if row["what"] == what) for what in ("mean", "p99")}
    pairs = sum(row["runs"] for row in rows)
    metrics = {
        "cases": len(rows),
        "systems": len(chosen),
        "pairs": pairs,
        "requests": sum(each.requests for runs in found for each in runs),
        "max_half_width_share": widest["mean"],
        "max_half_width_share_mean": widest["mean"],
        "max_half_width_share_p99": widest["p99"],
        "covered_share": sum(row["covered"] for row in rows) / pairs,
        "max_bias_share": max(abs(row["bias_share"]) for row in rows),
    }
    return {"name": "theory", "metrics": metrics, "machine": describe_machine(), "timing": "modelled", "verdict": _conclude(metrics), "rows": rows}


@cache
def systems() -> list[System]:
    """The systems, with what theory says of each. Loads are such that a run takes a second or two."""
    exponential = Exponential(SERVICE_NS)
    fixed = Fixed(SERVICE_NS)
    erlang = Erlang(SERVICE_NS, 4)
    mixed = Hyperexponential.balance(SERVICE_NS, 2.0)
    lognormal = Lognormal(SERVICE_NS, 0.6)
    return [
        *(_in_order("M/M/1", load, exponential) for load in (0.3, 0.45)),
        _in_order("M/M/1", 0.6, exponential, p99=False),
        _in_order("M/M/2", 0.4, exponential, 2),
        _in_order("M/M/2", 0.6, exponential, 2, p99=False),
        *(_in_order("M/M/8", load, exponential, 8) for load in (0.5, 0.7)),
        _in_order("M/M/8", 0.8, exponential, 8, p99_variance=30.0),
        *(_in_order("M/D/1", load, fixed) for load in (0.4, 0.55)),
        _in_order("M/D/1", 0.7, fixed, p99=False),
        _in_order("M/E4/1", 0.5, erlang),
        _in_order("M/E4/1", 0.65, erlang, p99=False),
        _in_order("M/H2/1", 0.25, mixed),
        _in_order("M/H2/1", 0.35, mixed, p99=False),
        *(_in_order("M/LN/1", load, lognormal) for load in (0.3, 0.45)),
        _shared("M/M/1-PS", 0.4, exponential, 10.0),
        _shared("M/M/2-RR", 0.5, exponential, 20.0, 2),
        _shared("M/E4/1-PS", 0.3, erlang, 5.0, variance=1.6),
        _shared("M/H2/1-PS", 0.2, mixed, 5.0, variance=4.1),
        _shared("M/LN/1-PS", 0.3, lognormal, 5.0, variance=2.4),
        _shortest_first("M/M/1-SRPT", 0.5, exponential, 3.5),
        _shortest_first("M/M/1-SRPT", 0.7, exponential, 10.8),
        _shortest_first("M/D/1-SRPT", 0.6, fixed, 3.5),
        _shortest_first("M/E4/1-SRPT", 0.6, erlang, 3.0),
        _shortest_first("M/H2/1-SRPT", 0.6, mixed, 9.0),
        _shortest_first("M/LN/1-SRPT", 0.6, lognormal, 4.0),
    ]


def _in_order(name: str, load: float, service: Service, workers: int = 1, p99: bool = True, p99_variance: float = 0.0) -> System:
    """First come, first served; `p99` where it is a case as well and there is a formula. `p99_variance` in the place of `tail_variance`'s."""
    rate = load * workers / service.mean
    survival: Callable[[float], float]
    if isinstance(service, Exponential):
        mean, variance = formulas.mmc_mean(service, rate, workers), formulas.mmc_variance(service, rate, workers)
        quantile = formulas.mmc_quantile(service, rate, workers, 0.99)
        survival = partial(formulas.mmc_survival, service, rate, workers)
    else:
        mean, variance = formulas.fcfs_mean(service, rate), formulas.fcfs_variance(service, rate)
        p99 = p99 and not isinstance(service, Lognormal)
        quantile = formulas.fcfs_quantile(service, rate, 0.99) if p99 else math.nan
        survival = partial(formulas.fcfs_survival, service, rate)
    if not p99:
        return System(name, "fifo", workers, load, service, mean, variance)
    return System(
        name,
        "fifo",
        workers,
        load,
        service,
        mean,
        variance,
        quantile,
        p99_variance or formulas.tail_variance(survival, quantile, 0.99, variance, mean),
    )


def _shared(name: str, load: float, service: Service, quantum_us: float, workers: int = 1, variance: float = 0.0) -> System:
    """Processor sharing, or with several workers and exponential service a round robin that shares M/M/c's mean."""
    rate = load * workers / service.mean
    if isinstance(service, Exponential):
        mean, variance = formulas.mmc_mean(service, rate, workers), formulas.mmc_variance(service, rate, workers)
    else:
        mean = formulas.ps_mean(service, rate)
    return System(name, "round_robin", workers, load, service, mean, variance, params={"quantum_us": quantum_us})


def _shortest_first(name: str, load: float, service: Service, variance: float) -> System:
    """Shortest remaining processing time."""
    return System(name, "srpt", 1, load, service, formulas.srpt_mean(service, load / service.mean), variance)


class Measured:
    """One run in a process of a `Pool`: the engine's simulation, of which only the intervals travel back."""

    def __init__(self, order: Order, watch: int) -> None:
        from waveos.ipu_emulator.sched import Simulation

        self._begun_ns = time.perf_counter_ns()
        self._order = order
        self._simulation = Simulation(setup_for(order), watch)

    def advance(self, wall_ns: int) -> bool:
        """As the simulation's."""
        return self._simulation.advance(wall_ns)

    def result(self) -> Seen:
        """Intervals of the requests after the warm-up, in the order in which they were done."""
        result = self._simulation.result()
        if result.samples is None or result.saturated or len(result.samples) < 2 * BATCHES:
            raise WaveError(f"theory: the run of {self._order} is not one of a queue in balance: refused {result.refused}")
        sojourns = result.samples["sojourn_ns"]
        counted = sojourns[math.ceil(WARMUP_SHARE * len(sojourns)) :]
        p99 = quantile_interval(counted, 0.99, BATCHES) if self._order.tail else None
        return Seen(mean_interval(counted, BATCHES), p99, len(counted), (time.perf_counter_ns() - self._begun_ns) * 1e-9)


def setup_for(order: Order) -> Setup:
    """The engine's setup: a link, cores and a policy that cost nothing, and no decision prestaged, which would be a queue of its own."""
    from waveos.ipu_emulator.sched import RequestClass, Setup

    wanted = order.requests / (1 - WARMUP_SHARE)
    return Setup(
        policy=order.policy,
        params=order.params,
        load_per_s=order.per_s,
        classes=(RequestClass("request", engine_service(order.service)),),
        workers=order.workers,
        seed=order.seed,
        duration_ns=math.ceil(wanted / order.per_s * 1e9),
        host="ideal",
        link="ideal",
        mitigations=(),
        samples=math.ceil(wanted + 10 * math.sqrt(wanted)),
    )


def engine_service(service: Service) -> EngineService:
    """The engine's form of a distribution."""
    from waveos.ipu_emulator.sched import Service as EngineService

    match service:
        case Fixed():
            return EngineService("fixed", fixed_ns=service.mean)
        case Exponential():
            return EngineService("exponential", mean_ns=service.mean)
        case Erlang():
            return EngineService("erlang", mean_ns=service.mean, stages=service.stages)
        case Hyperexponential():
            return EngineService("hyperexponential", phases=tuple(zip(service.shares, service.means, strict=True)))
        case Lognormal():
            return EngineService("lognormal", mean_ns=service.mean, sigma=service.sigma)
        case _:
            raise ValueError(f"the engine draws no {type(service).__name__}")


def _simulate(chosen: list[System], seed: int, seeds: int, processes: int) -> Iterator[tuple[int, Seen]]:
    """(number of the system, what a run of it found) for every system and seed, as they end; the longest begin first. Progress goes to stderr."""
    from waveos.ipu_emulator.pool import Pool

    orders = [
        (index, system.order(run_seed))
        for index, system in enumerate(chosen)
        for run_seed in (int(each) for each in np.random.SeedSequence([seed, index]).generate_state(seeds))
    ]
    orders.sort(key=lambda each: -each[1].requests)
    talks = sys.stderr.isatty()
    with Pool(processes or None, factory="waveos.bench.theory:Measured") as pool:
        owner = {pool.submit(order): index for index, order in orders}
        for done, (number, seen) in enumerate(pool.finished(), 1):
            if talks:
                print(f"\rtheory: {done} of {len(orders)} runs", end="" if done < len(orders) else "\n", file=sys.stderr, flush=True)
            yield owner[number], seen


def _judge(system: System, runs: list[Seen]) -> Iterator[dict[str, Any]]:
    """One row a case: the widest half-width and how many intervals hold the theory."""
    cases = [("mean", system.mean_ns, [each.mean for each in runs])]
    if not math.isnan(system.p99_ns):
        cases.append(("p99", system.p99_ns, [each.p99 for each in runs if each.p99 is not None]))
    for what, truth, intervals in cases:
        yield {
            "system": system.name,
            "policy": system.policy,
            "workers": system.workers,
            "load": system.load,
            "what": what,
            "theory_us": truth / 1000,
            "engine_us": float(np.mean([each.value for each in intervals])) / 1000,
            "bias_share": float(np.mean([each.value for each in intervals])) / truth - 1,
            "half_width_share": max(each.half_width for each in intervals) / truth,
            "covered": sum(each.holds(truth) for each in intervals),
            "runs": len(intervals),
            "requests": runs[0].requests,
            "wall_s": float(np.mean([each.wall_s for each in runs])),
        }


def _conclude(metrics: dict[str, Any]) -> str:
    """One line: whether the engine agrees with theory as precisely as was asked."""
    mean, p99, covered = metrics["max_half_width_share_mean"], metrics["max_half_width_share_p99"], metrics["covered_share"]
    fine = {
        f"half-width of means {mean:.2%} (at most {MEAN_SHARE:.0%})": mean <= MEAN_SHARE,
        f"of p99 {p99:.2%} (at most {P99_SHARE:.0%})": p99 <= P99_SHARE,
        f"theory held by {covered:.1%} of {metrics['pairs']} intervals (at least 93 %)": covered >= COVERED_SHARE,
    }
    return ("agrees: " if all(fine.values()) else "does not agree: ") + ", ".join(fine)
