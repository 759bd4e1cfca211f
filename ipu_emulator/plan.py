"""A plan: should the policy of a workload leave the host? What it gains and costs over links, IPU cores, mitigations and loads, and where it breaks even.

The machine has the scenario's workers. On the host the agent takes one of them; on the IPU all of them serve. Offload *pays* where the IPU sustains at
least the load that the host does with its agent (each request class within its goal), and it *breaks even* at the speed of an IPU core from which on
it does: found by bisection of the speed at that very load, for each seed, which needs a run a step where comparing two searches for saturation would
need some ten. `tests/plan` and `wave bench plan` hold it against such a sweep.

- **IPU cores**: one agent is one core. With more, the CPUs are divided evenly among as many agents, each with its part of the load; no queue is shared.
- **Latency of the link**: the scenario's profile with its propagation made shorter or longer by the same for all that crosses it: a posted write once, a
  read twice (there and back), a doorbell once.
- **Host cores freed**: workers * (1 - on-host saturation / offloaded saturation), as a fraction; and the whole ones that can go while the load is still
  met, tried one by one.
- **The most limiting cost**: each cost of the link, and the policy's own time, made free in turn; the one whose absence lets most load in.

Searches are generators that ask for runs, as in `waveos.ipu_emulator.experiment`; `drive` spreads them over a pool.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import fmean
from typing import Any, NamedTuple

from waveos import __version__
from waveos.ipu_emulator.experiment import Jobs, Point, capacity_per_s, class_mean_ns, drive, interval_of, limits_us, meets, rounded
from waveos.ipu_emulator.inputs import Inputs
from waveos.ipu_emulator.job import KERNEL_POLICY, Ask, Configuration, Job, link_of
from waveos.ipu_emulator.profile import LinkProfile, link_costs, load_link
from waveos.scenario import MITIGATIONS, Scenario

PROFILES = {"coherent": "on-host", "C2C": "nvlink-c2c", "CXL": "cxl", "PCIe": "mount-evans", "network": "network"}
"""Kinds of link that every plan compares, and the profile of each, from the nearest on."""
SPEEDS = (0.1, 0.2, 0.4, 0.8, 1.6)
LATENCIES_NS = (50, 150, 400, 800, 1_600, 4_000)
LOADS_SHARE = (0.2, 0.4, 0.6, 0.8, 0.95)
"""Of the load that the host sustains with its agent."""
LATENCY_SHARE = 0.8
"""The load at which the table tells latencies, as such a share."""
SPEED_LEAST, SPEED_MOST = 0.01, 8.0
"""Break-even is looked for between these speeds of an IPU core, as shares of a host core's."""
SEEDS = 3
"""For what the verdict rests on; the maps are of the first seed."""
FINE, COARSE = 0.01, 0.03
"""How close searches end, as a share of what they look for: for the verdict, and for the maps."""
_FASTEST = 1e9  # a policy that takes no time
_UP = 1.3  # the first step from a guess; each further one is half as long again


@dataclass(frozen=True)
class Variant:
    """One arrangement of the machine. What is left out is as the scenario says."""

    placement: str  # "kernel", "on-host" or "offload"
    workers: int
    mitigations: tuple[str, ...] = MITIGATIONS
    profile: str = ""  # another link
    speed: float = 0.0  # of an IPU core; 0: as scenario or profile say
    cores: int = 1  # of the IPU, with an agent each
    costs: tuple[tuple[str, str, int], ...] = ()  # (table, key, ns) of the link's profile that are others


class Run(NamedTuple):
    """A run that is wanted."""

    variant: Variant
    load_per_s: float  # of the whole machine
    seed: int


Search = Generator[list[Run], list[Point], None]
Finding = Generator[list[Run], list[Point], tuple[float, float]]
Trial = Callable[[float], Generator[list[Run], list[Point], bool]]


