"""What mechanism `priority` does beyond what every mechanism promises: threads that the kernel runs before a decision says so."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.host.sched.conftest import PATIENCE_S, Hand, until
from tests.host.sched.test_mechanism import place, runs, wait
from waveos.host.kin import family
from waveos.host.sched import attributes
from waveos.host.sched.half import THREADS
from waveos.host.sched.priority import FIRST, TAIL, WORDS
from waveos.outcome import Outcome
from waveos.sched.records import KICKED, PREEMPT, Message

pytestmark = pytest.mark.parametrize("enclave", ["priority"], indirect=True)


def test_what_the_kernel_runs_while_nothing_is_decided_is_its_cpus_and_can_be_preempted(enclave: Any) -> None:
    first, second = enclave.worker(), enclave.worker()
    hand = Hand(enclave.mechanism)
    a = place(enclave, hand, first)
    staged = hand.decide(wait(enclave, hand, second), flags=0)
    assert hand.outcome(hand.preempt()) is Outcome.COMMITTED
    assert hand.outcome(staged) is Outcome.COMMITTED
    hand.told(Message.THREAD_PREEMPTED, a)
    runs(second.pid)


def test_hostd_hears_of_a_stray_that_outlives_its_grace_although_nothing_else_happens(enclave: Any) -> None:
    runner, stray, decided = (enclave.worker() for _ in range(3))
    hand = Hand(enclave.mechanism)
    place(enclave, hand, runner)
    wait(enclave, hand, stray)
    staged = hand.decide(wait(enclave, hand, decided), flags=0)
    enclave.mechanism.attend()
    strays = enclave.mechanism.counters()["strays"]
    runner.rest()  # the kernel's next is the stray, which never blocks
    assert select.select(enclave.mechanism.events, [], [], PATIENCE_S)[0], "nobody said that it lingers"
    assert enclave.mechanism.counters()["strays"] == strays + 1, "said only when the kernel took it off the CPU for a while, and put it back"
    assert hand.outcome(staged) is Outcome.COMMITTED
    runs(decided.pid)


def test_demoted_threads_are_moved_among_themselves(enclave: Any) -> None:
    first, second = enclave.worker(), enclave.worker()
    hand = Hand(enclave.mechanism)
    a, usual = place(enclave, hand, first), attributes.read(first.pid)
    hand.demote()
    b = wait(enclave, hand, second)
    hand.told(Message.THREAD_RUNNING, b)
    hand.demote()
    for tid, worker in ((a, first), (b, second)):
        heard = len(hand.listen())
        assert hand.outcome(hand.preempt()) is Outcome.COMMITTED  # to the tail of the lower level
        hand.told(Message.THREAD_RUNNING, tid, heard)
        runs(worker.pid)
    assert hand.outcome(hand.decide(a, flags=KICKED | PREEMPT)) is Outcome.COMMITTED  # and to its head
    runs(first.pid)
    for worker in (first, second):
        assert attributes.read(worker.pid).priority == usual.priority - 1


def test_a_decision_for_a_demoted_thread_does_not_come_before_one_that_wakes(enclave: Any) -> None:
    runner, demoted, third = (enclave.worker() for _ in range(3))
    hand = Hand(enclave.mechanism)
    a = place(enclave, hand, demoted)
    hand.demote()
    b = wait(enclave, hand, runner)
    hand.told(Message.THREAD_RUNNING, b)
    staged = hand.decide(a, flags=0)
    c = wait(enclave, hand, third)
    runner.rest()
    hand.told(Message.THREAD_RUNNING, c)
    runs(third.pid)
    assert not hand.answers(staged)
    third.rest()
    assert hand.outcome(staged) is Outcome.COMMITTED
    runs(demoted.pid)


def nap_elsewhere(worker: Any) -> None:
    """The thread wakes and goes to sleep again on a CPU that is not the enclave's."""

    def switches() -> int:
        return int(Path(f"/proc/{worker.pid}/status").read_text().partition("\nvoluntary_ctxt_switches:")[2].split()[0])

    before = switches()
    os.sched_setaffinity(worker.pid, os.sched_getaffinity(0))
    worker.tell(b"g")
    until(lambda: switches() > before and worker.blocked(), "it has slept again")


