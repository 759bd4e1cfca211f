"""What hostd drives: a mechanism, which owns an enclave's threads on a real kernel and enforces the decisions that an agent leaves in its rings."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from waveos.errors import ConfigError
from waveos.names import nearest

KNOWN = ("priority", "sched_ext")
SCHED_EXT = Path("/sys/kernel/sched_ext")


class Mechanism(Protocol):
    """One enclave on one kernel. Not safe for threads: hostd calls it from one loop."""

    name: str
    queues: dict[str, tuple[int, int]]
    """"messages" and "txns": (descriptor, bytes) of the mmap-able memory of the two rings, in the format of waveos.ring."""
    doorbell: int
    """An eventfd. The agent writes 1 to it after a decision that cannot wait; hostd waits on it."""
    bell: int
    """Flags of the decisions that ring it: KICKED, or PREEMPT where the kernel's side sees by itself what came for a CPU that waits."""
    events: list[int]
    """Further descriptors to wait on."""

    def adopt(self, pid: int) -> None:
        """Take a thread (by the kernel's number) into the enclave; what is changed of it is in the journal first. Twice does no harm.

        Raises ProcessLookupError if it is gone, ConfigError if it cannot be taken.
        """

    def release(self, pid: int) -> None:
        """Let a thread go, as it was."""

    def attend(self) -> None:
        """The doorbell rang, or one of `events` is readable: enforce what is to be enforced."""

    def tick(self) -> None:
        """Called every `TICK_MS`: is the agent alive, were messages lost, does a replay go on?"""

    def agent_here(self, generation: int) -> None:
        """A new agent is about to join: empty rings of that generation (1 to 2**24 - 1, each larger than the last), RESYNC, and the whole state."""

    def agent_gone(self) -> None:
        """The agent is gone: what it staged is forgotten, the kernel's own order of the enclave holds until another comes."""

    def counters(self) -> dict[str, Any]:
        """What has happened so far: outcomes by name, messages, decisions, histograms in ns."""

    def close(self) -> None:
        """Undo everything. Twice does no harm."""


def make(name: str, enclave: Any, journal: Any, **settings: Any) -> Mechanism:
    """The mechanism of that name for an enclave; "auto": sched_ext where the kernel has it, else priority.

    Raises ConfigError for a name that is none, or a kernel that cannot; MissingError where a part is not installed.
    """
    if name == "auto":
        name = "sched_ext" if SCHED_EXT.is_dir() else "priority"
    if name == "priority":
        from waveos.host.sched.priority import Priority

        return Priority(enclave, journal, **settings)
    if name == "sched_ext":
        if not SCHED_EXT.is_dir():
            raise ConfigError("this kernel has no sched_ext (Linux 6.12 or newer, built with CONFIG_SCHED_CLASS_EXT): use --mechanism priority")
        from waveos.host.sched.sched_ext import SchedExt

        return SchedExt(enclave, journal, **settings)
    raise ConfigError(f"no mechanism {name!r}{nearest(name, KNOWN)}; known: auto, {', '.join(KNOWN)}")
