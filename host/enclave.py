"""The enclave: the CPUs and threads that the operator handed to Wave. Who belongs to it is found here, who runs when elsewhere.

Members are named in one of three ways: processes with all their threads, a cgroup, or a command that hostd starts, with all that comes of it. Children
of members are members; the mechanism hears of them itself, so what is found here is the beginning, and what moves into the cgroup later.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from waveos.errors import ConfigError
from waveos.host.kin import family, stat
from waveos.process import command_of, start_time

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
_KERNEL_THREAD = 0x0020_0000  # PF_KTHREAD, include/linux/sched.h
END_S = 2.0


class Enclave:
    """CPUs, and who the members are. `threads()` are the kernel's numbers of the threads that belong to it now."""

    def __init__(self, name: str, cpus: list[int]) -> None:
        """Raises ConfigError for CPUs that are none, or twice."""
        online = parse_cpus((Path("/sys/devices/system/cpu/online")).read_text())
        if not cpus or len(set(cpus)) != len(cpus):
            raise ConfigError(f"enclave {name!r}: CPUs {cpus}: name each once, and one at least")
        if missing := sorted(set(cpus) - set(online)):
            raise ConfigError(f"enclave {name!r}: CPU {missing[0]} is not online; those that are: {show_cpus(online)}")
        self.name, self.cpus = name, cpus

    def threads(self) -> list[int]:
        """The threads that belong to it as of now."""
        raise NotImplementedError

    def elders(self) -> list[tuple[int, bool]]:
        """The processes from which all others of it come, each with whether its whole session belongs to it."""
        raise NotImplementedError

    def over(self) -> bool:
        """True once nobody can belong to it any more."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go."""

    def describe(self) -> str:
        """Who belongs to it, in a few words."""
        raise NotImplementedError


class Processes(Enclave):
    """Processes that were there before."""

    def __init__(self, name: str, cpus: list[int], pids: list[int]) -> None:
        """Raises ConfigError for a PID that is not there, is a kernel thread, or is hostd's own."""
        super().__init__(name, cpus)
        self._starts = {}
        for pid in pids:
            check_process(pid)
            self._starts[pid] = start_time(pid)

    def threads(self) -> list[int]:
        """All threads of the processes."""
        return [tid for pid in self._starts if start_time(pid) == self._starts[pid] for tid in threads_of(pid)]

    def elders(self) -> list[tuple[int, bool]]:
        """The processes themselves."""
        return [(pid, False) for pid in self._starts]

    def over(self) -> bool:
        """All processes have ended."""
        return all(start_time(pid) != start for pid, start in self._starts.items())

    def describe(self) -> str:
        """Their numbers."""
        return "processes " + ", ".join(map(str, self._starts))


class Cgroup(Enclave):
    """Whatever is in a cgroup, of version 1 or 2, and comes into it."""

    def __init__(self, name: str, cpus: list[int], path: str) -> None:
        """Raises ConfigError if there is no such cgroup, or it is the root."""
        super().__init__(name, cpus)
        self.path = find_cgroup(path)

    def threads(self) -> list[int]:
        """Threads in it and below it; hostd itself is none of them."""
        found: list[int] = []
        for folder in (self.path, *(Path(place) for place, _, _ in os.walk(self.path) if Path(place) != self.path)):
            for file in ("cgroup.threads", "tasks"):
                with contextlib.suppress(OSError):
                    found += [int(word) for word in (folder / file).read_text().split()]
                    break
        ours = set(threads_of(os.getpid()))
        return [tid for tid in found if tid not in ours and not is_kernel_thread(tid)]

    def elders(self) -> list[tuple[int, bool]]:
        """The processes in it."""
        return [(pid, False) for pid in sorted({family(tid)[0] for tid in self.threads()} - {0})]

    def over(self) -> bool:
        """The cgroup was removed."""
        return not self.path.is_dir()

    def describe(self) -> str:
        """Its path."""
        return f"cgroup {self.path}"


