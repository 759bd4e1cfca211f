"""What a run of the network writes down of its packets, event by event, for `waveos.report.packets` to draw."""

from __future__ import annotations

from waveos.meaning import Told


class PacketEvent(Told):
    """Kinds of a `waveos.trace.TRACE_EVENT`, `tid` being the request; `meaning` says what `cpu`, `value` and `extra` hold."""

    ARRIVED = 1, "the request came off the wire; value: its class; extra: its flow"
    STACK_BEGIN = 2, "stack core `cpu` begins with it; value: 0 for the request, 1 for its reply"
    STACK_END = 3, "that core is done with it; value as in STACK_BEGIN"
    SEEN = 4, "the agent has read that it is there"
    STEERED = 5, "the policy gave it to worker `cpu`"
    SHED = 6, "the policy refused it, or its class was over its rate"
    QUEUED = 7, "it is in the queue of worker `cpu`"
    WORK_BEGIN = 8, "worker `cpu` begins with it"
    WORK_END = 9, "worker `cpu` has done it"
    ANSWERED = 10, "its reply is on the wire; value: its class"
    AGENT_BEGIN = 11, "the agent begins with a batch"
    AGENT_END = 12, "it is done with the batch; value: messages; extra: decisions"
