"""What a set of results says: configurations, points, the rows of the comparison. Every form of report draws from here.

Results are JSON (docs: the keys are those of `wave compare --json`). Only `configs` matters much; whatever else is absent is left
out of the report, so that one run of one configuration makes a report as a whole sweep does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from waveos.errors import ConfigError
from waveos.report.quantities import number, show_rate, show_share, show_time

QUANTILES = {"p50_us": "p50", "p99_us": "p99", "p999_us": "p99.9"}
WORLDS = {"kernel": "kernel's own policy", "on-host": "agent on a host core", "offload": "agent on the IPU"}
SAME_WORKERS = "same workers"
SAME_MACHINE = "same machine"
COLUMNS = (SAME_WORKERS, SAME_MACHINE)


@dataclass(frozen=True)
class Spread:
    """One quantity at one load, over the seeds."""

    middle: float
    low: float
    high: float


@dataclass(frozen=True)
class Point:
    """All that was measured at one offered load: the points of all seeds."""

    load_per_s: float
    seeds: Sequence[Mapping[str, Any]]

    @property
    def saturated(self) -> bool:
        """Whether most seeds say so; where they say nothing, whether the throughput fell behind the load by more than 2 %."""
        said = [bool(seed["saturated"]) if "saturated" in seed else _fell_behind(seed) for seed in self.seeds]
        return sum(said) * 2 > len(said)

    def value(self, *path: str) -> Spread | None:
        """The median over seeds, and the range, of a number at this path of keys, as `value("classes", "GET", "p99_us")`."""
        found = [value for seed in self.seeds if (value := number(_dig(seed, path))) is not None]
        return Spread(median(found), min(found), max(found)) if found else None

    def middle(self, *path: str) -> float | None:
        """The median over seeds, or None."""
        spread = self.value(*path)
        return spread.middle if spread else None


@dataclass(frozen=True)
class Configuration:
    """One policy in one world."""

    id: str
    policy: str
    world: str
    workers: int | None
    column: str
    points: Sequence[Point]
    saturation_per_s: float | None
    saturation_low_per_s: float | None
    saturation_high_per_s: float | None
    cost_share: Mapping[str, float] = field(default_factory=dict)
    cost_interval: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Unique within a report: policy, world, and the column where it is an on-host one with fewer workers."""
        name = self.world if self.world == "kernel" else f"{self.policy} {self.world}"
        return f"{name}, {self.column}" if self.column == SAME_MACHINE else name

    def at(self, load_per_s: float | None) -> Point | None:
        """The point at this load."""
        return next((point for point in self.points if load_per_s is not None and _same(point.load_per_s, load_per_s)), None)


@dataclass(frozen=True)
class AblationRow:
    """One set of mitigations: what a decision costs with nothing else going on, and what throughput it leaves."""

    label: str
    unloaded_us: float | None
    saturation_per_s: float | None
    low_per_s: float | None
    high_per_s: float | None


@dataclass(frozen=True)
class Row:
    """One configuration in the comparison. Latencies, cores and staleness are those at `load_per_s`."""

    configuration: Configuration
    load_per_s: float | None
    saturated: bool
    latency_us: Mapping[str, Mapping[str, float | None]]  # class -> quantile -> µs
    host_cores: float | None
    agent_busy_share: float | None
    stale_share: float | None
    stale_age_p50_us: float | None
    stale_age_p99_us: float | None
    decision_age_p50_us: float | None
    decision_age_p99_us: float | None


