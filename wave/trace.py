"""The trace: what an engine or a daemon writes down of a run, event by event, for a person to look at.

A trace is one structured array of dtype `TRACE_EVENT`, in any order of time. It is a view for people (see
`waveos.report.perfetto`), not the recorded message stream that a replay needs.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from waveos.meaning import Told

TRACE_EVENT: np.dtype[np.void] = np.dtype([("time_ns", "<i8"), ("kind", "<i8"), ("cpu", "<i4"), ("tid", "<i4"), ("value", "<i8"), ("extra", "<i8")])
"""One event, 40 bytes. `tid` is -1 where no thread is meant; what `cpu`, `value` and `extra` hold is said at each `TraceKind`."""


class TraceKind(Told):
    """One member a kind of event; `meaning` says what happened and what `value` and `extra` hold."""

    RUN_BEGIN = 1, "host `cpu` starts or resumes `tid`; value: its request class; extra: the request's number, -1 if it has none"
    RUN_END = 2, "host `cpu` stops running `tid`; value: why, a RunEnd; extra: ns run since RUN_BEGIN"
    IDLE_BEGIN = 3, "host `cpu` has nothing to run until its next RUN_BEGIN"
    MESSAGE_SENT = 4, "host `cpu` put a message about `tid` on the way; value: its sched.Message type; extra: its number, 0 if it has none"
    MESSAGE_SEEN = 5, "the agent read that message; `tid`, value and extra as in MESSAGE_SENT"
    DECISION_MADE = 6, "the agent wrote a decision about `tid` for host `cpu`; value: its sched.Decision type; extra: its transaction number"
    DECISION_APPLIED = 7, "host `cpu` applied it; value: age in ns of the state behind it; extra: the transaction number"
    DECISION_REFUSED = 8, "host `cpu` refused it; value: the Outcome; extra: the transaction number"
    KICK_SENT = 9, "the agent rang the doorbell of host `cpu`; value: unused; extra: the transaction number"
    KICK_SEEN = 10, "host `cpu` entered the doorbell's interrupt, in the order of KICK_SENT"
    QUEUE_DEPTH = 11, "queue number `cpu` (named in the trace's meta) now holds `value` entries"
    AGENT_BEGIN = 12, "agent core `cpu` starts on a batch of messages"
    AGENT_END = 13, "agent core `cpu` is done with the batch; value: messages handled; extra: decisions written"


class RunEnd(IntEnum):
    """Why a thread left its CPU (`value` of RUN_END)."""

    BLOCKED = 0
    PREEMPTED = 1
    YIELDED = 2
    DEAD = 3