@contextlib.contextmanager
def in_hostds_place() -> Iterator[None]:
    """On the enclave's CPU, above its members: each of our turns is a switch there."""
    cpus = os.sched_getaffinity(0)
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(60))
    os.sched_setaffinity(0, {min(os.sched_getaffinity(1))})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cpus)
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def test_hostd_does_not_try_for_ever_to_run_a_thread_that_sleeps_unseen(enclave: Any) -> None:
    runner, stray, asleep = (enclave.worker() for _ in range(3))
    hand = Hand(enclave.mechanism)
    place(enclave, hand, runner)
    wait(enclave, hand, stray)
    nap_elsewhere(asleep)
    tid = int(enclave.number(asleep.pid))
    hand.told(Message.THREAD_RUNNABLE, tid)
    staged = hand.decide(tid, flags=0)
    acts = enclave.mechanism.counters()["acts"]
    runner.rest()
    with in_hostds_place():
        for _ in range(20):
            select.select(enclave.mechanism.events, [], [], 0.05)
            enclave.mechanism.attend()
    assert enclave.mechanism.counters()["acts"] - acts <= 3
    assert hand.outcome(staged) is Outcome.TARGET_NOT_RUNNABLE
    assert hand.types(tid)[-2:] == ["THREAD_BLOCKED", "TXN_OUTCOME"]
    hand.told(Message.THREAD_RUNNING, int(enclave.number(stray.pid)))


def test_a_thread_that_went_to_sleep_while_it_was_the_kernels_is_not_told_as_runnable(enclave: Any) -> None:
    napper, awake = enclave.worker(), enclave.worker()
    enclave.mechanism._default_ns = 0
    until(lambda: (enclave.mechanism.tick(), not enclave.mechanism.counters()["governed"])[-1], "the kernel's default holds")
    nap_elsewhere(napper)
    awake.run()
    hand = Hand(enclave.mechanism)
    assert hand.types(int(enclave.number(napper.pid))) == ["THREAD_NEW"]
    assert hand.types(int(enclave.number(awake.pid)))[1] in ("THREAD_RUNNABLE", "CPU_NEW"), "it waits, or is what the CPU runs"


def test_a_thread_that_is_preempted_while_it_ends_can_be_decided_for_until_it_has_ended(enclave: Any) -> None:
    ending, other = enclave.worker(), enclave.worker()
    hand = Hand(enclave.mechanism)
    tid = int(enclave.number(ending.pid))
    ending.run(b"m")  # it has memory to give back, which takes a while
    hand.told(Message.THREAD_RUNNING, tid)
    hand.decide(wait(enclave, hand, other), flags=0)
    until(lambda: int(Path(f"/proc/{ending.pid}/statm").read_text().split()[1]) > 128 << 8, "its pages are there")
    ending.kill()
    assert select.select(enclave.mechanism.events, [], [], PATIENCE_S)[0], "its end has begun"
    hand.preempt()

    def left() -> bool:
        hand.beat()
        enclave.mechanism.attend()
        return bool({"THREAD_PREEMPTED", "THREAD_DEAD"} & set(hand.types(tid)))

    until(left, "it has left its CPU")
    if "THREAD_DEAD" in hand.types(tid):
        pytest.skip("it ended before it could be preempted: this kernel says so late")
    staged = hand.decide(tid, flags=0)
    other.rest()
    assert hand.outcome(staged) is Outcome.COMMITTED
    hand.told(Message.THREAD_DEAD, tid)


def test_a_member_that_ends_where_nobody_looks_is_forgotten(enclave: Any) -> None:
    worker, mechanism = enclave.worker(), enclave.mechanism
    os.sched_setaffinity(worker.pid, os.sched_getaffinity(0))  # not the enclave's CPU
    worker.end()
    until(lambda: (mechanism.attend(), mechanism.tick(), not mechanism.counters()["threads"])[-1], "its number is free")
    assert len(mechanism._free) == THREADS


def test_a_thread_that_was_let_go_is_not_put_on_its_cpu_any_more(enclave: Any) -> None:
    runner, stray, asleep = (enclave.worker() for _ in range(3))
    hand = Hand(enclave.mechanism)
    place(enclave, hand, runner)
    wait(enclave, hand, stray)
    nap_elsewhere(asleep)  # what is decided for it keeps the stray from being the CPU's
    tid = int(enclave.number(asleep.pid))
    hand.told(Message.THREAD_RUNNABLE, tid)
    hand.decide(tid, flags=0)
    enclave.mechanism.attend()
    runner.rest()
    ghost = int(enclave.number(stray.pid))
    until(lambda: enclave.mechanism.on_cpus()[0]["tid"] == ghost, "the kernel runs the stray")
    enclave.mechanism.release(stray.pid)
    with in_hostds_place():
        for _ in range(20):
            hand.beat()
            enclave.mechanism.attend()
            time.sleep(0.01)
    assert enclave.mechanism.on_cpus()[0]["tid"] == -1
    assert "THREAD_RUNNING" not in hand.types(ghost)