@dataclass(frozen=True)
class Reading:
    """Results, read."""

    raw: Mapping[str, Any]
    configurations: Sequence[Configuration]
    classes: Sequence[str]
    objective_us: Mapping[str, Mapping[str, float]]  # class -> quantile -> µs
    ablation: Sequence[AblationRow]
    load_per_s: float | None

    @property
    def name(self) -> str:
        """Of the experiment."""
        return str(self.raw.get("name") or _dig(self.raw, ("scenario", "name")) or "results")

    @property
    def timing(self) -> str:
        """How the times were made: modelled, measured or none."""
        return str(self.raw.get("timing") or "not stated")

    @property
    def link_assumed(self) -> bool:
        """Whether the link's costs are not verified; an absent statement is no verification."""
        return bool(self._link) and not self._link.get("verified", False)

    @property
    def link_text(self) -> str:
        """As every table says it: "link profile: assumed (mount-evans)"."""
        if not self._link:
            return "link profile: none"
        name = self._link.get("name", "unnamed")
        return f"link profile: assumed ({name})" if self.link_assumed else f"link profile: {name}, verified"

    @property
    def link_source(self) -> str:
        """Where the link's costs come from."""
        return str(self._link.get("source") or "")

    @property
    def _link(self) -> Mapping[str, Any]:
        link = self.raw.get("link")
        return link if isinstance(link, Mapping) else {"name": link} if link else {}

    @property
    def policies(self) -> list[str]:
        """In the order in which they appear, without the kernel's."""
        return list(dict.fromkeys(each.policy for each in self.configurations if each.world != "kernel"))

    @property
    def seeds(self) -> list[int]:
        """All seeds that were run: those that the results name, and those of their points."""
        named = self.raw.get("seeds")
        found = set(named if isinstance(named, list) else ()) | {
            seed.get("seed") for each in self.configurations for point in each.points for seed in point.seeds
        }
        return sorted(seed for seed in found if isinstance(seed, int))

    @property
    def objective_text(self) -> str:
        """ "GET p99 ≤ 200 µs and RANGE p99 ≤ 10.4 ms", or nothing."""
        goals = ((name, QUANTILES.get(key, key.removesuffix("_us")), us) for name, of in self.objective_us.items() for key, us in of.items())
        return " and ".join(f"{name} {quantile} ≤ {show_time(us)}" for name, quantile, us in goals)

    @property
    def has_saturation(self) -> bool:
        """Whether any configuration's saturation was searched for."""
        return any(each.saturation_per_s is not None for each in self.configurations)

    @property
    def cost_columns(self) -> list[str]:
        """The columns of the cost of offload that any configuration has."""
        return [column for column in COLUMNS if any(column in each.cost_share for each in self.configurations)]

    def rows(self) -> list[Row]:
        """The comparison: one row a configuration, at `load_per_s`; without such a point, at the highest load that it sustains."""
        return [self._row(each) for each in self.configurations]

    def answers(self) -> list[str]:
        """The findings in words, one sentence a policy that was offloaded."""
        sentences = []
        for each in self.configurations:
            if each.world != "offload" or each.saturation_per_s is None:
                continue
            under = " under the objective" if self.objective_us else ""
            sentence = f"{each.policy}, offloaded, sustains {show_rate(each.saturation_per_s)}{under}"
            parts = []
            if (cost := each.cost_share.get(SAME_WORKERS)) is not None:
                parts.append(f"{_more_or_less(cost)} than with the agent on a host core and as many workers")
            if (cost := each.cost_share.get(SAME_MACHINE)) is not None:
                parts.append(f"{_more_or_less(cost)} than on the same machine, where that agent takes one of the cores")
            sentences.append(sentence + (": " + ", and ".join(parts) if parts else "") + ".")
        return sentences

    def _row(self, configuration: Configuration) -> Row:
        point = configuration.at(self.load_per_s)
        if point is None and configuration.points:
            sustained = [each for each in configuration.points if not each.saturated]
            point = sustained[-1] if sustained else configuration.points[0]

        def at(*path: str) -> float | None:
            return point.middle(*path) if point else None

        return Row(
            configuration=configuration,
            load_per_s=point.load_per_s if point else None,
            saturated=point.saturated if point else False,
            latency_us={name: {key: at("classes", name, key) for key in QUANTILES} for name in self.classes},
            host_cores=at("host_cores_policy"),
            agent_busy_share=at("agent_busy_share"),
            stale_share=at("stale_share"),
            stale_age_p50_us=at("stale_age_p50_us"),
            stale_age_p99_us=at("stale_age_p99_us"),
            decision_age_p50_us=at("decision_age_p50_us"),
            decision_age_p99_us=at("decision_age_p99_us"),
        )


def read_results(results: Mapping[str, Any]) -> Reading:
    """Read results. Raises ConfigError if they are not results at all: no object, or no list of configurations."""
    if not isinstance(results, Mapping) or not isinstance(results.get("configs"), list):
        raise ConfigError("these are not results of Wave: wants a JSON object with a list `configs`, as `wave compare --json` prints it")
    configurations = [_read_configuration(each, number_) for number_, each in enumerate(results["configs"])]
    names = [str(each["name"]) for each in _dig(results, ("scenario", "workload", "classes")) or [] if isinstance(each, Mapping) and "name" in each]
    seen = [name for each in configurations for point in each.points for seed in point.seeds for name in seed.get("classes") or {}]
    return Reading(
        raw=results,
        configurations=configurations,
        classes=[name for name in dict.fromkeys([*names, *seen]) if name in seen],
        objective_us=_read_objective(results),
        ablation=[_read_ablation(each) for each in results.get("ablation") or [] if isinstance(each, Mapping)],
        load_per_s=number(results.get("table_load_per_s")) or _common_load(configurations),
    )


