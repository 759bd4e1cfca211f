from waveos import net
from waveos.policy import Param, Policy, array, jitable, pop, push, rings, size

CLASSES = 16


@jitable
def most_urgent(self, now_ns, idle):
    """The class whose first request has the least time left; of one with much time left `spare` workers are kept free. -1: none is to go now."""
    best, earliest = -1, 1 << 62
    for k in range(CLASSES):
        if size(self.waiting[k]):
            deadline = self.deadline_ns[self.waiting[k].slot[self.waiting[k].head % self.waiting[k].slot.shape[0]]]
            patient = deadline - now_ns > self.patient_us * 1_000
            if deadline < earliest and not (patient and idle <= self.spare):
                best, earliest = k, deadline
    return best


class SloSteering(Policy, subsystem=net, name="slo_steering"):
    """Class and slack together: the request with the least time to its deadline goes first, to a worker with nothing to do.

    What the packet says (its class and SLO) decides both where and when, as with shinjuku_mq on the threads behind it. Requests with more than `patient_us`
    left do not take the last `spare` idle workers: those are for what cannot wait.
    """

    bound: Param = 1
    spare: Param = 1
    patient_us: Param = 1_000
    no_slo_us: Param = 1_000_000  # SLO of a request that states none

    waiting = rings(CLASSES, 16_384)
    deadline_ns = array(16_384)

    def request_arrived(self, msg, txns):
        if msg.front == 0:
            self.deadline_ns[msg.request] = msg.deadline_ns if msg.deadline_ns > 0 else msg.time_ns + int(self.no_slo_us * 1_000)
        push(self.waiting[msg.request_class], msg.request, front=msg.front)

    def worker_ready(self, msg, txns):
        if msg.depth < self.bound:
            idle = 0
            for worker in range(self.cpus):
                if txns.present[worker] and net.depth(txns, worker) == 0:
                    idle += 1
            k = most_urgent(self, msg.time_ns, idle)
            if k >= 0:
                net.steer(txns, request=pop(self.waiting[k]), worker=msg.worker)
