"""The 64-byte records of GPU serving, declared once."""

from __future__ import annotations

from enum import IntFlag
from typing import Any

import numpy as np
import numpy.typing as npt

from waveos.meaning import Told
from waveos.record import record

Records = npt.NDArray[np.void]

SUBSYSTEM = 4
PLAIN = True
"""Decisions are made in milliseconds: policies are plain Python objects (`waveos.policy.plain`)."""
SUBJECT = "request"
BLOCKS_PER_RECORD = 4


class Tier(Told):
    """Where the KV of a block is held; a block may be in several."""

    DEVICE = 1, "GPU memory"
    HOST = 2, "pinned host memory"
    STORAGE = 4, "files"


class Message(Told):
    """What the host tells the agent. A policy handles a message by a method of its lower-case name."""

    INSTANCE_NEW = 1, "an engine instance: msg.count ranks, msg.outputs KV heads, KV pools of msg.tokens on the device and msg.free in host memory"
    REQUEST_ARRIVED = (
        2,
        "a request: msg.tokens of prompt, msg.outputs to generate at most; its context follows in msg.count records; front=1: it runs (replay)",
    )
    CONTEXT = 3, "up to four blocks of a request's prompt, in order, of msg.tokens each; equal ids mean an equal prompt up to there"
    PREFIX_MATCHED = 4, "storage holds the KV of the request's first msg.tokens"
    BATCH_WANTED = 5, "the instance can be given a batch (level-triggered); front=1: one still runs, so this one is formed ahead"
    BATCH_DONE = 6, "a prefill batch of msg.count requests is computed: msg.tokens, and their KV is on the device"
    TRANSFER_DONE = 7, "msg.tokens of a block (msg.key) or a request have reached msg.tier; 0 tokens: what was asked for could not be had"
    REQUEST_DONE = 8, "all tokens are generated; its KV stays as cache"
    REQUEST_GONE = 9, "the client left, or the request was refused; its KV stays as cache"
    REQUEST_RETURNED = 10, "the request waits from its token msg.tokens on: its batch aborted, or its KV was lost; front=1: it waits no more, it runs"
    KV_LOST = 11, "the host no longer holds block msg.key in msg.tier, and no decision asked for that; msg.cache_seq is the cache's new number"
    MEMORY_LEVEL = 12, "msg.free tokens are free in msg.tier"
    TIMER_EXPIRED = 13, "the timer numbered msg.seq that the policy set with txns.wake_after is past; msg.time_ns is the agent's clock"
    TXN_FAILED = 14, "a decision was not committed: msg.outcome says why; without a handler the requests of a batch come as request_returned"
    TXN_COMMITTED = 15, "a decision was applied"
    RANK_FAILED = 16, "GPU msg.rank of the instance is lost; msg.count are alive; nothing runs until it is told how to recover"
    RANK_BACK = 17, "GPU msg.rank can be used again; msg.count would be alive"
    RECOVERED = 18, "the instance runs on msg.count ranks, after msg.key ns"
    KV_HELD = (
        19,
        "block msg.key, of msg.tokens, after block msg.cache_seq, is held in the tiers of msg.tier: in a replay, or when it could not be evicted",
    )
    TXN_OUTCOME = 32, "host to runtime: what became of a transaction; policies see txn_failed or txn_committed"
    BATCH_END = 33, "the queue is drained; msg.time_ns is the agent's clock"
    RESYNC = 34, "host to runtime: messages were lost; forget everything, the host's whole state follows"


class Decision(Told):
    """What the agent wants done. One transaction is one record, or FORM_BATCH and its parts: `more` records of it follow."""

    FORM_BATCH = 1, "prefill the requests of the `tokens` parts that follow; `key`: the cache's sequence number this was made on; `how`: BatchFlag"
    PART = 2, "compute `tokens` of the request's prompt from token `key` on; all before it is on the device, or in host memory and is loaded"
    LOAD = 3, "bring what host memory holds of the request's first `tokens` to the device, ahead of its batch"
    PREFETCH = 4, "bring what storage holds of the request's first `tokens` to host memory"
    CANCEL = 5, "stop the request's prefetch; what has arrived stays"
    BACK_UP = 6, "copy block `key` and the `tokens` - 1 blocks before it to the tier `how`"
    EVICT = 7, "drop block `key` and the `tokens` - 1 blocks before it from the tier `how`"
    ROUTE = 8, "the request is served by `instance`; `how`: its home rank, for heads that are not spread over all"
    PLACE = 9, "who owns which KV head from now on; `how`: Placement"
    RECOVER = 10, "go on with the ranks that are alive; `how`: Recovery"
    REFUSE = 11, "the request cannot be served: answer it with an error"


