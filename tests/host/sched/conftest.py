"""A mechanism on this kernel, an enclave of processes that do as they are told, and an agent that a test plays by hand."""

from __future__ import annotations

import contextlib
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from waveos import ring
from waveos.host.restore import Journal
from waveos.outcome import Outcome
from waveos.primitives import CoherentMemory
from waveos.record import VERSION
from waveos.sched.records import DECISION, KICKED, MESSAGE, OUTCOME, PREEMPT, SUBSYSTEM, Decision, Message

PATIENCE_S = 60.0 if "hypervisor" in Path("/proc/cpuinfo").read_text() and Path("/sys/kernel/sched_ext").is_dir() else 10.0
WORKER = """
import mmap, os, sys, threading, time
orders, fd, at = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
busy = mmap.mmap(fd, 4096)
while order := os.read(orders, 1):
    if order == b"f" and os.fork() == 0:
        os.read(orders, 1)
        os._exit(0)
    if order == b"d":
        if (middle := os.fork()) == 0:
            if os.fork() == 0:
                os.read(orders, 1)
            os._exit(0)
        os.waitpid(middle, 0)
    if order == b"m":
        held = mmap.mmap(-1, 128 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        held[:: mmap.PAGESIZE] = bytes(128 << 20 >> 12)
    if order == b"x":
        def execute():
            while busy[at] != 2:
                time.sleep(0.001)
            os.execv(sys.executable, sys.orig_argv)
        threading.Thread(target=execute).start()
    if order == b"y":
        while busy[at]:
            os.sched_yield()
    while busy[at]:
        pass
"""


def why_not(mechanism: str) -> str | None:
    """Why the mechanism cannot be tried here."""
    if os.geteuid():
        return "needs root"
    if not Path("/sys/kernel/btf/vmlinux").exists():
        return "this kernel has no BTF"
    if len(os.sched_getaffinity(0)) < 2:
        return "needs two CPUs: one for the enclave, one for the test"
    if mechanism == "sched_ext" and not Path("/sys/kernel/sched_ext").is_dir():
        return "this kernel has no sched_ext; make test-vm runs this in a guest that has"
    return None


def until(condition: Callable[[], Any], what: str) -> Any:
    """Wait for something to be true; what it was."""
    end = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.001)
    return found


class Worker:
    """A process that blocks until it is told to run, and runs until it is told to stop."""

    def __init__(self, busy: mmap.mmap, fd: int, at: int) -> None:
        self.busy, self.at = busy, at
        read, self._orders = os.pipe()
        self._process = subprocess.Popen([sys.executable, "-S", "-c", WORKER, str(read), str(fd), str(at)], pass_fds=[read, fd])
        os.close(read)
        self.pid = self._process.pid
        until(self.blocked, "the worker waits for orders")

    def blocked(self) -> bool:
        """It sleeps in read(2), and no CPU has it any more."""
        return Path(f"/proc/{self.pid}/wchan").read_text() in ("pipe_read", "anon_pipe_read")

    def state(self) -> str:
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]

    def run(self, order: bytes = b"g") -> None:
        """Become runnable, and stay so."""
        self.busy[self.at] = 1
        os.write(self._orders, order)

    def rest(self) -> None:
        """Block again."""
        self.busy[self.at] = 0

    def tell(self, order: bytes) -> None:
        os.write(self._orders, order)

    def kill(self) -> None:
        """Its end begins; where decisions rule it needs one more to come."""
        self._process.kill()

    def end(self) -> None:
        self.busy[self.at] = 0
        with contextlib.suppress(OSError):
            os.close(self._orders)
        self.kill()
        self._process.wait()


