"""The network: which worker gets which request. What the host says, what the agent decides, and the orders a policy gives.

A *request* is what a packet (or a few) asks of the service; a *worker* is a queue of the host's with the core or process behind it; a *flow* is
one client's stream of requests. `self.cpus` of a policy is the number of workers. A policy's handler has a message type's name (`request_arrived`,
`worker_ready`, ...) and gets `(self, msg, txns)`; `msg` has the fields of `MESSAGE`, `txns` is handed on to `steer`, `shed` and the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from waveos.net.records import (
    CLASSES,
    DECISION,
    DECISION_TYPES,
    HANDLERS,
    MAX_REQUESTS,
    MAX_WORKERS,
    MESSAGE,
    MESSAGE_TYPES,
    OUTCOME,
    SUBSYSTEM,
    Decision,
    Message,
)

if TYPE_CHECKING:
    from waveos.net.orders import ORDERS, depth, mark, set_entry, set_rate, shallowest, shed, steer, steer_flow

_ORDERS = ("ORDERS", "depth", "mark", "set_entry", "set_rate", "shallowest", "shed", "steer", "steer_flow")
__all__ = [
    "CLASSES",
    "DECISION",
    "DECISION_TYPES",
    "HANDLERS",
    "MAX_REQUESTS",
    "MAX_WORKERS",
    "MESSAGE",
    "MESSAGE_TYPES",
    "ORDERS",
    "OUTCOME",
    "SUBSYSTEM",
    "Decision",
    "Message",
    "depth",
    "mark",
    "set_entry",
    "set_rate",
    "shallowest",
    "shed",
    "steer",
    "steer_flow",
]


def __getattr__(name: str) -> Any:
    """The orders bring numba with them, so they come when asked for: the host's daemon uses the records alone."""
    if name in _ORDERS:
        from waveos.net import orders

        return getattr(orders, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
