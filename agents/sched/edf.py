from waveos import sched
from waveos.outcome import Outcome
from waveos.policy import Policy, heap, heap_key, heap_pop, heap_push, jitable, per_cpu, size

NEVER = 1 << 62
RETRY_NS = 1_000_000  # a preemption that did not come about is tried again after; at once, a thread that may not run there would be sent without end
STALE = int(Outcome.STALE)


@jitable
def due(deadline_ns):
    """A request without a deadline comes after all that have one."""
    return deadline_ns if deadline_ns > 0 else NEVER


@jitable
def replace(self, txns, cpu, now_ns):
    """The most urgent thread that waits takes the CPU."""
    self.next_due[cpu] = heap_key(self.waiting)
    sched.run(txns, tid=heap_pop(self.waiting), cpu=cpu, preempt=True)
    sched.set_timer(txns, cpu, now_ns + RETRY_NS)


class Edf(Policy, subsystem=sched, name="edf"):
    """Earliest deadline first, preemptive: a more urgent arrival takes the CPU of the least urgent thread that runs."""

    waiting = heap(65_536)
    running_due = per_cpu()  # deadline of what runs there; 0: nothing
    next_due = per_cpu()  # of what was sent to replace it, or the same
    taken = per_cpu()  # by a higher class of the kernel: nothing is preempted there

    def thread_runnable(self, msg, txns):
        heap_push(self.waiting, due(msg.deadline_ns), msg.tid, front=msg.front)
        if msg.outcome == STALE:
            self.next_due[msg.cpu] = self.running_due[msg.cpu]
        victim, latest = -1, heap_key(self.waiting)
        for cpu in range(self.cpus):
            if self.next_due[cpu] > latest and not self.taken[cpu]:
                victim, latest = cpu, self.next_due[cpu]
        if victim >= 0:
            replace(self, txns, victim, msg.time_ns)

    def thread_running(self, msg, txns):
        self.running_due[msg.cpu] = self.next_due[msg.cpu] = due(msg.deadline_ns)

    def timer_expired(self, msg, txns):
        self.next_due[msg.cpu] = self.running_due[msg.cpu]
        if size(self.waiting) and heap_key(self.waiting) < self.running_due[msg.cpu] and not self.taken[msg.cpu]:
            replace(self, txns, msg.cpu, msg.time_ns)

    def thread_preempted(self, msg, txns):
        self.running_due[msg.cpu] = self.next_due[msg.cpu] = 0
        heap_push(self.waiting, due(msg.deadline_ns), msg.tid)

    def thread_blocked(self, msg, txns):
        self.running_due[msg.cpu] = self.next_due[msg.cpu] = 0

    def cpu_taken(self, msg, txns):
        self.taken[msg.cpu] = 1

    def cpu_back(self, msg, txns):
        self.taken[msg.cpu] = 0

    def cpu_idle(self, msg, txns):
        if size(self.waiting):
            sched.run(txns, tid=heap_pop(self.waiting), cpu=msg.cpu)
