from waveos import sched
from waveos.policy import Policy, heap, heap_key, heap_pop, heap_push, jitable, per_cpu, size

NEVER = 1 << 62


@jitable
def due(deadline_ns):
    """A request without a deadline comes after all that have one."""
    return deadline_ns if deadline_ns > 0 else NEVER


class Edf(Policy, subsystem=sched, name="edf"):
    """Earliest deadline first, preemptive: a more urgent arrival takes the CPU of the least urgent thread that runs."""

    waiting = heap(65_536)
    running_due = per_cpu()  # deadline of what runs there; 0: nothing, or a replacement is on its way
    taken = per_cpu()  # by a higher class of the kernel: nothing is preempted there

    def thread_runnable(self, msg, txns):
        heap_push(self.waiting, due(msg.deadline_ns), msg.tid)
        victim, latest = -1, heap_key(self.waiting)
        for cpu in range(self.cpus):
            if self.running_due[cpu] > latest and not self.taken[cpu]:
                victim, latest = cpu, self.running_due[cpu]
        if victim >= 0:
            sched.run(txns, tid=heap_pop(self.waiting), cpu=victim, preempt=True)
            self.running_due[victim] = 0

    def thread_running(self, msg, txns):
        self.running_due[msg.cpu] = due(msg.deadline_ns)

    def thread_preempted(self, msg, txns):
        self.running_due[msg.cpu] = 0
        heap_push(self.waiting, due(msg.deadline_ns), msg.tid)

    def thread_blocked(self, msg, txns):
        self.running_due[msg.cpu] = 0

    def cpu_taken(self, msg, txns):
        self.taken[msg.cpu] = 1

    def cpu_back(self, msg, txns):
        self.taken[msg.cpu] = 0

    def cpu_idle(self, msg, txns):
        if size(self.waiting):
            sched.run(txns, tid=heap_pop(self.waiting), cpu=msg.cpu)
