"""The agent's data path: requests come in at the client's port, the policy says where each goes, replies go back; packet by packet, where the packets lie.

One loop, compiled: receive, parse, feed the runtime (`waveos.net.laws`, the same function as in every world), carry out what it decides. Every request has
a slot; its number travels in the packet as the ticket, and comes back with the reply. What makes no sense is dropped and counted.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from waveos.host.xsk.echo import turn
from waveos.host.xsk.rings import (
    complete,
    fill,
    give_back,
    load8,
    load16,
    load32,
    load64,
    receive,
    room,
    send,
    store8,
    store16,
    store32,
    waiting_to_send,
    wake,
)
from waveos.jit import jit, jit_inline, store_word
from waveos.net.laws import (
    BATCH_END,
    FLOW_CLOSED,
    FLOW_OPENED,
    LINK_DOWN,
    LINK_UP,
    REQUEST_ARRIVED,
    REQUEST_DONE,
    REQUEST_LOST,
    TXN_OUTCOME,
    WORKER_GONE,
    WORKER_NEW,
    feed,
)
from waveos.net.orders import MARK, SET_ENTRY, SET_RATE, SHED, STEER
from waveos.net.rates import RATES, admit, limit
from waveos.net.records import CLASSES, MAX_REQUESTS, REFUSED, REPLY, REQUEST, RPC, RPC_MAGIC, RPC_VERSION, SUBSYSTEM, TABLE_ENTRIES
from waveos.outcome import Outcome
from waveos.primitives import clock_ns, pause, sleep_us
from waveos.record import VERSION

BATCH = 64
LOOKS_BEFORE_NAP = 2_000
LOOK_FOR_LOST_NS = 10_000_000
FLOWS, FLOW_IDLE_NS = 4_096, 10_000_000_000
"""Flows that are known at once (one that falls into the place of another closes it), and how long one is open without a request."""
CUT_NS = 100_000_000
"""A wire on which nothing has gone out for so long, though something wants to, is cut."""
SERVING, POLICY_FAILED = 0, 1
COMMITTED, STALE, INVALID = int(Outcome.COMMITTED), int(Outcome.STALE), int(Outcome.INVALID)
FREE, WAITING, SENT = range(3)
IP_AT, UDP_AT, RPC_AT = 14, 34, 42
"""Where headers begin in a packet: the XDP program lets no IP options pass."""
FIELDS: Any = RPC.fields
VERSION_AT, KIND_AT, CLASS_AT, STATUS_AT, MARKED_AT, SLO_AT, WORK_AT, TICKET_AT = (
    RPC_AT + int(FIELDS[name][1]) for name in ("version", "kind", "request_class", "status", "marked", "slo_us", "work_ns", "ticket")
)
HEADERS_BYTES = RPC_AT + RPC.itemsize

SLOT = np.dtype(
    [("seq", "i8"), ("frame", "i8"), ("length", "i8"), ("sent_ns", "i8"), ("worker", "i4"), ("state", "u1"), ("marked", "u1")], align=True
)
FLOW = np.dtype([("seen_ns", "i8"), ("flow", "u4"), ("open", "u4")])
FORWARDER = np.dtype(
    [
        ("client_beat_at", "i8"),  # addresses of the two programs' heartbeats
        ("host_beat_at", "i8"),
        ("gone_at", "i8"),  # address of the word in which the host says which workers are gone, a bit each
        ("gone", "u8"),  # as last seen
        ("port", "i8"),  # of the service; worker w's own is port + 1 + w
        ("timeout_ns", "i8"),
        ("nap_us", "i8"),  # 0: never sleeps
        ("started", "i8"),
        ("free_n", "i8"),
        ("next_look_ns", "i8"),
        ("idle_looks", "i8"),
        ("applied", "i8"),  # decisions of `out` that are carried out
        ("requests", "i8"),  # counters
        ("replies", "i8"),
        ("steered", "i8"),
        ("shed", "i8"),
        ("malformed", "i8"),  # of the service, but no request or reply of a Wave service: dropped
        ("unknown_class", "i8"),
        ("no_slot", "i8"),  # more requests under way than there are slots: refused
        ("lost", "i8"),  # no reply within the timeout
        ("late", "i8"),  # a reply nobody waits for, say of the agent before: forwarded
        ("refused", "i8"),  # decisions that could not be applied
        ("over_rate", "i8"),  # requests of a class that had its rate: refused
        ("by_table", "i8"),  # requests that an entry of the table steered
        ("cuts", "i8"),  # how often a wire was cut
        ("moved_ns", "i8", (2,)),  # when something last went out to the client and to the host, or nothing wanted to
        ("position", "i8", (2,)),  # how far the kernel had come with sending then
        ("cut", "u1", (2,)),
        ("flows", FLOW, (FLOWS,)),
        ("rates", RATES),
        ("table", "i4", (TABLE_ENTRIES,)),  # the worker of an entry; -1: the policy is asked
        ("free", "i4", (MAX_REQUESTS,)),
        ("slot", SLOT, (MAX_REQUESTS,)),
    ],
    align=True,
)
COUNTERS = (
    *("requests", "replies", "steered", "shed", "malformed", "unknown_class", "no_slot", "lost", "late", "refused"),
    *("over_rate", "by_table", "cuts"),
)


@jit_inline
def _say(rt: Any, m: Any, kind: int, slot: int, worker: int, seq: int, time_ns: int) -> None:
    m.mark, m.version, m.subsystem, m.type = 0, VERSION, SUBSYSTEM, kind
    m.seq, m.time_ns, m.request, m.worker, m.front, m.outcome = seq, time_ns, slot, worker, 0, 0
    feed(rt, m)


@jit_inline
def _release(f: Any, slot: int) -> None:
    f.slot[slot].state = FREE
    f.free[f.free_n] = slot
    f.free_n += 1


@jit_inline
def _is_ours(at: int, length: int, kind: int) -> Any:
    """Whether the packet at address `at` is a request or reply of a Wave service."""
    return length >= HEADERS_BYTES and load16(at + RPC_AT) == RPC_MAGIC and load8(at + VERSION_AT) == RPC_VERSION and load8(at + KIND_AT) == kind


@jit_inline
def _forget_checksum(at: int) -> None:
    """UDP over IPv4 may go without one; the payload was changed."""
    store16(at + UDP_AT + 6, 0)


@jit
def _refuse(client: Any, frames: Any, packets: Any, i: int) -> None:
    """Send packet i, a request, back as a refusal."""
    at = client.umem_at + packets[i].at
    turn(at)
    store8(at + KIND_AT, REPLY)
    store8(at + STATUS_AT, REFUSED)
    _forget_checksum(at)
    if not send(client, packets, i, 1):
        give_back(frames, packets[i].at)


@jit_inline
def _hand_over(f: Any, host: Any, packets: Any, slot: int, worker: int, now: int) -> None:
    """To the worker's own port, with the ticket that its reply brings back; there is room in the ring. packets[0], which has been looked at, is used for it."""
    s = f.slot[slot]
    packets[0].at, packets[0].length = s.frame, s.length
    at = host.umem_at + s.frame
    store16(at + UDP_AT + 2, _swapped(f.port + 1 + worker))
    store32(at + TICKET_AT, (s.seq & 0x3FFFF) * MAX_REQUESTS | slot)
    _forget_checksum(at)
    send(host, packets, 0, 1)
    s.state, s.worker, s.sent_ns = SENT, worker, now
    f.steered += 1


