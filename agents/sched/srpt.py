from waveos import sched
from waveos.policy import Policy, heap, heap_key, heap_pop, heap_push, per_cpu, size


class Srpt(Policy, subsystem=sched, name="srpt"):
    """Shortest remaining processing time: the thread with the least work left runs, as its application estimates it in `msg.work_ns`."""

    waiting = heap(65_536)
    until_ns = per_cpu()  # when the thread on the CPU would be done; 0: none runs
    taken = per_cpu()  # by a higher class of the kernel: it neither asks nor is preempted

    def thread_runnable(self, msg, txns):
        heap_push(self.waiting, msg.work_ns, msg.tid)
        victim, longest = -1, msg.work_ns
        for cpu in range(self.cpus):
            if self.taken[cpu]:
                continue
            if self.until_ns[cpu] == 0:
                return  # a CPU is free, and cpu_idle will be asked
            left = self.until_ns[cpu] - msg.time_ns
            if left > longest:
                victim, longest = cpu, left
        if victim >= 0 and heap_key(self.waiting) < longest:
            self.until_ns[victim] = msg.time_ns + heap_key(self.waiting)
            sched.run(txns, tid=heap_pop(self.waiting), cpu=victim, preempt=True)

    def thread_running(self, msg, txns):
        self.until_ns[msg.cpu] = msg.time_ns + msg.work_ns

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
