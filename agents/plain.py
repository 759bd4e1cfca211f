"""The agent's loop for plain policies: drain messages, feed the runtime, send decisions. It sleeps between looks, as its decisions take milliseconds.

One loop serves every link: it uses the verbs alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from waveos import ring
from waveos.errors import LinkError
from waveos.policy import Policy
from waveos.policy.plain import PlainRuntime, Records
from waveos.primitives import CoherentMemory, clock_ns

AT_ONCE = 1_024
"""Records taken, and decisions sent, in one step: as many as every link takes."""
BATCH = 65_536
"""Messages after which a batch ends although the queue is not drained."""
NAP_S = 0.001
LOOK_NS = 20_000_000
"""Between two looks at the host: is it there, does it want something; and as often it is told that the agent lives."""
Change = tuple[type[Policy], dict[str, float]]
"""Another policy, and its parameters."""


def serve_plain(
    link: Any,
    policy: type[Policy],
    params: dict[str, float] | None = None,
    *,
    replay: bool = False,
    until_ns: int = 1 << 62,
    attend: Callable[[Callable[[], dict[str, Any]]], Change | None] | None = None,
) -> None:
    """Serve the agent's side of a link until its host is gone, or `until_ns` on the monotonic clock. Raises PolicyError when the policy fails.

    With `replay` the stream brings its own BATCH_ENDs; else a batch ends when the queue is drained, or a timer is due.
    `attend` is called now and then, and may ask what has happened so far (with what the policy's own `report()` tells); with a policy it returns, the host
    has given new queues, and its whole state comes.
    """
    runtime = PlainRuntime(policy, params)
    end = np.zeros(1, policy.subsystem.MESSAGE)
    end["type"], end[policy.subsystem.SUBJECT] = policy.subsystem.MESSAGE_TYPES["batch_end"], -1
    try:
        taken, looked_ns = 0, 0
        told = {"messages": 0, "decisions": 0, "batches": 0}

        def report() -> dict[str, Any]:
            return {**told, **getattr(runtime.policy, "report", dict)()}

        while (now_ns := clock_ns()) < until_ns:
            if now_ns - looked_ns >= LOOK_NS:
                looked_ns = now_ns
                link.check()
                if hasattr(link, "txns_memory"):
                    ring.beat(CoherentMemory(link.txns_memory), now_ns)
                if attend is not None and (change := attend(report)) is not None:
                    runtime, taken = PlainRuntime(*change), 0
            batch = link.poll_messages(AT_ONCE)
            if len(batch):
                taken += len(batch)
                told["messages"] += len(batch)
                told["decisions"] += _send(link, runtime.feed(batch))
                if taken < BATCH:
                    continue
            if not replay and (taken or runtime.next_timer_ns <= now_ns):
                end["time_ns"] = clock_ns()
                told["batches"] += 1
                told["decisions"] += _send(link, runtime.feed(end))
                taken = 0
                continue
            taken = 0
            time.sleep(NAP_S)
    except LinkError:
        return  # the host has closed the link, or died: nothing is left to decide


def _send(link: Any, decisions: Records) -> int:
    """Send all of them, waiting for room; what did not fit is offered again. Returns how many they were."""
    n = len(decisions)
    while len(decisions):
        part = decisions[:AT_ONCE]
        link.txn_create(len(part))[:] = part
        fitted = link.txns_commit()
        decisions = decisions[fitted:]
        if fitted < len(part):
            link.check()
            time.sleep(NAP_S)
    return n