@pytest.mark.parametrize("whose", ["hostd", "stranger"])
def test_nobody_is_moved_but_a_member(enclave: Any, whose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mechanism, pid = enclave.mechanism, 0 if whose == "hostd" else enclave.worker(adopted=False).pid
    number = int(enclave.number(enclave.worker().pid))
    mechanism._acts[FIRST : FIRST + WORDS] = array("I", (TAIL, pid, 0, number))
    monkeypatch.setattr(mechanism, "_attend", SimpleNamespace(run=lambda: 1))
    mechanism._enforce()
    assert os.sched_getscheduler(pid) == os.SCHED_OTHER


@pytest.mark.cpus(2)
def test_a_cpu_that_a_higher_class_leaves_idle_is_told_as_idle(enclave: Any) -> None:
    worker, hand = enclave.worker(), Hand(enclave.mechanism)
    place(enclave, hand, worker)
    os.sched_setaffinity(0, os.sched_getaffinity(1))  # where the worker is not

    def where(kind: Message, after: int = 0) -> list[int]:
        hand.beat()
        enclave.mechanism.attend()
        return [int(m["cpu"]) for m in hand.listen()[after:] if m["type"] == kind]

    cpu, heard = where(Message.THREAD_RUNNING)[-1], len(hand.heard)
    lines = ("os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(60))", f"os.sched_setaffinity(0, {{{sorted(os.sched_getaffinity(1))[cpu]}}})")
    other = subprocess.Popen([sys.executable, "-S", "-c", "\n".join(("import os", *lines, "while True: pass"))])
    try:
        until(lambda: 1 - cpu in where(Message.THREAD_RUNNING, heard), "the kernel moved the worker to the other CPU")
    finally:
        other.kill()
        other.wait()
    kernels = sorted(os.sched_getaffinity(1))[cpu]
    before, end = idle_ticks(kernels), time.monotonic() + PATIENCE_S
    while where(Message.CPU_IDLE, heard)[-1:] != [cpu]:
        assert idle_ticks(kernels) < before + 10, "the CPU idles, and nobody was told"
        if time.monotonic() > end:
            pytest.skip("other programs leave this CPU no time to idle")
        time.sleep(0.001)


def idle_ticks(cpu: int) -> int:
    """How long the CPU has idled, as /proc/stat counts."""
    return int(next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith(f"cpu{cpu} ")).split()[4])


@pytest.mark.cpus(2)
def test_a_child_of_a_thread_that_a_decision_bound_may_use_the_cpus_that_its_parent_might(enclave: Any) -> None:
    worker = enclave.worker()
    cpus = attributes.affinity(worker.pid)
    hand = Hand(enclave.mechanism)
    attributes.set_affinity(worker.pid, cpus[1:])  # as `_enforce` does, where a thread is to be the next of a CPU
    worker.tell(b"f")

    def child() -> list[int]:
        hand.beat()
        enclave.mechanism.attend()
        children = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()
        return [int(pid) for pid in children if enclave.number(int(pid)) is not None]

    (pid,) = until(child, "a child is a member")
    assert attributes.affinity(pid) == cpus
    enclave.mechanism.release(pid)
    assert attributes.affinity(pid) == cpus


def test_a_grandchild_whose_parent_has_ended_gets_back_what_the_member_had(enclave: Any) -> None:
    worker = enclave.worker(adopted=False)
    cpus = sorted(os.sched_getaffinity(1))
    os.sched_setaffinity(worker.pid, cpus)
    own = Path(f"/proc/{worker.pid}/cmdline").read_bytes()
    before = set(os.listdir("/proc"))
    enclave.mechanism.adopt(worker.pid)
    worker.tell(b"d")

    def orphans() -> list[int]:
        found = []
        for name in filter(str.isdigit, set(os.listdir("/proc")) - before):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{name}/cmdline").read_bytes() == own:
                    found.append(int(name))
        return [pid for pid in found if len(found) == 1 and family(pid)[1] != worker.pid]

    (pid,) = until(orphans, "the one between them has ended")
    assert attributes.affinity(pid) == cpus[:1]
    enclave.mechanism.attend()
    assert enclave.number(pid) is not None
    enclave.mechanism.close()
    assert attributes.affinity(pid) == cpus
