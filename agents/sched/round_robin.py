from waveos import sched
from waveos.policy import Param, Policy, pop, push, ring, size


class RoundRobin(Policy, subsystem=sched, name="round_robin"):
    """One queue in turns of `quantum_us`; as the quantum shrinks, processor sharing."""

    quantum_us: Param = 1_000

    runq = ring(65_536)

    def thread_runnable(self, msg, txns):
        push(self.runq, msg.tid, front=msg.front)

    def thread_running(self, msg, txns):
        sched.set_timer(txns, msg.cpu, msg.time_ns + int(self.quantum_us * 1_000))

    def timer_expired(self, msg, txns):
        if size(self.runq):
            sched.preempt(txns, msg.cpu)

    def cpu_idle(self, msg, txns):
        if size(self.runq):
            sched.run(txns, tid=pop(self.runq), cpu=msg.cpu)
