"""`wave hostd` with a mechanism that is a simulation: its threads wake, run and block in Python, its rings are real memory that a real agent maps.

    python -P fake_hostd.py --enclave NAME --cpus 0 --pids ... (as for wave hostd)

Each member wakes, waits for the agent to run it, runs until the next tick, and blocks. Decisions are checked by sequence number as the kernel's half does.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
from typing import Any

import numpy as np

from waveos import ring
from waveos.cli import run
from waveos.host import changes
from waveos.host.sched import attributes, mechanism
from waveos.outcome import Outcome
from waveos.primitives import CoherentMemory, clock_ns
from waveos.record import VERSION
from waveos.sched.records import DECISION, KICKED, MESSAGE, OUTCOME, SUBSYSTEM, Decision, Message

MESSAGES, TXNS = 256, 256
SILENT_NS = 2_000_000_000


class Simulated:
    """See waveos.host.sched.mechanism.Mechanism. `nice`: what members get, so that there is something to put back."""

    name = "simulated"
    threads = 64

    def __init__(self, enclave: Any, journal: Any, nice: int = 7) -> None:
        self._cpus, self._journal, self._nice = enclave.cpus, journal, nice
        self._fds = {name: os.memfd_create(name, os.MFD_CLOEXEC) for name in ("messages", "txns")}
        self.queues = {}
        self._memory = {}
        for (name, fd), capacity in zip(self._fds.items(), (MESSAGES, TXNS), strict=True):
            size = ring.words(capacity) * 8
            os.ftruncate(fd, size)
            self.queues[name] = fd, size
            self._memory[name] = CoherentMemory(np.frombuffer(mmap.mmap(fd, size), np.int64))
        self.bell = 2
        self.doorbell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.events: list[int] = []
        self._up, self._down = (np.zeros(ring.OWN_WORDS, np.int64) for _ in range(2))
        self._live = False
        self._pids: dict[int, int] = {}  # kernel's number: entry in the journal
        self._tids: list[int] = []
        self._seq: dict[int, int] = {}
        self._state: dict[int, str] = {}
        self._cpu: list[int | None] = [None] * len(self._cpus)
        self._cpu_seq = [0] * len(self._cpus)
        self._rounds: dict[int, int] = {}
        self._count = {"committed": 0, "refused": 0, "rings": 0, "replays": 0, "falls": 0}

    def adopt(self, pid: int) -> None:
        if pid in self._pids:
            return
        self._pids[pid] = changes.note_thread(self._journal, pid)
        attributes.write(pid, attributes.Attributes("OTHER", nice=self._nice))
        tid = len(self._tids)
        self._tids.append(pid)
        self._seq[tid], self._state[tid], self._rounds[tid] = 1, "blocked", 0
        if self._live:
            self._say(Message.THREAD_NEW, tid)

    def release(self, pid: int) -> None:
        self._journal.undo(self._pids.pop(pid))
        tid = self._tids.index(pid)
        self._state[tid] = "gone"
        self._say(Message.THREAD_DEAD, tid)

    def _say(self, kind: int, tid: int = -1, cpu: int = -1) -> None:
        record = np.zeros(1, MESSAGE)
        record["version"], record["subsystem"], record["type"], record["time_ns"] = VERSION, SUBSYSTEM, kind, clock_ns()
        record["tid"], record["cpu"], record["seq"] = tid, cpu, self._seq.get(tid, 0)
        record["cpu_seq"] = self._cpu_seq[cpu] if cpu >= 0 else 0
        if self._live:
            ring.send_one(self._memory["messages"], self._up, record.view(np.int64), 0)

    def _answer(self, decision: Any, outcome: int) -> None:
        tid, cpu = int(decision["tid"]), int(decision["cpu"])
        record = np.zeros(1, OUTCOME)
        record["version"], record["subsystem"], record["type"], record["time_ns"] = VERSION, SUBSYSTEM, Message.TXN_OUTCOME, clock_ns()
        record["tid"], record["cpu"], record["txn"], record["outcome"] = tid, cpu, decision["txn"], outcome
        record["seq"], record["cpu_seq"] = self._seq.get(tid, 0), self._cpu_seq[cpu] if 0 <= cpu < len(self._cpus) else 0
        self._count["committed" if outcome == Outcome.COMMITTED else "refused"] += 1
        ring.send_one(self._memory["messages"], self._up, record.view(np.int64), 0)

    def attend(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._count["rings"] += os.eventfd_read(self.doorbell)
        words = np.zeros(8, np.int64)
        while self._live and ring.poll_one(self._memory["txns"], self._down, words, 0):
            self._apply(words.view(DECISION)[0])

    def _apply(self, decision: Any) -> None:
        tid, cpu = int(decision["tid"]), int(decision["cpu"])
        assert decision["version"] == VERSION
        if decision["type"] == Decision.KICK:
            assert decision["flags"] & KICKED
        elif decision["type"] != Decision.RUN or tid not in self._seq or not 0 <= cpu < len(self._cpus):
            self._answer(decision, Outcome.INVALID)
        elif decision["seq"] != self._seq[tid]:
            self._answer(decision, Outcome.STALE)
        elif self._state[tid] != "runnable":
            self._answer(decision, Outcome.TARGET_NOT_RUNNABLE)
        elif self._cpu[cpu] is not None:
            self._answer(decision, Outcome.CPU_UNAVAILABLE)
        else:
            self._seq[tid] += 1
            self._cpu_seq[cpu] += 1
            self._state[tid], self._cpu[cpu] = "running", tid
            self._answer(decision, Outcome.COMMITTED)

    def tick(self) -> None:
        beat = ring.heartbeat(self._memory["txns"])
        if self._live and beat and clock_ns() - beat > SILENT_NS:
            self.agent_gone()
        self.attend()
        for cpu, tid in enumerate(self._cpu):
            if tid is not None:
                self._cpu[cpu] = None
                self._cpu_seq[cpu] += 1
                self._seq[tid] += 1
                if self._state[tid] != "gone":
                    self._state[tid] = "blocked"
                    self._rounds[tid] += 1
                    self._say(Message.THREAD_BLOCKED, tid, cpu)
                self._say(Message.CPU_IDLE, cpu=cpu)
        for tid, state in self._state.items():
            if state == "blocked" and self._live:
                self._seq[tid] += 1
                self._state[tid] = "runnable"
                self._say(Message.THREAD_RUNNABLE, tid)

    def agent_here(self, generation: int) -> None:
        for memory, capacity in zip(self._memory.values(), (MESSAGES, TXNS), strict=True):
            ring.create(memory, capacity, VERSION, SUBSYSTEM, generation)
        assert ring.join_producer(self._memory["messages"], self._up, VERSION, SUBSYSTEM) == ring.JOINED
        assert ring.join_consumer(self._memory["txns"], self._down, VERSION, SUBSYSTEM) == ring.JOINED
        self._live = True
        self._count["replays"] += 1
        self._say(Message.RESYNC)
        for cpu, tid in enumerate(self._cpu):
            self._say(Message.CPU_NEW, -1 if tid is None else tid, cpu)
            if tid is None:
                self._say(Message.CPU_IDLE, cpu=cpu)
        for tid, state in self._state.items():
            if state != "gone" and tid not in self._cpu:
                self._say(Message.THREAD_NEW, tid)
                if state == "runnable":
                    self._say(Message.THREAD_RUNNABLE, tid)

    def agent_gone(self) -> None:
        self._live = False
        self._count["falls"] += 1
        for memory in self._memory.values():
            ring.retire(memory)

    def counters(self) -> dict[str, Any]:
        return {**self._count, "rounds": [self._rounds[tid] for tid in sorted(self._rounds) if self._state[tid] != "gone"], "live": self._live}

    def close(self) -> None:
        self._journal.undo(*self._pids.values())
        self._pids.clear()
        for fd in (*self._fds.values(), *([self.doorbell] if self.doorbell >= 0 else [])):
            os.close(fd)
        self._fds, self.doorbell = {}, -1


if __name__ == "__main__":
    mechanism.make = lambda name, enclave, journal, **settings: Simulated(enclave, journal, **settings)
    sys.exit(run(["hostd", *sys.argv[1:]]))
