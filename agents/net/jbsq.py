from waveos import net
from waveos.policy import Param, Policy, pop, push, ring, size


class Jbsq(Policy, subsystem=net, name="jbsq"):
    """Join the bounded shortest queue, JBSQ(n): a worker has at most `bound` requests, the others wait here, in order of arrival (nanoPU, RPCValet)."""

    bound: Param = 2

    waiting = ring(16_384)

    def request_arrived(self, msg, txns):
        push(self.waiting, msg.request, front=msg.front)

    def worker_ready(self, msg, txns):
        if msg.depth < self.bound and size(self.waiting):
            net.steer(txns, request=pop(self.waiting), worker=msg.worker)
