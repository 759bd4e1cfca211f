"""BPF's own ring buffers: from programs to us, and from us to programs; neither costs a system call.

The records are what the programs make them. (Wave's messages and decisions travel in rings of `waveos.ring` instead, which an agent in compiled
code can poll; these are for hostd, in Python.) libbpf does the reading and writing, with the memory ordering of the machine at hand.
"""

from __future__ import annotations

import errno
import os
import weakref
from ctypes import memmove, string_at

from waveos.host.bpf.library import SAMPLE, last_errno, libbpf, refused
from waveos.host.bpf.map import Map

ENOUGH = 4_096
"""Records one `poll` takes at most, so that a program that writes without end does not keep us."""


class RingBuffer:
    """The consumer of a BPF_MAP_TYPE_RINGBUF."""

    def __init__(self, ring: Map) -> None:
        self._ring = ring
        self._found: list[memoryview] = []
        self._take = SAMPLE(self._sample)
        pointer = libbpf().ring_buffer__new(ring.fd, self._take, None, None)
        if not pointer:
            raise refused(f"poll map {ring.name}", last_errno(), "")
        self._pointer = pointer
        self._free = weakref.finalize(self, libbpf().ring_buffer__free, pointer)

    @property
    def fd(self) -> int:
        """For select, poll and epoll: readable when there is a record (unless the program wrote it without waking us)."""
        return self._ring.fd

    def poll(self) -> list[memoryview]:
        """The records that are there now, oldest first, each a copy; often none."""
        if not self._free.alive:
            raise ValueError(f"ring buffer {self._ring.name} is closed")
        code = libbpf().ring_buffer__consume(self._pointer)
        if code < 0 and code != -errno.EOVERFLOW:
            raise OSError(-code, f"ring buffer {self._ring.name}: {os.strerror(-code)}")
        found, self._found = self._found, []
        return found

    def close(self) -> None:
        """Unmap it. Twice does no harm."""
        self._free()

    def _sample(self, _: int | None, data: int, size: int) -> int:
        self._found.append(memoryview(string_at(data, size)))
        return 0 if len(self._found) < ENOUGH else -errno.EOVERFLOW


class UserRingBuffer:
    """The producer of a BPF_MAP_TYPE_USER_RINGBUF; a program takes what is in it by bpf_user_ringbuf_drain."""

    def __init__(self, ring: Map) -> None:
        self._ring = ring
        pointer = libbpf().user_ring_buffer__new(ring.fd, None)
        if not pointer:
            raise refused(f"write to map {ring.name}", last_errno(), "")
        self._pointer = pointer
        self._free = weakref.finalize(self, libbpf().user_ring_buffer__free, pointer)

    @property
    def fd(self) -> int:
        """For select, poll and epoll: writable when there is room."""
        return self._ring.fd

    def send(self, record: bytes | bytearray | memoryview) -> bool:
        """Put a record into the ring; False if there is no room. Raises ValueError for one that is longer than the whole ring."""
        if not self._free.alive:
            raise ValueError(f"ring buffer {self._ring.name} is closed")
        record = bytes(record)
        place = libbpf().user_ring_buffer__reserve(self._pointer, len(record))
        if place:
            memmove(place, record, len(record))
            libbpf().user_ring_buffer__submit(self._pointer, place)
            return True
        code = last_errno()
        if code == errno.ENOSPC:
            return False
        if code == errno.E2BIG:
            raise ValueError(f"ring buffer {self._ring.name} has {self._ring.max_entries} bytes, a record of {len(record)} never fits")
        raise OSError(code, f"ring buffer {self._ring.name}: {os.strerror(code)}")

    def close(self) -> None:
        """Unmap it. Twice does no harm."""
        self._free()
