"""The enclave's memory cgroup, version 1 or 2: who is in it, what it uses, its limit. A limit is in the journal before it is set."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from waveos.errors import ConfigError
from waveos.host import changes
from waveos.host.restore import Journal

UNLIMITED = 1 << 62


class MemoryCgroup:
    """A cgroup that the operator has made. Of version 1 the limit is `memory.limit_in_bytes`, of version 2 `memory.high`."""

    def __init__(self, path: str | Path, journal: Journal) -> None:
        """Raises ConfigError if it is none of the memory controller's, or its limit cannot be read."""
        self.path, self._journal = Path(path), journal
        self._noted = 0
        names = (("memory.limit_in_bytes", "memory.usage_in_bytes"), ("memory.high", "memory.current"))
        for limit, usage in names:
            if (self.path / limit).exists():
                self._limit, self._usage, self._reclaim = self.path / limit, self.path / usage, self.path / "memory.reclaim"
                break
        else:
            raise ConfigError(f"{self.path} is no cgroup of the memory controller: it has neither memory.limit_in_bytes nor memory.high")
        self.given = self.limit_bytes()
        """The operator's own limit, which is never exceeded."""
        self.now = self.given

    def pids(self) -> list[int]:
        """Processes in it; none when it is gone."""
        with contextlib.suppress(FileNotFoundError):
            return [int(pid) for pid in (self.path / "cgroup.procs").read_text().split()]
        return []

    def usage_bytes(self) -> int:
        """What it uses, page cache included. Raises OSError."""
        return int(self._usage.read_text())

    def limit_bytes(self) -> int:
        """Its limit; UNLIMITED or more if it has none. Raises ConfigError if it cannot be read."""
        try:
            text = self._limit.read_text().strip()
            return UNLIMITED if text == "max" else int(text)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self._limit} cannot be read: {error}") from error

    def set_limit(self, limit_bytes: int) -> int:
        """Limit it, never above what the operator gave; 0: as the operator had it. Returns the limit. Raises OSError (EBUSY: it cannot shrink so far).

        Where there is `memory.reclaim` it is brought down by that first: above `memory.high` its tasks would be slowed, as if they had asked for too much.
        """
        self._notice_operator()
        wanted = min(limit_bytes or self.given, self.given)
        if wanted >= self.given:
            self.restore()
            return self.given
        if not self._noted:
            self._noted = changes.note_file(self._journal, self._limit)
        if self._reclaim.exists() and (over := self.usage_bytes() - wanted) > 0:
            with contextlib.suppress(OSError):  # EAGAIN: it could not reclaim all of it
                _write_once(self._reclaim, over)
        try:
            _write_once(self._limit, wanted)
        finally:
            self.now = self.limit_bytes()  # whole pages
        return wanted

    def room_bytes(self) -> int:
        """What it may take before it is at its limit. Raises OSError."""
        return self.now - self.usage_bytes()

    def restore(self) -> list[str]:
        """The limit as it was, or as the operator has set it meanwhile; lines about what could not be."""
        with contextlib.suppress(ConfigError):
            self._notice_operator()
        number, self._noted, self.now = self._noted, 0, self.given
        return self._journal.undo(number) if number else []

    def _notice_operator(self) -> None:
        """A limit that is not what we have set is the operator's new one: it counts from now on, and is not put back."""
        if (found := self.limit_bytes()) != self.now:
            self._journal.settle(self._noted)
            self._noted, self.given, self.now = 0, found, found


def _write_once(path: Path, value: int) -> None:
    """One write: a file object that is closed after an error writes again, and what was refused may be done after all. Raises OSError."""
    file = os.open(path, os.O_WRONLY | os.O_TRUNC)
    try:
        os.write(file, str(value).encode())
    finally:
        os.close(file)