def _read_configuration(raw: Any, place: int) -> Configuration:
    if not isinstance(raw, Mapping):
        raise ConfigError(f"configs[{place}] of the results is not an object; wants one with id, policy, world and points")
    policy, _, world = str(raw.get("id") or f"configuration {place + 1}").partition("/")
    by_load: dict[float, list[Mapping[str, Any]]] = {}
    for point in raw.get("points") or []:
        if isinstance(point, Mapping) and (load := number(point.get("load_per_s"))) is not None:
            by_load.setdefault(round(load, 3), []).append(point)
    workers = number(raw.get("workers"))
    costs = raw.get("cost_share")
    ends = {name: (number(_at(raw, name, 0)), number(_at(raw, name, 1))) for name in COLUMNS}
    return Configuration(
        id=str(raw.get("id") or f"configuration {place + 1}"),
        policy=str(raw.get("policy") or policy),
        world=str(raw.get("world") or world or "virtual"),
        workers=None if workers is None else int(workers),
        column=str(raw.get("column") or ""),
        points=[Point(load, seeds) for load, seeds in sorted(by_load.items())],
        saturation_per_s=number(raw.get("saturation_per_s")),
        saturation_low_per_s=number(raw.get("saturation_low_per_s")),
        saturation_high_per_s=number(raw.get("saturation_high_per_s")),
        cost_interval={name: (low, high) for name, (low, high) in ends.items() if low is not None and high is not None},
        cost_share={name: value for name in COLUMNS if isinstance(costs, Mapping) and (value := number(costs.get(name))) is not None},
    )


def _at(raw: Mapping[str, Any], column: str, end: int) -> Any:
    """One end of the interval of a column's cost."""
    interval = _dig(raw, ("cost_interval", column))
    return interval[end] if isinstance(interval, list | tuple) and len(interval) == 2 else None


def _read_ablation(raw: Mapping[str, Any]) -> AblationRow:
    mitigations = raw.get("mitigations")
    unloaded_ns = number(raw.get("unloaded_decision_ns"))
    return AblationRow(
        label=str(raw.get("label") or ", ".join(map(str, mitigations or [])) or "none"),
        unloaded_us=None if unloaded_ns is None else unloaded_ns / 1_000,
        saturation_per_s=number(raw.get("saturation_per_s")),
        low_per_s=number(raw.get("saturation_low_per_s")),
        high_per_s=number(raw.get("saturation_high_per_s")),
    )


def _read_objective(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """From `objective`, or the scenario's; a goal in multiples of the mean needs the class's mean in `service`."""
    goals = results.get("objective") or _dig(results, ("scenario", "objective")) or {}
    found: dict[str, dict[str, float]] = {}
    for name, goal in goals.items() if isinstance(goals, Mapping) else ():
        for key, value in goal.items() if isinstance(goal, Mapping) else ():
            mean = number(_dig(results, ("service", name, "mean_us")))
            limit = number(value)
            if limit is not None and key.endswith("_x_mean"):
                key, limit = key.replace("_x_mean", "_us"), None if mean is None else limit * mean
            if limit is not None:
                found.setdefault(str(name), {})[key] = limit
    return found


def _common_load(configurations: Iterable[Configuration]) -> float | None:
    """The load to compare at: of those offered to all configurations, one that most of them sustain, and the highest such."""
    measured = [each for each in configurations if each.points]
    loads = [point.load_per_s for point in measured[0].points] if measured else []
    candidates = []
    for load in loads:
        points = [each.at(load) for each in measured]
        if all(points):
            candidates.append((sum(not point.saturated for point in points if point), load))
    return max(candidates)[1] if candidates else None


def _more_or_less(cost: float) -> str:
    return f"{show_share(abs(cost))} {'less' if cost >= 0 else 'more'}"


def _fell_behind(seed: Mapping[str, Any]) -> bool:
    load, throughput = number(seed.get("load_per_s")), number(seed.get("throughput_per_s"))
    return load is not None and throughput is not None and throughput < 0.98 * load


def _same(one: float, other: float) -> bool:
    return abs(one - other) <= 1e-6 * max(abs(one), abs(other), 1.0)


def _dig(value: Any, path: Iterable[str]) -> Any:
    for key in path:
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value
