"""What the runtime guarantees to every network policy, as one pure function over a stream of records.

`feed` takes one message; a BATCH_END record says that the queue is drained and what the agent's clock reads. Decisions collect in `out`, stamped with
the request's newest sequence number; the caller sends and clears them. Equal streams give equal decisions, byte for byte.

The laws:
- `worker_ready` is level-triggered: after each batch, while the policy holds a request, it is asked for every worker, the one with the fewest requests first,
  again after each answer, until it has declined for all of them.
- `txns.depth` is what the runtime has steered to a worker and not heard to be done: known at once, not when the host next says so.
- A steering that was not committed brings its request back as request_arrived with front=1, unless the policy has `txn_failed`; so does one to a worker
  that is gone by then. No failed transaction loses its request.
- A request is steered or shed once. A request that the policy does not hold is an error, and stops it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from waveos.errors import PolicyError
from waveos.jit import as_pointer, call_dispatch, jit, jit_inline, store_word
from waveos.net.orders import MARK, ORDERS, SET_ENTRY, SET_RATE, SHED, STEER, STEER_FLOW
from waveos.net.records import CLASSES, DECISION, MAX_REQUESTS, MAX_WORKERS, MESSAGE, SUBSYSTEM, Message
from waveos.outcome import Outcome
from waveos.policy.bind import Bound
from waveos.record import VERSION

OUT = 4_096
"""Decisions of one batch."""

# Compiled code compares plain integers.
(
    REQUEST_ARRIVED,
    REQUEST_DONE,
    REQUEST_LOST,
    QUEUE_DEPTH,
    FLOW_OPENED,
    FLOW_CLOSED,
    WORKER_NEW,
    WORKER_GONE,
    WORKER_READY,
    LINK_DOWN,
    LINK_UP,
    TXN_FAILED,
    TXN_OUTCOME,
    BATCH_END,
    RESYNC,
) = map(int, Message)
COMMITTED = int(Outcome.COMMITTED)

# Where a request is, as the newest message has it.
ABSENT, WAITING, STEERED, AT_WORKER = range(4)
# What stopped a policy.
RAISED, NOT_ITS_REQUEST, NOT_A_REQUEST, NOT_A_WORKER, TOO_MANY, NOT_AN_INDEX = range(1, 7)

REQUEST = np.dtype(
    [
        ("seq", "i8"),
        ("deadline_ns", "i8"),
        ("work_ns", "i8"),
        ("flow", "u4"),
        ("size", "u4"),
        ("worker", "i4"),  # where it is, or is on its way to; -1: it is being shed
        ("state", "u1"),
        ("request_class", "u1"),
    ],
    align=True,
)
RUNTIME = np.dtype(
    [
        ("dispatch", "i8"),
        ("handlers", "i8"),  # bit t: the policy handles type t
        ("state_at", "i8"),  # addresses: of the policy's state,
        ("state_bytes", "i8"),
        ("initial_at", "i8"),  # of its first bytes as they were at first; the others were zero
        ("initial_bytes", "i8"),
        ("msg_at", "i8"),  # of what a handler is given,
        ("orders_at", "i8"),  # and of what it answers
        ("watch", "i8"),  # address of a word that shows which handler runs; 0: none
        ("workers", "i8"),
        ("now_ns", "i8"),  # the agent's clock at the last batch end
        ("basis_ns", "i8"),  # host time of the newest message
        ("txn", "i8"),  # decisions made so far
        ("waiting", "i8"),  # requests in the policy's hands
        ("made", "i8"),  # decisions in `out`
        ("failed", "i8"),
        ("failed_type", "i8"),
        ("failed_request", "i8"),
        ("failed_worker", "i8"),
        ("failed_time_ns", "i8"),
        ("redelivered", "i8"),  # requests that came back after a failed transaction
        ("shed", "i8"),
        ("unserved", "i8"),  # batches after which a worker had nothing while the policy held a request
        ("msg", MESSAGE),  # what a handler is given
        ("orders", ORDERS),  # what it answers; its `workers`, `present` and `depth` are the workers' table
        ("declined", "u1", (MAX_WORKERS,)),
        ("out", DECISION, (OUT,)),
        ("request", REQUEST, (MAX_REQUESTS,)),
    ],
    align=True,
)
"""The runtime of one enclave: its tables as the newest messages have them, and scratch. One block of memory, so that calls pass one pointer."""


def make_runtime(bound: Bound, *, workers: int, watch: int = 0) -> Any:
    """A runtime, [1] RUNTIME, for `bound` over workers 0..workers-1. A worker takes requests once WORKER_NEW has told so."""
    if not 1 <= workers <= MAX_WORKERS:
        raise ValueError(f"workers {workers} of 1..{MAX_WORKERS}")
    runtime = np.zeros(1, RUNTIME)
    runtime["dispatch"], runtime["handlers"], runtime["watch"] = bound.address, bound.handlers, watch
    runtime["state_at"], runtime["state_bytes"] = bound.state_address, bound.state.nbytes
    runtime["initial_at"], runtime["initial_bytes"] = bound.initial.ctypes.data, bound.initial.nbytes
    runtime["msg_at"], runtime["orders_at"] = runtime["msg"].ctypes.data, runtime["orders"].ctypes.data
    runtime["workers"] = runtime["orders"]["workers"] = workers
    return runtime


def failure(runtime: np.ndarray[Any, Any], bound: Bound) -> PolicyError:
    """What a runtime that stopped (`failed`) has to say, in one line."""
    head = runtime[0]
    handler = Message(int(head["failed_type"])).name.lower() if head["failed_type"] else "batch end"
    place = f"policy {bound.policy.name!r}, {handler} at {int(head['failed_time_ns'])} ns"
    request, worker = int(head["failed_request"]), int(head["failed_worker"])
    match int(head["failed"]):
        case 1:
            return PolicyError(f"{place}: {bound.explain(runtime['msg'], runtime['orders'])}")
        case 2:
            states = ("is over or was never there", "is its own", "is already steered", "is already at a worker")
            state = states[int(runtime["request"]["state"][0, request])]
            return PolicyError(f"{place}: steered or shed request {request}, which {state}; decide on each request given by request_arrived once")
        case 3:
            return PolicyError(f"{place}: named request {request}; requests are 0..{MAX_REQUESTS - 1}")
        case 4:
            return PolicyError(f"{place}: named worker {worker}, which takes no requests (the enclave's are 0..{int(head['workers']) - 1})")
        case 6:
            return PolicyError(f"{place}: set the rate of class {request}; classes are 0..{CLASSES - 1}")
        case _:
            return PolicyError(f"{place}: more than {OUT} decisions in one batch; a policy that floods is stopped")


@jit
def _fail(rt: Any, code: int, request: int, worker: int) -> None:
    if rt.failed == 0:
        rt.failed, rt.failed_type, rt.failed_request, rt.failed_worker = code, rt.msg.type, request, worker
        rt.failed_time_ns = max(rt.basis_ns, rt.now_ns)


@jit_inline
def _emit(rt: Any, kind: int, request: int, worker: int, flow: int, index: int, value: int) -> None:
    if rt.made >= OUT:
        _fail(rt, TOO_MANY, request, worker)
        return
    d = rt.out[rt.made]
    d.mark, d.version, d.subsystem, d.type = 0, VERSION, SUBSYSTEM, kind
    d.seq = rt.request[request].seq if request >= 0 else 0
    d.time_ns, d.decided_ns = rt.basis_ns, rt.now_ns
    d.request, d.worker, d.flow, d.index, d.txn, d.value = request, worker, flow, index, rt.txn, value
    rt.txn += 1
    rt.made += 1


@jit_inline
def _apply(rt: Any) -> None:
    """Carry out the orders of the handler that just returned."""
    orders = rt.orders
    for i in range(orders.n):
        op, subject, worker = orders.op[i], orders.subject[i], orders.worker[i]
        names = op == STEER or op == STEER_FLOW or (op == SET_ENTRY and worker != -1)
        if names and (worker < 0 or worker >= rt.workers or not orders.present[worker]):
            _fail(rt, NOT_A_WORKER, -1, worker)
            return
        if op == STEER or op == SHED or op == MARK:
            if subject < 0 or subject >= MAX_REQUESTS:
                _fail(rt, NOT_A_REQUEST, subject, worker)
                return
            r = rt.request[subject]
            if r.state != WAITING:
                _fail(rt, NOT_ITS_REQUEST, subject, worker)
                return
            if op == STEER:
                rt.waiting -= 1
                r.state, r.worker = STEERED, worker
                orders.depth[worker] += 1
            elif op == SHED:
                rt.waiting -= 1
                r.state, r.worker = STEERED, -1
                rt.shed += 1
            _emit(rt, op, subject, worker, r.flow, 0, 0)
        elif op == STEER_FLOW:
            _emit(rt, op, -1, worker, subject, 0, 0)
        elif op == SET_ENTRY:
            _emit(rt, op, -1, worker, 0, subject, 0)
        elif op == SET_RATE:
            if subject < 0 or subject >= CLASSES:
                _fail(rt, NOT_AN_INDEX, subject, -1)
                return
            _emit(rt, op, -1, -1, 0, subject, orders.value[i])


@jit_inline
def _deliver(rt: Any, kind: int, request: int, worker: int, front: int, outcome: int, time_ns: int) -> None:
    """Call the policy's handler for `kind`, if it has one, and carry out what it orders."""
    if rt.failed or not (rt.handlers >> kind) & 1:
        return
    m = rt.msg
    m.version, m.subsystem, m.type = VERSION, SUBSYSTEM, kind
    m.time_ns, m.request, m.worker, m.front, m.outcome = time_ns, request, worker, front, outcome
    m.depth = rt.orders.depth[worker] if worker >= 0 else 0
    if request >= 0:
        r = rt.request[request]
        m.seq, m.flow, m.size, m.request_class, m.deadline_ns, m.work_ns = r.seq, r.flow, r.size, r.request_class, r.deadline_ns, r.work_ns
    rt.orders.n = 0
    store_word(rt.watch, kind)
    raised = call_dispatch(rt.dispatch, rt.state_at, rt.msg_at, rt.orders_at)
    store_word(rt.watch, 0)
    if raised:
        _fail(rt, RAISED, request, worker)
    else:
        _apply(rt)


