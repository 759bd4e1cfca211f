"""The open-loop client: requests go out at times that were drawn before, whatever has become of earlier ones.

A request is late when the client was: its latency counts from the time it was to be sent. The client sleeps between sends, sends what is overdue at once, and
gives each request to the worker that has become free last, whose caches are warm; while none is free, the requests wait with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from waveos.jit import jit
from waveos.primitives import LINE_WORDS, clock_ns, load, store

CLOCK_MONOTONIC, TIMER_ABSTIME = 1, 1
LOOK_NS = 1_500
"""While no worker waits, the client looks that often, for each that there is: together they have more to do than that, and each look takes from who shares
its CPU."""
SETTLED_NS = 5_000
"""A worker that has become free so lately may not have blocked yet. Given a request then, it would go on with it in the place of those that are runnable:
no scheduler would ever see it block."""
KEY, INTENDED_NS, SENT_NS = 0, 1, 2
"""Words of a request (board.REQUEST)."""


@dataclass(frozen=True)
class Load:
    """What is to be sent: ns after the start, [n] int64, and keys, [n] int64, -1 - key for a RANGE."""

    at_ns: NDArray[np.int64]
    keys: NDArray[np.int64]


@dataclass(frozen=True)
class Served:
    """What became of a load: CLOCK_MONOTONIC, ns, [n] int64 each; `done_ns` 0: not done when the client stopped waiting."""

    is_range: NDArray[np.bool_]
    intended_ns: NDArray[np.int64]
    sent_ns: NDArray[np.int64]
    done_ns: NDArray[np.int64]


def draw_load(rate_per_s: float, duration_ns: int, range_share: float, entries: int, range_entries: int, seed: int) -> Load:
    """Poisson arrivals for so long, random keys, `range_share` of them RANGEs."""
    random = np.random.default_rng(seed)
    expected = rate_per_s * duration_ns * 1e-9
    gaps = random.exponential(1e9 / rate_per_s, int(expected + 6 * expected**0.5 + 10))
    at_ns = np.cumsum(gaps).astype(np.int64)
    at_ns = at_ns[at_ns < duration_ns]
    keys = random.integers(0, entries - range_entries + 1, len(at_ns))
    return Load(at_ns, np.where(random.random(len(at_ns)) < range_share, -1 - keys, keys))


@intrinsic
def _wake(_context: Any, _fd: Any, _value: Any) -> Any:
    """write(2) of a word to an eventfd."""

    def generate(_c: Any, builder: Any, _s: Any, args: Any) -> Any:
        word, number, byte = ir.IntType(64), ir.IntType(32), cgutils.voidptr_t
        place = cgutils.alloca_once_value(builder, args[1])
        write = cgutils.get_or_insert_function(builder.module, ir.FunctionType(word, [number, byte, word]), "write")
        return builder.call(write, [builder.trunc(args[0], number), builder.bitcast(place, byte), ir.Constant(word, 8)])

    return types.int64(types.int64, types.int64), generate


@intrinsic
def sleep_until(_context: Any, _at_ns: Any) -> Any:
    """clock_nanosleep(2) until CLOCK_MONOTONIC is there; a signal ends it early."""

    def generate(_c: Any, builder: Any, _s: Any, args: Any) -> Any:
        word, number, byte = ir.IntType(64), ir.IntType(32), cgutils.voidptr_t
        second = ir.Constant(word, 1_000_000_000)
        place = cgutils.alloca_once(builder, ir.ArrayType(word, 2))
        for i, value in enumerate((builder.sdiv(args[0], second), builder.srem(args[0], second))):
            builder.store(value, cgutils.gep_inbounds(builder, place, 0, i))
        sleep = cgutils.get_or_insert_function(builder.module, ir.FunctionType(number, [number, number, byte, byte]), "clock_nanosleep")
        clock, absolute = ir.Constant(number, CLOCK_MONOTONIC), ir.Constant(number, TIMER_ABSTIME)
        return builder.call(sleep, [clock, absolute, builder.bitcast(place, byte), ir.Constant(byte, None)])

    return types.int32(types.int64), generate


@jit
def send(lines: Any, requests: Any, wakes: Any, groups: Any, begin: int, end: int, until_ns: int) -> Any:
    """Send requests begin..end at their times; returns the first that is not sent at `until_ns`.

    lines: the words of the workers' lines; requests: [n, 4] words; wakes: the workers' eventfds; groups: [2, 2] first worker and count for GET and RANGE.
    """
    i = begin
    while i < end:
        now = clock_ns()
        due = requests[i, INTENDED_NS]
        if now >= until_ns:
            return i
        if due > now:
            sleep_until(min(due, until_ns))
            continue
        kind = 1 if requests[i, KEY] < 0 else 0
        worker, latest = -1, 0
        for each in range(groups[kind, 0], groups[kind, 0] + groups[kind, 1]):
            since = load(lines, each * LINE_WORDS)
            if latest < since <= now - SETTLED_NS:
                worker, latest = each, since
        if worker < 0:
            sleep_until(now + LOOK_NS * groups[kind, 1])
            continue
        store(lines, worker * LINE_WORDS, 0)
        requests[i, SENT_NS] = now
        _wake(wakes[worker], i + 1)
        i += 1
    return i
