"""The tables of `wave top`, cell by cell: the screen and `--once` show the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from waveos.watch.view import GRAVE

ENCLAVES = ("enclave", "mechanism", "policy", "agent", "msgs/s", "dec/s", "stale", "p50 µs", "p99 µs", "waiting", "faults")
"""Columns of the table of enclaves; the two times are those of the round trip."""
Row = dict[str, Any]
"""As `waveos.watch.view.compare` makes it."""


def figure(value: float | None) -> str:
    """Three digits, or a dash."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def enclave_cells(row: Row) -> list[str]:
    """Of the table of enclaves."""
    if "error" in row:
        return [row["enclave"], "no hostd"]
    trip = row["latencies_us"].get("round trip") or {}
    stale = row["stale_share"]
    faults = sum(count for what, count in row["faults"].items() if what in GRAVE)
    waiting = row["threads"].get("runnable")
    return [
        *(row["enclave"], row["mechanism"], row["policy"] or "none", str(row["agent_pid"] or "none")),
        *(figure(row["messages_per_s"]), figure(row["decisions_per_s"]), "-" if stale is None else f"{stale:.1%}"),
        *(figure(trip.get("p50")), figure(trip.get("p99")), figure(waiting), figure(faults)),
    ]


def cpu_cells(row: Row) -> list[list[str]]:
    """Of the table of CPUs."""
    return [[str(each["cpu"]), each["state"], f"{each['pid']} {each['name']}" if each["pid"] else "", str(each["staged"])] for each in row["cpus"]]


def queue_cells(row: Row) -> list[list[str]]:
    """Of the table of queues."""
    threads = [[f"threads: {what}", str(count)] for what, count in row["threads"].items()]
    return threads + ([["decisions staged", str(row["staged_decisions"])]] if row["staged_decisions"] is not None else [])


def latency_cells(row: Row) -> list[list[str]]:
    """Of the table of latencies."""
    return [[what, *(figure(found[key]) for key in ("p50", "p99", "most", "per_s"))] for what, found in row["latencies_us"].items()]


def fault_cells(row: Row) -> list[list[str]]:
    """Of the table of faults: those that have happened, then the others."""
    rows = sorted(row["faults"].items(), key=lambda each: each[1] == 0)
    return [[what, f"{count:,}", f"+{new:,}" if (new := row["faults_new"].get(what)) else ""] for what, count in rows]


BLOCKS: tuple[tuple[str, Sequence[str], Callable[[Row], list[list[str]]]], ...] = (
    ("CPUs", ("CPU", "state", "thread", "staged"), cpu_cells),
    ("queues", ("queue", "now"), queue_cells),
    ("latencies", ("µs", "p50", "p99", "most", "/s"), latency_cells),
    ("faults", ("fault", "in all", "new"), fault_cells),
)
"""Of one enclave: title, columns, and what makes the rows."""
