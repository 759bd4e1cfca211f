"""Virtual machines in virtual time: vCPU threads on the SMT siblings of one socket, placed by a scheduling policy from the host or from the IPU.

    run = simulate(Setup(policy="vm", part=load_part("xeon-8468v"), ...))

Milliseconds matter here, not microseconds, and what decides is frequency; so this is a model of its own beside the compiled engine of `sched`: the same
policies behind the same runtime (`waveos.sched.laws`), the same link costs, the same road of messages, decisions, doorbells and outcomes, but threads
that go as fast as their core does (`cores`). Work is counted in ns of a thread alone on a core at base frequency.

A policy finds a thread's virtual machine, its tenant, in `msg.request_class`; threads 2k and 2k+1 are a pair of vCPUs that their guest takes for siblings.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from waveos.errors import ConfigError
from waveos.ipu_emulator.profile import MITIGATIONS, HostProfile, LinkProfile, link_costs
from waveos.ipu_emulator.sched import fair
from waveos.ipu_emulator.vm.cores import Cores, Held, Tick, Ticks
from waveos.ipu_emulator.vm.part import Guests, Part
from waveos.outcome import Outcome
from waveos.policy import Policy, load_policy
from waveos.record import VERSION
from waveos.sched.laws import DEPTH, OUT, failure, feed_all, make_runtime
from waveos.sched.records import DECISION, KICKED, MESSAGE, PREEMPT, SUBSYSTEM, Decision, Message
from waveos.trace import TRACE_EVENT, RunEnd, TraceKind

Placement = Literal["kernel", "on-host", "offload"]
Watchdog = Literal["host-timer", "tick"]
SECOND, MS, US = 1_000_000_000, 1_000_000, 1_000
MOST_TENANTS = 256
DOWN = DEPTH + 4
"""Decisions that one CPU's queue holds."""
IDLE, KERNEL, RUN = range(3)
BLOCKED, RUNNABLE, RUNNING = range(3)


@dataclass(frozen=True)
class Setup:
    """One run. `busy_share` of the machines compute, the others are idle but for their guests' timers.

    `watchdog`: what looks after the agent: a timer of the host's own, or the enclave's ticks, as in ghOSt; it is given up once silent for `guests.silent_ms`.
    `agent_dies_ns`: when the agent falls silent for good; 0: never. `held`: see `cores`.
    """

    policy: str
    part: Part
    guests: Guests
    host: HostProfile
    link: LinkProfile
    placement: Placement = "offload"
    params: Mapping[str, float] = field(default_factory=dict)
    mitigations: tuple[str, ...] = MITIGATIONS
    message_ns: float = 100.0
    speed: float = 1.0  # of the core that the agent runs on
    machines: int = 8
    vcpus: int = 2
    cores: int = 8  # physical cores of the enclave; one more is the host's own, and the agent's where that runs on the host
    busy_share: float = 0.5
    ticks: Ticks = "periodic"
    held: frozenset[Held] = frozenset()
    warmup_ns: int = 20 * MS
    duration_ns: int = 200 * MS
    seed: int = 1
    agent_dies_ns: int = 0
    watchdog: Watchdog = "host-timer"
    trace: bool = False


@dataclass(frozen=True)
class Run:
    """What a run gave. Figures are of the time after warm-up; `trace` is of all of it, [n] TRACE_EVENT, where the setup asks for one."""

    figures: dict[str, float]
    outcomes: dict[str, int]
    fell_back_ns: int  # when the kernel's own policy took over from a silent agent; 0: never
    trace: np.ndarray[Any, Any]


def simulate(setup: Setup, watch: int = 0) -> Run:
    """Run it. `watch`: address of a word that is to tell which message the policy is at; 0: none. Raises ConfigError for a setup that cannot be,
    PolicyError when the policy fails."""
    _check(setup)
    return _World(setup, watch).run()


