"""The emulated machine as plain memory: tables of CPUs and threads, the queues of the link, counters. What happens to them is in `engine`."""

from __future__ import annotations

import numpy as np

from waveos.histogram import BINS
from waveos.ipu_emulator.arrivals import REQUEST_CLASS, STREAMS
from waveos.ipu_emulator.clock import CLOCK
from waveos.ipu_emulator.profile import COLD
from waveos.sched.laws import RUNTIME
from waveos.sched.records import DECISION, MAX_CPUS, MAX_THREADS, MESSAGE

IDLE, BUSY = 0, 1
DOWN = 8
"""Decisions that one CPU's queue holds; the runtime keeps fewer outstanding, and one more is refused as congested."""
KICKS = 16
"""Doorbells on their way to one CPU; further ones merge with the last, as an interrupt's pending bit does."""
BATCH = 64
"""Messages that the agent drains at once."""
OUTCOMES = 16

COSTS = np.dtype(
    [
        (name, "i8")
        for name in (
            "entry_ns",
            "switch_ns",
            "wake_ns",
            "pick_ns",
            "tick_period_ns",
            "tick_ns",
            "write_ns",
            "flush_ns",
            "read_ns",
            "peek_ns",
            "hit_ns",
            "prefetch",
            "agent_read_ns",
            "agent_write_ns",
            "wire_ns",
            "kick_send_ns",
            "kick_wire_ns",
            "kick_receive_ns",
            "ipi_wire_ns",  # of the host's own interrupts, by which it takes a CPU from a demoted thread
            "interrupt_ns",
            "cold",  # whether cold_ns holds anything
            "resume_ns",
            "message_ns",  # the policy's own service time for a message, on the agent's core
            "inline",  # the policy runs in the kernel, on the CPU that calls it: no agent, no link
        )
    ],
    align=True,
)

HOST_CPU = np.dtype(
    [
        ("tid", "i4"),  # the thread it runs or switches to, -1: none
        ("seq", "u4"),
        ("turns", "i8"),  # how often a thread was put onto it
        ("state", "i8"),
        ("start_ns", "i8"),  # the thread computes from here; before, the CPU is in the kernel
        ("left_ns", "i8"),  # of the thread's work at start_ns
        ("ran_before_ns", "i8"),  # what the thread had run when the CPU took it
        ("free_ns", "i8"),  # the CPU is in the kernel until here
        ("down_n", "i8"),
        ("kick_n", "i8"),
        ("claim_ns", "i8"),  # when the host's own interrupt arrives for a thread that woke: the demoted one makes way; 0: none is on its way
        ("claimant", "i8"),  # that thread
    ],
    align=True,
)
HOST_THREAD = np.dtype(
    [
        ("seq", "i8"),
        ("arrival_ns", "i8"),
        ("ready_ns", "i8"),
        ("work_ns", "i8"),  # left
        ("ran_ns", "i8"),
        ("deadline_ns", "i8"),
        ("request", "i8"),
        ("on", "i8"),  # the CPU that it ran on last,
        ("turn", "i8"),  # and which turn that was there
        ("state", "u1"),  # as in laws: BLOCKED, RUNNABLE, RUNNING
        ("request_class", "u1"),
        ("qos", "u1"),
        ("demoted", "u1"),
    ],
    align=True,
)
REQUEST = np.dtype([("arrival_ns", "i8"), ("service_ns", "i8"), ("request_class", "i8"), ("number", "i8")], align=True)
SAMPLE = np.dtype([("request_class", "i8"), ("sojourn_ns", "i8"), ("arrival_ns", "i8"), ("wait_ns", "i8")], align=True)


MAX_CLASSES = 32
BACKLOG = 262_144
"""Requests that wait for a thread; further ones are refused, and counted."""
UP = 262_144
"""Most messages that the queue to the agent may be made to hold."""

