"""The record: 64 bytes, one cache line, little-endian; what every message, decision and outcome is made of.

A record is a 24-byte header and 40 bytes of payload that the subsystem names. The same bytes travel in every world.
The first eight bytes are one word: a ring publishes a record by storing that word last.
"""

from __future__ import annotations

from typing import Any

import numpy as np

VERSION = 1
RECORD_BYTES = 64
RECORD_WORDS = RECORD_BYTES // 8
HEADER_BYTES = 24
MAX_THREADS = 65_536
"""Threads of one enclave: `tid` is the enclave's own dense number, 0..MAX_THREADS-1; the host keeps the kernel's."""
MAX_CPUS = 1_024
"""CPUs of one enclave, numbered likewise."""

HEADER: list[tuple[str, str]] = [
    ("mark", "<u4"),  # the ring's lap mark; 0 outside a ring
    ("version", "u1"),  # of the contract; a peer of another version is refused when it attaches
    ("subsystem", "u1"),
    ("type", "<u2"),
    ("seq", "<i8"),  # sequence number: how often the subject (thread, page batch, flow, request) has changed state
    ("time_ns", "<i8"),  # host time, ns
]
WORDS = np.dtype("<i8")


def record(payload: list[tuple[str, str]]) -> np.dtype[np.void]:
    """The dtype of a record with this payload, `[(name, format)]`, at most 40 bytes and naturally aligned.

    Raises ValueError if the payload does not fit or would need padding.
    """
    fields: Any = np.dtype([*HEADER, *payload], align=True).fields
    packed = sum(np.dtype(form).itemsize for _, form in [*HEADER, *payload])
    end = max(offset + form.itemsize for form, offset in fields.values())
    if end > RECORD_BYTES or end > packed:
        raise ValueError(f"a record's payload takes at most {RECORD_BYTES - HEADER_BYTES} bytes without gaps; this one makes {end - HEADER_BYTES}")
    layout: Any = {
        "names": list(fields),
        "formats": [form for form, _ in fields.values()],
        "offsets": [offset for _, offset in fields.values()],
        "itemsize": RECORD_BYTES,
    }
    made: np.dtype[np.void] = np.dtype(layout)
    return made
