"""The kinds of change that a journal knows, each as a pair: `note_X` writes down what is there now, and the `@kind` function puts it back.

What is gone by then (a thread that has ended, a cgroup that was removed) needs nothing put back: no line, no error.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import subprocess
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from waveos.host.enclave import parse_cpus, show_cpus
from waveos.host.kin import birth, boot_ticks, family, heirs
from waveos.host.restore import Entry, Journal, kind
from waveos.host.sched import attributes
from waveos.process import command_of, start_time

_libc = ctypes.CDLL(None, use_errno=True)
_MNT_DETACH = 2
_GIVEN = ("FIFO", "EXT")
"""Policies that mechanisms give to threads."""
_POSSIBLE = Path("/sys/devices/system/cpu/possible")


def note_thread(journal: Journal, tid: int, elder: int | None = None) -> int:
    """Before a thread's policy, priority, nice value, slice or affinity is changed. Raises ProcessLookupError if it is gone.

    A thread that was born after its parent, or another thread of its process, had been changed is to be as that one was: it has inherited.
    `elder`: the entry of the one that it comes from, for who knows; /proc names init as the parent once that one has ended. A thread that took its process's
    number, by exec, comes from itself.
    """
    start, was, cpus = start_time(tid), attributes.read(tid), attributes.affinity(tid)
    if start is None:
        raise ProcessLookupError(tid)
    named = None if elder is None else journal.entry(elder)
    if (kin := named or _elder(journal, tid, start)) is not None:
        was, cpus = attributes.Attributes(**kin["was"]), kin["cpus"]
        if kin is not named or start > kin["start"]:  # else it is the elder itself: exec gave it its process's birth, too
            was = _passed_on(was)
    return journal.note("thread", __name__, what=tid, start=start, at=boot_ticks(), was=was.facts(), cpus=cpus)


def _elder(journal: Journal, tid: int, start: int) -> Entry | None:
    """What is noted of the thread's process or parent, if it is older than the thread."""
    for pid in family(tid):
        if pid != tid and (entry := journal.find("thread", pid)) is not None and entry["at"] <= start:
            return entry
    return None


def _passed_on(was: attributes.Attributes) -> attributes.Attributes:
    """What a child gets of that, by fork(2)."""
    if not was.flags & attributes.RESET_ON_FORK:
        return was
    return attributes.Attributes(nice=max(0, was.nice) if was.policy in ("OTHER", "BATCH", "IDLE") else 0)


@kind("thread")
def _undo_thread(entry: Entry, dry_run: bool) -> str | None:
    tid, was, cpus = entry["what"], attributes.Attributes(**entry["was"]), entry["cpus"]
    try:
        if start_time(tid) != entry["start"]:
            return None
        if attributes.read(tid) == was and attributes.affinity(tid) == cpus:
            return None
        name, now = command_of(tid), cpus
        if not dry_run:
            steps = [partial(attributes.write, tid, was), partial(_bind, tid, cpus)]
            _do_all(reversed(steps) if was.policy == "DEADLINE" else steps)  # which the kernel gives only to a thread that may use all CPUs
            now = attributes.affinity(tid)
    except ProcessLookupError:
        return None
    missing = sorted(set(cpus) - set(now))
    return f"thread {tid} ({name}): {was}, CPUs {show_cpus(now)}" + (f" (it may not use {show_cpus(missing)} any more)" if missing else "")


def _do_all(steps: Iterable[Callable[[], None]]) -> None:
    """Each of them, though one fails; the first error is raised afterwards."""
    errors = []
    for step in steps:
        try:
            step()
        except OSError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _bind(tid: int, cpus: Iterable[int]) -> None:
    """Let the thread run on these CPUs again. If none of them is left to it (offline, or not in its cpuset), on all that are, as the kernel itself does."""
    try:
        attributes.set_affinity(tid, cpus)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        attributes.set_affinity(tid, parse_cpus(_POSSIBLE.read_text()))


def note_heirs(journal: Journal, pid: int, session: bool = False) -> int:
    """Before the first change in a process: what it begets from now on inherits the change, and is put back although nobody lives to write it down.

    With `session` all processes of its session count, also those whose parents have ended.
    """
    start, was, cpus, of = birth(pid), attributes.read(pid), attributes.affinity(pid), os.getsid(pid) if session else 0
    return journal.note("heirs", __name__, what=pid, start=start, at=boot_ticks(), session=of, was=was.facts(), cpus=cpus)


@kind("heirs")
def _undo_heirs(entry: Entry, dry_run: bool) -> str | None:
    was, cpus = _passed_on(attributes.Attributes(**entry["was"])), set(entry["cpus"])
    found: dict[int, list[Callable[[], None]]] = {}
    for tid in heirs(entry["what"], entry["session"], entry["at"], entry.get("start")):  # journals of before have no start
        with contextlib.suppress(ProcessLookupError):
            now, bound = attributes.read(tid), set(attributes.affinity(tid))
            steps: list[Callable[[], None]] = []
            if now.policy in _GIVEN and was.policy not in _GIVEN:
                steps.append(partial(attributes.write, tid, was))
            if bound < cpus:
                steps.append(partial(_bind, tid, cpus))
            if steps:
                found[tid] = steps
    if not found:
        return None
    if not dry_run:
        _do_all(partial(_unless_gone, steps) for steps in found.values())
    return f"threads born of process {entry['what']} meanwhile ({', '.join(map(str, sorted(found)))}): {was}, CPUs {show_cpus(sorted(cpus))}"


def _unless_gone(steps: list[Callable[[], None]]) -> None:
    with contextlib.suppress(ProcessLookupError):
        _do_all(steps)


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
