"""What `wave top` shows, as data: two looks at the daemons, and what happened between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from waveos.watch.source import Status

LATENCIES = {
    "round trip": ("counters", "round_trip_ns"),
    "staleness": ("counters", "age_ns"),
    "enforcement": ("counters", "enforced_ns"),
    "event to agent": ("report", "event_ns"),
    "agent decides": ("report", "decide_ns"),
}
"""Histograms of a status, by what they are called here; docs/observe.md says what each is."""
FAULTS = {
    "agents lost": ("agents_lost",),
    "agents refused": ("agents_refused",),
    "fallbacks": ("counters", "fallbacks"),
    "queue overflows": ("counters", "overflow"),
    "silences": ("counters", "silences"),
    "stale": ("counters", "outcomes", "stale"),
    "congested": ("counters", "outcomes", "congested"),
    "invalid": ("counters", "outcomes", "invalid"),
    "strays": ("counters", "strays"),
    "deviations": ("counters", "deviations"),
    "outside": ("counters", "outside"),
    "unserved": ("report", "unserved"),
    "major page faults": ("hostd", "page_faults_from_disk"),
}
"""What should not happen, or not often."""
GRAVE = ("agents lost", "fallbacks", "queue overflows", "silences", "congested", "invalid", "outside", "unserved", "major page faults")
"""Those that count as faults in the table of enclaves."""


@dataclass(frozen=True)
class Look:
    """All statuses at one moment."""

    time_s: float
    statuses: Sequence[Status]


def compare(now: Look, before: Look | None = None) -> list[dict[str, Any]]:
    """One row an enclave: rates and latencies since `before`, or, without, counts and latencies since its begin (rates are None). Times in µs."""
    earlier = {each["enclave"]: each for each in before.statuses} if before else {}
    seconds = now.time_s - before.time_s if before else 0.0
    return [_row(each, earlier.get(each["enclave"]), seconds) for each in now.statuses]


def _row(status: Status, before: Status | None, seconds: float) -> dict[str, Any]:
    name = status["enclave"]
    if "error" in status:
        return {"enclave": name, "error": status["error"]}
    if before is not None and ("error" in before or before.get("pid") != status.get("pid")):
        before = None  # another hostd than before: it counts from 0

    def count(*path: str) -> int | None:
        value = _dig(status, path)
        return int(value) if isinstance(value, int | float) else None

    def rate(*path: str) -> float | None:
        new, old = count(*path), _dig(before, path)
        same = path[0] != "report" or _dig(status, ("report", "pid")) == _dig(before, ("report", "pid"))
        return None if new is None or old is None or seconds <= 0 or not same else max(0.0, (new - old) / seconds)

    outcomes = {
        key: value - (_dig(before, ("counters", "outcomes", key)) or 0) for key, value in (_dig(status, ("counters", "outcomes")) or {}).items()
    }
    decided = sum(outcomes.values())
    faults = {what: found for what, path in FAULTS.items() if (found := count(*path)) is not None}
    agent = status.get("agent")
    return {
        "enclave": name,
        "subsystem": status.get("subsystem"),
        "mechanism": status.get("mechanism"),
        "policy": status.get("policy"),
        "agent_pid": agent["pid"] if agent else None,
        "messages_per_s": rate("counters", "messages") if count("counters", "messages") is not None else rate("report", "messages"),
        "decisions_per_s": rate("counters", "decisions") if count("counters", "decisions") is not None else rate("report", "decisions"),
        "stale_share": outcomes.get("stale", 0) / decided if decided else None,
        "latencies_us": {
            what: _quantiles(_since(_dig(status, path), _dig(before, path)), seconds)
            for what, path in LATENCIES.items()
            if _dig(status, path) is not None
        },
        "threads": {
            what: found
            for what, path in (
                ("all", ("counters", "threads")),
                ("running", ("counters", "running")),
                ("runnable", ("counters", "queued", "runnable")),
                ("in the policy's hands", ("report", "waiting")),
            )
            if (found := count(*path)) is not None
        },
        "staged_decisions": count("counters", "queued", "staged"),
        "cpus": [{**each, "name": _name_of(each["pid"])} for each in status.get("on_cpus", [])],
        "faults": faults,
        "faults_new": {what: faults[what] - (_dig(before, FAULTS[what]) or 0) for what in faults} if before is not None else {},
        "hostd_cpu_share": None if (used := rate("hostd", "cpu_ns")) is None else used * 1e-9,
    }


def _dig(value: Any, path: Sequence[str]) -> Any:
    for key in path:
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def _since(now: Any, before: Any) -> list[tuple[float, int]]:
    """The difference of two histograms [(lower edge, count)]; all of the first where it has begun anew."""
    old = dict(before or [])
    found = [(float(edge), int(count) - int(old.get(edge, 0))) for edge, count in now]
    if any(count < 0 for _, count in found):
        found = [(float(edge), int(count)) for edge, count in now]
    return [(edge, count) for edge, count in found if count]


def _quantiles(histogram: Sequence[tuple[float, int]], seconds: float) -> dict[str, float | None]:
    """The edges in which they lie, µs; None where nothing was counted."""
    total, seen = sum(count for _, count in histogram), 0
    found: dict[str, float | None] = {"p50": None, "p99": None, "most": None, "per_s": total / seconds if seconds > 0 else None}
    for edge, count in histogram:
        seen += count
        for name, share in (("p50", 0.5), ("p99", 0.99), ("most", 1.0)):
            if found[name] is None and seen >= share * total:
                found[name] = edge / 1_000
    return found


def _name_of(pid: int) -> str:
    """What a process calls itself."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip() if pid else ""
    except OSError:
        return ""
