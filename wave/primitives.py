"""The five primitives that rings are written over: load, store, flush, fence, invalidate; and clock, pause, sleep and doorbell of compiled loops.

A memory is a sequence of 64-bit words; `i` is a word's index; eight words are a line of 64 bytes. What a ring may rely on:

=================  ====================================================================================================
`load(m, i)`       the word, possibly as old as the last fill of its line (WT); later loads and stores stay behind it (acquire)
`store(m, i, v)`   whole, but when the other side sees it, and in which order with other words, is open (relaxed; WC)
`flush(m, i)`      the stores made so far to the line of word i are on their way and arrive in bounded time
`fence(m)`         every store flushed before it is visible before anything that follows it: stores, doorbells, interrupts
`invalidate(m, i)` the next load of that line is not older than this call
=================  ====================================================================================================

One fill of an aligned line is taken to be a snapshot: its eight words are as of one moment. Memory controllers and 64-byte PCIe completions
of cached memory keep this; a device that does not (PCIe lets it not) needs a copy of the mark at the end of the record.

Compiled, the primitives are chosen by the numba type of the memory: for a C-contiguous int64 array it is coherent shared memory, where a load is
an acquire load, a store a relaxed atomic one, a fence a release fence (no instruction on x86, `dmb ish` on Arm), and flush and
invalidate are nothing. For a `BarMemory` (the host's side of a PCI BAR) loads and stores are the same, and flush and fence are the barriers that empty
what combines writes: x86 `sfence`, Arm `dsb`. Another kind of memory is another numba type with `overload`s of these five functions.
Interpreted, they are the methods of the memory: the strict model's (`waveos.ipu_emulator.strict`), or those of `CoherentMemory` and `BarMemory` here.
"""

from __future__ import annotations

import os
import platform
import time
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from waveos.jit import jit

LINE_WORDS = 8
_ONE = (1).to_bytes(8, "little")
Words = npt.NDArray[np.int64]


class Memory(Protocol):
    """A memory for interpreted code: one method a primitive."""

    def load(self, i: int) -> int: ...
    def store(self, i: int, value: int) -> None: ...
    def flush(self, i: int) -> None: ...
    def fence(self) -> None: ...
    def invalidate(self, i: int) -> None: ...


class CoherentMemory:
    """Coherent shared memory for interpreted code, over an array of int64.

    An interpreter's loads and stores are in program order on x86 alone; on other machines use the compiled functions between processes.
    """

    __slots__ = ("words",)

    def __init__(self, words: Words) -> None:
        self.words = words

    def load(self, i: int) -> int:
        """The word now."""
        return int(self.words[i])

    def store(self, i: int, value: int) -> None:
        """Write the word at once."""
        self.words[i] = value

    def flush(self, i: int) -> None:
        """Nothing: stores leave by themselves."""

    def fence(self) -> None:
        """Nothing: stores leave in order."""

    def invalidate(self, i: int) -> None:
        """Nothing: loads are never stale."""


class BarMemory(NamedTuple):
    """Memory of a device as its host has it, for interpreted and for compiled code: parts that it writes may be mapped write-combining, parts that it reads
    are uncached.

    A load is never older than its call, so `invalidate` is nothing; but it may pass this side's own stores, which wait in a buffer of the core until a
    flush.
    """

    words: Words

    def load(self, i: int) -> int:
        """The word as the device has it now."""
        return int(self.words[i])

    def store(self, i: int, value: int) -> None:
        """Into the core's buffer."""
        self.words[i] = value

    def flush(self, i: int) -> None:
        """Empty the core's buffers."""
        _drain()

    def fence(self) -> None:
        """Empty the core's buffers, in order."""
        _drain()

    def invalidate(self, i: int) -> None:
        """Nothing of it is cached; but an interpreter's loads are in program order on x86 alone."""
        _drain()


def load(memory: Any, i: int) -> int:
    """Read word i; later accesses stay behind it."""
    return memory.load(i)  # type: ignore[no-any-return]