class BatchFlag(IntFlag):
    """How a batch is run."""

    DECODE_FIRST = 1  # decode while the batch's loads are under way, and begin when they end (bubble filling)
    MIXED = 2  # running requests decode in the same iterations


class Placement(Told):
    """How KV heads are dealt to n ranks."""

    STATIC = 0, "in every layer the same ranks own one head more than the others"
    CYCLIC = 1, "as STATIC, but the ranks that own one more rotate with the layer: equal memory, unequal time in each layer"
    HYBRID = 2, "heads that divide evenly are spread; the rest of a request's heads live on its home rank: equal memory and time"


class Recovery(Told):
    """Where lost state comes from when a rank has failed."""

    RECOMPUTE = 0, "every running request is prefilled again; weights are sharded anew from host memory"
    HOST = 1, "lost KV comes from its copy in host memory; weights are sharded anew from host memory"
    FULL = 2, "lost KV comes from its copy in host memory, over all wires; of the weights only what was lost moves"
    ORACLE = 3, "no data moves: a bound"


MESSAGE: np.dtype[np.void] = record(
    [
        ("request", "<i4"),
        ("instance", "<i2"),
        ("rank", "<i2"),
        ("key", "<u8"),
        ("cache_seq", "<u8"),
        ("tokens", "<i4"),
        ("outputs", "<i4"),
        ("free", "<i4"),
        ("count", "<u2"),
        ("tier", "u1"),
        ("front", "u1"),
    ]
)
"""A message. `seq` is the request's; `request` is -1 where the message is about an instance. `cache_seq` counts what left the cache unasked."""

CONTEXT: np.dtype[np.void] = record([("request", "<i4"), ("tokens", "<i4"), ("blocks", f"({BLOCKS_PER_RECORD},)<u8")])
"""A message of type CONTEXT. Block id 0 stands for none."""

OUTCOME: np.dtype[np.void] = record(
    [
        ("request", "<i4"),
        ("instance", "<i2"),
        ("more", "<u2"),
        ("key", "<u8"),
        ("txn", "<i8"),
        ("age_ns", "<i8"),
        ("tokens", "<i4"),
        ("outcome", "u1"),
        ("decision", "u1"),
        ("spare", "<u2"),
    ]
)
"""An outcome (type TXN_OUTCOME) for each record of a transaction; all of one transaction are equal."""

DECISION: np.dtype[np.void] = record(
    [
        ("request", "<i4"),
        ("instance", "<i2"),
        ("more", "<u2"),
        ("key", "<u8"),
        ("tokens", "<i4"),
        ("how", "<i4"),
        ("txn", "<i8"),
        ("decided_ns", "<i8"),
    ]
)
"""A decision. `seq` is the request's sequence number it was made on; -1 where it names none."""

MESSAGE_TYPES: dict[str, int] = {m.name.lower(): m.value for m in Message}
DECISION_TYPES: dict[str, int] = {d.name.lower(): d.value for d in Decision}
HANDLERS: dict[str, int] = {m.name.lower(): m.value for m in Message if m not in (Message.TXN_OUTCOME, Message.RESYNC)}
"""Names a policy may give its handlers."""
GONE = frozenset({int(Message.REQUEST_DONE), int(Message.REQUEST_GONE)})
OPENS = int(Message.INSTANCE_NEW)


def redeliver(outcomes: Records) -> Records:
    """What policies without `txn_failed` are told of failed decisions: the requests of a batch wait again, from where they were."""
    lost = outcomes[outcomes["decision"] == Decision.PART]
    told: Any = np.zeros(len(lost), MESSAGE)
    for name in ("version", "subsystem", "seq", "time_ns", "request", "instance"):
        told[name] = lost[name]
    told["type"], told["tokens"] = Message.REQUEST_RETURNED, lost["key"]
    made: Records = told
    return made
