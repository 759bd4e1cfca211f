from waveos import net
from waveos.policy import Param, Policy, array, pop, push, ring, size

CLASSES = 16


class Admission(Policy, subsystem=net, name="admission"):
    """JBSQ that sheds by SLO: a request that would be late by the time the work before it is done is refused when it arrives, not served late.

    The work of a class is the running mean of what its requests took. `slack` stretches the SLO; without an SLO nothing is shed.
    """

    bound: Param = 2
    slack: Param = 1.0
    weight: Param = 0.05  # of the newest service time in the mean

    waiting = ring(16_384)
    mean_ns = array(CLASSES, "f8")
    booked_ns = array(16_384)
    ahead_ns = array(1, "f8")  # work of all that was let in and is not done

    def request_arrived(self, msg, txns):
        k = msg.request_class
        if msg.front == 0:
            done_ns = msg.time_ns + self.ahead_ns[0] / self.cpus + self.mean_ns[k]
            if msg.deadline_ns > 0 and done_ns - msg.time_ns > (msg.deadline_ns - msg.time_ns) * self.slack:
                net.shed(txns, msg.request)
                return
            self.ahead_ns[0] += self.mean_ns[k]
            self.booked_ns[msg.request] = int(self.mean_ns[k])
        push(self.waiting, msg.request, front=msg.front)

    def request_done(self, msg, txns):
        k = msg.request_class
        self.ahead_ns[0] = max(0.0, self.ahead_ns[0] - self.booked_ns[msg.request])
        self.mean_ns[k] += (msg.work_ns - self.mean_ns[k]) * (self.weight if self.mean_ns[k] > 0.0 else 1.0)

    def request_lost(self, msg, txns):
        self.ahead_ns[0] = max(0.0, self.ahead_ns[0] - self.booked_ns[msg.request])

    def worker_ready(self, msg, txns):
        if msg.depth < self.bound and size(self.waiting):
            net.steer(txns, request=pop(self.waiting), worker=msg.worker)
