from waveos import sched
from waveos.policy import Param, Policy, array, jitable, per_cpu, per_thread, pop, push, rings, size

CPUS = 256


@jitable
def cores(self):
    """Physical cores: CPUs c and c + cores are SMT siblings, as Linux numbers one socket."""
    return max(1, min(self.cpus, CPUS) // 2)


@jitable
def cpu_of(self, tid):
    """Where the thread belongs: its pair's core, the sibling by its place in the pair."""
    return min(self.home[tid // 2] - 1 + (tid & 1) * cores(self), self.cpus - 1)


@jitable
def settle(self, tid):
    """The thread has woken: give its pair a core when it has none, or another while neither of the pair holds on to the one it has."""
    pair = tid // 2
    if self.home[pair] == 0:
        self.home[pair] = 1 + pair % cores(self)
    elif self.move and self.awake[tid ^ 1] == 0 and self.there[self.home[pair] - 1] > 0:
        for core in range(cores(self)):
            if self.there[core] < self.there[self.home[pair] - 1]:
                self.home[pair] = core + 1
    self.awake[tid] = 1
    self.there[self.home[pair] - 1] += 1


@jitable
def leave(self, tid):
    if self.awake[tid]:
        self.awake[tid] = 0
        self.there[self.home[tid // 2] - 1] -= 1


class Vm(Policy, subsystem=sched, name="vm", work_conserving=False):
    """Virtual machines: vCPU threads 2k and 2k+1 are the siblings of one core, pinned there, or with `move` on the emptiest one when both have slept.

    Threads that share a CPU take turns of `quantum_us`. The agent's clock ends them, so the host's CPUs need no tick.
    """

    move: Param = 0
    quantum_us: Param = 5_000

    runq = rings(CPUS, 4_096)
    home = per_thread()  # of a pair: its core + 1
    awake = per_thread()  # it runs or waits
    there = array(CPUS)  # of a core: threads awake whose home it is
    staged = per_cpu()  # a thread was given ahead of need

    def thread_new(self, msg, txns):
        leave(self, msg.tid)

    def thread_runnable(self, msg, txns):
        if self.awake[msg.tid] == 0:
            settle(self, msg.tid)
        push(self.runq[cpu_of(self, msg.tid)], msg.tid, front=msg.front)

    def thread_running(self, msg, txns):
        self.staged[msg.cpu] = 0
        sched.set_timer(txns, msg.cpu, msg.time_ns + int(self.quantum_us * 1_000))

    def timer_expired(self, msg, txns):
        if msg.cpu < CPUS and (self.staged[msg.cpu] or size(self.runq[msg.cpu])):
            sched.preempt(txns, msg.cpu)
        else:
            sched.set_timer(txns, msg.cpu, msg.time_ns + int(self.quantum_us * 1_000))

    def thread_blocked(self, msg, txns):
        leave(self, msg.tid)

    def cpu_idle(self, msg, txns):
        if msg.cpu < CPUS and size(self.runq[msg.cpu]):
            self.staged[msg.cpu] = msg.front
            sched.run(txns, tid=pop(self.runq[msg.cpu]), cpu=msg.cpu)
