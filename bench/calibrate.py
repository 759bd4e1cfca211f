"""This machine as a link profile and a host profile, `this-machine`: the agent on another core, joined by coherent memory.

Two processes, one on each of two cores, and one pair on a single core. Every figure is the median over rounds, and means the
most on a machine that does nothing else. What cannot be measured from user space (what
taking an interrupt costs) is taken from the profile `server`, and each section's `source` says which is which.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import platform
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from waveos.bench.machine import describe_machine
from waveos.errors import ConfigError
from waveos.ipu_emulator.profile import load_host, load_link, user_profiles
from waveos.jit import jit
from waveos.output import make_folder, write_file
from waveos.primitives import LINE_WORDS, clock_ns, load, store

OPTIONS = {
    "rounds": (9, "of each measurement; figures are medians over them"),
    "out": ("", "where to write the link profile; the host's goes beside it"),
}
LINES, APART = 256, 9
"""Lines that are handed over at once, and how many lines from one to the next: neighbours would be prefetched. 144 KiB, which a core's own cache holds."""
SPIN_NS = 300_000_000
"""How long one round looks for timer ticks."""
CLOCK_MONOTONIC_COARSE = 6
"""Linux's number (clock_gettime(2)); Python names only the fine one. It moves with the tick."""
X86 = ("x86_64", "AMD64")


def run(out: Path | str | None = None, rounds: int = 9) -> dict[str, Any]:
    """Measure, write both profiles and load them back. `path` is the link profile's, `host_path` the other's. Raises ConfigError, OutputError."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise ConfigError("calibrate needs two cores, one a side; this process may use one")
    if rounds < 3:
        raise ConfigError(f"rounds {rounds}: at least 3")
    link_path, host_path = _paths(out)
    measured = measure(cores[0], cores[1], rounds)
    machine = describe_machine()
    write_file(link_path, write_link(measured, machine, rounds))
    write_file(host_path, write_host(measured, machine, rounds))
    load_link(str(link_path))
    load_host(str(host_path))
    return {
        "name": "calibrate",
        "metrics": {name: round(value, 1) for name, value in measured.items()} | {"rounds": rounds},
        "machine": machine,
        "timing": "measured",
        "path": str(link_path),
        "host_path": str(host_path),
        "verdict": f"written: {link_path} and {host_path}",
    }


def _paths(out: Path | str | None) -> tuple[Path, Path]:
    """Of the link profile and the host profile."""
    if not out:
        return make_folder(user_profiles("links")) / "this-machine.toml", make_folder(user_profiles("hosts")) / "this-machine.toml"
    path = Path(out)
    if path.suffix != ".toml":
        raise ConfigError(f"--out {out}: a profile's name ends in .toml")
    return path, path.with_name(f"{path.stem}-host.toml")


def measure(here: int, there: int, rounds: int) -> dict[str, float]:
    """All figures, ns but for those that say otherwise; `here` and `there` are two cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {here})
    try:
        got = {"clock_ns": _median(rounds, lambda: _clock(10_000))}
        got |= _measure_lines(there, rounds, got["clock_ns"])
        got |= _measure_flush(rounds)
        got["syscall_ns"] = _median(rounds, lambda: _getppid(20_000))
        got["pick_ns"] = max(0.0, _median(rounds, lambda: _sched_yield(20_000)) - got["syscall_ns"])
        got |= _measure_pipes(here, there, rounds)
        got |= _measure_ticks(rounds)
        got["copy_bytes_per_us"] = _median(rounds, _copy)
        return got
    finally:
        os.sched_setaffinity(0, before)


def _median(rounds: int, measure_once: Callable[[], float]) -> float:
    measure_once()  # compiles, or loads what was compiled
    return median(float(measure_once()) for _ in range(rounds))


# Lines between two cores


def _measure_lines(there: int, rounds: int, clock: float) -> dict[str, float]:
    """One-way transfer; read and write of a line that the other core wrote last; a read that hits."""
    words = np.frombuffer(mmap.mmap(-1, (LINES * APART + 64) * 64), np.int64)
    flags, lines = words[: 64 * LINE_WORDS], words[64 * LINE_WORDS :]
    order = np.random.default_rng(1).permutation(LINES)
    after = np.empty(LINES, np.int64)
    after[order] = np.roll(order, -1)  # one cycle through all lines: no prefetcher can guess it
    out = np.zeros(3, np.int64)
    _hand_over(flags, lines, after, 0)
    _take_over(flags, lines, after, out, 0)
    with _other_side(there, lambda: _hand_over(flags, lines, after, 2 * rounds)):
        pairs = [_take_over(flags, lines, after, out, k + 1) or out.copy() for k in range(2 * rounds)]
    read, hit, write = (median(pair[k] / LINES for pair in pairs[rounds:]) for k in range(3))
    trips = np.zeros(20_000, np.int64)
    _ping(flags, trips[:0], 0)
    _pong(flags, 0)
    with _other_side(there, lambda: _pong(flags, rounds * len(trips))):
        ways = []
        for k in range(rounds):
            _ping(flags, trips, k * len(trips))
            ways.append(float(np.median(trips)))
    return {"one_way_ns": max(1.0, (median(ways) - clock) / 2), "read_line_ns": read, "hit_line_ns": hit, "write_line_ns": write}


