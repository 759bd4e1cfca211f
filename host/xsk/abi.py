"""The kernel's numbers of AF_XDP (linux/if_xdp.h), and the record in which compiled code finds a socket's rings."""

from __future__ import annotations

import struct

import numpy as np

AF_XDP, SOL_XDP = 44, 283
MMAP_OFFSETS, RX_RING, TX_RING, UMEM_REG, FILL_RING, COMPLETION_RING, STATISTICS, OPTIONS, TX_BUDGET = range(1, 10)
"""Socket options. TX_BUDGET (descriptors one sendto transmits in copy mode) is there from Linux 6.18 on."""
PAGE_OFFSETS = {RX_RING: 0, TX_RING: 0x8000_0000, FILL_RING: 0x1_0000_0000, COMPLETION_RING: 0x1_8000_0000}
"""Where each ring is mapped from the socket."""
SHARED_UMEM, COPY, ZERO_COPY, USE_NEED_WAKEUP = 1, 2, 4, 8
"""Flags of bind."""
RING_NEED_WAKEUP = 1
OPTION_ZERO_COPY = 1
DESCRIPTOR_BYTES = {RX_RING: 16, TX_RING: 16, FILL_RING: 8, COMPLETION_RING: 8}

ADDRESS = struct.Struct("=HHIII")  # sockaddr_xdp: family, flags, interface, queue, descriptor of the shared UMEM's socket
REGISTRATION = struct.Struct("=QQIII4x")  # xdp_umem_reg: address, length, frame size, headroom, flags
RING_OFFSETS = struct.Struct("=16Q")  # xdp_mmap_offsets: producer, consumer, descriptors, flags; of RX, TX, fill, completion
COUNTERS = struct.Struct("=6Q")  # xdp_statistics
COUNTER_NAMES = ("rx_dropped", "rx_invalid", "tx_invalid", "rx_ring_full", "fill_ring_empty", "tx_ring_empty")

RING = np.dtype(
    [
        ("producer_at", "i8"),  # addresses of the words both sides see,
        ("consumer_at", "i8"),
        ("flags_at", "i8"),
        ("entries_at", "i8"),  # and of the first descriptor
        ("size", "i8"),
        ("next", "i8"),  # this side's own position
        ("seen", "i8"),  # the other's, as last read
    ],
    align=True,
)
SOCKET = np.dtype(
    [
        ("fd", "i8"),
        ("umem_at", "i8"),
        ("frame_bytes", "i8"),
        ("fill", RING),
        ("completion", RING),
        ("rx", RING),
        ("tx", RING),
        ("wakes", "i8"),  # system calls made
        ("waits_for", "i8"),  # a struct pollfd, and its address
        ("waits_for_at", "i8"),
    ],
    align=True,
)
"""A socket for compiled code: pass `socket.record[0]`. Positions are 32-bit counters kept in 64 bits."""

FRAMES = np.dtype([("n", "i8"), ("room", "i8"), ("free_at", "i8")])
"""The stack of frames that nobody has: how many, how many there can be, where their addresses lie."""
PACKET = np.dtype([("at", "i8"), ("length", "i8")])
"""A packet: where it begins in the UMEM, and its bytes."""
