"""The peers of the link benchmark, each in its own natural Python form: pyzmq, iceoryx2, a socket pair. 64 bytes either way."""

from __future__ import annotations

import ctypes
import os
import socket
import tempfile
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from waveos.errors import MissingError
from waveos.record import RECORD_BYTES

BLOCKING, POLLING = "blocking", "polling"
VARIANTS = {"pyzmq_ipc": (BLOCKING, POLLING), "socketpair": (BLOCKING, POLLING), "iceoryx2": (POLLING,)}
PAYLOAD = bytes(RECORD_BYTES)
clock_ns = time.monotonic_ns


def require() -> None:
    """Raises MissingError, naming what is to be installed, unless every peer is."""
    missing = [package for module, package in (("zmq", "pyzmq"), ("iceoryx2", "iceoryx2")) if find_spec(module) is None]
    if missing:
        raise MissingError(f"bench 'link' needs the Python package{'s' * (len(missing) > 1)} {', '.join(missing)}: pip install 'waveos[bench]'")


class Pair(Protocol):
    """Two ends of one kind. Made before the fork; each process then opens its end: "host" asks, "agent" echoes."""

    def open(self, side: str) -> None:
        """Open this process's end; the agent's first."""

    def round_trips(self, n: int, variant: str) -> Any:
        """Times of n round trips, ns, [n] int64."""

    def echo(self, n: int, variant: str) -> None:
        """The other end's part of them."""

    def close(self) -> None:
        """Close this process's end and leave nothing behind."""


def make(name: str) -> dict[str, Any]:
    """All pairs by kind; `name` is unique on this machine."""
    return {"pyzmq_ipc": Zmq(), "iceoryx2": Iceoryx2(name), "socketpair": SocketPair()}


class Zmq:
    """PAIR sockets of pyzmq over ipc://. Polling, `recv` does not wait."""

    def __init__(self) -> None:
        self.zmq = import_module("zmq")
        self._folder = tempfile.TemporaryDirectory(prefix="wave-bench-")
        self._owner = os.getpid()

    def open(self, side: str) -> None:
        self.context = self.zmq.Context()
        self.socket = self.context.socket(self.zmq.PAIR)
        self.socket.setsockopt(self.zmq.LINGER, 0)
        path = f"ipc://{Path(self._folder.name) / 'pair'}"
        if side == "agent":
            self.socket.bind(path)
        else:
            self.socket.connect(path)

    def round_trips(self, n: int, variant: str) -> Any:
        out, socket, receive = np.zeros(n, np.int64), self.socket, self._receiver(variant)
        for i in range(n):
            begun = clock_ns()
            socket.send(PAYLOAD)
            receive()
            out[i] = clock_ns() - begun
        return out

    def echo(self, n: int, variant: str) -> None:
        socket, receive = self.socket, self._receiver(variant)
        for _ in range(n):
            socket.send(receive())

    def _receiver(self, variant: str) -> Any:
        receive, no_wait, again = self.socket.recv, self.zmq.NOBLOCK, self.zmq.Again
        if variant == BLOCKING:
            return receive

        def poll() -> bytes:
            while True:
                try:
                    return receive(no_wait)
                except again:
                    continue

        return poll

    def stream(self, n: int) -> float:
        """Messages per second, sent here and received there; the last is answered."""
        begun = clock_ns()
        for _ in range(n):
            self.socket.send(PAYLOAD)
        self.socket.recv()
        return n / (clock_ns() - begun) * 1e9

    def drain(self, n: int) -> None:
        """The other end's part of a stream."""
        for _ in range(n):
            self.socket.recv()
        self.socket.send(PAYLOAD)

    def close(self) -> None:
        if hasattr(self, "context"):
            self.socket.close()
            self.context.term()
        if os.getpid() == self._owner:
            self._folder.cleanup()


class _Payload(ctypes.Structure):
    _fields_ = [("words", ctypes.c_int64 * 8)]

    @staticmethod
    def type_name() -> str:
        return "WaveRecord"


class Iceoryx2:
    """Two publish-subscribe services of iceoryx2. Samples are loaned from shared memory, so there is no copy but the one that writes the payload.

    Its files get a prefix and a folder of their own, so that the ones it keeps for later can be removed.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._ports: list[Any] = []
        self._folder = tempfile.TemporaryDirectory(prefix="wave-bench-")
        self._owner = os.getpid()

    def open(self, side: str) -> None:
        iox2 = import_module("iceoryx2")
        iox2.set_log_level(iox2.LogLevel.Error)
        config = iox2.config.default()
        config.global_cfg.prefix = iox2.FileName.new(self.name)
        config.global_cfg.root_path = iox2.Path.new(self._folder.name)
        self._node = iox2.NodeBuilder.new().config(config).create(iox2.ServiceType.Ipc)
        services = [
            self._node.service_builder(iox2.ServiceName.new(f"{self.name}/{way}")).publish_subscribe(_Payload).open_or_create()
            for way in ("up", "down")
        ]
        out, back = services if side == "host" else reversed(services)
        self.publisher = out.publisher_builder().create()
        self.subscriber = back.subscriber_builder().create()
        self._ports = [self.publisher, self.subscriber, *services]

    def round_trips(self, n: int, variant: str) -> Any:
        out, loan, receive, payload = np.zeros(n, np.int64), self.publisher.loan_uninit, self.subscriber.receive, _Payload()
        for i in range(n):
            begun = clock_ns()
            loan().write_payload(payload).send()
            while (sample := receive()) is None:
                pass
            sample.payload()
            out[i] = clock_ns() - begun
            del sample
        return out

    def echo(self, n: int, variant: str) -> None:
        loan, receive, payload = self.publisher.loan_uninit, self.subscriber.receive, _Payload()
        for _ in range(n):
            while (sample := receive()) is None:
                pass
            sample.payload()
            loan().write_payload(payload).send()
            del sample

    def close(self) -> None:
        for port in self._ports:
            if hasattr(port, "delete"):
                port.delete()
        self._ports = []
        self.publisher = self.subscriber = self._node = None
        if os.getpid() == self._owner:
            self._folder.cleanup()
            for kept in Path("/dev/shm").glob(f"{self.name}*"):
                kept.unlink(missing_ok=True)


class SocketPair:
    """AF_UNIX datagrams. Polling, `recv` does not wait."""

    def __init__(self) -> None:
        self.ends = dict(zip(("host", "agent"), socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM), strict=True))

    def open(self, side: str) -> None:
        self.socket = self.ends[side]

    def round_trips(self, n: int, variant: str) -> Any:
        out, send, receive = np.zeros(n, np.int64), self.socket.send, self._receiver(variant)
        for i in range(n):
            begun = clock_ns()
            send(PAYLOAD)
            receive()
            out[i] = clock_ns() - begun
        return out

    def echo(self, n: int, variant: str) -> None:
        send, receive = self.socket.send, self._receiver(variant)
        for _ in range(n):
            send(receive())

    def _receiver(self, variant: str) -> Any:
        receive = self.socket.recv
        if variant == BLOCKING:
            return lambda: receive(RECORD_BYTES)

        def poll() -> bytes:
            while True:
                try:
                    return receive(RECORD_BYTES, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    continue

        return poll

    def close(self) -> None:
        for end in self.ends.values():
            end.close()
