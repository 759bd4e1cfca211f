"""The 64-byte records of scheduling, declared once; everything else (handlers, docs, C headers) is generated from here."""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from waveos.meaning import Told
from waveos.record import MAX_CPUS as MAX_CPUS
from waveos.record import MAX_THREADS as MAX_THREADS
from waveos.record import record

SUBSYSTEM = 1


class Message(Told):
    """What the host tells the agent; `meaning` says when. A policy handles a message by a method of its lower-case name."""

    THREAD_NEW = 1, "a thread entered the enclave; if it can run, thread_runnable follows"
    THREAD_RUNNABLE = 2, "the thread can run and is the policy's to place; front=1: it was placed before and that failed, so put it first"
    THREAD_RUNNING = 3, "the thread is on msg.cpu since msg.time_ns: a decision was committed, or the host ran it while none was there"
    THREAD_BLOCKED = 4, "the thread waits for something; it ran msg.ran_ns in all"
    THREAD_PREEMPTED = 5, "the thread was taken off msg.cpu and can run; without a handler it comes as thread_runnable"
    THREAD_YIELDED = 6, "the thread gave up msg.cpu and can run; without a handler it comes as thread_runnable"
    THREAD_DEAD = 7, "the thread exited or left the enclave"
    CPU_NEW = 8, "msg.cpu belongs to the enclave; sent at start and when the host replays its state"
    CPU_IDLE = 9, "msg.cpu wants a thread (level-triggered); front=1: it still runs one, and asks for the next ahead of need"
    CPU_TAKEN = 10, "a higher class of the kernel took msg.cpu; a decision for it waits until cpu_back, so preempt another CPU"
    CPU_BACK = 11, "msg.cpu is the enclave's again"
    TICK = 12, "the host's timer tick on msg.cpu"
    TIMER_EXPIRED = 13, "the timer set for msg.cpu is past; comes again after each batch in which a thread waits, until it is set again"
    TXN_FAILED = 14, "a decision was not committed: msg.outcome says why; without a handler the thread comes as thread_runnable, front=1"
    AFFINITY_CHANGED = 15, "the thread's affinity changed"
    PRIORITY_CHANGED = 16, "the thread's priority changed"
    TXN_OUTCOME = 32, "host to runtime: what became of a transaction; policies see thread_running or txn_failed"
    BATCH_END = 33, "agent's own: the queue is drained, time_ns is the agent's clock; a recorded stream holds these too"
    RESYNC = 34, "host to runtime: messages were lost; forget everything, the host's whole state follows as *_new"


class Decision(IntEnum):
    """What the agent wants done on one CPU."""

    RUN = 1  # put thread `tid` on `cpu`; with PREEMPT, now, in place of the thread that runs at `cpu_seq`
    YIELD_CPU = 2  # take the running thread off `cpu` (as of `cpu_seq`) and go on with what is staged there
    KICK = 3  # look at what is staged: the CPU went idle while the decision was on its way
    DEMOTE = 4  # the running thread on `cpu` (as of `cpu_seq`) makes way by itself for others that wake, until it blocks


UNANSWERED = (Decision.KICK, Decision.DEMOTE)
"""What has no outcome."""
PREEMPT = 1
"""Decision flag: applies only while the CPU's own sequence number is still `cpu_seq`."""
KICKED = 2
"""Decision flag: the agent rings the CPU's doorbell (MSI-X, IPI) after writing it."""

_SUBJECT = [("tid", "<i4"), ("cpu", "<i4"), ("request_class", "u1"), ("qos", "u1"), ("outcome", "u1"), ("front", "u1"), ("cpu_seq", "<u4")]

MESSAGE: np.dtype[np.void] = record(
    [
        *_SUBJECT,
        ("deadline_ns", "<i8"),  # host time by which the request wants to be done; 0: none
        ("work_ns", "<i8"),  # the application's estimate of what is left to do; 0: unknown
        ("ran_ns", "<i8"),  # CPU time of this activation so far
    ]
)
"""A message. `seq` is the thread's; `cpu_seq` the CPU's, where one is named."""

OUTCOME: np.dtype[np.void] = record([*_SUBJECT, ("txn", "<i8"), ("age_ns", "<i8"), ("ran_ns", "<i8")])
"""An outcome (type TXN_OUTCOME). `txn` is the decision's number; `age_ns` the age of the state behind it when the host applied or refused it."""

DECISION: np.dtype[np.void] = record(
    [("tid", "<i4"), ("cpu", "<i4"), ("flags", "<u4"), ("cpu_seq", "<u4"), ("txn", "<i8"), ("decided_ns", "<i8"), ("spare", "<i8")]
)
"""A decision. `seq` is the thread's sequence number it was made on, `time_ns` the host time of the newest message behind it."""

MESSAGE_TYPES: dict[str, int] = {m.name.lower(): m.value for m in Message}
DECISION_TYPES: dict[str, int] = {d.name.lower(): d.value for d in Decision}
LEAVING = ("thread_new", "thread_running", "thread_blocked", "thread_dead")
"""What a policy that `forgets` must handle: after these the thread is not in its hands."""
HANDLERS: dict[str, int] = {m.name.lower(): m.value for m in Message if m.value < Message.TXN_OUTCOME}
"""Names a policy may give its handlers."""
