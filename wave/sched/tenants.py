"""Core scheduling, proved over a trace: at no moment do two tenants run on the CPUs of one core.

    assert not shared(trace, core_of, tenant_of)

A trace is an array of `waveos.trace.TRACE_EVENT`; only RUN_BEGIN and RUN_END count. It must be whole: an end without its begin, or a begin on a CPU that
still runs another thread, is an error, for nothing can be proved over what is not there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from waveos.errors import WaveError
from waveos.trace import TraceKind


@dataclass(frozen=True)
class Sharing:
    """Two tenants on one core, from when until when (ns): until the first of the two threads left."""

    core: int
    begin_ns: int
    end_ns: int
    threads: tuple[int, int]
    tenants: tuple[int, int]

    def __str__(self) -> str:
        (one, two), (first, second) = self.threads, self.tenants
        return f"core {self.core}, {self.begin_ns}..{self.end_ns} ns: thread {one} of tenant {first} beside thread {two} of tenant {second}"


def shared(trace: np.ndarray[Any, Any], core_of: Callable[[int], int], tenant_of: Callable[[int], int]) -> list[Sharing]:
    """Every time that two tenants were on one core, in the order in which they began; none: core scheduling held over the whole trace.

    `core_of` names a CPU's core, `tenant_of` a thread's tenant. A thread that leaves in the same nanosecond in which another comes has left.
    Raises WaveError for a trace that is not whole.
    """
    events = trace[np.isin(trace["kind"], (TraceKind.RUN_BEGIN, TraceKind.RUN_END))]
    # Stable in time; in one nanosecond ends come before begins, but for a run that begins and ends in it.
    order = np.lexsort((np.arange(len(events)), events["time_ns"]))
    running: dict[int, tuple[int, int]] = {}  # CPU -> (thread, since)
    beside: dict[int, set[int]] = {}  # core -> CPUs that run
    found: list[Sharing] = []
    pending = [events[i] for i in order]
    for event in _ends_first(pending):
        cpu, tid, at = int(event["cpu"]), int(event["tid"]), int(event["time_ns"])
        core = core_of(cpu)
        if event["kind"] == TraceKind.RUN_END:
            if running.get(cpu, (-1, 0))[0] != tid:
                raise WaveError(f"the trace is not whole: at {at} ns CPU {cpu} stops running thread {tid}, which it never began")
            _part(running, beside, found, cpu, core, at, core_of, tenant_of)
        else:
            if cpu in running:
                raise WaveError(f"the trace is not whole: at {at} ns CPU {cpu} begins thread {tid} while it runs thread {running[cpu][0]}")
            running[cpu] = (tid, at)
            beside.setdefault(core, set()).add(cpu)
    last = int(events["time_ns"].max()) if len(events) else 0
    for cpu in list(running):
        _part(running, beside, found, cpu, core_of(cpu), last + 1, core_of, tenant_of)
    return sorted(found, key=lambda each: (each.begin_ns, each.core))


def _part(
    running: dict[int, tuple[int, int]],
    beside: dict[int, set[int]],
    found: list[Sharing],
    cpu: int,
    core: int,
    at: int,
    core_of: Callable[[int], int],
    tenant_of: Callable[[int], int],
) -> None:
    """The thread leaves `cpu` at `at`: with whom it shared the core until now."""
    tid, since = running.pop(cpu)
    beside[core].discard(cpu)
    for other in sorted(beside[core]):
        neighbour, neighbour_since = running[other]
        begin = max(since, neighbour_since)
        if begin < at and tenant_of(tid) != tenant_of(neighbour):
            found.append(Sharing(core, begin, at, (tid, neighbour), (tenant_of(tid), tenant_of(neighbour))))


def _ends_first(events: list[Any]) -> list[Any]:
    """Within one nanosecond, ends of runs that began before it come first; the order is kept otherwise."""
    ordered: list[Any] = []
    start = 0
    while start < len(events):
        stop = start
        while stop < len(events) and events[stop]["time_ns"] == events[start]["time_ns"]:
            stop += 1
        group = events[start:stop]
        begun = {(int(e["cpu"]), int(e["tid"])) for e in group if e["kind"] == TraceKind.RUN_BEGIN}
        early = [e for e in group if e["kind"] == TraceKind.RUN_END and (int(e["cpu"]), int(e["tid"])) not in begun]
        ordered += early + [e for e in group if not any(e is each for each in early)]
        start = stop
    return ordered
