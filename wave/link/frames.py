"""Frames: what crosses a network link. A header of 40 bytes, little-endian, and then records, or for the three that open a session a JSON object.

======  ==========  ==================================================================================================
offset  field       meaning
======  ==========  ==================================================================================================
0       magic       "WAVE"
4       layout      LAYOUT, of this header
5       version     of the contract
6       subsystem
7       kind        `Kind`
8       session     64 random bits that the host chose
16      number      DATA: which frame of this session and direction it is, from 1; others: of the last DATA frame before it
24      taken       records of the other direction that this side has taken since the session began: they make room
32      lost        records that found this side's queue full since the session began
======  ==========  ==================================================================================================
"""

from __future__ import annotations

import json
import struct
from typing import Any, NamedTuple

from waveos.meaning import Told
from waveos.record import RECORD_BYTES

MAGIC = b"WAVE"
LAYOUT = 1
HEADER = struct.Struct("<4s4B4Q")
MAX_RECORDS = 256
"""Of one frame."""
MAX_JSON = 4_096
MAX_BYTES = HEADER.size + max(MAX_RECORDS * RECORD_BYTES, MAX_JSON)


class Kind(Told):
    """What a frame is for."""

    HELLO = 1, "host: open a session with this number for this enclave; said again until it is answered"
    WELCOME = 2, "agent: the session is open; the host's whole state is to follow"
    REFUSED = 3, "agent: no session, and why; asking again may help later"
    DATA = 4, "either: records"
    BEAT = 5, "either: alive; nothing else to say"
    RESET = 6, "agent: that session is over, or never was; open another"
    BYE = 7, "either: this side leaves"


class Frame(NamedTuple):
    """One frame, taken apart; `body` is what follows the header."""

    kind: Kind
    version: int
    subsystem: int
    session: int
    number: int
    taken: int
    lost: int
    body: memoryview


def pack(kind: Kind, version: int, subsystem: int, session: int, number: int = 0, taken: int = 0, lost: int = 0, body: bytes = b"") -> bytes:
    """The bytes of a frame."""
    return HEADER.pack(MAGIC, LAYOUT, version, subsystem, kind, session, number, taken, lost) + body


def pack_json(kind: Kind, version: int, subsystem: int, session: int, told: dict[str, Any]) -> bytes:
    """The bytes of a frame that opens a session, or refuses to. Raises ValueError if there is too much to tell."""
    body = json.dumps(told).encode()
    if len(body) > MAX_JSON:
        raise ValueError(f"{len(body)} bytes to open a session with; at most {MAX_JSON}")
    return pack(kind, version, subsystem, session, body=body)


def unpack(data: bytes | memoryview) -> Frame | None:
    """The frame, or None for what is none: whoever may send may send anything."""
    if not HEADER.size <= len(data) <= MAX_BYTES:
        return None
    magic, layout, version, subsystem, kind, session, number, taken, lost = HEADER.unpack_from(data)
    if magic != MAGIC or layout != LAYOUT or kind not in _KINDS or (kind == Kind.DATA and (len(data) - HEADER.size) % RECORD_BYTES):
        return None
    return Frame(_KINDS[kind], version, subsystem, session, number, taken, lost, memoryview(data)[HEADER.size :])


def read_json(body: bytes | memoryview) -> dict[str, Any] | None:
    """What a frame tells that opens a session; None for what is no JSON object."""
    if len(body) > MAX_JSON:
        return None
    try:
        told = json.loads(bytes(body))
    except (ValueError, RecursionError):
        return None
    return told if isinstance(told, dict) else None


_KINDS = {int(kind): kind for kind in Kind}
