"""What lies between an exchange and who decides: a ring for compiled loops and other threads, or a plain queue where the verbs do all the work themselves."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt

from waveos import ring
from waveos.link.shm import Queue
from waveos.primitives import CoherentMemory
from waveos.record import RECORD_BYTES, RECORD_WORDS, VERSION

Records = npt.NDArray[np.void]
Words = npt.NDArray[np.int64]


def gather(bodies: deque[memoryview], limit: int, dtype: Any) -> Records:
    """The first records of these frames, at most `limit`, as an array of their own; what is left stays."""
    got, most = bytearray(), limit * RECORD_BYTES
    while bodies and len(got) < most:
        body = bodies.popleft()
        fits = most - len(got)
        if len(body) > fits:
            bodies.appendleft(body[fits:])
            body = body[:fits]
        got += body
    records: Records = np.frombuffer(got, dtype)
    records["mark"] = 0
    return records


class Lane:
    """One direction, in frames. `limit`: records that `offer` takes before some are taken out."""

    def __init__(self, dtype: Any, limit: int) -> None:
        self._dtype, self._limit = dtype, limit
        self._bodies: deque[memoryview] = deque()
        self._offered = bytearray()
        self.put_in = self.taken_out = self.lost = 0
        self._none: Records = np.zeros(0, dtype)

    def put(self, body: memoryview) -> bool:
        """The records of one frame; there is always room, for the session bounds what is not taken."""
        self._bodies.append(body)
        self.put_in += len(body) // RECORD_BYTES
        return True

    def get(self, limit: int) -> Records:
        """Up to so many records that were put in."""
        if not self._bodies:
            return self._none
        records = gather(self._bodies, limit, self._dtype)
        self.taken_out += len(records)
        return records

    def offer(self, records: Records) -> int:
        """Records to be sent; how many fitted."""
        fit = min(len(records), self._limit - len(self._offered) // RECORD_BYTES)
        self.lost += len(records) - fit
        self._offered += records[:fit].tobytes()
        return fit

    @property
    def waiting(self) -> bool:
        """True if records were offered and not taken."""
        return bool(self._offered)

    def take(self, n: int) -> bytes:
        """Up to n of the records that were offered."""
        if not self._offered:
            return b""
        body = bytes(self._offered[: n * RECORD_BYTES])
        del self._offered[: n * RECORD_BYTES]
        return body


class Pipe:
    """One direction, as a ring in this process's memory. `queue` is the side of who decides; it may be another thread or a compiled loop."""

    def __init__(self, kind: str, capacity: int, subsystem: int, dtype: Any, batch: int) -> None:
        self._memory: Words = np.zeros(ring.words(capacity), np.int64)
        ring.compiled().create(self._memory, capacity, VERSION, subsystem, 1)
        producer, consumer = np.zeros(ring.OWN_WORDS, np.int64), np.zeros(ring.OWN_WORDS, np.int64)
        ring.compiled().join_producer(self._memory, producer, VERSION, subsystem, capacity)
        ring.compiled().join_consumer(self._memory, consumer, VERSION, subsystem, capacity)
        self._producer, self._consumer = producer, consumer
        self._out: Records = np.zeros(batch, dtype)
        self._words: Words = self._out.view(np.int64)
        sends = kind == "txns"
        own = producer if sends else consumer
        addresses = np.array([number for array in (self._memory, own, self._words) for number in (array.ctypes.data, array.size)])
        self.queue = Queue(kind, sends, self._memory, own, self._out, addresses, addresses.ctypes.data)

    def put(self, body: memoryview) -> bool:
        """The records of one frame, if there is room for all of them."""
        n = len(body) // RECORD_BYTES
        if self.put_in - self.taken_out + n > self._producer[ring.CAPACITY]:
            return False
        credit_left = self._producer[ring.CAPACITY] - (self.put_in - self._producer[ring.CREDIT])
        if credit_left < n and ring.room(CoherentMemory(self._memory), self._producer, n) < n:
            return False
        ring.compiled().send(self._memory, self._producer, np.frombuffer(bytearray(body), np.int64), n)
        return True

    def get(self, limit: int) -> Records:
        """Up to so many records that were put in; they hold until the next call."""
        return self._out[: self._poll(limit)]

    def offer(self, records: Records) -> int:
        """Records to be sent; how many fitted."""
        words = np.ascontiguousarray(records).view(np.int64)
        return int(ring.compiled().send(self._memory, self._producer, words, len(words) // RECORD_WORDS))

    def take(self, n: int) -> bytes:
        """Up to n of the records that were offered."""
        return self._out[: self._poll(n)].tobytes()

    def _poll(self, n: int) -> int:
        if self._producer[ring.NEXT] == self._consumer[ring.NEXT]:
            return 0
        return int(ring.compiled().poll(self._memory, self._consumer, self._words, min(n, len(self._out))))

    @property
    def put_in(self) -> int:
        """Records put in, or offered, so far."""
        return int(self._producer[ring.NEXT])

    @property
    def taken_out(self) -> int:
        """Records taken out so far."""
        return int(self._consumer[ring.NEXT])

    @property
    def lost(self) -> int:
        """Records that found it full."""
        return int(self._producer[ring.LOST])
