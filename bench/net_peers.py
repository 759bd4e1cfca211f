"""UDP echo servers that `wave bench net` measures: plain sockets in Python, recvmmsg and sendmmsg, AF_XDP. One process each, one core."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from waveos.host.net.topology import Network, inside
from waveos.host.xsk import PACKET, Port

BATCH, PACKET_BYTES = 64, 2_048
MSG_WAITFORONE, SO_RCVBUFFORCE = 0x10000, 33
SLICE_NS = 50_000_000
SLEEP_MS = 5
KINDS = ("socket", "mmsg", "xsk")


def echo_socket(address: str, port: int) -> None:
    """A UDP socket in plain Python, as one would write it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as plain:
        plain.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 22)
        plain.bind((address, port))
        buffer = bytearray(PACKET_BYTES)
        view, receive, send = memoryview(buffer), plain.recvfrom_into, plain.sendto
        print("ready", flush=True)
        while True:
            length, sender = receive(buffer)
            send(view[:length], sender)


class _Vector(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


class _Header(ctypes.Structure):
    """struct msghdr."""

    _fields_ = [
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint32),
        ("vectors", ctypes.c_void_p),
        ("vector_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    ]


class _Message(ctypes.Structure):
    """struct mmsghdr."""

    _fields_ = [("header", _Header), ("length", ctypes.c_uint32)]


def echo_mmsg(address: str, port: int, payload: int) -> None:
    """recvmmsg and sendmmsg of up to 64 packets of `payload` bytes: two system calls a batch, and hardly any Python."""
    libc = ctypes.CDLL(None, use_errno=True)
    names, data = (ctypes.c_char * 16 * BATCH)(), (ctypes.c_char * PACKET_BYTES * BATCH)()
    vectors, messages = (_Vector * BATCH)(), (_Message * BATCH)()
    for i in range(BATCH):
        vectors[i].base, vectors[i].length = ctypes.addressof(data[i]), payload
        header = messages[i].header
        header.name, header.name_length = ctypes.addressof(names[i]), 16
        header.vectors, header.vector_count = ctypes.addressof(vectors[i]), 1
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as plain:
        plain.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 22)
        plain.bind((address, port))
        fd, receive, send = plain.fileno(), libc.recvmmsg, libc.sendmmsg
        print("ready", flush=True)
        while True:
            n = receive(fd, messages, BATCH, MSG_WAITFORONE, None)
            if n > 0:
                send(fd, messages, n, 0)


def echo_xsk(interface: str, port: int) -> None:
    """AF_XDP: the loop of `waveos.host.xsk.echo`. SIGUSR1 has it sleep while nothing comes, as the others do, SIGUSR2 has it poll."""
    from waveos.host.xsk.echo import echo
    from waveos.primitives import clock_ns

    sleep_ms = SLEEP_MS

    def switch(number: int, _frame: object) -> None:
        nonlocal sleep_ms
        sleep_ms = SLEEP_MS if number == signal.SIGUSR1 else 0

    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, switch)
    with Port.open(interface, port=port) as opened:
        packets: Any = np.zeros(BATCH, PACKET)
        x, frames = opened.xsk.record[0], opened.frames.record[0]
        echo(x, frames, packets, opened.heartbeat_at, 0, sleep_ms)  # compiles
        print("ready", flush=True)
        while True:
            echo(x, frames, packets, opened.heartbeat_at, clock_ns() + SLICE_NS, sleep_ms)


class Peer:
    """One server in a process of its own, in the host's namespace, stopped (SIGSTOP) while it is not measured."""

    def __init__(self, network: Network, kind: str, port: int, core: int, payload: int) -> None:
        self.kind, self.port = kind, port
        command = [sys.executable, "-P", "-m", "waveos.bench.net_peers", kind, network.host.address, network.host.interface, str(port), str(payload)]
        with inside(network.host.namespace):
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"ready\n":
            self._process.wait()
            raise RuntimeError(f"the {kind} echo server did not start; what it said is above")
        os.sched_setaffinity(self._process.pid, {core})
        self.stop()

    def poll(self, always: bool) -> None:
        """Have AF_XDP poll always, or sleep while nothing comes; the others know but one way."""
        if self.kind == "xsk":
            self._process.send_signal(signal.SIGUSR2 if always else signal.SIGUSR1)

    def stop(self) -> None:
        """Let it wait."""
        self._process.send_signal(signal.SIGSTOP)

    def go(self) -> None:
        """Let it serve."""
        self._process.send_signal(signal.SIGCONT)

    def cpu_ns(self) -> int:
        """CPU time so far. A server that polls is busy also when nothing comes."""
        return int(Path(f"/proc/{self._process.pid}/schedstat").read_text().split()[0])

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


def _main(kind: str, address: str, interface: str, port: str, payload: str) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # with the one who started it
    if kind == "socket":
        echo_socket(address, int(port))
    elif kind == "mmsg":
        echo_mmsg(address, int(port), int(payload))
    else:
        echo_xsk(interface, int(port))


if __name__ == "__main__":
    _main(*sys.argv[1:])
