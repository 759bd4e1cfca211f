"""Which process, for certain: a pid may be given out again, a pid with its start time is one process for ever (until the next boot). And whose it is."""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def start_time(pid: int) -> int | None:
    """When the process or thread started, in clock ticks since boot (field 22 of /proc/PID/stat); None if there is none, or it has ended."""
    # hostd asks in each of its ticks, and as one of Python's files it would take three times as long.
    try:
        fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fields = os.read(fd, 4096).rpartition(b")")[2].split()
    except OSError:
        return None
    finally:
        os.close(fd)
    return None if fields[0] in b"ZX" else int(fields[19])


def end_with(parent: int, number: int = signal.SIGKILL) -> bool:
    """From now on this process is sent the signal when its parent ends, however that ends. False: it has ended already."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    return os.getppid() == parent


def command_of(pid: int) -> str:
    """The name that the process or thread shows, for messages; "?" if it is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()  # any bytes may be a name
    except OSError:
        return "?"
