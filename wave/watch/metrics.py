"""`wave metrics`: what the daemons tell, in Prometheus's exposition format, when it is asked for.

An exporter of its own, so that a scrape disturbs nobody: hostd is one real-time thread on a CPU of the enclave, agentd a loop that polls. Each is asked at most
once a second whatever the number of scrapers, which costs hostd one to two milliseconds of its time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from waveos.errors import WaveError
from waveos.watch import source, statistics
from waveos.watch.statistics import NS, Kind, Statistic

EDGES_NS = tuple(1 << power for power in range(9, 32))
"""Buckets of exposed histograms: 512 ns to 2.1 s."""
KEPT_S = 1.0
"""For so long what was told is told again."""

Pairs = Sequence[Sequence[float]]
"""A histogram as the daemons tell it: (lower edge in ns, count), edges rising."""


class Daemons(Collector):
    """Collects from all daemons of this machine, at the time of asking. `agents`: sockets of agentds, beside the enclaves' hostds."""

    def __init__(
        self,
        agents: Sequence[str] = (),
        ask: Callable[[], list[source.Status]] = lambda: source.statuses(),
        ask_agent: Callable[[str], source.Status] = source.agent_status,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._agents, self._ask, self._ask_agent, self._clock = agents, ask, ask_agent, clock
        self._lock = threading.Lock()
        self._told: tuple[list[source.Status], dict[str, source.Status | None]] | None = None
        self._told_s = 0.0

    def _documents(self) -> tuple[list[source.Status], dict[str, source.Status | None]]:
        with self._lock:
            if self._told is None or self._clock() - self._told_s >= KEPT_S:
                agents: dict[str, source.Status | None] = {}
                for path in self._agents:
                    try:
                        agents[path] = self._ask_agent(path)
                    except WaveError:
                        agents[path] = None
                self._told, self._told_s = (self._ask(), agents), self._clock()
            return self._told

    def describe(self) -> Iterable[Metric]:
        """Nothing beforehand: registering asks nobody."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """One family after the other; those of which nothing is known are left out."""
        hosts, agents = self._documents()
        families = {each.name: _family(each) for each in statistics.everything()}

        def take(all_: Iterable[Statistic], labels: list[str], document: source.Status) -> None:
            for each in all_:
                for label, value in each.values(document):
                    _add(families[each.name], each, [*labels, *([label] if each.label else [])], value)

        seen: set[tuple[str, str]] = set()
        for told in hosts:
            name = str(told["enclave"])
            if not name:
                continue
            _add(families["wave_hostd_up"], statistics.UP, [name], "error" not in told)
            if "error" in told:
                continue
            about = [str(told.get(key) or "") for key in ("subsystem", "mechanism", "cpus", "policy")]
            _add(families["wave_enclave_info"], statistics.INFO, [name, *about], 1)
            take(statistics.HOSTD, [name], {**told, "attached": bool(told.get("agent"))})
            if told.get("report"):
                seen.add(("", name))
                take(statistics.AGENT, ["", name], told["report"])
        for path, document in agents.items():
            _add(families["wave_agentd_up"], statistics.AGENTD_UP, [path], document is not None)
            if document is None:
                continue
            take(statistics.AGENTD, [path], document)
            for served in document["enclaves"]:
                whose = str(served.get("host") or ""), str(served["enclave"])
                if whose not in seen and served.get("report"):  # one of this machine's has been told by its hostd
                    seen.add(whose)
                    take(statistics.AGENT, list(whose), served["report"])
        yield from (family for family in families.values() if family.samples)


def _family(statistic: Statistic) -> Any:
    kind = (GaugeMetricFamily, CounterMetricFamily, HistogramMetricFamily)[statistic.kind]
    return kind(statistic.name, statistic.meaning + ".", labels=statistics.labels_of(statistic))


def _add(family: Any, statistic: Statistic, labels: list[str], value: Any) -> None:
    if statistic.kind is Kind.HISTOGRAM:
        buckets, total_ns = cumulative(value, statistic.bins)
        family.add_metric(labels, buckets=buckets, sum_value=total_ns * NS)
    elif isinstance(value, int | float):
        family.add_metric(labels, float(value) * statistic.factor)


def cumulative(pairs: Pairs, bins: int) -> tuple[list[tuple[str, float]], float]:
    """([(edge in seconds, how many were below)], their sum in ns, each taken for the middle of its bin) of a histogram with so many bins to a power of two."""
    buckets, seen, at = [], 0.0, 0
    for edge in EDGES_NS:
        while at < len(pairs) and pairs[at][0] < edge:
            seen += pairs[at][1]
            at += 1
        buckets.append((repr(edge * NS), seen))
    buckets.append(("+Inf", seen + sum(count for _, count in pairs[at:])))
    return buckets, sum((edge + (1 << int(edge).bit_length()) / (4 * bins)) * count for edge, count in pairs)


def registry_of(daemons: Daemons) -> CollectorRegistry:
    """A registry with nothing but the daemons: the exporter's own Python is nobody's concern."""
    registry = CollectorRegistry()
    registry.register(daemons)
    return registry


def text(registry: CollectorRegistry) -> str:
    """The exposition format."""
    return generate_latest(registry).decode()
