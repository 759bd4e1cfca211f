"""What hostd may do, and nothing more: it starts as root, keeps the capabilities that its mechanism needs, and makes itself hard to delay."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import grp
import os
import pwd
import resource
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from waveos.errors import ConfigError
from waveos.host.sched import attributes

CAPABILITIES = {
    "CAP_CHOWN": 0,
    "CAP_DAC_OVERRIDE": 1,
    "CAP_KILL": 5,
    "CAP_SETGID": 6,
    "CAP_SETUID": 7,
    "CAP_NET_ADMIN": 12,
    "CAP_NET_RAW": 13,
    "CAP_IPC_LOCK": 14,
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
    "CAP_SYS_NICE": 23,
    "CAP_SYS_RESOURCE": 24,
    "CAP_PERFMON": 38,
    "CAP_BPF": 39,
}
"""The kernel's numbers (include/uapi/linux/capability.h) of those that some mechanism needs."""
HOSTD = ("CAP_SYS_NICE", "CAP_BPF", "CAP_PERFMON", "CAP_SYS_RESOURCE", "CAP_KILL", "CAP_DAC_OVERRIDE", "CAP_IPC_LOCK", "CAP_SETUID", "CAP_SETGID")
"""Of hostd for scheduling: threads' attributes; load and attach BPF; memory for both; end its agent; write cgroup and /run files; start the agent as
another user."""
_VERSION_3 = 0x2008_0522
_PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 24, 38
_MCL_CURRENT, _MCL_FUTURE = 1, 2
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Account:
    """A user that processes may run as, and connect as."""

    name: str
    uid: int
    gid: int


def need_root() -> None:
    """Raises ConfigError unless this process is root."""
    if os.geteuid() != 0:
        raise ConfigError("hostd changes how threads are scheduled and loads BPF programs: run it as root, or let systemd start it")


def account(name: str) -> Account:
    """The user of that name. Raises ConfigError."""
    try:
        found = pwd.getpwnam(name)
    except KeyError:
        raise ConfigError(f"there is no user {name!r} on this machine; `useradd --system {name}` makes one, or name another") from None
    return Account(name, found.pw_uid, found.pw_gid)


def uids(name: str) -> set[int]:
    """The number of the user of that name, if there is one."""
    with contextlib.suppress(ConfigError):
        return {account(name).uid}
    return set()


def group(name: str) -> int:
    """The number of the group of that name. Raises ConfigError."""
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise ConfigError(f"there is no group {name!r} on this machine; `groupadd --system {name}` makes one, or name another") from None


def keep_only(names: Iterable[str]) -> None:
    """Give up every capability but these (of those that it has), for good: they cannot come back, nor can children have more. Raises OSError."""
    kept = sum(1 << CAPABILITIES[name] for name in names) & _mask("self", "CapPrm")
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    for number in range(last + 1):
        if not kept >> number & 1 and _libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0):
            number_of_error = ctypes.get_errno()
            if number_of_error != errno.EPERM:  # it has no CAP_SETPCAP: then there is nothing to give up
                raise OSError(number_of_error, f"dropping capability {number}")
    header = struct.pack("=Ii", _VERSION_3, 0)
    low, high = kept & 0xFFFF_FFFF, kept >> 32
    data = struct.pack("=6I", low, low, 0, high, high, 0)
    if _libc.capset(header, data):
        raise OSError(ctypes.get_errno(), "giving up capabilities")


def held(pid: int | str = "self") -> set[str]:
    """The capabilities in force of a process, by name; numbers that have no name here as text."""
    mask, names = _mask(pid, "CapEff"), {number: name for name, number in CAPABILITIES.items()}
    return {names.get(number, str(number)) for number in range(64) if mask >> number & 1}


def _mask(pid: int | str, which: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1], 16) for line in lines if line.startswith(f"{which}:"))


def settle_down(cpu: int | None, priority: int) -> list[str]:
    """Make this process one that nothing on its CPU delays: bound, real-time above the workers, in memory for good, and with no garbage to look for.

    Called once everything is imported and made. Lines about what could not be had: it works without, only less evenly.
    """
    refused = []
    gc.collect()
    gc.freeze()
    gc.disable()
    if _libc.mlockall(_MCL_CURRENT | _MCL_FUTURE):
        refused.append(f"its memory cannot be locked ({errno.errorcode.get(ctypes.get_errno(), '?')}): page faults may delay it")
    _touch_stack()
    if cpu is not None:
        attributes.set_affinity(0, [cpu])
    if priority:
        try:
            attributes.write(0, attributes.Attributes("FIFO", priority, flags=attributes.RESET_ON_FORK))
        except OSError as error:
            refused.append(f"it runs as an ordinary process: {error.strerror}")
    return refused


def _touch_stack() -> None:
    """The pages of the stack that calls will use: locked memory of a stack is what it has grown to."""
    with contextlib.suppress(OSError):
        ctypes.memset(ctypes.create_string_buffer(1 << 16), 1, 1 << 16)


def page_faults() -> tuple[int, int]:
    """(without, with) reading from disk, of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_minflt, used.ru_majflt


def cpu_time_ns() -> int:
    """CPU time of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return int((used.ru_utime + used.ru_stime) * 1e9)
