"""Conformance suites for the authors of policies and links; the project's own pass them too.

check_policy("my_policy.py")          # the laws hold under a hostile host; compiled and plain Python decide alike
check_link("shm://test")              # the same messages give the same decisions, byte for byte, through the link
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from waveos import sched
from waveos.errors import PolicyError
from waveos.link import open_link
from waveos.outcome import Outcome
from waveos.policy import Policy, load_policy
from waveos.record import VERSION
from waveos.sched.laws import OUT, RUNNABLE, STAGED, failure, feed_all, make_runtime
from waveos.sched.records import DECISION, KICKED, MESSAGE, OUTCOME, PREEMPT, SUBSYSTEM, Decision, Message

Records = np.ndarray[Any, Any]
PATIENCE_NS = 1_000_000_000
"""How long a link may take to deliver what was sent."""


@dataclass
class Replayed:
    """A policy and its runtime, fed by hand."""

    policy: type[Policy]
    cpus: int
    threads: int
    ahead: int = 0
    params: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.bound = self.policy.bind(n_cpus=self.cpus, params=self.params)
        self.runtime = make_runtime(self.bound, cpus=self.cpus, threads=self.threads, ahead=self.ahead)
        self._out = np.zeros(4 * OUT, DECISION)

    def feed(self, messages: Records) -> Records:
        """Decisions that the messages ([n] MESSAGE) lead to, [m] DECISION. Raises PolicyError when the policy fails."""
        pieces, taken = [np.zeros(0, DECISION)], 0
        while taken < len(messages):
            taken, made = feed_all(self.runtime, messages, taken, self._out)
            pieces.append(self._out[:made].copy())
            if self.runtime["failed"][0]:
                raise failure(self.runtime, self.bound)
        return np.concatenate(pieces)


@contextmanager
def interpreted() -> Iterator[None]:
    """Policies bound inside run as plain Python, as with WAVE_JIT=0."""
    before = os.environ.get("WAVE_JIT")
    os.environ["WAVE_JIT"] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["WAVE_JIT"]
        else:
            os.environ["WAVE_JIT"] = before


def check_policy(policy: str | type[Policy], *, seeds: int = 5, steps: int = 2_000, cpus: int = 4, threads: int = 32, **params: float) -> None:
    """Play `policy` (a name, file or class) against a host that wakes, blocks, preempts, kills and refuses at random; with and without prestaging.
    It is for policies of sched; one of another subsystem is refused with PolicyError.

    Raises AssertionError where a law breaks: a thread waits while a CPU idles (unless the policy is not work-conserving), a thread is lost, or
    the compiled policy and its plain Python disagree. Raises PolicyError where the policy itself fails.
    """
    chosen = _of_sched(policy, "check_policy")
    for seed in range(seeds):
        for ahead in (0, 1):
            host = HostileHost(Replayed(chosen, cpus, threads, ahead, dict(params)), seed)
            host.play(steps)
            host.finish()
            with interpreted():
                plain = Replayed(chosen, cpus, threads, ahead, dict(params)).feed(host.stream())
            assert plain.tobytes() == host.decisions().tobytes(), (
                f"policy {chosen.name!r}, seed {seed}: plain Python and compiled code decide differently"
            )


def record_stream(policy: str | type[Policy], *, seed: int = 0, steps: int = 2_000, cpus: int = 4, threads: int = 32) -> tuple[Records, Records]:
    """A stream of messages as a host sent them while `policy`, one of sched, decided, batch ends included, and those decisions."""
    chosen = _of_sched(policy, "record_stream")
    host = HostileHost(Replayed(chosen, cpus, threads, 1), seed)
    host.play(steps)
    return host.stream(), host.decisions()


def _of_sched(policy: str | type[Policy], what: str) -> type[Policy]:
    chosen = load_policy(policy) if isinstance(policy, str) else policy
    if chosen.subsystem is not sched:
        subsystem = chosen.subsystem.__name__.rpartition(".")[2]
        raise PolicyError(f"{what} is for policies of sched; {chosen.name!r} is one of {subsystem}")
    return chosen


def replay_over(host: Any, agent: Any, replayed: Replayed, messages: Records, chunk: int = 256) -> Records:
    """Decisions that come back over a link when both its sides are in this process: `host` sends, `agent` polls, decides and commits."""
    pieces = [np.zeros(0, DECISION)]
    for first in range(0, len(messages), chunk):
        part = messages[first : first + chunk]
        sent = host.send_messages(part)
        assert sent == len(part), f"the link took {sent} of {len(part)} messages"
        taken = 0
        while taken < len(part):
            batch = agent.poll_messages(wait_ns=PATIENCE_NS)
            assert len(batch), f"{taken} of {len(part)} messages came through the link"
            taken += len(batch)
            made = replayed.feed(batch)
            for at in range(0, len(made), 64):
                some = made[at : at + 64]
                agent.txn_create(len(some))[:] = some
                agent.txns_commit()
                while len(some):
                    got = host.poll_txns(len(some), wait_ns=PATIENCE_NS).copy()
                    assert len(got), "the link lost transactions"
                    pieces.append(got)
                    some = some[len(got) :]
    return np.concatenate(pieces)


def check_link(url: str, *, policy: str = "fifo", steps: int = 3_000, seed: int = 0) -> None:
    """Open both sides of the link `url` here and replay a recorded stream through it. Raises AssertionError unless every decision comes out the same."""
    messages, expected = record_stream(policy, seed=seed, steps=steps)
    host = open_link(url, side="host")
    try:
        agent = open_link(url, side="agent")
        try:
            got = replay_over(host, agent, Replayed(load_policy(policy), 4, 32, 1), messages)
        finally:
            agent.close()
    finally:
        host.close()
    assert got.tobytes() == expected.tobytes(), f"{url}: decisions differ from those made without a link"


class HostileHost:
    """A host that does at random whatever a host may do, and checks the runtime's promises. All of it follows from the seed."""

    def __init__(self, agent: Replayed, seed: int) -> None:
        self.agent, self.random, self.now_ns = agent, random.Random(seed), 0
        self.seq = [0] * agent.threads
        self.where = ["blocked"] * agent.threads  # blocked, runnable, running, gone
        self.hints = [(self.random.randrange(3), self.random.randrange(2), self.random.randrange(1, 100_000)) for _ in range(agent.threads)]
        self.running = [-1] * agent.cpus
        self.cpu_seq = [0] * agent.cpus
        self.taken = [False] * agent.cpus
        self.demoted: set[int] = set()
        self.rung = [False] * agent.cpus
        self.pending: list[list[Any]] = [[] for _ in range(agent.cpus)]
        self._messages: list[Records] = []
        self._decisions: list[Records] = []
        self._unsent: list[Records] = []
        for cpu in range(agent.cpus):
            self._say(Message.CPU_NEW, cpu=cpu)
            self._say(Message.CPU_IDLE, cpu=cpu)
        for tid in range(agent.threads):
            self._say(Message.THREAD_NEW, tid=tid)

    def stream(self) -> Records:
        """All messages so far, batch ends included."""
        return np.concatenate([np.zeros(0, MESSAGE), *self._messages])

    def decisions(self) -> Records:
        """All decisions so far."""
        return np.concatenate([np.zeros(0, DECISION), *self._decisions])

    def play(self, steps: int) -> None:
        """Do `steps` random things."""
        acts = (
            [self._wake] * 6
            + [self._block] * 4
            + [self._ring] * 4
            + [self._batch] * 6
            + [self._preempt, self._take, self._give_back, self._kill, self._resync, self._rest]
        )
        for _ in range(steps):
            self.now_ns += self.random.randrange(1, 20_000)
            self.random.choice(acts)()

    def finish(self) -> None:
        """Wake nobody any more; every thread that waits must get its turn. A CPU never idles while one waits, once all is delivered."""
        for cpu in range(self.agent.cpus):
            if self.taken[cpu]:
                self._give_back()
        for _ in range(50 * self.agent.threads + 200):
            self.now_ns += 1_000_000
            waiting = self._rest()
            if not waiting and all(tid < 0 for tid in self.running):
                return
            for cpu, tid in enumerate(self.running):
                if tid >= 0 and self.random.random() < 0.5:  # not all at once, or nothing would ever wait behind a busy CPU beside an idle one
                    self._vacate(cpu, Message.THREAD_BLOCKED)
        lost = [tid for tid, state in enumerate(self.where) if state == "runnable"]
        raise AssertionError(f"policy {self.agent.policy.name!r}: threads {lost} never got a CPU")

    def _rest(self) -> list[int]:
        """Threads that wait once all is delivered; none may while a CPU idles, but for those whose decision a CPU holds that is taken from it."""
        self._come_to_rest()
        waiting = [tid for tid, state in enumerate(self.where) if state == "runnable"]
        if self.agent.policy.work_conserving:
            held = {int(decision["tid"]) for cpu, pending in enumerate(self.pending) if self.taken[cpu] for decision in pending}
            free = [tid for tid in waiting if tid not in held]
            idle = [cpu for cpu, tid in enumerate(self.running) if tid < 0 and not self.taken[cpu]]
            assert not (free and idle), f"policy {self.agent.policy.name!r}: threads {free} wait while CPUs {idle} idle"
        return waiting

    def _come_to_rest(self) -> None:
        """Deliver everything, both ways, until nothing changes; bounded, since policies may preempt at every look."""
        for _ in range(20):
            before = len(self._decisions)
            self._batch()
            for cpu in range(self.agent.cpus):
                self._look(cpu)
            if len(self._decisions) == before and not self._unsent:
                return

    def _say(self, kind: Message, tid: int = -1, cpu: int = -1, front: int = 0) -> None:
        m = np.zeros(1, MESSAGE)
        m["version"], m["subsystem"], m["type"], m["time_ns"], m["tid"], m["cpu"], m["front"] = VERSION, SUBSYSTEM, kind, self.now_ns, tid, cpu, front
        if cpu >= 0:
            m["cpu_seq"] = self.cpu_seq[cpu]
        if tid >= 0:
            request_class, qos, work_ns = self.hints[tid]
            m["seq"], m["request_class"], m["qos"], m["work_ns"], m["deadline_ns"] = self.seq[tid], request_class, qos, work_ns, self.now_ns + work_ns
        self._unsent.append(m)

    def _answer(self, decision: Any, outcome: Outcome) -> None:
        o = np.zeros(1, OUTCOME)
        tid, cpu = int(decision["tid"]), int(decision["cpu"])
        o["version"], o["subsystem"], o["type"], o["time_ns"] = VERSION, SUBSYSTEM, Message.TXN_OUTCOME, self.now_ns
        o["seq"] = self.seq[tid] if tid >= 0 else 0
        o["tid"], o["cpu"], o["outcome"], o["cpu_seq"], o["txn"] = tid, cpu, outcome, self.cpu_seq[cpu], decision["txn"]
        self._unsent.append(o.view(MESSAGE))

    def _batch(self) -> None:
        """The agent drains some of what was said, and decides."""
        n = self.random.randrange(len(self._unsent) + 1) if self.random.random() < 0.3 else len(self._unsent)
        end = np.zeros(1, MESSAGE)
        end["version"], end["subsystem"], end["type"], end["time_ns"] = VERSION, SUBSYSTEM, Message.BATCH_END, self.now_ns
        end["tid"] = end["cpu"] = -1
        messages = np.concatenate([*self._unsent[:n], end])
        del self._unsent[:n]
        self._messages.append(messages)
        made = self.agent.feed(messages)
        self._check_tables()
        if len(made):
            self._decisions.append(made)
        for decision in made:
            cpu = int(decision["cpu"])
            assert 0 <= cpu < self.agent.cpus
            if decision["type"] != Decision.KICK:
                self.pending[cpu].append(decision)
            self.rung[cpu] |= bool(decision["flags"] & KICKED)

    def _resync(self) -> None:
        """Messages are lost, at random one time in ten that this could happen: the host drops what is staged and replays its state."""
        if self.random.random() < 0.9:
            return
        self._unsent.clear()
        self.demoted.clear()
        self._say(Message.RESYNC)
        for tid, state in enumerate(self.where):
            if state != "gone":
                self._say(Message.THREAD_NEW, tid=tid)
        for cpu, tid in enumerate(self.running):
            self.pending[cpu].clear()
            self.rung[cpu] = False
            self._say(Message.CPU_NEW, tid=tid, cpu=cpu)
            if self.taken[cpu]:
                self._say(Message.CPU_TAKEN, cpu=cpu)
            elif tid < 0:
                self._say(Message.CPU_IDLE, cpu=cpu)
        for tid, state in enumerate(self.where):
            if state == "runnable":
                self._say(Message.THREAD_RUNNABLE, tid=tid)

    def _check_tables(self) -> None:
        """What the runtime counts is what its tables hold."""
        runtime = self.agent.runtime[0]
        threads, cpus = runtime["thread"][: self.agent.threads], runtime["cpu"][: self.agent.cpus]
        staged = threads["cpu"][threads["state"] == STAGED]
        assert [int(c["live"]) for c in cpus] == [int(np.sum(staged == cpu)) for cpu in range(self.agent.cpus)]
        assert runtime["live"] == len(staged)
        assert runtime["idle"] == np.sum(cpus["idle"])
        assert runtime["waiting"] == np.sum(threads["state"] == RUNNABLE)

    def _wake(self) -> None:
        tid = self.random.randrange(self.agent.threads)
        if self.where[tid] == "gone":
            self.where[tid] = "blocked"
            self._say(Message.THREAD_NEW, tid=tid)
        if self.where[tid] == "blocked":
            self.where[tid] = "runnable"
            self.seq[tid] += 1
            self._say(Message.THREAD_RUNNABLE, tid=tid)
            self._make_way(tid)

    def _make_way(self, tid: int) -> None:
        """A thread has woken: a demoted one leaves its CPU to it."""
        for cpu, runs in enumerate(self.running):
            if runs in self.demoted and not self.taken[cpu] and self._may_run(tid, cpu):
                self._take_off(cpu)
                self.running[cpu], self.where[tid] = tid, "running"
                self.seq[tid] += 1
                self.cpu_seq[cpu] += 1
                self._say(Message.THREAD_RUNNING, tid=tid, cpu=cpu)
                return

    def _may_run(self, tid: int, cpu: int) -> bool:
        """Threads of this host are bound to no CPU."""
        return True

    def _take_off(self, cpu: int) -> None:
        """The thread that runs on the CPU can run, and does not."""
        tid = self.running[cpu]
        self.running[cpu] = -1
        self.seq[tid] += 1
        self.cpu_seq[cpu] += 1
        self.where[tid] = "runnable"
        self._say(Message.THREAD_PREEMPTED, tid=tid, cpu=cpu)

    def _kill(self) -> None:
        tid = self.random.randrange(self.agent.threads)
        if self.where[tid] in ("blocked", "runnable"):
            self.where[tid] = "gone"
            self.demoted.discard(tid)
            self.seq[tid] += 1
            self._say(Message.THREAD_DEAD, tid=tid)

    def _block(self) -> None:
        cpu = self.random.randrange(self.agent.cpus)
        if self.running[cpu] >= 0:
            self._vacate(cpu, Message.THREAD_BLOCKED)

    def _preempt(self) -> None:
        """The kernel takes the thread off its CPU."""
        cpu = self.random.randrange(self.agent.cpus)
        if self.running[cpu] >= 0:
            self._vacate(cpu, self.random.choice([Message.THREAD_PREEMPTED, Message.THREAD_YIELDED]))

    def _vacate(self, cpu: int, kind: Message) -> None:
        tid = self.running[cpu]
        self.running[cpu] = -1
        self.seq[tid] += 1
        self.cpu_seq[cpu] += 1
        self.where[tid] = "blocked" if kind == Message.THREAD_BLOCKED else "runnable"
        if kind == Message.THREAD_BLOCKED:
            self.demoted.discard(tid)
        self._say(kind, tid=tid, cpu=cpu, front=int(kind == Message.THREAD_PREEMPTED))
        self._next(cpu)

    def _next(self, cpu: int) -> None:
        """The CPU has no thread: apply the first decision that holds."""
        while self.pending[cpu] and not self.taken[cpu]:
            decision = self.pending[cpu].pop(0)
            if decision["type"] == Decision.DEMOTE:
                continue
            outcome = self._judge(decision, cpu)
            if outcome == Outcome.COMMITTED:
                self._put(decision, cpu)
                return
            self._answer(decision, outcome)
        if not self.taken[cpu]:
            self._say(Message.CPU_IDLE, cpu=cpu)

    def _put(self, decision: Any, cpu: int) -> None:
        tid = int(decision["tid"])
        self.running[cpu], self.where[tid] = tid, "running"
        self.seq[tid] += 1
        self.cpu_seq[cpu] += 1
        self._answer(decision, Outcome.COMMITTED)

    def _judge(self, decision: Any, cpu: int) -> Outcome:
        tid = int(decision["tid"])
        if decision["type"] == Decision.YIELD_CPU or (decision["flags"] & PREEMPT and decision["cpu_seq"] != self.cpu_seq[cpu]):
            return Outcome.STALE
        if self.where[tid] == "gone":
            return Outcome.TARGET_GONE
        if self.seq[tid] != decision["seq"]:
            return Outcome.STALE
        assert self.where[tid] == "runnable", f"thread {tid} is {self.where[tid]} although its sequence number has not moved"
        return Outcome.CONGESTED if self.random.random() < 0.02 else Outcome.COMMITTED

    def _ring(self) -> None:
        self._look(self.random.randrange(self.agent.cpus))

    def _look(self, cpu: int) -> None:
        """A doorbell, if one was rung: an idle CPU takes the next thread, a busy one looks for a preemption that still holds."""
        if not self.rung[cpu] or self.taken[cpu]:
            return
        self.rung[cpu] = False
        if self.running[cpu] < 0:
            self._next(cpu)
            return
        for at, decision in enumerate(list(self.pending[cpu])):
            if not decision["flags"] & PREEMPT:
                continue
            if decision["type"] == Decision.DEMOTE:
                if decision["cpu_seq"] == self.cpu_seq[cpu]:
                    self.demoted.add(self.running[cpu])
                self.pending[cpu].remove(decision)
                return self._ring_again(cpu)
            if decision["cpu_seq"] != self.cpu_seq[cpu] or (decision["type"] == Decision.RUN and self._judge(decision, cpu) != Outcome.COMMITTED):
                self.pending[cpu].remove(decision)
                self._answer(decision, Outcome.STALE)
                return self._ring_again(cpu)
            before = self.pending[cpu][:at]
            del self.pending[cpu][: at + 1]
            if decision["type"] == Decision.YIELD_CPU:
                self.pending[cpu][:0] = before
                self._answer(decision, Outcome.COMMITTED)
                self._vacate(cpu, Message.THREAD_PREEMPTED)
                return
            for old in before:
                self._answer(old, Outcome.SUPERSEDED)
            self._take_off(cpu)
            self._put(decision, cpu)
            return

    def _ring_again(self, cpu: int) -> None:
        self.rung[cpu] = True
        self._look(cpu)

    def _take(self) -> None:
        """A higher class takes a CPU: what was staged there is refused."""
        cpu = self.random.randrange(self.agent.cpus)
        if self.taken[cpu]:
            return
        self.taken[cpu] = True
        if self.running[cpu] >= 0:
            tid = self.running[cpu]
            self.running[cpu] = -1
            self.seq[tid] += 1
            self.cpu_seq[cpu] += 1
            self.where[tid] = "runnable"
            self._say(Message.THREAD_PREEMPTED, tid=tid, cpu=cpu, front=1)
        self._say(Message.CPU_TAKEN, cpu=cpu)

    def _give_back(self) -> None:
        for cpu in range(self.agent.cpus):
            if self.taken[cpu]:
                self.taken[cpu] = False
                self._say(Message.CPU_BACK, cpu=cpu)
                while self.pending[cpu]:
                    if (decision := self.pending[cpu].pop(0))["type"] != Decision.DEMOTE:
                        self._answer(decision, Outcome.CPU_UNAVAILABLE)
                self._say(Message.CPU_IDLE, cpu=cpu)
                return
