"""An experiment: what is compared with what, under which loads, and where each configuration saturates.

A *comparison* is the kernel's own policy and each Wave policy with its agent in three places: on the host beside the same workers, on the host in
place of one of them, and on the IPU. All of them meet the same requests at the same times (common random numbers: a seed fixes arrivals and service
times), so that differences are theirs. *Saturation* is the highest load that meets the objective, found by a grid and then by bisection, once for
each seed; its interval is Student's over the seeds. The *ablation* takes the mitigations of the link away, one at a time and all, and adds them again
in the paper's order.

Searches are generators: they ask for points and are sent them. `drive` runs many searches over one pool of processes, so a search reads top to bottom
although its runs are spread over the cores.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from statistics import fmean
from typing import Any, Protocol, TypeVar

from waveos import __version__
from waveos.errors import ConfigError
from waveos.ipu_emulator.inputs import Inputs, mean_service_ns
from waveos.ipu_emulator.job import KERNEL_POLICY, Ask, CallJob, Configuration, Job, policy_file
from waveos.ipu_emulator.pool import SLICE_NS, open_pool
from waveos.names import nearest, split_policy_file
from waveos.scenario import MITIGATIONS, Goal, Scenario

Point = dict[str, Any]
"""One run of one configuration, as it stands in the results file."""
Progress = Callable[[int, int, str], None]
"""Called as (runs done, runs expected by now, what has just ended)."""

UNLOADED_SHARE = 0.005
"""Of the workers' capacity: so little that requests do not meet each other."""

_SEEN_SHARE = 0.001
"""Of a class: so many requests show in the p99.9."""
_TOLD = 4
"""Of such classes and runs, those that a note names."""


@dataclass
class Saturation:
    """The highest load that meets the objective, requests/s: for each seed the middle of the bracket that its search ended with; 0 if none does."""

    per_seed: list[float] = field(default_factory=list)
    step: float = 0.0  # the widest of those brackets

    @property
    def value(self) -> float:
        return fmean(self.per_seed)

    def interval(self) -> tuple[float, float]:
        """95 %: Student's over the seeds, and never narrower than the resolution; of a single seed the resolution only."""
        return interval_of(self.per_seed, self.step / 2)


Search = Generator[list[Ask], list[Point], None]
Wanted = TypeVar("Wanted", bound=Hashable)
"""What names a run: an `Ask`, or what else `drive` is to make jobs of."""


class Jobs(Protocol):
    """What `drive` needs of a pool."""

    def submit(self, setup: Any) -> int: ...

    def finished(self) -> Iterator[tuple[int, Any]]: ...


def configurations(scenario: Scenario) -> list[Configuration]:
    """All that a comparison compares."""
    workers = scenario.host.workers
    mitigations = tuple(scenario.link.mitigations)
    found = [Configuration(KERNEL_POLICY, "kernel", workers, mitigations=mitigations)]
    for policy in scenario.policies.names:
        found.append(Configuration(policy, "on-host", workers, "same workers", mitigations))
        if workers > 1:
            found.append(Configuration(policy, "on-host", workers - 1, "same machine", mitigations))
        found.append(Configuration(policy, "offload", workers, "", mitigations))
    return found


def ablation_steps(paper_order: Sequence[str] = MITIGATIONS) -> list[tuple[str, tuple[str, ...]]]:
    """(label, mitigations): all, none, each alone removed, and added one after the other. No set comes twice."""
    steps = [("all", tuple(paper_order)), ("none", ())]
    steps += [(f"all but {name}", tuple(each for each in paper_order if each != name)) for name in paper_order]
    steps += [("+ " + " + ".join(paper_order[:count]), tuple(paper_order[:count])) for count in range(1, len(paper_order))]
    kept: dict[tuple[str, ...], str] = {}
    for label, mitigations in steps:
        kept.setdefault(mitigations, label)
    return [(label, mitigations) for mitigations, label in kept.items()]


_CALLED = {"sched": "", "net": "network "}
"""Subsystems' policies in messages, where that is not the subsystem's name."""