def store(memory: Any, i: int, value: int) -> None:
    """Write word i, whole; it becomes visible some time."""
    memory.store(i, value)


def flush(memory: Any, i: int) -> None:
    """Send the line of word i on its way."""
    memory.flush(i)


def fence(memory: Any) -> None:
    """Make what was flushed visible before anything that follows."""
    memory.fence()


def invalidate(memory: Any, i: int) -> None:
    """Drop a possibly stale copy of the line of word i."""
    memory.invalidate(i)


def clock_ns() -> int:
    """CLOCK_MONOTONIC in ns: one clock for all processes of a machine. Compiled, a call of libc's clock_gettime by name: cacheable on disk."""
    return time.monotonic_ns()


def pause() -> None:
    """Tell the core that this is a polling loop: x86 `pause`, Arm `yield`, elsewhere nothing."""


def sleep_us(duration_us: int) -> None:
    """Give the core away for that long at least (the timer slack, 50 µs by default, comes on top)."""
    time.sleep(duration_us / 1e6)


def ring_doorbell(fd: int) -> None:
    """Wake who waits on the eventfd `fd`: one write(2). Records must be settled before."""
    os.write(fd, _ONE)


# Compiled: coherent shared memory, a C-contiguous array of int64. LLVM must see atomics, or it hoists a polling load out of its loop.

_TIMESPEC = ir.ArrayType(ir.IntType(64), 2)
_CLOCK_MONOTONIC = 1
_PAUSES = {"x86_64": ("llvm.x86.sse2.pause", ()), "aarch64": ("llvm.aarch64.hint", (1,))}


def _is_coherent(memory: Any) -> bool:
    return isinstance(memory, types.Array) and memory.dtype == types.int64 and memory.ndim == 1 and memory.layout == "C"


