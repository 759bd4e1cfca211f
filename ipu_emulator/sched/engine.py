"""What happens on the emulated machine, event by event, compiled. One file, because one message's road through it should be read in one go.

A request arrives; the waker (the core that takes requests from the network) gives it to a free thread and tells the agent. The agent drains
what has become visible, feeds the runtime (`waveos.sched.laws`, the same function as in every world) and writes decisions; some ring a
CPU's doorbell. A CPU looks at its decisions when its thread blocks and when its doorbell rings, checks sequence numbers, applies or refuses,
and reports each outcome. Every operation on the link is charged to the core that stalls; when the other side sees it is separate.

With `cost.inline` the policy runs in the kernel instead, at the moment and on the core where something happens: the kernel's own scheduler.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from waveos.histogram import count_ns
from waveos.ipu_emulator.arrivals import ARRIVAL, draw_class, draw_service_ns, exponential
from waveos.ipu_emulator.clock import NEVER, first_due, set_due
from waveos.ipu_emulator.profile import COLD
from waveos.ipu_emulator.sched.machine import BACKLOG, BATCH, BUSY, DOWN, IDLE, KICKS, REQUEST, SAMPLE, UP
from waveos.jit import as_pointer, jit, jit_inline
from waveos.outcome import Outcome
from waveos.record import VERSION
from waveos.sched.laws import (
    BATCH_END,
    BLOCKED,
    CPU_IDLE,
    CPU_NEW,
    DEMOTE,
    KICK,
    RESYNC,
    RUN,
    RUNNABLE,
    RUNNING,
    THREAD_BLOCKED,
    THREAD_NEW,
    THREAD_PREEMPTED,
    THREAD_RUNNABLE,
    THREAD_RUNNING,
    TXN_OUTCOME,
    YIELD_CPU,
    feed,
)
from waveos.sched.records import KICKED, MESSAGE, PREEMPT, SUBSYSTEM
from waveos.trace import TRACE_EVENT, RunEnd, TraceKind

COMMITTED, STALE, NOT_RUNNABLE, ON_CPU, SUPERSEDED, INVALID, CONGESTED = (
    int(Outcome.COMMITTED),
    int(Outcome.STALE),
    int(Outcome.TARGET_NOT_RUNNABLE),
    int(Outcome.TARGET_ON_CPU),
    int(Outcome.SUPERSEDED),
    int(Outcome.INVALID),
    int(Outcome.CONGESTED),
)
(
    T_RUN_BEGIN,
    T_RUN_END,
    T_IDLE,
    T_SENT,
    T_SEEN,
    T_MADE,
    T_APPLIED,
    T_REFUSED,
    T_KICK_SENT,
    T_KICK_SEEN,
    T_DEPTH,
    T_AGENT_BEGIN,
    T_AGENT_END,
) = map(int, TraceKind)
END_BLOCKED, END_PREEMPTED = int(RunEnd.BLOCKED), int(RunEnd.PREEMPTED)
RUNNING_ON, FINISHED, POLICY_FAILED = 0, 1, 2


@jit
def _draw(m: Any, time_ns: int, kind: int, cpu: int, tid: int, value: int, extra: int) -> None:
    """Write an event down if it lies in the trace's window."""
    if m.trace_from_ns <= time_ns < m.trace_until_ns and m.trace_n < m.trace_cap:
        e = carray(as_pointer(m.trace_at), m.trace_cap, TRACE_EVENT)[m.trace_n]
        e.time_ns, e.kind, e.cpu, e.tid, e.value, e.extra = time_ns, kind, cpu, tid, value, extra
        m.trace_n += 1


@jit_inline
def _trace(m: Any, time_ns: int, kind: int, cpu: int, tid: int, value: int, extra: int) -> None:
    """Mix an event that settles something (a start, an end, a refusal) into the run's hash, and write it down inside the trace's window."""
    word = np.uint64(time_ns) ^ (np.uint64(kind) << np.uint64(58)) ^ (np.uint64(cpu + 1) << np.uint64(44)) ^ (np.uint64(tid + 1) << np.uint64(24))
    m.hash = (m.hash ^ word ^ (np.uint64(value) << np.uint64(32))) * np.uint64(0x9E3779B97F4A7C15)
    m.hash ^= m.hash >> np.uint64(29)
    if m.trace_until_ns:
        _draw(m, time_ns, kind, cpu, tid, value, extra)


