"""The XDP program of an interface: which packets go to its AF_XDP sockets, and while whose heart beats."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np

from waveos.errors import ConfigError
from waveos.host.bpf import Link, Object
from waveos.host.bpf.library import last_errno, libbpf, listen, refused
from waveos.host.xsk.socket import XskSocket, interface_number

OBJECT = Path(__file__).with_name("redirect.bpf.o")
PATIENCE_NS = 20_000_000
"""Age of the last heartbeat at which traffic goes back to the kernel's own path."""
COUNTERS = ("redirected", "passed", "unserved", "fragments", "malformed", "sunk")
CONTROL = np.dtype(
    [
        ("heartbeat_ns", "u8"),
        ("patience_ns", "u8"),
        ("port", "u2"),
        ("from_client", "u2"),
        ("sink", "u2"),
        ("spare", "u2"),
        ("gone", "u8"),
        *((name, "u8") for name in COUNTERS),
    ]
)
"""`struct control` of redirect.bpf.c: memory that the program, its owner and whoever serves the sockets share."""
GENERIC = 2


class _Query(ctypes.Structure):
    """struct bpf_xdp_query_opts."""

    _fields_ = [
        ("sz", ctypes.c_size_t),
        ("prog_id", ctypes.c_uint32),
        ("drv_prog_id", ctypes.c_uint32),
        ("hw_prog_id", ctypes.c_uint32),
        ("skb_prog_id", ctypes.c_uint32),
        ("attach_mode", ctypes.c_uint8),
        ("feature_flags", ctypes.c_uint64),
        ("xdp_zc_max_segs", ctypes.c_uint32),
    ]


def map_control(fd: int) -> np.ndarray[Any, Any]:
    """The control block behind a descriptor, [1] CONTROL."""
    return np.frombuffer(mmap.mmap(fd, mmap.PAGESIZE, flags=mmap.MAP_SHARED), CONTROL, 1)


class Redirect:
    """The program on one interface of the calling thread's network namespace: UDP packets to `port` (with `from_client=False`: from it) are redirected.

    It goes with its process, however that ends. `native`: the driver runs it, on packets as they arrive; False: the kernel's generic, slower way, where
    the driver has none. Raises ConfigError if there is no such interface or it has an XDP program already, BpfError if the kernel refuses.
    """

    def __init__(self, interface: str, *, port: int, from_client: bool = True, patience_ns: int = PATIENCE_NS) -> None:
        self.interface = interface
        number = interface_number(interface)
        self._object = Object(OBJECT)
        try:
            self.control = map_control(self.control_fd)
            self.control["patience_ns"], self.control["port"], self.control["from_client"] = patience_ns, port, from_client
            self._attach(number)
        except BaseException:
            self._object.close()
            raise
        self.native = _mode(number) != GENERIC

    def _attach(self, number: int) -> None:
        attach = libbpf().bpf_program__attach_xdp
        attach.restype, attach.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_int]
        program = self._object.program("redirect")
        with listen() as talk:
            pointer = attach(program.pointer, number)
        if not pointer:
            code = last_errno()
            if abs(code) == errno.EBUSY:
                raise ConfigError(
                    f"{self.interface} has an XDP program already; detach it first (ip link set {self.interface} xdp off), or take another"
                )
            raise refused(f"attach the XDP program to {self.interface}", code, talk.log)
        Link(self._object, pointer, "redirect")

    @property
    def control_fd(self) -> int:
        """The descriptor of the control block, for `map_control` in another process."""
        return self._object.map("control").fd

    @property
    def heartbeat_at(self) -> int:
        """Address of the word in which whoever serves the sockets stores CLOCK_MONOTONIC."""
        return int(self.control.ctypes.data)

    def add(self, xsk: XskSocket, queue: int = 0) -> None:
        """Give that queue's packets to the socket."""
        self._object.map("sockets").set(queue, xsk.fileno())

    def counters(self) -> dict[str, int]:
        """What became of the interface's packets so far."""
        return {name: int(self.control[name][0]) for name in COUNTERS}

    def close(self) -> None:
        """Leave the interface to the kernel."""
        self._object.close()


def _mode(number: int) -> int:
    query = _Query(sz=ctypes.sizeof(_Query))
    code = libbpf().bpf_xdp_query(number, 0, ctypes.byref(query))
    if code < 0:
        raise OSError(-code, os.strerror(-code))
    return int(query.attach_mode)