def _check(setup: Setup) -> None:
    if not 1 <= setup.machines <= MOST_TENANTS or setup.vcpus < 1:
        raise ConfigError(f"{setup.machines} machines of {setup.vcpus} vCPUs; there may be 1 to {MOST_TENANTS}, each of 1 or more")
    if not 1 <= setup.cores < setup.part.published.cores:
        raise ConfigError(f"{setup.cores} cores for machines: {setup.part.name} has {setup.part.published.cores}, and one is the host's own")
    if 2 * setup.cores > fair.CPUS:
        raise ConfigError(f"{setup.cores} cores for machines: the model of the kernel's own scheduler has at most {fair.CPUS // 2}")
    if setup.ticks != "off" and setup.host.tick_period_us == 0:
        raise ConfigError(f'ticks = {setup.ticks!r}, but host profile {setup.host.name!r} has no tick: choose another, or ticks = "off"')


@dataclass(slots=True)
class _Thread:
    """A vCPU as the host sees it."""

    tid: int
    tenant: int
    busy: bool
    random: np.random.Generator
    seq: int = 0
    state: int = BLOCKED
    left: float = 0.0  # of its burst
    ran: float = 0.0  # work done since warm-up
    ready_ns: int = 0


@dataclass(slots=True)
class _Cpu:
    """One CPU of the enclave."""

    seq: int = 0
    state: int = IDLE
    thread: _Thread | None = None
    free_ns: int = 0  # it is in the kernel until then
    clock: float = 0.0  # of the work clock, when the thread's `left` was last brought up to date
    rate: float = 0.0  # of its work to the work clock
    turn: int = 0  # a later plan for this CPU makes an earlier one void
    down: list[tuple[int, Any]] = field(default_factory=list)  # (visible, decision)


