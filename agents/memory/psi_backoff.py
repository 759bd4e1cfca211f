from waveos import memory
from waveos.policy import Param, Policy


class PsiBackoff(Policy, subsystem=memory, name="psi_backoff", compiled=False):
    """Tightens the enclave's limit while its tasks hardly stall on memory, and backs off when they do: the idea of senpai, with its constants.

    The stall since the last change is compared with what is allowed. Above it the limit grows at the next tick, by at most `backoff_share`; below it
    the limit shrinks once an interval, by at most `probe_share`; both with the square of how far off the stall is. The kernel picks what goes.
    A limit that memory does not fill is brought down to what is resident first, where senpai would take long to come back.
    """

    tick_ms: Param = 1_000
    interval_ms: Param = 6_000
    allowed_us: Param = 10_000
    probe_share: Param = 0.01
    backoff_share: Param = 1.0
    probe_at: Param = 10
    backoff_at: Param = 20
    least_mib: Param = 64

    def start(self):
        self.stall_us, self.resident, self.limit, self.waited_ms = 0, 0, 0.0, 0.0
        self.ticking = False

    def region_mapped(self, msg, txns):
        if not self.ticking:
            self.ticking = True
            txns.wake_after(int(self.tick_ms * 1e6))

    def pressure(self, msg, txns):
        self.stall_us += msg.stall_us
        self.resident = msg.bytes

    def timer_expired(self, msg, txns):
        txns.wake_after(int(self.tick_ms * 1e6))
        if not self.resident:
            return
        self.waited_ms += self.tick_ms
        if self.stall_us > self.allowed_us:
            over = self.stall_us / self.allowed_us / self.backoff_at
            factor = 1 + self.backoff_share * min(1.0, over * over)
        elif self.waited_ms >= self.interval_ms:
            room = self.allowed_us / max(self.stall_us, 1) / self.probe_at
            factor = 1 - self.probe_share * min(1.0, room * room)
            self.limit = min(self.limit or self.resident, self.resident)
        else:
            return
        self.limit = max((self.limit or self.resident) * factor, self.least_mib * 2**20)
        self.stall_us, self.waited_ms = 0, 0.0
        memory.limit(txns, int(self.limit))
