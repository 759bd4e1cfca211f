"""An agent that means no good: it comes in as any agent does, and then writes nonsense into the ring of transactions.

    WAVE_RUN=... python -P forger.py SOCKET COUNT SEED

By turns: random bytes, decisions that look right but for numbers out of range, decisions for threads and CPUs of others, and old decisions again. It reads no
message, gives random credits for them, and rings the doorbell each time.
"""

from __future__ import annotations

import mmap
import os
import socket
import sys
import time

import numpy as np

from waveos import ring
from waveos.handover import hear, tell
from waveos.record import VERSION
from waveos.sched.records import DECISION, SUBSYSTEM

BATCH = 256


def forge(rng: np.random.Generator, kind: int, old: np.ndarray) -> np.ndarray:
    """BATCH records, [n, 8] words."""
    words = rng.integers(-(1 << 63), 1 << 63, (BATCH, ring.LINE_WORDS), np.int64)
    if kind == 0:
        return words
    if kind == 3:
        return old
    records = words.view(DECISION)[:, 0]
    records["version"], records["subsystem"], records["type"] = VERSION, SUBSYSTEM, rng.integers(1, 4, BATCH)
    records["flags"] = rng.integers(0, 4, BATCH)
    if kind == 1:
        records["cpu"] = 0
        records["seq"] = rng.integers(0, 1_000, BATCH)
        records["tid"] = rng.integers(0, 40, BATCH)
    else:
        records["cpu"] = rng.integers(-2, 3, BATCH)
        records["tid"] = rng.integers(-3, 1 << 17, BATCH)  # the kernel's numbers of others among them
    return words


def main(path: str, count: int, seed: int) -> None:
    """Send so many, and say how many were taken."""
    rng = np.random.default_rng(seed)
    line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    line.connect(path)
    tell(line, {"hello": {"version": VERSION}})
    hear(line)
    tell(line, {"ready": {"policy": "forged", "params": {}}})
    told, (up, down, doorbell) = hear(line)
    sizes, generation = told["attached"]["bytes"], told["attached"]["generation"]
    messages, txns = (np.frombuffer(mmap.mmap(fd, size // 8 * 8), np.int64) for fd, size in zip((up, down), sizes, strict=True))
    capacity = 1 << (int(txns[ring.IDENTITY_AT]) >> 24 & 0xFF)
    slots = txns[ring.HEADER_WORDS : ring.HEADER_WORDS + capacity * ring.LINE_WORDS].reshape(capacity, ring.LINE_WORDS)
    sent, end, old = 0, time.monotonic() + 300, forge(rng, 1, np.zeros(0))
    while sent < count and time.monotonic() < end:
        txns[ring.HEARTBEAT_AT] = time.monotonic_ns()
        messages[ring.CREDIT_AT] = rng.integers(-(1 << 63), 1 << 63)
        os.eventfd_write(doorbell, 1)
        if sent - int(txns[ring.CREDIT_AT]) > capacity - BATCH:
            time.sleep(0.000_2)
            continue
        old = words = forge(rng, sent // BATCH % 4, old)
        at = sent % capacity
        slots[at : at + BATCH, 1:] = words[:, 1:]
        mark = (generation << 16) + sent // capacity + 1
        slots[at : at + BATCH, 0] = words[:, 0] & ~0xFFFF_FFFF | mark
        sent += BATCH
    while sent - int(txns[ring.CREDIT_AT]) > capacity // 4 and time.monotonic() < end:
        txns[ring.HEARTBEAT_AT] = time.monotonic_ns()
        os.eventfd_write(doorbell, 1)
        time.sleep(0.001)
    print(int(txns[ring.CREDIT_AT]))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
