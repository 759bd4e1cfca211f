"""The host's side of an agent's two queues, where no kernel program has it: rings in the format of `waveos.ring`, in plain NumPy.

    rings = Rings(subsystem=2)
    rings.begin(generation)                # both empty; an older agent sees that its time is over
    rings.send(messages); rings.poll()     # records of 64 bytes, as [n, 8] int64

hostd cannot import what brings numba, so the format is told here once more; a test lets compiled code be the other side. Each queue is a file in memory
that cannot be cut off (an agent that could would end hostd), and whatever an agent writes into it, nothing is read or written beyond it.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import platform
from typing import Any

import numpy as np
import numpy.typing as npt

from waveos.errors import MissingError
from waveos.record import RECORD_WORDS, VERSION

Words = npt.NDArray[np.int64]

MAGIC = 0x5776
IDENTITY_AT, OVERFLOW_AT, PRODUCERS_AT, HEARTBEAT_AT, CREDIT_AT, CONSUMERS_AT = 0, 16, 17, 18, 32, 33
HEADER_WORDS = 64
LOW, HIGH = 0xFFFF_FFFF, -0x1_0000_0000
_SEALS = 0x0001 | 0x0002 | 0x0004  # F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW
_F_ADD_SEALS = 1033
_RELEASE_AND_ACQUIRE = 4  # memory_order_acq_rel


def _no_fence(_order: int) -> None:
    """x86 keeps stores among each other, and loads among each other, in their order."""


def _find_fence() -> Any:
    if platform.machine() in ("x86_64", "AMD64"):
        return _no_fence
    try:
        fence = ctypes.CDLL("libatomic.so.1").atomic_thread_fence
    except (OSError, AttributeError) as error:
        raise MissingError(f"rings on {platform.machine()} need libatomic.so.1 for a memory barrier ({error}): install libatomic1") from error
    fence.restype, fence.argtypes = None, (ctypes.c_int,)
    return fence


class Ring:
    """One queue: its memory, and this side's position in it."""

    def __init__(self, name: str, capacity: int, subsystem: int) -> None:
        self._fence = _find_fence()
        self.capacity, self._subsystem = capacity, subsystem
        self._shift = capacity.bit_length() - 1
        self.bytes = 8 * (HEADER_WORDS + capacity * RECORD_WORDS)
        self.fd = os.memfd_create(f"wave-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.truncate(self.fd, self.bytes)
        fcntl.fcntl(self.fd, _F_ADD_SEALS, _SEALS)
        self.words: Words = np.frombuffer(mmap.mmap(self.fd, self.bytes), np.int64)
        self._slots = self.words[HEADER_WORDS:].reshape(capacity, RECORD_WORDS)
        self._generation = self._next = self._credit = self.overflowed = 0

    def begin(self, generation: int, joined_at: int) -> None:
        """An empty ring of that generation, with this side joined to it as what `joined_at` says."""
        self._generation, self._next, self._credit, self.overflowed = generation, 0, 0, 0
        self.words[:] = 0
        self.words[joined_at] = 1
        self._fence(_RELEASE_AND_ACQUIRE)
        self.words[IDENTITY_AT] = MAGIC << 48 | VERSION << 40 | self._subsystem << 32 | self._shift << 24 | generation

    def retire(self) -> None:
        """Out of service: the other side sees it at its next look."""
        self.words[IDENTITY_AT] = 0

    def send(self, records: Words) -> int:
        """Send [n, 8] records in order; how many fitted. The rest is counted as overflow."""
        if self.capacity - (self._next - self._credit) < len(records):
            self._credit = int(self.words[CREDIT_AT])
        fit = max(0, min(len(records), self.capacity - (self._next - self._credit)))
        if fit < len(records):
            self.overflowed += len(records) - fit
            self.words[OVERFLOW_AT] = self.overflowed
        slots, marks = self._from_here(fit)
        self._slots[slots, 1:] = records[:fit, 1:]
        self._fence(_RELEASE_AND_ACQUIRE)  # a record is there once its first word is, so that comes last
        self._slots[slots, 0] = (records[:fit, 0] & HIGH) | marks
        self._next += fit
        return fit

    def poll(self, limit: int) -> Words:
        """Up to `limit` records, as [n, 8], a copy."""
        slots, marks = self._from_here(min(limit, self.capacity))
        wrong = np.flatnonzero((self._slots[slots, 0] & LOW) != marks)
        slots = slots[: wrong[0] if len(wrong) else len(slots)]
        self._fence(_RELEASE_AND_ACQUIRE)
        taken: Words = self._slots[slots]
        taken[:, 0] &= HIGH
        self._next += len(slots)
        if self._next - self._credit >= max(1, self.capacity >> 2):
            self._fence(_RELEASE_AND_ACQUIRE)  # the slots are free once they have been read
            self._credit = self._next
            self.words[CREDIT_AT] = self._next
        return taken

    def _from_here(self, n: int) -> tuple[Any, Any]:
        """Slots and marks of the next n positions."""
        positions = self._next + np.arange(n)
        return positions & (self.capacity - 1), ((self._generation & 0xFFFF) << 16) + (positions >> self._shift) + 1 & LOW

    def close(self) -> None:
        """Out of service, and its descriptor closed. Twice does no harm."""
        if self.fd >= 0:
            self.retire()
            os.close(self.fd)
        self.fd = -1


class Rings:
    """Both queues of one agent."""

    def __init__(self, subsystem: int, messages: int = 4_096, txns: int = 1_024) -> None:
        """Capacities are powers of two."""
        self._up, self._down = Ring("messages", messages, subsystem), Ring("txns", txns, subsystem)
        self.queues = {"messages": (self._up.fd, self._up.bytes), "txns": (self._down.fd, self._down.bytes)}
        """Descriptor and bytes of each, as hostd hands them over."""

    def begin(self, generation: int) -> None:
        """Empty queues for a new agent."""
        self._up.begin(generation, PRODUCERS_AT)
        self._down.begin(generation, CONSUMERS_AT)

    def send(self, records: Any) -> int:
        """Send records of 64 bytes; how many fitted."""
        return self._up.send(np.ascontiguousarray(records).view(np.int64).reshape(-1, RECORD_WORDS))

    def poll(self, dtype: Any, limit: int = 1_024) -> Any:
        """What the agent has sent, as records of `dtype`."""
        return self._down.poll(limit).view(dtype).reshape(-1)

    def heartbeat_ns(self) -> int:
        """The agent's clock when it last gave a sign of life; 0: not yet."""
        return int(self._down.words[HEARTBEAT_AT])

    def retire(self) -> None:
        """The agent's time is over."""
        self._up.retire()
        self._down.retire()

    def close(self) -> None:
        """Twice does no harm."""
        self._up.close()
        self._down.close()
