"""From records to a trace: what host and agent said to each other, as events of `waveos.trace` that a person can look at.

A message says when it was sent. When it was read is known of one that a decision names as the newest behind it, at the latest: the agent's clock in that
decision; others are drawn as points. A decision says when it was made, and its outcome when it took effect or was refused; a run begins and ends as the
host's messages say.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from waveos.outcome import Outcome
from waveos.sched.records import KICKED, OUTCOME, UNANSWERED, Decision, Message
from waveos.trace import TRACE_EVENT, RunEnd, TraceKind

Records = npt.NDArray[np.void]
Event = tuple[int, int, int, int, int, int]

_ENDS = {
    Message.THREAD_BLOCKED: RunEnd.BLOCKED,
    Message.THREAD_PREEMPTED: RunEnd.PREEMPTED,
    Message.THREAD_YIELDED: RunEnd.YIELDED,
    Message.THREAD_DEAD: RunEnd.DEAD,
}
RUNNABLE, STAGED = 1, 2
QUEUES = {RUNNABLE: "runnable threads", STAGED: "decisions on the way or staged"}
"""Queues whose length is drawn; of the rings themselves it is not known, as their readers do not say how far they are."""


def events_of(messages: Records, decisions: Records) -> npt.NDArray[np.void]:
    """[n] TRACE_EVENT of [m] sched.MESSAGE, in the order of the ring, outcomes among them, and [d] sched.DECISION."""
    return np.array([*_of_decisions(decisions), *_of_messages(messages, decisions), *_lengths(messages, decisions)], TRACE_EVENT)


def _of_decisions(decisions: Records) -> Iterator[Event]:
    for each in decisions:
        made_ns, cpu, tid, txn = (int(each[name]) for name in ("decided_ns", "cpu", "tid", "txn"))
        yield made_ns, TraceKind.DECISION_MADE, cpu, tid, int(each["type"]), txn
        if each["flags"] & KICKED:
            yield made_ns, TraceKind.KICK_SENT, cpu, tid, 0, txn
    made_at, counts = np.unique(decisions["decided_ns"], return_counts=True)
    for made_ns, count in zip(made_at.tolist(), counts.tolist(), strict=True):  # one batch has one clock; how long it took the rings do not say
        yield made_ns, TraceKind.AGENT_BEGIN, 0, -1, 0, 0
        yield made_ns, TraceKind.AGENT_END, 0, -1, 0, count


def _of_messages(messages: Records, decisions: Records) -> Iterator[Event]:
    read_ns: dict[int, int] = {}
    for basis_ns, made_ns in zip(decisions["time_ns"].tolist(), decisions["decided_ns"].tolist(), strict=True):
        read_ns[basis_ns] = min(made_ns, read_ns.get(basis_ns, made_ns))
    kinds = {int(kind) for kind in Decision}
    made = {int(each["txn"]): int(each["type"]) for each in decisions if int(each["type"]) in kinds}
    outcomes = messages.view(OUTCOME)
    for number, each in enumerate(messages):
        kind, time_ns, cpu, tid = (int(each[name]) for name in ("type", "time_ns", "cpu", "tid"))
        if kind == Message.TXN_OUTCOME:
            yield from _of_outcome(outcomes[number], made)
            continue
        if kind in (Message.BATCH_END, Message.RESYNC):
            continue
        yield time_ns, TraceKind.MESSAGE_SENT, cpu, tid, kind, number
        if time_ns in read_ns:
            yield read_ns[time_ns], TraceKind.MESSAGE_SEEN, cpu, tid, kind, number
        if kind in _ENDS and cpu >= 0:
            yield time_ns, TraceKind.RUN_END, cpu, tid, _ENDS[Message(kind)], 0
        elif kind == Message.THREAD_RUNNING:
            yield time_ns, TraceKind.RUN_BEGIN, cpu, tid, int(each["request_class"]) or -1, -1  # class 0: nobody has named one
        elif kind == Message.CPU_IDLE and not each["front"]:
            yield time_ns, TraceKind.IDLE_BEGIN, cpu, -1, 0, 0


def _of_outcome(each: Any, made: dict[int, int]) -> Iterator[Event]:
    time_ns, cpu, tid, txn = (int(each[name]) for name in ("time_ns", "cpu", "tid", "txn"))
    if each["outcome"] != Outcome.COMMITTED:
        yield time_ns, TraceKind.DECISION_REFUSED, cpu, tid, int(each["outcome"]), txn
        return
    yield time_ns, TraceKind.DECISION_APPLIED, cpu, tid, int(each["age_ns"]), txn
    if tid >= 0 and made.get(txn, int(Decision.RUN)) == Decision.RUN:
        yield time_ns, TraceKind.RUN_BEGIN, cpu, tid, -1, -1


def _lengths(messages: Records, decisions: Records) -> Iterator[Event]:
    """Lengths from the first record on; what was there before it is not known, so they are lengths beyond the smallest."""
    kinds, outcome = messages["type"], messages.view(OUTCOME)["outcome"]
    runs = (kinds == Message.TXN_OUTCOME) & (outcome == Outcome.COMMITTED) & (messages["tid"] >= 0)
    more = np.isin(kinds, (Message.THREAD_RUNNABLE, Message.THREAD_PREEMPTED, Message.THREAD_YIELDED))
    less = runs | (kinds == Message.THREAD_RUNNING)
    yield from _length(RUNNABLE, messages["time_ns"], more.astype(int) - less)
    answered = messages["time_ns"][kinds == Message.TXN_OUTCOME]
    asked = decisions["decided_ns"][~np.isin(decisions["type"], UNANSWERED)]
    times = np.concatenate([asked, answered])
    yield from _length(STAGED, times, np.concatenate([np.ones(len(asked), int), -np.ones(len(answered), int)]))


def _length(queue: int, times_ns: Any, changes: Any) -> Iterator[Event]:
    order = np.argsort(times_ns, kind="stable")
    order = order[changes[order] != 0]
    if not len(order):
        return
    lengths = np.cumsum(changes[order])
    lengths -= min(0, int(lengths.min()))
    for time_ns, length in zip(times_ns[order].tolist(), lengths.tolist(), strict=True):
        yield time_ns, TraceKind.QUEUE_DEPTH, queue, -1, length, 0
