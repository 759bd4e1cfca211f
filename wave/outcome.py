"""Outcome: what became of a decision. The host answers every transaction with exactly one."""

from __future__ import annotations

from waveos.meaning import Told


class Outcome(Told):
    """One member a reason, each with its one-line meaning in `meaning`."""

    COMMITTED = 0, "applied, whole"
    STALE = 1, "made on a state that has changed since: the sequence number has moved on; nothing was applied"
    TARGET_GONE = 2, "the thread has exited or left the enclave"
    TARGET_NOT_RUNNABLE = 3, "the thread is blocked"
    TARGET_ON_CPU = 4, "the thread is already on a CPU"
    CPU_UNAVAILABLE = 5, "the thread may not run on the CPU (its affinity), or a higher class of the kernel holds it, or it is offline"
    NOT_IN_ENCLAVE = 6, "the thread or CPU is not the enclave's"
    SUPERSEDED = 7, "a later decision for the same CPU took its place before it was applied"
    INVALID = 8, "the record makes no sense: unknown type, number out of range, other version"
    CONGESTED = 9, "the host had no room for it"
    AGENT_LOST = 10, "the agent that made it was declared lost before it was applied"