@jit_inline
def _note_flow(f: Any, rt: Any, m: Any, flow: int, request_class: int, now: int) -> None:
    """Tell the policy of a flow that begins, and of the one whose place it takes."""
    known = f.flows[flow % FLOWS]
    known.seen_ns, was = now, known.flow
    if known.open and was == flow:
        return
    if known.open:
        m.flow, m.request_class = was, 0
        _say(rt, m, FLOW_CLOSED, -1, -1, 0, now)
    known.flow, known.open = flow, 1
    m.flow, m.request_class = flow, request_class
    _say(rt, m, FLOW_OPENED, -1, -1, 0, now)


@jit
def _close_idle_flows(f: Any, rt: Any, m: Any, now: int) -> None:
    for i in range(FLOWS):
        known = f.flows[i]
        if known.open and now - known.seen_ns > FLOW_IDLE_NS:
            known.open = 0
            m.flow, m.request_class = known.flow, 0
            _say(rt, m, FLOW_CLOSED, -1, -1, 0, now)


@jit
def _take_requests(f: Any, client: Any, host: Any, frames: Any, rt: Any, m: Any, packets: Any, now: int) -> int:
    got = receive(client, packets, BATCH)
    for i in range(got):
        at = client.umem_at + packets[i].at
        if not _is_ours(at, packets[i].length, REQUEST):
            f.malformed += 1
            give_back(frames, packets[i].at)
            continue
        request_class = load8(at + CLASS_AT)
        if request_class >= CLASSES:
            f.unknown_class += 1
            give_back(frames, packets[i].at)
            continue
        if not admit(f.rates, request_class, now):
            f.over_rate += 1
            _refuse(client, frames, packets, i)
            continue
        # Both addresses' low bits and both ports: what a network card's hash takes, mixed (Knuth's multiplicative hashing).
        flow = ((load32(at + 26) ^ load32(at + 30) ^ load32(at + UDP_AT)) * 2_654_435_761 & 0xFFFF_FFFF) >> 8
        worker = f.table[flow % TABLE_ENTRIES]
        if worker >= 0 and (f.gone >> np.uint64(worker)) & np.uint64(1):
            worker = -1
        if f.free_n == 0 or frames.n == 0 or (worker >= 0 and not room(host)):
            f.no_slot += 1
            _refuse(client, frames, packets, i)
            continue
        f.free_n -= 1
        slot = int(f.free[f.free_n])
        s = f.slot[slot]
        s.seq, s.frame, s.length, s.state, s.marked = s.seq + 1, packets[i].at, packets[i].length, WAITING, 0
        f.requests += 1
        _note_flow(f, rt, m, flow, request_class, now)
        if worker >= 0:
            f.by_table += 1
            _hand_over(f, host, packets, slot, int(worker), now)
            continue
        slo_us = load32(at + SLO_AT)
        m.flow, m.size, m.request_class, m.depth = flow, packets[i].length, request_class, 0
        m.deadline_ns, m.work_ns = now + slo_us * 1_000 if slo_us else 0, load32(at + WORK_AT)
        _say(rt, m, REQUEST_ARRIVED, slot, -1, s.seq, now)
    return got


