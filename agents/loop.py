"""The polling loop of an agent: drain messages, feed the runtime, send decisions, ring the doorbell, show a sign of life.

Compiled, and one for all enclaves of the agent, which it serves in turn; it returns now and then so that signals are heard and requests answered.
What it knows of an enclave is one record, ENCLAVE, that `join` fills in.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import carray

from waveos import ring
from waveos.histogram import BINS, count_ns
from waveos.jit import as_pointer, jit, jit_inline
from waveos.primitives import clock_ns, pause, ring_doorbell, sleep_us
from waveos.record import RECORD_WORDS
from waveos.sched.laws import BATCH_END, OUT, RUNTIME, TXN_OUTCOME, feed
from waveos.sched.records import KICKED, MESSAGE
from waveos.tape import DECIDED

BATCH = 64
LOOKS = 16
"""Looks at an empty queue between two readings of the clock."""
BEAT_NS = 100_000
"""Between two signs of life."""
NAP_US = 50
TAPE = BATCH + 1 + OUT
"""Records that one turn may put on a tape."""
SLICE_OVER, POLICY_FAILED, TAPE_FULL = 0, 1, 2

ENCLAVE = np.dtype(
    [
        ("serving", "i8"),  # 0: the loop passes it over
        ("replay", "i8"),  # the stream brings its own BATCH_ENDs; else a batch ends when the ring is drained, or after BATCH messages
        ("doorbell", "i8"),  # eventfd that the host waits on; -1: none
        ("bell", "i8"),  # flags of decisions that ring it: a host that looks by itself wants to be woken for preemptions alone
        ("messages_at", "i8"),  # addresses and sizes of the rings' words, and of this side's positions,
        ("messages_words", "i8"),
        ("messages_own_at", "i8"),
        ("txns_at", "i8"),
        ("txns_words", "i8"),
        ("txns_own_at", "i8"),
        ("runtime_at", "i8"),  # of the runtime, of `inbox`,
        ("inbox_at", "i8"),
        ("tape_at", "i8"),  # of room for records to be kept; 0 of them: nothing is recorded
        ("tape_records", "i8"),
        ("event_at", "i8"),  # of three histograms of BINS words: from the host's clock in a message to its being taken,
        ("wakeup_at", "i8"),  # the same of those without a CPU: wake-ups, by whoever did them on whatever core,
        ("decide_at", "i8"),  # from taking a batch to having sent its decisions; 0: nothing is timed
        ("unsettled", "i8"),  # messages were fed since the last BATCH_END
        ("kicked", "i8"),  # a decision was sent that cannot wait
        ("beat_ns", "i8"),  # when the next sign of life is due
        ("now_ns", "i8"),  # the clock, as last read
        ("heard_ns", "i8"),  # when the last message came
        ("taped", "i8"),
        ("messages", "i8"),  # counters
        ("decisions", "i8"),
        ("batches", "i8"),
        ("rings", "i8"),  # of the doorbell
        ("inbox", MESSAGE),
    ],
    align=True,
)
OUT_AT = int(RUNTIME.fields["out"][1])  # type: ignore[index]
INBOX_AT = int(ENCLAVE.fields["inbox"][1])  # type: ignore[index]


def join(
    enclave: np.ndarray[Any, Any],
    up: Any,
    down: Any,
    runtime: np.ndarray[Any, Any],
    *,
    replay: bool = False,
    doorbell: int = -1,
    bell: int = KICKED,
    tape: npt.NDArray[np.void] | None = None,
    times: npt.NDArray[np.int64] | None = None,
) -> None:
    """Let the loop serve it: `enclave` is [1] ENCLAVE, `up` and `down` the queues of messages and transactions of its link. The arrays must outlive it.

    tape: [n] MESSAGE, at least TAPE of them; times: [3, BINS], the histograms `event`, `wakeup` and `decide`.
    """
    for name, array in (("messages", up.memory), ("txns", down.memory)):
        enclave[f"{name}_at"], enclave[f"{name}_words"] = array.ctypes.data, array.size
    enclave["messages_own_at"], enclave["txns_own_at"] = up.own.ctypes.data, down.own.ctypes.data
    enclave["runtime_at"], enclave["inbox_at"] = runtime.ctypes.data, enclave.ctypes.data + INBOX_AT
    enclave["tape_at"], enclave["tape_records"] = (0, 0) if tape is None else (tape.ctypes.data, len(tape))
    for row, name in enumerate(("event_at", "wakeup_at", "decide_at")):
        enclave[name] = 0 if times is None else times[row].ctypes.data
    enclave["replay"], enclave["doorbell"], enclave["bell"] = replay, doorbell, bell
    enclave["unsettled"] = enclave["kicked"] = enclave["beat_ns"] = enclave["taped"] = 0
    enclave["heard_ns"] = clock_ns()
    enclave["serving"] = 1


@jit
def serve(enclaves: Any, idle_ns: int, until_ns: int) -> int:
    """Serve [n] ENCLAVE until `until_ns` on the monotonic clock. Returns SLICE_OVER, POLICY_FAILED, or TAPE_FULL: empty the tapes.

    After `idle_ns` without a message (0: never) the loop sleeps between looks.
    """
    served = 0
    for i in range(enclaves.shape[0]):
        served += enclaves[i].serving != 0
    looks = max(1, LOOKS // max(1, served))
    while True:
        now_ns = heard_ns = due_ns = 0
        for i in range(enclaves.shape[0]):
            e = enclaves[i]
            if e.serving:
                status = _turn(e, looks)
                if status != SLICE_OVER:
                    return status  # type: ignore[no-any-return]
                now_ns, heard_ns = e.now_ns, max(heard_ns, e.heard_ns)
        if now_ns >= until_ns or served == 0:
            return SLICE_OVER
        if idle_ns and now_ns - heard_ns > idle_ns:
            for i in range(enclaves.shape[0]):
                if enclaves[i].serving:
                    timer_ns = _runtime(enclaves[i]).next_timer_ns
                    due_ns = timer_ns if due_ns == 0 else min(due_ns, timer_ns)
            if due_ns - now_ns > 4_000 * NAP_US:
                sleep_us(NAP_US)


@jit_inline
def _runtime(e: Any) -> Any:
    return carray(as_pointer(e.runtime_at), 1, RUNTIME)[0]


@jit
def _turn(e: Any, looks: int) -> int:
    """One enclave's turn: at most BATCH messages, what its policy decides on them, and a look for more if there were none."""
    messages = carray(as_pointer(e.messages_at), e.messages_words, np.int64)
    own = carray(as_pointer(e.messages_own_at), ring.OWN_WORDS, np.int64)
    txns = carray(as_pointer(e.txns_at), e.txns_words, np.int64)
    rt, record = _runtime(e), e.inbox
    inbox = carray(as_pointer(e.inbox_at), RECORD_WORDS, np.int64)
    taping, timing = e.tape_records != 0, e.event_at != 0
    if taping and e.taped + TAPE > e.tape_records:
        return TAPE_FULL
    n, began_ns, decided = 0, 0, e.decisions
    if rt.made == 0 or _send_decisions(e, txns, rt):  # else the ring is still full: no more is taken in
        while n < BATCH and ring.poll_one(messages, own, inbox, 0):
            n += 1
            if timing:
                began_ns = _time_event(e, record, began_ns)
            if taping:
                _keep(e, inbox, 0, 0)
            if not feed(rt, record):
                return POLICY_FAILED
            if rt.made and not _send_decisions(e, txns, rt):
                break
    now_ns = clock_ns()
    e.now_ns = now_ns
    if n:
        e.messages += n
        e.unsettled, e.heard_ns = 1, now_ns
    if rt.made == 0 and not e.replay and (e.unsettled or rt.next_timer_ns <= now_ns):
        record.mark, record.type, record.time_ns, record.tid, record.cpu = 0, BATCH_END, now_ns, -1, -1
        e.batches += 1
        e.unsettled = 0
        if taping:
            _keep(e, inbox, 0, 0)
        if not feed(rt, record):
            return POLICY_FAILED
        if rt.made:
            _send_decisions(e, txns, rt)
    if e.kicked:
        e.kicked = 0
        if e.doorbell >= 0:
            ring.settle(txns)
            ring_doorbell(e.doorbell)
            e.rings += 1
    if timing and began_ns and e.decisions != decided:
        count_ns(carray(as_pointer(e.decide_at), BINS, np.int64), clock_ns() - began_ns)
    if now_ns >= e.beat_ns:
        e.beat_ns = now_ns + BEAT_NS
        ring.beat(txns, now_ns)
    if n == 0:
        _look(messages, own, looks)
    return SLICE_OVER


