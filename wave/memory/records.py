"""The 64-byte records of memory management, declared once."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from waveos.meaning import Told
from waveos.record import record

Records = npt.NDArray[np.void]

SUBSYSTEM = 2
PLAIN = True
"""Decisions are made in milliseconds: policies are plain Python objects (`waveos.policy.plain`)."""
SUBJECT = "region"
GROUP = 64
"""Batches that one record names."""


class Message(Told):
    """What the host tells the agent. A policy handles a message by a method of its lower-case name."""

    REGION_MAPPED = 1, "a region entered the enclave, or is told again: it has msg.count batches of msg.bytes each, all to be taken for hot"
    REGION_UNMAPPED = 2, "the region is gone: its process unmapped it, exited or ran another program"
    ACCESSED = 3, "access bits: msg.batches were scanned, and msg.touched of them had been accessed since their last scan"
    REFAULTED = 4, "msg.batches came back from swap because they were touched; msg.count pages, and the process waited msg.stall_us for them"
    PRESSURE = 5, "the enclave as a whole since the last such message: its tasks stalled on memory for msg.stall_us; msg.bytes are resident now"
    BUDGET_CHANGED = 6, "what the operator allows: msg.bytes moved per second at most, and msg.stall_us of stall per second"
    TIMER_EXPIRED = 13, "the timer numbered msg.seq that the policy set with txns.wake_after is past; msg.time_ns is the agent's clock"
    TXN_FAILED = 14, "a decision was not committed: msg.outcome says why; without a handler a failed scan or reclaim comes as accessed, all touched"
    TXN_COMMITTED = 15, "a decision was applied; msg.kib were moved"
    TXN_OUTCOME = 32, "host to runtime: what became of a transaction; policies see txn_failed or txn_committed"
    BATCH_END = 33, "the queue is drained: a policy decides here what it does not decide on single messages; msg.time_ns is the agent's clock"
    RESYNC = 34, "host to runtime: messages were lost; forget everything, the host's whole state follows"


class Decision(Told):
    """What the agent wants done with page batches of one region, or with the enclave."""

    SCAN = 1, "read and clear the access bits of these batches now; the answer is accessed"
    RECLAIM = 2, "these batches are cold: write them to swap and free their pages, at most `bytes` of them"
    BRING_BACK = 3, "these batches will be needed: read them from swap ahead of the fault, at most `bytes`"
    KEEP = 4, "these batches are hot: drop what is left of earlier orders to reclaim them"
    LIMIT = 5, "the enclave may have `bytes` resident; the kernel picks what goes; 0: no limit"


_WHERE = [("region", "<i4"), ("first", "<i4"), ("batches", "<u8")]

MESSAGE: np.dtype[np.void] = record(
    [
        *_WHERE,
        ("touched", "<u8"),
        ("bytes", "<i8"),
        ("stall_us", "<u4"),
        ("count", "<u4"),
    ]
)
"""A message. `seq` is the region's; `region` is -1 where the message is about the enclave as a whole."""

OUTCOME: np.dtype[np.void] = record(
    [*_WHERE, ("txn", "<i8"), ("age_ns", "<i8"), ("kib", "<u4"), ("outcome", "u1"), ("decision", "u1"), ("spare", "<u2")]
)
"""An outcome (type TXN_OUTCOME) repeats what was decided; `kib` is what was moved, `age_ns` the age of the state behind the decision."""

DECISION: np.dtype[np.void] = record([*_WHERE, ("bytes", "<i8"), ("txn", "<i8"), ("decided_ns", "<i8")])
"""A decision. `seq` is the region's sequence number it was made on, `bytes` its quota (of LIMIT: the limit)."""

MESSAGE_TYPES: dict[str, int] = {m.name.lower(): m.value for m in Message}
DECISION_TYPES: dict[str, int] = {d.name.lower(): d.value for d in Decision}
HANDLERS: dict[str, int] = {m.name.lower(): m.value for m in Message if m not in (Message.TXN_OUTCOME, Message.RESYNC)}
"""Names a policy may give its handlers."""
GONE = frozenset({int(Message.REGION_UNMAPPED)})


def redeliver(outcomes: Records) -> Records:
    """What policies without `txn_failed` are told of failed decisions: batches that could not be scanned or reclaimed count as touched."""
    lost = outcomes[np.isin(outcomes["decision"], (Decision.SCAN, Decision.RECLAIM))]
    told: Any = np.zeros(len(lost), MESSAGE)
    for name in ("version", "subsystem", "seq", "time_ns", "region", "first", "batches"):
        told[name] = lost[name]
    told["type"], told["touched"] = Message.ACCESSED, lost["batches"]
    return np.asarray(told)
