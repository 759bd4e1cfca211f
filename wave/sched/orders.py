"""What a scheduling policy orders. Its third argument, `txns`, collects the orders of one handler call; the runtime stamps and sends them."""

from __future__ import annotations

from typing import Any

import numpy as np

from waveos.jit import jitable

ORDERS_AT_ONCE = 64
"""Orders one call of a handler may give; a policy that floods is stopped with a clear error."""

ORDERS = np.dtype(
    [
        ("n", "i8"),
        ("op", "i8", (ORDERS_AT_ONCE,)),
        ("tid", "i8", (ORDERS_AT_ONCE,)),
        ("cpu", "i8", (ORDERS_AT_ONCE,)),
        ("at_ns", "i8", (ORDERS_AT_ONCE,)),
    ],
    align=True,
)
ORDER_RUN, ORDER_RUN_NOW, ORDER_PREEMPT, ORDER_TIMER, ORDER_IDLE, ORDER_DEMOTE = 1, 2, 3, 4, 5, 6


@jitable
def _order(txns: Any, op: int, tid: int, cpu: int, at_ns: int) -> None:
    n = txns.n
    if n >= ORDERS_AT_ONCE:
        raise OverflowError("too many orders from one handler call")
    txns.op[n], txns.tid[n], txns.cpu[n], txns.at_ns[n] = op, tid, cpu, at_ns
    txns.n = n + 1


@jitable
def run(txns: Any, tid: int, cpu: int, preempt: bool = False) -> None:
    """Run thread `tid` on `cpu`: next, or with `preempt` at once in place of what runs there.

    The runtime stamps the thread's newest sequence number. If the host cannot apply it, the thread comes back as thread_runnable, front=1.
    """
    _order(txns, ORDER_RUN_NOW if preempt else ORDER_RUN, tid, cpu, 0)


@jitable
def preempt(txns: Any, cpu: int, idle: bool = False) -> None:
    """Take the running thread off `cpu` in favour of the next: what is staged there, or what the policy answers to a cpu_idle asked at once.

    With `idle` also where there is no next: the CPU then waits, as core scheduling wants it while the sibling still runs another tenant.
    """
    _order(txns, ORDER_IDLE if idle else ORDER_PREEMPT, -1, cpu, 0)


@jitable
def demote(txns: Any, cpu: int) -> None:
    """Let the running thread on `cpu` make way, until it blocks, for threads that become runnable: a preemption that is left with the host ahead of need.

    The host itself gives the CPU to one that wakes and is not demoted, and tells of it: thread_runnable, thread_preempted, and thread_running with no decision
    behind it. What waits already is for the policy to run. A host that finds another thread there, or knows no demotion, does nothing and tells nothing, so
    a policy looks again by a timer.
    """
    _order(txns, ORDER_DEMOTE, -1, cpu, 0)


@jitable
def set_timer(txns: Any, cpu: int, at_ns: int) -> None:
    """Have timer_expired called for `cpu` once host time is `at_ns`, and after each batch in which a thread waits, until set again or the thread changes."""
    _order(txns, ORDER_TIMER, -1, cpu, at_ns)
