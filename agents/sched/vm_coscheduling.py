from waveos import sched
from waveos.policy import Param, Policy, array, jitable, per_cpu, per_thread, pop, push, rings, size

TENANTS = 256


@jitable
def sibling(self, cpu):
    """The other CPU of the core; CPUs c and c + cores are siblings, as Linux numbers one socket. -1: it has none."""
    cores = self.cpus // 2
    if cpu >= 2 * cores:
        return -1
    return cpu + cores if cpu < cores else cpu - cores


@jitable
def core_of(self, cpu):
    """A core is named by the lower of its CPUs."""
    other = sibling(self, cpu)
    return min(cpu, other) if other >= 0 else cpu


@jitable
def holder(self, cpu):
    """The tenant that has `cpu`, or may have it once a decision on its way is applied; -1: none."""
    return self.tenant[self.given[cpu] - 1] if cpu >= 0 and self.given[cpu] else -1


@jitable
def put(self, tid, cpu):
    """From now on the thread is, or may be, on the CPU."""
    take_off(self, tid)
    self.given[cpu], self.at[tid] = tid + 1, cpu + 1


@jitable
def take_off(self, tid):
    """The thread is on no CPU, and no decision on its way can put it there: its sequence number has moved on."""
    cpu = self.at[tid] - 1
    self.at[tid] = 0
    if cpu >= 0 and self.given[cpu] == tid + 1:
        self.given[cpu] = 0


@jitable
def next_tenant(self, but):
    """The next tenant by turns with a thread waiting, other than `but`; -1: none."""
    for i in range(self.tenants[0]):
        tenant = (self.turn[0] + i) % self.tenants[0]
        if tenant != but and size(self.runq[tenant]):
            return tenant
    return -1


class VmCoscheduling(Policy, subsystem=sched, name="vm_coscheduling", work_conserving=False):
    """Core scheduling: the two CPUs of a core never run threads of two tenants (`msg.request_class`) at a time.

    A core belongs to the tenant of what runs there, or may run once a decision on its way is applied. After `quantum_us`, while others wait, both its CPUs
    are emptied, and only when both are known to be empty the next tenant gets it. What the agent hears lags behind the host, but on the safe side: a
    thread may have left a CPU that is still held for it, and none is on a CPU that was not given to it. Nothing is prestaged behind a running thread.
    """

    quantum_us: Param = 5_000

    runq = rings(TENANTS, 4_096)
    tenant = per_thread()
    at = per_thread()  # CPU + 1 that it was given; 0: none
    given = per_cpu()  # thread + 1; 0: none
    since_ns = per_cpu()  # of a core: when its tenant got it
    emptying = per_cpu()  # of a core: its tenant's time is over
    tenants = array(1)  # the highest number seen, + 1
    turn = array(1)

    def thread_runnable(self, msg, txns):
        take_off(self, msg.tid)
        self.tenant[msg.tid] = msg.request_class
        self.tenants[0] = max(self.tenants[0], msg.request_class + 1)
        push(self.runq[msg.request_class], msg.tid, front=msg.front)

    def thread_blocked(self, msg, txns):
        take_off(self, msg.tid)

    def thread_running(self, msg, txns):
        put(self, msg.tid, msg.cpu)
        core, other = core_of(self, msg.cpu), sibling(self, msg.cpu)
        self.tenant[msg.tid] = msg.request_class
        if self.emptying[core] or (other >= 0 and self.given[other] and holder(self, other) != msg.request_class):
            sched.preempt(txns, msg.cpu, idle=True)  # it was on its way, or the host chose it
        sched.set_timer(txns, msg.cpu, self.since_ns[core] + int(self.quantum_us * 1_000))

    def timer_expired(self, msg, txns):
        core, other = core_of(self, msg.cpu), sibling(self, msg.cpu)
        if next_tenant(self, holder(self, msg.cpu)) < 0:
            self.since_ns[core] = msg.time_ns
            sched.set_timer(txns, msg.cpu, msg.time_ns + int(self.quantum_us * 1_000))
            return
        self.emptying[core] = 1
        sched.preempt(txns, msg.cpu, idle=True)
        if other >= 0 and self.given[other]:
            sched.preempt(txns, other, idle=True)

    def cpu_idle(self, msg, txns):
        if msg.front:
            return
        core, other = core_of(self, msg.cpu), sibling(self, msg.cpu)
        if self.given[msg.cpu]:  # what it was given has left, and nothing is on its way
            take_off(self, self.given[msg.cpu] - 1)
            self.given[msg.cpu] = 0
        tenant = holder(self, other)
        if tenant < 0:
            self.emptying[core] = 0
            tenant = next_tenant(self, -1)
            if tenant < 0:
                return
            self.turn[0] = tenant + 1
            self.since_ns[core] = msg.time_ns
        if self.emptying[core] == 0 and size(self.runq[tenant]):
            tid = pop(self.runq[tenant])
            put(self, tid, msg.cpu)
            sched.run(txns, tid=tid, cpu=msg.cpu)
