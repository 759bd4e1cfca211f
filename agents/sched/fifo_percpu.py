from waveos import sched
from waveos.policy import Policy, array, per_thread, pop, push, rings, size

CPUS = 64


class FifoPerCpu(Policy, subsystem=sched, name="fifo_percpu", work_conserving=False):
    """A queue for every CPU: a thread is given a CPU when it first runs, by turns, and stays there (ghOSt's per-CPU FIFO)."""

    runq = rings(CPUS, 16_384)
    home = per_thread()  # CPU + 1; 0: none yet
    turn = array(1)

    def thread_runnable(self, msg, txns):
        if self.home[msg.tid] == 0:
            self.home[msg.tid] = 1 + self.turn[0] % min(self.cpus, CPUS)
            self.turn[0] += 1
        push(self.runq[self.home[msg.tid] - 1], msg.tid, front=msg.front)

    def cpu_idle(self, msg, txns):
        if msg.cpu < CPUS and size(self.runq[msg.cpu]):
            sched.run(txns, tid=pop(self.runq[msg.cpu]), cpu=msg.cpu)