def highest(fits: Trial, guess: float, least: float, most: float, share: float) -> Finding:
    """(low, high) about the highest value that fits, high no more than `share` above low. low = 0: not even `least` does; high is infinite: even `most`."""
    low, high, trial, step = 0.0, math.inf, min(max(guess, least), most), _UP
    while low == 0 or math.isinf(high):
        if (yield from fits(trial)):
            if trial >= most:
                return trial, math.inf
            low, trial = trial, min(most, trial * step)
        else:
            if trial <= least:
                return 0.0, trial
            high, trial = trial, max(least, trial / step)
        step **= 1.5
    while high > low * (1 + share):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if (yield from fits(middle)) else (low, middle)
    return low, high


@dataclass
class Plan:
    """The questions of a plan, and the answers that are there. `run` asks them over a pool; `results()` is what a results file holds."""

    scenario: Scenario
    inputs: Inputs
    policy: str
    machine: Any = None
    runs: int = 0
    saturation: dict[tuple[Variant, int], float] = field(default_factory=dict)
    """Of a variant and seed: the highest load that meets the objective, requests/s; 0: none does."""
    breakeven: dict[tuple[Variant, int], float] = field(default_factory=dict)
    """Of a variant (without its speed) and seed: the lowest speed that pays; infinite: none does; 0: any does."""
    points: dict[tuple[Variant, float], Point] = field(default_factory=dict)
    """Of a variant at a share of the load that the host sustains."""
    workers: dict[str, int] = field(default_factory=dict)
    """Workers that are needed for the host's load when the agent has left it; absent: so many more that it was not found."""
    _known: dict[Run, Point] = field(default_factory=dict)

    def run(self, pool: Jobs, progress: Callable[[int, int, str], None] = lambda done, expected, what: None) -> None:
        """Ask everything. First what the host sustains, then what is compared with it, then the costs that seemed to matter, on more seeds."""

        def tell(done: int, expected: int, run: Run) -> None:
            self.runs += 1
            progress(done, expected, f"{run.variant.placement} at {run.load_per_s:,.0f}/s")

        for searches in (self._baseline(), self._comparisons(), self._recheck()):
            drive(pool, searches, self._job, lambda run, result: result[0], tell, self._known)

    # ── the arrangements ──

    @property
    def seeds(self) -> list[int]:
        """The first is the scenario's."""
        return [self.scenario.run.seed + number for number in range(min(SEEDS, self.scenario.run.replications))]

    @cached_property
    def link(self) -> LinkProfile:
        """The scenario's."""
        return link_of(self.scenario)

    @property
    def speed(self) -> float:
        """Of an IPU core, as scenario or profile say."""
        return self.link.relative_speed if self.scenario.agent.speed == "profile" else self.scenario.agent.speed

    @property
    def offload(self) -> Variant:
        """The scenario's own arrangement."""
        return Variant("offload", self.scenario.host.workers, tuple(self.scenario.link.mitigations))

    @property
    def on_host(self) -> Variant:
        """The agent on one of the machine's cores. A machine of one core cannot do both: then beside it."""
        return Variant("on-host", max(1, self.scenario.host.workers - 1))

    @property
    def kernel(self) -> Variant:
        """No agent."""
        return Variant("kernel", self.scenario.host.workers)

    @cached_property
    def profiles(self) -> dict[str, Variant]:
        """By kind of link, the scenario's own under its name where it is none of them."""
        found = {kind: replace(self.offload, profile=name) for kind, name in PROFILES.items()}
        changed = self.scenario.link.costs or self.scenario.agent.speed != "profile"
        if self.scenario.link.profile not in PROFILES.values() or changed:
            found[f"{self.scenario.link.profile} (the scenario's)"] = self.offload
        return {kind: self.offload if each.profile == self.scenario.link.profile and not changed else each for kind, each in found.items()}

    @cached_property
    def core_counts(self) -> list[int]:
        """Numbers of IPU cores among which the workers can be divided evenly, at most three. A trace of arrivals is not divided."""
        workers = self.scenario.host.workers
        counts = [count for count in range(1, workers + 1) if workers % count == 0] if self.inputs.arrivals is None else [1]
        return counts[:3]

    @cached_property
    def free_costs(self) -> dict[str, Variant]:
        """By cost, the scenario's arrangement with it free: those of the link that are charged, and the policy's own time."""
        found = {}
        charged = link_costs(self.link, self.offload.mitigations)
        for table in ("host", "agent", "wire", "doorbell"):
            costs = getattr(self.link, table).model_dump(exclude={"source"})
            for key, value in costs.items():
                without = self.link.model_copy(update={table: getattr(self.link, table).model_copy(update={key: 0})})
                if value and link_costs(without, self.offload.mitigations) != charged:
                    found[f"link.{table}.{key}"] = replace(self.offload, costs=((table, key, 0),))
        if self.inputs.message_ns[self.policy]:
            found["agent.message_ns"] = replace(self.offload, speed=_FASTEST)
        return found

    def at_latency(self, one_way_ns: int, **changes: Any) -> Variant:
        """The scenario's arrangement with another propagation."""
        link, more = self.link, one_way_ns - self.link.wire.one_way_ns
        costs = [("wire", "one_way_ns", one_way_ns), ("doorbell", "wire_ns", max(0, link.doorbell.wire_ns + more))]
        costs += [("host", key, max(link.host.wt_hit_ns, getattr(link.host, key) + 2 * more)) for key in ("uc_read_ns", "wt_read_ns")]
        return replace(self.offload, costs=tuple(costs), **changes)

    def mitigated(self) -> dict[str, Variant]:
        """By label: none, and all but each."""
        mine = self.offload.mitigations
        found = {"none": replace(self.offload, mitigations=())}
        return found | {f"all but {name}": replace(self.offload, mitigations=tuple(each for each in mine if each != name)) for name in mine}

    # ── the questions ──

    def _baseline(self) -> Iterator[Search]:
        for seed in self.seeds:
            for variant in (self.on_host, self.offload):
                yield self._saturate(variant, seed, FINE)
        yield self._saturate(self.kernel, self.seeds[0], FINE)

    def _comparisons(self) -> Iterator[Search]:
        if not self.host_per_s:
            return
        first, guess = self.seeds[0], self.saturation[self.offload, self.seeds[0]]
        for seed in self.seeds:
            yield self._break_even(self.offload, seed)
        for variant in self.profiles.values():
            if variant != self.offload:
                yield self._saturate(variant, first, FINE, guess)
                yield self._break_even(variant, first)
            yield self._latency(variant, LATENCY_SHARE)
        yield self._latency(replace(self.on_host, workers=self.scenario.host.workers), LATENCY_SHARE)
        for variant in (*self.free_costs.values(), *self.mitigated().values()):
            yield self._saturate(variant, first, FINE, guess)
        yield self._fewest_workers()
        for count in self.core_counts:
            for one_way_ns in LATENCIES_NS:
                yield self._break_even(self.at_latency(one_way_ns, cores=count), first)
        for one_way_ns in LATENCIES_NS:
            yield self._saturate_speeds(one_way_ns, first, guess)
            for share in LOADS_SHARE:
                yield self._latency(self.at_latency(one_way_ns), share)
        for share in LOADS_SHARE:
            yield self._latency(replace(self.on_host, workers=self.scenario.host.workers), share)

    def _recheck(self) -> Iterator[Search]:
        """The costs that seemed to matter most, on the other seeds."""
        for name in self._ranked(self.seeds[:1])[:2]:
            for seed in self.seeds[1:]:
                yield self._saturate(self.free_costs[name], seed, FINE, self.saturation[self.offload, seed])

    def _saturate(self, variant: Variant, seed: int, share: float, guess: float = 0.0) -> Search:
        low, high = yield from self._highest_load(variant, seed, share, guess)
        self.saturation[variant, seed] = (low + high) / 2 if low else 0.0

    def _saturate_speeds(self, one_way_ns: int, seed: int, guess: float) -> Search:
        """From the fastest down: what one speed sustains is the next one's guess."""
        for speed in reversed(SPEEDS):
            variant = self.at_latency(one_way_ns, speed=speed)
            low, high = yield from self._highest_load(variant, seed, COARSE, guess)
            guess = self.saturation[variant, seed] = (low + high) / 2 if low else 0.0

    def _highest_load(self, variant: Variant, seed: int, share: float, guess: float) -> Finding:
        most = 1.2 * capacity_per_s(self.scenario, self.inputs)

        def fits(load: float) -> Generator[list[Run], list[Point], bool]:
            return (yield from self._fits(variant, rounded(load), seed))

        return highest(fits, guess or 0.6 * most, most / 1000, most, share)

    def _break_even(self, variant: Variant, seed: int) -> Search:
        """The lowest speed at which the variant sustains what the host did with this seed; searched as its inverse."""
        load = self.saturation[self.on_host, seed]

        def fits(slowness: float) -> Generator[list[Run], list[Point], bool]:
            return (yield from self._fits(replace(variant, speed=float(f"{1 / slowness:.4g}")), load, seed))

        low, high = yield from highest(fits, 4 / self.speed, 1 / SPEED_MOST, 1 / SPEED_LEAST, 2 * FINE)
        self.breakeven[variant, seed] = math.inf if low == 0 else 0.0 if math.isinf(high) else 1 / math.sqrt(low * high)

    def _latency(self, variant: Variant, share: float) -> Search:
        [point] = yield [Run(variant, rounded(share * self.saturation[self.on_host, self.seeds[0]]), self.seeds[0])]
        self.points[variant, share] = point

    def _fewest_workers(self) -> Search:
        """Whole cores: fewer by one while the host's load is met, or more by one until it is."""
        load, seed, workers = self.saturation[self.on_host, self.seeds[0]], self.seeds[0], self.scenario.host.workers
        fits = yield from self._fits(self.offload, load, seed)
        step = -1 if fits else 1
        for number in range(workers + step, max(0, workers // 2) if fits else 2 * workers, step):
            if (yield from self._fits(replace(self.offload, workers=number), load, seed)) != fits:
                self.workers["offload"] = number - step if fits else number
                return
        if fits:
            self.workers["offload"] = max(1, workers // 2 + 1)

    def _fits(self, variant: Variant, load_per_s: float, seed: int) -> Generator[list[Run], list[Point], bool]:
        [point] = yield [Run(variant, load_per_s, seed)]
        return meets(point, self._limits)

    @cached_property
    def _limits(self) -> Mapping[str, Mapping[str, float]]:
        means = class_mean_ns(self.scenario, self.inputs)
        return {name: limits_us(goal, means[name]) for name, goal in self.scenario.objective.items()}

    def _job(self, run: Run) -> Job:
        variant = run.variant
        policy = KERNEL_POLICY if variant.placement == "kernel" else self.policy
        configuration = Configuration(policy, variant.placement, max(1, variant.workers // variant.cores), mitigations=variant.mitigations)
        return Job(self._scenario_of(variant), self.inputs, Ask(configuration, run.load_per_s / variant.cores, run.seed))

    def _scenario_of(self, variant: Variant) -> Scenario:
        scenario = self.scenario
        changes: dict[str, Any] = {}
        if variant.placement == "offload":
            link: dict[str, Any] = {"profile": variant.profile, "costs": {}} if variant.profile else {}
            costs = {table: dict(keys) for table, keys in (link or scenario.link.model_dump())["costs"].items()}
            for table, key, value in variant.costs:
                costs.setdefault(table, {})[key] = value
            changes["link"] = scenario.link.model_copy(update={**link, "costs": costs})
            speed = variant.speed or ("profile" if variant.profile else scenario.agent.speed)
            changes["agent"] = scenario.agent.model_copy(update={"speed": speed})
        if variant.cores > 1:
            changes["host"] = scenario.host.model_copy(update={"threads": max(1, scenario.host.threads // variant.cores)})
        return scenario.model_copy(update=changes)

    # ── the answers ──

    @property
    def host_per_s(self) -> float:
        """What the machine sustains with its agent on one of its own cores; 0 if the objective is met at no load with one seed or another."""
        found = [self.saturation.get((self.on_host, seed), 0.0) for seed in self.seeds]
        return fmean(found) if all(found) else 0.0

    def gain(self, variant: Variant, seeds: Iterable[int]) -> list[float]:
        """Load sustained more than on the host, as a share of that, seed by seed."""
        return [self.saturation[variant, seed] / self.saturation[self.on_host, seed] - 1 for seed in seeds]

    def freed(self, variant: Variant, seed: int) -> float | None:
        """Host cores' worth; None where the variant sustains nothing."""
        theirs = self.saturation[variant, seed]
        return self.scenario.host.workers * (1 - self.saturation[self.on_host, seed] / theirs) if theirs else None

    def results(self) -> dict[str, Any]:
        """What the results file holds. Loads are requests/s, latencies us, speeds shares of a host core's; None: nowhere within the bounds searched."""
        scenario, link = self.scenario, self.link
        about = {
            "kind": "plan",
            "name": scenario.name,
            "policy": self.policy,
            "timing": "modelled",
            "wave_version": __version__,
            "machine": self.machine,
            "scenario": scenario.model_dump(exclude_none=True),
            "link": {"name": link.name, "verified": link.verified, "source": link.source},
            "workers": scenario.host.workers,
            "speed": self.speed,
            "message_ns": self.inputs.message_ns[self.policy],
            "objective": self._limits,
            "seeds": self.seeds,
            "runs": self.runs,
            "latency_class": self._class,
        }
        if not self.host_per_s:
            return about | {"answered": False, "host_per_s": 0.0, "kernel_per_s": self.saturation[self.kernel, self.seeds[0]]}
        gains = self.gain(self.offload, self.seeds)
        speeds = [self.breakeven[self.offload, seed] for seed in self.seeds]
        inner = [speed for speed in speeds if 0 < speed < math.inf]
        return about | {
            "answered": True,
            "host_per_s": self.host_per_s,
            "offload_per_s": fmean(self.saturation[self.offload, seed] for seed in self.seeds),
            "kernel_per_s": self.saturation[self.kernel, self.seeds[0]],
            "gain_share": fmean(gains),
            "gain_interval": list(interval_of(gains, FINE)),
            "breakeven_speed": _finite(fmean(inner) if len(inner) == len(speeds) else max(speeds)),
            "breakeven_interval": list(interval_of(inner, FINE * fmean(inner))) if len(inner) == len(speeds) else None,
            "speed_bounds": [SPEED_LEAST, SPEED_MOST],
            "cores_freed": self.freed(self.offload, self.seeds[0]),
            "workers_needed": self.workers.get("offload"),
            "latency_load_share": LATENCY_SHARE,
            "on_host_latency": self._latencies(replace(self.on_host, workers=scenario.host.workers), LATENCY_SHARE),
            "links": [self._link_row(kind, variant) for kind, variant in self.profiles.items()],
            "costs": self._cost_rows(),
            "mitigations": [{"label": "all", **self._gain_row(self.offload)}]
            + [{"label": label, **self._gain_row(variant)} for label, variant in self.mitigated().items()],
            "map": {
                "one_way_ns": list(LATENCIES_NS),
                "speeds": list(SPEEDS),
                "cores_freed": self._grid(SPEEDS, lambda ns, speed: self.freed(self.at_latency(ns, speed=speed), self.seeds[0])),
                "gain_share": self._grid(SPEEDS, lambda ns, speed: self.gain(self.at_latency(ns, speed=speed), self.seeds[:1])[0]),
            },
            "breakeven": {
                "one_way_ns": list(LATENCIES_NS),
                "ipu_cores": self.core_counts,
                "speeds": self._grid(self.core_counts, lambda ns, count: _finite(self.breakeven[self.at_latency(ns, cores=count), self.seeds[0]])),
            },
            "paid": {
                "one_way_ns": list(LATENCIES_NS),
                "loads_share": list(LOADS_SHARE),
                "p50_us": self._grid(LOADS_SHARE, lambda ns, share: self._paid(self.at_latency(ns), share, "p50_us")),
                "p99_us": self._grid(LOADS_SHARE, lambda ns, share: self._paid(self.at_latency(ns), share, "p99_us")),
            },
        }

    @property
    def _class(self) -> str:
        """The class whose latencies are told: the first with a goal."""
        return next(iter(self.scenario.objective), self.scenario.workload.classes[0].name)

    def _ranked(self, seeds: Sequence[int]) -> list[str]:
        """Costs by what their absence lets in, the most limiting first."""

        def relief(name: str) -> float:
            return fmean(self._relief(name, seed) for seed in seeds if (self.free_costs[name], seed) in self.saturation)

        return sorted(self.free_costs, key=relief, reverse=True) if self.host_per_s else []

    def _relief(self, name: str, seed: int) -> float:
        """Load that is sustained more when the cost is free, as a share."""
        mine = self.saturation[self.offload, seed]
        return self.saturation[self.free_costs[name], seed] / mine - 1 if mine else 0.0

    def _cost_rows(self) -> list[dict[str, Any]]:
        rows = []
        for name in self._ranked(self.seeds):
            reliefs = [self._relief(name, seed) for seed in self.seeds if (self.free_costs[name], seed) in self.saturation]
            rows.append({"cost": name, "ns": self._cost_ns(name), "relief_share": fmean(reliefs), "seeds": len(reliefs)})
        return rows

    def _cost_ns(self, name: str) -> float:
        if name == "agent.message_ns":
            return self.inputs.message_ns[self.policy] / self.speed
        _, table, key = name.split(".")
        return float(getattr(getattr(self.link, table), key))

    def _link_row(self, kind: str, variant: Variant) -> dict[str, Any]:
        profile = load_link(variant.profile) if variant.profile else self.link
        seed = self.seeds[0]
        return {
            "kind": kind,
            "profile": profile.name,
            "verified": profile.verified,
            "own": variant == self.offload,
            "one_way_ns": profile.wire.one_way_ns,
            "read_ns": profile.host.wt_read_ns,
            "speed": profile.relative_speed if variant.profile else self.speed,
            **self._gain_row(variant),
            "breakeven_speed": _finite(self.breakeven[variant, seed]),
            "latency": self._latencies(variant, LATENCY_SHARE),
        }

    def _gain_row(self, variant: Variant) -> dict[str, Any]:
        seed = self.seeds[0]
        return {
            "saturation_per_s": self.saturation[variant, seed],
            "gain_share": self.gain(variant, [seed])[0],
            "cores_freed": self.freed(variant, seed),
        }

    def _latencies(self, variant: Variant, share: float) -> dict[str, float | None]:
        point = self.points[variant, share]
        of = point["classes"][self._class]
        decided = {f"decision_{q}_us": point[f"ready_to_running_{q}_us"] for q in ("p50", "p99")}
        return {"p50_us": of["p50_us"], "p99_us": of["p99_us"], **decided, "saturated": point["saturated"]}

    def _paid(self, variant: Variant, share: float, quantile: str) -> float | None:
        """Latency more than with the agent on a host core beside as many workers, us; None beyond saturation."""
        mine, theirs = self.points[variant, share], self.points[replace(self.on_host, workers=self.scenario.host.workers), share]
        ours, others = (each["classes"][self._class][quantile] for each in (mine, theirs))
        return None if mine["saturated"] or theirs["saturated"] or ours is None or others is None else ours - others

    @staticmethod
    def _grid(across: Iterable[Any], value: Callable[[int, Any], float | None]) -> list[list[float | None]]:
        """A row for each of `across`, a column for each latency."""
        return [[value(one_way_ns, each) for one_way_ns in LATENCIES_NS] for each in across]


def _finite(speed: float) -> float | None:
    return speed if math.isfinite(speed) else None