@jit_inline
def _ticks(cost: Any, begin_ns: int, end_ns: int) -> Any:
    """Timer ticks of a busy core in (begin, end]."""
    if cost.tick_period_ns == 0:
        return 0
    return end_ns // cost.tick_period_ns - begin_ns // cost.tick_period_ns


@jit_inline
def _finish_ns(cost: Any, begin_ns: int, work_ns: int) -> Any:
    """When work that begins now is done, ticks included."""
    end = begin_ns + work_ns
    if cost.tick_period_ns:
        ticks = _ticks(cost, begin_ns, end)
        while True:
            longer = begin_ns + work_ns + ticks * cost.tick_ns
            more = _ticks(cost, begin_ns, longer)
            if more == ticks:
                return longer
            ticks = more
    return end


# ── host to agent ────────────────────────────────────────────────────────────────────────────────────────────────────


@jit_inline
def _fill(m: Any, n: Any, kind: int, tid: int, cpu: int, front: int, time_ns: int) -> None:
    """Make record `n` a message about a thread and a CPU as they are now."""
    n.mark, n.version, n.subsystem, n.type = 0, VERSION, SUBSYSTEM, kind
    n.time_ns, n.tid, n.cpu, n.front, n.outcome = time_ns, tid, cpu, front, 0
    n.cpu_seq = m.cpu[cpu].seq if cpu >= 0 else 0
    if tid >= 0:
        t = m.thread[tid]
        n.seq, n.request_class, n.qos = t.seq, t.request_class, t.qos
        n.deadline_ns, n.work_ns, n.ran_ns = t.deadline_ns, t.work_ns, t.ran_ns
    else:
        n.seq, n.request_class, n.qos, n.deadline_ns, n.work_ns, n.ran_ns = 0, 0, 0, 0, 0, 0


@jit_inline
def _keep(m: Any, record: Any) -> None:
    """Write down what the runtime is fed, for replay."""
    if m.record_n < m.record_cap:
        carray(as_pointer(m.record_at), m.record_cap, MESSAGE)[m.record_n] = record
        m.record_n += 1


@jit_inline
def _claim(m: Any, visible_ns: int) -> Any:
    """Room for a message in the queue, by the time the agent can see it: an index of `up`. -1: the queue is full, the message lost, and counted.

    The caller writes the message where it will be read: copying a record that was just written field by field stalls the core that simulates.
    """
    visible_ns = max(visible_ns, m.up_floor_ns)
    if m.lost or m.up_tail - m.up_head >= m.up_cap:
        m.lost = 1
        m.overflowed += 1
        return -1
    at = m.up_tail
    while at > m.up_head and m.up_visible_ns[(at - 1) & (UP - 1)] > visible_ns:
        m.up[at & (UP - 1)] = m.up[(at - 1) & (UP - 1)]
        m.up_visible_ns[at & (UP - 1)] = m.up_visible_ns[(at - 1) & (UP - 1)]
        at -= 1
    m.up_visible_ns[at & (UP - 1)] = visible_ns
    m.up_tail += 1
    return at & (UP - 1)


@jit
def _send(m: Any, kind: int, tid: int, cpu: int, front: int, at_ns: int) -> Any:
    """Write one message at `at_ns`; returns when the core is done with the write. The caller charges the flush of a batch."""
    cost = m.cost
    if cost.inline:
        _fill(m, m.note, kind, tid, cpu, front, at_ns)
        _keep(m, m.note)
        feed(m.runtime, m.note)
        return at_ns
    done = at_ns + cost.write_ns
    room = _claim(m, done + cost.flush_ns + cost.wire_ns)
    if room >= 0:
        _fill(m, m.up[room], kind, tid, cpu, front, at_ns)
    if m.trace_until_ns:
        _draw(m, at_ns, T_SENT, cpu, tid, kind, 0)
    return done


@jit_inline
def _fill_outcome(m: Any, n: Any, txn: Any, outcome: int, cpu: int, age_ns: int, time_ns: int) -> None:
    """Make record `n` the outcome of a decision record."""
    n.mark, n.version, n.subsystem, n.type = 0, VERSION, SUBSYSTEM, TXN_OUTCOME
    n.seq = m.thread[txn.tid].seq if txn.tid >= 0 else 0
    n.time_ns, n.tid, n.cpu, n.front, n.outcome, n.cpu_seq = time_ns, txn.tid, cpu, 0, outcome, m.cpu[cpu].seq
    n.request_class, n.qos = 0, 0
    n.deadline_ns, n.work_ns, n.ran_ns = txn.txn, age_ns, 0  # the fields `txn` and `age_ns` of OUTCOME