def check_policies(scenario: Any, subsystem: str = "sched", pool: Jobs | None = None) -> Any:
    """The scenario, with each policy's parameters under the name that it is run by: those of one from a file may stand under the policy's own name.

    Refuses what would only fail in the middle of the runs: a policy that is not installed or not of `subsystem`, parameters for a policy that is neither
    run nor installed, an ablation of one not run. With a pool the policies are loaded in one of its processes. Raises ConfigError, PolicyError.
    """
    chosen, called = scenario.policies, _CALLED.get(subsystem, f"{subsystem} ")
    wanted = [*chosen.names, *([chosen.ablation] if chosen.ablation else [])]
    installed = sorted({entry.name for entry in entry_points(group="waveos.policies")})
    for name in wanted:
        if split_policy_file(name) is None and name not in installed:
            from waveos.policy import policy_names

            where, fit = "names" if name in chosen.names else "ablation", policy_names(subsystem)
            raise ConfigError(
                f"policies.{where}: no {called}policy {name!r}{nearest(name, fit)}; installed: {', '.join(fit)}; or name a file, as my.py"
            )
    files = {name: policy_file(scenario, name) for name in wanted}
    if pool is None:
        own = own_names(tuple(files.values()), subsystem)
    else:
        pool.submit(CallJob("waveos.ipu_emulator.experiment:own_names", (tuple(files.values()), subsystem), ", ".join(wanted)))
        [(_, own)] = pool.finished()
    params: dict[str, dict[str, Any]] = {}
    for key, values in chosen.params.items():
        owners = [name for name in files if key in (name, files[name])] or [name for name in files if own[files[name]] == key]
        if not owners and key not in installed:
            runs = ", ".join(name if own[files[name]] == name else f"{name} ({own[files[name]]})" for name in chosen.names)
            known = [*files, *own.values(), *installed]
            raise ConfigError(f"policies.params.{key}: no {called}policy of that name{nearest(key, known)}; this scenario runs {runs}")
        for name in owners or [key]:
            params[name] = params.get(name, {}) | values
    if params == chosen.params:
        return scenario
    return scenario.model_copy(update={"policies": chosen.model_copy(update={"params": params})})


def own_names(files: Sequence[str], subsystem: str) -> dict[str, str]:
    """The name that each policy has given itself. Raises ConfigError for one of another subsystem, PolicyError for one that cannot be loaded."""
    from waveos.policy import load_policy, policy_names

    found = {}
    for file in files:
        policy = load_policy(file)
        theirs = policy.subsystem.__name__.rpartition(".")[2]
        if theirs != subsystem:
            raise ConfigError(
                f"policy {file!r} is of subsystem {theirs}, not {subsystem}; those of {subsystem}: {', '.join(policy_names(subsystem))}"
            )
        found[file] = policy.name
    return found


def capacity_per_s(scenario: Scenario, inputs: Inputs) -> float:
    """Requests per second that the workers could serve if nothing but the service itself took time."""
    return scenario.host.workers / (mean_request_ns(scenario, inputs) * 1e-9)


def mean_request_ns(scenario: Scenario, inputs: Inputs) -> float:
    """Mean service time over all classes, ns."""
    if inputs.arrivals is not None:
        return float(inputs.arrivals.service_ns.mean())
    return sum(each.share * mean_service_ns(each.service, inputs.samples) for each in scenario.workload.classes)


def class_mean_ns(scenario: Scenario, inputs: Inputs) -> dict[str, float]:
    """Mean service time of each class, ns."""
    means = {}
    for number, each in enumerate(scenario.workload.classes):
        if inputs.arrivals is None:
            means[each.name] = mean_service_ns(each.service, inputs.samples)
        else:
            own = inputs.arrivals.service_ns[inputs.arrivals.request_class == number]
            means[each.name] = float(own.mean()) if len(own) else 0.0
    return means


def loads(scenario: Scenario, inputs: Inputs) -> list[float]:
    """The scenario's grid of offered loads, requests per second, rising. A trace alone has one: its own rate."""
    workload = scenario.workload
    if workload.loads_per_s:
        return sorted(set(workload.loads_per_s))
    if workload.loads_share:
        capacity = capacity_per_s(scenario, inputs)
        return sorted({rounded(share * capacity) for share in workload.loads_share})
    if inputs.arrivals is None:
        raise ConfigError("no load is given: write workload.loads_per_s = [20000, 40000] or loads_share = [0.2, 0.5, 0.8]")
    return [rounded((len(inputs.arrivals.time_ns) - 1) / (float(inputs.arrivals.time_ns[-1]) * 1e-9))]