@contextlib.contextmanager
def _other_side(core: int, work: Callable[[], Any]) -> Iterator[None]:
    """`work` in a process of its own on that core."""

    def begin() -> None:
        os.sched_setaffinity(0, {core})
        work()

    process = get_context("fork").Process(target=begin, daemon=True)
    process.start()
    try:
        yield
        process.join(10)
    finally:
        if process.is_alive():
            process.terminate()
        process.join()


@jit
def _ping(flags: Any, out: Any, first: int) -> None:
    for i in range(out.shape[0]):
        begun = clock_ns()
        store(flags, 0, first + i + 1)
        while load(flags, 256) != first + i + 1:
            pass
        out[i] = clock_ns() - begun


@jit
def _pong(flags: Any, n: int) -> None:
    for i in range(n):
        while load(flags, 0) != i + 1:
            pass
        store(flags, 256, i + 1)


@jit
def _hand_over(flags: Any, lines: Any, after: Any, rounds: int) -> None:
    """The other core: write every line with where to go next, whenever asked."""
    for k in range(rounds):
        while load(flags, 128) != k + 1:
            pass
        for i in range(after.shape[0]):
            for w in range(LINE_WORDS):
                store(lines, i * APART * LINE_WORDS + w, after[i])
        store(flags, 384, k + 1)


@jit
def _take_over(flags: Any, lines: Any, after: Any, out: Any, k: int) -> None:
    """Time reading all lines once, once more, and (after another hand-over in the next round) writing them. `k` 0: on lines of this core."""
    if k:
        store(flags, 128, k)
        while load(flags, 384) != k:
            pass
    begun = clock_ns()
    if k % 2 == 0:
        at = 0
        for _ in range(after.shape[0]):
            at = load(lines, at * APART * LINE_WORDS)
        out[0] = clock_ns() - begun
        begun = clock_ns()
        for _ in range(after.shape[0]):
            at = load(lines, at * APART * LINE_WORDS)
        out[1] = clock_ns() - begun
    else:
        at = 0
        for _ in range(after.shape[0]):
            for w in range(LINE_WORDS):
                store(lines, at * APART * LINE_WORDS + w, k)
            at = after[at]
        out[2] = clock_ns() - begun


# One core: clock, system calls, flushes


@jit
def _clock(n: int) -> float:
    begun = clock_ns()
    for _ in range(n):
        clock_ns()
    return (clock_ns() - begun) / n


def _calling(name: str) -> Any:
    """A compiled call of a libc function without arguments."""

    @intrinsic
    def call(_context: Any) -> Any:
        def generate(_c: Any, builder: Any, _s: Any, _a: Any) -> Any:
            word = ir.IntType(32)
            return builder.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(word, []), name), [])

        return types.int32(), generate

    return call


_call_getppid, _call_sched_yield = _calling("getppid"), _calling("sched_yield")


@jit
def _getppid(n: int) -> float:
    begun = clock_ns()
    for _ in range(n):
        _call_getppid()
    return (clock_ns() - begun) / n


@jit
def _sched_yield(n: int) -> float:
    begun = clock_ns()
    for _ in range(n):
        _call_sched_yield()
    return (clock_ns() - begun) / n


@intrinsic
def _clflush(_context: Any, _memory: Any, _i: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        pointer = builder.bitcast(builder.gep(data, [arguments[1]]), cgutils.voidptr_t)
        flush = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t]), "llvm.x86.sse2.clflush")
        builder.call(flush, [pointer])
        return context.get_dummy_value()

    return types.void(types.Array(types.int64, 1, "C"), types.int64), generate


@intrinsic
def _sfence(_context: Any) -> Any:
    def generate(context: Any, builder: Any, _s: Any, _a: Any) -> Any:
        builder.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), []), "llvm.x86.sse.sfence"), [])
        return context.get_dummy_value()

    return types.void(), generate


