"""The two AF_XDP ports of one IPU, which share their packets' memory, as whoever serves them is handed them."""

from __future__ import annotations

import contextlib
from typing import Any

from waveos.host.net.topology import Network, inside
from waveos.host.xsk import Port
from waveos.net.records import MAX_WORKERS

RING_SIZE = 2_048


class Ports:
    """Opened, for one server: for another one open new ones."""

    def __init__(self, network: Network, *, port: int, workers: int, ring_size: int = RING_SIZE) -> None:
        self._port, self._workers = port, workers
        self.places = 4 * ring_size
        """Packets that the receiving and sending rings of both hold at most."""
        with contextlib.ExitStack() as undo, inside(network.ipu):
            self.client = undo.enter_context(Port.open("client", port=port, ring_size=ring_size))
            self.host = undo.enter_context(Port.open("host", port=port, from_client=False, ring_size=ring_size, share=self.client))
            self._undo = undo.pop_all()

    def facts(self) -> dict[str, Any]:
        """What goes with the descriptors."""
        return {"client": self.client.facts().decode(), "host": self.host.facts().decode(), "port": self._port, "workers": self._workers}

    def descriptors(self) -> list[int]:
        """Of the client's port and of the host's."""
        return [*self.client.descriptors(), *self.host.descriptors()]

    @property
    def heartbeat_ns(self) -> int:
        """CLOCK_MONOTONIC of the server's last turn; 0: nobody serves."""
        return int(self.client.control["heartbeat_ns"][0])

    def mark_gone(self, workers: set[int]) -> None:
        """Tell the server which workers are gone: it steers nothing there."""
        self.client.control["gone"] = sum(1 << worker for worker in workers if worker < MAX_WORKERS)

    def counters(self) -> dict[str, int]:
        """What the XDP programs and the kernel's rings did with packets, by side."""
        found: dict[str, int] = {}
        for name, port in (("client", self.client), ("host", self.host)):
            assert port.redirect is not None
            found |= {f"{name}_{key}": value for key, value in (port.redirect.counters() | port.xsk.statistics()).items()}
        return found

    def close(self) -> None:
        """Leave both interfaces to the kernel."""
        self._undo.close()
