"""What both mechanisms share on hostd's side: members by pid and number, children that are born, threads that end, agents that come and go."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from waveos.errors import ConfigError
from waveos.host import changes
from waveos.host.bpf import Object, RingBuffer
from waveos.host.sched import attributes
from waveos.host.sched.half import CPUS, NOBODY, THREADS, Half
from waveos.process import start_time
from waveos.sched.records import KICKED

PIDFD_THREAD = os.O_EXCL  # pidfd_open(2), Linux 6.9
EVENT = np.dtype([("type", "u4"), ("pid", "u4"), ("tid", "i4"), ("spare", "u4")])
FORK, GONE = 2, 3  # enum event_type in wave.bpf.h
SWEEP = 4
"""Members looked at in a tick, to see whether they live."""


class Adopt(ctypes.Structure):
    """A thread that joins, for the programs `adopt`, `seen_runnable` and `release`."""

    _fields_ = [
        ("pid", ctypes.c_uint32),
        ("tid", ctypes.c_uint32),
        ("seq", ctypes.c_uint64),
        ("allowed", ctypes.c_uint64 * (CPUS // 64)),
    ]


class Governor:
    """A mechanism but for how it enforces: `_enforce`, and the attributes that members get. See `Mechanism`.

    `silent_ms`: an agent silent for so long is lost; `default_ms`: with none for so long the kernel's default holds, until one comes.
    """

    name = ""
    bell = KICKED

    def __init__(self, enclave: Any, journal: Any, path: Path, member: attributes.Attributes, silent_ms: float, default_ms: float) -> None:
        self._cpus: list[int] = list(enclave.cpus)
        self._journal = journal
        self._silent_ns, self._default_ns = int(silent_ms * 1e6), int(default_ms * 1e6)
        self._member = attributes.prepare(member)
        self._numbers: dict[int, int] = {}  # by pid: the enclave's number of it
        self._entries: dict[int, int] = {}  # by pid: its entry in the journal
        self._free = deque(range(THREADS))
        self._round: Iterator[int] = iter(())  # members that are looked at next
        self._outside = 0  # children of members that could not be taken in
        self._leaving: list[int] = []  # numbers whose thread has begun to exit
        self._governed = True  # members have the attributes that make them so
        self._alone_since_ns = 0  # since when no agent lives; 0: one does, or nobody has looked
        self._bpf = Object(path)
        self.doorbell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            self._half = Half(self._bpf, self._cpus, os.getpid())
            self._members = self._bpf.map("members")
            self._ring = RingBuffer(self._bpf.map("events"))
            self._adopt, self._seen, self._release, self._attend = (self._bpf.program(p) for p in ("adopt", "seen_runnable", "release", "attend"))
        except BaseException:
            self.close()
            raise
        self.events = [self._ring.fd]
        self.queues = {"messages": self._queue(".bss.messages"), "txns": self._queue(".bss.txns")}

    def _queue(self, section: str) -> tuple[int, int]:
        found = self._bpf.map(section)
        return found.fd, found.value_size

    def _enforce(self) -> None:
        """Do what the kernel's side cannot do by itself."""
        raise NotImplementedError

    def adopt(self, pid: int) -> None:
        """Take a thread in: journal, number, membership, then the change."""
        if pid in self._numbers:
            return
        if not self._free:
            raise ConfigError(f"the enclave holds {THREADS} threads, which is the most")
        allowed = self._allowed(pid)
        entry = changes.note_thread(self._journal, pid)
        number = self._free.popleft()
        request = Adopt(pid, number)
        for cpu in allowed:
            at = self._cpus.index(cpu)
            request.allowed[at // 64] |= 1 << at % 64
        try:
            pidfd = os.pidfd_open(pid, PIDFD_THREAD)
            try:
                self._adopt.run(request)
                self._members.set(pidfd, number)
            finally:
                os.close(pidfd)
            if self._governed:
                attributes.set_affinity(pid, allowed)
                attributes.apply(pid, self._member)
            self._look_at(pid, number, request)
        except OSError:
            self._forget(pid, number)
            self._journal.undo(entry)
            raise
        self._numbers[pid], self._entries[pid] = number, entry

    def _allowed(self, pid: int) -> list[int]:
        """The enclave's CPUs that the thread may use; all of them if it may use none."""
        return sorted(set(attributes.affinity(pid)) & set(self._cpus)) or self._cpus

    def _forget(self, pid: int, number: int) -> None:
        """The thread is no member any more."""
        with contextlib.suppress(OSError):
            pidfd = os.pidfd_open(pid, PIDFD_THREAD)
            try:
                self._members.delete(pidfd)
            finally:
                os.close(pidfd)
        self._release.run(Adopt(pid, number))
        self._leaving.append(number)  # not free at once: one that is about to end may still be seen once more

    def _look_at(self, pid: int, number: int, request: Adopt) -> None:
        """A thread that waited for a CPU when it joined sends no message by itself: say so for it."""
        request.seq = int(self._half.host["thread"]["seq"][0, number])
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "R":
                self._seen.run(request)

    def number_of(self, pid: int) -> int | None:
        """The enclave's number of a member, by the kernel's."""
        return self._numbers.get(pid)

    def release(self, pid: int) -> None:
        """Let a thread go, as it was."""
        number = self._numbers.pop(pid, None)
        if number is None:
            return
        self._journal.undo(self._entries.pop(pid))
        self._forget(pid, number)

    def attend(self) -> None:
        """The doorbell, or news of births and deaths."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.doorbell)
        for record in self._ring.poll():
            event = np.frombuffer(record, EVENT)[0]
            pid = int(event["pid"])
            if event["type"] == FORK:
                try:
                    self.adopt(pid)
                except ProcessLookupError:
                    pass  # it has ended
                except (OSError, ConfigError):  # the enclave is full, or the thread may not use its CPUs: it stays outside, the others go on
                    self._outside += 1
            elif event["type"] == GONE and (number := self._numbers.pop(pid, None)) is not None:
                self._journal.settle(self._entries.pop(pid))
                self._leaving.append(number)
        self._enforce()

    def tick(self) -> None:
        """Liveness, losses, numbers to be given again."""
        half = self._half
        if half.silent_ns() > self._silent_ns or half.abandoned:
            half.stop()
        half.keep_up()
        if half.live:
            self._enforce()
            self._alone_since_ns = 0
        else:
            now_ns = time.monotonic_ns()
            self._alone_since_ns = self._alone_since_ns or now_ns
            if self._governed and now_ns - self._alone_since_ns > self._default_ns:
                self._let_be()
        self._sweep()
        if self._leaving:
            pids = half.host["thread"]["pid"][0]
            self._free.extend(number for number in self._leaving if not pids[number])
            self._leaving = [number for number in self._leaving if pids[number]]

    def _sweep(self) -> None:
        """A few members a tick: one whose end was not heard of (it ended while it joined, or hostd was held up for long) is no member any more."""
        for _ in range(SWEEP):
            if (pid := next(self._round, None)) is None:
                self._round = iter(list(self._numbers))
                return
            if pid in self._numbers and start_time(pid) is None:
                self._journal.settle(self._entries.pop(pid))
                self._forget(pid, self._numbers.pop(pid))

    def agent_here(self, generation: int) -> None:
        """Empty rings and the whole state for a new agent."""
        self._alone_since_ns = 0
        if not self._governed:
            self._govern()
        self._half.start(generation)

    def agent_gone(self) -> None:
        """Forget what was staged; the enclave's order is first come, first served."""
        if self._half.live:
            self._half.stop()

    def _let_be(self) -> None:
        """No agent for long: the threads are the kernel's default again, and stay members."""
        self._governed = False
        self._journal.undo(*self._entries.values())

    def _govern(self) -> None:
        """The members are ours again."""
        self._governed = True
        for pid in list(self._numbers):
            with contextlib.suppress(OSError):  # it has ended, or may not: then it stays the kernel's
                self._journal.settle(self._entries[pid])
                self._entries[pid] = changes.note_thread(self._journal, pid)
                attributes.set_affinity(pid, self._allowed(pid))
                attributes.apply(pid, self._member)
                self._find_again(pid, self._numbers[pid])

    def _find_again(self, pid: int, number: int) -> None:
        """A member that is governed again may have changed its state where the kernel's side does not look; here nothing is known of that."""

    def counters(self) -> dict[str, Any]:
        """What has happened so far."""
        own = {"governed": self._governed, "outside": self._outside}
        return {**self._half.counters(), **own, "running": int(np.count_nonzero(self._half.host["cpu"]["running"][0] != NOBODY))}

    def on_cpus(self) -> list[dict[str, Any]]:
        """What each CPU does now."""
        return self._half.on_cpus()

    def pids(self) -> dict[int, int]:
        """The kernel's numbers of the members, by the enclave's."""
        return {number: pid for pid, number in self._numbers.items()}

    def close(self) -> None:
        """Everything as it was."""
        self._journal.undo(*self._entries.values())
        self._numbers.clear()
        self._entries.clear()
        self._bpf.close()
        if self.doorbell >= 0:
            os.close(self.doorbell)
            self.doorbell = -1