@jit_inline
def _send_outcome(m: Any, txn: Any, outcome: int, cpu: int, age_ns: int, at_ns: int) -> Any:
    """Report what became of a decision record; returns when the core is done with the write."""
    cost = m.cost
    tid = int(txn.tid)
    m.outcomes[outcome] += 1
    if outcome != COMMITTED:
        count_ns(m.ages[1], age_ns)
        _trace(m, at_ns, T_REFUSED, cpu, tid, outcome, txn.txn)
    elif txn.type == RUN:
        count_ns(m.ages[0], age_ns)
        if m.trace_until_ns:
            _draw(m, at_ns, T_APPLIED, cpu, tid, age_ns, txn.txn)
    if cost.inline:
        _fill_outcome(m, m.note, txn, outcome, cpu, age_ns, at_ns)
        _keep(m, m.note)
        feed(m.runtime, m.note)
        return at_ns
    done = at_ns + cost.write_ns
    room = _claim(m, done + cost.flush_ns + cost.wire_ns)
    if room >= 0:
        _fill_outcome(m, m.up[room], txn, outcome, cpu, age_ns, at_ns)
    return done


@jit_inline
def _wake_agent(m: Any) -> None:
    """The agent's next look: when it is free and something is visible, or when a timer is due."""
    due = NEVER
    if m.up_tail > m.up_head:
        due = max(m.agent_free_ns, m.up_visible_ns[m.up_head & (UP - 1)])
    if m.runtime.next_timer_ns < due:
        due = max(m.agent_free_ns, m.runtime.next_timer_ns)
    m.agent_due_ns = due


# ── agent ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@jit_inline
def _settle(m: Any, now_ns: int) -> None:
    """The batch is drained: let the runtime decide at `now_ns`."""
    n = m.end_note
    n.version, n.subsystem, n.type, n.time_ns, n.tid, n.cpu = VERSION, SUBSYSTEM, BATCH_END, now_ns, -1, -1
    _keep(m, n)
    feed(m.runtime, n)


@jit_inline
def _copy(to: Any, d: Any) -> None:
    """Copy a decision that was just written, field by field as it was written."""
    to.mark, to.version, to.subsystem, to.type, to.seq, to.time_ns = d.mark, d.version, d.subsystem, d.type, d.seq, d.time_ns
    to.tid, to.cpu, to.flags, to.cpu_seq, to.txn, to.decided_ns, to.spare = d.tid, d.cpu, d.flags, d.cpu_seq, d.txn, d.decided_ns, d.spare


@jit_inline
def _commit(m: Any, at_ns: int, own_cpu: int) -> Any:
    """Write the runtime's decisions into the CPUs' queues and ring doorbells; returns when the core is done.

    `own_cpu` is the CPU that is here itself (inline), which needs no doorbell; -1: none.
    """
    rt, cost = m.runtime, m.cost
    now = at_ns
    for i in range(rt.made):
        d = rt.out[i]
        cpu = int(d.cpu)
        c = m.cpu[cpu]
        if d.type != KICK and c.down_n == DOWN:
            _send_outcome(m, d, CONGESTED, cpu, now - d.time_ns, now)
        elif d.type != KICK:
            now += cost.agent_write_ns
            _copy(m.down[cpu, c.down_n], d)
            m.down_visible_ns[cpu, c.down_n] = now
            c.down_n += 1
            if m.trace_until_ns:
                _draw(m, now, T_MADE, cpu, d.tid, d.type, d.txn)
        if d.flags & KICKED and cpu != own_cpu:
            now += cost.kick_send_ns
            if m.trace_until_ns:
                _draw(m, now, T_KICK_SENT, cpu, d.tid, 0, d.txn)
            if c.kick_n == KICKS:
                c.kick_n -= 1
            m.kick_ns[cpu, c.kick_n] = now + cost.kick_wire_ns
            c.kick_n += 1
            _arm_kick(m, cpu)
    rt.made = 0
    return now