class Hand:
    """An agent played by hand: it takes messages and makes decisions as the test says."""

    def __init__(self, mechanism: Any, generation: int = 1) -> None:
        self.mechanism = mechanism
        mechanism.agent_here(generation)
        (up, up_bytes), (down, down_bytes) = mechanism.queues["messages"], mechanism.queues["txns"]
        self._up, self._down = (
            CoherentMemory(np.frombuffer(mmap.mmap(fd, -(-size // 4096) * 4096), np.int64)) for fd, size in ((up, up_bytes), (down, down_bytes))
        )
        self._up_own, self._down_own = np.zeros(ring.OWN_WORDS, np.int64), np.zeros(ring.OWN_WORDS, np.int64)
        assert ring.join_consumer(self._up, self._up_own, VERSION, SUBSYSTEM) == ring.JOINED
        assert ring.join_producer(self._down, self._down_own, VERSION, SUBSYSTEM) == ring.JOINED
        self.heard: list[Any] = []
        self.seq: dict[int, int] = {}  # by number
        self.cpu_seq: dict[int, int] = {}
        self._txn = 0

    def listen(self) -> list[Any]:
        """Take what there is; all messages so far."""
        batch = np.zeros(64, MESSAGE)
        while n := ring.poll(self._up, self._up_own, batch.view(np.int64), len(batch)):
            for m in batch[:n].copy():
                self.heard.append(m)
                if m["tid"] >= 0:
                    self.seq[int(m["tid"])] = int(m["seq"])
                if m["cpu"] >= 0:
                    self.cpu_seq[int(m["cpu"])] = int(m["cpu_seq"])
        return self.heard

    def beat(self) -> None:
        """Say that the agent lives."""
        self._down.store(18, time.monotonic_ns())

    def ended(self) -> bool:
        """The host has ended these rings: an agent that still lives comes anew."""
        return bool(ring.restarted(self._up, self._up_own))

    def types(self, tid: int | None = None) -> list[str]:
        """Names of the messages so far, about one thread if it is named."""
        return [Message(int(m["type"])).name for m in self.listen() if tid is None or m["tid"] == tid]

    def decide(self, tid: int, cpu: int = 0, *, seq: int | None = None, flags: int = KICKED, kind: int = Decision.RUN, **fields: Any) -> int:
        """Send one decision and ring; its number."""
        self.beat()
        d = np.zeros(1, DECISION)
        self._txn += 1
        d["version"], d["subsystem"], d["type"], d["seq"] = VERSION, SUBSYSTEM, kind, self.seq.get(tid, 0) if seq is None else seq
        d["tid"], d["cpu"], d["flags"], d["cpu_seq"], d["txn"] = tid, cpu, flags, self.cpu_seq.get(cpu, 0), self._txn
        d["time_ns"] = d["decided_ns"] = time.monotonic_ns()
        for name, value in fields.items():
            d[name] = value
        assert ring.send(self._down, self._down_own, d.view(np.int64), 1) == 1
        os.eventfd_write(self.mechanism.doorbell, 1)
        return self._txn

    def answers(self, txn: int) -> list[Any]:
        """The outcomes of that decision so far."""
        self.mechanism.attend()
        outcomes = [m for m in self.listen() if m["type"] == Message.TXN_OUTCOME]
        return [o for o in outcomes if o.reshape(1).view(OUTCOME)["txn"][0] == txn]

    def outcome(self, txn: int) -> Outcome:
        """What became of that decision."""
        return Outcome(int(until(lambda: self.answers(txn), f"an outcome of transaction {txn}")[0]["outcome"]))

    def told(self, kind: Message, tid: int, after: int = 0) -> Any:
        """Wait for a message of that type about that thread, the `after`th or later of all; the message."""

        def found() -> list[Any]:
            self.beat()
            self.mechanism.attend()
            return [m for m in self.listen()[after:] if m["type"] == kind and m["tid"] == tid]

        return until(found, f"{kind.name} about {tid}")[-1]

    def flood(self, tid: int) -> None:
        """Make decisions that are refused, and take no answer, until the messages find no room."""

        def lost() -> bool:
            for _ in range(64):
                self.decide(tid, type=77)
            self.mechanism.attend()
            return bool(self.mechanism.counters()["overflow"])

        until(lost, "the ring of messages is full")

    def preempt(self, cpu: int = 0) -> int:
        """Ask for the CPU to be given to what is staged there."""
        return self.decide(-1, cpu, flags=KICKED | PREEMPT, kind=Decision.YIELD_CPU)

    def look(self, cpu: int = 0) -> None:
        """Wait until the CPU has taken up what was sent to it: a preemption of what ran before, sent last, is answered."""
        last = self.decide(-1, cpu, flags=KICKED | PREEMPT, kind=Decision.YIELD_CPU, cpu_seq=self.cpu_seq[cpu] - 1)
        assert self.outcome(last) is Outcome.STALE

    def demote(self, cpu: int = 0, **fields: Any) -> None:
        """Have what runs there make way for others from now on, of which nothing is said."""
        self.decide(-1, cpu, flags=KICKED | PREEMPT, kind=Decision.DEMOTE, **fields)
        self.look(cpu)


@pytest.fixture(params=["priority", "sched_ext"])
def enclave(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """CPU 0 (0 and 1 with `cpus(2)`), a mechanism, workers on demand, and the test itself elsewhere."""
    if reason := why_not(request.param):
        pytest.skip(reason)
    from waveos.host.sched.mechanism import make

    marker = request.node.get_closest_marker("cpus")
    cpus = sorted(os.sched_getaffinity(0))
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpus[1]})
    fd = os.memfd_create("workers")
    os.ftruncate(fd, 4096)
    busy = mmap.mmap(fd, 4096)
    workers: list[Worker] = []
    journal = Journal(f"test-{os.getpid()}", tmp_path)
    mechanism = make(request.param, SimpleNamespace(name="test", cpus=cpus[: marker.args[0] if marker else 1]), journal, silent_ms=60_000)

    def worker(adopted: bool = True) -> Worker:
        made = Worker(busy, fd, len(workers))
        workers.append(made)
        os.sched_setaffinity(made.pid, set(cpus[: marker.args[0] if marker else 1]))
        if adopted:
            mechanism.adopt(made.pid)
        return made

    try:
        yield SimpleNamespace(mechanism=mechanism, worker=worker, journal=journal, kind=request.param, number=mechanism.number_of)
    finally:
        busy[:] = bytes(len(busy))  # first all rest: one that is killed needs the CPU to die
        mechanism.close()
        for each in workers:
            each.end()
        journal.close()
        busy.close()
        os.close(fd)
        os.sched_setaffinity(0, before)
