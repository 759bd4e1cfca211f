"""Scheduling, as hostd serves it: who the members of an enclave are, what drives them, and what their agent is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from waveos.handover import Message
from waveos.host import privilege
from waveos.host.enclave import Cgroup, Command, Enclave, Processes, parse_cpus
from waveos.host.restore import Journal
from waveos.host.sched import mechanism
from waveos.host.settings import Settings

SUBSYSTEM = 1
PRIORITY = 60
"""Of hostd: real-time, above the threads that it schedules."""
TICK_MS = 10
"""Between two rounds of the mechanism, which enforces most things when the doorbell rings: is the agent alive, were messages lost?"""
AGENT_ASKS = True
"""Its agent asks hostd which policy to run."""
THREADS = 4_096


def find_members(told: Settings) -> Enclave:
    """The enclave; a command is started, and waits. Raises ConfigError."""
    cpus = parse_cpus(told.cpus)
    if told.pids:
        return Processes(told.enclave, cpus, told.pids)
    if told.cgroup:
        return Cgroup(told.enclave, cpus, told.cgroup)
    user = privilege.account(told.command_user) if told.command_user else None
    return Command(told.enclave, cpus, told.command, (user.uid, user.gid) if user else None)


def claims(enclave: Enclave) -> set[tuple[str, Any]]:
    """What must not be another enclave's, as (kind, what) of the journals."""
    return {("thread", tid) for tid in enclave.threads()}


def make(told: Settings, enclave: Enclave, journal: Journal, _say: Callable[[str], None]) -> mechanism.Mechanism:
    """The mechanism. Raises ConfigError, MissingError."""
    return mechanism.make(told.mechanism, enclave, journal, **told.settings)


def facts(told: Settings, enclave: Enclave, driver: Any) -> Message:
    """What its agent has to know to compile for it."""
    return {"cpus": len(enclave.cpus), "threads": getattr(driver, "threads", THREADS), "ahead": told.ahead, "bell": driver.bell}
