"""The kinds of change that a journal knows, each as a pair: `note_X` writes down what is there now, and the `@kind` function puts it back.

What is gone by then (a thread that has ended, a cgroup that was removed) needs nothing put back: no line, no error.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from pathlib import Path
from typing import Any

from waveos.host.kin import boot_ticks, family, heirs
from waveos.host.restore import Entry, Journal, kind
from waveos.host.sched import attributes
from waveos.process import command_of, start_time

_libc = ctypes.CDLL(None, use_errno=True)
_MNT_DETACH = 2
_GIVEN = ("FIFO", "EXT")
"""Policies that mechanisms give to threads."""


def note_thread(journal: Journal, tid: int) -> int:
    """Before a thread's policy, priority, nice value, slice or affinity is changed. Raises ProcessLookupError if it is gone.

    A thread that was born after its parent, or another thread of its process, had been changed is to be as that one was: it has inherited.
    """
    start, was, cpus = start_time(tid), attributes.read(tid), attributes.affinity(tid)
    if start is None:
        raise ProcessLookupError(tid)
    if (kin := _elder(journal, tid, start)) is not None:
        was, cpus = attributes.Attributes(**kin["was"]), kin["cpus"]
        if was.flags & attributes.RESET_ON_FORK:
            was = attributes.Attributes(nice=max(0, was.nice) if was.policy in ("OTHER", "BATCH", "IDLE") else 0)
    return journal.note("thread", __name__, what=tid, start=start, at=boot_ticks(), was=was.facts(), cpus=cpus)


def _elder(journal: Journal, tid: int, start: int) -> Entry | None:
    """What is noted of the thread's process or parent, if it is older than the thread."""
    for pid in family(tid):
        if pid != tid and (entry := journal.find("thread", pid)) is not None and entry["at"] <= start:
            return entry
    return None


@kind("thread")
def _undo_thread(entry: Entry, dry_run: bool) -> str | None:
    tid, was = entry["what"], attributes.Attributes(**entry["was"])
    try:
        if start_time(tid) != entry["start"]:
            return None
        if attributes.read(tid) == was and attributes.affinity(tid) == entry["cpus"]:
            return None
        name = command_of(tid)
        if not dry_run:
            attributes.set_affinity(tid, entry["cpus"])
            attributes.write(tid, was)
    except ProcessLookupError:
        return None
    return f"thread {tid} ({name}): {was}, CPUs {_ranges(entry['cpus'])}"


def note_heirs(journal: Journal, pid: int, session: bool = False) -> int:
    """Before the first change in a process: what it begets from now on inherits the change, and is put back although nobody lives to write it down.

    With `session` all processes of its session count, also those whose parents have ended.
    """
    was, cpus, of = attributes.read(pid), attributes.affinity(pid), os.getsid(pid) if session else 0
    return journal.note("heirs", __name__, what=pid, at=boot_ticks(), session=of, was=was.facts(), cpus=cpus)


@kind("heirs")
def _undo_heirs(entry: Entry, dry_run: bool) -> str | None:
    was, cpus = attributes.Attributes(**entry["was"]), set(entry["cpus"])
    found = []
    for tid in heirs(entry["what"], entry["session"], entry["at"]):
        with contextlib.suppress(ProcessLookupError):
            now, bound = attributes.read(tid), set(attributes.affinity(tid))
            if now.policy in _GIVEN and was.policy not in _GIVEN:
                found.append(tid)
                if not dry_run:
                    attributes.write(tid, was)
            if bound < cpus:
                found.append(tid)
                if not dry_run:
                    attributes.set_affinity(tid, cpus)
    if not found:
        return None
    return f"threads born of process {entry['what']} meanwhile ({', '.join(map(str, sorted(set(found))))}): {was}, CPUs {_ranges(sorted(cpus))}"


def note_file(journal: Journal, path: str | os.PathLike[str]) -> int:
    """Before a file of the kernel's (cgroup, sysctl, sysfs) is written. Raises OSError if it cannot be read."""
    return journal.note("file", __name__, what=os.fspath(path), was=Path(path).read_text())


@kind("file")
def _undo_file(entry: Entry, dry_run: bool) -> str | None:
    path, was = Path(entry["what"]), entry["was"]
    with contextlib.suppress(FileNotFoundError):
        if path.read_text() == was:
            return None
        if not dry_run:
            path.write_text(was)
        return f"{path}: {was.strip()!r}"
    return None


def note_new_file(journal: Journal, path: str | os.PathLike[str]) -> int:
    """Before a file is made that must not stay: a pinned BPF object, a shared memory segment, a socket."""
    return journal.note("new file", __name__, what=os.fspath(path))


@kind("new file")
def _undo_new_file(entry: Entry, dry_run: bool) -> str | None:
    path = Path(entry["what"])
    if not os.path.lexists(path):
        return None
    if not dry_run:
        path.unlink(missing_ok=True)
    return f"{path}: removed"


def note_new_folder(journal: Journal, path: str | os.PathLike[str]) -> int:
    """Before a folder is made that must not stay: a cgroup, a folder for pinned objects. Processes in a cgroup go to its parent."""
    return journal.note("new folder", __name__, what=os.fspath(path))


@kind("new folder")
def _undo_new_folder(entry: Entry, dry_run: bool) -> str | None:
    path = Path(entry["what"])
    if not path.is_dir():
        return None
    if not dry_run:
        if (path / "cgroup.procs").exists():
            for pid in (path / "cgroup.procs").read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    (path.parent / "cgroup.procs").write_text(pid)
        path.rmdir()
    return f"{path}: removed"


def note_namespace(journal: Journal, name: str) -> int:
    """Before a network namespace of that name (/run/netns) is made; what is in it goes with it."""
    return journal.note("network namespace", __name__, what=name)


@kind("network namespace")
def _undo_namespace(entry: Entry, dry_run: bool) -> str | None:
    path = Path("/run/netns") / entry["what"]
    if not path.exists():
        return None
    if not dry_run:
        _libc.umount2(os.fsencode(path), _MNT_DETACH)
        path.unlink(missing_ok=True)
    return f"network namespace {path.name}: removed"


def note_link(journal: Journal, name: str) -> int:
    """Before a network interface of that name is made in this namespace."""
    return journal.note("link", __name__, what=name)


@kind("link")
def _undo_link(entry: Entry, dry_run: bool) -> str | None:
    if not Path("/sys/class/net", entry["what"]).exists():
        return None
    if not dry_run:
        told: Any = subprocess.run(["ip", "link", "delete", entry["what"]], capture_output=True, text=True, check=False)
        if told.returncode:
            raise OSError(0, told.stderr.strip())
    return f"network interface {entry['what']}: removed"


def _ranges(numbers: list[int]) -> str:
    """0-3,5: as the kernel writes lists of CPUs."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
