"""The worker processes: `python -m waveos.host.service.workers FOLDER --board FD --capacity N --core C FD...`, an eventfd a worker.

The process that was started opens the database in FOLDER read-only, and the workers are forked from it, as those of many servers are: what none of them
writes, RocksDB's indices say, is one copy in memory and in the CPU's caches. A worker serves one request a wake-up: the eventfd's value is the request's
number + 1. Outside RocksDB it does little: one system call, which blocks, and two clock-sized stores. The first process watches the workers; it ends them
when its standard input closes, and they end with it however it ends.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import os
import select
import signal
import sys
import time
import warnings
from itertools import islice
from typing import Any

from waveos.errors import WaveError
from waveos.host import rocksdb
from waveos.host.service.board import DONE_NS, FREE, KEY, LINE_WORDS, PID, REQUEST_WORDS, Board
from waveos.process import end_with

MADV_POPULATE_READ = 22
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Numbers of Linux and glibc, whose headers are not at hand at run time."""
KEPT_BYTES = 1 << 25
WARM_UP = 3


def work(board: Board, number: int, wake: int, database: Any, folder: str) -> None:
    """Tell that the worker is ready, and serve from the open database until told to stop (a number beyond the board's capacity)."""
    _populate(folder)
    kept = _warm_up(database)
    words: Any = memoryview(board.memory).cast("q")
    mine, first, end = number * LINE_WORDS, board.workers * LINE_WORDS - REQUEST_WORDS, board.capacity
    wait, clock, get, scan, key_for = os.eventfd_read, time.monotonic_ns, rocksdb.get, rocksdb.scan, rocksdb.key_for
    words[mine + PID], words[mine + FREE] = os.getpid(), clock()
    while True:
        ticket = wait(wake)
        if ticket > end:
            del kept
            return
        at = first + ticket * REQUEST_WORDS
        key = words[at + KEY]
        if key >= 0:
            get(database, key_for(key))
        else:
            scan(database, key_for(-1 - key), rocksdb.RANGE_ENTRIES)
        words[at + DONE_NS] = words[mine + FREE] = clock()


def _populate(folder: str) -> None:
    """Have the tables' pages, which are in the page cache, in this process's page table, too: no request pays for the first touch."""
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    with open("/proc/self/maps") as maps:
        for line in maps:
            if folder in line:
                begin, end = (int(part, 16) for part in line.split(maxsplit=1)[0].split("-"))
                libc.madvise(begin, end - begin, MADV_POPULATE_READ)


def _warm_up(database: Any) -> list[bytes]:
    """Serve a few requests, and make sure that the memory of a reply is not returned to the kernel after each RANGE: its page faults would double the
    time of the next. Returns what is to be kept alive for that: some of many values, which hold the interpreter's arenas.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
    libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
    values = list(islice(database.values(from_key=rocksdb.key_for(0)), 2 * rocksdb.RANGE_ENTRIES))
    for number in range(WARM_UP):
        rocksdb.get(database, rocksdb.key_for(number))
        rocksdb.scan(database, rocksdb.key_for(number), rocksdb.RANGE_ENTRIES)
    return values[::50]


def watch(children: dict[int, int]) -> str:
    """Wait for the end: an empty string when standard input closes, or which worker ended by itself. children: process by pidfd."""
    poll = select.poll()
    for fd in (sys.stdin.fileno(), *children):
        poll.register(fd, select.POLLIN | select.POLLHUP)
    while True:
        for fd, _ in poll.poll():
            if fd in children:
                return f"worker {children[fd]} ended by itself"
            if not os.read(fd, 64):
                return ""


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status if nothing could be served, else it ends the process."""
    parser = argparse.ArgumentParser(prog="waveos.host.service.workers", description="Serve requests from one RocksDB, one process a worker.")
    parser.add_argument("folder", help="the database")
    parser.add_argument("wake", type=int, nargs="+", help="an eventfd for each worker")
    parser.add_argument("--board", type=int, required=True, help="the memory shared with the client, as a descriptor")
    parser.add_argument("--capacity", type=int, required=True, help="requests that the memory holds")
    parser.add_argument("--core", type=int, required=True, help="the CPU that the workers run on")
    options = parser.parse_args(arguments)
    board = Board(len(options.wake), options.capacity, options.board)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's; whoever started us closes standard input
    os.sched_setaffinity(0, {options.core})
    try:
        with rocksdb.open_read_only(options.folder) as database:
            ended = _look_after(_fork(board, options.wake, database, options.folder))
            if ended:
                print(ended, file=sys.stderr, flush=True)
            os._exit(1 if ended else 0)  # nothing was written: to close the database would be one more thing that may go wrong or take its time
    except (WaveError, OSError) as error:
        print(error, file=sys.stderr)
        return 1


def _fork(board: Board, wakes: list[int], database: Any, folder: str) -> dict[int, int]:
    """The workers, as `watch` wants them. They only read and never close the database, whose own threads are idle meanwhile: what they have of it is whole."""
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)  # Python 3.12 and newer count those threads
    gc.freeze()
    gc.disable()
    parent, children = os.getpid(), {}
    for number, wake in enumerate(wakes):
        pid = os.fork()
        if pid == 0:
            os._exit(_work(parent, board, number, wake, database, folder))
        children[os.pidfd_open(pid)] = pid
    return children


def _look_after(children: dict[int, int]) -> str:
    """Watch them, and end them. Why it came to that, if not by standard input."""
    ended = watch(children)
    for pid in children.values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return ended


def _work(parent: int, board: Board, number: int, wake: int, database: Any, folder: str) -> int:
    try:
        if end_with(parent):
            work(board, number, wake, database, folder)
        return 0
    except (WaveError, OSError) as error:
        print(f"worker {number}: {error}", file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
