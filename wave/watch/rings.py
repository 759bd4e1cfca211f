"""Looking on at a queue in shared memory, as one who is neither its producer nor its consumer: nothing is written, nobody waits.

A record is whole once its mark is there (`waveos.ring`), and stays so until the producer, a whole lap later, writes over it. So the marks are read, then the
ring is copied, then the marks are read again: what the producer may have been writing over meanwhile counts as lost. Looked at once a lap, nothing is.
"""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import numpy.typing as npt

from waveos.errors import LinkError
from waveos.record import RECORD_WORDS

IDENTITY_AT, HEADER_WORDS = 0, 64  # of waveos.ring, which brings numba
Words = npt.NDArray[np.int64]


class Onlooker:
    """One queue, from now on. `lost` counts records that were written over before they were seen."""

    def __init__(self, descriptor: int, size: int) -> None:
        """Raises LinkError if it cannot be mapped."""
        try:
            self._words: Words = np.frombuffer(mmap.mmap(descriptor, size, mmap.MAP_SHARED, mmap.PROT_READ), np.int64)
        except (OSError, ValueError) as error:
            raise LinkError(f"a queue cannot be looked at: {getattr(error, 'strerror', None) or error}") from error
        self.lost = 0
        self._identity = 0
        self._next = 0
        self._begin(int(self._words[IDENTITY_AT]))
        self._next = int(self._positions(self._slots).max(initial=-1)) + 1

    def _begin(self, identity: int) -> None:
        """A ring of that identity, from its first record on."""
        self._identity = identity
        shift = identity >> 24 & 0xFF
        self.capacity = 1 << shift if identity and HEADER_WORDS + (RECORD_WORDS << shift) <= len(self._words) else 0
        self._slots: Words = self._words[HEADER_WORDS : HEADER_WORDS + RECORD_WORDS * self.capacity].reshape(self.capacity, RECORD_WORDS)
        self._next = 0

    def _positions(self, slots: Words) -> Any:
        """Which record of the ring lies in each slot; -1: none. (A ring begins with no marks, so each is of this generation.)"""
        marks = slots[:, 0] & 0xFFFF_FFFF
        laps = (marks - ((self._identity & 0xFFFF) << 16) - 1) & 0xFFFF_FFFF
        return np.where(marks == 0, -1, laps * self.capacity + np.arange(self.capacity))

    def take(self) -> Words:
        """All whole records since the last call, in order, as [n, 8]; marks are cleared. None while the ring is out of service."""
        identity = int(self._words[IDENTITY_AT])
        if identity != self._identity:
            self._begin(identity)
        if not self.capacity:
            return np.zeros((0, RECORD_WORDS), np.int64)
        there = self._positions(self._slots)
        copy = self._slots.copy()
        newest = int(self._positions(self._slots).max(initial=-1))
        if int(self._words[IDENTITY_AT]) != self._identity or newest < self._next:
            return np.zeros((0, RECORD_WORDS), np.int64)
        oldest = max(self._next, newest + 2 - self.capacity)  # what follows the newest may be half written
        self.lost += oldest - self._next
        wanted = there >= oldest
        found = there[wanted]
        order = np.argsort(found)
        taken: Words = copy[wanted][order]
        self._next = int(found[order[-1]]) + 1 if len(found) else oldest
        taken[:, 0] &= -0x1_0000_0000
        return taken
