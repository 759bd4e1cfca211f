"""What a probe costs whom it watches: nanoseconds for a context switch, with each of the kernel's probes attached.

Two processes on one CPU pass a byte through pipes; a round trip is two wakings and two switches. Rounds without and with each probe are interleaved,
each probe watching the pair alone and then all threads; a cost is the median of the differences to the rounds without on either side. What is
counted is the CPU time of the two, which a neighbour on that CPU lengthens little.
"""

from __future__ import annotations

import gc
import os
import time
from contextlib import contextmanager
from statistics import median
from typing import Any

from waveos.bench.machine import describe_machine
from waveos.errors import ConfigError
from waveos.host.probes import KINDS, Probe, Target

OPTIONS = {
    "rounds": (9, "rounds with each probe; costs are their medians"),
    "trips": (10_000, "round trips a round"),
    "cpu": (-1, "the CPU of the two; -1: the last"),
}


def run(rounds: int = 9, trips: int = 10_000, cpu: int = -1) -> dict[str, Any]:
    """Metrics in ns: `switch_ns` (half a round trip without a probe, Python and system calls included), and by probe `watching` the pair or `all`."""
    cpus = sorted(os.sched_getaffinity(0))
    if rounds < 1 or trips < 1:
        raise ConfigError(f"--rounds {rounds} --trips {trips}: wants at least 1 of each")
    if cpu >= 0 and cpu not in cpus:
        raise ConfigError(f"--cpu {cpu}: this process may use {', '.join(map(str, cpus))}")
    with _pair(cpus[-1] if cpu < 0 else cpu) as (trip, pids):
        bare: list[float] = []
        costs: dict[str, list[float]] = {}
        for name in KINDS:
            for whom, target in (("pair", Target(pids)), ("all", Target())):
                with Probe(name, target):
                    pass  # what is missing is said before anything is measured
                before = _switch_ns(trip, trips, pids)
                for _ in range(rounds):
                    with Probe(name, target) as probe:
                        with_it = _switch_ns(trip, trips, pids)
                        seen = probe.read()
                    after = _switch_ns(trip, trips, pids)
                    if not (seen.get("count") or seen.get("rows")):
                        raise ConfigError(f"the probe {name} saw nothing of {trips} round trips; ask for more")
                    bare.append(after)
                    costs.setdefault(f"{name}_{whom}_ns", []).append(with_it - (before + after) / 2)
                    before = after
    metrics = {"switch_ns": median(bare), **{key: median(values) for key, values in costs.items()}}
    dearest = max(costs, key=lambda key: metrics[key])
    return {
        "name": "probes",
        "metrics": metrics,
        "machine": describe_machine(),
        "timing": "measured",
        "verdict": f"a waking and a switch take {metrics['switch_ns']:,.0f} ns, and at most {metrics[dearest]:,.0f} ns more with a probe ({dearest[:-3]})",
    }


def _switch_ns(trip: Any, trips: int, pids: tuple[int, ...]) -> float:
    gc.collect()
    begin = _cpu_time_ns(pids)
    for _ in range(trips):
        trip()
    return (_cpu_time_ns(pids) - begin) / trips / 2


def _cpu_time_ns(pids: tuple[int, ...]) -> int:
    """Of all the processes; the number of a process's clock is made as clock_getcpuclockid(3) makes it."""
    return sum(time.clock_gettime_ns(~pid << 3 | 2) for pid in pids)


@contextmanager
def _pair(cpu: int):
    """A function that makes one round trip between this process and another on the same CPU; and both pids."""
    there, back = os.pipe(), os.pipe()
    other = os.fork()
    if other == 0:
        try:
            os.sched_setaffinity(0, [cpu])
            os.close(there[1])
            while byte := os.read(there[0], 1):
                os.write(back[1], byte)
        finally:
            os._exit(0)
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, [cpu])

        def trip() -> None:
            os.write(there[1], b"\n")
            os.read(back[0], 1)

        yield trip, (os.getpid(), other)
    finally:
        os.sched_setaffinity(0, allowed)
        for end in (*there, *back):
            os.close(end)
        os.waitpid(other, 0)
