"""The service as one object: start the workers, send a load, stop."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from waveos.errors import WaveError
from waveos.host.service.board import PID, Board
from waveos.host.service.client import Load, Served, send

SLICE_NS = 100_000_000
"""How long the compiled client runs before signals are heard."""
START_S = 60.0


class Service:
    """Worker processes on one CPU and the board they share with the client, which is the calling process."""

    def __init__(self, folder: str | os.PathLike[str], *, workers: int, core: int, capacity: int) -> None:
        """Start `workers` processes that serve the database in `folder` on CPU `core`. Raises WaveError if they do not come up."""
        self.board = Board(workers, capacity)
        self.wakes = np.array([os.eventfd(0) for _ in range(workers)], np.int64)
        fds = [self.board.fd, *self.wakes.tolist()]
        command = [sys.executable, "-P", "-m", "waveos.host.service.workers", os.fspath(Path(folder).resolve()), *map(str, fds[1:])]
        command += ["--board", str(self.board.fd), "--capacity", str(capacity), "--core", str(core)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=fds)
        try:
            self._await(lambda: bool(np.all(self.board.lines[:, PID])), START_S)
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """Of the workers, by number."""
        return [int(pid) for pid in self.board.lines[:, PID]]

    @property
    def supervisor(self) -> int:
        """The process whose children the workers are."""
        return self._process.pid

    def serve(
        self, load: Load, groups: NDArray[np.int64] | None = None, *, patience_s: float = 2.0, heard: Callable[[], None] | None = None
    ) -> Served:
        """Send the load and wait for its end, at most `patience_s` after the last send.

        groups: [2, 2] first worker and how many for GET and for RANGE, all by default; `heard` is called between slices. Raises WaveError if a worker dies.
        """
        n, board = len(load.at_ns), self.board
        if n > board.capacity:
            raise WaveError(f"a load of {n:,} requests on a board for {board.capacity:,}")
        self._await(lambda: bool(np.all(board.lines[:, 0])), 30.0)  # what an earlier load has left
        chosen = np.array([[0, board.workers]] * 2, np.int64) if groups is None else groups
        requests = board.requests[:n]
        lines, words = board.lines.reshape(-1), requests.view(np.int64).reshape(n, -1)
        send(lines, words, self.wakes, chosen, n, n, 0)  # sends nothing: compiles it, or loads what was compiled
        requests["key"], requests["sent_ns"], requests["done_ns"] = load.keys, 0, 0
        requests["intended_ns"] = load.at_ns + time.monotonic_ns() + 10_000_000
        sent, until_ns = 0, int(requests["intended_ns"][-1]) + round(patience_s * 1e9) if n else 0
        with _sending():
            while sent < n and time.monotonic_ns() < until_ns:
                sent = int(send(lines, words, self.wakes, chosen, sent, n, min(until_ns, time.monotonic_ns() + SLICE_NS)))
                self._check()
                if heard is not None:
                    heard()
        while not np.all(requests["done_ns"]) and time.monotonic_ns() < until_ns:
            time.sleep(0.005)
            self._check()
        kept = requests.copy()
        return Served(kept["key"] < 0, kept["intended_ns"], kept["sent_ns"], kept["done_ns"])

    def close(self) -> None:
        """End the workers."""
        process = self._process
        assert process.stdin is not None
        process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()  # the workers go with it
        process.wait()
        for fd in self.wakes:
            os.close(int(fd))
        self.board.close()
        self.wakes = self.wakes[:0]

    def _await(self, condition: Callable[[], bool], patience_s: float) -> None:
        deadline = time.monotonic() + patience_s
        while not condition():
            self._check()
            if time.monotonic() > deadline:
                raise WaveError(f"the service's workers did not answer within {patience_s:.0f} s")
            time.sleep(0.005)

    def _check(self) -> None:
        if self._process.poll() is not None:
            raise WaveError("the service's workers have ended; what they said is above")

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def client_on(core: int) -> Iterator[None]:
    """The calling thread as the client: on that CPU alone."""
    affinity = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, affinity)


@contextlib.contextmanager
def _sending() -> Iterator[None]:
    """Woken before ordinary threads of its CPU, with no slack on its timers; only while it sends, as an agent shares that CPU and must be heard from."""
    policy, parameter = os.sched_getscheduler(0), os.sched_getparam(0)
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameter)
