"""`XskSocket`: an AF_XDP socket with its four rings. No compiled code is needed to open one, so a daemon can open it and hand it on.

    umem = Umem.make(frames=4096)
    xsk = XskSocket.open("veth0", umem=umem)         # needs CAP_NET_RAW and CAP_BPF; `descriptors` and `facts` go to whoever serves it
    xsk = XskSocket.attach(descriptor, umem, facts)  # there: needs nothing

Packets come once an XDP program redirects them: `waveos.host.xsk.program`. What is done with them: `waveos.host.xsk.rings`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import socket
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from waveos.errors import ConfigError, MissingError
from waveos.host.xsk import abi
from waveos.host.xsk.umem import Umem

TX_BUDGET = 256
"""Packets one system call sends in copy mode, where the kernel lets one choose."""
RELEASE_S = 0.5
"""The kernel gives a closed socket's queue free a little later."""
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Facts:
    """What whoever attaches to the socket must know besides its descriptor."""

    ring_size: int
    zero_copy: bool


class XskSocket:
    """One queue of one interface. `record` ([1] abi.SOCKET) is what the functions of `rings` take."""

    def __init__(self, sock: socket.socket, umem: Umem, facts: Facts) -> None:
        self.umem, self.facts = umem, facts
        self._socket = sock
        self.record = np.zeros(1, abi.SOCKET)
        self.record["fd"], self.record["umem_at"], self.record["frame_bytes"] = sock.fileno(), umem.address, umem.frame_bytes
        self.record["waits_for_at"] = self.record["waits_for"].ctypes.data
        offsets = abi.RING_OFFSETS.unpack(sock.getsockopt(abi.SOL_XDP, abi.MMAP_OFFSETS, abi.RING_OFFSETS.size))
        self._maps: list[mmap.mmap] = []
        for i, (name, kind) in enumerate((("rx", abi.RX_RING), ("tx", abi.TX_RING), ("fill", abi.FILL_RING), ("completion", abi.COMPLETION_RING))):
            self._map(name, kind, *offsets[4 * i : 4 * i + 4])

    @classmethod
    def open(cls, interface: str, *, queue: int = 0, umem: Umem, ring_size: int = 2_048, shares: XskSocket | None = None) -> XskSocket:
        """A new socket on that queue of that interface of the calling thread's network namespace.

        `shares`: a socket with the same UMEM, opened before; each still has fill and completion rings of its own, so frames go from one to the other without
        a copy. Raises ConfigError for an interface or queue that is not there or is taken, MissingError without the right or without AF_XDP.
        """
        if ring_size & (ring_size - 1) or not 2 <= ring_size <= 1 << 16:
            raise ConfigError(f"a ring has a power of two of descriptors, 2 to 65536, not {ring_size}")
        number = interface_number(interface)
        try:
            sock = socket.socket(abi.AF_XDP, socket.SOCK_RAW)
        except PermissionError:
            raise MissingError("an AF_XDP socket is opened by root (CAP_NET_RAW); run hostd as root, it hands the socket to the agent") from None
        except OSError as error:
            raise MissingError(f"this kernel has no AF_XDP sockets ({error.strerror}); it wants CONFIG_XDP_SOCKETS") from None
        try:
            if shares is None:
                reg = abi.REGISTRATION.pack(umem.address, umem.frames * umem.frame_bytes, umem.frame_bytes, 0, 0)
                sock.setsockopt(abi.SOL_XDP, abi.UMEM_REG, reg)
            for option in (abi.FILL_RING, abi.COMPLETION_RING, abi.RX_RING, abi.TX_RING):
                sock.setsockopt(abi.SOL_XDP, option, ring_size)
            flags = abi.USE_NEED_WAKEUP if shares is None else abi.SHARED_UMEM  # a sharer inherits the owner's way of waking
            _bind(sock, flags, number, queue, 0 if shares is None else shares.fileno())
        except OSError as error:
            sock.close()
            raise _explain(error, interface, queue) from error
        with contextlib.suppress(OSError):  # an older kernel stays at its 32
            sock.setsockopt(abi.SOL_XDP, abi.TX_BUDGET, min(TX_BUDGET, ring_size))
        zero_copy = bool(int.from_bytes(sock.getsockopt(abi.SOL_XDP, abi.OPTIONS, 4), "little") & abi.OPTION_ZERO_COPY)
        return cls(sock, umem, Facts(ring_size, zero_copy))

    @classmethod
    def attach(cls, fd: int, umem: Umem, facts: Facts) -> XskSocket:
        """The socket behind a descriptor that another process opened; this object owns the descriptor from now on. The rings go on where they are."""
        return cls(socket.socket(abi.AF_XDP, socket.SOCK_RAW, 0, fd), umem, facts)

    def _map(self, name: str, kind: int, producer: int, consumer: int, entries: int, flags: int) -> None:
        size = self.facts.ring_size
        length = entries + size * abi.DESCRIPTOR_BYTES[kind]
        mapped = mmap.mmap(self._socket.fileno(), length, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, offset=abi.PAGE_OFFSETS[kind])
        self._maps.append(mapped)
        base = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        ring: Any = self.record[name][0]
        ring["producer_at"], ring["consumer_at"], ring["flags_at"], ring["entries_at"] = (
            base + producer,
            base + consumer,
            base + flags,
            base + entries,
        )
        produced, consumed = (ctypes.c_uint32.from_address(base + at).value for at in (producer, consumer))
        produces = kind in (abi.TX_RING, abi.FILL_RING)
        ring["size"], ring["next"], ring["seen"] = size, produced if produces else consumed, consumed if produces else produced

    def fileno(self) -> int:
        """The descriptor: for select, poll and handing on."""
        return self._socket.fileno()

    def statistics(self) -> dict[str, int]:
        """The kernel's counters of what it could not deliver or send, since the socket was opened."""
        raw = self._socket.getsockopt(abi.SOL_XDP, abi.STATISTICS, abi.COUNTERS.size)
        return dict(zip(abi.COUNTER_NAMES, abi.COUNTERS.unpack(raw), strict=True))

    def close(self) -> None:
        """Close this process's descriptor and mappings: `record` points nowhere any more. The socket ends with the last of both anywhere."""
        self._socket.close()
        while self._maps:
            self._maps.pop().close()

    def __enter__(self) -> XskSocket:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def interface_number(interface: str) -> int:
    """The kernel's number of an interface of the calling thread's network namespace. Raises ConfigError if there is none."""
    try:
        return socket.if_nametoindex(interface)
    except OSError:
        known = ", ".join(name for _, name in socket.if_nameindex())
        raise ConfigError(f"there is no interface {interface!r} in this network namespace; there are: {known}") from None


def _bind(sock: socket.socket, flags: int, interface: int, queue: int, shared: int) -> None:
    address = abi.ADDRESS.pack(abi.AF_XDP, flags, interface, queue, shared)
    end = time.monotonic() + RELEASE_S
    while _libc.bind(sock.fileno(), address, len(address)):
        number = ctypes.get_errno()
        if number != errno.EBUSY or time.monotonic() > end:
            raise OSError(number, os.strerror(number))
        time.sleep(0.002)


def _explain(error: OSError, interface: str, queue: int) -> Exception:
    match error.errno:
        case errno.EPERM | errno.ENOBUFS:
            return MissingError(
                f"{interface}: no right to register packet memory ({error.strerror}); run as root, or raise the limit on locked memory"
            )
        case errno.EBUSY:
            return ConfigError(f"{interface} queue {queue} is taken by another AF_XDP socket; stop its owner or take another queue")
        case errno.EINVAL:
            return ConfigError(f"{interface} has no queue {queue}, or a ring is larger than the kernel allows")
        case errno.ENETDOWN:
            return ConfigError(f"{interface} is down; set it up first (ip link set {interface} up)")
        case _:
            return ConfigError(f"{interface} queue {queue}: {error.strerror}")
