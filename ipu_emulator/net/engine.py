"""A service behind an IPU in virtual time, event by event, compiled: network stack, agent, workers, and the ways between them.

A request arrives and waits for a core of the network stack (on the host or on the IPU); then its header is known, and after `to_agent_ns` the agent sees it.
The agent drains what it sees, feeds the runtime (`waveos.net.laws`, the same function as in every world) and steers; after `to_host_ns` the request is in its
worker's queue. What the worker has done goes back through the stack, and the agent hears of it. Each wait is a queue here, each cost is charged to a core.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from waveos.histogram import BINS, count_ns
from waveos.ipu_emulator.arrivals import ARRIVAL, draw_class, draw_service_ns, exponential, uniform
from waveos.ipu_emulator.clock import NEVER, first_due, set_due
from waveos.jit import jit, jit_inline
from waveos.net.laws import BATCH_END, COMMITTED, REQUEST_ARRIVED, REQUEST_DONE, TXN_OUTCOME, WORKER_NEW, feed
from waveos.net.orders import SET_ENTRY, SET_RATE, SHED, STEER, STEER_FLOW
from waveos.net.rates import RATES, admit, limit
from waveos.net.records import CLASSES, MAX_REQUESTS, MAX_WORKERS, SUBSYSTEM, TABLE_ENTRIES
from waveos.net.trace import PacketEvent
from waveos.outcome import Outcome
from waveos.record import VERSION
from waveos.trace import TRACE_EVENT

AGENT_BATCH = 64
MAX_STACK_CORES = 64
SLOT_ARRIVAL, SLOT_AGENT, SLOT_DOWN, SLOT_STACK = 0, 1, 2, 3
SLOT_WORKER = SLOT_STACK + MAX_STACK_CORES
SLOTS = SLOT_WORKER + MAX_WORKERS
NEW, DONE = 0, 1
RUNNING, FINISHED, POLICY_FAILED = range(3)
NOBODY = -1
INVALID = int(Outcome.INVALID)
TRACE_EVENTS = 1 << 16
(
    ARRIVED,
    STACK_BEGIN,
    STACK_END,
    SEEN,
    STEERED,
    REFUSED,
    QUEUED,
    WORK_BEGIN,
    WORK_END,
    ANSWERED,
    AGENT_BEGIN,
    AGENT_END,
) = map(int, PacketEvent)

REQUEST = np.dtype(
    [
        ("arrived_ns", "i8"),
        ("service_ns", "i8"),
        ("deadline_ns", "i8"),  # arrival and its class's SLO; NEVER: none
        ("seq", "i8"),
        ("flow", "u4"),
        ("request_class", "i4"),
        ("worker", "i4"),
        ("after", "i4"),  # the one behind it in its queue
        ("at_stack", "u1"),  # NEW: on its way in, DONE: on its way out
        ("kept", "u1"),  # counted: it arrived after the warm-up
    ],
    align=True,
)
QUEUE = np.dtype([("first", "i4"), ("last", "i4"), ("n", "i8")])
CORE = np.dtype([("serving", "i4"), ("queue", QUEUE)], align=True)
UP = np.dtype([("visible_ns", "i8"), ("kind", "i4"), ("request", "i4"), ("worker", "i4"), ("work_ns", "i8")], align=True)
DOWN = np.dtype([("visible_ns", "i8"), ("request", "i4"), ("worker", "i4")], align=True)
RING = 4 * MAX_REQUESTS
MACHINE = np.dtype(
    [
        ("gap_ns", "f8"),  # mean time between arrivals
        ("flows", "i8"),
        ("classes", "i8"),
        ("workers", "i8"),
        ("stack_cores", "i8"),  # 0: the stack costs nothing
        ("stack_in_ns", "i8"),  # cost of a request there, and of its reply
        ("stack_out_ns", "i8"),
        ("message_ns", "i8"),  # of the agent: a message, a decision
        ("decision_ns", "i8"),
        ("to_agent_ns", "i8"),
        ("to_host_ns", "i8"),
        ("pick_up_ns", "i8"),  # of a worker: a request that the IPU has put before it
        ("workers_sort", "i8"),  # a worker takes the request with the earliest deadline first
        ("sees_class", "i8"),  # the header is known where it is steered
        ("warmup_ns", "i8"),
        ("until", "i8"),  # so many requests are to be counted
        ("now_ns", "i8"),
        ("agent_free_ns", "i8"),
        ("counted", "i8"),
        ("arrived", "i8"),
        ("dropped", "i8"),  # more under way than there are slots
        ("shed", "i8"),
        ("stack_busy_ns", "i8"),
        ("agent_busy_ns", "i8"),
        ("worker_busy_ns", "i8"),
        ("began_ns", "i8"),
        ("free_n", "i8"),
        ("up_head", "i8"),
        ("up_tail", "i8"),
        ("down_head", "i8"),
        ("down_tail", "i8"),
        ("stack", QUEUE),
        ("stack_core", CORE, (MAX_STACK_CORES,)),
        ("worker", CORE, (MAX_WORKERS,)),
        ("up", UP, (RING,)),
        ("down", DOWN, (RING,)),
        ("free", "i4", (MAX_REQUESTS,)),
        ("request", REQUEST, (MAX_REQUESTS,)),
        ("total_ns", "i8"),  # latencies of all that were answered, for the exact mean
        ("answered", "i8"),
        ("latency", "i8", (CLASSES, BINS)),
        ("rates", RATES),
        ("table", "i4", (TABLE_ENTRIES,)),  # the worker of an entry; -1: the policy is asked
        ("trace_from_ns", "i8"),
        ("trace_until_ns", "i8"),  # 0: nothing is written down
        ("traced", "i8"),
        ("trace", TRACE_EVENT, (TRACE_EVENTS,)),
    ],
    align=True,
)


@jit_inline
def _note(m: Any, time_ns: int, kind: int, cpu: int, request: int, value: int, extra: int) -> None:
    if m.trace_from_ns <= time_ns < m.trace_until_ns and m.traced < TRACE_EVENTS:
        e = m.trace[m.traced]
        e.time_ns, e.kind, e.cpu, e.tid, e.value, e.extra = time_ns, kind, cpu, request, value, extra
        m.traced += 1


@jit_inline
def _push(m: Any, q: Any, request: int) -> None:
    m.request[request].after = NOBODY
    if q.n:
        m.request[q.last].after = request
    else:
        q.first = request
    q.last = request
    q.n += 1


@jit_inline
def _pop(m: Any, q: Any) -> Any:
    request = q.first
    q.first = m.request[request].after
    q.n -= 1
    return request


@jit
def _pop_earliest(m: Any, q: Any) -> Any:
    """The request of the queue whose deadline is next; of equals the first."""
    best, before_best, before, at = q.first, NOBODY, NOBODY, q.first
    while at != NOBODY:
        if m.request[at].deadline_ns < m.request[best].deadline_ns:
            best, before_best = at, before
        before, at = at, m.request[at].after
    after = m.request[best].after
    if before_best == NOBODY:
        q.first = after
    else:
        m.request[before_best].after = after
    if q.last == best:
        q.last = before_best
    q.n -= 1
    return best


@jit_inline
def _tell_agent(m: Any, clock: Any, kind: int, request: int, worker: int, work_ns: int) -> None:
    u = m.up[m.up_tail % RING]
    u.visible_ns, u.kind, u.request, u.worker, u.work_ns = m.now_ns + m.to_agent_ns, kind, request, worker, work_ns
    m.up_tail += 1
    if clock.time_ns[SLOT_AGENT] == NEVER:
        set_due(clock, SLOT_AGENT, max(u.visible_ns, m.agent_free_ns))


@jit_inline
def _enter_stack(m: Any, clock: Any, request: int, way: int) -> None:
    """To the stack: at once on a free core, else in order of arrival."""
    m.request[request].at_stack = way
    if m.stack_cores == 0:
        _leave_stack(m, clock, request)
        return
    for core in range(m.stack_cores):
        if m.stack_core[core].serving == NOBODY:
            _begin_stack(m, clock, core, request)
            return
    _push(m, m.stack, request)


@jit_inline
def _begin_stack(m: Any, clock: Any, core: int, request: int) -> None:
    cost = m.stack_in_ns if m.request[request].at_stack == NEW else m.stack_out_ns
    m.stack_core[core].serving = request
    m.stack_busy_ns += cost
    _note(m, m.now_ns, STACK_BEGIN, core, request, m.request[request].at_stack, 0)
    set_due(clock, SLOT_STACK + core, m.now_ns + cost)


@jit_inline
def _leave_stack(m: Any, clock: Any, request: int) -> None:
    r = m.request[request]
    if r.at_stack == NEW:
        _tell_agent(m, clock, REQUEST_ARRIVED, request, -1, 0)
        return
    _note(m, m.now_ns, ANSWERED, -1, request, r.request_class, 0)
    if r.kept:
        count_ns(m.latency[r.request_class], m.now_ns - r.arrived_ns)
        m.total_ns += m.now_ns - r.arrived_ns
        m.answered += 1
        m.counted += 1
    _free(m, request)


@jit_inline
def _free(m: Any, request: int) -> None:
    m.free[m.free_n] = request
    m.free_n += 1


@jit_inline
def _begin_work(m: Any, clock: Any, worker: int, request: int) -> None:
    took = m.pick_up_ns + m.request[request].service_ns
    m.worker[worker].serving = request
    m.worker_busy_ns += took
    _note(m, m.now_ns, WORK_BEGIN, worker, request, m.request[request].request_class, 0)
    set_due(clock, SLOT_WORKER + worker, m.now_ns + took)


@jit_inline
def _arrive(m: Any, clock: Any, streams: Any, classes: Any, samples_at: int, samples_n: int) -> None:
    set_due(clock, SLOT_ARRIVAL, m.now_ns + max(1, int(m.gap_ns * exponential(streams, ARRIVAL) + 0.5)))
    k = draw_class(streams, classes, m.classes)
    service_ns = draw_service_ns(streams, classes[k], samples_at, samples_n)
    flow = int(uniform(streams, ARRIVAL) * m.flows)
    m.arrived += 1
    if m.free_n == 0:
        m.dropped += 1
        return
    m.free_n -= 1
    request = int(m.free[m.free_n])
    r = m.request[request]
    r.arrived_ns, r.service_ns, r.request_class, r.kept = m.now_ns, service_ns, k, m.now_ns >= m.warmup_ns
    r.deadline_ns = m.now_ns + classes[k].slo_ns if classes[k].slo_ns else NEVER
    r.flow = (flow * 2_654_435_761 & 0xFFFF_FFFF) >> 8
    r.seq += 1
    _note(m, m.now_ns, ARRIVED, -1, request, k, r.flow)
    _enter_stack(m, clock, request, NEW)


@jit_inline
def _say(rt: Any, msg: Any, kind: int, request: int, worker: int, seq: int, time_ns: int) -> None:
    msg.mark, msg.version, msg.subsystem, msg.type = 0, VERSION, SUBSYSTEM, kind
    msg.seq, msg.time_ns, msg.request, msg.worker, msg.front, msg.outcome = seq, time_ns, request, worker, 0, 0
    feed(rt, msg)


@jit_inline
def _answer(rt: Any, msg: Any, request: int, worker: int, seq: int, outcome: int, time_ns: int) -> None:
    msg.mark, msg.version, msg.subsystem, msg.type = 0, VERSION, SUBSYSTEM, TXN_OUTCOME
    msg.seq, msg.time_ns, msg.request, msg.worker, msg.front, msg.outcome = seq, time_ns, request, worker, 0, outcome
    feed(rt, msg)


@jit_inline
def _send_down(m: Any, clock: Any, request: int, worker: int, time_ns: int) -> None:
    w = m.down[m.down_tail % RING]
    w.visible_ns, w.request, w.worker = time_ns + m.to_host_ns, request, worker
    m.down_tail += 1
    _note(m, time_ns, STEERED, worker, request, 0, 0)
    if clock.time_ns[SLOT_DOWN] == NEVER:
        set_due(clock, SLOT_DOWN, w.visible_ns)


@jit_inline
def _refuse(m: Any, request: int, time_ns: int) -> None:
    m.shed += m.request[request].kept
    m.counted += m.request[request].kept
    _note(m, time_ns, REFUSED, -1, request, 0, 0)
    _free(m, request)


@jit
def _run_agent(m: Any, clock: Any, rt: Any, msg: Any, classes: Any) -> None:
    """Drain what the agent sees now, decide, and be busy as long as that takes."""
    taken, time_ns = 0, m.now_ns
    _note(m, time_ns, AGENT_BEGIN, -1, -1, 0, 0)
    while taken < AGENT_BATCH and m.up_head < m.up_tail:
        u = m.up[m.up_head % RING]
        if u.visible_ns > m.now_ns:
            break
        m.up_head += 1
        taken += 1
        time_ns += m.message_ns
        r = m.request[u.request]
        if u.kind == REQUEST_ARRIVED:
            _note(m, time_ns, SEEN, -1, u.request, 0, 0)
            if not admit(m.rates, r.request_class if m.sees_class else 0, u.visible_ns):
                _refuse(m, u.request, time_ns)
                continue
            if m.table[r.flow % TABLE_ENTRIES] >= 0:
                r.seq += 1
                _send_down(m, clock, u.request, int(m.table[r.flow % TABLE_ENTRIES]), time_ns)
                continue
            msg.flow, msg.size, msg.work_ns, msg.deadline_ns, msg.request_class = r.flow, 64, 0, 0, 0
            if m.sees_class:
                msg.request_class = r.request_class
                slo_ns = classes[r.request_class].slo_ns
                msg.deadline_ns = r.arrived_ns + slo_ns if slo_ns else 0
            _say(rt, msg, REQUEST_ARRIVED, u.request, -1, r.seq, u.visible_ns)
        else:
            msg.work_ns = u.work_ns
            _say(rt, msg, REQUEST_DONE, u.request, u.worker, 0, u.visible_ns)
    _say(rt, msg, BATCH_END, -1, -1, 0, time_ns)
    i = 0
    while i < rt.made and not rt.failed:
        d = rt.out[i]
        kind, request, worker = int(d.type), int(d.request), int(d.worker)
        i += 1
        time_ns += m.decision_ns
        if kind == STEER:
            _send_down(m, clock, request, worker, time_ns)
        elif kind == SHED:
            _refuse(m, request, time_ns)
        elif kind == SET_RATE:
            limit(m.rates, int(d.index), int(d.value))
            continue
        elif kind == SET_ENTRY or kind == STEER_FLOW:
            entry = int(d.index) if kind == SET_ENTRY else int(d.flow) % TABLE_ENTRIES
            if entry < TABLE_ENTRIES:
                m.table[entry] = worker
            else:
                _answer(rt, msg, -1, worker, 0, INVALID, time_ns)
            continue
        else:
            continue
        m.request[request].seq += 1
        _answer(rt, msg, request, worker, m.request[request].seq, COMMITTED, time_ns)
    _note(m, time_ns, AGENT_END, -1, -1, taken, i)
    rt.made = 0
    m.agent_busy_ns += time_ns - m.now_ns
    m.agent_free_ns = time_ns
    next_ns = NEVER
    if m.up_head < m.up_tail:
        next_ns = max(time_ns, m.up[m.up_head % RING].visible_ns)
    set_due(clock, SLOT_AGENT, next_ns)


@jit
def step(machine: Any, clocks: Any, streams: Any, classes: Any, samples_at: int, samples_n: int, runtime: Any, message: Any, events: int) -> int:
    """Go on for so many events. Returns RUNNING, FINISHED or POLICY_FAILED.

    machine: [1] MACHINE; clocks: [1] CLOCK; classes: [n] REQUEST_CLASS; samples: measured service times, int64; runtime: [1] RUNTIME; message: [1] MESSAGE.
    """
    m, clock, rt, msg = machine[0], clocks[0], runtime[0], message[0]
    if m.arrived == 0:
        for worker in range(m.workers):
            _say(rt, msg, WORKER_NEW, -1, worker, 0, 0)
    for _ in range(events):
        slot = first_due(clock)
        if m.now_ns < m.warmup_ns <= clock.time_ns[slot]:
            m.began_ns = clock.time_ns[slot]
            m.stack_busy_ns = m.agent_busy_ns = m.worker_busy_ns = 0
        m.now_ns = clock.time_ns[slot]
        if slot == SLOT_ARRIVAL:
            _arrive(m, clock, streams, classes, samples_at, samples_n)
        elif slot == SLOT_AGENT:
            _run_agent(m, clock, rt, msg, classes)
            if rt.failed:
                return POLICY_FAILED
        elif slot == SLOT_DOWN:
            w = m.down[m.down_head % RING]
            m.down_head += 1
            request, worker = int(w.request), int(w.worker)
            set_due(clock, SLOT_DOWN, m.down[m.down_head % RING].visible_ns if m.down_head < m.down_tail else NEVER)
            m.request[request].worker = worker
            _note(m, m.now_ns, QUEUED, worker, request, 0, 0)
            if m.worker[worker].serving == NOBODY:
                _begin_work(m, clock, worker, request)
            else:
                _push(m, m.worker[worker].queue, request)
        elif slot < SLOT_WORKER:
            core = slot - SLOT_STACK
            request = int(m.stack_core[core].serving)
            m.stack_core[core].serving = NOBODY
            set_due(clock, slot, NEVER)
            _note(m, m.now_ns, STACK_END, core, request, m.request[request].at_stack, 0)
            _leave_stack(m, clock, request)
            if m.stack.n and m.stack_core[core].serving == NOBODY:
                _begin_stack(m, clock, core, int(_pop(m, m.stack)))
        else:
            worker = slot - SLOT_WORKER
            c = m.worker[worker]
            request = int(c.serving)
            c.serving = NOBODY
            set_due(clock, slot, NEVER)
            _note(m, m.now_ns, WORK_END, worker, request, m.request[request].request_class, 0)
            _tell_agent(m, clock, REQUEST_DONE, request, worker, m.request[request].service_ns)
            if c.queue.n:
                _begin_work(m, clock, worker, int(_pop_earliest(m, c.queue) if m.workers_sort else _pop(m, c.queue)))
            _enter_stack(m, clock, request, DONE)
        if m.counted >= m.until:
            return FINISHED
    return RUNNING
