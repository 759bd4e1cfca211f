"""The network in virtual time: a service's requests through stack, agent and workers; who steers, on what, and where, is what one compares.

result = simulate(Setup(policy="jbsq", workers=16, classes=[RequestClass(1.0, 10_000, form="exponential")]), rate_per_s=1e6)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from waveos.errors import ConfigError
from waveos.histogram import quantile_ns
from waveos.ipu_emulator.arrivals import EXPONENTIAL, FIXED, HYPEREXPONENTIAL, REQUEST_CLASS, SAMPLES, seed_streams
from waveos.ipu_emulator.clock import CLOCK, reset_clock, set_due
from waveos.ipu_emulator.net import engine
from waveos.net.laws import failure, make_runtime
from waveos.net.records import MAX_REQUESTS, MAX_WORKERS, MESSAGE
from waveos.policy import load_policy

EVENTS_A_SLICE = 200_000
"""Between two looks for a signal."""


@dataclass(frozen=True)
class RequestClass:
    """A class: its share of requests, mean service and form ("fixed", "exponential", "hyper" with `scv`, or measured `samples`), and its SLO."""

    share: float
    mean_ns: float
    form: str = "exponential"
    slo_ns: int = 0
    phases: tuple[tuple[float, float], ...] = ()
    """Of "hyper": (probability, mean in ns) each."""
    samples_ns: npt.NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Setup:
    """What is simulated. Costs in ns; `stack_cores` 0 leaves the stack out."""

    policy: str
    workers: int
    classes: list[RequestClass]
    params: dict[str, float] = field(default_factory=dict)
    flows: int = 100_000
    stack_cores: int = 0
    stack_in_ns: int = 0
    stack_out_ns: int = 0
    message_ns: int = 0
    decision_ns: int = 0
    to_agent_ns: int = 0
    to_host_ns: int = 0
    pick_up_ns: int = 0
    sees_class: bool = True
    workers_sort: bool = False
    """Scheduling apart from steering: each worker takes the request in its own queue whose deadline is next. Else in order of arrival."""


@dataclass(frozen=True)
class Outcome:
    """Of the counted requests: latency by class, counts, and how many cores were busy on average."""

    latency: npt.NDArray[np.int64]
    counted: int
    shed: int
    dropped: int
    mean_us: float
    stack_cores_busy: float
    agent_cores_busy: float
    workers_busy: float
    trace: npt.NDArray[np.void]
    """[n] TRACE_EVENT of kinds `waveos.net.trace.PacketEvent`, if it was asked for."""

    def quantile_us(self, q: float, request_class: int | None = None) -> float:
        """The q-quantile of arrival to reply, in us, of one class or of all."""
        counts = self.latency.sum(axis=0) if request_class is None else self.latency[request_class]
        return quantile_ns(counts, q) / 1e3


def simulate(
    setup: Setup,
    rate_per_s: float,
    *,
    requests: int = 200_000,
    warmup: float = 0.1,
    seed: int = 1,
    trace_ns: tuple[int, int] = (0, 0),
    watch: int = 0,
) -> Outcome:
    """Run until so many requests are counted, after a warm-up of that share. `trace_ns`: write down what happens from when until when. `watch`: address of
    a word that is to tell which message the policy is at; 0: none.

    Raises PolicyError if the policy fails, ConfigError for a setup that cannot be.
    """
    if not 1 <= setup.workers <= MAX_WORKERS or not 0 <= setup.stack_cores <= engine.MAX_STACK_CORES or rate_per_s <= 0:
        raise ConfigError(f"{setup.workers} workers (1..{MAX_WORKERS}), {setup.stack_cores} stack cores, {rate_per_s} requests/s: not possible")
    classes, samples = _class_records(setup.classes)
    bound = load_policy(setup.policy).bind(n_cpus=setup.workers, params=setup.params)
    runtime = make_runtime(bound, workers=setup.workers, watch=watch)
    machine, clock, message = np.zeros(1, engine.MACHINE), np.zeros(1, CLOCK), np.zeros(1, MESSAGE)
    for name in (
        "flows",
        "workers",
        "stack_cores",
        "stack_in_ns",
        "stack_out_ns",
        "message_ns",
        "decision_ns",
        "to_agent_ns",
        "to_host_ns",
        "pick_up_ns",
    ):
        machine[name] = getattr(setup, name)
    machine["workers_sort"] = setup.workers_sort
    machine["sees_class"], machine["classes"], machine["gap_ns"] = setup.sees_class, len(setup.classes), 1e9 / rate_per_s
    machine["warmup_ns"], machine["until"] = round(warmup * requests / rate_per_s * 1e9), requests
    machine["table"], (machine["trace_from_ns"], machine["trace_until_ns"]) = -1, trace_ns
    machine["free_n"], machine["free"] = MAX_REQUESTS, np.arange(MAX_REQUESTS)
    machine["worker"]["serving"] = machine["stack_core"]["serving"] = engine.NOBODY
    reset_clock(clock, engine.SLOTS)
    set_due(clock[0], engine.SLOT_ARRIVAL, 1)
    streams = seed_streams(seed)
    at, n = samples.ctypes.data, len(samples)
    while (status := engine.step(machine, clock, streams, classes, at, n, runtime, message, EVENTS_A_SLICE)) == engine.RUNNING:
        if machine["dropped"][0] > requests:
            break  # far beyond what it can serve
    if status == engine.POLICY_FAILED:
        raise failure(runtime, bound)
    m = machine[0]
    span_ns = max(1, int(m["now_ns"] - m["began_ns"]))
    return Outcome(
        latency=m["latency"].copy(),
        counted=int(m["counted"]),
        shed=int(m["shed"]),
        dropped=int(m["dropped"]),
        mean_us=float(m["total_ns"]) / max(1, int(m["answered"])) / 1e3,
        stack_cores_busy=float(m["stack_busy_ns"]) / span_ns,
        agent_cores_busy=float(m["agent_busy_ns"]) / span_ns,
        workers_busy=float(m["worker_busy_ns"]) / span_ns,
        trace=m["trace"][: int(m["traced"])].copy(),
    )


def throughput_at(
    setup: Setup, meets: Callable[[Outcome], bool], low_per_s: float, high_per_s: float, *, share: float = 0.01, **options: Any
) -> float:
    """The highest rate at which an outcome `meets` its goal, by bisection to that share."""
    while high_per_s - low_per_s > share * low_per_s:
        middle = math.sqrt(low_per_s * high_per_s)
        if meets(simulate(setup, middle, **options)):
            low_per_s = middle
        else:
            high_per_s = middle
    return low_per_s


def _class_records(classes: list[RequestClass]) -> tuple[npt.NDArray[np.void], npt.NDArray[np.int64]]:
    records = np.zeros(len(classes), REQUEST_CLASS)
    samples: list[npt.NDArray[np.int64]] = [np.zeros(1, np.int64)]
    for record, each in zip(records, classes, strict=True):
        record["slo_ns"] = each.slo_ns
        match each.form:
            case "fixed":
                record["form"], record["fixed_ns"] = FIXED, each.mean_ns
            case "exponential":
                record["form"], record["mean_ns"] = EXPONENTIAL, each.mean_ns
            case "hyper":
                record["form"], record["phases"] = HYPEREXPONENTIAL, len(each.phases)
                record["phase_until"][: len(each.phases)] = np.cumsum([share for share, _ in each.phases])
                record["phase_mean_ns"][: len(each.phases)] = [mean for _, mean in each.phases]
            case "samples" if each.samples_ns is not None:
                record["form"], record["first"], record["count"] = SAMPLES, sum(map(len, samples)), len(each.samples_ns)
                samples.append(np.ascontiguousarray(each.samples_ns, np.int64))
            case _:
                raise ConfigError(f"a class has the form 'fixed', 'exponential', 'hyper' or 'samples', not {each.form!r}")
    records["until"] = np.cumsum([each.share for each in classes])
    return records, np.concatenate(samples)
