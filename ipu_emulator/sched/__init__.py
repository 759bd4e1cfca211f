"""Scheduling in virtual time: one run of one policy on the emulated machine under one load.

    result = simulate(Setup(policy="shinjuku", load_per_s=100_000, classes=(RequestClass("GET", service=Fixed(10_000)),)))

Equal setups give equal results to the last bit (`Result.trace_hash`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from waveos.errors import ConfigError
from waveos.histogram import middles_ns, quantile_ns
from waveos.ipu_emulator import arrivals
from waveos.ipu_emulator.arrivals import PHASES, REQUEST_CLASS, seed_streams
from waveos.ipu_emulator.clock import NEVER, reset_clock
from waveos.ipu_emulator.profile import COLD, MITIGATIONS, HostProfile, LinkProfile, link_costs, load_host, load_link
from waveos.ipu_emulator.sched import fair
from waveos.ipu_emulator.sched.engine import FINISHED, POLICY_FAILED, advance, begin, count_unfinished
from waveos.ipu_emulator.sched.machine import BACKLOG, COSTS, MACHINE, MAX_CLASSES, REQUEST, SAMPLE, UP
from waveos.outcome import Outcome
from waveos.policy import load_policy
from waveos.sched.laws import BLOCKED, failure, make_runtime
from waveos.sched.records import MAX_CPUS, MAX_THREADS, MESSAGE
from waveos.trace import TRACE_EVENT

Placement = Literal["kernel", "on-host", "offload"]
NS_PER_S = 1_000_000_000
_DRAIN_SHARE = 0.5  # after the last arrival a run goes on for this share of its length, at most
_SLICE_EVENTS = 2_000
TRACE_EVENTS = 400_000


@dataclass(frozen=True)
class Service:
    """A service time: `fixed_ns` plus what `form` draws. `samples`: measured values, ns."""

    form: Literal["fixed", "exponential", "erlang", "hyperexponential", "lognormal", "samples"] = "fixed"
    fixed_ns: float = 0.0
    mean_ns: float = 0.0  # exponential, erlang, lognormal
    stages: int = 1  # erlang
    sigma: float = 0.0  # lognormal: standard deviation of the logarithm
    phases: tuple[tuple[float, float], ...] = ()  # hyperexponential: (share, mean_ns)
    samples: np.ndarray[Any, Any] | None = field(default=None, compare=False)

    def average_ns(self) -> float:
        """The mean service time, ns."""
        if self.form == "samples":
            assert self.samples is not None
            return self.fixed_ns + float(np.mean(self.samples))
        if self.form == "hyperexponential":
            return self.fixed_ns + sum(share * mean for share, mean in self.phases)
        return self.fixed_ns + self.mean_ns


@dataclass(frozen=True)
class RequestClass:
    """One kind of request: its share of all, how long it takes, its SLO (ns after arrival; 0: none) and QoS class."""

    name: str
    service: Service
    share: float = 1.0
    slo_ns: int = 0
    qos: int = 0


@dataclass(frozen=True)
class Setup:
    """One run. `policy="kernel"` with placement "kernel" is the kernel's own scheduler.

    Times in ns; `message_ns` is the agent's service time for a message on a core of relative speed 1.
    """

    policy: str
    load_per_s: float
    classes: tuple[RequestClass, ...]
    params: Mapping[str, float] = field(default_factory=dict)
    placement: Placement = "offload"
    workers: int = 8
    threads: int = 4096
    seed: int = 1
    duration_ns: int = NS_PER_S
    warmup_ns: int = 0
    host: str | HostProfile = "server"
    link: str | LinkProfile = "mount-evans"
    mitigations: tuple[str, ...] = MITIGATIONS
    message_ns: float = 0.0
    speed: float | None = None  # of the agent's core; None: as the link's profile says
    queue: int = 65_536  # messages that the link holds
    backlog: int = 262_144  # requests that wait for a thread
    arrivals: np.ndarray[Any, Any] | None = field(default=None, compare=False)  # REQUESTs in the place of Poisson arrivals
    samples: int = 0  # keep the first n requests one by one
    record: int = 0  # keep the first n records the runtime is fed
    trace_from_ns: int = 0
    trace_for_ns: int = 0  # 0: no trace


@dataclass(frozen=True)
class ClassResult:
    """One request class: requests that arrived in the counting window, and their sojourn times in ns (arrival to done)."""

    count: int
    unfinished: int
    throughput_per_s: float
    mean_ns: float
    p50_ns: float
    p99_ns: float
    p999_ns: float


@dataclass(frozen=True)
class Result:
    """What came out of a run. Busy shares and cores are over the whole run; `worker_busy_share` is of all workers together."""

    setup: Setup
    classes: dict[str, ClassResult]
    throughput_per_s: float
    saturated: bool  # requests were refused, or more than 2 % were not done long after the last arrival
    refused: int
    decisions: int
    outcomes: dict[str, int]
    stale_share: float  # of decisions that got an outcome, those aborted as stale
    age_p50_ns: float  # of the state behind a committed decision
    age_p99_ns: float
    stale_age_p50_ns: float
    stale_age_p99_ns: float
    decision_mean_ns: float  # runnable until its switch is done
    decision_p50_ns: float
    decision_p99_ns: float
    agent_busy_share: float
    host_cores_policy: float  # cores' worth of host time that the policy and reaching it take
    worker_busy_share: float
    switches: int
    preemptions: int
    restaged: int
    redelivered: int
    unserved: int
    overflowed: int
    resyncs: int
    events: int
    trace_hash: str
    virtual_ns: int
    samples: np.ndarray[Any, Any] | None = field(default=None, compare=False)
    record: np.ndarray[Any, Any] | None = field(default=None, compare=False)
    trace: np.ndarray[Any, Any] | None = field(default=None, compare=False)


class Simulation:
    """A run that can be taken in slices, so that the caller can show progress and be interrupted in between."""

    def __init__(self, setup: Setup, watch: int = 0) -> None:
        """`watch`: address of a word in which the message type is kept that the policy is handling, 0 between handlers; 0: none."""
        self.setup = setup
        self._check()
        cpus = setup.workers
        policy = fair.Fair if setup.placement == "kernel" and setup.policy == "kernel" else load_policy(setup.policy)
        self.bound = policy.bind(n_cpus=cpus, params=dict(setup.params))
        host = load_host(setup.host) if isinstance(setup.host, str) else setup.host
        costs, prestage = self._costs(host)
        inline = setup.placement == "kernel"
        self.machine = np.zeros(1, MACHINE)
        m = self.machine
        make_runtime(self.bound, cpus=cpus, threads=setup.threads, ahead=int(prestage and not inline), watch=watch, into=m["runtime"])
        reset_clock(m["clock"], 2 * cpus)
        m["agent_due_ns"] = m["next_arrival_ns"] = NEVER
        m["cost"], m["cpus"], m["threads"], m["up_cap"], m["backlog_cap"] = costs[0], cpus, setup.threads, setup.queue, setup.backlog
        m["warmup_ns"], m["stop_ns"] = setup.warmup_ns, setup.warmup_ns + setup.duration_ns
        m["end_ns"] = int((setup.warmup_ns + setup.duration_ns) * (1 + _DRAIN_SHARE))
        m["cold_ns"] = [*host.cold_ns, *[host.cold_ns[-1] if host.cold_ns else 0] * (COLD - len(host.cold_ns))]
        m["mean_gap_ns"] = NS_PER_S / setup.load_per_s if setup.load_per_s else 0.0
        m["streams"] = seed_streams(setup.seed)
        m["cpu"]["tid"] = -1
        m["thread"]["state"][0, : setup.threads] = BLOCKED
        m["free"][0, : setup.threads], m["free_n"] = np.arange(setup.threads)[::-1], setup.threads
        m["trace_from_ns"], m["trace_until_ns"] = setup.trace_from_ns, setup.trace_from_ns + setup.trace_for_ns if setup.trace_for_ns else 0
        classes, samples = _class_records(setup.classes)
        m["class_count"], m["classes"][0, : len(classes)] = len(classes), classes
        self._samples = self._lend("samples", samples)
        self._arrivals = self._lend("arrivals", np.zeros(0, REQUEST) if setup.arrivals is None else np.ascontiguousarray(setup.arrivals, REQUEST))
        self._sample = self._lend("sample", np.zeros(setup.samples, SAMPLE), "cap")
        self._trace = self._lend("trace", np.zeros(TRACE_EVENTS if setup.trace_for_ns else 0, TRACE_EVENT), "cap")
        self._record = self._lend("record", np.zeros(setup.record, MESSAGE), "cap")
        self._begun = self._over = False
        self._events = _SLICE_EVENTS

    def _lend(self, name: str, memory: np.ndarray[Any, Any], length: str = "n") -> np.ndarray[Any, Any]:
        """Let the engine use an array whose length is not fixed."""
        self.machine[f"{name}_at"], self.machine[f"{name}_{length}"] = memory.ctypes.data, len(memory)
        return memory

    def _check(self) -> None:
        setup = self.setup
        if setup.placement not in ("kernel", "on-host", "offload"):
            raise ConfigError(f"no placement {setup.placement!r}; there are: kernel, on-host, offload")
        if not setup.load_per_s > 0 and setup.arrivals is None:
            raise ConfigError(f"a load of {setup.load_per_s} requests/s; more than 0 is needed")
        if not setup.classes:
            raise ConfigError("no request class; at least one is needed")
        limits = {"workers": MAX_CPUS, "threads": MAX_THREADS, "backlog": BACKLOG, "duration_ns": 1 << 60}
        for name, most in limits.items():
            if not 1 <= getattr(setup, name) <= most:
                raise ConfigError(f"{name} = {getattr(setup, name)}; 1 to {most} can be simulated")
        if setup.warmup_ns < 0:
            raise ConfigError(f"warmup_ns = {setup.warmup_ns}; 0 or more is needed")
        if setup.arrivals is not None and len(setup.arrivals):
            times, kinds = setup.arrivals["arrival_ns"], setup.arrivals["request_class"]
            if times[0] < 0 or np.any(np.diff(times) < 0):
                raise ConfigError("a trace's arrivals must not be negative or go back in time")
            if kinds.min() < 0 or kinds.max() >= len(setup.classes) or setup.arrivals["service_ns"].min() < 0:
                raise ConfigError(f"a trace's classes are 0..{len(setup.classes) - 1} and its service times 0 or more")
        if setup.placement == "kernel" and setup.policy == "kernel" and setup.workers > fair.CPUS:
            raise ConfigError(f"{setup.workers} workers; the model of the kernel's own scheduler has at most {fair.CPUS} CPUs")
        if len(setup.classes) > MAX_CLASSES:
            raise ConfigError(f"{len(setup.classes)} request classes; at most {MAX_CLASSES}")
        if not 4 + 2 * setup.workers + 2 * setup.threads <= setup.queue <= UP:
            raise ConfigError(
                f"a message queue of {setup.queue}; it must hold the host's state, {4 + 2 * setup.workers + 2 * setup.threads}, and at most {UP}"
            )

    def _costs(self, host: HostProfile) -> tuple[np.ndarray[Any, Any], bool]:
        setup = self.setup
        cost = np.zeros(1, COSTS)
        for name in ("entry_ns", "switch_ns", "wake_ns", "pick_ns", "tick_ns", "ipi_wire_ns", "interrupt_ns", "resume_ns"):
            cost[name] = getattr(host, name)
        cost["tick_period_ns"], cost["cold"] = host.tick_period_us * 1_000, any(host.cold_ns)
        if setup.placement == "kernel":
            cost["inline"] = 1
            cost["kick_wire_ns"], cost["kick_receive_ns"] = host.ipi_wire_ns, host.interrupt_ns
            return cost, False
        wanted = "on-host" if setup.placement == "on-host" and setup.link == "mount-evans" else setup.link
        link = load_link(wanted) if isinstance(wanted, str) else wanted
        costs = link_costs(link, setup.mitigations)
        speed = link.relative_speed if setup.speed is None else setup.speed
        cost["write_ns"], cost["flush_ns"] = costs.host_write_ns, costs.host_flush_ns
        cost["read_ns"], cost["peek_ns"], cost["hit_ns"], cost["prefetch"] = costs.host_read_ns, costs.host_peek_ns, costs.host_hit_ns, costs.prefetch
        cost["agent_read_ns"], cost["agent_write_ns"], cost["wire_ns"] = costs.agent_read_ns, costs.agent_write_ns, costs.wire_ns
        cost["kick_send_ns"], cost["kick_wire_ns"], cost["kick_receive_ns"] = costs.kick_send_ns, costs.kick_wire_ns, costs.kick_receive_ns
        cost["message_ns"] = round(setup.message_ns / speed)
        return cost, costs.prestage

    def advance(self, wall_ns: int) -> bool:
        """Go on for about `wall_ns` of wall time, at most. True when the run is over. Raises PolicyError when the policy failed."""
        deadline = time.monotonic_ns() + wall_ns
        if not self._begun:
            begin(self.machine)
            self._begun = True
        while True:
            started = time.monotonic_ns()
            status = advance(self.machine, self._events)
            if status == POLICY_FAILED:
                raise failure(self.machine["runtime"], self.bound)
            if status == FINISHED:
                if not self._over:
                    count_unfinished(self.machine)
                    self._over = True
                return True
            now = time.monotonic_ns()
            if now >= deadline:
                return False
            pace = self._events / max(1, now - started)
            self._events = int(min(max(_SLICE_EVENTS, 0.5 * pace * wall_ns), 2 * self._events))

    @property
    def progress(self) -> float:
        """Share of the run's virtual time that is over."""
        return min(1.0, float(self.machine["now_ns"][0]) / float(self.machine["stop_ns"][0]))

    def result(self) -> Result:
        """What came out of the run so far."""
        m, setup = self.machine[0], self.setup
        head = m["runtime"]
        seconds = setup.duration_ns / NS_PER_S
        virtual_ns = max(1, min(int(m["now_ns"]), int(m["end_ns"])))
        classes = {}
        for k, each in enumerate(setup.classes):
            finished, in_window, unfinished = (int(x) for x in m["done"][k])
            counted = finished + unfinished
            classes[each.name] = ClassResult(
                count=counted,
                unfinished=unfinished,
                throughput_per_s=in_window / seconds,
                mean_ns=float(m["sums"][k]) / counted if counted else float("nan"),
                p50_ns=quantile_ns(m["latency"][k], 0.50),
                p99_ns=quantile_ns(m["latency"][k], 0.99),
                p999_ns=quantile_ns(m["latency"][k], 0.999),
            )
        counted = sum(each.count for each in classes.values())
        outcomes = {Outcome(i).name.lower(): int(n) for i, n in enumerate(m["outcomes"]) if i < len(Outcome)}
        answered = max(1, sum(outcomes.values()))
        worker_ns = float(virtual_ns)
        stall = float(m["link_stall_ns"] + m["waker_stall_ns"]) / worker_ns
        cores = {
            "kernel": float(m["pick_ns"]) / worker_ns,
            "on-host": 1.0 + stall,  # the agent polls: its core is gone
            "offload": stall,
        }[setup.placement]
        ready = m["ready"]
        return Result(
            setup=setup if setup.arrivals is None else replace(setup, arrivals=None),
            classes=classes,
            throughput_per_s=sum(each.throughput_per_s for each in classes.values()),
            saturated=bool(m["refused"]) or sum(each.unfinished for each in classes.values()) > 0.02 * max(1, counted),
            refused=int(m["refused"]),
            decisions=int(head["txn"]),
            outcomes=outcomes,
            stale_share=outcomes["stale"] / answered,
            age_p50_ns=quantile_ns(m["ages"][0], 0.5),
            age_p99_ns=quantile_ns(m["ages"][0], 0.99),
            stale_age_p50_ns=quantile_ns(m["ages"][1], 0.5),
            stale_age_p99_ns=quantile_ns(m["ages"][1], 0.99),
            decision_mean_ns=_mean_ns(ready),
            decision_p50_ns=quantile_ns(ready, 0.5),
            decision_p99_ns=quantile_ns(ready, 0.99),
            agent_busy_share=float(m["agent_busy_ns"]) / worker_ns,
            host_cores_policy=cores,
            worker_busy_share=float(m["busy_ns"]) / worker_ns / setup.workers,
            switches=int(m["switches"]),
            preemptions=int(m["preemptions"]),
            restaged=int(head["restaged"]),
            redelivered=int(head["redelivered"]),
            unserved=int(head["unserved"]),
            overflowed=int(m["overflowed"]),
            resyncs=int(m["resyncs"]),
            events=int(m["events"]),
            trace_hash=f"{int(m['hash']):016x}",
            virtual_ns=virtual_ns,
            samples=self._sample[: int(m["sample_n"])] if setup.samples else None,
            record=self._record[: int(m["record_n"])] if setup.record else None,
            trace=self._trace[: int(m["trace_n"])] if setup.trace_for_ns else None,
        )


