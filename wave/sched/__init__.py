"""Scheduling: which thread runs on which CPU. What the host says, what the agent decides, and the two helpers a policy calls.

A policy's handler has a message type's name (`thread_runnable`, `cpu_idle`, ...) and gets `(self, msg, txns)`; `msg` has the fields of
`MESSAGE`, `txns` is handed on to `run`, `preempt` and `set_timer`. The vocabulary is ghOSt's (google/ghost-userspace, ABI 91).
"""

from __future__ import annotations

from waveos.sched.orders import ORDERS, preempt, run, set_timer
from waveos.sched.records import DECISION, DECISION_TYPES, HANDLERS, MESSAGE, MESSAGE_TYPES, OUTCOME, SUBSYSTEM, Decision, Message

__all__ = [
    "DECISION",
    "DECISION_TYPES",
    "HANDLERS",
    "MESSAGE",
    "MESSAGE_TYPES",
    "ORDERS",
    "OUTCOME",
    "SUBSYSTEM",
    "Decision",
    "Message",
    "preempt",
    "run",
    "set_timer",
]
