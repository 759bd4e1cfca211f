from waveos import sched
from waveos.outcome import Outcome
from waveos.policy import Policy, heap, heap_key, heap_pop, heap_push, jitable, per_cpu, size

RETRY_NS = 1_000_000  # a preemption that did not come about is tried again after; at once, a thread that may not run there would be sent without end
STALE = int(Outcome.STALE)


@jitable
def replace(self, txns, cpu, now_ns):
    """The shortest thread that waits takes the CPU."""
    self.next_until_ns[cpu] = now_ns + heap_key(self.waiting)
    sched.run(txns, tid=heap_pop(self.waiting), cpu=cpu, preempt=True)
    sched.set_timer(txns, cpu, now_ns + RETRY_NS)


class Srpt(Policy, subsystem=sched, name="srpt"):
    """Shortest remaining processing time: the thread with the least work left runs, as its application estimates it in `msg.work_ns`."""

    waiting = heap(65_536)
    until_ns = per_cpu()  # when the thread on the CPU would be done; 0: none runs
    next_until_ns = per_cpu()  # when what was sent to replace it would be, or the same
    taken = per_cpu()  # by a higher class of the kernel: it neither asks nor is preempted

    def thread_runnable(self, msg, txns):
        heap_push(self.waiting, msg.work_ns, msg.tid, front=msg.front)
        if msg.outcome == STALE:
            self.next_until_ns[msg.cpu] = self.until_ns[msg.cpu]
        victim, longest = -1, msg.work_ns
        for cpu in range(self.cpus):
            if self.taken[cpu]:
                continue
            if self.until_ns[cpu] == 0:
                return  # a CPU is free, and cpu_idle will be asked
            left = self.next_until_ns[cpu] - msg.time_ns
            if left > longest:
                victim, longest = cpu, left
        if victim >= 0 and heap_key(self.waiting) < longest:
            replace(self, txns, victim, msg.time_ns)

    def thread_running(self, msg, txns):
        self.until_ns[msg.cpu] = self.next_until_ns[msg.cpu] = msg.time_ns + msg.work_ns

    def timer_expired(self, msg, txns):
        self.next_until_ns[msg.cpu] = self.until_ns[msg.cpu]
        if size(self.waiting) and heap_key(self.waiting) < self.until_ns[msg.cpu] - msg.time_ns and not self.taken[msg.cpu]:
            replace(self, txns, msg.cpu, msg.time_ns)

    def thread_preempted(self, msg, txns):
        self.until_ns[msg.cpu] = 0
        heap_push(self.waiting, msg.work_ns, msg.tid)

    def thread_blocked(self, msg, txns):
        self.until_ns[msg.cpu] = 0

    def cpu_taken(self, msg, txns):
        self.taken[msg.cpu] = 1

    def cpu_back(self, msg, txns):
        self.taken[msg.cpu] = 0

    def cpu_idle(self, msg, txns):
        if size(self.waiting):
            sched.run(txns, tid=heap_pop(self.waiting), cpu=msg.cpu)
