"""UDP echo over AF_XDP: the smallest program that uses the rings, and the benchmark's subject.

A packet is turned round where it lies: both addresses of Ethernet, IP and UDP are swapped, which leaves every checksum right.
"""

from __future__ import annotations

from typing import Any

from waveos.host.xsk.rings import complete, fill, load16, load32, receive, send, store16, store32, wait, wake
from waveos.jit import jit, jit_inline, store_word
from waveos.primitives import clock_ns, pause

BATCH = 64


@jit_inline
def swap32(a: int, b: int) -> None:
    """Swap two words of 32 bits by address."""
    kept = load32(a)
    store32(a, load32(b))
    store32(b, kept)


@jit_inline
def swap16(a: int, b: int) -> None:
    """Swap two words of 16 bits by address."""
    kept = load16(a)
    store16(a, load16(b))
    store16(b, kept)


@jit
def turn(at: int) -> None:
    """Send a UDP packet (its Ethernet header begins at `at`) back to where it came from."""
    swap32(at, at + 6)
    swap16(at + 4, at + 10)
    swap32(at + 26, at + 30)
    swap16(at + 34, at + 36)


@jit
def echo(xsk: Any, frames: Any, packets: Any, heartbeat_at: int, until_ns: int, sleep_ms: int = 0) -> int:
    """Turn packets round until `until_ns` on the monotonic clock; how many.

    xsk, frames: `record[0]` of a socket and of the stack of free frames; packets: [BATCH] PACKET; heartbeat_at: address of `control.heartbeat_ns`; sleep_ms:
    sleep while nothing comes, at most so long (less than the program's patience), instead of polling.
    """
    done = 0
    now = clock_ns()
    while now < until_ns:
        store_word(heartbeat_at, now)
        complete(xsk, frames)
        fill(xsk, frames)
        got = receive(xsk, packets, BATCH)
        for i in range(got):
            turn(xsk.umem_at + packets[i].at)
        sent = 0
        while sent < got and now < until_ns:  # a full TX ring: the frames stay here until there is room
            sent += send(xsk, packets, sent, got - sent)
            wake(xsk)
            complete(xsk, frames)
            now = clock_ns()
        done += sent
        if got == 0:
            wake(xsk)  # what a full device or socket buffer left in the ring
            if sleep_ms:
                wait(xsk, sleep_ms)
            else:
                pause()
        now = clock_ns()
    return done
