"""Memory, as hostd serves it: the processes of one cgroup, the mechanism behind rings that an agent polls, and what becomes of both when it is silent."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from waveos.errors import ConfigError, WaveError
from waveos.explain import explain_errors
from waveos.handover import Message
from waveos.host.enclave import find_cgroup
from waveos.host.memory.advise import Advisor
from waveos.host.memory.cgroup import MemoryCgroup
from waveos.host.memory.damon import Damon
from waveos.host.memory.faults import Faults
from waveos.host.memory.mechanism import SEND_AT_ONCE, MemoryMechanism
from waveos.host.memory.referenced import Referenced
from waveos.host.restore import Entry, Journal, kind
from waveos.host.rings import Rings
from waveos.host.settings import Settings
from waveos.memory.records import DECISION, SUBSYSTEM

PRIORITY = 0
"""An ordinary process: a look at all pages takes it tens of milliseconds, which nobody shall wait for."""
TICK_MS = 50
"""Between two rounds of the mechanism. Reclaiming knows no hurry, and each round takes half a millisecond of a host's CPU, which is what offload is to free."""
AGENT_ASKS = False
__all__ = ["AGENT_ASKS", "PRIORITY", "SUBSYSTEM", "TICK_MS", "claims", "facts", "find_members", "make"]


class Members:
    """The processes of a cgroup of the memory controller, as an enclave. The mechanism looks after them itself."""

    cpus: list[int] = []

    def __init__(self, path: Path) -> None:
        self.path = path

    def threads(self) -> list[int]:
        """None: memory is managed by process."""
        return []

    elders = threads

    def over(self) -> bool:
        """The cgroup was removed."""
        return not self.path.is_dir()

    def close(self) -> None:
        """Let go."""

    def describe(self) -> str:
        """Its path."""
        return f"cgroup {self.path}"


def find_members(told: Settings) -> Members:
    """The enclave. Raises ConfigError."""
    if told.pids or told.command:
        raise ConfigError("memory is managed by cgroup: put the processes into one of the memory controller, and name it with --cgroup")
    assert told.cgroup
    return Members(find_cgroup(told.cgroup, ("memory", "", "unified")))


def claims(enclave: Members) -> set[tuple[str, Any]]:
    """What must not be another enclave's, as (kind, what) of the journals."""
    return {("cgroup", os.fspath(enclave.path))}


@kind("cgroup")
def _undo_cgroup(_entry: Entry, _dry_run: bool) -> None:
    """It is only said whose it is."""


def facts(_told: Settings, _enclave: Members, _driver: Any) -> Message:
    """Its agent compiles nothing for it."""
    return {}