def limits_us(goal: Goal, mean_ns: float) -> dict[str, float]:
    """A class's goal as upper limits in us by statistic: {"p99_us": 200.0}."""
    limits: dict[str, float] = {}
    for name, value in goal.model_dump(exclude_none=True).items():
        statistic = name.replace("_x_mean", "_us")
        limits[statistic] = min(limits.get(statistic, math.inf), value * mean_ns / 1000 if name.endswith("_x_mean") else value)
    return limits


def meets(point: Point, limits: Mapping[str, Mapping[str, float]]) -> bool:
    """Whether a run served its load within every class's limits. A class that saw no request meets its goal."""
    if point["saturated"]:
        return False
    for name, wanted in limits.items():
        seen = point["classes"].get(name)
        if seen and seen["count"] and any(seen[statistic] > limit for statistic, limit in wanted.items()):
            return False
    return True


# ── calls ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def pool_or(pool: Jobs | None, most: int) -> Iterator[Jobs]:
    """`pool`, or processes of one's own: for so many jobs, no more than there are cores; with WAVE_JIT=0 this process, for debugging."""
    if pool is not None:
        yield pool
        return
    with open_pool(None if os.environ.get("WAVE_JIT") == "0" else min(most, len(os.sched_getaffinity(0)))) as own:
        yield own


def run_calls(pool: Jobs, calls: Sequence[CallJob], progress: Progress = lambda done, expected, what: None) -> tuple[list[Any], bool]:
    """What the calls gave, in their order, and whether Ctrl-C stopped them: then those that were not done are left out."""
    numbers = {pool.submit(call): call for call in calls}
    found: dict[int, Any] = {}
    stopped = False
    try:
        for number, result in pool.finished():
            found[number] = result
            progress(len(found), len(calls), numbers[number].label)
    except KeyboardInterrupt:
        stopped = True
    return [found[number] for number in numbers if number in found], stopped


# ── searches ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def scan(configuration: Configuration, grid: Sequence[float], seed: int) -> Search:
    """One run at each load."""
    yield [Ask(configuration, load, seed) for load in grid]


def find_saturation(
    configuration: Configuration,
    grid: Sequence[float],
    seeds: Sequence[int],
    meets_objective: Callable[[Point], bool],
    resolution_share: float,
    found: Saturation,
) -> Search:
    """Fill `found` with the highest load that meets the objective, for each seed in turn.

    The first seed begins with `grid`, the others where their predecessors ended. Each is bracketed, then halved until the bracket is as narrow as
    the resolution. Where even the lowest load fails, lower ones are tried down to a thousandth of it; then saturation is 0.
    """

    def fits(load: float, seed: int) -> Generator[list[Ask], list[Point], bool]:
        [point] = yield [Ask(configuration, load, seed)]
        return meets_objective(point)

    floor = grid[0] / 1000
    first, last = -1, len(grid)  # grid[first] meets the objective, grid[last] does not
    while last - first > 1:
        middle = (first + last) // 2
        first, last = (middle, last) if (yield from fits(grid[middle], seeds[0])) else (first, middle)
    low, high = grid[first] if first >= 0 else 0.0, grid[last] if last < len(grid) else math.inf
    step = 0.15
    for seed in seeds:
        if seed != seeds[0]:
            guess, step = rounded(max(found.value, floor)), 2 * resolution_share
            low, high = (guess, math.inf) if (yield from fits(guess, seed)) else (0.0, guess)
        while math.isinf(high):
            trial = rounded(low * (1 + step))
            low, high = (trial, high) if (yield from fits(trial, seed)) else (low, trial)
            step *= 2
        while low == 0 and high > floor:
            trial = rounded(high * max(0.5, 1 - step))
            low, high = (trial, high) if (yield from fits(trial, seed)) else (low, trial)
            step *= 2
        while low > 0 and high - low > resolution_share * high and low < (middle_load := rounded((low + high) / 2)) < high:
            low, high = (middle_load, high) if (yield from fits(middle_load, seed)) else (low, middle_load)
        found.per_seed.append((low + high) / 2 if low else 0.0)
        found.step = max(found.step, high - low)


