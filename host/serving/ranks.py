"""The ranks as the engine sees them: processes that all get a command together, and of which any may die at any time."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from multiprocessing import forkserver
from multiprocessing.connection import wait
from typing import Any

import numpy as np

from waveos.errors import WaveError
from waveos.host.serving.layout import compile_copies
from waveos.host.serving.memory import Shared, Sizes
from waveos.host.serving.model import make_weights
from waveos.host.serving.rank import live

_THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")


class Ranks:
    """Processes, their pipes and their shared memory. One command is under way at a time, with a result from each rank that was asked."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.shared = Shared(sizes)
        for name, weights in make_weights(sizes.shape).items():
            self.shared[f"weights.{name}"][:] = weights
        compile_copies()
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["waveos.host.serving.rank"])
        self._gates = [[self._context.Semaphore(0) for _ in range(2)] for _ in range(sizes.ranks)]
        self._processes: dict[int, Any] = {}
        self._pipes: dict[int, Any] = {}
        self._ticket = 0
        self._waiting: set[int] = set()
        self._results: dict[int, Any] = {}
        self.aborted = False  # the command under way has failed, because a rank died
        with _one_thread():
            forkserver.ensure_running()
            for number in range(sizes.ranks):
                self.start(number)

    @property
    def alive(self) -> list[int]:
        """Numbers of the ranks that live, as far as is known."""
        return sorted(self._processes)

    def pid(self, number: int) -> int:
        """Of a rank's process."""
        return int(self._processes[number].pid)

    def start(self, number: int) -> None:
        """A new process for a rank that has none; it owns nothing yet."""
        if number in self._processes or not 0 <= number < self.sizes.ranks:
            raise WaveError(f"rank {number} cannot be started: it is alive, or not one of the {self.sizes.ranks}")
        ours, theirs = self._context.Pipe()
        arguments = (number, self.shared.path, self.sizes, self._gates, theirs, os.getpid())
        process = self._context.Process(target=live, args=arguments, daemon=True, name=f"rank {number}")
        process.start()
        theirs.close()
        self._processes[number], self._pipes[number] = process, ours

    @property
    def busy(self) -> bool:
        """A command is under way."""
        return bool(self._waiting)

    def ask(self, name: str, arguments: dict[int, tuple[Any, ...]]) -> None:
        """Begin a command: a method of `Rank`, with each rank's arguments."""
        assert not self._waiting, "one command at a time"
        self._ticket += 1
        self._results, self.aborted = {}, False
        for number, argument in arguments.items():
            if number not in self._pipes:
                continue
            self._waiting.add(number)
            with contextlib.suppress(OSError):  # it is dead: `listen` will see
                self._pipes[number].send((self._ticket, name, argument))

    def listen(self, timeout_s: float, others: list[Any] | None = None) -> tuple[list[int], dict[int, Any] | None]:
        """(ranks that died, results of the command if it is over). Comes back early if one of `others` is readable."""
        sentinels = {process.sentinel: number for number, process in self._processes.items()}
        pipes = {self._pipes[number]: number for number in self._waiting if number in self._pipes}
        ready = wait([*sentinels, *pipes, *(others or [])], timeout_s)
        for each in ready:
            if each in pipes:
                self._hear(pipes[each])
        died = [sentinels[each] for each in ready if each in sentinels]
        for number in died:
            self._bury(number)
        if self._results and not self._waiting:
            results, self._results = self._results, {}
            return died, results
        return died, None

    def _hear(self, number: int) -> bool:
        """Take an answer; False if the rank has died: its sentinel says so, too."""
        try:
            what, ticket, result = self._pipes[number].recv()
        except (EOFError, OSError):
            return False
        if ticket == self._ticket:
            self._waiting.discard(number)
            self._results[number] = result
            self.aborted = self.aborted or what == "aborted"
        return True

    def _bury(self, number: int) -> None:
        """A rank is gone, and its memory with it."""
        self._processes.pop(number).join()
        self._pipes.pop(number).close()
        self.shared["device"][number] = np.nan
        if self._waiting:
            self.aborted = True
            self.shared["abort"][0] = 1.0
            self._waiting.discard(number)
            self._results.setdefault(number, None)

    def calm(self) -> None:
        """After an abort, when all have answered: make the meetings of the next step start afresh."""
        self.shared["abort"][0] = 0.0
        self.ask("calm", dict.fromkeys(self.alive, ()))
        end = time.monotonic() + 60.0
        while self._waiting and time.monotonic() < end:
            self.listen_again()

    def listen_again(self) -> None:
        """Hear answers; who dies now is found by the next `listen`."""
        pipes = {self._pipes[number]: number for number in self._waiting}
        for each in wait(list(pipes), 0.05):
            if not self._hear(pipes[each]):
                self._waiting.discard(pipes[each])
        self._results = {} if not self._waiting else self._results

    def close(self) -> None:
        """End all ranks."""
        for pipe in self._pipes.values():
            pipe.close()
        for process in self._processes.values():
            process.join(2.0)
            if process.is_alive():
                process.kill()
                process.join()
        self._processes, self._pipes, self._waiting = {}, {}, set()
        self.shared.close()


class _one_thread:
    """What is started meanwhile computes with one thread: a rank is one."""

    def __enter__(self) -> None:
        self._before = {name: os.environ.get(name) for name in _THREADS}
        os.environ.update(dict.fromkeys(_THREADS, "1"))

    def __exit__(self, *exception: object) -> None:
        for name, value in self._before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
