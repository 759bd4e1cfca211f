"""`xsk://PATH`: the agent's side of a network data path. hostd opened the sockets; here come their descriptors, and the agent serves the packets itself.

The host's side is `Doorway`: whoever connects to its UNIX socket is given the ports; one at a time.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from waveos.errors import LinkError
from waveos.host.xsk import PACKET, Port
from waveos.record import VERSION

HELLO_BYTES = 4_096


class Doorway:
    """Gives the two ports of one IPU to an agent that connects to the UNIX socket at `path`."""

    def __init__(self, path: Path, client: Port, host: Port, *, port: int, workers: int, open_to_all: bool = False) -> None:
        self.path = path
        self._ports = (client, host)
        self._facts = json.dumps(
            {"version": VERSION, "client": client.facts().decode(), "host": host.facts().decode(), "port": port, "workers": workers}
        ).encode()
        self._door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        self._door.bind(str(path))
        if open_to_all:
            path.chmod(0o666)
        self._door.listen(1)
        self._agent: socket.socket | None = None
        self.heard: dict[str, int] = {}
        """What the agent said last of its counters."""
        self._readers: list[threading.Thread] = []
        self._thread = threading.Thread(target=self._admit, daemon=True)
        self._thread.start()

    def _admit(self) -> None:
        while True:
            try:
                line, _ = self._door.accept()
            except OSError:
                return
            with contextlib.suppress(OSError):
                if self._agent is not None:
                    line.send(json.dumps({"error": "another agent had these ports; open new ones for a new agent"}).encode())
                    line.close()
                    continue
                self._agent = line
                socket.send_fds(line, [self._facts], [fd for port in self._ports for fd in port.descriptors()])
                self._readers.append(threading.Thread(target=self._hear, args=(line,), daemon=True))
                self._readers[-1].start()

    def _hear(self, line: socket.socket) -> None:
        """The agent's counters, until it is gone."""
        with contextlib.suppress(OSError, ValueError):
            while said := line.recv(HELLO_BYTES):
                self.heard = {str(key): int(value) for key, value in json.loads(said).items()}

    def close(self) -> None:
        """Let no agent in any more; the one inside sees the host go."""
        with contextlib.suppress(OSError):
            self._door.shutdown(socket.SHUT_RDWR)
        self._door.close()
        if self._agent is not None:
            with contextlib.suppress(OSError):
                self._agent.shutdown(socket.SHUT_RDWR)
        for thread in (self._thread, *self._readers):
            thread.join()
        if self._agent is not None:
            self._agent.close()
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()


class XskLink:
    """What `open_link("xsk:///run/wave/net/agent.sock", side="agent", subsystem=net)` gives: it serves by itself, so the loop is `serve`."""

    def __init__(self, url: str, side: str, subsystem: Any, *, patience_s: float = 5.0, timeout_ns: int = 1_000_000_000, nap_us: int = 0) -> None:
        if side != "agent":
            raise LinkError(f"{url}: the host's side of an xsk link is waveos.host.net.link.Doorway, which has the ports")
        self.url, self.side, self.subsystem = url, side, subsystem
        self._line = _connect(url, patience_s)
        data, fds, _, _ = socket.recv_fds(self._line, HELLO_BYTES, 6)
        facts = json.loads(data or b'{"error": "the host closed the door"}')
        error = facts.get("error")
        if error is None and facts["version"] != VERSION:
            error = f"the host speaks version {facts['version']} of the contract, this is version {VERSION}"
        if error:
            self._line.close()
            raise LinkError(f"{url}: {error}")
        self.client = Port.attach(facts["client"].encode(), fds[:3])
        self.host = Port.attach(facts["host"].encode(), fds[3:], share=self.client)
        self.workers: int = facts["workers"]
        from waveos.host.net import forwarder

        self._forward = forwarder.forward
        self.forwarder = np.zeros(1, forwarder.FORWARDER)
        self.forwarder["client_beat_at"], self.forwarder["host_beat_at"] = self.client.heartbeat_at, self.host.heartbeat_at
        self.forwarder["port"], self.forwarder["timeout_ns"], self.forwarder["nap_us"] = facts["port"], timeout_ns, nap_us
        self._counters = forwarder.COUNTERS
        self._message, self._packets = np.zeros(1, subsystem.MESSAGE), np.zeros(forwarder.BATCH, PACKET)

    def serve(self, runtime: np.ndarray[Any, Any], until_ns: int) -> bool:
        """Forward packets until `until_ns`, as the policy in `runtime` (waveos.net.laws) decides; False once it has failed."""
        c, h, frames = self.client.xsk.record, self.host.xsk.record, self.client.frames.record
        return not self._forward(self.forwarder, c, h, frames, runtime, self._message, self._packets, until_ns)

    def counters(self) -> dict[str, int]:
        """What the data path did so far."""
        return {name: int(self.forwarder[name][0]) for name in self._counters}

    def check(self) -> None:
        """Raises LinkError once the host is gone."""
        with contextlib.suppress(BlockingIOError):
            if not self._line.recv(1, socket.MSG_DONTWAIT):
                raise LinkError(f"the host of {self.url} is gone")

    def tell(self, facts: dict[str, Any]) -> None:
        """Send the host a line about oneself; a host that does not read misses it."""
        with contextlib.suppress(OSError):
            self._line.send(json.dumps(facts).encode(), socket.MSG_DONTWAIT)

    def close(self) -> None:
        """Stop serving: traffic takes the kernel's path at once."""
        self.client.control["heartbeat_ns"] = self.host.control["heartbeat_ns"] = 0
        self.host.close()
        self.client.close()
        self._line.close()


def _connect(url: str, patience_s: float) -> socket.socket:
    path = url.partition("://")[2]
    end = time.monotonic() + patience_s
    while True:
        line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            line.connect(path)
            return line
        except OSError as error:
            line.close()
            if time.monotonic() > end:
                raise LinkError(
                    f"{url}: nobody opens at {path} ({error.strerror or os.strerror(error.errno or 0)}); start the host's side first"
                ) from None
            time.sleep(0.01)
