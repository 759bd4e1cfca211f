"""A load generator over AF_XDP: sends numbered, time-stamped UDP packets as fast as asked or as it can, and times what comes back."""

from __future__ import annotations

import socket
import struct
from typing import Any

import numpy as np

from waveos.host.xsk.rings import complete, fill, give_back, load64, receive, send, store64, take, wake
from waveos.jit import jit, store_word
from waveos.primitives import clock_ns, pause

HEADERS_BYTES = 42
"""Ethernet, IPv4 without options, UDP."""
STAMP_AT = 50  # in the packet: eight bytes of number, then eight of time
TALLY = np.dtype([("sent", "i8"), ("back", "i8"), ("lost", "i8"), ("timed", "i8"), ("next_ns", "i8"), ("heard_ns", "i8")])
LOST_NS = 20_000_000
"""So long without an answer, what is under way counts as lost and makes room in the window."""
BATCH = 64


def udp_packet(source: tuple[bytes, str, int], target: tuple[bytes, str, int], payload: bytes) -> bytes:
    """An Ethernet frame; source and target: (MAC, IPv4 address, port). Without UDP checksum, which IPv4 leaves open."""
    ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 28 + len(payload), 0, 0x4000, 64, 17, 0, socket.inet_aton(source[1]), socket.inet_aton(target[1]))
    ip = ip[:10] + struct.pack(">H", checksum(ip)) + ip[12:]
    return target[0] + source[0] + b"\x08\x00" + ip + struct.pack(">HHHH", source[2], target[2], 8 + len(payload), 0) + payload


def checksum(data: bytes) -> int:
    """The Internet checksum of an even number of bytes."""
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


@jit
def generate(
    xsk: Any,
    frames: Any,
    packets: Any,
    template: Any,
    tally: Any,
    rtt_ns: Any,
    heartbeat_at: int,
    sunk_at: int,
    gap_ns: int,
    window: int,
    until_ns: int,
) -> None:
    """Send copies of `template` until `until_ns`: one every `gap_ns` (0: as many as go), at most `window` unanswered.

    packets: [BATCH] PACKET; tally: `[0]` of [1] TALLY; rtt_ns: int64 array that takes the round trips until it is full; sunk_at: address of the XDP program's
    counter of answers that it has dropped (`control.sink`), 0 if they come here.
    """
    words, length = template.shape[0] // 8, template.shape[0]
    now = clock_ns()
    if tally.next_ns == 0:
        tally.next_ns = tally.heard_ns = now
    while now < until_ns:
        store_word(heartbeat_at, now)
        complete(xsk, frames)
        n = 0
        while n < BATCH and tally.sent + n - tally.back - tally.lost < window and (gap_ns == 0 or tally.next_ns <= now):
            frame = take(frames)
            if frame < 0:
                break
            at = xsk.umem_at + frame
            for w in range(words):
                store64(at + 8 * w, template.view(np.int64)[w])
            store64(at + STAMP_AT, tally.sent + n)
            store64(at + STAMP_AT + 8, now if gap_ns == 0 else tally.next_ns)
            packets[n].at, packets[n].length = frame, length
            n += 1
            tally.next_ns += gap_ns
        fit = send(xsk, packets, 0, n) if n else 0
        for i in range(fit, n):
            give_back(frames, packets[i].at)
            tally.next_ns -= gap_ns
        tally.sent += fit
        wake(xsk)
        got = load64(sunk_at) - tally.back if sunk_at else receive(xsk, packets, BATCH)
        now = clock_ns()
        for i in range(0 if sunk_at else got):
            if tally.timed < rtt_ns.shape[0]:
                rtt_ns[tally.timed] = now - load64(xsk.umem_at + packets[i].at + STAMP_AT + 8)
                tally.timed += 1
            give_back(frames, packets[i].at)
        tally.back += got
        if got:
            tally.heard_ns = now
        elif now - tally.heard_ns > LOST_NS:
            tally.lost, tally.heard_ns = max(tally.lost, tally.sent - tally.back), now
        if not sunk_at:
            fill(xsk, frames)
        if n == 0 and got == 0:
            pause()