def _measure_flush(rounds: int) -> dict[str, float]:
    """clflush of a line just written, with the fence that waits for it. x86 only: nothing elsewhere."""
    if platform.machine() not in X86:
        return {}
    lines = np.zeros(LINES * LINE_WORDS, np.int64)
    return {"clflush_ns": _median(rounds, lambda: _flush_lines(lines))}


@jit
def _flush_lines(lines: Any) -> float:
    n = lines.shape[0] // LINE_WORDS
    begun = clock_ns()
    for i in range(n):
        store(lines, i * LINE_WORDS, i)
        _clflush(lines, i * LINE_WORDS)
        _sfence()
    return (clock_ns() - begun) / n


# Switches and wake-ups: a byte through two pipes


def _measure_pipes(here: int, there: int, rounds: int) -> dict[str, float]:
    """A switch between two threads of one core; a wake-up of the other core: what it costs the waker, and when the woken one runs."""
    trips, alone = 2_000, _Pipes()
    alone_ns = _median(rounds, lambda: alone.write_and_read(trips)[0])
    write_ns = _median(rounds, lambda: alone.write_and_read(trips)[1])
    same_ns, _ = _echoed(here, rounds, trips)
    across_ns, waking_write_ns = _echoed(there, rounds, trips // 4)
    switch_ns = max(1.0, same_ns / 2 - alone_ns)
    wake_ns = max(1.0, waking_write_ns - write_ns)
    return {"switch_ns": switch_ns, "wake_ns": wake_ns, "wake_across_ns": max(1.0, across_ns / 2 - alone_ns), "pipe_ns": alone_ns}


class _Pipes:
    """Two pipes, there and back."""

    def __init__(self) -> None:
        (self.their_in, self.our_out), (self.our_in, self.their_out) = os.pipe(), os.pipe()

    def write_and_read(self, n: int) -> tuple[float, float]:
        """A write and a read that need not wait, in one process; and the write's part."""
        spent = 0
        begun = clock_ns()
        for _ in range(n):
            write_begun = clock_ns()
            os.write(self.our_out, b"x")
            spent += clock_ns() - write_begun
            os.read(self.their_in, 1)
        return (clock_ns() - begun) / n, spent / n

    def ask(self, n: int) -> tuple[float, float]:
        """A round trip, and the write's part of it."""
        spent = 0
        begun = clock_ns()
        for _ in range(n):
            write_begun = clock_ns()
            os.write(self.our_out, b"x")
            spent += clock_ns() - write_begun
            os.read(self.our_in, 1)
        return (clock_ns() - begun) / n, spent / n

    def answer(self, n: int) -> None:
        """The other side's part."""
        for _ in range(n):
            os.read(self.their_in, 1)
            os.write(self.their_out, b"x")


def _echoed(core: int, rounds: int, trips: int) -> tuple[float, float]:
    """Medians of a round trip with a process on that core, and of the write that wakes it."""
    pipes = _Pipes()
    with _other_side(core, lambda: pipes.answer((rounds + 1) * trips)):
        pipes.ask(trips)
        took = [pipes.ask(trips) for _ in range(rounds)]
    return median(each[0] for each in took), median(each[1] for each in took)


# The tick


def _measure_ticks(rounds: int) -> dict[str, float]:
    """The timer tick: its period is the kernel's coarse clock's; its cost the usual gap in a loop that does nothing but look at the clock.

    Gaps above 20 µs are other threads. `ticks_seen_share`: gaps found, as a share of the ticks due; below a half the cost is not taken from here.
    """
    period_ns = time.clock_getres(CLOCK_MONOTONIC_COARSE) * 1e9
    gaps = np.zeros(65_536, np.int64)
    _spin(gaps, 1_000)
    found = [gaps[: _spin(gaps, SPIN_NS)].copy() for _ in range(max(3, rounds // 3))]
    ticks = np.concatenate(found)
    due = len(found) * SPIN_NS / period_ns
    return {"tick_period_ns": period_ns, "tick_ns": float(np.median(ticks)) if len(ticks) else 0.0, "ticks_seen_share": min(1.0, len(ticks) / due)}


@jit
def _spin(gaps: Any, spin_ns: int) -> int:
    n = 0
    begun = last = clock_ns()
    while last - begun < spin_ns:
        now = clock_ns()
        if 500 < now - last < 20_000 and n < gaps.shape[0]:
            gaps[n] = now - last
            n += 1
        last = now
    return n


def _copy() -> float:
    """Bytes a µs of one core's copy, of 32 MiB."""
    source = np.ones(32 << 17, np.int64)
    target = np.empty_like(source)
    np.copyto(target, source)
    begun = clock_ns()
    np.copyto(target, source)
    return source.nbytes / ((clock_ns() - begun) / 1_000)


# The files


def _origin(machine: dict[str, object], rounds: int) -> str:
    guest = "a virtual machine" if machine["virtual_machine"] else "this machine"
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return f"measured by `wave calibrate` on {when}, {machine['cpu']}, {guest}, Linux {machine['kernel']}; medians of {rounds} rounds"


def write_link(m: dict[str, float], machine: dict[str, object], rounds: int) -> str:
    """The link profile's text."""
    flush = f" (a clflush with its sfence would be {m['clflush_ns']:.0f} ns)" if "clflush_ns" in m else ""
    line = (
        "measured: reads are a pointer chase over, writes are stores to, lines that the other core wrote last; "
        "uncached values: the same, coherent memory is never mapped so"
    )
    receive_ns = load_host("server").interrupt_ns
    return _toml(
        {"name": "this-machine", "verified": True, "source": _origin(machine, rounds), "coherent": True, "relative_speed": 1.0},
        host={
            "source": f"{line}; no flush and no invalidation is needed{flush}",
            "uc_read_ns": m["read_line_ns"], "uc_write_ns": m["write_line_ns"],
            "wc_write_ns": m["write_line_ns"], "wc_flush_ns": 0,
            "wt_read_ns": m["read_line_ns"], "wt_hit_ns": m["hit_line_ns"], "invalidate_ns": 0,
        },
        agent={
            "source": line,
            "uc_read_ns": m["read_line_ns"], "uc_write_ns": m["write_line_ns"],
            "wb_read_ns": m["read_line_ns"], "wb_write_ns": m["write_line_ns"],
        },
        wire={
            "source": "measured: half a round trip of one line between two cores, less the reader's part, which the reads above charge",
            "one_way_ns": max(1.0, m["one_way_ns"] - m["read_line_ns"]),
        },
        doorbell={
            "source": "send: measured, a write to a pipe whose reader sleeps on the other core, less one that wakes nobody; wire: measured, from the write "
            f"until that reader runs, less its switch and what receiving takes; receive: assumed, {receive_ns} ns as in the host profile 'server'",
            "send_ns": m["wake_ns"], "ioctl_ns": m["wake_ns"],
            "wire_ns": max(0.0, m["wake_across_ns"] - m["switch_ns"] - receive_ns), "receive_ns": receive_ns,
        },
        dma={"source": "measured: one core's copy of 32 MiB; no set-up on one machine", "setup_ns": 0, "bytes_per_us": max(1, m["copy_bytes_per_us"])},
    )  # fmt: skip


def write_host(m: dict[str, float], machine: dict[str, object], rounds: int) -> str:
    """The host profile's text."""
    assumed = load_host("server")
    ticked = m["ticks_seen_share"] >= 0.5
    tick = (
        "tick: measured, the usual gap in a spinning loop"
        if ticked
        else f"tick: assumed, {assumed.tick_ns} ns as in 'server' (too few were seen here)"
    )
    source = (
        f"{_origin(machine, rounds)}. Measured: entry (getppid), switch (a byte through pipes between two processes of one core, less the calls), "
        "wake (a write that wakes a reader on the other core, less one that does not), pick (sched_yield less a system call), "
        "IPI (until that reader runs, less switch and interrupt; it includes leaving the idle state). "
        f"{tick}. Assumed: interrupt, {assumed.interrupt_ns} ns as in 'server'"
    )
    return _toml(
        {
            "name": "this-machine", "verified": True, "source": source,
            "entry_ns": m["syscall_ns"], "switch_ns": m["switch_ns"], "wake_ns": m["wake_ns"], "pick_ns": m["pick_ns"],
            "ipi_wire_ns": max(0.0, m["wake_across_ns"] - m["switch_ns"] - assumed.interrupt_ns), "interrupt_ns": assumed.interrupt_ns,
            "tick_period_us": m["tick_period_ns"] / 1_000, "tick_ns": m["tick_ns"] if ticked else assumed.tick_ns,
        }
    )  # fmt: skip


def _toml(top: dict[str, Any], **sections: dict[str, Any]) -> str:
    lines = _entries(top)
    for name, section in sections.items():
        lines += ["", f"[{name}]", *_entries(section)]
    return "\n".join(lines) + "\n"


def _entries(section: dict[str, Any]) -> list[str]:
    whole = {key: round(value) if isinstance(value, float) and key != "relative_speed" else value for key, value in section.items()}
    return [f"{key} = {json.dumps(value)}" for key, value in whole.items()]
