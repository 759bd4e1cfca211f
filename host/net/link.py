"""`xsk://PATH`: the agent's side of a network data path. Whoever opened the sockets hands over their descriptors, and the agent serves the packets itself.

They come by the protocol of `waveos.handover`, from hostd or, in a program, from a `Doorway`. With `attached` there are six descriptors: packet memory, socket
and control block of the client's port, and of the host's.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from waveos.ending import Look, never
from waveos.errors import LinkError
from waveos.handover import Message, await_message, hear, tell
from waveos.host.net.ports import Ports
from waveos.host.xsk import PACKET, Port
from waveos.net.records import SUBSYSTEM
from waveos.record import VERSION

ANSWER_S = 5.0
DESCRIPTORS = 6


class Doorway:
    """Gives the ports of one IPU to an agent that connects to the UNIX socket at `path`: the first one."""

    def __init__(self, path: Path, ports: Ports) -> None:
        self.path, self._ports = path, ports
        self.heard: dict[str, int] = {}
        """What the agent said last of its counters."""
        self._door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        path.unlink(missing_ok=True)
        self._door.bind(str(path))
        path.chmod(0o666)
        self._door.listen(8)
        self._lines: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._admit, daemon=True)]
        self._threads[0].start()

    def _admit(self) -> None:
        taken = False
        while True:
            try:
                line, _ = self._door.accept()
            except OSError:
                return
            if taken:
                with contextlib.suppress(LinkError, TimeoutError):
                    line.settimeout(1.0)
                    hear(line)  # a line that is closed before it was read is broken off at the other side
                    tell(line, {"refused": "another agent had these ports; open new ones for a new agent", "final": True})
                line.close()
                continue
            taken = True
            self._lines.append(line)
            self._threads.append(threading.Thread(target=self._serve, args=(line,), daemon=True))
            self._threads[-1].start()

    def _serve(self, line: socket.socket) -> None:
        """One agent, until it is gone."""
        with contextlib.suppress(LinkError, KeyError, TypeError, ValueError):
            while True:
                message, descriptors = hear(line)
                for descriptor in descriptors:
                    os.close(descriptor)
                if "hello" in message and message["hello"]["version"] != VERSION:
                    tell(line, {"refused": f"the host speaks version {VERSION} of the contract, not {message['hello']['version']}", "final": True})
                elif "hello" in message:
                    tell(line, {"facts": {"subsystem": SUBSYSTEM, "workers": self._ports.facts()["workers"]}})
                elif "ready" in message:
                    tell(line, {"attached": {"generation": 1, **self._ports.facts()}}, self._ports.descriptors())
                elif "report" in message:
                    self.heard = {str(key): int(value) for key, value in message["report"]["counters"].items()}

    def close(self) -> None:
        """Let no agent in any more; the one inside sees the host go."""
        for each in (self._door, *self._lines):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for each in (self._door, *self._lines):
            each.close()
        self.path.unlink(missing_ok=True)


class XskLink:
    """What `open_link("xsk:///run/wave/NAME/agent.sock", side="agent", subsystem=net)` gives: it serves by itself, so the loop is `serve`."""

    def __init__(
        self,
        url: str,
        side: str,
        subsystem: Any,
        *,
        patience_s: float = 5.0,
        timeout_ns: int = 1_000_000_000,
        nap_us: int = 0,
        prepare: Callable[[Message], Message] = lambda facts: {},
    ) -> None:
        """prepare(facts): called with what the host says, before the ports are asked for; what it returns is told with `ready`."""
        if side != "agent":
            raise LinkError(f"{url}: the host's side of an xsk link is hostd, or waveos.host.net.link.Doorway, which has the ports")
        from waveos.host.net import forwarder

        self.url, self.side, self.subsystem = url, side, subsystem
        self._timeout_ns, self._nap_us, self._counters = timeout_ns, nap_us, forwarder.COUNTERS
        self._forward, self._requests = forwarder.forward, list[Message]()
        self._message, self._packets = np.zeros(1, subsystem.MESSAGE), np.zeros(forwarder.BATCH, PACKET)
        self._new_forwarder: Callable[[], Any] = lambda: np.zeros(1, forwarder.FORWARDER)
        self.client: Port | None = None
        self._line = _connect(url, patience_s)
        try:
            tell(self._line, {"hello": {"version": VERSION, "pid": os.getpid()}})
            facts = self._answer("facts", never)[0]
            if facts["subsystem"] != subsystem.SUBSYSTEM:
                raise LinkError(f"{url} is of an enclave of subsystem {facts['subsystem']}, not of the network's ({subsystem.SUBSYSTEM})")
            self.workers = int(facts["workers"])
            self.renew(prepare(facts))
        except BaseException:
            self._line.close()
            raise

    def renew(self, about: Message, look: Look = never) -> None:
        """Say that the policy is ready, and take the ports: at first, and again for another policy, when they are new ones: a queue has one socket, so the old
        ones go first. What `look` raises while the host has not answered ends it. Raises LinkError.
        """
        self._leave()
        tell(self._line, {"ready": about})
        told, fds = self._answer("attached", look)
        if len(fds) != DESCRIPTORS:
            for fd in fds:
                os.close(fd)
            raise LinkError(f"{self.url}: the host handed over {len(fds)} descriptors, not {DESCRIPTORS}; install the same waveos for both")
        self.client = Port.attach(told["client"].encode(), fds[:3])
        self.host = Port.attach(told["host"].encode(), fds[3:], share=self.client)
        self.forwarder = self._new_forwarder()
        self.forwarder["client_beat_at"], self.forwarder["host_beat_at"] = self.client.heartbeat_at, self.host.heartbeat_at
        self.forwarder["gone_at"] = self.client.control["gone"].ctypes.data
        self.forwarder["port"], self.forwarder["timeout_ns"], self.forwarder["nap_us"] = told["port"], self._timeout_ns, self._nap_us

    def _answer(self, wanted: str, look: Look) -> tuple[Any, list[int]]:
        """The host's answer of that kind; requests that come before it wait. Raises LinkError."""
        while True:
            try:
                message, fds = await_message(self._line, ANSWER_S, look)
            except TimeoutError:
                raise LinkError(f"{self.url}: the host does not answer") from None
            if "refused" in message:
                raise LinkError(f"{self.url}: {message['refused']}")
            if wanted in message:
                return message[wanted], fds
            self._requests.append(message)

    def serve(self, runtime: np.ndarray[Any, Any], until_ns: int) -> bool:
        """Forward packets until `until_ns`, as the policy in `runtime` (waveos.net.laws) decides; False once it has failed."""
        assert self.client is not None
        c, h, frames = self.client.xsk.record, self.host.xsk.record, self.client.frames.record
        return not self._forward(self.forwarder, c, h, frames, runtime, self._message, self._packets, until_ns)

    def counters(self) -> dict[str, int]:
        """What the data path did so far."""
        return {name: int(self.forwarder[name][0]) for name in self._counters}

    def requests(self) -> list[Message]:
        """What the host has asked for since the last call. Raises LinkError once it is gone."""
        self._line.settimeout(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                message, fds = hear(self._line)
                for fd in fds:
                    os.close(fd)
                self._requests.append(message)
        found, self._requests = self._requests, []
        return found

    def tell(self, message: Message) -> None:
        """Tell the host; one that does not read misses it, for packets do not wait."""
        self._line.settimeout(0)
        with contextlib.suppress(LinkError):
            tell(self._line, message)

    def close(self) -> None:
        """Stop serving: traffic takes the kernel's path at once."""
        self._leave()
        self._line.close()

    def _leave(self) -> None:
        if self.client is not None:
            self.client.control["heartbeat_ns"] = self.host.control["heartbeat_ns"] = 0
            self.host.close()
            self.client.close()
            self.client = None


def _connect(url: str, patience_s: float) -> socket.socket:
    path = url.partition("://")[2]
    end = time.monotonic() + patience_s
    while True:
        line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            line.connect(path)
            return line
        except OSError as error:
            line.close()
            if time.monotonic() > end:
                raise LinkError(
                    f"{url}: nobody opens at {path} ({error.strerror or os.strerror(error.errno or 0)}); start the host's side first: wave hostd"
                ) from None
            time.sleep(0.01)
