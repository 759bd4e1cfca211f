from waveos import sched
from waveos.policy import Param, Policy, discard, jitable, per_cpu, per_thread, pop, push, ring, size

PATIENCE_NS = 100_000  # the host has a demoted thread make way by itself; if a thread still waits after, it is told to
NOTHING, FRESH, DEMOTED = range(3)


@jitable
def wait(self, msg, txns, front):
    """The thread goes into its level's queue. A demoted one that runs makes way for a fresh one, or is made to."""
    self.waits[msg.tid] = 1
    if self.is_demoted[msg.tid]:
        push(self.demoted, msg.tid, front=front)
        return
    push(self.fresh, msg.tid, front=front)
    for cpu in range(self.cpus):
        if self.running[cpu] == DEMOTED and not self.watched[cpu] and not self.taken[cpu]:
            self.watched[cpu] = 1
            sched.set_timer(txns, cpu, msg.time_ns + PATIENCE_NS)


@jitable
def forget(self, tid):
    """The thread waits no more: the host has run it, or it sleeps."""
    if self.waits[tid]:
        self.waits[tid] = 0
        if self.is_demoted[tid]:
            discard(self.demoted, tid)
        else:
            discard(self.fresh, tid)


@jitable
def sleep(self, msg):
    """The thread neither runs nor waits; when it comes back it is fresh."""
    forget(self, msg.tid)
    self.is_demoted[msg.tid] = 0
    if msg.cpu >= 0:
        self.running[msg.cpu] = NOTHING


class Mlfq(Policy, subsystem=sched, name="mlfq", forgets=True):
    """A multilevel feedback queue of two levels (Corbató et al., 1962): who has run `quantum_us` since it last slept runs when nobody else wants to.

    It is demoted once, and from then on the host gives its CPU to every thread that wakes, without asking; Shinjuku orders each of these preemptions.
    """

    quantum_us: Param = 30

    fresh = ring(65_536)
    demoted = ring(65_536)
    is_demoted = per_thread("u1")
    waits = per_thread("u1")  # in the queue of its level
    running = per_cpu("u1")
    watched = per_cpu("u1")  # a timer is set, to see whether the demoted thread has made way
    taken = per_cpu("u1")  # by a higher class of the kernel

    def thread_new(self, msg, txns):
        sleep(self, msg)

    def thread_runnable(self, msg, txns):
        wait(self, msg, txns, msg.front)

    def thread_running(self, msg, txns):
        forget(self, msg.tid)
        self.watched[msg.cpu] = 0
        if self.is_demoted[msg.tid]:
            self.running[msg.cpu] = DEMOTED
            if size(self.fresh):
                sched.preempt(txns, msg.cpu)
        else:
            self.running[msg.cpu] = FRESH
            sched.set_timer(txns, msg.cpu, msg.time_ns + int(self.quantum_us * 1_000))

    def timer_expired(self, msg, txns):
        self.watched[msg.cpu] = 0
        sched.set_timer(txns, msg.cpu, 0)
        if self.running[msg.cpu] == FRESH:
            self.is_demoted[msg.tid] = 1
            self.running[msg.cpu] = DEMOTED
            sched.demote(txns, msg.cpu)
        if size(self.fresh) and not self.taken[msg.cpu]:
            sched.preempt(txns, msg.cpu)

    def thread_preempted(self, msg, txns):
        self.running[msg.cpu] = NOTHING
        wait(self, msg, txns, 1)

    def thread_blocked(self, msg, txns):
        sleep(self, msg)

    def thread_dead(self, msg, txns):
        sleep(self, msg)

    def cpu_taken(self, msg, txns):
        self.taken[msg.cpu] = 1

    def cpu_back(self, msg, txns):
        self.taken[msg.cpu] = 0

    def cpu_idle(self, msg, txns):
        tid = -1
        if size(self.fresh):
            tid = pop(self.fresh)
        elif size(self.demoted) and not (msg.front and self.running[msg.cpu] == DEMOTED):  # who makes way goes on first
            tid = pop(self.demoted)
        if tid >= 0:
            self.waits[tid] = 0
            sched.run(txns, tid=tid, cpu=msg.cpu)
