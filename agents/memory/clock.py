import numpy as np

from waveos import memory
from waveos.agents.memory.batches import Batches, Quota
from waveos.policy import Param, Policy


class Clock(Policy, subsystem=memory, name="clock", compiled=False):
    """Second chance: a hand goes round; what it finds touched is spared until its next visit, the rest is reclaimed."""

    round_ms: Param = 19_200
    step_ms: Param = 600
    quota_share_per_s: Param = 0.05

    def start(self):
        self.batches = Batches(visited="?", resident="?")
        self.quota = Quota(self.quota_share_per_s)
        self.hand, self.ticking = 0, False

    def region_mapped(self, msg, txns):
        places = self.batches.map(msg)
        self.batches.resident[places] = True
        if not self.ticking:
            self.ticking = True
            txns.wake_after(int(self.step_ms * 1e6))

    def region_unmapped(self, msg, txns):
        self.batches.unmap(msg)

    def budget_changed(self, msg, txns):
        self.quota.allowed_bytes_per_s = msg.bytes

    def accessed(self, msgs, txns):
        self.batches.hear(msgs)

    def refaulted(self, msgs, txns):
        back = self.batches.named(msgs)
        self.batches.resident[back], self.batches.visited[back] = True, False

    def batch_end(self, msg, txns):
        of = self.batches
        scanned, touched = of.take()
        cold = scanned & ~touched & of.visited & of.resident
        of.visited |= scanned  # the first look only clears the bit
        of.resident |= touched
        if cold.any():
            cold = self.quota.choose(of, cold, msg.time_ns)
            region, first, words = of.where(cold)
            memory.reclaim(txns, region, first, words, quota_bytes=64 * int(of.bytes.max()))
            of.resident[cold] = False

    def timer_expired(self, msg, txns):
        of = self.batches
        places = np.flatnonzero(of.live)
        if len(places):
            step = max(1, int(len(places) * self.step_ms / self.round_ms))
            seen = np.zeros(len(of), bool)
            seen[places[np.arange(self.hand, self.hand + step) % len(places)]] = True
            self.hand = (self.hand + step) % len(places)
            memory.scan(txns, *of.where(seen & of.resident))
        txns.wake_after(int(self.step_ms * 1e6))
