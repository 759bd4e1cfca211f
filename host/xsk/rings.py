"""The rings of an AF_XDP socket as compiled steps: take packets, give packets, have frames back. Nothing is copied, nothing is allocated.

    n = receive(xsk, packets, 64)                    # packets: [64] PACKET, address and length in the UMEM
    ...                                              # parse and change them where they lie: `load` and `store` of bytes by address
    sent = send(xsk, packets, n)                     # also to another socket that shares the UMEM
    wake(xsk)                                        # a system call, if the kernel wants one
    n = complete(xsk, frames, 64); fill(xsk, frames, n)

A frame is in one place at a time: the fill ring, the RX ring, with whoever received it, the TX ring, the completion ring. Positions are
32-bit counters that wrap; each is stored with release and read with acquire order. `frames` (abi.FRAMES) is the stack of those that nobody has.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from waveos.host.xsk.abi import RING_NEED_WAKEUP
from waveos.jit import jit, jit_inline

LOW = 0xFFFF_FFFF
MSG_DONTWAIT, POLLIN = 0x40, 1


def _access(bits: int, ordering: str | None) -> tuple[Any, Any]:
    word, size = ir.IntType(bits), bits // 8

    def load(_context: Any, address: Any) -> Any:
        def generate(_c: Any, builder: Any, _s: Any, arguments: Any) -> Any:
            pointer = builder.inttoptr(arguments[0], word.as_pointer())
            value = builder.load_atomic(pointer, "acquire", size) if ordering else builder.load(pointer, align=1)
            return value if bits == 64 else builder.zext(value, ir.IntType(64))

        return types.int64(types.int64), generate

    def store(_context: Any, address: Any, value: Any) -> Any:
        def generate(_c: Any, builder: Any, _s: Any, arguments: Any) -> Any:
            pointer = builder.inttoptr(arguments[0], word.as_pointer())
            value = arguments[1] if bits == 64 else builder.trunc(arguments[1], word)
            if ordering:
                builder.store_atomic(value, pointer, "release", size)
            else:
                builder.store(value, pointer, align=1)

        return types.void(types.int64, types.int64), generate

    return intrinsic(load), intrinsic(store)


_acquire, _release = _access(32, "atomic")
load8, store8 = _access(8, None)
load16, store16 = _access(16, None)
load32, store32 = _access(32, None)
load64, store64 = _access(64, None)


@intrinsic
def _poll(_context: Any, _descriptor: Any, _timeout_ms: Any) -> Any:
    """poll(2) of one descriptor; the argument is the address of its struct pollfd."""

    def generate(_c: Any, builder: Any, _s: Any, arguments: Any) -> Any:
        number, word = ir.IntType(32), ir.IntType(64)
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(number, [word, word, number]), "poll")
        result = builder.call(function, [arguments[0], ir.Constant(word, 1), builder.trunc(arguments[1], number)])
        return builder.sext(result, word)

    return types.int64(types.int64, types.int64), generate


@intrinsic
def _send_nothing(_context: Any, _fd: Any) -> Any:
    """sendto(fd, NULL, 0, MSG_DONTWAIT, NULL, 0): have the kernel look at the TX ring."""

    def generate(_c: Any, builder: Any, _s: Any, arguments: Any) -> Any:
        number, word, pointer = ir.IntType(32), ir.IntType(64), cgutils.voidptr_t
        kind = ir.FunctionType(word, [number, pointer, word, number, pointer, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "sendto")
        nothing = ir.Constant(pointer, None)
        zero = ir.Constant(number, 0)
        fd = builder.trunc(arguments[0], number)
        return builder.call(function, [fd, nothing, ir.Constant(word, 0), ir.Constant(number, MSG_DONTWAIT), nothing, zero])

    return types.int64(types.int64), generate


@jit_inline
def _room(ring: Any, n: int) -> Any:
    """How many entries this side may produce, up to `n` surely known."""
    free = ring.size - ((ring.next - ring.seen) & LOW)
    if free < n:
        ring.seen = _acquire(ring.consumer_at)
        free = ring.size - ((ring.next - ring.seen) & LOW)
    return min(free, n)


@jit_inline
def _there(ring: Any, n: int) -> Any:
    """How many entries this side may consume, up to `n`."""
    there = (ring.seen - ring.next) & LOW
    if there < n:
        ring.seen = _acquire(ring.producer_at)
        there = (ring.seen - ring.next) & LOW
    return min(there, n)


@jit
def room(xsk: Any) -> int:
    """1 if the TX ring takes another packet, else 0."""
    return _room(xsk.tx, 1)


@jit
def waiting_to_send(xsk: Any) -> Any:
    """(Packets in the TX ring, how far the kernel has come with it): a position that stays while packets wait says that the wire is cut."""
    ring = xsk.tx
    consumed = _acquire(ring.consumer_at)
    return (ring.next - consumed) & LOW, consumed


@jit
def receive(xsk: Any, packets: Any, n: int) -> int:
    """Take up to n packets into `packets` ([..] PACKET); how many there were. Their frames are the caller's."""
    ring = xsk.rx
    got = _there(ring, n)
    for i in range(got):
        entry = ring.entries_at + ((ring.next + i) & (ring.size - 1)) * 16
        packets[i].at = load64(entry)
        packets[i].length = load32(entry + 8)
    if got:
        ring.next = (ring.next + got) & LOW
        _release(ring.consumer_at, ring.next)
    return got


