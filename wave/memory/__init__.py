"""Memory: which pages are cold. What the host says, what the agent decides, and the orders a policy gives.

The enclave's memory is *regions* (mappings of its processes), and each region is *page batches* of one size (a batch is what is looked at, reclaimed and
brought back as one). Batches travel 64 at a time: `first` is a multiple of 64, and bit k of `batches` stands for batch `first + k`. So the access bits of
256 GiB in batches of 256 KiB are 16,384 records, 1 MiB, which cross an IPU's link by DMA.

A policy's handler has a message type's name and gets `(self, msg, txns)`, or `(self, msgs, txns)` for a run of messages as one array of `MESSAGE`.

Each region counts the changes of its state in one sequence number, and the host keeps for each batch the number of its last change (mapped, unmapped,
reclaimed, brought back, refaulted). A decision carries the newest number that the policy's runtime had heard of the region: it is *stale*, and nothing of it is
applied, if any batch it names has changed since.
"""

from __future__ import annotations

from waveos.memory.orders import bring_back, keep, limit, reclaim, scan
from waveos.memory.records import (
    DECISION,
    DECISION_TYPES,
    GONE,
    GROUP,
    HANDLERS,
    MESSAGE,
    MESSAGE_TYPES,
    OUTCOME,
    PLAIN,
    SUBJECT,
    SUBSYSTEM,
    Decision,
    Message,
    redeliver,
)

__all__ = [
    "DECISION",
    "DECISION_TYPES",
    "GONE",
    "GROUP",
    "HANDLERS",
    "MESSAGE",
    "MESSAGE_TYPES",
    "OUTCOME",
    "PLAIN",
    "SUBJECT",
    "SUBSYSTEM",
    "Decision",
    "Message",
    "bring_back",
    "keep",
    "limit",
    "reclaim",
    "redeliver",
    "scan",
]
