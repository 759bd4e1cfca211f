"""The network, as hostd serves it: the IPU's two ports, opened anew for each agent, and the workers behind them, which are looked after."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from waveos.errors import ConfigError, LinkError, WaveError
from waveos.handover import Message
from waveos.host.net import topology
from waveos.host.net.ports import RING_SIZE, Ports
from waveos.host.restore import Entry, Journal, kind
from waveos.host.settings import Settings
from waveos.names import nearest
from waveos.net.records import MAX_WORKERS, SUBSYSTEM
from waveos.process import start_time

PRIORITY = 0
"""An ordinary process: packets never wait for it."""
TICK_MS = 10
AGENT_ASKS = True
AGENT = "waveos.agents.net.agent", "xsk"
"""Who serves the ports, and by which scheme."""
SETTINGS = {"network": "", "port": 5_000, "ring_size": RING_SIZE}
"""What `--setting` (or `[settings]`) may say. The network is that of `wave net up`, by default the one of the enclave's name; the port is the service's;
worker w, the enclave's process number w, has port + 1 + w as well."""

__all__ = ["AGENT", "AGENT_ASKS", "PRIORITY", "SUBSYSTEM", "TICK_MS", "claims", "facts", "find_members", "make"]


class Workers:
    """The processes that serve requests, by number, in the order in which they were named."""

    cpus: list[int] = []

    def __init__(self, network: str, pids: list[int]) -> None:
        self.network, self.pids = network, pids
        self._starts = [start_time(pid) for pid in pids]
        for pid, start in zip(pids, self._starts, strict=True):
            if start is None:
                raise ConfigError(f"--pids: there is no process {pid}")

    def gone(self) -> set[int]:
        """The numbers of those that have ended."""
        return {number for number, (pid, start) in enumerate(zip(self.pids, self._starts, strict=True)) if start_time(pid) != start}

    def threads(self) -> list[int]:
        """None: nothing is done to them."""
        return []

    elders = threads

    def over(self) -> bool:
        """No worker is left."""
        return len(self.gone()) == len(self.pids)

    def close(self) -> None:
        """Let go."""

    def describe(self) -> str:
        """Which network, and who."""
        return f"network {self.network}, workers {', '.join(map(str, self.pids))}"


def _settings(told: Settings) -> dict[str, Any]:
    for name in told.settings:
        if name not in SETTINGS:
            raise ConfigError(f"the network has no setting {name!r}{nearest(name, SETTINGS)}; it has: {', '.join(SETTINGS)}")
    chosen = {**SETTINGS, **told.settings}
    if not isinstance(chosen["port"], int) or not 1 <= chosen["port"] <= 65_535 - MAX_WORKERS - 1:
        raise ConfigError(f"setting port = {chosen['port']}: the service's UDP port, 1 to {65_535 - MAX_WORKERS - 1}")
    return chosen


def find_members(told: Settings) -> Workers:
    """The enclave. Raises ConfigError."""
    if not told.pids:
        raise ConfigError("an enclave of the network is named by its workers: --pids with their processes, in the order of their ports")
    if len(told.pids) > MAX_WORKERS:
        raise ConfigError(f"{len(told.pids)} workers; at most {MAX_WORKERS}")
    if told.agent.record or told.agent.measure:
        raise ConfigError("the network's agent records and measures nothing: leave agent.record and agent.measure out")
    return Workers(_settings(told)["network"] or told.enclave, told.pids)


def claims(enclave: Workers) -> set[tuple[str, Any]]:
    """What must not be another enclave's, as (kind, what) of the journals."""
    return {("network", enclave.network)}


@kind("network")
def _undo_network(_entry: Entry, _dry_run: bool) -> None:
    """It is only said whose it is: ports and XDP programs go with their process."""


def facts(_told: Settings, enclave: Workers, _driver: Any) -> Message:
    """What its agent has to know to compile for it."""
    return {"workers": len(enclave.pids)}


