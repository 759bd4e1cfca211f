from waveos import sched
from waveos.policy import Policy, pop, push, ring, size


class Fifo(Policy, subsystem=sched, name="fifo"):
    """First come, first served over all CPUs of the enclave; a thread runs until it blocks."""

    runq = ring(65_536)

    def thread_runnable(self, msg, txns):
        push(self.runq, msg.tid, front=msg.front)

    def cpu_idle(self, msg, txns):
        if size(self.runq):
            sched.run(txns, tid=pop(self.runq), cpu=msg.cpu)
