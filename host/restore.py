"""The journal: what is to be put back is on disk before it is changed, so that whatever becomes of us, the machine can be as it was.

    journal = Journal("demo")                        # /run/wave/demo/journal; an enclave has one owner
    number = changes.note_thread(journal, tid)       # first the entry,
    attributes.write(tid, wanted)                    # then the change
    journal.undo_all()                               # newest first; what is gone is skipped, what fails stays and is told

The file has a JSON object a line: the owner (pid and start time, and the machine's boot), then entries `{"n", "kind", "by", ...}` and settled ones
`{"settled": [n, ...]}`. Lines are appended by one write each, so a kill leaves at most half a last line, whose change had not been made; and where there
is no room for a line, nothing is written, and the change is not made.
How an entry is undone is its kind's affair: `@kind` functions, in the module that the entry names. The folder is a tmpfs: a reboot forgets
it as the kernel forgets the changes. `restore` is `wave restore`: it needs nothing but the files.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from waveos.errors import ConfigError, WaveError
from waveos.process import command_of, start_time

RUN = Path(os.environ.get("WAVE_RUN", "/run/wave"))
"""Where enclaves have their folders. WAVE_RUN names another place, for tests."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
VERSION = 1
STOP_S = 5.0
_SETTLED_KEPT = 1_024

Entry = dict[str, Any]
Undo = Callable[[Entry, bool], str | None]
"""Puts one change back, or with True only says what it would; the line to tell, or None if there is nothing to put back. Raises OSError."""

_kinds: dict[str, Undo] = {}


def kind(name: str) -> Callable[[Undo], Undo]:
    """Register how entries of that kind are undone."""

    def register(undo: Undo) -> Undo:
        _kinds[name] = undo
        return undo

    return register