class _World:
    """Events by time, and a second queue by the work clock: when a burst is done depends on how the frequency changes until then."""

    def __init__(self, setup: Setup, watch: int) -> None:
        self.setup, self.handling = setup, watch
        guests, host = setup.guests, setup.host
        self.n = 2 * setup.cores
        tick = Tick(setup.ticks, host.tick_period_us * US, host.tick_ns + guests.vm_exit_ns, float(host.tick_ns))
        self.cores = Cores(setup.part, setup.cores, setup.part.published.cores - setup.cores, tick, guests.memory_share, setup.held)
        self.cpus = [_Cpu() for _ in range(self.n)]
        busy = round(setup.busy_share * setup.machines)
        self.threads = [
            _Thread(tid, tid // setup.vcpus, tid // setup.vcpus < busy, np.random.default_rng((setup.seed, tid)))
            for tid in range(setup.machines * setup.vcpus)
        ]
        self.now = 0
        self.work = 0.0  # the work clock: what a thread alone, without ticks, would have done
        self.work_at = 0
        self.order = 0
        self.events: list[tuple[int, int, Callable[..., None], tuple[Any, ...]]] = []
        self.bursts: list[tuple[float, int, int, int]] = []  # (work clock, order, cpu, turn)
        self.up: list[tuple[int, int, tuple[Any, ...]]] = []  # (visible, order, record): to the agent
        self.waker_free = self.agent_free = self.agent_due = 0
        self.mhz_ns = self.deep_ns = 0.0
        self.waits: list[int] = []
        self.counts = dict.fromkeys(("switches", "preemptions", "messages", "decisions", "stall_ns", "agent_ns"), 0)
        self.outcomes = dict.fromkeys(Outcome, 0)
        self.events_of_trace: list[tuple[int, int, int, int, int, int]] = []
        self.fell_back = 0
        self.inline = setup.placement == "kernel"
        self._load(fair.Fair if self.inline and setup.policy == "kernel" else load_policy(setup.policy), dict(setup.params))
        self._out = np.zeros(4 * OUT, DECISION)

    def _load(self, policy: type[Policy], params: dict[str, float]) -> None:
        setup, host = self.setup, self.setup.host
        costs = link_costs(setup.link, setup.mitigations)
        inline = self.inline
        self.bound = policy.bind(n_cpus=self.n, params=params)
        self.runtime = make_runtime(self.bound, cpus=self.n, threads=len(self.threads), ahead=int(costs.prestage and not inline), watch=self.handling)
        self.timer, self.failed = self.runtime["next_timer_ns"], self.runtime["failed"]
        self.write_ns, self.flush_ns, self.wire_ns = (0, 0, 0) if inline else (costs.host_write_ns, costs.host_flush_ns, costs.wire_ns)
        self.read_ns, self.peek_ns, self.hit_ns = (0, 0, 0) if inline else (costs.host_read_ns, costs.host_peek_ns, costs.host_hit_ns)
        self.prefetch = costs.prefetch and not inline
        self.agent_read_ns, self.agent_write_ns = (0, 0) if inline else (costs.agent_read_ns, costs.agent_write_ns)
        self.kick_ns = (0, host.ipi_wire_ns, host.interrupt_ns) if inline else (costs.kick_send_ns, costs.kick_wire_ns, costs.kick_receive_ns)
        self.message_ns = 0 if inline else round(setup.message_ns / setup.speed)

    # The run

    def run(self) -> Run:
        setup = self.setup
        for cpu in range(self.n):
            self.cores.fall_idle(cpu, 0)
            self._at(self.cores.control_ns, self._settle_core, cpu % setup.cores, self.cores.stay[cpu % setup.cores])
            self._send(Message.CPU_NEW, -1, cpu, 0)
            self._send(Message.CPU_IDLE, -1, cpu, 0)
        for thread in self.threads:
            self._sleep(thread, 0)
        if not self.inline and (setup.watchdog == "host-timer" or setup.ticks != "off"):
            self._at(0, self._watch)
        self._at(setup.warmup_ns, self._begin_counting)
        end = setup.warmup_ns + setup.duration_ns
        self._wake_agent()
        while True:
            due, burst = self.events[0][0] if self.events else end, self._burst_due()
            if min(due, burst) >= end:
                break
            if burst <= due:
                _, _, cpu, _ = heapq.heappop(self.bursts)
                self._advance(burst)
                self._done(cpu)
            else:
                due, _, act, args = heapq.heappop(self.events)
                self._advance(due)
                act(*args)
            if self.inline:
                self._decide_here(-1)
        self._advance(end)
        return Run(self._figures(), {outcome.name.lower(): n for outcome, n in self.outcomes.items()}, self.fell_back, self._trace())

    def _at(self, due: int, act: Callable[..., None], *args: Any) -> None:
        self.order += 1
        heapq.heappush(self.events, (max(due, self.now), self.order, act, args))

    def _advance(self, now: int) -> None:
        """Let time pass until `now`, with nothing happening."""
        passed = now - self.work_at
        self.work += passed * self.cores.speed
        self.mhz_ns += passed * self.cores.mhz
        self.deep_ns += passed * self.cores.real[2]
        self.work_at = self.now = now

    def _burst_due(self) -> int:
        """When the first burst is done if the frequency stays as it is."""
        while self.bursts and self.bursts[0][3] != self.cpus[self.bursts[0][2]].turn:
            heapq.heappop(self.bursts)
        if not self.bursts:
            return 1 << 62
        return self.now + max(0, math.ceil((self.bursts[0][0] - self.work) / self.cores.speed))

    def _begin_counting(self) -> None:
        for cpu in range(self.n):
            self._bank(cpu)
        for thread in self.threads:
            thread.ran = 0.0
        self.mhz_ns = self.deep_ns = 0.0
        self.waits.clear()
        self.counts = dict.fromkeys(self.counts, 0)
        self.outcomes = dict.fromkeys(Outcome, 0)

    # Guests

    def _sleep(self, thread: _Thread, now: int) -> None:
        """The vCPU has halted: when its guest wakes it next, and what it then does."""
        guests = self.setup.guests
        scale_ns, work_ns = (guests.pause_us * US, guests.burst_ms * MS) if thread.busy else (guests.idle_wake_ms * MS, guests.idle_work_us * US)
        pause, work = thread.random.exponential(scale_ns), thread.random.exponential(work_ns)
        thread.left = max(1.0, work)
        self._at(now + max(1, round(pause)), self._wake, thread)

    def _wake(self, thread: _Thread) -> None:
        """An interrupt for the vCPU, taken by the host's own core."""
        self.waker_free = max(self.now, self.waker_free, thread.ready_ns) + self.setup.host.wake_ns
        thread.seq += 1
        thread.state, thread.ready_ns = RUNNABLE, self.waker_free
        self.waker_free = self._send(Message.THREAD_RUNNABLE, thread.tid, -1, self.waker_free) + self.flush_ns

    # Host to agent

    def _send(self, kind: int, tid: int, cpu: int, at: int, outcome: int = 0, txn: int = 0, age: int = 0) -> int:
        """Write one message; returns when the core is done with it."""
        thread = self.threads[tid] if tid >= 0 else None
        seq, tenant, ran = (thread.seq, thread.tenant, round(thread.ran)) if thread else (0, 0, 0)
        cpu_seq = self.cpus[cpu].seq if cpu >= 0 else 0
        record = (0, VERSION, SUBSYSTEM, int(kind), seq, at, tid, cpu, tenant, 0, int(outcome), 0, cpu_seq, txn, age, ran)
        self.order += 1
        heapq.heappush(self.up, (0 if self.inline else at + self.write_ns + self.flush_ns + self.wire_ns, self.order, record))
        self.counts["messages"] += 1
        self._wake_agent()
        return at + self.write_ns

    def _answer(self, decision: Any, outcome: Outcome, cpu: int, at: int) -> int:
        self.outcomes[outcome] += 1
        return self._send(Message.TXN_OUTCOME, int(decision["tid"]), cpu, at, outcome, int(decision["txn"]), at - int(decision["time_ns"]))

    # The agent

    def _wake_agent(self) -> None:
        """Have the agent look when it is free and something is visible, or when one of its timers is due."""
        if self.inline:
            return
        due = min(self.up[0][0] if self.up else 1 << 62, int(self.timer[0]))
        due = max(due, self.agent_free)
        if due < 1 << 62 and (self.agent_due <= self.now or due < self.agent_due):
            self.agent_due = due
            self._at(due, self._serve, due)

    def _serve(self, planned: int) -> None:
        """One batch: drain what is visible, decide, commit."""
        if planned != self.agent_due or self.inline:
            return
        self.agent_due = 0
        if self.setup.agent_dies_ns and self.now >= self.setup.agent_dies_ns:
            return
        records = []
        while self.up and self.up[0][0] <= self.now:
            records.append(heapq.heappop(self.up)[2])
        at = self.now + len(records) * (self.agent_read_ns + self.message_ns)
        decisions = self._feed(records, at)
        for decision in decisions:
            at = self._commit(decision, at, -1)
        self.counts["agent_ns"] += at - self.now
        self.agent_free = at
        self._wake_agent()

    def _feed(self, records: list[tuple[Any, ...]], at: int) -> Any:
        messages = np.array([*records, (0, VERSION, SUBSYSTEM, Message.BATCH_END, 0, at, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0)], MESSAGE)
        pieces, taken = [], 0
        while taken < len(messages):
            taken, made = feed_all(self.runtime, messages, taken, self._out)
            if self.failed[0]:
                raise failure(self.runtime, self.bound)
            pieces.append(self._out[:made].copy())
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _decide_here(self, own: int, at: int | None = None) -> None:
        """The policy runs in the kernel: on what has just happened, on the CPU `own` that is here itself, or on another."""
        at = self.now if at is None else at
        timer = int(self.timer[0])
        if self.up or timer <= at:
            records = [heapq.heappop(self.up)[2] for _ in range(len(self.up))]
            for decision in self._feed(records, at):
                self._commit(decision, at, own)
        timer = int(self.timer[0])
        if timer < 1 << 62 and (self.agent_due <= self.now or timer < self.agent_due):
            self.agent_due = max(timer, self.now + 1)
            self._at(self.agent_due, self._nothing)

    def _nothing(self) -> None:
        """A moment at which the kernel's policy looks at its timers."""

    def _commit(self, decision: Any, at: int, own: int) -> int:
        """Write a decision into its CPU's queue, and ring its doorbell if it says so. Returns when the agent's core is done with it."""
        cpu = int(decision["cpu"])
        if decision["type"] == Decision.DEMOTE:
            return at  # this host knows no demotion
        if decision["type"] != Decision.KICK:
            self.counts["decisions"] += 1
            if len(self.cpus[cpu].down) == DOWN:
                self._answer(decision, Outcome.CONGESTED, cpu, at)
                return at
            at += self.agent_write_ns
            self.cpus[cpu].down.append((at, decision))
        if decision["flags"] & KICKED and cpu != own:
            send, wire, _ = self.kick_ns
            at += send
            self._at(at + wire, self._ring, cpu)
        return at

    # A CPU of the host

    def _ring(self, cpu: int) -> None:
        """The doorbell's interrupt arrives."""
        c = self.cpus[cpu]
        if c.state == KERNEL:
            self._at(max(c.free_ns, self.now + 1), self._ring, cpu)
            return
        if c.state == IDLE:
            if not c.down:
                return
            woken = self.now + self.cores.wake(cpu, self.now)
            self._changed(cpu)
            c.state, c.free_ns = KERNEL, woken + self.kick_ns[2]
            self._at(c.free_ns, self._next, cpu, self.now)
            return
        self._stop(cpu)
        c.free_ns = self.now + self.kick_ns[2] + round(self.setup.guests.vm_exit_ns)
        self._at(c.free_ns, self._interrupted, cpu)

    def _interrupted(self, cpu: int) -> None:
        """A doorbell rang while a vCPU ran: is there a preemption that still holds?"""
        c, now = self.cpus[cpu], self.now
        thread = c.thread
        assert thread is not None
        at = 0
        while at < len(c.down) and c.down[at][0] <= now:
            decision = c.down[at][1]
            now += self.read_ns
            if not decision["flags"] & PREEMPT:
                at += 1
                continue
            outcome = Outcome.COMMITTED if decision["cpu_seq"] == c.seq else Outcome.STALE
            if outcome == Outcome.COMMITTED and decision["type"] == Decision.RUN:
                outcome = self._judge(decision)
            if outcome == Outcome.COMMITTED:
                break
            now = self._answer(decision, outcome, cpu, now)
            del c.down[at]
        else:
            self.counts["stall_ns"] += now - self.now
            self._resume(cpu, now)
            return
        self.counts["preemptions"] += 1
        thread.seq += 1
        thread.state, thread.ready_ns = RUNNABLE, now
        c.seq += 1
        decision = c.down[at][1]
        self._leave(cpu, RunEnd.PREEMPTED)
        if decision["type"] == Decision.YIELD_CPU:
            del c.down[at]
            now = self._answer(decision, Outcome.COMMITTED, cpu, now)
        else:
            decision["cpu_seq"] = c.seq
            for _, old in c.down[:at]:
                now = self._answer(old, Outcome.SUPERSEDED, cpu, now)
            del c.down[:at]
        now = self._send(Message.THREAD_PREEMPTED, thread.tid, cpu, now)
        self.counts["stall_ns"] += now - self.now
        self._next(cpu, self.now, now)

    def _done(self, cpu: int) -> None:
        """The vCPU halts."""
        c = self.cpus[cpu]
        thread = c.thread
        assert thread is not None
        self._stop(cpu)
        thread.left = 0.0
        thread.seq += 1
        thread.state = BLOCKED
        c.seq += 1
        self._leave(cpu, RunEnd.BLOCKED)
        now = self.now + self.setup.host.entry_ns + round(self.setup.guests.vm_exit_ns)
        now = self._send(Message.THREAD_BLOCKED, thread.tid, cpu, now)
        thread.ready_ns = now
        self._next(cpu, self.now, now)
        self._sleep(thread, now)

    def _next(self, cpu: int, entered: int, at: int | None = None) -> None:
        """The CPU has no thread: take the first decision that holds, or fall idle. `entered`: when it came into the kernel, and a prefetch began."""
        c = self.cpus[cpu]
        now = self.now if at is None else at
        if self.inline:
            now += self.setup.host.pick_ns
            if c.state != IDLE:
                self._send(Message.CPU_IDLE, -1, cpu, now)
            self._decide_here(cpu, now)
        begun, first = now, True
        while c.down:
            cost = self.read_ns
            seen = now + cost // 2
            if first and self.prefetch:
                seen, cost = entered + cost // 2, max(min(self.hit_ns, cost), cost - (now - entered))
            first = False
            visible, decision = c.down[0]
            if visible > seen:
                now += cost
                break
            now += cost
            del c.down[0]
            outcome = Outcome.STALE
            if decision["type"] == Decision.RUN and (not decision["flags"] & PREEMPT or decision["cpu_seq"] == c.seq):
                outcome = self._judge(decision)
            if outcome == Outcome.COMMITTED:
                self._start(cpu, decision, now)
                self.counts["stall_ns"] += now - begun
                return
            now = self._answer(decision, outcome, cpu, now)
        else:
            now += self.peek_ns
        self.counts["stall_ns"] += now - begun
        if not self.inline:
            now = self._send(Message.CPU_IDLE, -1, cpu, now) + self.flush_ns
        c.state, c.free_ns = KERNEL, now
        c.turn += 1
        self._at(now, self._fall_idle, cpu, c.turn)

    def _fall_idle(self, cpu: int, turn: int) -> None:
        c = self.cpus[cpu]
        if c.turn != turn:
            return
        c.state = IDLE
        if self.cores.fall_idle(cpu, self.now):
            core = cpu % self.setup.cores
            self._at(self.now + self.cores.control_ns, self._settle_core, core, self.cores.stay[core])
        self._changed(cpu)
        if self.inline and c.down:
            self._at(self.now, self._ring, cpu)

    def _judge(self, decision: Any) -> Outcome:
        thread = self.threads[int(decision["tid"])]
        if thread.seq != decision["seq"]:
            return Outcome.STALE
        return Outcome.COMMITTED if thread.state == RUNNABLE else Outcome.TARGET_NOT_RUNNABLE

    def _start(self, cpu: int, decision: Any, now: int) -> None:
        """Commit: the thread goes onto the CPU."""
        c, thread = self.cpus[cpu], self.threads[int(decision["tid"])]
        thread.seq += 1
        thread.state = RUNNING
        c.seq += 1
        c.thread, c.state = thread, KERNEL
        self._draw(now, TraceKind.RUN_BEGIN, cpu, thread.tid, thread.tenant)
        now = self._answer(decision, Outcome.COMMITTED, cpu, now) + self.flush_ns + self.setup.host.switch_ns
        self.counts["switches"] += 1
        self.waits.append(now - thread.ready_ns)
        self._resume(cpu, now)

    def _resume(self, cpu: int, at: int) -> None:
        """The thread on the CPU computes from `at`."""
        c = self.cpus[cpu]
        c.state, c.free_ns = KERNEL, at
        c.turn += 1
        self._at(at, self._compute, cpu, c.turn)

    def _compute(self, cpu: int, turn: int) -> None:
        c = self.cpus[cpu]
        if c.turn == turn:
            c.state = RUN
            c.clock = self.work
            self._changed(cpu)

    def _stop(self, cpu: int) -> None:
        """The thread on the CPU stops computing: the CPU is in the kernel."""
        c = self.cpus[cpu]
        self._bank(cpu)
        c.state = KERNEL
        c.turn += 1
        self._changed(cpu)

    def _leave(self, cpu: int, why: RunEnd) -> None:
        c = self.cpus[cpu]
        assert c.thread is not None
        self._draw(self.now, TraceKind.RUN_END, cpu, c.thread.tid, why)
        c.thread = None

    def _bank(self, cpu: int) -> None:
        """Bring what the thread on the CPU has done up to date."""
        c = self.cpus[cpu]
        if c.state == RUN and c.thread is not None:
            did = min(c.thread.left, (self.work - c.clock) * c.rate)
            c.thread.left -= did
            c.thread.ran += did
            c.clock = self.work

    def _changed(self, cpu: int) -> None:
        """The CPU has begun or ceased to compute, so its sibling goes at another speed: plan anew when their bursts are done."""
        other = self.cores.sibling(cpu)
        for one, two in ((cpu, other), (other, cpu)):
            c = self.cpus[one]
            if c.state == RUN and c.thread is not None:
                self._bank(one)
                c.rate = self.cores.share(one, self.cpus[two].state == RUN)
                c.turn += 1
                self.order += 1
                heapq.heappush(self.bursts, (self.work + c.thread.left / c.rate, self.order, one, c.turn))

    def _settle_core(self, core: int, stay: int) -> None:
        self.cores.settle(core, stay)

    # The watch over the agent

    def _watch(self) -> None:
        """Has the agent been silent for too long? A live agent polls, and its heartbeat with it."""
        setup = self.setup
        if setup.agent_dies_ns and self.now - setup.agent_dies_ns > setup.guests.silent_ms * MS:
            self._fall_back()
            return
        period_ns = setup.guests.watch_ms * MS if setup.watchdog == "host-timer" else setup.host.tick_period_us * US
        self._at(self.now + round(period_ns), self._watch)

    def _fall_back(self) -> None:
        """The kernel's own policy takes over: what was staged is dropped, and it is told the whole state."""
        self.fell_back, self.inline, self.agent_due = self.now, True, 0
        self.up.clear()
        self._load(fair.Fair, {})
        for cpu, c in enumerate(self.cpus):
            c.down.clear()
            self._send(Message.CPU_NEW, c.thread.tid if c.thread else -1, cpu, self.now)
            if c.thread is None:
                self._send(Message.CPU_IDLE, -1, cpu, self.now)
        for thread in self.threads:
            if thread.state == RUNNABLE:
                self._send(Message.THREAD_RUNNABLE, thread.tid, -1, self.now)

    # Results

    def _draw(self, at: int, kind: TraceKind, cpu: int, tid: int, value: int) -> None:
        if self.setup.trace:
            self.events_of_trace.append((at, kind, cpu, tid, value, -1))

    def _trace(self) -> np.ndarray[Any, Any]:
        return np.array(self.events_of_trace, TRACE_EVENT)

    def _figures(self) -> dict[str, float]:
        for cpu in range(self.n):
            self._bank(cpu)
        setup = self.setup
        busy = [thread.ran for thread in self.threads if thread.busy]
        waits = np.array(self.waits or [0]) / US
        answered = max(1, sum(self.outcomes.values()))
        return {
            "performance": sum(busy) / max(1, len(busy)) / setup.duration_ns,
            "throughput": sum(thread.ran for thread in self.threads) / setup.duration_ns,
            "slowest": min(busy, default=0.0) / setup.duration_ns,
            "mhz": self.mhz_ns / setup.duration_ns,
            "deep_cores": self.deep_ns / setup.duration_ns,
            "wake_p50_us": float(np.quantile(waits, 0.5)),
            "wake_p99_us": float(np.quantile(waits, 0.99)),
            "switches_per_s": self.counts["switches"] * SECOND / setup.duration_ns,
            "preemptions_per_s": self.counts["preemptions"] * SECOND / setup.duration_ns,
            "decisions_per_s": self.counts["decisions"] * SECOND / setup.duration_ns,
            "stale_share": self.outcomes[Outcome.STALE] / answered,
            "agent_busy_share": self.counts["agent_ns"] / setup.duration_ns,
            "stall_cores": self.counts["stall_ns"] / setup.duration_ns,
        }
