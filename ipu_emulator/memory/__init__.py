"""The memory subsystem in virtual time: a process whose cold pages a policy finds and reclaims, from a host core or from the IPU.

The machine is stepped (`machine`), everything around it is SimPy processes on one clock in integer nanoseconds: the workers, the mechanism's reports, the
agent with its service time, and the link, which bulk state (access bits, orders for many batches) crosses by DMA. The policy is the one that agentd runs,
behind the same runtime. `experiment` compares policies; this runs one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import simpy

from waveos.ipu_emulator.memory.access import Access
from waveos.ipu_emulator.memory.machine import PAGE_BYTES, Costs, Machine
from waveos.ipu_emulator.profile import MITIGATIONS, LinkCosts, LinkProfile, link_costs
from waveos.memory import MESSAGE, Message
from waveos.outcome import Outcome
from waveos.policy import load_policy
from waveos.policy.plain import NEVER_NS, PlainRuntime
from waveos.record import RECORD_BYTES

SECOND = 1_000_000_000
STEP_NS = 300_000_000
"""The workers are stepped at the shortest scan period."""
PRESSURE_NS = SECOND
ORACLE, NOTHING = "oracle", "nothing"
"""In place of a policy: told the hot set, or never reclaiming."""
BY_DMA = 8
"""Records from which on they cross as one transfer."""
SERVICE_NS = 50.0
"""Of a record at the agent in virtual time, where its cost is measured: what is measured must not decide what happens."""
SAMPLES = 256  # GET latencies drawn a step
BINS = 64  # of the address space in maps


@dataclass(frozen=True)
class Setup:
    """One run: a policy, where it decides, and what it manages."""

    policy: str
    access: Access
    costs: Costs
    link: LinkProfile
    params: Mapping[str, float] = field(default_factory=dict)
    mitigations: tuple[str, ...] = MITIGATIONS
    message_ns: float | None = None  # of the agent's core at the host's speed; None: the policy's CPU time is measured as it runs
    relative_speed: float = 1.0  # of the core it runs on
    batches: int = 32_768
    batch_bytes: int = 256 << 10
    workers: int = 4
    get_ns: float = 5_000.0
    get_sigma: float = 0.3
    warmup_ns: int = 0
    duration_ns: int = 60 * SECOND
    seed: int = 1


@dataclass
class Run:
    """What a run gave. Figures are of the time after warm-up, series of all of it."""

    figures: dict[str, float]
    series: dict[str, list[float]]  # one value a step
    maps: dict[str, Any]  # [steps, BINS]: accesses a second, and resident share, over address and time
    outcomes: dict[str, int]
    stops: list[tuple[float, str]]  # (virtual seconds, why): what the policy's safeguards did


def simulate(setup: Setup, handling: Callable[[str], None] = lambda name: None) -> Run:
    """Run it. `handling`: see `PlainRuntime`. Raises PolicyError when the policy fails."""
    return _World(setup, handling).run()


class _World:
    """The processes and what they share."""

    def __init__(self, setup: Setup, handling: Callable[[str], None]) -> None:
        self.setup = setup
        self.env = simpy.Environment()
        self.machine = Machine(
            setup.access,
            setup.costs,
            batches=setup.batches,
            pages=setup.batch_bytes // PAGE_BYTES,
            workers=setup.workers,
            get_ns=setup.get_ns,
            seed=setup.seed,
        )
        self.costs: LinkCosts = link_costs(setup.link, setup.mitigations)
        self.runtime: PlainRuntime | None = None
        if setup.policy not in (ORACLE, NOTHING):
            self.runtime = PlainRuntime(load_policy(setup.policy), dict(setup.params), handling)
            _warm_up(setup, handling)
        self.inbox: list[Any] = []
        self.arrived = self.env.event()
        self.link_host_ns = self.agent_ns = 0.0
        self._rng = np.random.default_rng(setup.seed + 1)
        self.series: dict[str, list[float]] = {
            name: [] for name in ("time_s", "footprint_share", "throughput_ratio", "get_p99_us", "precision", "recall", "policy_ms", "due_share")
        }
        self.latencies: list[Any] = []
        self.maps: dict[str, list[Any]] = {"accesses": [], "resident": []}
        self.base: dict[str, float] = {}  # totals when warm-up ended
        self.scanned = 0

    def run(self) -> Run:
        setup, env = self.setup, self.env
        env.process(self._work())
        if self.runtime is not None:
            env.process(self._report())
            env.process(self._decide())
            self._send(self.machine.introduce(0))
        end_ns = setup.warmup_ns + setup.duration_ns
        env.run(until=end_ns + 1)
        return Run(
            self._figures(),
            self.series,
            {name: np.array(rows) for name, rows in self.maps.items()},
            dict(self.machine.answered),
            [(at_ns / SECOND, why) for at_ns, why in getattr(getattr(self.runtime, "policy", None), "stops", [])],
        )

    # Processes

    def _work(self) -> Generator[Any, Any, None]:
        """The workers, a step at a time; what was measured of each step."""
        machine, setup = self.machine, self.setup
        ideal = setup.workers * STEP_NS / setup.get_ns
        measured_ns, scanned = 0.0, 0
        while True:
            yield self.env.timeout(STEP_NS)
            now_ns = int(self.env.now)
            if now_ns - STEP_NS <= setup.warmup_ns < now_ns and setup.warmup_ns:
                self.base = self._totals()
                self.latencies.clear()
            begin_ns = now_ns - STEP_NS
            served, faults = machine.advance(begin_ns, STEP_NS)
            hot = setup.access.hot(begin_ns)
            if setup.policy == ORACLE:
                machine.reclaim_now(~hot)
            reclaimed = machine.resident * 2 < machine.pages
            right = float((reclaimed & ~hot).sum())
            latency = self._latencies(faults / served if served else 0.0)
            self.latencies.append(latency)
            series = self.series
            series["time_s"].append(now_ns / SECOND)
            series["footprint_share"].append(machine.footprint_pages / (machine.batches * machine.pages))
            series["throughput_ratio"].append(served / ideal)
            series["get_p99_us"].append(float(np.quantile(latency, 0.99)) / 1e3)
            series["precision"].append(right / max(1.0, float(reclaimed.sum())))
            series["recall"].append(right / max(1.0, float((~hot).sum())))
            series["policy_ms"].append((self.agent_ns - measured_ns) / 1e6)
            series["due_share"].append((self.scanned - scanned) / machine.batches)
            measured_ns, scanned = self.agent_ns, self.scanned
            bins = np.array_split(setup.access.rates(begin_ns), BINS)
            self.maps["accesses"].append([float(each.sum()) * ideal / (STEP_NS / SECOND) for each in bins])
            self.maps["resident"].append([float(each.mean()) / machine.pages for each in np.array_split(machine.resident, BINS)])

    def _report(self) -> Generator[Any, Any, None]:
        """The mechanism's own messages: what came back, and pressure."""
        told_ns = 0
        while True:
            yield self.env.timeout(STEP_NS)
            yield self.env.timeout(0)  # after the step that ends now
            now_ns = int(self.env.now)
            self._send(self.machine.tell_refaults(now_ns))
            if now_ns - told_ns >= PRESSURE_NS:
                told_ns = now_ns
                self._send(self.machine.tell_pressure(now_ns))

    def _decide(self) -> Generator[Any, Any, None]:
        """The agent: take what has come, decide, send."""
        runtime, env, setup = self.runtime, self.env, self.setup
        assert runtime is not None
        end = np.zeros(1, MESSAGE)
        end["type"], end["region"] = Message.BATCH_END, -1
        while True:
            if not self.inbox:
                wait_ns = runtime.next_timer_ns - int(env.now)
                self.arrived = env.event()
                yield self.arrived if runtime.next_timer_ns == NEVER_NS else self.arrived | env.timeout(max(0, wait_ns))
            records = np.concatenate([*self.inbox, end])
            self.inbox = []
            records["time_ns"][-1] = int(env.now)
            begin_ns = time.thread_time_ns()
            decisions = runtime.feed(records)
            measured_ns = time.thread_time_ns() - begin_ns
            n = len(records) + len(decisions)
            self.agent_ns += measured_ns if setup.message_ns is None else n * setup.message_ns
            crossing = (len(records) - 1) * self.costs.agent_read_ns + len(decisions) * self.costs.agent_write_ns
            service_ns = n * (SERVICE_NS if setup.message_ns is None else setup.message_ns) / setup.relative_speed + crossing
            yield env.timeout(int(service_ns))
            if len(decisions):
                env.process(self._act(decisions))

    def _act(self, decisions: Any) -> Generator[Any, Any, None]:
        """Decisions on their way to the host, and what it does with them."""
        yield self.env.timeout(self._crossing_ns(len(decisions)))
        self.link_host_ns += self.costs.host_read_ns * (1 if len(decisions) >= BY_DMA else len(decisions))
        before = self.machine.host_ns["scan"]
        bits, outcomes = self.machine.apply(decisions, int(self.env.now))
        yield self.env.timeout(int(self.machine.host_ns["scan"] - before))  # the answer waits for the scan
        self.scanned += int(np.bitwise_count(bits["batches"]).sum())
        self._send(bits)
        self._send(outcomes)

    # The link

    def _send(self, records: Any) -> None:
        if len(records):
            self.link_host_ns += self.costs.host_write_ns * (1 if len(records) >= BY_DMA else len(records)) + self.costs.host_flush_ns
            self.env.process(self._arrive(records))

    def _arrive(self, records: Any) -> Generator[Any, Any, None]:
        yield self.env.timeout(self._crossing_ns(len(records)))
        self.inbox.append(records)
        if not self.arrived.triggered:
            self.arrived.succeed()

    def _crossing_ns(self, records: int) -> int:
        dma = self.setup.link.dma
        bulk_ns = dma.setup_ns + RECORD_BYTES * records * 1_000 // dma.bytes_per_us if records >= BY_DMA else 0
        return int(self.costs.wire_ns + bulk_ns)

    # Results

    def _latencies(self, faults_per_get: float) -> Any:
        """SAMPLES GETs of this step, ns: the service itself, and the faults it met."""
        sigma = self.setup.get_sigma
        service = self.setup.get_ns * np.exp(sigma * self._rng.standard_normal(SAMPLES) - sigma * sigma / 2)
        return service + self._rng.poisson(faults_per_get, SAMPLES) * self.setup.costs.page.fault_ns

    def _totals(self) -> dict[str, float]:
        machine = self.machine
        return {
            **{f"{name}_ns": value for name, value in machine.host_ns.items()},
            "gets": machine.gets,
            "faults": machine.faults,
            "link_ns": self.link_host_ns,
            "agent_ns": self.agent_ns,
            "scanned": float(self.scanned),
            "at_ns": float(self.env.now),
            **{f"outcome_{name}": float(n) for name, n in machine.answered.items()},
        }

    def _figures(self) -> dict[str, float]:
        total = {name: value - self.base.get(name, 0.0) for name, value in self._totals().items()}
        span_ns = total["at_ns"]
        counted = np.array(self.series["time_s"]) * SECOND > self.setup.warmup_ns
        mean = {name: float(np.mean(np.array(values)[counted])) for name, values in self.series.items()}
        latencies = np.concatenate(self.latencies)
        decided = sum(value for name, value in total.items() if name.startswith("outcome_"))
        return {
            "saved_share": 1 - mean["footprint_share"],
            "throughput_ratio": mean["throughput_ratio"],
            "get_mean_us": float(latencies.mean()) / 1e3,
            "get_p99_us": float(np.quantile(latencies, 0.99)) / 1e3,
            "get_p999_us": float(np.quantile(latencies, 0.999)) / 1e3,
            "faults_per_s": total["faults"] / span_ns * SECOND,
            "precision": mean["precision"],
            "recall": mean["recall"],
            "scan_cores": total["scan_ns"] / span_ns,
            "reclaim_cores": total["reclaim_ns"] / span_ns,
            "link_cores": (total["link_ns"] + total["decisions_ns"]) / span_ns,
            "policy_cores": total["agent_ns"] / self.setup.relative_speed / span_ns,
            "policy_ns_per_scanned_batch": total["agent_ns"] / max(1.0, total["scanned"]),
            "scanned_batches_per_s": total["scanned"] / span_ns * SECOND,
            "stale_share": total.get(f"outcome_{Outcome.STALE.name.lower()}", 0.0) / max(1.0, decided),
        }


def _warm_up(setup: Setup, handling: Callable[[str], None]) -> None:
    """Let what the policy compiles be compiled before its time is measured."""
    runtime = PlainRuntime(load_policy(setup.policy), dict(setup.params), handling)
    records = np.zeros(3, MESSAGE)
    records["type"] = Message.REGION_MAPPED, Message.ACCESSED, Message.BATCH_END
    records["count"], records["bytes"], records["batches"] = 64, PAGE_BYTES, 1
    for now_ns in range(0, 60 * SECOND, SECOND // 2):
        records["time_ns"] = now_ns
        runtime.feed(records if now_ns == 0 else records[1:])