@jit_inline
def _arm_kick(m: Any, cpu: int) -> None:
    """The doorbell, or the host's own interrupt, is taken when it arrives, or when the CPU leaves the kernel."""
    c = m.cpu[cpu]
    due = NEVER
    if c.kick_n:
        due = m.kick_ns[cpu, 0]
    if c.claim_ns:
        due = min(due, c.claim_ns)
    set_due(m.clock, m.cpus + cpu, due if due == NEVER else max(due, c.free_ns))


@jit_inline
def _run_agent(m: Any, now_ns: int) -> None:
    """The agent drains what it can see, decides, and commits."""
    cost = m.cost
    now = now_ns
    n = 0
    while n < BATCH and m.up_tail > m.up_head and m.up_visible_ns[m.up_head & (UP - 1)] <= now_ns:
        record = m.up[m.up_head & (UP - 1)]
        now += cost.agent_read_ns + cost.message_ns
        if m.trace_until_ns:
            _draw(m, now, T_SEEN, record.cpu, record.tid, record.type, 0)
        _keep(m, record)
        m.up_head += 1
        n += 1
        if not feed(m.runtime, record):
            return
    if m.up_head == m.up_tail:
        m.up_head = m.up_tail = 0  # the same few cache lines serve a queue that is short
    _settle(m, now)
    decided = m.runtime.made
    now = _commit(m, now, -1)
    if m.trace_until_ns:
        _draw(m, now_ns, T_AGENT_BEGIN, 0, -1, 0, 0)
        _draw(m, now, T_AGENT_END, 0, -1, n, decided)
        _draw(m, now, T_DEPTH, 0, -1, m.up_tail - m.up_head, 0)
    m.agent_free_ns = now
    m.agent_busy_ns += now - now_ns
    m.agent_batches += 1
    if m.lost and m.up_tail == m.up_head:
        _resync(m, now)
    _wake_agent(m)


@jit
def _resync(m: Any, at_ns: int) -> None:
    """Messages were lost: the host drops what is staged and replays its whole state. The waker does it."""
    cost = m.cost
    m.lost = 0
    m.resyncs += 1
    now = max(at_ns, m.waker_free_ns)
    now = _send(m, RESYNC, -1, -1, 0, now)
    m.demoted = 0
    for tid in range(m.threads):
        m.thread[tid].demoted = 0
        if m.thread[tid].state != BLOCKED:
            now = _send(m, THREAD_NEW, tid, -1, 0, now)
    for cpu in range(m.cpus):
        c = m.cpu[cpu]
        c.down_n = 0
        now = _send(m, CPU_NEW, c.tid, cpu, 0, now)
        if c.state == IDLE:
            now = _send(m, CPU_IDLE, -1, cpu, 0, now)
    for tid in range(m.threads):
        if m.thread[tid].state == RUNNABLE:
            now = _send(m, THREAD_RUNNABLE, tid, -1, 0, now)
    m.waker_free_ns = now + cost.flush_ns
    m.up_floor_ns = m.up_visible_ns[(m.up_tail - 1) & (UP - 1)]  # what is told from now on does not overtake the replay


# ── host: a CPU between two threads ──────────────────────────────────────────────────────────────────────────────────


@jit_inline
def _check(m: Any, txn: Any) -> Any:
    """What the host's half says to a decision to run a thread, before anything is applied."""
    tid = int(txn.tid)
    if tid < 0 or tid >= m.threads:
        return INVALID
    t = m.thread[tid]
    if t.seq != txn.seq:
        return STALE
    if t.state == RUNNING:
        return ON_CPU
    if t.state != RUNNABLE:
        return NOT_RUNNABLE
    return COMMITTED


@jit_inline
def _drop_down(m: Any, cpu: int, index: int) -> None:
    """Take one decision out of a CPU's queue."""
    c = m.cpu[cpu]
    for i in range(index + 1, c.down_n):
        m.down[cpu, i - 1] = m.down[cpu, i]
        m.down_visible_ns[cpu, i - 1] = m.down_visible_ns[cpu, i]
    c.down_n -= 1