@jit_inline
def _leave_worker(rt: Any, r: Any) -> None:
    """The request no longer counts at its worker."""
    if (r.state == STEERED or r.state == AT_WORKER) and r.worker >= 0 and rt.orders.depth[r.worker] > 0:
        rt.orders.depth[r.worker] -= 1


@jit_inline
def _offer(rt: Any, request: int, kind: int, worker: int, front: int, outcome: int, time_ns: int) -> None:
    """Put a request into the policy's hands."""
    r = rt.request[request]
    _leave_worker(rt, r)
    if r.state != WAITING:
        rt.waiting += 1
        r.state = WAITING
        if not (rt.handlers >> kind) & 1:
            kind = REQUEST_ARRIVED
        _deliver(rt, kind, request, worker, front, outcome, time_ns)


@jit
def _reset(rt: Any) -> None:
    """Forget everything: the host's state follows."""
    state = carray(as_pointer(rt.state_at), rt.state_bytes, np.uint8)
    state[:] = 0
    state[: rt.initial_bytes] = carray(as_pointer(rt.initial_at), rt.initial_bytes, np.uint8)
    for request in range(MAX_REQUESTS):
        rt.request[request].state = ABSENT
    for worker in range(rt.workers):
        rt.orders.present[worker], rt.orders.depth[worker] = 0, 0
    rt.waiting = rt.made = 0


