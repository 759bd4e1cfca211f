"""Scheduling: which thread runs on which CPU. What the host says, what the agent decides, and the helpers a policy calls.

A policy's handler has a message type's name (`thread_runnable`, `cpu_idle`, ...) and gets `(self, msg, txns)`; `msg` has the fields of
`MESSAGE`, `txns` is handed on to `run`, `preempt`, `demote` and `set_timer`. The vocabulary is ghOSt's (google/ghost-userspace, ABI 91).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from waveos.sched.records import DECISION, DECISION_TYPES, HANDLERS, LEAVING, MESSAGE, MESSAGE_TYPES, OUTCOME, SUBSYSTEM, Decision, Message

if TYPE_CHECKING:
    from waveos.sched.orders import ORDERS, demote, preempt, run, set_timer

__all__ = [
    "DECISION",
    "DECISION_TYPES",
    "HANDLERS",
    "LEAVING",
    "MESSAGE",
    "MESSAGE_TYPES",
    "ORDERS",
    "OUTCOME",
    "SUBSYSTEM",
    "Decision",
    "Message",
    "demote",
    "preempt",
    "run",
    "set_timer",
]


def __getattr__(name: str) -> Any:
    """The orders bring numba with them, so they come when asked for: the host's daemon uses the records alone."""
    if name in ("ORDERS", "demote", "preempt", "run", "set_timer"):
        from waveos.sched import orders

        return getattr(orders, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