@jit
def _cold_ns(m: Any, cpu: int, tid: int) -> int:
    """What the thread takes longer because others have had the CPU, and its caches, since; its turn begins."""
    c, t = m.cpu[cpu], m.thread[tid]
    others, step = c.turns - t.turn, COLD - 1
    if t.on == cpu:
        step = 0
        while step < COLD - 1 and 1 << step < others:
            step += 1
    cold_ns = 0 if t.on == cpu and others == 0 else m.cold_ns[step]
    c.turns += 1
    t.on, t.turn = cpu, c.turns
    return cold_ns


@jit_inline
def _start(m: Any, cpu: int, txn: Any, at_ns: int) -> None:
    """Commit: the thread goes onto the CPU. `at_ns`: the check is done, the report is not."""
    _place(m, cpu, txn.tid)
    now = _send_outcome(m, txn, COMMITTED, cpu, at_ns - txn.time_ns, at_ns)
    m.committed += 1
    _switch(m, cpu, txn.tid, at_ns, now)


@jit_inline
def _place(m: Any, cpu: int, tid: int) -> None:
    """The thread is the CPU's."""
    c, t = m.cpu[cpu], m.thread[tid]
    t.seq += 1
    t.state = RUNNING
    c.seq += 1


@jit_inline
def _switch(m: Any, cpu: int, tid: int, at_ns: int, told_ns: int) -> None:
    """The CPU goes over to the thread, of which it has told the agent between `at_ns` and `told_ns`."""
    cost = m.cost
    c, t = m.cpu[cpu], m.thread[tid]
    now = told_ns + cost.flush_ns
    m.link_stall_ns += now - at_ns
    switch_ns = cost.switch_ns
    if cost.cold:
        switch_ns += _cold_ns(m, cpu, tid)
    if t.ran_ns:
        switch_ns += cost.resume_ns
    now += switch_ns
    m.switch_ns += switch_ns
    m.switches += 1
    c.tid, c.state, c.start_ns, c.free_ns, c.left_ns, c.ran_before_ns = tid, BUSY, now, now, t.work_ns, t.ran_ns
    count_ns(m.ready, now - t.ready_ns)
    _trace(m, now, T_RUN_BEGIN, cpu, tid, t.request_class, t.request)
    set_due(m.clock, cpu, _finish_ns(cost, now, t.work_ns))


@jit
def _next_thread(m: Any, cpu: int, at_ns: int, seen_ns: int) -> None:
    """The CPU has no thread: take the first valid decision, or fall idle. `seen_ns`: when the kernel was entered, and a prefetch issued."""
    cost = m.cost
    c = m.cpu[cpu]
    now = at_ns
    if cost.inline:
        now += cost.pick_ns
        m.pick_ns += cost.pick_ns
        if c.state != IDLE:
            c.state, c.tid = IDLE, -1
            _send(m, CPU_IDLE, -1, cpu, 0, now)
        _settle(m, now)
        _commit(m, now, cpu)
    first = True
    while True:
        found = c.down_n > 0
        cost_ns = cost.read_ns if found else cost.peek_ns
        sampled = now + cost_ns // 2
        if first and cost.prefetch:
            sampled = seen_ns + cost_ns // 2
            cost_ns = max(min(cost.hit_ns, cost_ns), cost_ns - (now - seen_ns))
        first = False
        if found and m.down_visible_ns[cpu, 0] > sampled:
            found = False
        now += cost_ns
        m.link_stall_ns += cost_ns
        if not found:
            break
        d = m.down[cpu, 0]
        if d.type == DEMOTE:  # of a thread that has left
            _drop_down(m, cpu, 0)
            continue
        outcome = _check(m, d) if d.type == RUN and not d.flags & PREEMPT else COMMITTED
        if d.type == RUN and d.flags & PREEMPT:
            outcome = _check(m, d) if d.cpu_seq == c.seq else STALE
        elif d.type == YIELD_CPU:
            outcome = STALE
        if outcome == COMMITTED:
            _start(m, cpu, d, now)
            _drop_down(m, cpu, 0)
            _arm_kick(m, cpu)
            return
        before = now
        now = _send_outcome(m, d, outcome, cpu, now - d.time_ns, now)
        m.link_stall_ns += now - before
        _drop_down(m, cpu, 0)
    if not cost.inline:
        before = now
        c.state, c.tid = IDLE, -1
        now = _send(m, CPU_IDLE, -1, cpu, 0, now) + cost.flush_ns
        m.link_stall_ns += now - before
    c.free_ns = now
    set_due(m.clock, cpu, NEVER)
    if m.trace_until_ns:
        _draw(m, now, T_IDLE, cpu, -1, 0, 0)
    _arm_kick(m, cpu)


