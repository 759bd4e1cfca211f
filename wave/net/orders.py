"""What a network policy orders. Its third argument, `txns`, collects the orders of one handler call; the runtime stamps and sends them."""

from __future__ import annotations

from typing import Any

import numpy as np

from waveos.jit import jitable
from waveos.net.records import MAX_WORKERS, Decision

ORDERS_AT_ONCE = 64
"""Orders one call of a handler may give; a policy that floods is stopped with a clear error."""
ORDERS = np.dtype(
    [
        ("n", "i8"),
        ("op", "i8", (ORDERS_AT_ONCE,)),
        ("subject", "i8", (ORDERS_AT_ONCE,)),
        ("worker", "i8", (ORDERS_AT_ONCE,)),
        ("value", "i8", (ORDERS_AT_ONCE,)),
        ("workers", "i8"),  # the runtime's, to be read: how many there are,
        ("present", "i8", (MAX_WORKERS,)),  # does the worker take requests,
        ("depth", "i8", (MAX_WORKERS,)),  # and how many it has
    ],
    align=True,
)
STEER, SHED, MARK, STEER_FLOW, SET_ENTRY, SET_RATE = map(int, Decision)


@jitable
def _order(txns: Any, op: int, subject: int, worker: int, value: int) -> None:
    n = txns.n
    if n >= ORDERS_AT_ONCE:
        raise OverflowError("too many orders from one handler call")
    txns.op[n], txns.subject[n], txns.worker[n], txns.value[n] = op, subject, worker, value
    txns.n = n + 1


@jitable
def steer(txns: Any, request: int, worker: int) -> None:
    """Give the request to `worker`. If the host cannot, it comes back as request_arrived, front=1."""
    _order(txns, STEER, request, worker, 0)


@jitable
def shed(txns: Any, request: int) -> None:
    """Refuse the request: its client is told at once."""
    _order(txns, SHED, request, -1, 0)


@jitable
def mark(txns: Any, request: int) -> None:
    """Tell the client of congestion with this request's answer; the request stays the policy's."""
    _order(txns, MARK, request, -1, 0)


@jitable
def steer_flow(txns: Any, flow: int, worker: int) -> None:
    """Requests of the flow, and of others in its entry of the steering table, go to `worker` from now on; the policy is not asked."""
    _order(txns, STEER_FLOW, flow, worker, 0)


@jitable
def set_entry(txns: Any, index: int, worker: int) -> None:
    """Entry `index` of the steering table names `worker`: its requests go there, and the policy is not asked. -1: it is asked again."""
    _order(txns, SET_ENTRY, index, worker, 0)


@jitable
def set_rate(txns: Any, request_class: int, per_s: int) -> None:
    """Let in at most so many requests of the class a second; 0: any number. The others are refused, and the policy does not hear of them."""
    _order(txns, SET_RATE, request_class, -1, per_s)


@jitable
def depth(txns: Any, worker: int) -> int:
    """Requests that were steered to `worker` and are not done, this call's orders included. Raises IndexError where there is no such worker."""
    if worker < 0 or worker >= txns.workers:
        raise IndexError("depth of a worker that is none; workers are 0..self.cpus - 1")
    return txns.depth[worker]  # type: ignore[no-any-return]


@jitable
def shallowest(txns: Any, workers: int) -> int:
    """The worker of 0..workers-1 that has the fewest requests; -1: none takes any. Raises IndexError where there cannot be so many."""
    if workers > MAX_WORKERS:
        raise IndexError("shallowest of more workers than there can be; self.cpus is how many there are")
    best = -1
    for worker in range(workers):
        if txns.present[worker] and (best < 0 or txns.depth[worker] < txns.depth[best]):
            best = worker
    return best