class Choices(BaseModel):
    """What `--setting` (or `[settings]`) may say."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    batch_kib: int = Field(
        2_048, ge=4, le=1 << 20, multiple_of=4, description="KiB of a batch, which is a mapping of that size: a multiple of 4, 4 to 1048576"
    )
    pass_ms: float = Field(2_400.0, gt=0, le=1e7, description="milliseconds, more than 0, between two looks at all pages at least")
    quota_mib_per_s: float = Field(0.0, ge=0, le=1e6, description="MiB, 0 to 1000000, that may be reclaimed a second; 0: as the policy likes")
    stall_share: float = Field(0.0, ge=0, le=1, description="the share of time, 0 to 1, that may be lost to stalls; 0: as the policy likes")
    silent_s: float = Field(
        10.0, gt=0, le=1e6, description="seconds, more than 0, after which an agent that gives no sign of life counts as lost until it does"
    )


def make(told: Settings, enclave: Members, journal: Journal, say: Callable[[str], None]) -> Driver:
    """The mechanism behind rings. Raises ConfigError."""
    try:
        choices = Choices.model_validate(told.settings)
    except ValidationError as error:
        raise ConfigError(explain_errors(error, Choices, told.settings, source="memory's settings")) from None
    journal.note("cgroup", __name__, what=os.fspath(enclave.path))
    return Driver(MemoryCgroup(enclave.path, journal), choices, _find_sensor(choices.batch_kib << 10, journal, say), say)


def _find_sensor(batch_bytes: int, journal: Journal, say: Callable[[str], None]) -> Damon | Referenced:
    try:
        return Damon(batch_bytes, journal)
    except ConfigError as error:
        say(f"{error}: accesses are seen by mapping, so only what is split into mappings of {batch_bytes >> 10} KiB is managed")
        return Referenced(batch_bytes)


class Driver:
    """As `waveos.host.sched.mechanism.Mechanism`, for memory."""

    name = "memory"
    bell = 0
    capabilities = ("CAP_SYS_PTRACE",)
    """Beside hostd's own: other processes' access bits, and advice for them."""

    def __init__(self, cgroup: MemoryCgroup, choices: Choices, sensor: Damon | Referenced, say: Callable[[str], None]) -> None:
        self._say = say
        self._silent_ns = int(choices.silent_s * 1e9)
        settings = choices.model_dump(exclude={"silent_s"})
        self.mechanism = MemoryMechanism(cgroup, advisor=Advisor, sensor=sensor, faults=self._watch_faults(), say=say, **settings)
        self._rings = Rings(SUBSYSTEM)
        self.queues = self._rings.queues
        self.doorbell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)  # plain agents do not ring it
        self.events: list[int] = []
        self._here = self._silent = False
        self._came_ns = 0
        self._lost = self._silences = 0

    def _watch_faults(self) -> Faults | None:
        """The kernel's own count of faults, where it is to be had."""
        try:
            return Faults()
        except WaveError as error:
            self._say(f"no BPF ({str(error).splitlines()[0]}): what comes back from swap is seen at the next pass")
            return None

    def adopt(self, pid: int) -> None:
        """Never asked for: an enclave of memory has no threads."""

    release = adopt

    def attend(self) -> None:
        """Somebody rang."""
        os.eventfd_read(self.doorbell)

    def tick(self) -> None:
        """Once round: the sensor, whether the agent lives, its decisions, and what it is to hear."""
        self.mechanism.tick()
        if self._here:
            self._look_after_agent()
            decisions = self._rings.poll(DECISION)
            if len(decisions):
                self.mechanism.apply(decisions)
        self._send()

    def _look_after_agent(self) -> None:
        silent = time.monotonic_ns() - max(self._came_ns, self._rings.heartbeat_ns()) > self._silent_ns
        if silent and not self._silent:
            self._silences += 1
            self._say(f"the agent gives no sign of life for {self._silent_ns / 1e9:g} s: until it does, the limit is the operator's")
            self.mechanism.agent_gone()
        elif self._silent and not silent:
            self.mechanism.introduce()
        self._silent = silent

    def _send(self) -> None:
        records = self.mechanism.take_messages()
        if not self._here:
            return
        for first in range(0, len(records), SEND_AT_ONCE):
            part = records[first : first + SEND_AT_ONCE]
            if self._rings.send(part) < len(part):  # what is lost is lost: the agent begins anew
                self._lost += 1
                self.mechanism.introduce()
                return

    def agent_here(self, generation: int) -> None:
        """A new agent is about to join: empty rings, and the whole state."""
        self._rings.begin(generation)
        self._here, self._silent, self._came_ns = True, False, time.monotonic_ns()
        self.mechanism.introduce()
        self._send()

    def agent_gone(self) -> None:
        """Nobody decides: the limit is the operator's again."""
        self._here = False
        self._rings.retire()
        self.mechanism.agent_gone()

    def counters(self) -> dict[str, Any]:
        """What has happened so far."""
        return {**self.mechanism.facts(), "replays_after_loss": self._lost, "silences": self._silences}

    def close(self) -> None:
        """Everything as it was. Twice does no harm."""
        self._here = False
        self.mechanism.close()
        self._rings.close()
        if self.doorbell >= 0:
            os.close(self.doorbell)
        self.doorbell = -1