def make(told: Settings, enclave: Workers, journal: Journal, say: Callable[[str], None]) -> Driver:
    """The mechanism; its ports are opened once and closed again, so that what is wrong is said now. Raises ConfigError, MissingError."""
    chosen = _settings(told)
    network = topology.find(enclave.network)
    journal.note("network", __name__, what=enclave.network)
    driver = Driver(network, enclave, chosen["port"], chosen["ring_size"], say)
    driver.open().close()
    return driver


class Driver:
    """As `waveos.host.sched.mechanism.Mechanism`, for the network: it hands the packets' rings themselves over, and is asked nothing while they flow."""

    name = "xsk"
    capabilities = ("CAP_SYS_ADMIN", "CAP_NET_ADMIN", "CAP_NET_RAW")
    """Beside hostd's own: the network's namespaces, XDP programs, AF_XDP sockets, for the next agent."""

    def __init__(self, network: topology.Network, enclave: Workers, port: int, ring_size: int, say: Callable[[str], None]) -> None:
        self._network, self._enclave, self._port, self._ring_size, self._say = network, enclave, port, ring_size, say
        self._ports: Ports | None = None
        self._gone: set[int] = set()
        self._past: dict[str, int] = {}
        self._silent = self._said = False
        self._silences = 0
        self.doorbell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)  # nobody rings it
        self.events: list[int] = []

    def open(self) -> Ports:
        """New ports for a new agent."""
        return Ports(self._network, port=self._port, workers=len(self._enclave.pids), ring_size=self._ring_size)

    def adopt(self, pid: int) -> None:
        """Never asked for: an enclave of the network has no threads."""

    release = adopt

    def attend(self) -> None:
        """Somebody rang."""
        os.eventfd_read(self.doorbell)

    def tick(self) -> None:
        """Once round: which workers live, and whether the agent serves."""
        if (gone := self._enclave.gone()) != self._gone:
            self._say(f"workers gone: {', '.join(map(str, sorted(gone))) or 'none'}")
            self._gone = gone
            if self._ports is not None:
                self._ports.mark_gone(gone)
        if self._ports is not None and (beat_ns := self._ports.heartbeat_ns):
            silent = time.monotonic_ns() - beat_ns > int(self._ports.client.control["patience_ns"][0])
            if silent and not self._silent:
                self._silences += 1
                if not self._said:
                    self._say("the agent gives no sign of life: requests take the kernel's path until it does; further silences are counted")
                self._said = True
            self._silent = silent

    def agent_here(self, _generation: int) -> None:
        """A new agent is about to serve: ports that nobody has served. Raises LinkError, which shows the agent out, if they cannot be had."""
        self.agent_gone()
        try:
            self._ports = self.open()
        except WaveError as error:  # say, that the agent holds on to the sockets that it had
            self._say(str(error))
            raise LinkError(str(error)) from error
        self._ports.mark_gone(self._gone)

    def hand_over(self) -> tuple[Message, list[int]]:
        """What the agent is told, and given, once it is ready."""
        assert self._ports is not None
        return self._ports.facts(), self._ports.descriptors()

    def agent_gone(self) -> None:
        """Nobody serves: both interfaces are the kernel's."""
        if self._ports is not None:
            self._past = self._packets()
            self._ports.close()
        self._ports, self._silent, self._said = None, False, False

    def counters(self) -> dict[str, Any]:
        """What has become of packets so far, under all agents."""
        serving = self._ports is not None and self._ports.heartbeat_ns > 0 and not self._silent
        return {"serving": serving, "silences": self._silences, "workers_gone": len(self._gone), **self._packets()}

    def _packets(self) -> dict[str, int]:
        now = self._ports.counters() if self._ports is not None else {}
        return {name: self._past.get(name, 0) + now.get(name, 0) for name in {**self._past, **now}}

    def close(self) -> None:
        """Everything as it was. Twice does no harm."""
        self.agent_gone()
        if self.doorbell >= 0:
            os.close(self.doorbell)
        self.doorbell = -1