@jit
def _done(m: Any, cpu: int, now_ns: int) -> None:
    """The thread on the CPU has served its request and blocks."""
    cost = m.cost
    c = m.cpu[cpu]
    tid = int(c.tid)
    t = m.thread[tid]
    k = int(t.request_class)
    sojourn = now_ns - t.arrival_ns
    m.busy_ns += c.left_ns
    if m.warmup_ns <= t.arrival_ns < m.stop_ns:
        count_ns(m.latency[k], sojourn)
        m.sums[k] += sojourn
        m.done[k, 0] += 1
        if m.sample_n < m.sample_cap:
            s = carray(as_pointer(m.sample_at), m.sample_cap, SAMPLE)[m.sample_n]
            s.request_class, s.sojourn_ns, s.arrival_ns, s.wait_ns = k, sojourn, t.arrival_ns, sojourn - t.ran_ns - c.left_ns
            m.sample_n += 1
    if m.warmup_ns <= now_ns < m.stop_ns:
        m.done[k, 1] += 1
    t.ran_ns += c.left_ns
    t.work_ns = 0
    t.seq += 1
    m.demoted -= t.demoted
    t.state, t.demoted = BLOCKED, 0
    c.seq += 1
    _trace(m, now_ns, T_RUN_END, cpu, tid, END_BLOCKED, t.ran_ns - c.ran_before_ns)
    now = now_ns + cost.entry_ns
    before = now
    now = _send(m, THREAD_BLOCKED, tid, cpu, 0, now)
    t.ready_ns = now
    m.link_stall_ns += now - before
    c.tid = -1
    _next_thread(m, cpu, now, now_ns)
    m.free[m.free_n] = tid
    m.free_n += 1
    if m.backlog_tail > m.backlog_head:
        request = m.backlog[m.backlog_head & (BACKLOG - 1)]
        m.backlog_head += 1
        _wake(m, request.arrival_ns, request.request_class, request.service_ns, request.number, now)
    if not cost.inline:
        _wake_agent(m)


@jit
def _doorbell(m: Any, cpu: int, now_ns: int) -> None:
    """A doorbell's interrupt on a CPU, or the host's own."""
    cost = m.cost
    c = m.cpu[cpu]
    claimant, taken_ns = -1, cost.kick_receive_ns
    if c.claim_ns and (c.kick_n == 0 or c.claim_ns <= m.kick_ns[cpu, 0]):
        claimant, taken_ns = int(c.claimant), cost.interrupt_ns
        c.claim_ns = 0
    else:
        for i in range(1, c.kick_n):
            m.kick_ns[cpu, i - 1] = m.kick_ns[cpu, i]
        c.kick_n -= 1
    now = now_ns + taken_ns
    m.interrupt_ns += taken_ns
    if m.trace_until_ns:
        _draw(m, now_ns, T_KICK_SEEN, cpu, c.tid, 0, 0)
    if c.state == IDLE:
        _next_thread(m, cpu, now, now_ns)
    else:
        _interrupted(m, cpu, now_ns, now, claimant)
    if not cost.inline:
        _wake_agent(m)