@jit
def _take_replies(f: Any, client: Any, host: Any, frames: Any, rt: Any, m: Any, packets: Any, now: int) -> int:
    got = receive(host, packets, BATCH)
    kept = 0
    for i in range(got):
        at = host.umem_at + packets[i].at
        if not _is_ours(at, packets[i].length, REPLY):
            f.malformed += 1
            give_back(frames, packets[i].at)
            continue
        ticket = load32(at + TICKET_AT)
        slot = ticket & (MAX_REQUESTS - 1)
        s = f.slot[slot]
        if s.state == SENT and (s.seq & 0x3FFFF) == ticket // MAX_REQUESTS:
            s.seq += 1
            m.work_ns = load32(at + WORK_AT)
            _say(rt, m, REQUEST_DONE, slot, int(s.worker), s.seq, now)
            if s.marked:
                store8(at + MARKED_AT, 1)
                _forget_checksum(at)
            _release(f, slot)
            f.replies += 1
        else:
            f.late += 1
        packets[kept].at, packets[kept].length = packets[i].at, packets[i].length
        kept += 1
    sent = send(client, packets, 0, kept)
    for i in range(sent, kept):
        give_back(frames, packets[i].at)
    return got


@jit
def _carry_out(f: Any, client: Any, host: Any, frames: Any, rt: Any, m: Any, packets: Any, now: int) -> None:
    """Apply what the runtime has decided, and tell it what became of each; what finds no room in the ring stays for the next turn."""
    while f.applied < rt.made and not rt.failed:
        d = rt.out[f.applied]
        kind, slot, worker, seq = int(d.type), int(d.request), int(d.worker), int(d.seq)
        if kind != STEER and kind != SHED and kind != MARK:
            f.applied += 1
            if not _set(f, kind, int(d.index), int(d.flow), worker, int(d.value)):
                f.refused += 1
                _answer(rt, m, -1, worker, 0, INVALID, now)
            continue
        s = f.slot[slot]
        outcome = COMMITTED
        if s.state != WAITING or s.seq != seq:
            outcome = STALE
        elif kind == MARK:
            s.marked = 1
            f.applied += 1
            continue
        elif kind == STEER and not room(host):
            return
        else:
            s.seq += 1
            if kind == SHED:
                packets[0].at, packets[0].length = s.frame, s.length
                _refuse(client, frames, packets, 0)
                _release(f, slot)
                f.shed += 1
            else:
                _hand_over(f, host, packets, slot, worker, now)
        f.refused += outcome != COMMITTED
        f.applied += 1
        _answer(rt, m, slot, worker, int(s.seq), outcome, now)
    f.applied = rt.made = 0


@jit_inline
def _answer(rt: Any, m: Any, slot: int, worker: int, seq: int, outcome: int, now: int) -> None:
    m.mark, m.version, m.subsystem, m.type = 0, VERSION, SUBSYSTEM, TXN_OUTCOME
    m.seq, m.time_ns, m.request, m.worker, m.front, m.outcome = seq, now, slot, worker, 0, outcome
    feed(rt, m)


