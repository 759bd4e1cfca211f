from waveos import memory
from waveos.agents.memory.batches import Batches, Quota
from waveos.policy import Param, Policy


class RegionAge(Policy, subsystem=memory, name="region_age", compiled=False):
    """Reclaims what has not been touched for an age. Every batch is scanned at one period."""

    scan_ms: Param = 2_400
    age_ms: Param = 19_200
    quota_share_per_s: Param = 0.05

    def start(self):
        self.batches = Batches(idle="u2", resident="?")
        self.quota = Quota(self.quota_share_per_s)
        self.ticking = False

    def region_mapped(self, msg, txns):
        places = self.batches.map(msg)
        self.batches.resident[places] = True
        if not self.ticking:
            self.ticking = True
            txns.wake_after(int(self.scan_ms * 1e6))

    def region_unmapped(self, msg, txns):
        self.batches.unmap(msg)

    def budget_changed(self, msg, txns):
        self.quota.allowed_bytes_per_s = msg.bytes

    def accessed(self, msgs, txns):
        self.batches.hear(msgs)

    def refaulted(self, msgs, txns):
        back = self.batches.named(msgs)
        self.batches.resident[back], self.batches.idle[back] = True, 0

    def batch_end(self, msg, txns):
        of = self.batches
        scanned, touched = of.take()
        of.idle[scanned & of.resident & (of.idle < 65_535)] += 1
        of.idle[touched], of.resident[touched] = 0, True
        old = of.resident & of.live & (of.idle * self.scan_ms >= self.age_ms)
        if old.any():
            cold = self.quota.choose(of, old, msg.time_ns, order=of.idle)
            region, first, words = of.where(cold)
            memory.reclaim(txns, region, first, words, quota_bytes=64 * int(of.bytes.max()))
            of.resident[cold] = False

    def timer_expired(self, msg, txns):
        memory.scan(txns, *self.batches.where(self.batches.resident & self.batches.live))
        txns.wake_after(int(self.scan_ms * 1e6))
