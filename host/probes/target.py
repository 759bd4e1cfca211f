"""Whom a probe watches: processes and all that they start, a control group, some CPUs; by default every thread on every CPU."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from waveos.errors import ConfigError

CGROUPS = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup/cpu"))
"""Where a control group is looked for that is not named by its whole path: version 2, beside version 1, and version 1."""
_MACHINE_PIDS = "pid:[4026531836]"
"""The kernel's name for the PID namespace that it started with (PROC_PID_INIT_INO); tracepoints tell its numbers."""


@dataclass(frozen=True)
class Target:
    """Processes (with what they start) and a control group add up; without either all threads are meant. `cpus` limits any of these; () is all."""

    pids: tuple[int, ...] = ()
    cgroup: Path | None = None
    cpus: tuple[int, ...] = ()

    @property
    def limited(self) -> bool:
        """Whether it is some threads and not all."""
        return bool(self.pids or self.cgroup)

    def check(self) -> None:
        """Raises ConfigError for a process, control group or CPU that there is not."""
        for pid in self.pids:
            if not Path(f"/proc/{pid}/task").is_dir():
                raise ConfigError(f"no process {pid}; name one that runs")
        if self.cgroup is not None:
            list(_groups(self.cgroup))
        cpus = os.cpu_count() or 1
        for cpu in self.cpus:
            if not 0 <= cpu < cpus:
                raise ConfigError(f"no CPU {cpu}; this machine has 0 to {cpus - 1}")
        if self.limited and os.readlink("/proc/self/ns/pid") != _MACHINE_PIDS:
            raise ConfigError(
                "in a PID namespace of its own (a container) a process's number is not the kernel's; run the probe outside, or on all threads"
            )

    def threads(self) -> set[int]:
        """The threads of the processes and of the control group, and of the groups below it, at this moment."""
        found: set[int] = set()
        for pid in self.pids:
            with contextlib.suppress(OSError):  # it ended
                found.update(int(name) for name in os.listdir(f"/proc/{pid}/task"))
        if self.cgroup is not None:
            for listing in _groups(self.cgroup):
                with contextlib.suppress(OSError):
                    found.update(int(line) for line in listing.read_text().split())
        return found - {0}  # a thread of another PID namespace

    def prelude(self) -> str:
        """The C that a probe's text is compiled with: CPU_COUNTS and ONLY_WATCHED."""
        counted = " || ".join(f"(cpu) == {cpu}" for cpu in self.cpus) or "1"
        return f"#define CPU_COUNTS(cpu) ({counted})\n" + ("#define ONLY_WATCHED\n" if self.limited else "")

    def describe(self) -> dict[str, Any]:
        """For results."""
        return {"pids": list(self.pids), "cgroup": str(self.cgroup) if self.cgroup else None, "cpus": list(self.cpus) or None}


def parse_numbers(text: str, flag: str) -> tuple[int, ...]:
    """`0,2-4` as (0, 2, 3, 4). Raises ConfigError that names the flag."""
    numbers: list[int] = []
    for part in filter(None, text.replace(" ", "").split(",")):
        low, dash, high = part.partition("-")
        if not (low.isascii() and low.isdigit() and (not dash or (high.isascii() and high.isdigit() and int(low) <= int(high) < int(low) + 4096))):
            raise ConfigError(f"{flag} {text}: {part!r} is no number and no range; write for example 0,2-3")
        numbers.extend(range(int(low), int(high or low) + 1))
    return tuple(dict.fromkeys(numbers))


def find_cgroup(name: str) -> Path:
    """The folder of a control group given by its path, or by its name below a hierarchy's root. Raises ConfigError if there is none."""
    places = [Path(name)] if name.startswith("/") else [root / name for root in CGROUPS]
    for place in places:
        if (place / "cgroup.procs").is_file():
            return place
    raise ConfigError(f"no control group {name}; looked at {', '.join(map(str, places))}")


def _groups(folder: Path) -> Iterator[Path]:
    """The files that list the threads of a group and of all below it: `tasks` in version 1, `cgroup.threads` in version 2."""
    if not (folder / "cgroup.procs").is_file():
        raise ConfigError(f"{folder} is no control group; name a folder that holds cgroup.procs")
    for place, _, files in os.walk(folder):
        yield Path(place) / ("tasks" if "tasks" in files else "cgroup.threads")
