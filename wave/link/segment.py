"""The segment: a file in /dev/shm that holds a link's queues, and whose it is.

Page 0 is the header, in 64-bit words: magic, contract version, subsystem, owner (pid, start time), agent (pid, start time), generation, and from word
TABLE four words a queue: kind, offset in bytes, capacity, 0. A queue's ring begins at a page. The owner is the host's process. Its start time makes
a pid that was given out again another process, so a segment that a crashed host left is known as stale and replaced, and a live one never is.
A segment gets its name only when it is whole (O_TMPFILE, then linkat, which fails if the name is taken).
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import mmap
import os
import re
import secrets
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import numpy as np
import numpy.typing as npt

from waveos import ring
from waveos.errors import LinkError
from waveos.names import nearest
from waveos.process import start_time
from waveos.record import VERSION

Words = npt.NDArray[np.int64]
FOLDER = Path("/dev/shm")
PREFIX = "wave-"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
PAGE = mmap.PAGESIZE
MAGIC = int.from_bytes(b"WaveSeg1", "little")
MAGIC_AT, VERSION_AT, SUBSYSTEM_AT, OWNER_AT, AGENT_AT, GENERATION_AT = 0, 1, 2, 3, 5, 7
TABLE, ENTRY_WORDS, MAX_QUEUES = 16, 4, 64
HEADER_BYTES = 4_096
KINDS = {"messages": 1, "txns": 2}


def path_of(name: str) -> Path:
    """The file of the segment called `name`. Raises LinkError for a name that cannot be one."""
    if not NAME.fullmatch(name):
        raise LinkError(
            f"{name!r} is no ring name: letters, digits, '.', '_' and '-', at most 64, the first a letter or digit; for example shm://demo"
        )
    return FOLDER / (PREFIX + name)


class Segment:
    """An open segment. Made by `create` (host) or `attach` (agent)."""

    def __init__(self, name: str, path: Path, fd: int, owned: bool) -> None:
        self.name, self.path, self.owned, self._fd = name, path, owned, fd
        self.inode, self.pid = os.fstat(fd).st_ino, os.getpid()
        self.header = self._map(0, HEADER_BYTES)

    def _map(self, offset: int, size: int) -> Words:
        return np.frombuffer(mmap.mmap(self._fd, size, offset=offset), np.int64)

    @classmethod
    def create(cls, name: str, subsystem: int) -> Segment:
        """A new segment of that name, owned by this process, in place of a stale one. Raises LinkError if a live process owns it."""
        path = path_of(name)
        start = start_time(os.getpid()) or 0
        while True:
            generation = _replace_stale(name, path)
            fd = os.open(FOLDER, os.O_TMPFILE | os.O_RDWR, 0o600)
            try:
                _allocate(fd, 0, HEADER_BYTES, name)
                segment = cls(name, path, fd, owned=True)
                segment.header[: GENERATION_AT + 1] = MAGIC, VERSION, subsystem, os.getpid(), start, 0, 0, generation
                folder = os.open(FOLDER, os.O_RDONLY)
                try:
                    os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=folder, follow_symlinks=True)
                finally:
                    os.close(folder)
            except FileExistsError:  # another host was quicker; look again whose it is
                os.close(fd)
                continue
            except BaseException:
                os.close(fd)
                raise
            _remember(segment)
            return segment

    @classmethod
    def attach(cls, name: str, subsystem: int) -> Segment:
        """The segment of a live host, with this process as its agent.

        Raises LinkError if there is none, it is broken, its host is dead or of another version or subsystem, or a live agent has it.
        """
        path = path_of(name)
        try:
            fd = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            names = sorted(found.name.removeprefix(PREFIX) for found in FOLDER.glob(PREFIX + "*"))
            raise LinkError(f"no host has a ring named {name!r}{nearest(name, names)}: start the host first, or mend the name") from None
        except PermissionError as error:
            raise LinkError(f"the ring {name!r} ({path}) belongs to another user: run the agent as the host's user") from error
        try:
            segment = cls._checked(name, path, fd, subsystem)
            with segment.locked():
                agent = int(segment.header[AGENT_AT])
                if agent and start_time(agent) == int(segment.header[AGENT_AT + 1]):
                    raise LinkError(f"the ring {name!r} already has an agent (pid {agent}): stop that one first, or use another ring name")
                segment.header[AGENT_AT + 1] = start_time(os.getpid()) or 0
                segment.header[AGENT_AT] = os.getpid()
        except BaseException:
            os.close(fd)
            raise
        return segment

    @classmethod
    def _checked(cls, name: str, path: Path, fd: int, subsystem: int) -> Segment:
        size = os.fstat(fd).st_size
        if size < HEADER_BYTES:
            raise LinkError(f"the ring {name!r} ({path}) is cut off: {size} bytes, its header alone has {HEADER_BYTES}; restart the host")
        segment = cls(name, path, fd, owned=False)
        header = segment.header
        if header[MAGIC_AT] != MAGIC:
            raise LinkError(f"{path} is no segment of Wave, or its host has closed it; restart the host, or remove the file if it is not yours")
        if header[VERSION_AT] != VERSION:
            raise LinkError(
                f"the host of {name!r} speaks version {header[VERSION_AT]} of the contract, this agent version {VERSION}: install the same waveos on both"
            )
        if header[SUBSYSTEM_AT] != subsystem:
            raise LinkError(
                f"the ring {name!r} carries subsystem {header[SUBSYSTEM_AT]}, this agent is for {subsystem}: check the ring name and the policy"
            )
        if not segment.owner_alive():
            raise LinkError(f"the host of {name!r} (pid {header[OWNER_AT]}) is dead: restart it; that replaces the ring")
        for number in segment.queues():
            _, offset, capacity = segment.entry(number)
            if (end := offset + ring.words(capacity) * 8) > size:
                raise LinkError(f"the ring {name!r} ({path}) is cut off: {size} bytes, but its queue {number} ends at {end}; restart the host")
        return segment

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Alone among processes that attach to this segment or replace it."""
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def add_queue(self, kind: str, capacity: int) -> int:
        """Room for one more ring; its number. The ring is made in it (`map_queue`), then `publish_queue` shows it to the agent."""
        number = next((number for number in range(MAX_QUEUES) if not self.header[TABLE + number * ENTRY_WORDS + 1]), None)
        if number is None:
            raise LinkError(f"the ring {self.name!r} has had {MAX_QUEUES} queues, which is the most; close the link and open another")
        offset = -(-os.fstat(self._fd).st_size // PAGE) * PAGE
        _allocate(self._fd, offset, ring.words(capacity) * 8, self.name)
        at = TABLE + number * ENTRY_WORDS
        self.header[at + 1 : at + 3] = offset, capacity
        return number

    def publish_queue(self, number: int, kind: str) -> None:
        """Let the agent find the queue."""
        self.header[TABLE + number * ENTRY_WORDS] = KINDS[kind]

    def remove_queue(self, number: int) -> None:
        """The agent finds it no more. Its memory is given back when the segment goes."""
        self.header[TABLE + number * ENTRY_WORDS] = 0

    def queues(self) -> list[int]:
        """The numbers of the queues in service."""
        return [number for number in range(MAX_QUEUES) if self.entry(number)[0]]

    def entry(self, number: int) -> tuple[int, int, int]:
        """Kind (0: none), offset in bytes and capacity of a queue."""
        at = TABLE + number * ENTRY_WORDS
        kind, offset, capacity = (int(word) for word in self.header[at : at + 3])
        return kind, offset, capacity

    def map_queue(self, number: int) -> Words:
        """The memory of a queue's ring."""
        _, offset, capacity = self.entry(number)
        return self._map(offset, ring.words(capacity) * 8)

    @property
    def generation(self) -> int:
        """Which incarnation of this ring name it is, 1 to ring.MAX_GENERATION."""
        return int(self.header[GENERATION_AT])

    def owner_alive(self) -> bool:
        """True while the host's process lives and has not closed the segment."""
        return bool(self.header[MAGIC_AT] == MAGIC) and start_time(int(self.header[OWNER_AT])) == int(self.header[OWNER_AT + 1])

    def agent(self) -> int:
        """The pid of the live agent, or 0."""
        pid = int(self.header[AGENT_AT])
        return pid if pid and start_time(pid) == int(self.header[AGENT_AT + 1]) else 0

    def close(self) -> None:
        """Detach; the owner also ends the segment and removes its file."""
        if self._fd < 0:
            return
        if self.owned:
            unlink(self)
        elif self.header[AGENT_AT] == os.getpid() == self.pid:
            self.header[AGENT_AT] = 0
        os.close(self._fd)
        self._fd = -1


def retire(segment: Segment) -> None:
    """Tell whoever is still attached that this segment is over."""
    for number in segment.queues():
        with contextlib.suppress(ValueError, OSError):  # it may be cut off
            ring.retire(_Plain(segment.map_queue(number)))
    segment.header[MAGIC_AT] = 0


def unlink(segment: Segment) -> None:
    """End the segment and remove its file, if it is still this process's own. May be called twice, and from a signal handler."""
    if _owned.pop(id(segment), None) is None or segment.pid != os.getpid():
        return
    retire(segment)
    with contextlib.suppress(OSError):
        if segment.path.stat().st_ino == segment.inode:
            segment.path.unlink()


def _replace_stale(name: str, path: Path) -> int:
    """Remove the file of a dead owner, if there is one; the generation to use. Raises LinkError if its owner lives, or it is not Wave's."""
    try:
        fd = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return 1 + secrets.randbelow(ring.MAX_GENERATION)
    except PermissionError as error:
        raise LinkError(f"the ring name {name!r} ({path}) is another user's: use another ring name") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        generation = secrets.randbelow(ring.MAX_GENERATION)
        if (size := os.fstat(fd).st_size) >= HEADER_BYTES:
            segment = Segment(name, path, fd, owned=False)
            if segment.owner_alive():
                raise LinkError(
                    f"two runs with the same ring name: {name!r} is in use by pid {segment.header[OWNER_AT]}; wait for it, stop it, or use another ring name"
                )
            if segment.header[MAGIC_AT] not in (MAGIC, 0):
                raise LinkError(f"{path} is in the way and is no segment of Wave: remove it, or use another ring name")
            generation = segment.generation
            if all(offset + ring.words(capacity) * 8 <= size for _, offset, capacity in map(segment.entry, segment.queues())):
                retire(segment)
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(fd).st_ino:  # else another host has replaced it meanwhile
                path.unlink()
        return generation % ring.MAX_GENERATION + 1
    finally:
        os.close(fd)


def _allocate(fd: int, offset: int, size: int, name: str) -> None:
    try:
        os.posix_fallocate(fd, offset, size)  # now, for a store into a page that cannot be had would be fatal
    except OSError as error:
        raise LinkError(
            f"no room for the ring {name!r} in {FOLDER} ({size} bytes): {error.strerror}; free some, or ask for smaller queues"
        ) from error


class _Plain:
    """As waveos.primitives.CoherentMemory, for use in a signal handler."""

    def __init__(self, words: Words) -> None:
        self.words = words

    def store(self, i: int, value: int) -> None:
        self.words[i] = value

    def flush(self, i: int) -> None:
        pass


# Segments this process owns are removed when it ends: at exit, and at a signal that would end it silently. A kill leaves them to the next start.
_owned: dict[int, Segment] = {}


def _remember(segment: Segment) -> None:
    if not _owned and threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, _clean_and_die)
    _owned[id(segment)] = segment


def _clean_and_die(number: int, frame: FrameType | None) -> None:
    _clean()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _clean() -> None:
    for segment in list(_owned.values()):
        unlink(segment)


atexit.register(_clean)
