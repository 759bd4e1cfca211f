from waveos import sched
from waveos.policy import Param, Policy, jitable, per_thread, pop, push, rings, size

CLASSES = 16  # request classes


@jitable
def most_urgent(self):
    """The request class whose first thread has the least time left to its deadline; -1: none waits."""
    best, earliest = -1, 1 << 62
    for k in range(CLASSES):
        if size(self.runq[k]):
            deadline = self.deadline_ns[self.runq[k].slot[self.runq[k].head % self.runq[k].slot.shape[0]]]
            if deadline < earliest or best < 0:
                best, earliest = k, deadline
    return best


class ShinjukuMq(Policy, subsystem=sched, name="shinjuku_mq"):
    """Multi-queue Shinjuku: a queue for every request class, each with an SLO; the first thread with the least slack runs next.

    The class and the deadline (arrival + SLO) are read from the request, as an RPC stack on the same processor sees them before the host
    does. Slices of `quantum_us`; a preempted thread goes to the back of its own class only.
    """

    quantum_us: Param = 30
    no_slo_us: Param = 1_000_000  # SLO of a request that states none

    runq = rings(CLASSES, 65_536)
    deadline_ns = per_thread()

    def thread_runnable(self, msg, txns):
        if msg.front == 0:
            self.deadline_ns[msg.tid] = msg.deadline_ns if msg.deadline_ns > 0 else msg.time_ns + int(self.no_slo_us * 1_000)
        push(self.runq[min(msg.request_class, CLASSES - 1)], msg.tid, front=msg.front)

    def thread_running(self, msg, txns):
        sched.set_timer(txns, msg.cpu, msg.time_ns + int(self.quantum_us * 1_000))

    def timer_expired(self, msg, txns):
        if most_urgent(self) >= 0:
            sched.preempt(txns, msg.cpu)

    def thread_preempted(self, msg, txns):
        push(self.runq[min(msg.request_class, CLASSES - 1)], msg.tid, front=msg.front)

    def cpu_idle(self, msg, txns):
        k = most_urgent(self)
        if k >= 0:
            sched.run(txns, tid=pop(self.runq[k]), cpu=msg.cpu)