@jit_inline
def _set(f: Any, kind: int, index: int, flow: int, worker: int, value: int) -> Any:
    """A class's rate, or an entry of the table; False for one that there is not."""
    if kind == SET_RATE:
        limit(f.rates, index, value)
        return True
    entry = index if kind == SET_ENTRY else flow % TABLE_ENTRIES
    if entry >= TABLE_ENTRIES:
        return False
    f.table[entry] = worker
    return True


@jit_inline
def _swapped(port: int) -> Any:
    return (port & 0xFF) << 8 | (port >> 8) & 0xFF


@jit
def _find_lost(f: Any, rt: Any, m: Any, now: int) -> None:
    for slot in range(MAX_REQUESTS):
        s = f.slot[slot]
        if s.state == SENT and (now - s.sent_ns > f.timeout_ns or (f.gone >> np.uint64(s.worker)) & np.uint64(1)):
            s.seq += 1
            m.work_ns = 0
            _say(rt, m, REQUEST_LOST, slot, int(s.worker), s.seq, now)
            _release(f, slot)
            f.lost += 1


@jit
def _look_at_workers(f: Any, rt: Any, m: Any, now: int) -> None:
    """Who is gone since the last look, and who is back."""
    gone = np.uint64(load64(f.gone_at))
    if gone == f.gone:
        return
    changed, f.gone = gone ^ f.gone, gone
    for worker in range(rt.workers):
        if (changed >> np.uint64(worker)) & np.uint64(1):
            _say(rt, m, WORKER_GONE if (gone >> np.uint64(worker)) & np.uint64(1) else WORKER_NEW, -1, worker, 0, now)


@jit_inline
def _watch(f: Any, which: int, xsk: Any, rt: Any, m: Any, now: int) -> None:
    """Tell the policy when a wire (0: to the client, 1: to the host) is cut, and when it is whole again."""
    pending, position = waiting_to_send(xsk)
    if pending == 0 or position != f.position[which]:
        f.position[which], f.moved_ns[which] = position, now
        if f.cut[which]:
            f.cut[which] = 0
            _say(rt, m, LINK_UP, -1, which, 0, now)
    elif not f.cut[which] and now - f.moved_ns[which] > CUT_NS:
        f.cut[which] = 1
        f.cuts += 1
        _say(rt, m, LINK_DOWN, -1, which, 0, now)


@jit
def forward(forwarder: Any, client: Any, host: Any, frames: Any, runtime: Any, message: Any, packets: Any, until_ns: int) -> int:
    """Serve until `until_ns` on the monotonic clock. Returns SERVING or POLICY_FAILED.

    forwarder: [1] FORWARDER; client, host, frames: `record`s of the two ports and their common frames; runtime: [1] RUNTIME; message: [1] MESSAGE;
    packets: [BATCH] PACKET.
    """
    f, c, h, stack, rt, m = forwarder[0], client[0], host[0], frames[0], runtime[0], message[0]
    if not f.started:
        f.started, f.free_n = 1, MAX_REQUESTS
        begun = clock_ns() >> 12 & 0x3FFFF  # so that a late reply to the agent before carries no ticket of ours
        for slot in range(MAX_REQUESTS):
            f.free[slot], f.slot[slot].seq = slot, begun
        f.table[:] = -1
        for worker in range(rt.workers):
            _say(rt, m, WORKER_NEW, -1, worker, 0, clock_ns())
    now = clock_ns()
    while now < until_ns:
        store_word(f.client_beat_at, now)
        store_word(f.host_beat_at, now)
        complete(c, stack)
        complete(h, stack)
        fill(c, stack)
        fill(h, stack)
        got = _take_replies(f, c, h, stack, rt, m, packets, now)
        if (
            not rt.made
        ):  # while a full ring holds decisions back, requests wait in the socket's ring, and what does not fit there is the kernel's to drop
            got += _take_requests(f, c, h, stack, rt, m, packets, now)
        if got or rt.waiting:
            _say(rt, m, BATCH_END, -1, -1, 0, clock_ns())
        if rt.made:
            _carry_out(f, c, h, stack, rt, m, packets, now)
        wake(h)
        wake(c)
        if rt.failed:
            return POLICY_FAILED
        if now > f.next_look_ns:
            f.next_look_ns = now + LOOK_FOR_LOST_NS
            _look_at_workers(f, rt, m, now)
            _find_lost(f, rt, m, now)
            _close_idle_flows(f, rt, m, now)
            _watch(f, 0, c, rt, m, now)
            _watch(f, 1, h, rt, m, now)
        if got:
            f.idle_looks = 0
        else:
            f.idle_looks += 1
            if f.nap_us and f.idle_looks > LOOKS_BEFORE_NAP:
                sleep_us(f.nap_us)
            else:
                pause()
        now = clock_ns()
    return SERVING
