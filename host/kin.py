"""Who comes from whom: threads that inherit what was changed of their elders."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from waveos.process import start_time

_BIRTH = 19  # of what `stat` gives: field 22 of proc_pid_stat(5)
_NOBODY = -1


def family(tid: int) -> tuple[int, int]:
    """(the process of the thread, the parent of that process); (0, 0) if it is gone."""
    try:
        lines = Path(f"/proc/{tid}/status").read_text(errors="replace").splitlines()  # a thread may call itself by any bytes
    except OSError:
        return 0, 0
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(facts["Tgid"]), int(facts["PPid"])


def stat(pid: int) -> list[str]:
    """/proc/PID/stat from the state on; [] if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def birth(pid: int) -> int | None:
    """As `start_time`, but also of a process whose first thread has ended: others of its may go on."""
    fields = stat(pid)
    return int(fields[_BIRTH]) if fields else None


def boot_ticks() -> int:
    """Now, as `start_time` counts."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))


def heirs(pid: int, session: int, since_ticks: int, start: int | None = None) -> Iterator[int]:
    """Threads of the process, of its descendants, and of the session if it is not 0, that were born since.

    `start`: the process's birth, if it is known. A stranger that was given its number, or its session's, is younger than `since_ticks` at any rate.
    """
    parents, sessions, births = {}, {}, {}
    for name in filter(str.isdigit, _listed("/proc")):
        if fields := stat(int(name)):
            parents[int(name)], sessions[int(name)], births[int(name)] = int(fields[1]), int(fields[3]), int(fields[_BIRTH])
    if (born := births.get(pid)) is not None and (born > since_ticks or start not in (None, born)):
        pid = _NOBODY
    if births.get(session, 0) > since_ticks:
        session = 0
    for process in parents:
        line = process
        while line not in (pid, 0, 1) and line in parents:
            line = parents[line]
        if line == pid or (session and sessions[process] == session):
            for name in _listed(f"/proc/{process}/task"):
                if (start_time(int(name)) or -1) >= since_ticks:
                    yield int(name)


def _listed(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []
