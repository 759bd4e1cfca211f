"""The polling loop of an agent: drain messages, feed the runtime, send decisions. Compiled; it returns now and then so that signals are heard."""

from __future__ import annotations

from typing import Any

from waveos import ring
from waveos.jit import jit
from waveos.primitives import clock_ns, pause
from waveos.record import RECORD_WORDS
from waveos.sched.laws import BATCH_END, feed

BATCH = 64
LOOKS = 16
"""Looks at an empty queue between two readings of the clock."""
SLICE_OVER, POLICY_FAILED = 0, 1


@jit
def _send_decisions(txns: Any, own: Any, rt: Any, out_words: Any, until_ns: int) -> bool:
    """Send what the runtime decided, waiting for room; False if there was none until then: what is left stays in `out`."""
    sent = 0
    while sent < rt.made:
        if ring.room(txns, own, 1):
            sent += ring.send_one(txns, own, out_words, sent * RECORD_WORDS)
        elif clock_ns() >= until_ns:
            for i in range(sent, rt.made):
                rt.out[i - sent] = rt.out[i]
            rt.made -= sent
            return False
        else:
            pause()
    rt.made = 0
    return True


@jit
def serve(
    messages: Any,
    messages_own: Any,
    txns: Any,
    txns_own: Any,
    runtime: Any,
    out_words: Any,
    inbox: Any,
    inbox_words: Any,
    replay: bool,
    until_ns: int,
) -> Any:
    """Serve a link until `until_ns` on the monotonic clock. Returns SLICE_OVER or POLICY_FAILED.

    messages, txns: the rings' words, with this side's positions; runtime: [1] RUNTIME and the words of its `out`; inbox: [1] MESSAGE and its words.
    With `replay` the stream brings its own BATCH_ENDs; else a batch ends when the ring is drained, or after BATCH messages.
    """
    rt, record = runtime[0], inbox[0]
    if rt.made and not _send_decisions(txns, txns_own, rt, out_words, until_ns):
        return SLICE_OVER
    while True:
        n = 0
        while n < BATCH and ring.poll_one(messages, messages_own, inbox_words, 0):
            n += 1
            if not feed(rt, record):
                return POLICY_FAILED
            if rt.made and not _send_decisions(txns, txns_own, rt, out_words, until_ns):
                return SLICE_OVER
        now = clock_ns()
        if not replay and (n or rt.next_timer_ns <= now):
            record.type, record.time_ns, record.tid, record.cpu = BATCH_END, now, -1, -1
            if not feed(rt, record):
                return POLICY_FAILED
            if rt.made and not _send_decisions(txns, txns_own, rt, out_words, until_ns):
                return SLICE_OVER
        if now >= until_ns:
            return SLICE_OVER
        if n == 0:
            _look(messages, messages_own)


@jit
def _look(messages: Any, own: Any) -> None:
    """Wait a little for a message: a look costs less than the clock does, so that it is seen sooner."""
    for _ in range(LOOKS):
        if ring.prefetch(messages, own):
            return
        pause()