MACHINE = np.dtype(
    [
        ("now_ns", "i8"),
        ("next_arrival_ns", "i8"),
        ("agent_due_ns", "i8"),  # when the agent looks next; arrivals and agent change at most events, so they are not in the clock's tree
        ("arrival_f", "f8"),  # the same before rounding, so that rounding does not add up
        ("mean_gap_ns", "f8"),
        ("warmup_ns", "i8"),
        ("stop_ns", "i8"),  # no arrivals from here on
        ("end_ns", "i8"),  # and nothing at all from here on
        ("waker_free_ns", "i8"),
        ("agent_free_ns", "i8"),
        ("agent_busy_ns", "i8"),
        ("agent_batches", "i8"),
        ("up_head", "i8"),
        ("up_tail", "i8"),
        ("overflowed", "i8"),
        ("lost", "i8"),  # messages were lost and the host has not replayed its state yet
        ("resyncs", "i8"),
        ("free_n", "i8"),
        ("backlog_head", "i8"),
        ("backlog_tail", "i8"),
        ("refused", "i8"),  # requests that found the socket queue full
        ("arrived", "i8"),
        ("hash", "u8"),
        ("events", "i8"),
        ("link_stall_ns", "i8"),  # host worker cores waiting for the link
        ("waker_stall_ns", "i8"),
        ("interrupt_ns", "i8"),
        ("switch_ns", "i8"),
        ("pick_ns", "i8"),
        ("busy_ns", "i8"),  # host worker cores running requests
        ("switches", "i8"),
        ("preemptions", "i8"),
        ("committed", "i8"),
        ("preempt_stale", "i8"),
        ("demoted", "i8"),  # threads that are
        ("sample_n", "i8"),
        ("trace_n", "i8"),
        ("trace_from_ns", "i8"),
        ("trace_until_ns", "i8"),
        ("record_n", "i8"),
        ("cost", COSTS),
        ("cold_ns", "i8", (COLD,)),
        ("streams", "u8", (STREAMS,)),
        ("class_count", "i8"),
        ("samples_at", "i8"),  # addresses of arrays whose length is not fixed, and the lengths:
        ("samples_n", "i8"),  # measured service times, i8
        ("arrivals_at", "i8"),
        ("arrivals_n", "i8"),  # REQUESTs of a trace; 0: Poisson
        ("sample_at", "i8"),
        ("sample_cap", "i8"),  # SAMPLEs in the order of completion
        ("trace_at", "i8"),
        ("trace_cap", "i8"),  # TRACE_EVENTs
        ("record_at", "i8"),
        ("record_cap", "i8"),  # MESSAGEs as the runtime was fed
        ("up_cap", "i8"),
        ("up_floor_ns", "i8"),  # nothing in the queue becomes visible before
        ("backlog_cap", "i8"),
        ("cpus", "i8"),
        ("threads", "i8"),
        ("note", MESSAGE),  # scratch
        ("end_note", MESSAGE),
        ("clock", CLOCK),  # slots: 0.. CPUs' threads, cpus.. CPUs' doorbells
        ("outcomes", "i8", (OUTCOMES,)),
        ("done", "i8", (MAX_CLASSES, 3)),  # arrived and done in the counting window; done in it; left unfinished at the end
        ("sums", "f8", (MAX_CLASSES,)),  # sojourn ns, summed
        ("classes", REQUEST_CLASS, (MAX_CLASSES,)),
        ("cpu", HOST_CPU, (MAX_CPUS,)),
        ("kick_ns", "i8", (MAX_CPUS, KICKS)),
        ("down", DECISION, (MAX_CPUS, DOWN)),
        ("down_visible_ns", "i8", (MAX_CPUS, DOWN)),
        ("latency", "i8", (MAX_CLASSES, BINS)),
        ("ages", "i8", (2, BINS)),  # of the state behind committed, and behind stale decisions
        ("ready", "i8", (BINS,)),  # runnable until its switch is done
        ("thread", HOST_THREAD, (MAX_THREADS,)),
        ("free", "i8", (MAX_THREADS,)),  # threads without a request; the one freed last, whose caches are warm, is used first
        ("backlog", REQUEST, (BACKLOG,)),  # ring: the socket queue
        ("up_visible_ns", "i8", (UP,)),
        ("up", MESSAGE, (UP,)),  # ring, by the time messages become visible
        ("runtime", RUNTIME),
    ],
    align=True,
)
"""Everything that a run consists of, in one block, so that compiled calls pass one pointer. Pages that are not used are never touched."""
