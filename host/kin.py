"""Who comes from whom: threads that inherit what was changed of their elders."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from waveos.process import start_time


def family(tid: int) -> tuple[int, int]:
    """(the process of the thread, the parent of that process); (0, 0) if it is gone."""
    try:
        facts = dict(line.split(":", 1) for line in Path(f"/proc/{tid}/status").read_text().splitlines() if ":" in line)
    except OSError:
        return 0, 0
    return int(facts["Tgid"]), int(facts["PPid"])


def boot_ticks() -> int:
    """Now, as `start_time` counts."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))


def heirs(pid: int, session: int, since_ticks: int) -> Iterator[int]:
    """Threads of the process, of its descendants, and of the session if it is not 0, that were born since."""
    parents, sessions = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(folder.name)], sessions[int(folder.name)] = int(fields[1]), int(fields[3])
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