def drive(
    pool: Jobs,
    searches: Iterable[Generator[list[Wanted], list[Point], None]],
    measure: Callable[[Wanted], Any],
    keep: Callable[[Wanted, Any], Point],
    progress: Callable[[int, int, Wanted], None],
    known: dict[Wanted, Point],
) -> None:
    """Run searches side by side until all have ended. `measure` makes the pool's job, `keep` stores a result and makes its point.

    A run that is in `known` is answered from there, and new ones are added.
    """
    askers: dict[int, tuple[Generator[list[Wanted], list[Point], None], list[Wanted]]] = {}  # by id of the search's list of asks
    jobs: dict[int, Wanted] = {}
    wanting: dict[Wanted, list[int]] = {}

    def advance(search: Generator[list[Wanted], list[Point], None], answers: list[Point] | None) -> None:
        while True:
            try:
                asks = next(search) if answers is None else search.send(answers)
            except StopIteration:
                return
            missing = [ask for ask in asks if ask not in known]
            if missing:
                askers[id(search)] = (search, asks)
                for ask in dict.fromkeys(missing):
                    if ask not in wanting:
                        jobs[pool.submit(measure(ask))] = ask
                    wanting.setdefault(ask, []).append(id(search))
                return
            answers = [known[ask] for ask in asks]

    for search in searches:
        advance(search, None)
    for done, (number, result) in enumerate(pool.finished(), 1):
        ask = jobs.pop(number)
        known[ask] = keep(ask, result)
        for asker in wanting.pop(ask):
            search, asks = askers[asker]
            if all(each in known for each in asks):
                del askers[asker]
                advance(search, [known[each] for each in asks])
        progress(done, done + len(jobs), ask)


# ── a comparison ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Comparison:
    """A scenario's configurations, run and kept. `results()` may be asked at any time: it tells what has been measured until then.

    A pool is given `Job`s and answers each with (point, trace).
    """

    def __init__(
        self,
        scenario: Scenario,
        inputs: Inputs,
        *,
        link: Mapping[str, Any],
        machine: Any = None,
        only: Callable[[Configuration], bool] = lambda configuration: True,
    ) -> None:
        self.scenario, self.inputs = scenario, inputs
        self.grid = loads(scenario, inputs)
        self.configurations = [each for each in configurations(scenario) if only(each)]
        self.notes: list[str] = []
        self.interrupted = False
        self._link, self._machine = dict(link), machine
        self._means = class_mean_ns(scenario, inputs)
        self._limits = {name: limits_us(goal, self._means[name]) for name, goal in scenario.objective.items()}
        self._known: dict[Ask, Point] = {}
        self._points: dict[Configuration, dict[float, Point]] = {}  # of the first seed, by load
        self._replicas: dict[Configuration, list[Point]] = {}  # of the others
        self._saturations: dict[Configuration, Saturation] = {}
        self._unloaded_ns: dict[tuple[str, ...], float] = {}
        self._ablated: Configuration | None = None
        self.runs = 0

    @property
    def seeds(self) -> list[int]:
        """The first is the scenario's; saturation is searched with all of them."""
        return [self.scenario.run.seed + number for number in range(self.scenario.run.replications)]

    def searches(self, *, saturation: bool = True, ablation: str = "", scan_loads: bool = True) -> list[Search]:
        """What has to run. `ablation` names the policy whose mitigations are taken away; empty: none. `scan_loads`: each of the scenario's loads."""
        found = []
        for configuration in self.configurations:
            if scan_loads:
                found.append(scan(configuration, self.grid, self.seeds[0]))
            if saturation:
                found.append(self._saturation(configuration))
        if ablation:
            self._ablated = Configuration(ablation, "offload", self.scenario.host.workers)
            for _, mitigations in ablation_steps():
                configuration = replace(self._ablated, mitigations=mitigations)
                found.append(self._unloaded(configuration))
                if configuration not in self.configurations or not saturation:
                    found.append(self._saturation(configuration))
        return found

    def run(self, pool: Jobs, searches: Iterable[Search], progress: Progress = lambda done, expected, what: None) -> None:
        """Run the searches; on KeyboardInterrupt what was measured stays, `interrupted` is set, and the interrupt goes on."""

        def tell(done: int, expected: int, ask: Ask) -> None:
            self.runs += 1
            progress(done, expected, f"{ask.configuration.id} at {ask.load_per_s:,.0f}/s")

        try:
            drive(pool, searches, lambda ask: Job(self.scenario, self.inputs, ask), self._keep, tell, self._known)
        except KeyboardInterrupt:
            self.interrupted = True
            raise

    def steps(self, searches: Iterable[Search], open_run: Callable[[Job], Any]) -> Iterator[None]:
        """Run the searches one after the other in this process, each run as `open_run` makes it; yields after each slice of a run."""
        for search in searches:
            answers: list[Point] | None = None
            while (asks := next(search, None) if answers is None else _send(search, answers)) is not None:
                for ask in asks:
                    if ask not in self._known:
                        run = open_run(Job(self.scenario, self.inputs, ask))
                        while not run.advance(SLICE_NS):
                            yield
                        self._known[ask] = self._keep(ask, run.result())
                        self.runs += 1
                        yield
                answers = [self._known[ask] for ask in asks]

    def trace(self, pool: Jobs, configuration: Configuration, load_per_s: float, from_ms: float, for_ms: float) -> Any:
        """The events of one run of the first seed, from `from_ms` of virtual time on (`waveos.trace.TRACE_EVENT`)."""
        ask = Ask(configuration, load_per_s, self.seeds[0])
        pool.submit(Job(self.scenario, self.inputs, ask, trace_from_ns=round(1e6 * from_ms), trace_for_ns=round(1e6 * for_ms)))
        [(_, (_, events))] = pool.finished()
        return events

    def results(self) -> dict[str, Any]:
        """The results file's content: see docs of `waveos.report`."""
        ran = [each for each in self.configurations if each in self._points]
        return {
            "name": self.scenario.name,
            "scenario": self.scenario.model_dump(exclude_none=True),
            "timing": "modelled",
            "link": self._link,
            "machine": self._machine,
            "wave_version": __version__,
            "seeds": self.seeds if self._saturations else self.seeds[:1],
            "objective": self._limits,
            "service": {name: {"mean_us": mean / 1000} for name, mean in self._means.items()},
            "resolution_share": self.scenario.run.resolution_share,
            "interrupted": self.interrupted,
            "table_load_per_s": self._table_load(),
            "configs": [self._describe(each) for each in ran],
            "ablation": list(self._ablation()),
            "notes": self._all_notes(),
        }

    def _table_load(self) -> float | None:
        """The load to compare latencies at: the highest of the grid at which half of the configurations meet the objective; None if there is none."""
        for load in reversed(self.grid):
            points = [self._points[each][load] for each in self.configurations if load in self._points.get(each, {})]
            if points and 2 * sum(meets(point, self._limits) for point in points) >= len(points):
                return load
        return None

    def _saturation(self, configuration: Configuration) -> Search:
        found = self._saturations.setdefault(configuration, Saturation())
        share = self.scenario.run.resolution_share
        return find_saturation(configuration, self.grid, self.seeds, lambda point: meets(point, self._limits), share, found)

    def _unloaded(self, configuration: Configuration) -> Search:
        """The cost of one decision where requests do not meet each other: runnable until its switch is done."""
        load = rounded(UNLOADED_SHARE * capacity_per_s(self.scenario, self.inputs))
        [point] = yield [Ask(configuration, load, self.seeds[0])]
        if (decided_us := point["ready_to_running_p50_us"]) is not None:
            self._unloaded_ns[configuration.mitigations] = 1000 * decided_us

    def _keep(self, ask: Ask, result: tuple[Point, Any]) -> Point:
        point, _ = result
        if ask.seed == self.seeds[0]:
            self._points.setdefault(ask.configuration, {})[ask.load_per_s] = point
        else:
            self._replicas.setdefault(ask.configuration, []).append(point)
        return point

    def _describe(self, configuration: Configuration) -> dict[str, Any]:
        points = self._points[configuration]
        described: dict[str, Any] = {
            "id": configuration.id,
            "policy": configuration.policy,
            "world": configuration.world,
            "workers": configuration.workers,
            "column": configuration.column,
            "points": [points[load] for load in sorted(points)],
            "replicas": self._replicas.get(configuration, []),
        }
        return (
            described
            | self._saturation_keys(configuration)
            | {"cost_share": self._costs(configuration), "cost_interval": self._costs(configuration, True)}
        )

    def _saturation_keys(self, configuration: Configuration) -> dict[str, Any]:
        found = self._saturations.get(configuration)
        if found is None or not found.per_seed:
            return {"saturation_per_s": None, "saturation_low_per_s": None, "saturation_high_per_s": None}
        low, high = found.interval()
        return {"saturation_per_s": found.value, "saturation_low_per_s": low, "saturation_high_per_s": high, "saturation_step_per_s": found.step}

    def _costs(self, offload: Configuration, interval: bool = False) -> dict[str, Any]:
        """Saturation throughput lost by offloading, as a share of on-host, by column; seed by seed, as both meet the same requests."""
        costs: dict[str, Any] = {}
        ours = self._saturations.get(offload)
        if offload.world != "offload" or ours is None:
            return costs
        for other, theirs in self._saturations.items():
            if other.world != "on-host" or other.policy != offload.policy or 0 in theirs.per_seed:
                continue
            pairs = list(zip(ours.per_seed, theirs.per_seed, strict=False))
            if pairs:
                shares = [1 - our / their for our, their in pairs]
                step = (ours.step / 2 + theirs.step / 2) / fmean(their for _, their in pairs)
                costs[other.column] = list(interval_of(shares, step)) if interval else fmean(shares)
        return costs

    def _ablation(self) -> Iterator[dict[str, Any]]:
        if self._ablated is None:
            return
        for label, mitigations in ablation_steps():
            configuration = replace(self._ablated, mitigations=mitigations)
            row: dict[str, Any] = {"mitigations": list(mitigations), "label": label, "policy": configuration.policy}
            row["unloaded_decision_ns"] = self._unloaded_ns.get(mitigations)
            yield row | self._saturation_keys(configuration)

    def _all_notes(self) -> list[str]:
        notes = [*self.notes, *self._unserved()]
        if self.interrupted:
            notes.append(f"stopped by hand after {self.runs} runs: what is missing was not measured")
        elif any(found.per_seed and min(found.per_seed) == 0 for found in self._saturations.values()):
            nowhere = [
                each.id for each, found in self._saturations.items() if found.per_seed and min(found.per_seed) == 0 and each in self.configurations
            ]
            if nowhere:
                notes.append(f"the objective is met at no load by {', '.join(nowhere)}")
        return notes

    def _unserved(self) -> Iterator[str]:
        """What latencies do not tell: requests that had not finished, by how long they had lasted when the run ended, and runs that served none."""
        shown = [(each.id, point) for each in self.configurations for point in self._points.get(each, {}).values()]
        for name, point in shown:
            if point.get("throughput_per_s") == 0 and any(of["count"] for of in point["classes"].values()):
                why = "" if point["switches"] else ": the policy ran no thread"
                yield f"{name} at {point['load_per_s']:,.0f}/s: nothing was served{why}"
        late = [
            f"{of['unfinished']:,} of {of['count']:,} {kind} requests ({name} at {point['load_per_s']:,.0f}/s)"
            for name, point in shown
            for kind, of in point["classes"].items()
            if not point["saturated"] and of.get("unfinished", 0) > _SEEN_SHARE * of["count"]
        ]
        if late:
            more = f", and {len(late) - _TOLD} more" if len(late) > _TOLD else ""
            yield (
                f"{', '.join(late[:_TOLD])}{more} had not finished when the run ended, and count as long as they had lasted: "
                "real latencies are longer; lengthen it with --set run.duration_ms=..."
            )


def _send(search: Search, answers: list[Point]) -> list[Ask] | None:
    """What the search asks for next, None when it has ended."""
    try:
        return search.send(answers)
    except StopIteration:
        return None


def rounded(load: float) -> float:
    """Loads to five significant digits, so that tables and repeated searches meet the same numbers."""
    return float(f"{load:.5g}")


def interval_of(values: Sequence[float], least: float) -> tuple[float, float]:
    """Student's 95 % interval of the mean, at least `least` to each side."""
    middle = fmean(values)
    reach = 0.0
    if len(values) > 1:
        from scipy.special import stdtrit

        deviation = math.sqrt(sum((value - middle) ** 2 for value in values) / (len(values) - 1))
        reach = float(stdtrit(len(values) - 1, 0.975)) * deviation / math.sqrt(len(values))
    reach = max(reach, least)
    return middle - reach, middle + reach