class Command(Enclave):
    """A command that is started for it. It stops itself until its first thread is a member, so that nothing of it escapes."""

    def __init__(self, name: str, cpus: list[int], command: list[str], user: tuple[int, int] | None = None) -> None:
        """Raises ConfigError if it cannot be started. user: (uid, gid) to run it as."""
        super().__init__(name, cpus)
        if shutil.which(command[0]) is None:
            raise ConfigError(f"there is no command {command[0]!r}; give its path, or mend the name")
        self.command, self._begun = command, False
        as_user: dict[str, Any] = {} if user is None else {"user": user[0], "group": user[1], "extra_groups": []}
        try:
            self.process = subprocess.Popen(["/bin/sh", "-c", 'kill -STOP $$; exec "$@"', "wave", *command], start_new_session=True, **as_user)
        except (OSError, subprocess.SubprocessError) as error:
            raise ConfigError(f"cannot start {command[0]!r}: {error}") from error
        end = time.monotonic() + END_S
        while stat(self.process.pid)[:1] not in (["T"], []) and time.monotonic() < end:
            time.sleep(0.001)

    def go(self) -> None:
        """Its thread is a member: let it begin."""
        if not self._begun:
            self._begun = True
            os.kill(self.process.pid, signal.SIGCONT)

    def threads(self) -> list[int]:
        """Threads of all processes of its session."""
        return [tid for pid in self._session() for tid in threads_of(pid)]

    def elders(self) -> list[tuple[int, bool]]:
        """The command, with its session."""
        return [(self.process.pid, True)]

    def _session(self) -> list[int]:
        found = []
        for folder in PROC.iterdir():
            if folder.name.isdigit():
                fields = stat(int(folder.name))
                if fields and int(fields[3]) == self.process.pid and fields[0] not in "ZX":
                    found.append(int(folder.name))
        return found

    def over(self) -> bool:
        """The command, and all of its session, has ended."""
        return self.process.poll() is not None and not self._session()

    def close(self) -> None:
        """End it: SIGTERM to its session, SIGKILL to what is left after a while."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in self._session():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
                    os.kill(pid, signal.SIGCONT)
            end = time.monotonic() + END_S
            while time.monotonic() < end and (self.process.poll() is None or self._session()):
                time.sleep(0.005)

    def describe(self) -> str:
        """The command line."""
        return f"command {' '.join(self.command)} (pid {self.process.pid})"


def threads_of(pid: int) -> list[int]:
    """The threads of a process; [] if it is gone."""
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except OSError:
        return []


def is_kernel_thread(pid: int) -> bool:
    """True for a thread of the kernel's own."""
    fields = stat(pid)
    return bool(fields) and bool(int(fields[6]) & _KERNEL_THREAD)


def check_process(pid: int) -> None:
    """Raises ConfigError unless that process can be handed to an enclave."""
    if start_time(pid) is None:
        raise ConfigError(f"PID {pid} is not there: it has ended, or never was; `pgrep -l NAME` finds processes")
    if is_kernel_thread(pid):
        raise ConfigError(f"PID {pid} ({command_of(pid)}) is a kernel thread; an enclave holds processes of users alone")
    if pid == 1:
        raise ConfigError("PID 1 starts and reaps all others; it is not for an enclave")
    if pid == os.getpid():
        raise ConfigError(f"PID {pid} is hostd itself")
    tgid = family(pid)[0] or pid
    if tgid != pid:
        raise ConfigError(f"PID {pid} is a thread of process {tgid}; name the process, all its threads are taken")


def find_cgroup(path: str, hierarchies: Sequence[str] = ("", "unified", "cpu", "cpuset")) -> Path:
    """The folder of a cgroup: an absolute path, or one below a hierarchy as /proc/PID/cgroup shows it. Raises ConfigError."""
    candidates = [Path(path)] if path.startswith(str(CGROUPS)) else [CGROUPS / part / path.lstrip("/") for part in hierarchies]
    for folder in candidates:
        if (folder / "cgroup.procs").exists():
            if not (folder.parent / "cgroup.procs").exists():
                raise ConfigError(f"{folder} is the root of its hierarchy, which holds every process of the machine; name a cgroup below it")
            return folder
    raise ConfigError(f"there is no cgroup {path!r}; looked for {', '.join(map(str, candidates))}")


def parse_cpus(text: str) -> list[int]:
    """The CPUs of a list as the kernel writes it, as in 0-3,5. Raises ConfigError."""
    cpus: list[int] = []
    try:
        for part in text.strip().split(","):
            first, _, last = part.partition("-")
            cpus += range(int(first), int(last or first) + 1)
    except ValueError:
        raise ConfigError(f"{text.strip()!r} is no list of CPUs: write for example 0-3,5") from None
    return cpus


def show_cpus(cpus: list[int]) -> str:
    """The list as the kernel writes it."""
    parts: list[list[int]] = []
    for number in sorted(cpus):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
