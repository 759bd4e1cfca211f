"""What mechanism `sched_ext` tells beyond what every mechanism does, and who schedules when the agent, hostd or the kernel has had enough."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.host.sched.conftest import Hand, until
from tests.host.sched.test_mechanism import ran_ns, runs
from waveos.host.sched import attributes
from waveos.outcome import Outcome
from waveos.sched.records import Message

pytestmark = pytest.mark.parametrize("enclave", ["sched_ext"], indirect=True)
STATE = Path("/sys/kernel/sched_ext/state")
NOBODY = -1


@contextlib.contextmanager
def ordinary_spinner(cpu: int) -> Iterator[None]:
    """A process of the fair class, which is above the enclave's, computes on that CPU."""
    process = subprocess.Popen([sys.executable, "-S", "-c", f"import os\nos.sched_setaffinity(0, {{{cpu}}})\nwhile True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def running(enclave: Any, hand: Hand, order: bytes = b"g") -> Any:
    """A worker that a decision put on the first CPU."""
    worker = enclave.worker()
    worker.run(order)
    tid = enclave.number(worker.pid)
    hand.told(Message.THREAD_RUNNABLE, tid)
    assert hand.outcome(hand.decide(tid)) is Outcome.COMMITTED
    return worker


@pytest.mark.cpus(2)
def test_an_affinity_that_changes_is_told_and_makes_decisions_stale(enclave: Any) -> None:
    worker = enclave.worker()
    hand, tid = Hand(enclave.mechanism), enclave.number(worker.pid)
    worker.run()
    before = hand.told(Message.THREAD_RUNNABLE, tid)
    os.sched_setaffinity(worker.pid, {0})
    hand.told(Message.AFFINITY_CHANGED, tid)
    assert hand.outcome(hand.decide(tid, seq=int(before["seq"]))) is Outcome.STALE
    assert hand.outcome(hand.decide(tid, cpu=1)) is Outcome.CPU_UNAVAILABLE
    assert hand.outcome(hand.decide(tid)) is Outcome.COMMITTED
    runs(worker.pid)


def test_a_thread_that_leaves_the_enclaves_cpus_is_the_kernels_until_it_comes_back(enclave: Any) -> None:
    worker = enclave.worker()
    hand, tid = Hand(enclave.mechanism), enclave.number(worker.pid)
    worker.run()
    hand.told(Message.THREAD_RUNNABLE, tid)
    os.sched_setaffinity(worker.pid, {1})
    hand.told(Message.THREAD_BLOCKED, tid)
    runs(worker.pid)
    after = len(hand.heard)
    os.sched_setaffinity(worker.pid, {0})
    hand.told(Message.THREAD_RUNNABLE, tid, after=after)
    assert hand.outcome(hand.decide(tid)) is Outcome.COMMITTED
    runs(worker.pid)


def test_a_priority_that_changes_is_told(enclave: Any) -> None:
    worker = enclave.worker()
    hand = Hand(enclave.mechanism)
    os.setpriority(os.PRIO_PROCESS, worker.pid, 5)
    hand.told(Message.PRIORITY_CHANGED, enclave.number(worker.pid))


def test_a_thread_that_is_given_another_class_sleeps_for_the_agent_until_it_is_back(enclave: Any) -> None:
    worker = enclave.worker()
    hand, tid = Hand(enclave.mechanism), enclave.number(worker.pid)
    worker.run()
    hand.told(Message.THREAD_RUNNABLE, tid)
    attributes.write(worker.pid, attributes.Attributes("OTHER"))
    hand.told(Message.THREAD_BLOCKED, tid)
    runs(worker.pid)
    after = len(hand.heard)
    attributes.write(worker.pid, attributes.Attributes("EXT"))
    hand.told(Message.THREAD_RUNNABLE, tid, after=after)


def test_a_yield_is_told_and_the_thread_waits_for_its_next_turn(enclave: Any) -> None:
    hand = Hand(enclave.mechanism)
    worker = running(enclave, hand, b"y")
    tid = enclave.number(worker.pid)
    for _ in range(3):
        after = len(hand.heard)
        hand.told(Message.THREAD_YIELDED, tid)
        assert hand.outcome(hand.decide(tid)) is Outcome.COMMITTED
        hand.told(Message.THREAD_YIELDED, tid, after=after)


def test_a_tick_on_a_busy_cpu_is_told(enclave: Any) -> None:
    hand = Hand(enclave.mechanism)
    worker = running(enclave, hand)
    assert hand.told(Message.TICK, enclave.number(worker.pid))["cpu"] == 0


def test_a_cpu_that_wants_a_thread_is_told_once(enclave: Any) -> None:
    hand = Hand(enclave.mechanism)
    worker = running(enclave, hand)
    after = len(hand.heard)
    worker.rest()
    hand.told(Message.THREAD_BLOCKED, enclave.number(worker.pid), after=after)
    hand.told(Message.CPU_IDLE, NOBODY, after=after)
    assert [m["type"] for m in hand.heard[after:]].count(Message.CPU_IDLE) == 1


def test_a_cpu_that_a_higher_class_takes_from_a_thread_is_told_and_told_when_it_is_back(enclave: Any) -> None:
    hand = Hand(enclave.mechanism)
    worker = running(enclave, hand)
    with ordinary_spinner(0):
        assert hand.told(Message.CPU_TAKEN, enclave.number(worker.pid))["cpu"] == 0
        after = len(hand.heard)
    assert hand.told(Message.CPU_BACK, NOBODY, after=after)["cpu"] == 0
    runs(worker.pid)


def test_a_cpu_that_a_higher_class_takes_while_it_idles_is_told_and_told_when_it_is_back(enclave: Any) -> None:
    hand = Hand(enclave.mechanism)
    hand.told(Message.CPU_IDLE, NOBODY)
    after = len(hand.heard)
    with ordinary_spinner(0):
        hand.told(Message.CPU_TAKEN, NOBODY, after=after)
    hand.told(Message.CPU_BACK, NOBODY, after=after)
    hand.told(Message.CPU_IDLE, NOBODY, after=after)
    running(enclave, hand)


def test_a_decision_for_a_cpu_that_is_taken_waits_until_it_is_back(enclave: Any) -> None:
    hand = Hand(enclave.mechanism)
    first = running(enclave, hand)
    second = enclave.worker()
    second.run()
    tid = enclave.number(second.pid)
    hand.told(Message.THREAD_RUNNABLE, tid)
    with ordinary_spinner(0):
        hand.told(Message.CPU_TAKEN, enclave.number(first.pid))
        staged = hand.decide(tid, flags=0)
        hand.preempt()
        enclave.mechanism.attend()
    assert hand.outcome(staged) is Outcome.COMMITTED
    runs(second.pid)


def test_while_messages_are_lost_the_kernels_queue_gives_each_thread_its_turn(enclave: Any) -> None:
    workers = [enclave.worker() for _ in range(3)]
    hand = Hand(enclave.mechanism)
    for worker in workers:
        worker.run()
        hand.told(Message.THREAD_RUNNABLE, enclave.number(worker.pid))
    tid = enclave.number(workers[0].pid)
    assert hand.outcome(hand.decide(tid)) is Outcome.COMMITTED
    hand.flood(tid)
    for _ in range(2):
        for worker in workers:
            before = ran_ns(worker.pid)
            until(lambda pid=worker.pid, before=before: (enclave.mechanism.attend(), ran_ns(pid) > before)[1], f"{worker.pid} has its turn")
    assert enclave.mechanism.counters()["overflow"] == 1
    hand.listen()
    after = len(hand.heard)
    until(lambda: (enclave.mechanism.tick(), hand.listen(), Message.RESYNC in [m["type"] for m in hand.heard[after:]])[-1], "the whole state is told")
    for worker in workers:
        hand.told(Message.THREAD_NEW, enclave.number(worker.pid), after=after)
    last = enclave.number(workers[-1].pid)
    assert hand.outcome(hand.decide(last)) is Outcome.COMMITTED
    runs(workers[-1].pid)


def test_when_the_agent_is_silent_the_kernel_finds_out_by_itself_and_threads_take_turns(enclave: Any) -> None:
    workers = [enclave.worker() for _ in range(3)]
    hand = Hand(enclave.mechanism)
    for worker in workers:
        worker.run()
        hand.told(Message.THREAD_RUNNABLE, enclave.number(worker.pid))
    assert hand.outcome(hand.decide(enclave.number(workers[0].pid))) is Outcome.COMMITTED
    silent_ns = enclave.mechanism._bpf.section(".data").view(np.uint64)
    patient_ns, silent_ns[0] = int(silent_ns[0]), 20_000_000  # hostd's own watch stays as patient as the fixture has made it
    until(lambda: enclave.mechanism.counters()["fallbacks"], "the watch in the kernel sees it")
    for _ in range(2):
        for worker in workers:
            enclave.mechanism.attend()
            runs(worker.pid)
    assert not hand.ended()
    enclave.mechanism.tick()
    assert hand.ended()
    assert enclave.mechanism.counters()["fallbacks"] == 1
    silent_ns[0] = patient_ns
    rules_again(enclave, workers)


def test_after_a_longer_silence_the_kernels_default_holds_until_an_agent_comes(enclave: Any) -> None:
    workers = [enclave.worker() for _ in range(2)]
    hand = Hand(enclave.mechanism)
    for worker in workers:
        worker.run()
        hand.told(Message.THREAD_RUNNABLE, enclave.number(worker.pid))
    enclave.mechanism.agent_gone()
    until(lambda: (enclave.mechanism.tick(), STATE.read_text().strip() == "disabled")[1], "it is unregistered")
    for worker in workers:
        assert attributes.read(worker.pid).policy == "OTHER"
        runs(worker.pid)
    rules_again(enclave, workers)


def test_a_scheduler_that_the_kernel_ends_is_said_why_and_registered_again_for_the_next_agent(enclave: Any) -> None:
    workers = [enclave.worker() for _ in range(2)]
    hand = Hand(enclave.mechanism)
    for worker in workers:
        worker.run()
        hand.told(Message.THREAD_RUNNABLE, enclave.number(worker.pid))
    Path("/proc/sysrq-trigger").write_text("S")  # the operator's way to be rid of any sched_ext scheduler
    until(lambda: (enclave.mechanism.tick(), enclave.mechanism.counters()["ended_by_kernel"])[1], "hostd hears of it")
    assert "sysrq" in enclave.mechanism.counters()["ended_by_kernel"].lower()
    for worker in workers:
        runs(worker.pid)
    rules_again(enclave, workers)


def test_the_number_of_a_thread_that_ended_while_the_kernels_default_held_is_free_again(enclave: Any) -> None:
    worker = enclave.worker()
    enclave.mechanism._default_ns = 0
    until(lambda: (enclave.mechanism.tick(), STATE.read_text().strip() == "disabled")[1], "it is unregistered")
    worker.kill()
    worker._process.wait()
    until(lambda: (enclave.mechanism.attend(), enclave.mechanism.tick(), not enclave.mechanism.counters()["threads"])[-1], "its number is free")


def rules_again(enclave: Any, workers: list[Any]) -> None:
    second = Hand(enclave.mechanism, 2)
    assert STATE.read_text().strip() == "enabled"
    for worker in workers:
        tid = enclave.number(worker.pid)
        second.told(Message.THREAD_RUNNABLE, tid)
        assert second.outcome(second.decide(tid)) is Outcome.COMMITTED
        runs(worker.pid)
        worker.rest()
        second.told(Message.THREAD_BLOCKED, tid)
