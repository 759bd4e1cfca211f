"""The memory that client and workers share: who is free, what is asked, when it was done. Anonymous (a memfd), so nothing is left behind."""

from __future__ import annotations

import contextlib
import mmap
import os

import numpy as np
from numpy.typing import NDArray

LINE_WORDS = 8
FREE, PID = 0, 1
"""Words of a worker's line: since when it waits for a request, 0 while it has one; its process, once it is ready."""
REQUEST = np.dtype([("key", "i8"), ("intended_ns", "i8"), ("sent_ns", "i8"), ("done_ns", "i8")])
"""One request: number of the key, as -1 - key for a RANGE from it; CLOCK_MONOTONIC when it was to be sent, was sent, was done (0: not yet)."""
KEY, DONE_NS, REQUEST_WORDS = 0, 3, 4


class Board:
    """[workers] lines of 8 words, then [capacity] REQUEST."""

    def __init__(self, workers: int, capacity: int, fd: int | None = None) -> None:
        """Makes the memory, or maps that behind `fd`."""
        self.workers, self.capacity = workers, capacity
        length = 8 * (workers * LINE_WORDS + capacity * REQUEST_WORDS)
        self.fd = os.memfd_create("waveos-service") if fd is None else fd
        if fd is None:
            os.ftruncate(self.fd, length)
        self.memory = mmap.mmap(self.fd, length, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)

    @property
    def lines(self) -> NDArray[np.int64]:
        """The workers' lines, [workers, 8]."""
        return np.frombuffer(self.memory, np.int64, self.workers * LINE_WORDS).reshape(self.workers, LINE_WORDS)

    @property
    def requests(self) -> NDArray[np.void]:
        """[capacity] REQUEST."""
        return np.frombuffer(self.memory, REQUEST, self.capacity, 8 * self.workers * LINE_WORDS)

    def close(self) -> None:
        """Let go of the memory; what still looks at it keeps it."""
        os.close(self.fd)
        with contextlib.suppress(BufferError):
            self.memory.close()
