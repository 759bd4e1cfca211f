"""The 64-byte records of the network, declared once; and the header that a request of a Wave service carries on the wire."""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from waveos.meaning import Told
from waveos.record import record

SUBSYSTEM = 3
MAX_REQUESTS = 16_384
"""Requests under way at once: `request` is the host's dense number, 0..MAX_REQUESTS-1, given again when the request is over."""
MAX_WORKERS = 64
"""Workers of one enclave: the queues a request can go to, each with the host core or process behind it."""
TABLE_ENTRIES = 256
"""Of the steering table: a flow falls into entry `flow % TABLE_ENTRIES`."""
CLASSES = 16
"""Request classes; what the wire says is cut to this range."""


class Message(Told):
    """What the host tells the agent; `meaning` says when. A policy handles a message by a method of its lower-case name."""

    REQUEST_ARRIVED = 1, "a request is here and is the policy's to steer or shed; front=1: it was steered before and that failed, so put it first"
    REQUEST_DONE = 2, "msg.worker has answered the request; it took msg.work_ns there"
    REQUEST_LOST = 3, "the request was steered to msg.worker and will not be answered: the worker is gone, or the time ran out"
    QUEUE_DEPTH = 4, "msg.worker says how many requests wait with it, msg.depth: for paths that the agent does not see"
    FLOW_OPENED = 5, "the first request of msg.flow, or its connection, is here"
    FLOW_CLOSED = 6, "the connection is closed, or was idle for long"
    WORKER_NEW = 7, "msg.worker takes requests; sent at start and when the host replays its state"
    WORKER_GONE = 8, "msg.worker takes no more"
    WORKER_READY = 9, "the runtime's question, after each batch, while the policy holds a request: does msg.worker, at which msg.depth are, get one?"
    LINK_DOWN = 10, "the wire to the client or the host (msg.worker) is cut"
    LINK_UP = 11, "it is whole again"
    TXN_FAILED = 14, "a decision was not committed: msg.outcome says why; without a handler the request comes as request_arrived, front=1"
    TXN_OUTCOME = 32, "host to runtime: what became of a transaction"
    BATCH_END = 33, "agent's own: the queue is drained, time_ns is the agent's clock; a recorded stream holds these too"
    RESYNC = 34, "host to runtime: messages were lost; forget everything, the host's whole state follows"


class Decision(IntEnum):
    """What the agent wants done."""

    STEER = 1  # give the request to the worker
    SHED = 2  # answer the request with a refusal, or drop it
    MARK = 3  # tell the client of congestion (ECN) on this request's answer
    STEER_FLOW = 4  # requests of the flow go to the worker from now on
    SET_ENTRY = 5  # entry `index` of the steering table names the worker; -1: none
    SET_RATE = 6  # requests of a class (`index`) to let in a second (`value`); 0: no limit


_SUBJECT = [
    ("request", "<i4"),
    ("worker", "<i4"),
    ("flow", "<u4"),  # hash of addresses and ports
    ("size", "<u4"),  # bytes of the request
    ("request_class", "u1"),
    ("outcome", "u1"),
    ("front", "u1"),
    ("spare", "u1"),
    ("depth", "<i4"),  # requests at the worker that the runtime knows of
]
MESSAGE: np.dtype[np.void] = record(
    [
        *_SUBJECT,
        ("deadline_ns", "<i8"),  # host time by which the answer wants to be there: arrival and SLO; 0: none
        ("work_ns", "<i8"),  # what the worker took (request_done), or the client's estimate; 0: unknown
    ]
)
"""A message. `seq` is the request's: how often it has changed state."""
OUTCOME: np.dtype[np.void] = record([*_SUBJECT, ("txn", "<i8"), ("age_ns", "<i8")])
"""An outcome (type TXN_OUTCOME). `txn` is the decision's number; `age_ns` the age of the state behind it."""
DECISION: np.dtype[np.void] = record(
    [("request", "<i4"), ("worker", "<i4"), ("flow", "<u4"), ("index", "<u4"), ("txn", "<i8"), ("decided_ns", "<i8"), ("value", "<i8")]
)
"""A decision. `seq` is the request's sequence number it was made on, `time_ns` the host time of the newest message behind it."""

MESSAGE_TYPES: dict[str, int] = {m.name.lower(): m.value for m in Message}
DECISION_TYPES: dict[str, int] = {d.name.lower(): d.value for d in Decision}
HANDLERS: dict[str, int] = {m.name.lower(): m.value for m in Message if m.value < Message.TXN_OUTCOME}
"""Names a policy may give its handlers."""

RPC: np.dtype[np.void] = np.dtype(
    [
        ("magic", "<u2"),
        ("version", "u1"),
        ("kind", "u1"),
        ("request_class", "u1"),
        ("worker", "u1"),  # in a reply: which worker answered
        ("status", "u1"),  # in a reply: 0 answered, 1 refused (shed)
        ("marked", "u1"),  # in a reply: the IPU tells of congestion
        ("id", "<u8"),  # the client's; a reply carries it back
        ("sent_ns", "<i8"),  # the client's clock at the intended time of sending; carried back
        ("slo_us", "<u4"),  # 0: none
        ("work_ns", "<u4"),  # in a request: an argument of the service; in a reply: how long the worker took
        ("ticket", "<u4"),  # the IPU's: written into a request on its way, carried back
        ("argument", "<u4"),  # of the service: a key
    ]
)
"""The header of a request or reply of a Wave service, first in its UDP payload."""
RPC_MAGIC, RPC_VERSION = 0x5752, 1
REQUEST, REPLY = 0, 1
ANSWERED, REFUSED = 0, 1
