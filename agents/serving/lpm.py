"""Longest prefix match: SGLang's default order."""

from __future__ import annotations

from waveos import serving
from waveos.agents.serving.fcfs import Fcfs, Local, Plan


class LongestPrefix(Fcfs, subsystem=serving, name="lpm", compiled=False):
    """What has most of its prompt in cache goes first; otherwise as fcfs_lru."""

    def form(self, here: Local, now: int, txns) -> Plan | None:
        begun = [request for request in here.queue if request.computed]
        waiting = [(request, self.match(here, request)) for request in here.queue if not request.computed]
        waiting.sort(key=lambda each: -each[1].hit)
        here.queue = begun + [request for request, _ in waiting]
        return super().form(here, now, txns)
