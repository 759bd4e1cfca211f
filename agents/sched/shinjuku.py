from waveos import sched
from waveos.policy import Param, Policy, jitable, per_cpu, pop, push, rings, size

CLASSES = 8  # QoS classes; the highest is CLASSES - 1


@jitable
def highest(self):
    """The highest QoS class with a thread waiting; -1: none waits."""
    for qos in range(CLASSES - 1, -1, -1):
        if size(self.runq[qos]):
            return qos
    return -1


class Shinjuku(Policy, subsystem=sched, name="shinjuku"):
    """Centralised and preemptive (Kaffes et al., NSDI 2019): a queue for every QoS class, slices of `quantum_us`.

    A thread that has used its slice makes way as soon as one of its class or a higher one waits, and goes to the back; a thread of a higher
    class does not wait for the slice to end. A thread that the kernel took off its CPU goes to the front.
    """

    quantum_us: Param = 30

    runq = rings(CLASSES, 65_536)
    running_qos = per_cpu()  # class + 1 of what runs; 0: nothing, or it is being replaced
    taken = per_cpu()  # by a higher class of the kernel: it neither asks nor is preempted

    def thread_runnable(self, msg, txns):
        qos = min(msg.qos, CLASSES - 1)
        push(self.runq[qos], msg.tid, front=msg.front)
        victim, lowest = -1, qos + 1
        for cpu in range(self.cpus):
            if self.running_qos[cpu] < lowest and not self.taken[cpu]:
                if self.running_qos[cpu] == 0:
                    return  # a CPU is about to ask
                victim, lowest = cpu, self.running_qos[cpu]
        if victim >= 0:
            self.running_qos[victim] = 0
            sched.run(txns, tid=pop(self.runq[qos]), cpu=victim, preempt=True)

    def thread_running(self, msg, txns):
        self.running_qos[msg.cpu] = 1 + min(msg.qos, CLASSES - 1)
        sched.set_timer(txns, msg.cpu, msg.time_ns + int(self.quantum_us * 1_000))

    def timer_expired(self, msg, txns):
        if highest(self) + 1 >= self.running_qos[msg.cpu]:
            sched.preempt(txns, msg.cpu)

    def thread_preempted(self, msg, txns):
        self.running_qos[msg.cpu] = 0
        push(self.runq[min(msg.qos, CLASSES - 1)], msg.tid, front=msg.front)

    def thread_blocked(self, msg, txns):
        self.running_qos[msg.cpu] = 0

    def cpu_taken(self, msg, txns):
        self.taken[msg.cpu] = 1

    def cpu_back(self, msg, txns):
        self.taken[msg.cpu] = 0

    def cpu_idle(self, msg, txns):
        qos = highest(self)
        if qos >= 0:
            sched.run(txns, tid=pop(self.runq[qos]), cpu=msg.cpu)
