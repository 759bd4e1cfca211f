"""Simulations in child processes: one a core, each imports the engine once, and a watchdog stops a policy that does not return.

The parent stays light (no numba) and answers Ctrl-C at once. A child says between slices that it lives; the engine stores the type of the message
that the policy is handling. Both words lie in memory that parent and child share. A child dies with its parent.
"""

from __future__ import annotations

import ctypes
import importlib
import mmap
import os
import signal
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from types import TracebackType
from typing import Any, Protocol, Self

from waveos.errors import PolicyError, WaveError
from waveos.process import end_with

SLICE_NS = 50_000_000
"""Wall time after which the engine hands control back."""
PATIENCE_S = 2.0
"""How long one call of a handler may take."""
ENGINE = "waveos.ipu_emulator.job:open_job"

_BEAT_BYTES = 4096
_SLICE, _HANDLING = 0, 1  # 64-bit words: slices begun and ended (odd: inside one); type of the message at the policy, 0: none


class Advancing(Protocol):
    """What a job is made into, in the child: `factory(setup, handling_address)`."""

    def advance(self, wall_ns: int) -> bool:
        """Go on for about `wall_ns` of wall time; True when the simulation is done."""

    def result(self) -> Any:
        """What came out of it; has to pickle."""


@dataclass
class _Child:
    process: subprocess.Popen[bytes]
    pipe: Connection
    beat: mmap.mmap
    job: tuple[int, Any] | None = None
    seen: tuple[int, int] = (0, 0)
    since: float = 0.0  # wall time at which `seen` was first seen
    cpu_since: float = 0.0  # the child's CPU time then

    def words(self) -> tuple[int, int]:
        raw = self.beat[:16]
        return int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:16], "little")

    def cpu_s(self) -> float:
        """CPU time the child has used: a machine too busy to run it is no fault of the policy."""
        try:
            with open(f"/proc/{self.process.pid}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        except (OSError, IndexError):
            return time.monotonic()


class Pool:
    """Child processes that run simulations. Use it in a `with`: leaving ends the children.

    `submit` gives a job to the pool and returns its number; `finished` yields (number, result) as jobs end, and more may be submitted meanwhile.
    Raises PolicyError when a policy raises or does not return, WaveError when a child dies or the engine fails.
    """

    def __init__(self, processes: int | None = None, *, factory: str = ENGINE, patience_s: float = PATIENCE_S) -> None:
        self._factory = factory
        self._patience_s = patience_s
        self._numbers = iter(range(sys.maxsize))
        self._queue: deque[tuple[int, Any]] = deque()
        self._children = [_start(factory) for _ in range(processes or len(os.sched_getaffinity(0)))]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def submit(self, setup: Any) -> int:
        """Add a job; `setup` has to pickle, and its `policy` is what a watchdog's message names."""
        number = next(self._numbers)
        self._queue.append((number, setup))
        self._hand_out()
        return number

    def finished(self) -> Iterator[tuple[int, Any]]:
        """Jobs as they end, until none is left."""
        while self._queue or any(child.job for child in self._children):
            self._hand_out()
            for pipe in wait([child.pipe for child in self._children if child.job], timeout=0.1):
                child = next(each for each in self._children if each.pipe is pipe)
                yield self._collect(child)
            for child in self._children:
                self._check_beat(child)

    def close(self) -> None:
        """End all children, also in the middle of a job."""
        for child in self._children:
            child.process.kill()
        for child in self._children:
            child.process.wait()
            child.pipe.close()
            child.beat.close()
        self._children.clear()
        self._queue.clear()

    def _hand_out(self) -> None:
        for child in self._children:
            if child.job is None and self._queue:
                child.job = self._queue.popleft()
                child.since = time.monotonic()
                try:
                    child.pipe.send(child.job[1])
                except (BrokenPipeError, ConnectionResetError):
                    raise _death(child) from None

    def _collect(self, child: _Child) -> tuple[int, Any]:
        assert child.job is not None
        try:
            fine, answer = child.pipe.recv()
        except (EOFError, ConnectionResetError):
            raise _death(child) from None
        number = child.job[0]
        child.job = None
        if not fine:
            raise answer
        self._hand_out()
        return number, answer

    def _check_beat(self, child: _Child) -> None:
        words, now = child.words(), time.monotonic()
        inside_handler = child.job is not None and words[_SLICE] % 2 == 1 and words[_HANDLING] != 0
        if words != child.seen or not inside_handler:
            child.seen, child.since, child.cpu_since = words, now, child.cpu_s() if inside_handler else 0.0
            return
        stuck_s = now - child.since
        if stuck_s >= self._patience_s and (child.cpu_s() - child.cpu_since >= self._patience_s / 2 or stuck_s >= 5 * self._patience_s):
            child.process.kill()
            assert child.job is not None
            where = _handler_name(words[_HANDLING], child.job[1])
            raise PolicyError(
                f"policy {_policy_of(child.job[1])!r} did not return from {where} within {self._patience_s:g} s and was stopped; "
                "look there for a loop that does not end, or run it with WAVE_JIT=0 to step through"
            )


class Here:
    """A pool that runs its jobs in this process, so that pdb in a plain-Python policy works, and its prints come to stderr. There is no watchdog."""

    def __init__(self, *, factory: str = ENGINE) -> None:
        self._factory = factory
        self._queue: deque[tuple[int, Any]] = deque()
        self._numbers = iter(range(sys.maxsize))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop the jobs that have not begun."""
        self._queue.clear()

    def submit(self, setup: Any) -> int:
        """Add a job, as `Pool.submit`."""
        self._queue.append((next(self._numbers), setup))
        return self._queue[-1][0]

    def finished(self) -> Iterator[tuple[int, Any]]:
        """Run the jobs in turn."""
        while self._queue:
            number, setup = self._queue.popleft()
            with redirect_stdout(sys.stderr):  # what a policy prints is talk, not data
                simulation = _load(self._factory)(setup, 0)
                while not simulation.advance(SLICE_NS):
                    pass
                result = simulation.result()
            yield number, result


def open_pool(processes: int | None = None) -> Pool | Here:
    """A `Pool`, or with WAVE_JIT=0 and no number of processes asked for, this process, for debugging."""
    return Here() if processes is None and os.environ.get("WAVE_JIT") == "0" else Pool(processes)


def serve(pipe_fd: int, beat_fd: int, parent: int, factory: str, path: list[str]) -> None:
    """What a child does: take a setup, run it in slices, send back (True, result) or (False, error), until the pipe closes."""
    if not end_with(parent):
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.path[:] = path
    pipe = Connection(pipe_fd)
    beat = mmap.mmap(beat_fd, _BEAT_BYTES)
    words = (ctypes.c_uint64 * 2).from_buffer(beat)
    address = ctypes.addressof(words)
    make: Callable[[Any, int], Advancing] | None = None
    while True:
        try:
            setup = pipe.recv()
        except (EOFError, ConnectionResetError):
            return
        try:
            make = make or _load(factory)
            words[_HANDLING] = 0
            simulation = make(setup, address + 8 * _HANDLING)
            done = False
            while not done:
                words[_SLICE] += 1
                try:
                    done = simulation.advance(SLICE_NS)
                finally:
                    words[_SLICE] += 1
            answer: tuple[bool, Any] = (True, simulation.result())
        except WaveError as error:
            answer = (False, type(error)(*error.args))
        except MemoryError:
            answer = (
                False,
                WaveError(f"policy {_policy_of(setup)!r}: not enough memory for this run; make it shorter with --set run.duration_ms=..."),
            )
        except BrokenPipeError as error:  # who read what the policy prints has gone
            answer = (False, BrokenPipeError(*error.args))
        except Exception as error:
            if os.environ.get("WAVE_DEBUG"):
                traceback.print_exc()
            answer = (
                False,
                WaveError(f"the engine failed on policy {_policy_of(setup)!r}: {type(error).__name__}: {error} (WAVE_DEBUG=1 shows where)"),
            )
        pipe.send(answer)


def _start(factory: str) -> _Child:
    here, there = Pipe()
    beat_fd = os.memfd_create("wave-beat")
    try:
        os.ftruncate(beat_fd, _BEAT_BYTES)
        beat = mmap.mmap(beat_fd, _BEAT_BYTES)
        arguments = (there.fileno(), beat_fd, os.getpid(), factory, [entry for entry in sys.path if entry])
        process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-c",
                f"import sys; sys.path[:] = {arguments[-1]!r}; from waveos.ipu_emulator.pool import serve; serve(*{arguments!r})",
            ],
            pass_fds=(there.fileno(), beat_fd),
            stdin=subprocess.DEVNULL,
            stdout=2,  # what a policy prints is talk, not data
            process_group=0,  # Ctrl-C is the parent's to answer
        )
    finally:
        there.close()
        os.close(beat_fd)
    return _Child(process, here, beat)


def _load(factory: str) -> Any:
    module, _, name = factory.partition(":")
    return getattr(importlib.import_module(module), name)


def _death(child: _Child) -> WaveError:
    """One line about a child that ended by itself."""
    code = child.process.wait()
    what = f"policy {_policy_of(child.job[1])!r}" if child.job else "no job"
    if code == -signal.SIGKILL:
        return WaveError(
            f"the process that simulated {what} was killed, probably for lack of memory; make the run shorter with --set run.duration_ms=..."
        )
    if code < 0:
        handling = child.words()[_HANDLING]
        where = f" in {_handler_name(handling, child.job and child.job[1])}" if handling else ""
        return PolicyError(f"the process that simulated {what} died{where}: {signal.strsignal(-code)}; WAVE_JIT=0 checks every index of a policy")
    return WaveError(f"the process that simulated {what} ended with code {code} before it answered")


def _policy_of(setup: Any) -> str:
    return str(getattr(setup, "policy", "?"))


def _handler_name(message_type: int, setup: Any) -> str:
    records = importlib.import_module(f"waveos.{getattr(setup, 'subsystem', '') or 'sched'}.records")
    try:
        return str(records.Message(message_type).name.lower())
    except ValueError:
        return f"message type {message_type}"
