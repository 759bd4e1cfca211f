"""What both mechanisms share on hostd's side: members by pid and number, children that are born, threads that end, agents that come and go."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from waveos.errors import ConfigError
from waveos.host import changes
from waveos.host.bpf import Object, RingBuffer
from waveos.host.kin import stat
from waveos.host.sched import attributes
from waveos.host.sched.half import CPUS, NOBODY, THREADS, Half
from waveos.process import start_time
from waveos.sched.records import KICKED

PIDFD_THREAD = os.O_EXCL  # pidfd_open(2), Linux 6.9
EVENT = np.dtype([("type", "u4"), ("pid", "u4"), ("tid", "i4"), ("from_pid", "u4")])
FORK, GONE, EXEC = 2, 3, 4  # enum event_type in wave.bpf.h
NOTHING = -1
"""In place of an entry of the journal: there is nothing to put back."""
SWEEP, SWEEP_TICKS = 8, 20
"""Members looked at, to see whether they live, in one of so many ticks: it would be half of what a tick costs."""


class Adopt(ctypes.Structure):
    """A thread that joins, for the programs `adopt`, `seen_runnable` and `release`."""

    _fields_ = [
        ("pid", ctypes.c_uint32),
        ("tid", ctypes.c_uint32),
        ("seq", ctypes.c_uint64),
        ("allowed", ctypes.c_uint64 * (CPUS // 64)),
    ]


@dataclass
class Member:
    """A thread of the enclave: the kernel's number of it, the enclave's, when it started (which makes `pid` certain), and its entry in the journal."""

    pid: int
    number: int
    start: int | None
    entry: int

    @property
    def lives(self) -> bool:
        """It has not ended."""
        return self.start is not None and start_time(self.pid) == self.start


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
        self._threads: dict[int, Member] = {}  # by pid
        self._free = deque(range(THREADS))
        self._round: Iterator[int] = iter(())  # members that are looked at next
        self._ticks = 0
        self._outside = 0  # children of members that could not be taken in
        self._missed: dict[int, int] = {}  # by pid, children that ended before that: the entry of whom they came from, for their own children
        self._leaving: list[Member] = []  # begin to exit, or were let go; they may be seen once more, so their numbers are not free yet
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

    def adopt(self, pid: int, elder: int | None = None) -> None:
        """Take a thread in: journal, number, membership, then the change. `elder`: the entry of whom it comes from, if that is known."""
        if pid in self._threads:
            return
        if not self._free:
            raise ConfigError(f"the enclave holds {THREADS} threads, which is the most")
        entry = changes.note_thread(self._journal, pid, elder)
        allowed = self._allowed(entry)
        member = Member(pid, self._free.popleft(), start_time(pid), entry)
        request = Adopt(pid, member.number)
        for cpu in allowed:
            at = self._cpus.index(cpu)
            request.allowed[at // 64] |= 1 << at % 64
        try:
            pidfd = os.pidfd_open(pid, PIDFD_THREAD)
            try:
                self._adopt.run(request)
                self._members.set(pidfd, member.number)
            finally:
                os.close(pidfd)
            if self._governed:
                attributes.set_affinity(pid, allowed)
                attributes.apply(pid, self._member)
            self._look_at(member, request)
        except OSError:
            self._forget(member)
            self._put_back(member)
            raise
        self._threads[pid] = member

    def _allowed(self, entry: int) -> list[int]:
        """The enclave's CPUs that the thread may use; all of them if it may use none.

        By what is written down, not by what is: a decision may have bound the thread's parent to one CPU, which it inherited.
        """
        noted = self._journal.entry(entry) or {"cpus": []}
        return sorted(set(noted["cpus"]) & set(self._cpus)) or self._cpus

    def _forget(self, member: Member) -> None:
        """The thread is no member any more; its entry in the journal is the caller's."""
        with contextlib.suppress(OSError):
            pidfd = os.pidfd_open(member.pid, PIDFD_THREAD)
            try:
                self._members.delete(pidfd)
            finally:
                os.close(pidfd)
        self._release.run(Adopt(member.pid, member.number))
        self._leaving.append(member)

    def _look_at(self, member: Member, request: Adopt) -> None:
        """A thread that waited for a CPU when it joined sends no message by itself: say so for it."""
        request.seq = int(self._half.host["thread"]["seq"][0, member.number])
        if stat(member.pid)[:1] == ["R"]:
            with contextlib.suppress(OSError):
                self._seen.run(request)

    def number_of(self, pid: int) -> int | None:
        """The enclave's number of a member, by the kernel's."""
        member = self._threads.get(pid)
        return None if member is None else member.number

    def release(self, pid: int) -> None:
        """Let a thread go, as it was."""
        if (member := self._threads.pop(pid, None)) is not None:
            self._put_back(member)
            self._forget(member)

    def _put_back(self, member: Member) -> None:
        self._journal.undo(member.entry)
        member.entry = NOTHING  # what could not be put back stays written down

    def _holds(self, pid: int, number: int) -> bool:
        """The thread with that pid is the one with that number still: one that exits needs its CPU like any other, and then its pid may be a stranger's."""
        if (member := self._threads.get(pid)) is not None:
            return member.number == number
        return any(each.pid == pid and each.number == number and each.lives for each in self._leaving)

    def attend(self) -> None:
        """The doorbell, or news of births and deaths."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.doorbell)
        records = self._ring.poll()
        if not records:
            self._missed.clear()  # all that they begot was heard of: it was in the ring before they were found to be gone
        for record in records:
            event = np.frombuffer(record, EVENT)[0]
            pid = int(event["pid"])
            if event["type"] == FORK:
                self._join(pid, int(event["from_pid"]))
            elif event["type"] == GONE and (member := self._threads.pop(pid, None)) is not None:
                self._leaving.append(member)
            elif event["type"] == EXEC and (member := self._threads.pop(int(event["from_pid"]), None)) is not None:
                self._rename(member, pid)
        self._enforce()

    def _join(self, pid: int, parent: int) -> None:
        """The child of a member, or of one that was to be a member and has ended."""
        elder = self._threads[parent].entry if parent in self._threads else self._missed.get(parent)
        try:
            self.adopt(pid, elder)
        except ProcessLookupError:  # it has ended
            if elder is not None:
                self._missed[pid] = elder
        except (OSError, ConfigError):  # the enclave is full, or the thread may not use its CPUs: it stays outside, the others go on
            self._outside += 1

    def _rename(self, member: Member, pid: int) -> None:
        """The thread goes on as the first of its process, which has exited for it."""
        for each in self._leaving:
            if each.pid == pid:
                self._release.run(Adopt(pid, each.number))
        entry = NOTHING
        with contextlib.suppress(OSError):  # it has ended, or the journal is full
            entry = changes.note_thread(self._journal, pid, elder=member.entry)
        self._threads[pid] = Member(pid, member.number, start_time(pid), entry)
        self._journal.settle(member.entry)

    def tick(self) -> None:
        """Liveness, losses, numbers to be given again."""
        half = self._half
        if half.silent_ns() > self._silent_ns or half.abandoned:
            self.agent_gone()
        half.keep_up()
        if half.live:
            self._enforce()
            self._alone_since_ns = 0
        else:
            now_ns = time.monotonic_ns()
            self._alone_since_ns = self._alone_since_ns or now_ns
            if self._governed and now_ns - self._alone_since_ns > self._default_ns:
                self._let_be()
        self._ticks += 1
        if self._ticks % SWEEP_TICKS == 0:
            self._sweep()
        self._bury()

    def _bury(self) -> None:
        """Numbers of those that are gone are free again. The kernel's side sees only ends on the enclave's CPUs, or of threads of its class."""
        if not self._leaving:
            return
        pids, staying = self._half.host["thread"]["pid"][0], []
        for member in self._leaving:
            if pids[member.number] and member.lives:
                staying.append(member)
                continue
            if pids[member.number]:
                self._release.run(Adopt(member.pid, member.number))
            self._journal.settle(member.entry)
            self._free.append(member.number)
        self._leaving = staying

    def _sweep(self) -> None:
        """A few members: one whose end was not heard of (it ended while it joined, or hostd was held up for long) is no member any more."""
        for _ in range(SWEEP):
            if (pid := next(self._round, None)) is None:
                self._round = iter(list(self._threads))
                return
            if (member := self._threads.get(pid)) is not None and not member.lives:
                self._forget(self._threads.pop(pid))

    def agent_here(self, generation: int) -> None:
        """Empty rings and the whole state for a new agent."""
        self._alone_since_ns = 0
        if not self._governed:
            self._govern()
        self._half.start(generation)

    def agent_gone(self) -> None:
        """Forget what was staged; the enclave's order is first come, first served."""
        if self._half.live or self._half.abandoned:
            self._half.stop()
            self._enforce()

    def _let_be(self) -> None:
        """No agent for long: the threads are the kernel's default again, and stay members."""
        self._governed = False
        self._journal.undo(*self._noted())

    def _noted(self) -> list[int]:
        return [member.entry for member in (*self._threads.values(), *self._leaving)]

    def _govern(self) -> None:
        """The members are ours again."""
        self._governed = True
        for pid, member in list(self._threads.items()):
            with contextlib.suppress(OSError):  # it has ended, or may not: then it stays the kernel's
                self._journal.settle(member.entry)
                member.entry = changes.note_thread(self._journal, pid)
                attributes.set_affinity(pid, self._allowed(member.entry))
                attributes.apply(pid, self._member)
                self._find_again(member)

    def _find_again(self, member: Member) -> None:
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
        return {member.number: pid for pid, member in self._threads.items()}

    def close(self) -> None:
        """Everything as it was."""
        self._journal.undo(*self._noted())
        self._threads.clear()
        self._leaving.clear()
        self._bpf.close()
        if self.doorbell >= 0:
            os.close(self.doorbell)
            self.doorbell = -1
