"""The kernel's own scheduler as a baseline: fair, a queue for every CPU, wake-up preemption at virtual run times, idle balancing.

It is written as a policy, and the engine runs it in the kernel: at the moment and on the core where something happens, with no agent and no link.
What is modelled of Linux's fair class: a waking thread goes to an idle CPU, its last one first, else to the shortest queue; its virtual run time
starts at the queue's minimum at the earliest; it preempts when the running thread is ahead of it by `wakeup_us`; the timer tick preempts after
`slice_us` if someone waits; the smallest virtual run time goes next; a CPU that falls idle takes from the longest queue. Not modelled: weights,
groups, lag and deadlines of EEVDF, migration costs, NUMA.
"""

from waveos import sched
from waveos.policy import Param, Policy, heap_key, heap_pop, heap_push, heaps, jitable, per_cpu, per_thread, size

CPUS = 128


@jitable
def charge(self, cpu, now_ns):
    """Bring the running thread's virtual time up to date."""
    tid = self.running[cpu] - 1
    if tid >= 0:
        self.vruntime_ns[tid] += max(0, now_ns - self.since_ns[cpu])
        self.since_ns[cpu] = max(now_ns, self.since_ns[cpu])


@jitable
def enqueue(self, tid, cpu):
    heap_push(self.runq[cpu], self.vruntime_ns[tid], tid)


class Fair(Policy, subsystem=sched, name="fair"):
    """Linux's fair scheduling in outline; see the module."""

    slice_us: Param = 3_000
    wakeup_us: Param = 1_000
    tick_us: Param = 1_000

    runq = heaps(CPUS, 65_536)
    vruntime_ns = per_thread()
    last_cpu = per_thread()
    minimum_ns = per_cpu()  # of virtual time in the queue, never falls
    running = per_cpu()  # tid + 1
    since_ns = per_cpu()
    started_ns = per_cpu()
    claimed = per_cpu()  # idle, but a thread is on its way

    def thread_runnable(self, msg, txns):
        cpu = self.last_cpu[msg.tid]
        if self.running[cpu] or self.claimed[cpu]:
            shortest = cpu
            for i in range(self.cpus):
                other = (cpu + i) % self.cpus
                if self.running[other] == 0 and self.claimed[other] == 0:
                    shortest = other
                    break
                if size(self.runq[other]) < size(self.runq[shortest]):
                    shortest = other
            cpu = shortest
        self.vruntime_ns[msg.tid] = max(self.vruntime_ns[msg.tid], self.minimum_ns[cpu])
        self.last_cpu[msg.tid] = cpu
        if self.running[cpu]:
            charge(self, cpu, msg.time_ns)
            ahead_ns = self.vruntime_ns[self.running[cpu] - 1] - self.vruntime_ns[msg.tid]
            if size(self.runq[cpu]) == 0 and ahead_ns > self.wakeup_us * 1_000:
                enqueue(self, msg.tid, cpu)
                sched.preempt(txns, cpu)
                return
        elif self.claimed[cpu] == 0:
            self.claimed[cpu] = 1
            sched.run(txns, tid=msg.tid, cpu=cpu)
            return
        enqueue(self, msg.tid, cpu)

    def thread_running(self, msg, txns):
        self.running[msg.cpu], self.claimed[msg.cpu] = msg.tid + 1, 0
        self.last_cpu[msg.tid] = msg.cpu
        self.since_ns[msg.cpu] = self.started_ns[msg.cpu] = msg.time_ns
        self.minimum_ns[msg.cpu] = max(self.minimum_ns[msg.cpu], self.vruntime_ns[msg.tid])
        sched.set_timer(txns, msg.cpu, next_tick(self, msg.time_ns))

    def timer_expired(self, msg, txns):
        charge(self, msg.cpu, msg.time_ns)
        if size(self.runq[msg.cpu]) and msg.time_ns - self.started_ns[msg.cpu] >= self.slice_us * 1_000:
            sched.preempt(txns, msg.cpu)
        else:
            sched.set_timer(txns, msg.cpu, next_tick(self, msg.time_ns))

    def thread_preempted(self, msg, txns):
        charge(self, msg.cpu, msg.time_ns)
        self.running[msg.cpu] = 0
        enqueue(self, msg.tid, msg.cpu)

    def thread_blocked(self, msg, txns):
        charge(self, msg.cpu, msg.time_ns)
        self.running[msg.cpu] = 0

    def cpu_idle(self, msg, txns):
        longest = msg.cpu
        if size(self.runq[longest]) == 0:
            for cpu in range(self.cpus):
                if size(self.runq[cpu]) > size(self.runq[longest]):
                    longest = cpu
        if size(self.runq[longest]):
            if longest == msg.cpu:
                self.minimum_ns[msg.cpu] = max(self.minimum_ns[msg.cpu], heap_key(self.runq[longest]))
            tid = heap_pop(self.runq[longest])
            if longest != msg.cpu:  # its virtual time is relative to the queue it is in
                self.vruntime_ns[tid] += self.minimum_ns[msg.cpu] - self.minimum_ns[longest]
            sched.run(txns, tid=tid, cpu=msg.cpu)


@jitable
def next_tick(self, now_ns):
    """The timer tick after now."""
    tick_ns = max(1, int(self.tick_us * 1_000))
    return (now_ns // tick_ns + 1) * tick_ns