class Journal:
    """The journal of one owner. Made with what a dead owner of that name had left put back first: `recovered` are the lines about it."""

    def __init__(self, name: str, folder: Path | None = None) -> None:
        """Raises ConfigError if the name cannot be one, a live process owns it, the folder cannot be written, or what was left cannot be undone."""
        self.name = name
        self.path = path_of(name, folder)
        self.recovered: list[str] = []
        self._open: dict[int, Entry] = {}
        self._subjects: dict[tuple[str, Any], Entry] = {}
        self._settled = 0
        self._unsaid: list[int] = []  # settled, but there was no room to write so
        self._next = 1
        self._file = -1
        try:
            self.path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            with _alone(self.path.parent):
                self._take_over()
        except OSError as error:
            raise ConfigError(f"enclave {name!r}: {self.path.parent} cannot be used ({error.strerror}); run as root, or set WAVE_RUN") from error

    def _take_over(self) -> None:
        owner, entries = read(self.path)
        if owner_alive(owner):
            pid = owner["pid"]
            raise ConfigError(
                f"enclave {self.name!r} already has an owner, pid {pid} ({command_of(pid)}): stop it, use another name, or `wave restore --force {self.name}`"
            )
        self.recovered, left = _undo(entries, dry_run=False)
        if left:
            why = "; ".join(left.values())
            raise ConfigError(f"enclave {self.name!r}: what its dead owner changed cannot all be put back: {why}; see `wave restore --dry-run`")
        self._rewrite()

    def note(self, kind: str, by: str, **facts: Any) -> int:
        """Write down a change that is about to be made; its number. `by` is the module whose `@kind` function undoes it.

        Raises OSError if it cannot be written: then the change must not be made.
        """
        number, self._next = self._next, self._next + 1
        entry = {"n": number, "kind": kind, "by": by, **facts}
        self._append(entry)
        self._open[number] = self._subjects[kind, facts.get("what")] = entry
        return number

    def entry(self, number: int) -> Entry | None:
        """What is written down under that number; None if it is settled."""
        return self._open.get(number)

    def find(self, kind: str, what: Any) -> Entry | None:
        """The newest entry about that subject that is not settled."""
        entry = self._subjects.get((kind, what))
        return entry if entry is not None and entry["n"] in self._open else None

    def settle(self, *numbers: int) -> None:
        """Nothing is left to put back of these: their subject is gone, or was put back otherwise.

        Where there is no room to write so it is written with the next line: after a kill they are put back once more, which does no harm.
        """
        gone = [self._open.pop(number) for number in numbers if number in self._open]
        for entry in gone:
            subject = entry["kind"], entry.get("what")
            if self._subjects.get(subject) is entry:
                del self._subjects[subject]
        if gone:
            self._unsaid += [entry["n"] for entry in gone]
            with contextlib.suppress(OSError):
                self._append()
            if self._settled > max(_SETTLED_KEPT, len(self._open)):
                self._settled = 0  # if it fails, it is tried again after as many
                with contextlib.suppress(OSError):
                    self._rewrite()

    def undo(self, *numbers: int) -> list[str]:
        """Put back these entries, newest first; lines about those that could not be, which stay written down."""
        chosen = set(numbers)
        return self._put_back([entry for number, entry in self._open.items() if number in chosen])

    def undo_all(self) -> list[str]:
        """Put back everything, newest first; lines about what could not be."""
        return self._put_back(self.entries)

    def _put_back(self, wanted: list[Entry]) -> list[str]:
        _, left = _undo(wanted, dry_run=False)
        self.settle(*(entry["n"] for entry in wanted if entry["n"] not in left))
        return list(left.values())

    def close(self) -> list[str]:
        """Undo everything and give the name back. Lines about what could not be undone: then the file stays, for `wave restore`."""
        failed = self.undo_all()
        if not failed:
            _remove(self.path)
        return failed

    @property
    def entries(self) -> list[Entry]:
        """What is written down and not settled, oldest first."""
        return list(self._open.values())

    def _append(self, *lines: Entry) -> None:
        """These, behind what is settled and not yet written: an older entry is never in force again beside a newer one of its subject."""
        settled = [{"settled": self._unsaid}] if self._unsaid else []
        _write(self._file, [*settled, *lines], self.path)
        self._settled += len(self._unsaid)
        self._unsaid = []

    def _rewrite(self) -> None:
        """The same without what is settled, in one step. Raises OSError, with the file as it was, if there is no room for both."""
        owner = {"wave": VERSION, "name": self.name, "pid": os.getpid(), "start": start_time(os.getpid()), "boot": _boot()}
        fresh = self.path.with_suffix(".new")
        file = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            _write(file, [owner, *self._open.values()], fresh)
            os.replace(fresh, self.path)
        except OSError:
            os.close(file)
            fresh.unlink(missing_ok=True)
            raise
        if self._file >= 0:
            os.close(self._file)
        self._file, self._settled, self._unsaid = file, 0, []


def path_of(name: str, folder: Path | None = None) -> Path:
    """The journal of that name. Raises ConfigError for a name that cannot be one."""
    if not NAME.fullmatch(name):
        raise ConfigError(f"{name!r} cannot name an enclave: letters, digits, '.', '_' and '-', at most 64, the first a letter or digit")
    return (folder or RUN) / name / "journal"


def names(folder: Path | None = None) -> list[str]:
    """The names that have a journal. Raises PermissionError where that cannot be seen."""
    return sorted(path.parent.name for path in (folder or RUN).glob("*/journal"))


def read(path: Path) -> tuple[Entry, list[Entry]]:
    """The owner and what is not settled, oldest first; {} and [] if there is no journal, it was cut off in its first line, or is of an earlier boot."""
    try:
        if (owner := path.stat().st_uid) not in (0, os.geteuid()):
            raise ConfigError(f"{path} belongs to user {owner}, so nothing that it says is done; remove it")
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return {}, []
    found = []
    for line in lines[:-1]:  # what has no end of line was cut off
        try:
            found.append(json.loads(line))
        except ValueError:
            raise ConfigError(f"{path} is damaged ({line[:60]!r}); look at it, put back what it names, and remove it") from None
    if not found or found[0].get("boot") != _boot():
        return {}, []
    if found[0].get("wave") != VERSION:
        raise ConfigError(f"{path} is of version {found[0].get('wave')}, this Wave reads version {VERSION}: restore with the Wave that wrote it")
    entries: dict[int, Entry] = {}
    for line in found[1:]:
        if "settled" in line:
            for number in line["settled"]:
                entries.pop(number, None)
        else:
            entries[line["n"]] = line
    return found[0], list(entries.values())