def simulate(setup: Setup) -> Result:
    """One whole run in this process. Raises ConfigError on a setup that cannot be, PolicyError when the policy fails."""
    simulation = Simulation(setup)
    while not simulation.advance(50_000_000):
        pass
    return simulation.result()


def _mean_ns(histogram: np.ndarray[Any, Any]) -> float:
    filled = np.flatnonzero(histogram)
    if not len(filled):
        return float("nan")
    return float(np.average(middles_ns(filled), weights=histogram[filled]))


def _class_records(classes: tuple[RequestClass, ...]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The engine's form of the classes, and all their measured samples in one array."""
    records = np.zeros(len(classes), REQUEST_CLASS)
    pieces: list[np.ndarray[Any, Any]] = []
    first, until = 0, 0.0
    for record, each in zip(records, classes, strict=True):
        until += each.share
        service = each.service
        record["until"], record["slo_ns"], record["qos"] = until, each.slo_ns, each.qos
        record["form"] = getattr(arrivals, service.form.upper())
        record["fixed_ns"], record["mean_ns"] = service.fixed_ns, service.mean_ns
        record["stages"], record["sigma"] = service.stages, service.sigma
        if len(service.phases) > PHASES:
            raise ConfigError(f"class {each.name!r}: {len(service.phases)} phases; at most {PHASES}")
        total = 0.0
        for i, (share, mean) in enumerate(service.phases):
            total += share
            record["phase_until"][i], record["phase_mean_ns"][i] = total, mean
        record["phases"] = len(service.phases)
        if service.form == "samples":
            if service.samples is None or not len(service.samples):
                raise ConfigError(f"class {each.name!r} has no measured service times")
            pieces.append(np.asarray(service.samples, np.int64))
            record["first"], record["count"] = first, len(service.samples)
            first += len(service.samples)
    records["until"] /= until
    return records, np.concatenate(pieces) if pieces else np.zeros(1, np.int64)
