"""The agent's loop for plain policies: drain messages, feed the runtime, send decisions. It sleeps between looks, as its decisions take milliseconds.

One loop serves every link: it uses the verbs alone.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from waveos.errors import LinkError
from waveos.policy import Policy
from waveos.policy.plain import PlainRuntime, Records
from waveos.primitives import clock_ns

AT_ONCE = 1_024
"""Records taken, and decisions sent, in one step: as many as every link takes."""
BATCH = 65_536
"""Messages after which a batch ends although the queue is not drained."""
NAP_S = 0.001


def serve_plain(link: Any, policy: type[Policy], params: dict[str, float] | None = None, *, replay: bool = False, until_ns: int = 1 << 62) -> None:
    """Serve the agent's side of a link until its host is gone, or `until_ns` on the monotonic clock. Raises PolicyError when the policy fails.

    With `replay` the stream brings its own BATCH_ENDs; else a batch ends when the queue is drained, or a timer is due.
    """
    runtime = PlainRuntime(policy, params)
    end = np.zeros(1, policy.subsystem.MESSAGE)
    end["type"], end[policy.subsystem.SUBJECT] = policy.subsystem.MESSAGE_TYPES["batch_end"], -1
    try:
        taken, since_look = 0, 0
        while (now_ns := clock_ns()) < until_ns:
            batch = link.poll_messages(AT_ONCE)
            if len(batch):
                taken += len(batch)
                _send(link, runtime.feed(batch))
                if taken < BATCH:
                    continue
            if not replay and (taken or runtime.next_timer_ns <= now_ns):
                end["time_ns"] = clock_ns()
                _send(link, runtime.feed(end))
                taken, since_look = 0, 0
                continue
            taken, since_look = 0, since_look + 1
            if since_look >= 20:
                since_look = 0
                link.check()
            time.sleep(NAP_S)
    except LinkError:
        return  # the host has closed the link, or died: nothing is left to decide


def _send(link: Any, decisions: Records) -> None:
    """Send all of them, waiting for room; what did not fit is offered again."""
    while len(decisions):
        part = decisions[:AT_ONCE]
        link.txn_create(len(part))[:] = part
        fitted = link.txns_commit()
        decisions = decisions[fitted:]
        if fitted < len(part):
            link.check()
            time.sleep(NAP_S)