@intrinsic
def _load_acquire(typing_context: Any, memory: Any, i: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(memory)(context, builder, arguments[0]).data
        return builder.load_atomic(builder.gep(data, [arguments[1]]), "acquire", 8)

    return types.int64(memory, types.int64), generate


@intrinsic
def _store_relaxed(typing_context: Any, memory: Any, i: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(memory)(context, builder, arguments[0]).data
        builder.store_atomic(arguments[2], builder.gep(data, [arguments[1]]), "monotonic", 8)
        return context.get_dummy_value()

    return types.void(memory, types.int64, types.int64), generate


@intrinsic
def _fence_release(typing_context: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("release")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def _clock_ns(typing_context: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        int32, int64 = ir.IntType(32), ir.IntType(64)
        now = cgutils.alloca_once(builder, _TIMESPEC)
        clock_gettime = cgutils.get_or_insert_function(builder.module, ir.FunctionType(int32, [int32, cgutils.voidptr_t]), "clock_gettime")
        builder.call(clock_gettime, [ir.Constant(int32, _CLOCK_MONOTONIC), builder.bitcast(now, cgutils.voidptr_t)])
        seconds = builder.load(cgutils.gep_inbounds(builder, now, 0, 0))
        nanoseconds = builder.load(cgutils.gep_inbounds(builder, now, 0, 1))
        return builder.add(builder.mul(seconds, ir.Constant(int64, 1_000_000_000)), nanoseconds)

    return types.int64(), generate


@intrinsic
def _sleep_us(typing_context: Any, duration_us: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        int32 = ir.IntType(32)
        usleep = cgutils.get_or_insert_function(builder.module, ir.FunctionType(int32, [int32]), "usleep")
        builder.call(usleep, [builder.trunc(arguments[0], int32)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def _ring_doorbell(typing_context: Any, fd: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        int32, int64 = ir.IntType(32), ir.IntType(64)
        one = cgutils.alloca_once_value(builder, ir.Constant(int64, 1))
        write = cgutils.get_or_insert_function(builder.module, ir.FunctionType(int64, [int32, cgutils.voidptr_t, int64]), "write")
        builder.call(write, [builder.trunc(arguments[0], int32), builder.bitcast(one, cgutils.voidptr_t), ir.Constant(int64, 8)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def _pause(typing_context: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if platform.machine() in _PAUSES:
            _call(builder, *_PAUSES[platform.machine()])
        return context.get_dummy_value()

    return types.void(), generate


def _call(builder: Any, name: str, operands: tuple[int, ...]) -> None:
    """An instruction of the machine's that LLVM knows by that name."""
    constants = [ir.Constant(ir.IntType(32), operand) for operand in operands]
    builder.call(builder.module.declare_intrinsic(name, fnty=ir.FunctionType(ir.VoidType(), [ir.IntType(32)] * len(constants))), constants)


@overload(load, strict=False)
def _compiled_load(memory: Any, i: Any) -> Any:
    return (lambda memory, i: _load_acquire(memory, i)) if _is_coherent(memory) else None


@overload(store, strict=False)
def _compiled_store(memory: Any, i: Any, value: Any) -> Any:
    return (lambda memory, i, value: _store_relaxed(memory, i, value)) if _is_coherent(memory) else None


@overload(flush, strict=False)
def _compiled_flush(memory: Any, i: Any) -> Any:
    return (lambda memory, i: None) if _is_coherent(memory) else None


@overload(fence, strict=False)
def _compiled_fence(memory: Any) -> Any:
    return (lambda memory: _fence_release()) if _is_coherent(memory) else None


@overload(invalidate, strict=False)
def _compiled_invalidate(memory: Any, i: Any) -> Any:
    return (lambda memory, i: None) if _is_coherent(memory) else None


# Compiled: the host's side of a BAR. What combines writes may keep them for good, so a flush has to be the barrier that empties its buffers; x86 has no
# other that does so for one line of such memory, and Arm's non-cacheable stores end with `dsb`.

_BARRIERS = {"x86_64": ("llvm.x86.sse.sfence", ()), "aarch64": ("llvm.aarch64.dsb", (15,))}


def _is_bar(memory: Any) -> bool:
    return isinstance(memory, types.NamedUniTuple) and memory.instance_class is BarMemory and _is_coherent(memory.dtype)


@intrinsic
def _fence_device(typing_context: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst" if platform.machine() not in _BARRIERS else "release")  # so that the compiler, too, moves nothing across
        if platform.machine() in _BARRIERS:
            _call(builder, *_BARRIERS[platform.machine()])
        return context.get_dummy_value()

    return types.void(), generate


@jit
def _drain() -> None:
    _fence_device()


@overload(load, strict=False)
def _bar_load(memory: Any, i: Any) -> Any:
    return (lambda memory, i: _load_acquire(memory.words, i)) if _is_bar(memory) else None


@overload(store, strict=False)
def _bar_store(memory: Any, i: Any, value: Any) -> Any:
    return (lambda memory, i, value: _store_relaxed(memory.words, i, value)) if _is_bar(memory) else None


@overload(flush, strict=False)
def _bar_flush(memory: Any, i: Any) -> Any:
    return (lambda memory, i: _fence_device()) if _is_bar(memory) else None


@overload(fence, strict=False)
def _bar_fence(memory: Any) -> Any:
    return (lambda memory: _fence_device()) if _is_bar(memory) else None


@overload(invalidate, strict=False)
def _bar_invalidate(memory: Any, i: Any) -> Any:
    return (lambda memory, i: None) if _is_bar(memory) else None


@overload(clock_ns, strict=False)
def _compiled_clock_ns() -> Any:
    return lambda: _clock_ns()


@overload(pause, strict=False)
def _compiled_pause() -> Any:
    return lambda: _pause()


@overload(sleep_us, strict=False)
def _compiled_sleep_us(duration_us: Any) -> Any:
    return lambda duration_us: _sleep_us(duration_us)


@overload(ring_doorbell, strict=False)
def _compiled_ring_doorbell(fd: Any) -> Any:
    return lambda fd: _ring_doorbell(fd)
