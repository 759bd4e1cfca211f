"""Probes with bcc: what the kernel itself says of scheduling, independent of all that Wave counts; the ground truth of live experiments.

    from waveos.host import probes
    probes.runqlat([pid], duration_s=5.0)["p99_us"]

    with probes.Probe("switches", probes.Target(cpus=(0,))) as probe:
        ...
        print(probe.stop()["per_second"])

Compiled on the target; filtered and counted in the kernel, so that nothing is sent per event. They use tracepoints only: no kprobes, no
structures of the kernel's. They need root, the distribution's python3-bpfcc, and kernel headers (`headers.py`); where one is missing it is a
MissingError that says so. Nothing of the machine is changed, and what ends the process that holds a probe detaches it.

What they cost whom they watch (`wave bench probes`; AMD EPYC in a VM, Linux 6.18): a waking and a switch through a pipe, 2.5 µs of CPU time, take 0.1 to
0.2 µs longer under `switches`, 0.4 to 0.55 µs under each of the others, filtered or not; so at 20,000 switches a second 1 % of the CPU. Besides: 0.2 s to
attach, 1 to 3 ms to read, 0.1 to 1 s (the kernel's, asleep) to detach, and 130 MB while attached.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from waveos.host.probes.probe import Probe
from waveos.host.probes.results import KINDS
from waveos.host.probes.target import Target

__all__ = ["KINDS", "Probe", "Target", "offcpu", "runqlat", "switches", "wakeups"]


def runqlat(pids: Sequence[int] = (), duration_s: float = 5.0, cpus: Sequence[int] = ()) -> dict[str, Any]:
    """How long threads that could run wait for a CPU: `count`, `p50_us`, `p99_us`, `p999_us`, `max_us`, `histogram`. No pids: all threads."""
    return _measure("runqlat", pids, duration_s, cpus)


def offcpu(pids: Sequence[int] = (), duration_s: float = 5.0, cpus: Sequence[int] = ()) -> dict[str, Any]:
    """Why threads are not on a CPU: `reasons`, and `rows` by thread name, each with `count`, `total_ms`, `mean_us`, `max_us`."""
    return _measure("offcpu", pids, duration_s, cpus)


def wakeups(pids: Sequence[int] = (), duration_s: float = 5.0, cpus: Sequence[int] = ()) -> dict[str, Any]:
    """Who wakes whom (`rows`), and from waking to running: `p50_us`, `p99_us`, `histogram`. With pids: wakings by them and of them."""
    return _measure("wakeups", pids, duration_s, cpus)


def switches(pids: Sequence[int] = (), duration_s: float = 5.0, cpus: Sequence[int] = ()) -> dict[str, Any]:
    """Context switches: `voluntary`, `involuntary`, the same `per_second`, and `rows` by CPU."""
    return _measure("switches", pids, duration_s, cpus)


def _measure(name: str, pids: Sequence[int], duration_s: float, cpus: Sequence[int]) -> dict[str, Any]:
    with Probe(name, Target(tuple(pids), cpus=tuple(cpus))) as probe:
        time.sleep(duration_s)
        return probe.stop()
