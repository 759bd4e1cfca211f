"""Whether the host CPU is itself: a real-time process there does the same small piece of work every millisecond and writes down how long it took.

A virtual machine's CPU may be several times slower for some hundredths of a second, whatever runs on it and without any of it told as stolen: its neighbours'
doing, or the hypervisor's. Requests pile up then under any scheduler. The work is arithmetic alone, done twice, of which the second counts: no cache matters.

`python -m waveos.bench.live_watch --core N --fd FD --parent PID` is that process; it ends with the one that started it.
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from waveos.errors import WaveError
from waveos.host.service import Served
from waveos.host.service.client import sleep_until
from waveos.jit import jit
from waveos.primitives import clock_ns, store
from waveos.process import end_with

PERIOD_NS, ROUNDS = 1_000_000, 1_000
"""A look, some 3 us of work twice: 0.7 % of the CPU, in every scheduler's columns alike."""
SAMPLES = 1 << 18
"""That are kept: of four minutes."""
SLOW, TOGETHER, APART_NS = 3.0, 3, 3_000_000
"""A CPU is slow where looks took so many times the usual, at least so many of them, none further from the next: a single one met an interrupt."""
PRIORITY = 99
SLICE_NS, START_S = 1_000_000_000, 60.0


@jit
def work(x: int) -> int:
    """A small piece of it; what is given and returned keeps it from being left out."""
    x |= 1
    for _ in range(ROUNDS):
        x ^= x << 13
        x ^= x >> 7
        x ^= x << 17
    return x


@jit
def _watch(words: Any, until_ns: int) -> None:
    """words: how many looks there were, what keeps the work from being left out; then when each look began and how long it took, in a ring of SAMPLES."""
    x, due_ns = words[1], clock_ns()
    while due_ns < until_ns:
        sleep_until(due_ns)
        begun_ns = took_ns = 0
        for _ in range(2):
            begun_ns = clock_ns()
            x = work(x)
            took_ns = clock_ns() - begun_ns
        n = words[0]
        at = 2 + 2 * (n % SAMPLES)
        words[1], words[at], words[at + 1] = x, begun_ns, took_ns
        store(words, 0, n + 1)
        due_ns = max(due_ns + PERIOD_NS, clock_ns())


class Watch:
    """The looks so far."""

    def __init__(self, words: NDArray[np.int64]) -> None:
        self._words = words

    def slow(self, first_ns: int, last_ns: int) -> NDArray[np.int64]:
        """[n, 2] when the CPU was slow, from and to, ns, of what overlaps with first..last; of the last four minutes."""
        looks = self._words[2:].reshape(-1, 2)[: int(self._words[0])]
        looks = looks[np.argsort(looks[:, 0])]
        return find_slow(looks, first_ns, last_ns)


def find_slow(looks: NDArray[np.int64], first_ns: int, last_ns: int) -> NDArray[np.int64]:
    """The same from [m, 2] looks: when each began, and how long it took, ns."""
    at_ns = looks[looks[:, 1] > SLOW * np.median(looks[:, 1]), 0] if len(looks) else looks[:, 0]
    groups = np.split(at_ns, np.flatnonzero(np.diff(at_ns) > APART_NS) + 1)
    found = [(each[0] - APART_NS, each[-1] + APART_NS) for each in groups if len(each) >= TOGETHER]
    return np.array([each for each in found if each[1] > first_ns and each[0] < last_ns], np.int64).reshape(-1, 2)


def find_disturbed(served: Served, slow_ns: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which requests have to do with the CPU's slowness: those of whole busy periods, from no request to no request, of which some part was slow."""
    ends = np.where(served.done_ns > 0, served.done_ns, np.iinfo(np.int64).max)
    until = np.maximum.accumulate(ends)
    period = np.cumsum(np.concatenate([[False], served.intended_ns[1:] >= until[:-1]]))
    first = np.flatnonzero(np.diff(period, prepend=-1))
    begin, end = served.intended_ns[first], until[np.concatenate([first[1:] - 1, [len(until) - 1]])]
    touched = np.zeros(len(first), bool)
    for low, high in slow_ns:
        touched |= (begin < high) & (end > low)
    disturbed: NDArray[np.bool_] = touched[period]
    return disturbed


@contextlib.contextmanager
def watching(core: int) -> Iterator[Watch]:
    """The process runs on that CPU meanwhile. Raises WaveError if it does not come up."""
    fd = os.memfd_create("waveos-watch")
    try:
        os.ftruncate(fd, 8 * (2 + 2 * SAMPLES))
        words = np.frombuffer(mmap.mmap(fd, 0), np.int64)
        command = [sys.executable, "-P", "-m", "waveos.bench.live_watch", "--core", str(core), "--fd", str(fd), "--parent", str(os.getpid())]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[fd])
    finally:
        os.close(fd)
    try:
        deadline = time.monotonic() + START_S
        while not words[0]:
            if process.poll() is not None or time.monotonic() > deadline:
                raise WaveError("the process that watches the host CPU did not come up; what it said is above")
            time.sleep(0.01)
        yield Watch(words)
    finally:
        process.kill()
        process.wait()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="waveos.bench.live_watch", description="Look every millisecond whether a CPU is as fast as it was.")
    parser.add_argument("--core", type=int, required=True, help="the CPU")
    parser.add_argument("--fd", type=int, required=True, help="the memory to write to, as a descriptor")
    parser.add_argument("--parent", type=int, required=True, help="the process that it ends with")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's; whoever started us ends us
    if not end_with(options.parent):
        return
    words = np.frombuffer(mmap.mmap(options.fd, 0), np.int64)
    _watch(words, 0)  # compiles it, before it is real-time
    os.sched_setaffinity(0, {options.core})
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(PRIORITY))
    while True:
        _watch(words, time.monotonic_ns() + SLICE_NS)


if __name__ == "__main__":
    main()
