"""Steering by the kernel as an agent decides: what waits with each worker goes to the agent, what it decides into the table of the shared port's sockets."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from waveos import net
from waveos.host.net.reuseport import ReuseportTable
from waveos.link import open_link
from waveos.net.records import MESSAGE, Message
from waveos.outcome import Outcome
from waveos.record import VERSION

SO_MEMINFO = 55


class TableSteering:
    """The host's side. Call `turn` every few milliseconds: packets never wait for it. When the agent is gone the kernel's own hash picks workers again."""

    def __init__(self, url: str, table: ReuseportTable, shared: Mapping[int, socket.socket]) -> None:
        """url: a link of queues (`shm://NAME`), made here; shared: the sockets that were joined to the table, by worker. Raises LinkError."""
        self._table, self._shared = table, dict(shared)
        self._link: Any = open_link(url, side="host", subsystem=net)
        self._joins = 0
        self._lost = False
        self._told: dict[int, int] = {}
        self._packet_bytes = 0
        self.committed = self.refused = 0

    def turn(self) -> None:
        """Tell the agent what has changed, and do what it has decided."""
        if not self._link.peer_alive():
            if self._joins:
                self._table.leave()
            self._joins = 0
            return
        messages = []
        if self._joins != self._link.peer_joins() or self._lost:
            self._joins, self._lost, self._told = self._link.peer_joins(), False, {}
            messages += [self._message(Message.RESYNC), *(self._message(Message.WORKER_NEW, worker) for worker in self._shared)]
        for worker, sock in self._shared.items():
            if (depth := self._depth(sock)) != self._told.get(worker, 0):
                self._told[worker] = depth
                messages.append(self._message(Message.QUEUE_DEPTH, worker, depth))
        self._send(messages)
        decisions = self._link.poll_txns()
        if len(decisions):
            outcomes = self._table.apply(decisions, time.monotonic_ns())
            committed = int(np.sum(outcomes["outcome"] == Outcome.COMMITTED))
            self.committed, self.refused = self.committed + committed, self.refused + len(outcomes) - committed
            self._lost = self._link.set_txns_outcomes(outcomes) < len(outcomes)

    def worker_gone(self, worker: int) -> None:
        """It takes no requests any more: its entries are the kernel's choice, and its socket is given up here, too."""
        self._shared.pop(worker).close()
        self._table.leave(worker)
        self._send([self._message(Message.WORKER_GONE, worker)])

    def _depth(self, sock: socket.socket) -> int:
        """Packets that wait in the socket. The kernel counts bytes of memory; a packet's are the fewest that were ever seen."""
        waiting = int(struct.unpack_from("=I", sock.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 36))[0])
        if waiting and (not self._packet_bytes or waiting < self._packet_bytes):
            self._packet_bytes = waiting
        return waiting // self._packet_bytes if waiting else 0

    def _message(self, kind: Message, worker: int = -1, depth: int = 0) -> Any:
        made = np.zeros(1, MESSAGE)
        made["version"], made["subsystem"], made["type"], made["time_ns"] = VERSION, net.SUBSYSTEM, kind, time.monotonic_ns()
        made["request"], made["worker"], made["depth"] = -1, worker, depth
        return made

    def _send(self, messages: list[Any]) -> None:
        if messages:
            self._lost = self._link.send_messages(np.concatenate(messages)) < len(messages) or self._lost

    def close(self) -> None:
        """The kernel chooses; the agent sees the host go."""
        self._table.leave()
        self._link.close()

    def __enter__(self) -> TableSteering:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
