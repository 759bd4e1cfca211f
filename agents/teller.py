"""Where agentd tells of itself: whoever connects to its UNIX socket gets one JSON document, and is shown out.

It is looked at between two slices of the polling loop and never waited for: what a reader does not take in at once follows after the next slice.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from waveos.errors import ConfigError

READERS = 8
"""At once; others wait at the door."""
PATIENCE_S = 2.0
"""A reader that takes nothing in for so long is shown out."""


class Teller:
    """One socket, open to its owner and group. Raises ConfigError if it cannot be made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._began = time.monotonic()
        self._readers: list[tuple[socket.socket, bytes, float]] = []
        self._door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            if path.is_socket() and not _somebody_listens(path):
                path.unlink()  # a predecessor was killed
            self._door.bind(os.fspath(path))
            os.chmod(path, 0o660)
            self._door.listen(READERS)
        except OSError as error:
            self._door.close()
            raise ConfigError(f"--status {path}: {error.strerror or error}; name a socket that is not there yet, in a folder of this user") from error

    def step(self, served: Sequence[Any]) -> None:
        """Let in who waits, and tell what each of `served` tells (`tell()`, one document); they are asked only if somebody came."""
        with contextlib.suppress(OSError):
            while len(self._readers) < READERS:
                line, _ = self._door.accept()
                line.setblocking(False)
                self._readers.append((line, self._document([each.tell() for each in served]), time.monotonic() + PATIENCE_S))
        if self._readers:
            self._readers = [each for each in map(self._send, self._readers) if each is not None]

    def _document(self, enclaves: list[dict[str, Any]]) -> bytes:
        serving = sum(each["serving"] for each in enclaves)
        about = {"pid": os.getpid(), "up_s": time.monotonic() - self._began, "cpu_ns": time.process_time_ns(), "serving": serving}
        return json.dumps({**about, "enclaves": enclaves}).encode()

    def _send(self, reader: tuple[socket.socket, bytes, float]) -> tuple[socket.socket, bytes, float] | None:
        line, data, until_s = reader
        try:
            while data and (sent := line.send(data)):
                data, until_s = data[sent:], time.monotonic() + PATIENCE_S
        except BlockingIOError:
            if time.monotonic() < until_s:
                return line, data, until_s
        except OSError:
            pass
        line.close()
        return None

    def close(self) -> None:
        """Nobody is told any more."""
        for line, _, _ in self._readers:
            line.close()
        self._door.close()
        self.path.unlink(missing_ok=True)


def _somebody_listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as line, contextlib.suppress(OSError):
        line.connect(os.fspath(path))
        return True
    return False