@jit
def _interrupted(m: Any, cpu: int, begin_ns: int, now_ns: int, claimant: int) -> None:
    """A doorbell rang while a thread runs: look through the decisions for a preemption that still holds. Or `claimant` woke, and a demoted one makes way."""
    cost = m.cost
    c = m.cpu[cpu]
    now = now_ns
    chosen = -1
    i = 0
    while i < c.down_n and m.down_visible_ns[cpu, i] <= now:
        read = cost.read_ns
        if i == 0 and cost.prefetch:
            read = max(min(cost.hit_ns, read), read - (now - begin_ns))
        now += read
        m.link_stall_ns += read
        d = m.down[cpu, i]
        if d.type == DEMOTE:
            if d.cpu_seq == c.seq and not m.thread[c.tid].demoted:
                m.thread[c.tid].demoted = 1
                m.demoted += 1
            _drop_down(m, cpu, i)
        elif d.flags & PREEMPT:
            outcome = COMMITTED if d.cpu_seq == c.seq else STALE
            if outcome == COMMITTED and d.type == RUN:
                outcome = _check(m, d)
            if outcome == COMMITTED:
                chosen = i
                break
            m.preempt_stale += 1
            before = now
            now = _send_outcome(m, d, outcome, cpu, now - d.time_ns, now)
            m.link_stall_ns += now - before
            _drop_down(m, cpu, i)
        else:
            i += 1
    ran = min(c.left_ns, max(0, begin_ns - c.start_ns - _ticks(cost, c.start_ns, begin_ns) * cost.tick_ns))
    tid = int(c.tid)
    t = m.thread[tid]
    m.busy_ns += ran
    t.ran_ns += ran
    c.left_ns -= ran
    t.work_ns = c.left_ns
    made_way = chosen < 0 and claimant >= 0 and t.demoted and m.thread[claimant].state == RUNNABLE
    if c.left_ns == 0 or (chosen < 0 and not made_way):
        c.start_ns, c.free_ns = now, now
        set_due(m.clock, cpu, _finish_ns(cost, now, c.left_ns))
        _arm_kick(m, cpu)
        return
    m.preemptions += 1
    t.seq += 1
    t.state = RUNNABLE
    t.ready_ns = now
    c.seq += 1
    _trace(m, begin_ns, T_RUN_END, cpu, tid, END_PREEMPTED, t.ran_ns - c.ran_before_ns)
    if made_way:
        before = now
        now = _send(m, THREAD_PREEMPTED, tid, cpu, 0, now)
        _place(m, cpu, claimant)
        now = _send(m, THREAD_RUNNING, claimant, cpu, 0, now)
        _switch(m, cpu, claimant, before, now)
        _arm_kick(m, cpu)
        return
    d = m.down[cpu, chosen]
    if d.type == YIELD_CPU:
        before = now
        now = _send_outcome(m, d, COMMITTED, cpu, now - d.time_ns, now)
        _drop_down(m, cpu, chosen)
    else:  # what was staged before it gives way
        d.cpu_seq = c.seq
        before = now
        while chosen > 0:
            now = _send_outcome(m, m.down[cpu, 0], SUPERSEDED, cpu, now - m.down[cpu, 0].time_ns, now)
            _drop_down(m, cpu, 0)
            chosen -= 1
    now = _send(m, THREAD_PREEMPTED, tid, cpu, 0, now)
    m.link_stall_ns += now - before
    c.tid = -1
    _next_thread(m, cpu, now, begin_ns)


# ── host: requests ───────────────────────────────────────────────────────────────────────────────────────────────────


@jit_inline
def _wake(m: Any, arrival_ns: int, k: int, service_ns: int, number: int, at_ns: int) -> None:
    """Give a request to a free thread and make that runnable. The waker does one at a time."""
    cost = m.cost
    m.free_n -= 1
    tid = int(m.free[m.free_n])
    if m.free_n and m.thread[tid].ready_ns > at_ns:  # it is about to tell that it has blocked: take the one before
        other = int(m.free[m.free_n - 1])
        m.free[m.free_n - 1] = tid
        tid = other
    t = m.thread[tid]
    begin = max(at_ns, m.waker_free_ns, t.ready_ns)  # not before the thread is known to have blocked
    now = begin + cost.wake_ns
    t.seq += 1
    t.state = RUNNABLE
    t.arrival_ns, t.ready_ns, t.work_ns, t.ran_ns, t.request = arrival_ns, now, service_ns, 0, number
    t.request_class, t.qos = k, m.classes[k].qos
    t.deadline_ns = arrival_ns + m.classes[k].slo_ns if m.classes[k].slo_ns else 0
    before = now
    now = _send(m, THREAD_RUNNABLE, tid, -1, 0, now) + cost.flush_ns
    m.waker_stall_ns += now - before
    m.waker_free_ns = now
    if cost.inline:
        _settle(m, now)
        _commit(m, now, -1)
    _claim_cpu(m, tid, now)
    if not cost.inline:
        _wake_agent(m)


@jit_inline
def _claim_cpu(m: Any, tid: int, at_ns: int) -> None:
    """A thread has woken: if no CPU idles, one that runs a demoted thread is interrupted."""
    if m.demoted == 0:
        return
    claimed = -1
    for cpu in range(m.cpus):
        c = m.cpu[cpu]
        if c.state == IDLE:
            return
        if claimed < 0 and c.tid >= 0 and c.claim_ns == 0 and m.thread[c.tid].demoted:
            claimed = cpu
    if claimed >= 0:
        c = m.cpu[claimed]
        c.claim_ns, c.claimant = at_ns + m.cost.ipi_wire_ns + 1, tid
        _arm_kick(m, claimed)


