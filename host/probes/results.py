"""What each probe's tables say: from counters as the kernel holds them to one object a measurement."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from waveos.host.probes.histogram import doublings_us, percentile_us

Table = list[list[Any]]
"""[[key, value], ...] of what is not zero; a per-CPU value is a list."""


@dataclass(frozen=True)
class Window:
    """When it was measured, ns of CLOCK_MONOTONIC."""

    began_ns: int
    ended_ns: int

    @property
    def seconds(self) -> float:
        """How long it was measured."""
        return (self.ended_ns - self.began_ns) / 1e9


@dataclass(frozen=True)
class Kind:
    """A probe: its counters, which a new measurement sets to zero; its state, which goes on; and what is made of them."""

    about: str
    counters: tuple[str, ...]
    summarize: Callable[[dict[str, Table], Window], dict[str, Any]]
    state: tuple[str, ...] = ()
    histogram: bool = False


STATES = {
    0x000: "preempted, or it yielded",
    0x001: "asleep (S)",
    0x002: "asleep, not to be disturbed (D)",
    0x004: "stopped (T)",
    0x008: "traced (t)",
    0x040: "parked (P)",
    0x080: "idle kernel thread (I)",
    0x200: "woken, waits for a CPU",
}
"""Why a thread is not on a CPU: prev_state of the tracepoint sched_switch, and 0x200, which is the probe's own."""
SWITCHES = ("voluntary", "involuntary")
"""Kinds of context switch, by their number in switches.c; the second includes sched_yield, as /proc/PID/status has it."""


def _runqlat(tables: dict[str, Table], window: Window) -> dict[str, Any]:
    return _times(_add_up(each for _, percpu in tables["waits"] for each in percpu), tables)


def _offcpu(tables: dict[str, Table], window: Window) -> dict[str, Any]:
    tallies = {(key["name"], key["state"]): _add_up(percpu) for key, percpu in tables["times"]}
    for _, absence in tables["absences"]:  # those that have not come back
        if not absence["since"]:
            continue
        spans = [(absence["state"], absence["since"], absence["woken_at"] or window.ended_ns)]
        if absence["woken_at"]:
            spans.append((0x200, absence["woken_at"], window.ended_ns))
        for state, since, until in spans:
            away = until - max(since, window.began_ns)
            if away > 0:
                tally = tallies.setdefault((absence["name"], state), _NOTHING)
                tallies[absence["name"], state] = _add_up([tally, {"count": 1, "total_ns": away, "max_ns": away}])
    by_state: dict[int, dict[str, int]] = defaultdict(lambda: _NOTHING)
    for (_, state), tally in tallies.items():
        by_state[state] = _add_up([by_state[state], tally])
    return {
        "reasons": [{"reason": STATES.get(state, hex(state)), **_spent(tally)} for state, tally in _longest(by_state)],
        "rows": [{"thread": name, "reason": STATES.get(state, hex(state)), **_spent(tally)} for (name, state), tally in _longest(tallies)],
    }


def _wakeups(tables: dict[str, Table], window: Window) -> dict[str, Any]:
    rows, all_runs, wakings = [], [], 0
    for pair, percpu in tables["pairs"]:
        runs = _add_up(each["runs"] for each in percpu)
        count = sum(each["wakings"] for each in percpu)
        rows.append({"waker": pair["waker"], "woken": pair["woken"], "wakings": count, "ran": runs["count"], **_mean_and_max(runs)})
        all_runs.append(runs)
        wakings += count
    rows.sort(key=lambda row: (-row["wakings"], row["waker"], row["woken"]))
    return {"wakings": wakings, **_times(_add_up(all_runs), tables), "rows": rows}


def _switches(tables: dict[str, Table], window: Window) -> dict[str, Any]:
    by_kind: dict[int, list[int]] = {kind: percpu for kind, percpu in tables["switches"]}  # noqa: C416 (says what is what)
    cpus = range(max((len(percpu) for percpu in by_kind.values()), default=0))
    rows = [{"cpu": cpu, **{name: by_kind.get(kind, {cpu: 0})[cpu] for kind, name in enumerate(SWITCHES)}} for cpu in cpus]
    total = {name: sum(row[name] for row in rows) for name in SWITCHES}
    return {
        "count": sum(total.values()),
        **total,
        "per_second": {name: count / window.seconds for name, count in total.items()} if window.seconds else None,
        "rows": [row for row in rows if any(row[name] for name in SWITCHES)],
    }


KINDS = {
    "runqlat": Kind("How long threads that could run wait for a CPU.", ("waits",), _runqlat, histogram=True),
    "offcpu": Kind("Why threads are not on a CPU, and for how long.", ("times",), _offcpu, state=("absences",)),
    "wakeups": Kind("Who wakes whom, and how long the woken takes to run.", ("pairs",), _wakeups, histogram=True),
    "switches": Kind("Context switches by kind and CPU.", ("switches",), _switches),
}

_NOTHING = {"count": 0, "total_ns": 0, "max_ns": 0}


def _add_up(tallies: Iterable[dict[str, int]]) -> dict[str, int]:
    together = dict(_NOTHING)
    for tally in tallies:
        together["count"] += tally["count"]
        together["total_ns"] += tally["total_ns"]
        together["max_ns"] = max(together["max_ns"], tally["max_ns"])
    return together


def _times(tally: dict[str, int], tables: dict[str, Table]) -> dict[str, Any]:
    """Count, mean, percentiles, longest and histogram of the times; percentiles are read from the histogram, to an eighth."""
    counts = {bucket: sum(percpu) for bucket, percpu in tables["histogram"]}
    longest_us = tally["max_ns"] / 1000
    percentiles = {name: percentile_us(counts, share) for name, share in (("p50_us", 0.5), ("p99_us", 0.99), ("p999_us", 0.999))}
    return {
        "count": tally["count"],
        "total_ms": tally["total_ns"] / 1e6,
        "mean_us": tally["total_ns"] / tally["count"] / 1000 if tally["count"] else None,
        **{name: None if time is None else min(time, longest_us) for name, time in percentiles.items()},
        "max_us": longest_us,
        "histogram": doublings_us(counts),
    }


def _spent(tally: dict[str, int]) -> dict[str, Any]:
    return {"count": tally["count"], "total_ms": tally["total_ns"] / 1e6, **_mean_and_max(tally)}


def _mean_and_max(tally: dict[str, int]) -> dict[str, Any]:
    return {"mean_us": tally["total_ns"] / tally["count"] / 1000 if tally["count"] else None, "max_us": tally["max_ns"] / 1000}


def _longest(tallies: dict[Any, dict[str, int]]) -> list[tuple[Any, dict[str, int]]]:
    return sorted(tallies.items(), key=lambda item: (-item[1]["total_ns"], str(item[0])))
