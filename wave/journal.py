"""Journal: what a long run has finished so far, in a file that outlives any death of the process.

One line of JSON a finished piece, written and synced before the next is counted; the first line says whose journal it is. A process that dies in the
middle of a line leaves half a line, which the next one drops. One process at a time has a journal: the lock is the file's own.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from waveos.errors import ConfigError
from waveos.output import explain_failure


class Journal:
    """The journal at `path` of the run that `header` describes. Use it in a `with`: leaving closes it.

    Raises ConfigError if it cannot be written, belongs to another process now, or was begun by another run: `differs(theirs)` says how the header
    that is there differs, or "" if it does not.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], differs: Any) -> None:
        self.path = path
        self.entries: dict[int, dict[str, Any]] = {}
        """Finished pieces by number."""
        try:
            self._file = self._locked()
        except OSError as error:
            raise ConfigError(explain_failure(path, error)) from error
        try:
            self._resume(header, differs)
        except BaseException as error:
            self._file.close()
            if isinstance(error, OSError):
                raise ConfigError(explain_failure(path, error)) from error
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def add(self, number: int, entry: Mapping[str, Any]) -> None:
        """Keep a finished piece; it is on the disk when this returns. Raises ConfigError when the disk does not take it."""
        before = len(self.entries)
        self.entries[number] = kept = {**entry, "number": number}  # first: Ctrl-C may come while the disk is busy, and what is on it counts
        try:
            self._write(kept)
        except OSError as error:
            del self.entries[number]
            raise ConfigError(f"{explain_failure(self.path, error)}; the {before} that were finished before are kept there") from error

    def remove(self) -> None:
        """Delete the file: what is in it has gone elsewhere."""
        self.path.unlink(missing_ok=True)

    def _locked(self) -> Any:
        while True:
            file = open(self.path, "a+b")  # noqa: SIM115  # kept open, and closed by `__exit__`
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise ConfigError(f"{self.path} is being written by another process; wait for it, or name another file") from None
            if self.path.exists() and os.path.samestat(os.fstat(file.fileno()), os.stat(self.path)):
                return file
            file.close()  # its owner deleted it between our opening and our locking it

    def _resume(self, header: Mapping[str, Any], differs: Any) -> None:
        self._file.seek(0)
        lines = self._file.read().split(b"\n")
        whole = lines[:-1]
        if not whole:
            self._file.truncate(0)
            self._write(header)
            return
        try:
            theirs, *entries = (json.loads(line) for line in whole)
            self.entries = {int(entry["number"]): entry for entry in entries}
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{self.path} is no journal of a sweep; remove it, or name another file with --out") from None
        if why := differs(theirs):
            raise ConfigError(f"{self.path} {why}")
        self._file.truncate(sum(len(line) + 1 for line in whole))

    def _write(self, entry: Mapping[str, Any]) -> None:
        end = self._file.seek(0, os.SEEK_END)
        try:
            self._file.write(json.dumps(entry, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError:
            os.ftruncate(self._file.fileno(), end)
            raise
