"""One scheduler under one load for a while: what the live benchmark measures, and how noisy the machine was meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from waveos.bench.live_watch import find_disturbed
from waveos.host.service import Served

GAP_NS = 20_000_000
"""A worker core that has requests and finishes none for so long was not ours: no request takes a tenth of that. Throttled, a real-time thread waits 50 ms."""
WARMUP_SHARE = 0.1
NEVER = np.zeros((0, 2), np.int64)
TICK_S = 0.01
"""Unit of /proc/stat (USER_HZ)."""


@dataclass(frozen=True)
class Window:
    """Figures of one window; times from when a request was to be sent until it was done. What was not done at the end counts as infinitely late."""

    offered_per_s: float
    throughput_per_s: float
    get_p50_us: float
    get_p99_us: float
    range_p50_us: float
    range_p99_us: float
    late_p50_us: float  # sent, after it was to be sent: the client's share of the latencies, and waiting for a worker
    late_p99_us: float
    backlog_ns: float  # time after the last send until all was done
    throttled_share: float  # of the window: gaps (see GAP_NS)
    busy_share: float  # of the host CPU, by the workers
    foreign_share: float  # of the host CPU, by others: the machine's noise
    stolen_share: float  # of the host CPU, by the hypervisor
    disturbed_share: float  # of the requests, those that are left out of the figures of time: the CPU was slow in their busy period
    switches: float  # of a worker onto the CPU, a request


@dataclass(frozen=True)
class Usage:
    """CPU time so far: of the workers and of Wave's own, ns; of their CPU by its own clock, s."""

    workers_ns: int
    switches: int
    cpu_s: float
    stolen_s: float
    own_ns: int = 0


def read_usage(pids: Iterable[int], core: int, own: Iterable[int] = ()) -> Usage:
    """The usage of the workers `pids` (main threads), of that CPU, and of Wave's own processes on it."""
    ran, switches = _ran(pids)
    own_ns, _ = _ran(own)
    for line in Path("/proc/stat").read_text().splitlines():
        name, *values = line.split()
        if name == f"cpu{core}":
            user, nice, system, _, _, irq, softirq, steal = (int(value) for value in values[:8])
            return Usage(ran, switches, TICK_S * (user + nice + system + irq + softirq), TICK_S * steal, own_ns)
    return Usage(ran, switches, 0.0, 0.0, own_ns)


def _ran(pids: Iterable[int]) -> tuple[int, int]:
    """ns on a CPU, and how often it was given one, summed."""
    ran = switches = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/schedstat").read_text().split()
            ran, switches = ran + int(fields[0]), switches + int(fields[2])
    return ran, switches


def look_back(served: Served, before: Usage, after: Usage, slow_ns: NDArray[np.int64] = NEVER) -> Window:
    """The figures of a load that was served between two readings of the usage; `slow_ns`, [n, 2]: when the host CPU was slow, from and to."""
    first, last = int(served.intended_ns[0]), int(served.intended_ns[-1])
    length_ns = last - first
    done = served.done_ns > 0
    end_ns = int(served.done_ns.max()) if done.any() else last
    counted = served.intended_ns >= first + WARMUP_SHARE * length_ns
    disturbed = find_disturbed(served, slow_ns)
    if not disturbed[counted].all():
        counted &= ~disturbed
    sojourn = np.where(done, served.done_ns - served.intended_ns, np.inf)
    late = np.where(served.sent_ns > 0, served.sent_ns - served.intended_ns, np.inf)
    in_window = done & (served.done_ns >= first) & (served.done_ns <= last)
    get_p50, get_p99 = quantiles_us(sojourn[counted & ~served.is_range])
    range_p50, range_p99 = quantiles_us(sojourn[counted & served.is_range])
    late_p50, late_p99 = quantiles_us(late[counted])
    wall_s = max(1e-9, (end_ns - first) * 1e-9)
    workers_s = (after.workers_ns - before.workers_ns) * 1e-9
    return Window(
        offered_per_s=len(sojourn) / (length_ns * 1e-9),
        throughput_per_s=float(in_window.sum()) / (length_ns * 1e-9),
        get_p50_us=get_p50,
        get_p99_us=get_p99,
        range_p50_us=range_p50,
        range_p99_us=range_p99,
        late_p50_us=late_p50,
        late_p99_us=late_p99,
        backlog_ns=float(end_ns - last) if done.all() else float("inf"),
        throttled_share=gaps_ns(served) / length_ns,
        busy_share=workers_s / wall_s,
        foreign_share=max(0.0, (after.cpu_s - before.cpu_s - workers_s - (after.own_ns - before.own_ns) * 1e-9) / wall_s),
        stolen_share=(after.stolen_s - before.stolen_s) / wall_s,
        disturbed_share=float(disturbed.mean()),
        switches=(after.switches - before.switches) / max(1, int(done.sum())),
    )


def quantiles_us(times_ns: Any) -> tuple[float, float]:
    """Median and 99th percentile in us; of nothing: NaN."""
    if not len(times_ns):
        return float("nan"), float("nan")
    at = np.sort(times_ns)
    return float(at[(len(at) - 1) // 2]) / 1_000, float(at[min(len(at) - 1, int(0.99 * len(at)))]) / 1_000


def gaps_ns(served: Served) -> float:
    """Time in gaps: stretches above GAP_NS without a completion while a request was with a worker all along."""
    done = np.sort(served.done_ns[served.done_ns > 0])
    if len(done) < 2:
        return 0.0
    total = 0.0
    for at in np.flatnonzero(np.diff(done) > GAP_NS):
        begin, end = int(done[at]), int(done[at + 1])
        waiting = (served.sent_ns > 0) & (served.sent_ns <= begin) & ((served.done_ns >= end) | (served.done_ns == 0))
        total += (end - begin) if waiting.any() else 0
    return total
