"""Steering by the kernel itself: sockets that share a port, and a table, set by decisions, that says which of them a flow's packets go to.

A datagram is steered each by itself; a TCP connection when it is opened, with all that comes over it. So gRPC is steered per connection: a client that
keeps one connection keeps one worker, whatever it asks.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from waveos.errors import ConfigError
from waveos.host.bpf import Object
from waveos.net.records import MAX_WORKERS, OUTCOME, SUBSYSTEM, TABLE_ENTRIES, Decision, Message
from waveos.outcome import Outcome
from waveos.record import VERSION

OBJECT = Path(__file__).with_name("reuseport.bpf.o")
ENTRIES = TABLE_ENTRIES
KERNELS_CHOICE = 0xFFFF_FFFF
SO_ATTACH_REUSEPORT_EBPF = 52


class ReuseportTable:
    """The program and its table. At first every entry is the kernel's choice. It stays while a socket of the group lives; closing it here only lets go."""

    def __init__(self) -> None:
        self._object = Object(OBJECT)
        self._table = self._object.map("table").mmap("u8")
        self._table[:] = KERNELS_CHOICE
        self._counters = self._object.map("counters").mmap([("steered", "u8"), ("left", "u8")])
        self._workers: set[int] = set()

    def join(self, sock: socket.socket, worker: int) -> None:
        """Make a socket (SO_REUSEPORT, bound; for TCP: listening) the worker's. Raises ConfigError if the number cannot be one, or the socket cannot
        take part.
        """
        if not 0 <= worker < MAX_WORKERS:
            raise ConfigError(f"worker {worker} of 0..{MAX_WORKERS - 1}")
        try:
            sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_EBPF, self._object.program("choose").fd)
            self._object.map("workers").set(worker, sock.fileno())
        except OSError as error:
            raise ConfigError(
                f"the socket cannot be steered to ({error.strerror}): set SO_REUSEPORT before bind, and for TCP listen first"
            ) from error
        self._workers.add(worker)

    def set_entry(self, index: int, worker: int | None) -> None:
        """Entry `index` of 0..ENTRIES-1 names the worker from now on; None: the kernel chooses."""
        self._table[index] = KERNELS_CHOICE if worker is None else worker

    def apply(self, decisions: npt.NDArray[np.void], now_ns: int) -> npt.NDArray[np.void]:
        """Carry out SET_ENTRY and STEER_FLOW (the entry of the flow's hash); an outcome for each decision, [n] net.OUTCOME."""
        outcomes = np.zeros(len(decisions), OUTCOME)
        outcomes["version"], outcomes["subsystem"], outcomes["type"], outcomes["time_ns"] = VERSION, SUBSYSTEM, Message.TXN_OUTCOME, now_ns
        for name in ("seq", "request", "worker", "flow", "txn"):
            outcomes[name] = decisions[name]
        outcomes["age_ns"] = now_ns - decisions["time_ns"]
        for decision, outcome in zip(decisions, outcomes, strict=True):
            outcome["outcome"] = self._apply(decision)
        return outcomes

    def _apply(self, decision: Any) -> Outcome:
        kind, worker = int(decision["type"]), int(decision["worker"])
        if kind not in (Decision.SET_ENTRY, Decision.STEER_FLOW):
            return Outcome.INVALID
        index = int(decision["index"]) if kind == Decision.SET_ENTRY else int(decision["flow"]) % ENTRIES
        if not 0 <= index < ENTRIES:
            return Outcome.INVALID
        if worker not in self._workers and not (kind == Decision.SET_ENTRY and worker == -1):
            return Outcome.NOT_IN_ENCLAVE
        self.set_entry(index, None if worker < 0 else worker)
        return Outcome.COMMITTED

    def leave(self, worker: int | None = None) -> None:
        """The kernel chooses again: where the worker was named, or, without one, everywhere."""
        if worker is None:
            self._table[:] = KERNELS_CHOICE
        else:
            self._table[self._table == worker] = KERNELS_CHOICE
            self._workers.discard(worker)

    def counters(self) -> dict[str, int]:
        """Datagrams and connections that the table steered, and those left to the kernel's choice."""
        return {name: int(self._counters[name][0]) for name in ("steered", "left")}

    def close(self) -> None:
        """Let go of the table: the sockets keep the program, and the table as it is, while they live."""
        self._object.close()