@jit
def send(xsk: Any, packets: Any, first: int, n: int) -> int:
    """Give packets[first : first + n] to the kernel to send, in order; how many the ring took. It sends them at the next `wake`."""
    ring = xsk.tx
    fit = _room(ring, n)
    for i in range(fit):
        entry = ring.entries_at + ((ring.next + i) & (ring.size - 1)) * 16
        store64(entry, packets[first + i].at)
        store64(entry + 8, packets[first + i].length)  # and options 0
    if fit:
        ring.next = (ring.next + fit) & LOW
        _release(ring.producer_at, ring.next)
    return fit


@jit
def complete(xsk: Any, frames: Any) -> int:
    """Have the frames back whose packets are sent: onto the stack `frames` (`Frames`); how many."""
    ring = xsk.completion
    got = _there(ring, frames.room - frames.n)
    for i in range(got):
        store64(frames.free_at + 8 * (frames.n + i), load64(ring.entries_at + ((ring.next + i) & (ring.size - 1)) * 8))
    if got:
        frames.n += got
        ring.next = (ring.next + got) & LOW
        _release(ring.consumer_at, ring.next)
    return got


@jit
def fill(xsk: Any, frames: Any) -> int:
    """Give the kernel free frames to receive into, as many as there are and fit; how many."""
    ring = xsk.fill
    fit = _room(ring, frames.n)
    for i in range(fit):
        frames.n -= 1
        store64(ring.entries_at + ((ring.next + i) & (ring.size - 1)) * 8, load64(frames.free_at + 8 * frames.n) & -xsk.frame_bytes)
    if fit:
        ring.next = (ring.next + fit) & LOW
        _release(ring.producer_at, ring.next)
    return fit


@jit
def give_back(frames: Any, at: int) -> None:
    """The frame that holds address `at` is nobody's any more."""
    store64(frames.free_at + 8 * frames.n, at)
    frames.n += 1


@jit
def take(frames: Any) -> int:
    """A free frame's address, which is the caller's from now on; -1 if there is none."""
    if frames.n == 0:
        return -1
    frames.n -= 1
    return load64(frames.free_at + 8 * frames.n)


@jit
def wait(xsk: Any, timeout_ms: int) -> None:
    """Sleep until a packet is there, at most so long: for who has no core to spare for polling. It sends what is in the TX ring, as `wake` does."""
    xsk.waits_for = POLLIN << 32 | xsk.fd
    _poll(xsk.waits_for_at, timeout_ms)


@jit
def wake(xsk: Any) -> None:
    """Have the kernel send what is in the TX ring, if it does not by itself. In copy mode it is here, on this core, that packets are sent."""
    ring = xsk.tx
    if _acquire(ring.consumer_at) != ring.next and load32(ring.flags_at) & RING_NEED_WAKEUP:
        _send_nothing(xsk.fd)
        xsk.wakes += 1