@jit_inline
def _serve_ready(rt: Any) -> None:
    """Ask for workers, the shallowest first, until the policy has declined for all or holds nothing."""
    for worker in range(rt.workers):
        rt.declined[worker] = 0
    while rt.waiting and not rt.failed:
        best = -1
        for worker in range(rt.workers):
            if rt.orders.present[worker] and not rt.declined[worker] and (best < 0 or rt.orders.depth[worker] < rt.orders.depth[best]):
                best = worker
        if best < 0:
            break
        before = rt.waiting
        _deliver(rt, WORKER_READY, -1, best, 0, 0, rt.now_ns)
        if rt.waiting >= before:
            rt.declined[best] = 1
            if rt.orders.depth[best] == 0:
                rt.unserved += 1


@jit
def feed(rt: Any, m: Any) -> Any:
    """Take one record of the host's stream, or a BATCH_END. Returns False once the policy has failed; then nothing changes any more."""
    if rt.failed:
        return False
    kind = int(m.type)
    if kind == BATCH_END:
        rt.now_ns = max(rt.now_ns, m.time_ns)
        if rt.waiting and (rt.handlers >> WORKER_READY) & 1:
            _serve_ready(rt)
        return rt.failed == 0
    rt.basis_ns = max(rt.basis_ns, m.time_ns)
    if kind == RESYNC:
        _reset(rt)
        return True
    request, worker = int(m.request), int(m.worker)
    link = kind == LINK_DOWN or kind == LINK_UP  # of these `worker` says which wire
    if request < -1 or request >= MAX_REQUESTS or worker < -1 or (worker >= rt.workers and not link):
        return True  # not of this enclave; the host's half refuses such things, and so does this one
    if kind == WORKER_NEW or kind == WORKER_GONE:
        if worker >= 0:
            rt.orders.present[worker] = 1 if kind == WORKER_NEW else 0
            if kind == WORKER_NEW:
                rt.orders.depth[worker] = 0
            _deliver(rt, kind, -1, worker, 0, 0, m.time_ns)
    elif kind == QUEUE_DEPTH:
        if worker >= 0:
            rt.orders.depth[worker] = max(0, m.depth)
            _deliver(rt, kind, -1, worker, 0, 0, m.time_ns)
    elif kind == FLOW_OPENED or kind == FLOW_CLOSED:
        rt.msg.flow, rt.msg.request_class = m.flow, m.request_class
        _deliver(rt, kind, -1, worker, 0, 0, m.time_ns)
    elif link:
        _deliver(rt, kind, -1, min(worker, 1), 0, 0, m.time_ns)
    elif kind == TXN_OUTCOME and request < 0:
        if m.outcome != COMMITTED:
            _deliver(rt, TXN_FAILED, -1, worker, 0, int(m.outcome), m.time_ns)
    elif request >= 0:
        r = rt.request[request]
        if kind == REQUEST_ARRIVED:
            r.seq, r.flow, r.size, r.request_class = m.seq, m.flow, m.size, min(m.request_class, CLASSES - 1)
            r.deadline_ns, r.work_ns = m.deadline_ns, m.work_ns
            _offer(rt, request, kind, -1, m.front, 0, m.time_ns)
        elif kind == REQUEST_DONE or kind == REQUEST_LOST:
            if r.state == STEERED or r.state == AT_WORKER:
                _leave_worker(rt, r)
                r.state, r.seq, r.work_ns = ABSENT, m.seq, m.work_ns
                _deliver(rt, kind, request, int(r.worker), 0, 0, m.time_ns)
        elif kind == TXN_OUTCOME and r.state == STEERED and r.worker == worker:
            r.seq = m.seq
            if m.outcome == COMMITTED:
                r.state = AT_WORKER if worker >= 0 else ABSENT
            else:
                rt.redelivered += 1
                rt.shed -= worker < 0
                _offer(rt, request, TXN_FAILED, worker, 1, int(m.outcome), m.time_ns)
    return rt.failed == 0


@jit
def feed_all(runtime: Any, messages: Any, first: int, out: Any) -> Any:
    """Feed `messages[first:]` until all are taken, the policy fails, or `out` cannot hold one more batch. Returns (messages taken, decisions written).

    runtime: [1] RUNTIME; messages: [n] MESSAGE; out: [m] DECISION.
    """
    rt = runtime[0]
    n, written = first, 0
    while n < messages.shape[0]:
        ok = feed(rt, messages[n])
        n += 1
        for i in range(rt.made):
            out[written] = rt.out[i]
            written += 1
        rt.made = 0
        if not ok or written + OUT > out.shape[0]:
            break
    return n, written
