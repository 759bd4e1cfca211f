"""A recorded run once more, in virtual time: other policies meet the arrivals and service demands that a live enclave saw.

An *activation* is a thread's time from being able to run until it blocks or ends; it arrives when the thread becomes runnable, and demands the CPU time that
it took in all. What a replay can say rests on three things that it can't know: arrivals stay as they were, though a client that waits for
answers would have sent others; demands stay as they were, though caches would have been colder or warmer; and the emulated host costs what its profile says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from waveos.errors import ConfigError
from waveos.ipu_emulator.experiment import Comparison
from waveos.ipu_emulator.inputs import Arrivals, Inputs
from waveos.ipu_emulator.job import link_of
from waveos.scenario import Scenario, check_scenario
from waveos.sched.records import Message

LIMITS = (
    "arrivals are as they were recorded: clients that wait for answers would have sent at other times under another policy",
    "an activation demands the CPU time that it took in the recorded run; under another policy caches would be colder or warmer",
    "affinities, priorities and whatever ran outside the enclave are left out",
)
"""What a replay does not know."""
QUANTILES = {"p50_us": 0.5, "p99_us": 0.99, "p999_us": 0.999}


@dataclass(frozen=True)
class Demands:
    """Of [n] activations, in order of arrival: when, of which class, how much CPU time in ns, and how long they took as recorded in ns."""

    arrivals: Arrivals
    classes: list[str]
    took_ns: npt.NDArray[np.int64]
    cpus: int
    threads: int
    unfinished: int

    def measured(self) -> dict[str, dict[str, float]]:
        """By class: count, and arrival to end in us, as the points of a results file have them."""
        told = {}
        for number, name in enumerate(self.classes):
            took_us = self.took_ns[self.arrivals.request_class == number] / 1e3
            told[name] = {
                "count": len(took_us),
                "mean_us": float(took_us.mean()),
                **{key: float(np.quantile(took_us, q)) for key, q in QUANTILES.items()},
            }
        return told


def demands_of(messages: npt.NDArray[np.void], cpus: int = 0) -> Demands:
    """The activations in [m] sched.MESSAGE, in the order of the ring. `cpus`: of the enclave; 0: as many as are named.

    Raises ConfigError if there are fewer than two whole ones.
    """
    begun: dict[int, tuple[int, int]] = {}  # by thread: when its activation arrived, of which class
    whole: list[tuple[int, int, int, int]] = []
    named, threads, unfinished = set(), set(), 0
    for kind, tid, cpu, time_ns, request_class, front, ran_ns in zip(
        *(messages[name].tolist() for name in ("type", "tid", "cpu", "time_ns", "request_class", "front", "ran_ns")), strict=True
    ):
        if cpu >= 0 and kind != Message.BATCH_END:
            named.add(cpu)
        if kind == Message.THREAD_RUNNABLE and not front:
            if tid not in begun:
                begun[tid] = (time_ns, request_class)
        elif kind in (Message.THREAD_BLOCKED, Message.THREAD_DEAD) and tid in begun:
            arrived_ns, of = begun.pop(tid)
            if ran_ns > 0:
                whole.append((arrived_ns, of, ran_ns, time_ns - arrived_ns))
                threads.add(tid)
        elif kind == Message.RESYNC:  # messages were lost, and with them ends of what had begun
            unfinished += len(begun)
            begun.clear()
    if len(whole) < 2:
        raise ConfigError(
            f"the recording holds {len(whole)} whole activations (runnable until blocked); a replay needs at least 2: record for longer"
        )
    table = np.array(sorted(whole), np.int64)
    numbers, request_class = np.unique(table[:, 1], return_inverse=True)
    arrivals = Arrivals(table[:, 0] - table[0, 0], request_class.astype(np.int64), table[:, 2])
    names = [f"class {number}" for number in numbers.tolist()] if len(numbers) > 1 else ["activation"]
    return Demands(arrivals, names, table[:, 3], cpus or len(named), len(threads), unfinished + len(begun))


def scenario_of(demands: Demands, name: str, policies: Sequence[str], params: Mapping[str, Mapping[str, float]], link: str, host: str) -> Scenario:
    """An experiment with the recorded arrivals in place of random ones. Raises ConfigError."""
    span_ms = max(1.0, float(demands.arrivals.time_ns[-1]) / 1e6)
    counts = np.bincount(demands.arrivals.request_class, minlength=len(demands.classes))
    mean_us = [float(demands.arrivals.service_ns[demands.arrivals.request_class == k].mean()) / 1e3 for k in range(len(counts))]
    raw: dict[str, Any] = {
        "name": name,
        "host": {"profile": host, "workers": demands.cpus, "threads": min(65_536, max(64, 4 * demands.threads))},
        "link": {"profile": link},
        "workload": {
            "arrivals": {"trace": name},
            "classes": [
                {"name": of, "share": share, "service": {"fixed_us": each}}
                for of, share, each in zip(demands.classes, (counts / counts.sum()).tolist(), mean_us, strict=True)
            ],
        },
        "policies": {"names": list(dict.fromkeys(policies)), "params": {key: dict(value) for key, value in params.items() if value}},
        "run": {"duration_ms": span_ms, "warmup_ms": 0.0, "replications": 1},
    }
    scenario: Scenario = check_scenario(raw, source="replay")
    return scenario


def comparison_of(scenario: Scenario, demands: Demands, message_ns: Mapping[str, float], placement: str) -> Comparison:
    """Its policies in one place, on the recorded arrivals, ready to run over a pool. `placement`: on-host, beside the enclave's CPUs, or offload."""
    link = link_of(scenario)
    return Comparison(
        scenario,
        Inputs({}, message_ns, demands.arrivals),
        link={"name": link.name, "verified": link.verified, "source": link.source},
        only=lambda each: each.world == placement and each.column in ("", "same workers"),
    )
