"""The laws under a host as the kernel is: threads are bound to some CPUs, and a CPU that a higher class takes keeps its thread and what is staged there."""

import pytest

from waveos.outcome import Outcome
from waveos.policy import load_policy
from waveos.sched import Message
from waveos.testing import HostileHost, Replayed, interpreted

CPUS, THREADS, STEPS = 4, 24, 1_200
CONSERVING = ["fifo", "round_robin", "shinjuku", "shinjuku_mq", "edf", "srpt", "mlfq"]


class KernelHost(HostileHost):
    """A hostile host whose threads may not run everywhere; `bound` of them at first."""

    def __init__(self, agent, seed, bound):
        super().__init__(agent, seed)
        self.allowed = [set(range(agent.cpus)) for _ in range(agent.threads)]
        for tid in self.random.sample(range(agent.threads), bound):
            self._choose(tid)
        self.binding = bound > 0

    def _choose(self, tid):
        self.allowed[tid] = set(self.random.sample(range(self.agent.cpus), self.random.randrange(1, self.agent.cpus + 1)))

    def play(self, steps):
        for _ in range(steps):
            super().play(1)
            if self.binding and self.random.random() < 0.03:
                self._bind()

    def _may_run(self, tid, cpu):
        return cpu in self.allowed[tid]

    def _bind(self):
        """The affinity of a thread that is not on a CPU changes."""
        tid = self.random.randrange(self.agent.threads)
        if self.where[tid] in ("blocked", "runnable"):
            self._choose(tid)
            self.seq[tid] += 1
            self._say(Message.AFFINITY_CHANGED, tid=tid)

    def _judge(self, decision, cpu):
        outcome = super()._judge(decision, cpu)
        return Outcome.CPU_UNAVAILABLE if outcome == Outcome.COMMITTED and cpu not in self.allowed[int(decision["tid"])] else outcome

    def _answer(self, decision, outcome):
        """The suite's host calls a preemption that it refuses stale, whatever the reason."""
        tid, cpu = int(decision["tid"]), int(decision["cpu"])
        holds = tid >= 0 and decision["seq"] == self.seq[tid] and decision["cpu_seq"] == self.cpu_seq[cpu] and self.where[tid] == "runnable"
        super()._answer(decision, Outcome.CPU_UNAVAILABLE if outcome == Outcome.STALE and holds and cpu not in self.allowed[tid] else outcome)

    def _take(self):
        cpu = self.random.randrange(self.agent.cpus)
        if not self.taken[cpu]:
            self.taken[cpu] = True
            self._say(Message.CPU_TAKEN, tid=self.running[cpu], cpu=cpu)

    def _give_back(self):
        if any(self.taken):
            cpu = self.taken.index(True)
            self.taken[cpu] = False
            self._say(Message.CPU_BACK, cpu=cpu)
            self._look(cpu)
            if self.running[cpu] < 0:
                self._next(cpu)

    def _vacate(self, cpu, kind):
        if not self.taken[cpu]:  # else its thread does nothing
            super()._vacate(cpu, kind)

    def _rest(self):
        """As the suite's, without exceptions: no thread waits while a CPU that it may use idles, whatever is staged on CPUs that are taken."""
        self._come_to_rest()
        waiting = [tid for tid, state in enumerate(self.where) if state == "runnable"]
        idle = {cpu for cpu, tid in enumerate(self.running) if tid < 0 and not self.taken[cpu]}
        wrong = {tid: self.allowed[tid] & idle for tid in waiting if self.allowed[tid] & idle}
        assert not wrong, f"policy {self.agent.policy.name!r}: these threads wait while these CPUs that they may use idle: {wrong}"
        return waiting

    def _come_to_rest(self):
        for _ in range(20):
            before = len(self._decisions)
            super()._come_to_rest()
            if len(self._decisions) == before:
                return


@pytest.mark.parametrize("bound", [0, THREADS // 2], ids=["all CPUs", "bound"])
@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("policy", CONSERVING)
def test_no_thread_waits_while_a_cpu_that_it_may_use_idles(policy, ahead, bound):
    for seed in range(3):
        host = KernelHost(Replayed(load_policy(policy), CPUS, THREADS, ahead), seed, bound)
        host.play(STEPS)
        host.finish()
        with interpreted():
            plain = Replayed(load_policy(policy), CPUS, THREADS, ahead).feed(host.stream())
        assert plain.tobytes() == host.decisions().tobytes()
