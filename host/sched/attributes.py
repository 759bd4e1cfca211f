"""A thread's scheduling attributes, whole, as the kernel keeps them: sched_getattr(2) and sched_setattr(2), which Python does not have.

`os.sched_setscheduler` knows no nice value, no slice, no deadline; here all of them are read at once and put back at once.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import platform
import struct
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from waveos.errors import MissingError
from waveos.process import command_of

POLICIES = {"OTHER": 0, "FIFO": 1, "RR": 2, "BATCH": 3, "IDLE": 5, "DEADLINE": 6, "EXT": 7}
"""The kernel's numbers (include/uapi/linux/sched.h)."""
RESET_ON_FORK = 0x01
_NAMES = {number: name for name, number in POLICIES.items()}
_FAIR = ("OTHER", "BATCH")
_CALLS = {"x86_64": (314, 315), "aarch64": (274, 275)}
_LAYOUT = struct.Struct("=IIQiIQQQ")  # size, policy, flags, nice, priority, runtime, deadline, period: version 0 of struct sched_attr, 48 bytes
_READ_FLAGS = 0x01 | 0x02 | 0x04  # reset on fork, reclaim, overrun signal; the others are commands, not state
_ADVICE = {
    errno.EPERM: "root, or CAP_SYS_NICE, may; in a cgroup of version 1 real-time policies also need cpu.rt_runtime_us",
    errno.ESRCH: "there is no such thread",
    errno.EBUSY: "the kernel has no bandwidth left for it",
    errno.EINVAL: "the kernel does not know this combination",
}
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Attributes:
    """How the kernel schedules one thread. Which fields count depends on the policy, as in sched(7)."""

    policy: str = "OTHER"  # a key of POLICIES
    priority: int = 0  # FIFO, RR: 1 to 99
    nice: int = 0  # OTHER, BATCH: -20 to 19
    slice_ns: int = 0  # OTHER, BATCH: EEVDF's slice, 0: the kernel's own. DEADLINE: the runtime
    deadline_ns: int = 0
    period_ns: int = 0
    flags: int = 0  # RESET_ON_FORK, ...

    def __str__(self) -> str:
        parts = [self.policy]
        if self.policy in ("FIFO", "RR"):
            parts.append(str(self.priority))
        if self.nice:
            parts.append(f"nice {self.nice}")
        if self.slice_ns:
            parts.append(f"slice {self.slice_ns / 1000:g} µs")
        return " ".join(parts)

    def facts(self) -> dict[str, Any]:
        """As plain values, for a journal; `Attributes(**facts)` makes them again."""
        return asdict(self)


def read(tid: int) -> Attributes:
    """The attributes of a thread (0: the caller's). A slice that is the kernel's own is 0. Raises ProcessLookupError if it is gone."""
    found = _read(tid)
    if found.policy in _FAIR and found.slice_ns and found.slice_ns == usual_slice_ns():
        found = replace(found, slice_ns=0)
    elif found.policy in ("FIFO", "RR"):  # the kernel keeps the nice value for the way back, and tells it here alone
        found = replace(found, nice=os.getpriority(os.PRIO_PROCESS, tid))
    return found


def _read(tid: int) -> Attributes:
    buffer = ctypes.create_string_buffer(_LAYOUT.size)
    if _libc.syscall(_call(1), tid, buffer, _LAYOUT.size, 0):
        _fail(tid, "reading its scheduling attributes")
    _, policy, flags, nice, priority, runtime, deadline, period = _LAYOUT.unpack(buffer.raw)
    return Attributes(_NAMES.get(policy, str(policy)), priority, nice, runtime, deadline, period, flags & _READ_FLAGS)


def write(tid: int, attributes: Attributes) -> None:
    """Give a thread these attributes. Raises OSError (ProcessLookupError if it is gone), which names thread, wish and reason."""
    apply(tid, prepare(attributes), attributes)


def prepare(attributes: Attributes) -> Any:
    """The same, ready for `apply`: for who writes one set of attributes to many threads, and wants to be quick."""
    real_time = attributes.policy in ("FIFO", "RR")
    return ctypes.create_string_buffer(
        _LAYOUT.pack(
            _LAYOUT.size,
            POLICIES[attributes.policy],
            attributes.flags,
            attributes.nice,
            attributes.priority if real_time else 0,
            0 if real_time else attributes.slice_ns,
            attributes.deadline_ns,
            attributes.period_ns,
        ),
        _LAYOUT.size,
    )


def apply(tid: int, prepared: Any, attributes: Attributes | str = "new scheduling attributes") -> None:
    """Give a thread prepared attributes: one system call. Raises as `write`."""
    if _libc.syscall(_call(0), tid, prepared, 0):
        _fail(tid, f"setting {attributes}")


def affinity(tid: int) -> list[int]:
    """The CPUs that the thread may run on. Raises ProcessLookupError if it is gone."""
    return sorted(os.sched_getaffinity(tid))


def set_affinity(tid: int, cpus: Iterable[int]) -> None:
    """Let the thread run on these CPUs alone. Raises OSError (ProcessLookupError if it is gone)."""
    cpus = sorted(cpus)
    try:
        os.sched_setaffinity(tid, cpus)
    except OSError as error:
        raise _explained(error.errno or 0, tid, f"binding it to CPUs {cpus}") from None


def usual_slice_ns() -> int:
    """The slice of threads that nobody gave one: as the first process has it."""
    first = _read(1)
    return first.slice_ns if first.policy in _FAIR else 0


@functools.cache
def _call(which: int) -> int:
    machine = platform.machine()
    if machine not in _CALLS:
        raise MissingError(f"scheduling attributes are not known for machines of kind {machine}; known: {', '.join(_CALLS)}")
    return _CALLS[machine][which]


def _fail(tid: int, what: str) -> None:
    raise _explained(ctypes.get_errno(), tid, what)


def _explained(number: int, tid: int, what: str) -> OSError:
    advice = f" ({_ADVICE[number]})" if number in _ADVICE else ""
    return OSError(number, f"thread {tid} ({command_of(tid)}), {what}: {errno.errorcode.get(number, number)}{advice}")