@jit_inline
def _send_decisions(e: Any, txns: Any, rt: Any) -> Any:
    """Send what the runtime decided, as far as there is room; False if some is left, in `out`."""
    own = carray(as_pointer(e.txns_own_at), ring.OWN_WORDS, np.int64)
    out = carray(as_pointer(e.runtime_at + OUT_AT), OUT * RECORD_WORDS, np.int64)
    sent = 0
    while sent < rt.made and ring.room(txns, own, 1):
        if rt.out[sent].flags & e.bell:
            e.kicked = 1
        if e.tape_records:
            _keep(e, out, sent * RECORD_WORDS, DECIDED)
        ring.send_one(txns, own, out, sent * RECORD_WORDS)
        sent += 1
    e.decisions += sent
    if sent < rt.made:
        for i in range(sent, rt.made):
            rt.out[i - sent] = rt.out[i]
        rt.made -= sent
        return False
    rt.made = 0
    return True


@jit
def _time_event(e: Any, record: Any, began_ns: int) -> int:
    """How old the message is on being taken; when this batch began."""
    now_ns = clock_ns()
    if record.type < TXN_OUTCOME:
        count_ns(carray(as_pointer(e.event_at), BINS, np.int64), now_ns - record.time_ns)
        if record.cpu < 0:
            count_ns(carray(as_pointer(e.wakeup_at), BINS, np.int64), now_ns - record.time_ns)
    return began_ns or now_ns


@jit
def _keep(e: Any, words: Any, at: int, mark: int) -> None:
    """One record onto the tape."""
    tape = carray(as_pointer(e.tape_at), e.tape_records * RECORD_WORDS, np.int64)
    to = e.taped * RECORD_WORDS
    tape[to] = words[at] & ring.HIGH | mark
    for w in range(1, RECORD_WORDS):
        tape[to + w] = words[at + w]
    e.taped += 1


@jit
def _look(messages: Any, own: Any, looks: int) -> None:
    """Wait a little for a message: a look costs less than the clock does, so that it is seen sooner."""
    for _ in range(looks):
        if ring.prefetch(messages, own):
            return
        pause()
