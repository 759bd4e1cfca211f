"""Mechanism `priority`: an enclave on any kernel with BTF, by real-time priorities (priority.bpf.c has the idea).

All of the enclave's threads are SCHED_FIFO of one priority, and stay so: the kernel's queue of that priority is the enclave's queue. A thread is moved to
its tail by lowering it for a moment, to its head by raising it for a moment, because the kernel queues a thread whose priority went up last, and one whose
priority went down first. So there is nothing to take back later, and a hostd that is killed between two calls leaves one thread one step off,
which `wave restore` puts right with the rest. A thread that is demoted has a priority of one less than the others, until it has slept.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np

from waveos.errors import ConfigError
from waveos.host.sched import attributes
from waveos.host.sched.governor import Adopt, Governor, Member
from waveos.sched.records import PREEMPT

OBJECT = Path(__file__).with_name("priority.bpf.o")
FIRST, WORDS = 2, 4
"""Where the acts of `struct acts` begin, and how long one is (type, pid, cpu, tid), in words of 4 bytes: as such they are read at a tenth of what NumPy's
records cost."""
TAIL, LEVEL, LOW = 1, 3, 4
"""`enum act_type`: to the tail of its level's queue, and a change of level alone; else to the head. LOW is added where the level is the lower one."""


class Priority(Governor):
    """See `Mechanism` and `Governor`. `priority`: the threads', 3 to 97; hostd's own must be higher. `grace_us`: how long a thread may run that the
    kernel put on its CPU in another's stead; 0: not at all, which costs hostd a turn each time."""

    name = "priority"
    bell = PREEMPT

    def __init__(
        self, enclave: Any, journal: Any, *, priority: int = 20, grace_us: float = 50, silent_ms: float = 20, default_ms: float = 1_000
    ) -> None:
        if not 3 <= priority <= 97:
            raise ConfigError(f"priority {priority}: real-time priorities of an enclave's threads are 3 to 97")
        lowest, low, member, high = (attributes.Attributes("FIFO", priority + step, flags=attributes.RESET_ON_FORK) for step in range(-2, 2))
        self._below, self._level, self._high = [
            [attributes.prepare(each) for each in level] for level in ((low, lowest), (member, low), (high, high))
        ]
        super().__init__(enclave, journal, OBJECT, member, silent_ms, default_ms)
        try:
            self._bpf.section(".data").view(np.uint64)[0] = int(grace_us * 1_000)
            self._acts = self._bpf.section(".bss.acts").view(np.uint32).data
            self._unsettle = self._bpf.program("unsettle")
            if self._bpf.program("prepare").run():
                raise ConfigError("the kernel gave no timer to the mechanism 'priority'")
            self._bpf.attach("on_switch", "on_wakeup", "on_wakeup_new", "on_fork", "on_exit", "on_exec")
        except BaseException:
            self.close()
            raise

    def _find_again(self, member: Member) -> None:
        """A thread that was the kernel's for a while may have gone to sleep on a CPU that is not the enclave's, of which nobody was told."""
        request = Adopt(member.pid, member.number)
        self._unsettle.run(request)
        self._look_at(member, request)

    def _enforce(self) -> None:
        """Move what is to be moved in the kernel's queue."""
        for at in range(self._attend.run()):
            kind, pid, cpu, tid = self._acts[FIRST + at * WORDS : FIRST + (at + 1) * WORDS]
            if not self._holds(pid, tid):
                continue
            low, kind = kind // LOW, kind % LOW
            with contextlib.suppress(OSError):  # it has ended, or may not any more: it runs as the kernel has it
                if kind not in (TAIL, LEVEL) and len(self._cpus) > 1:
                    attributes.set_affinity(pid, [cpu])
                if kind != LEVEL:
                    attributes.apply(pid, (self._below if kind == TAIL else self._high)[low])
                attributes.apply(pid, self._level[low])
