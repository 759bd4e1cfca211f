"""GPU serving: which requests form the next batch, which KV moves between tiers, who owns which head, what to do when a GPU dies.

An *instance* is one copy of the model on its ranks. A request's prompt is a row of *blocks*, named by ids that stand for the whole prompt up to there, so
two requests share a prefix where their ids agree. The KV of a block is held in *tiers*. Decode needs no decision: what is prefilled decodes until it is done.

A policy's handler has a message type's name and gets `(self, msg, txns)`, or `(self, msgs, txns)` for a run of messages as one array of `MESSAGE`.

Two sequence numbers guard a batch. Each request counts its state changes, and a part carries the number it was made on. Each instance's cache counts what
left it unasked (a GPU died, memory was taken back): FORM_BATCH carries that. What the policy itself ordered cannot surprise it, because decisions are applied
in the order they were made. If either number has moved on, the batch and all its parts are *stale* and nothing of it is applied.
"""

from __future__ import annotations

from waveos.serving.orders import back_up, cancel, evict, form_batch, load, place, prefetch, recover, refuse, route
from waveos.serving.records import (
    BLOCKS_PER_RECORD,
    CONTEXT,
    DECISION,
    DECISION_TYPES,
    GONE,
    HANDLERS,
    MESSAGE,
    MESSAGE_TYPES,
    OPENS,
    OUTCOME,
    PLAIN,
    SUBJECT,
    SUBSYSTEM,
    BatchFlag,
    Decision,
    Message,
    Placement,
    Recovery,
    Tier,
    redeliver,
)

__all__ = [
    "BLOCKS_PER_RECORD",
    "CONTEXT",
    "DECISION",
    "DECISION_TYPES",
    "GONE",
    "HANDLERS",
    "MESSAGE",
    "MESSAGE_TYPES",
    "OPENS",
    "OUTCOME",
    "PLAIN",
    "SUBJECT",
    "SUBSYSTEM",
    "BatchFlag",
    "Decision",
    "Message",
    "Placement",
    "Recovery",
    "Tier",
    "back_up",
    "cancel",
    "evict",
    "form_batch",
    "load",
    "place",
    "prefetch",
    "recover",
    "redeliver",
    "refuse",
    "route",
]
