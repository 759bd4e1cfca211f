"""The suite for policies sees it when one of the runtime's laws is broken: each is broken here in turn."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from numba.extending import overload

from waveos import sched, testing
from waveos.policy import Policy, load_policy, pop, push, ring, size

sys.path.insert(0, str(Path(__file__).parent))
try:
    from mutants import Interpreted
finally:
    sys.path.pop(0)

MUTATIONS = {
    "a CPU that went idle before its decision came is not kicked": (
        "            elif not c.kicked:\n                c.kicked = 1\n                _emit(rt, KICK, -1, cpu, KICKED)",
        "            elif False:\n                pass",
    ),
    "an idle CPU's doorbell is not rung": (
        "    elif c.idle and not c.kicked:\n        flags = KICKED\n",
        "    elif c.idle and not c.kicked:\n        c.kicked = 1\n",
    ),
    "a thread is not offered again after a failed transaction": ("_offer(rt, tid, cpu, TXN_FAILED, 1, outcome, m.time_ns)", "pass"),
    "a thread staged behind a busy CPU is not offered to an idle one": ("                    _restage(rt, cpu)\n", "                    pass\n"),
    "a thread that was preempted is not offered": (
        "            _vacate(rt, tid, cpu, m.cpu_seq)\n            _offer(rt, tid, cpu, kind, front, 0, m.time_ns)\n",
        "            _vacate(rt, tid, cpu, m.cpu_seq)\n",
    ),
    "a decision carries an old sequence number": ("d.seq = rt.thread[tid].seq if", "d.seq = rt.thread[tid].seq - 1 if"),
    "an idle CPU is asked once only": (
        "                answer = _ask(rt, cpu, 0)\n",
        "                c.idle = 0\n                answer = _ask(rt, cpu, 0)\n",
    ),
    "a decision that has its outcome is still held to be outstanding": ("    c.staged -= found\n", ""),
}
SMALL = {"seeds": 4, "steps": 400}
THOROUGH = {"seeds": 6, "steps": 1_500}


@pytest.fixture
def interpreted(monkeypatch):
    """Makes the suite play against interpreted laws, with this mutation."""

    def use(mutation: tuple[str, str] = ("", "")) -> None:
        monkeypatch.setattr(Interpreted, "mutation", mutation)
        monkeypatch.setattr(testing, "Replayed", Interpreted)

    return use


def test_the_interpreted_laws_decide_as_the_compiled_ones_do():
    for policy in ("fifo", "shinjuku_mq"):
        stream, expected = testing.record_stream(policy, seed=3, steps=1_000)
        assert Interpreted(load_policy(policy), 4, 32, 1).feed(stream).tobytes() == expected.tobytes()


def test_the_interpreted_laws_pass_as_they_are(interpreted):
    interpreted()
    testing.check_policy("fifo", **SMALL)


@pytest.mark.parametrize("law", MUTATIONS)
def test_a_broken_law_makes_check_policy_fail(law, interpreted):
    interpreted(MUTATIONS[law])
    with pytest.raises(AssertionError):
        testing.check_policy("fifo", **THOROUGH)


class Forgetful(Policy, subsystem=sched, name="forgetful"):
    """Loses every tenth thread."""

    runq = ring(4_096)

    def thread_runnable(self, msg, txns):
        if msg.seq % 10 != 9:
            push(self.runq, msg.tid, front=msg.front)

    def cpu_idle(self, msg, txns):
        if size(self.runq):
            sched.run(txns, tid=pop(self.runq), cpu=msg.cpu)


class Lazy(Policy, subsystem=sched, name="lazy"):
    """Leaves a CPU idle although threads wait."""

    runq = ring(4_096)

    def thread_runnable(self, msg, txns):
        push(self.runq, msg.tid, front=msg.front)

    def cpu_idle(self, msg, txns):
        if size(self.runq) and msg.cpu != 3:
            sched.run(txns, tid=pop(self.runq), cpu=msg.cpu)


def is_compiled() -> int:
    """1 in compiled code, else 0."""
    return 0


@overload(is_compiled)
def _is_compiled():
    return lambda: 1


class TwoMinded(Policy, subsystem=sched, name="two_minded"):
    """Last come first served when it is compiled, first come first served when not."""

    runq = ring(4_096)

    def thread_runnable(self, msg, txns):
        push(self.runq, msg.tid, front=is_compiled())

    def cpu_idle(self, msg, txns):
        if size(self.runq):
            sched.run(txns, tid=pop(self.runq), cpu=msg.cpu)


@pytest.mark.parametrize("policy", [Forgetful, Lazy])
def test_a_policy_that_loses_threads_or_leaves_a_cpu_idle_fails(policy):
    with pytest.raises(AssertionError, match=r"wait while CPUs|never got a CPU"):
        testing.check_policy(policy, **SMALL)


def test_a_policy_that_says_it_may_leave_a_cpu_idle_passes():
    conserving, Lazy.work_conserving = Lazy.work_conserving, False
    try:
        testing.check_policy(Lazy, **SMALL)
    finally:
        Lazy.work_conserving = conserving


def test_a_policy_that_decides_otherwise_as_plain_python_fails():
    with pytest.raises(AssertionError, match="plain Python and compiled code decide differently"):
        testing.check_policy(TwoMinded, **SMALL)


def test_streams_of_equal_seeds_are_equal():
    first, second = (testing.record_stream("shinjuku", seed=5, steps=500) for _ in range(2))
    assert first[0].tobytes() == second[0].tobytes()
    assert first[1].tobytes() == second[1].tobytes()
    assert isinstance(first[0], np.ndarray) and len(first[1])