@jit
def _traced(m: Any) -> Any:
    """The trace's next request."""
    return carray(as_pointer(m.arrivals_at), m.arrivals_n, REQUEST)[m.arrived]


@jit_inline
def _plan_arrival(m: Any) -> None:
    """When the next request comes."""
    if m.arrivals_n:
        due = _traced(m).arrival_ns if m.arrived < m.arrivals_n else NEVER
    else:
        m.arrival_f += m.mean_gap_ns * exponential(m.streams, ARRIVAL)
        due = int(m.arrival_f)
    if due >= m.stop_ns:
        due = NEVER
    m.next_arrival_ns = due


@jit_inline
def _arrive(m: Any, now_ns: int) -> None:
    """A request comes in; without a free thread it waits in the socket queue."""
    if m.arrivals_n:
        k, service = _traced(m).request_class, _traced(m).service_ns
    else:
        k = draw_class(m.streams, m.classes, m.class_count)
        service = draw_service_ns(m.streams, m.classes[k], m.samples_at, m.samples_n)
    number = m.arrived
    m.arrived += 1
    if m.free_n and m.backlog_tail == m.backlog_head:
        _wake(m, now_ns, k, service, number, now_ns)
    elif m.backlog_tail - m.backlog_head < m.backlog_cap:
        q = m.backlog[m.backlog_tail & (BACKLOG - 1)]
        q.arrival_ns, q.service_ns, q.request_class, q.number = now_ns, service, k, number
        m.backlog_tail += 1
    else:
        m.refused += 1
    _plan_arrival(m)


# ── the run ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@jit
def begin(machine: Any) -> None:
    """Introduce the machine, [1] MACHINE, to the agent: every CPU, idle."""
    m = machine[0]
    for cpu in range(m.cpus):
        _send(m, CPU_NEW, -1, cpu, 0, 0)
        _send(m, CPU_IDLE, -1, cpu, 0, 0)
    _plan_arrival(m)
    if not m.cost.inline:
        _wake_agent(m)
    m.now_ns = 0


@jit
def advance(machine: Any, events: int) -> Any:
    """Let up to `events` events happen. Returns RUNNING_ON, FINISHED or POLICY_FAILED."""
    m = machine[0]
    cpus = m.cpus
    inline = m.cost.inline != 0
    for _ in range(events):
        slot = first_due(m.clock)
        now = min(m.clock.time_ns[slot], m.agent_due_ns, m.next_arrival_ns)
        if now >= m.end_ns:
            return FINISHED
        m.now_ns = now
        m.events += 1
        if m.next_arrival_ns == now:
            _arrive(m, now)
        elif m.agent_due_ns == now:
            if inline:
                _settle(m, now)
                _commit(m, now, -1)
            else:
                _run_agent(m, now)
        elif slot < cpus:
            _done(m, slot, now)
        else:
            _doorbell(m, slot - cpus, now)
        if inline:
            _wake_agent(m)
        if m.runtime.failed:
            return POLICY_FAILED
    return RUNNING_ON


@jit
def count_unfinished(machine: Any) -> None:
    """At the end, a request that is not done counts as one that took until now: a lower bound."""
    m = machine[0]
    for tid in range(m.threads):
        t = m.thread[tid]
        if (t.state == RUNNABLE or t.state == RUNNING) and m.warmup_ns <= t.arrival_ns < m.stop_ns:
            k = int(t.request_class)
            count_ns(m.latency[k], m.now_ns - t.arrival_ns)
            m.sums[k] += m.now_ns - t.arrival_ns
            m.done[k, 2] += 1
    for i in range(m.backlog_head, m.backlog_tail):
        q = m.backlog[i & (BACKLOG - 1)]
        if m.warmup_ns <= q.arrival_ns < m.stop_ns:
            count_ns(m.latency[q.request_class], m.now_ns - q.arrival_ns)
            m.sums[q.request_class] += m.now_ns - q.arrival_ns
            m.done[q.request_class, 2] += 1
