"""What mechanism `priority` does beyond what every mechanism promises: threads that the kernel runs before a decision says so."""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.host.sched.conftest import PATIENCE_S, Hand, until
from tests.host.sched.test_mechanism import place, runs, wait
from waveos.outcome import Outcome
from waveos.sched.records import Message

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
