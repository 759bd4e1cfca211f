from waveos import net
from waveos.policy import Param, Policy, array, pop, push, rings, size

CLASSES = 16


class Darc(Policy, subsystem=net, name="darc"):
    """DARC of Persephone (SOSP 2021): workers are reserved for classes by their share of the work, and shorter classes may use those of longer ones.

    A long request never takes the last worker that short ones have, so none of them waits behind it; it is not work-conserving, on purpose. Shares are
    those of the last `window` requests that were done.
    """

    bound: Param = 1
    window: Param = 2_000

    waiting = rings(CLASSES, 16_384)
    mean_ns = array(CLASSES, "f8")  # service time
    done = array(CLASSES)  # in this window
    busy_ns = array(CLASSES, "f8")
    counted = array(1)
    first = array(CLASSES)  # first worker that a class may use; it may use all from there on
    order = array(CLASSES)  # classes, the shortest service first
    known = array(1)  # how many

    def request_arrived(self, msg, txns):
        k = msg.request_class
        seen = False
        for i in range(self.known[0]):
            seen = seen or self.order[i] == k
        if not seen:
            self.order[self.known[0]] = k
            self.known[0] += 1
        push(self.waiting[k], msg.request, front=msg.front)

    def request_done(self, msg, txns):
        k = msg.request_class
        self.done[k] += 1
        self.busy_ns[k] += msg.work_ns
        self.counted[0] += 1
        if self.counted[0] >= self.window:
            total = 0.0
            for i in range(CLASSES):
                if self.done[i]:
                    self.mean_ns[i] = self.busy_ns[i] / self.done[i]
                total += self.busy_ns[i]
            n = self.known[0]
            for i in range(1, n):  # insertion sort by mean service
                for j in range(i, 0, -1):
                    if self.mean_ns[self.order[j]] < self.mean_ns[self.order[j - 1]]:
                        kept = self.order[j]
                        self.order[j] = self.order[j - 1]
                        self.order[j - 1] = kept
            begin = 0
            for i in range(n):  # each class at least one worker, as far as there are so many
                self.first[self.order[i]] = min(begin, self.cpus - 1)
                begin += max(1, int(self.busy_ns[self.order[i]] / max(total, 1.0) * self.cpus + 0.5))
            for i in range(CLASSES):
                self.done[i] = 0
                self.busy_ns[i] = 0.0
            self.counted[0] = 0

    def worker_ready(self, msg, txns):
        if msg.depth < self.bound:
            for i in range(self.known[0]):
                k = self.order[i]
                if size(self.waiting[k]) and msg.worker >= self.first[k]:
                    net.steer(txns, request=pop(self.waiting[k]), worker=msg.worker)
                    return