def owner_alive(owner: Entry) -> bool:
    """True while the process that wrote the journal lives."""
    return bool(owner) and start_time(owner["pid"]) == owner["start"]


def restore(
    wanted: list[str] | None = None, *, dry_run: bool = False, force: bool = False, folder: Path | None = None
) -> tuple[list[str], list[str]]:
    """Undo the journals of these names, or of all whose owner is dead. Returns (what was put back, what could not be), a line each.

    A live owner's journal is left alone unless it is named and `force` is given: then the owner is stopped first.
    """
    done: list[str] = []
    failed: list[str] = []
    for name in wanted or names(folder):
        path = path_of(name, folder)
        if wanted and not path.exists():
            failed.append(f"{name}: there is no journal {path}; known: {', '.join(names(folder)) or 'none'}")
            continue
        try:
            _restore(name, path, bool(wanted), dry_run, force, done, failed)
        except FileNotFoundError:
            pass  # its owner, or somebody else, was quicker
        except (WaveError, OSError) as error:
            failed.append(f"{name}: {error}")
    return done, failed


def _restore(name: str, path: Path, named: bool, dry_run: bool, force: bool, done: list[str], failed: list[str]) -> None:
    owner, _ = read(path)
    if owner_alive(owner):
        who = f"pid {owner['pid']} ({command_of(owner['pid'])})"
        if not (named and force):
            if named:
                failed.append(f"{name}: its owner lives, {who}; --force stops it first")
            return
        done.append(f"{name}: {'would stop' if dry_run else 'stopped'} {who}")
        if not dry_run:
            _stop(owner)
    with _alone(path.parent):
        _, entries = read(path)  # again: an owner that was stopped has put back what it could
        lines, left = _undo(entries, dry_run)
        done += [f"{name}: {line}" for line in lines if line not in left.values()]
        failed += [f"{name}: {line}" for line in left.values()]
        if not left and not dry_run:
            _remove(path)


def _undo(entries: list[Entry], dry_run: bool) -> tuple[list[str], dict[int, str]]:
    """Newest first. Returns (all lines, lines by number of those that failed)."""
    lines, left = [], {}
    for entry in reversed(entries):
        try:
            line = _undoer(entry)(entry, dry_run)
        except Exception as error:  # whatever is wrong with one must not keep the others from being put back
            line = left[entry["n"]] = f"{entry.get('kind')} {entry.get('what', '')}: {getattr(error, 'strerror', None) or error}"
        if line:
            lines.append(line)
    return lines, left


def _undoer(entry: Entry) -> Undo:
    if entry["kind"] not in _kinds and str(entry["by"]).startswith("waveos.host."):
        import_module(entry["by"])
    if entry["kind"] not in _kinds:
        raise ConfigError(f"this Wave does not know how to undo it ({entry['by']})")
    return _kinds[entry["kind"]]


def _stop(owner: Entry) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.kill(owner["pid"], number)
        end = time.monotonic() + STOP_S
        while owner_alive(owner) and time.monotonic() < end:
            time.sleep(0.005)


def _remove(path: Path) -> None:
    """The journal, and the sockets that a daemon which was killed has left beside it."""
    for each in (path, *path.parent.glob("*.sock")):
        each.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # somebody keeps something else there
        path.parent.rmdir()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Alone among processes that take this name or restore it."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _write(file: int, lines: list[Entry], path: Path) -> None:
    """All of the lines, at the end of the file, or nothing. Raises OSError. Where the next page cannot be had, write(2) writes a part and tells no error."""
    whole = b"".join(json.dumps(line, separators=(",", ":"), ensure_ascii=True).encode() + b"\n" for line in lines)
    try:
        if (written := os.write(file, whole)) == len(whole):
            return
        os.ftruncate(file, os.fstat(file).st_size - written)
        number = errno.ENOSPC
    except OSError as error:
        number = error.errno or 0
    raise OSError(number, f"{path} cannot be written: {os.strerror(number)}")
