"""What every mechanism promises, on a real kernel: what it tells, what it applies, what it refuses, what it leaves behind."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.host.sched.conftest import Hand, until
from waveos.host.sched import attributes
from waveos.outcome import Outcome
from waveos.sched.records import KICKED, PREEMPT, Decision, Message


def ran_ns(pid: int) -> int:
    """CPU time of a thread."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0])


def runs(pid: int) -> None:
    """Wait until the thread makes progress."""
    before = ran_ns(pid)
    until(lambda: ran_ns(pid) > before, f"{pid} runs")


def place(enclave: Any, hand: Hand, worker: Any) -> int:
    """The thread runs, and is its CPU's: by a decision, or where the kernel has put it there by itself, because it says so. Its number."""
    tid = int(enclave.number(worker.pid))
    worker.run()
    hand.told(Message.THREAD_RUNNABLE, tid)
    if enclave.kind == "priority":
        hand.told(Message.THREAD_RUNNING, tid)
    else:
        assert hand.outcome(hand.decide(tid)) is Outcome.COMMITTED
    runs(worker.pid)
    return tid


def wait(enclave: Any, hand: Hand, worker: Any) -> int:
    """The thread can run, behind one that does. Its number."""
    tid = int(enclave.number(worker.pid))
    worker.run()
    hand.told(Message.THREAD_RUNNABLE, tid)
    return tid


def test_an_agent_is_given_the_whole_state_first(enclave: Any) -> None:
    workers = [enclave.worker() for _ in range(3)]
    hand = Hand(enclave.mechanism)
    assert hand.types()[0] == "RESYNC"
    for worker in workers:
        hand.told(Message.THREAD_NEW, enclave.number(worker.pid))
    assert "CPU_NEW" in hand.types()


def test_what_happens_between_the_empty_rings_and_the_state_is_told_as_state_alone(enclave: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, half = enclave.worker(), enclave.mechanism._half
    go_on = half._go_on

    def late() -> None:
        worker.run()
        runs(worker.pid)
        go_on()

    monkeypatch.setattr(half, "_go_on", late)
    hand = Hand(enclave.mechanism)
    assert hand.types()[0] == "RESYNC"
    hand.told(Message.THREAD_NEW, enclave.number(worker.pid))


def test_a_thread_that_wakes_and_sleeps_says_so_with_rising_sequence_numbers(enclave: Any) -> None:
    worker = enclave.worker()
    hand = Hand(enclave.mechanism)
    tid = place(enclave, hand, worker)
    woken = hand.told(Message.THREAD_RUNNABLE, tid)
    worker.rest()
    asleep = hand.told(Message.THREAD_BLOCKED, tid)
    assert asleep["seq"] > woken["seq"]
    assert asleep["ran_ns"] > 0


def test_a_committed_decision_is_told_with_the_new_numbers(enclave: Any) -> None:
    first, second = enclave.worker(), enclave.worker()
    hand = Hand(enclave.mechanism)
    place(enclave, hand, first)
    tid = wait(enclave, hand, second)
    before = hand.seq[tid]
    staged = hand.decide(tid, flags=0)
    first.rest()
    assert hand.outcome(staged) is Outcome.COMMITTED
    assert hand.seq[tid] == before + 1


def test_a_preemption_gives_the_cpu_to_what_is_staged(enclave: Any) -> None:
    first, second = enclave.worker(), enclave.worker()
    hand = Hand(enclave.mechanism)
    a = place(enclave, hand, first)
    b = wait(enclave, hand, second)
    staged = hand.decide(b, flags=0)
    assert hand.outcome(hand.preempt()) is Outcome.COMMITTED
    assert hand.outcome(staged) is Outcome.COMMITTED
    hand.told(Message.THREAD_PREEMPTED, a)
    runs(second.pid)


def test_run_now_replaces_what_runs(enclave: Any) -> None:
    first, second, third = (enclave.worker() for _ in range(3))
    hand = Hand(enclave.mechanism)
    a = place(enclave, hand, first)
    wait(enclave, hand, second)
    c = wait(enclave, hand, third)
    assert hand.outcome(hand.decide(c, flags=KICKED | PREEMPT)) is Outcome.COMMITTED
    runs(third.pid)
    hand.told(Message.THREAD_PREEMPTED, a)


def test_the_order_of_decisions_is_the_order_of_turns(enclave: Any) -> None:
    runner, *workers = (enclave.worker() for _ in range(4))
    hand = Hand(enclave.mechanism)
    place(enclave, hand, runner)
    numbers = [wait(enclave, hand, worker) for worker in workers]
    order = [1, 2, 0]
    staged = [hand.decide(numbers[i], flags=0) for i in order]
    runner.rest()
    for i, txn in zip(order, staged, strict=True):
        assert hand.outcome(txn) is Outcome.COMMITTED
        runs(workers[i].pid)
        workers[i].rest()


def test_a_stale_decision_leaves_the_thread_where_it_was(enclave: Any) -> None:
    runner, worker = enclave.worker(), enclave.worker()
    hand = Hand(enclave.mechanism)
    place(enclave, hand, runner)
    tid = wait(enclave, hand, worker)
    stale, good = hand.decide(tid, seq=hand.seq[tid] - 1, flags=0), hand.decide(tid, flags=0)
    runner.rest()
    assert hand.outcome(stale) is Outcome.STALE
    assert hand.outcome(good) is Outcome.COMMITTED


def test_a_preemption_of_what_no_longer_runs_is_stale(enclave: Any) -> None:
    worker = enclave.worker()
    hand = Hand(enclave.mechanism)
    place(enclave, hand, worker)
    txn = hand.decide(-1, flags=KICKED | PREEMPT, kind=Decision.YIELD_CPU, cpu_seq=hand.cpu_seq[0] - 1)
    assert hand.outcome(txn) is Outcome.STALE
    runs(worker.pid)


def go_on(enclave: Any, hand: Hand, worker: Any) -> None:
    """The thread gets its CPU back, on which nothing else wants to run: by a decision, or because the kernel gives it to it."""
    tid = int(enclave.number(worker.pid))
    if enclave.kind == "sched_ext":
        assert hand.outcome(hand.decide(tid)) is Outcome.COMMITTED
    runs(worker.pid)


def keeps(enclave: Any, hand: Hand, runner: Any, woken: Any) -> None:
    """The thread that runs does not make way for one that wakes."""
    tid = wait(enclave, hand, woken)
    hand.look()
    runs(runner.pid)
    assert hand.types(tid)[-1] == "THREAD_RUNNABLE"


def test_a_demoted_thread_makes_way_for_each_that_wakes_without_a_decision(enclave: Any) -> None:
    first, second = enclave.worker(), enclave.worker()
    hand = Hand(enclave.mechanism)
    a = place(enclave, hand, first)
    hand.demote()
    b = int(enclave.number(second.pid))
    for _ in range(3):
        heard = len(hand.listen())
        second.run()
        hand.told(Message.THREAD_PREEMPTED, a, heard)
        hand.told(Message.THREAD_RUNNING, b, heard)
        runs(second.pid)
        second.rest()
        hand.told(Message.THREAD_BLOCKED, b, heard)
        go_on(enclave, hand, first)


def test_a_thread_that_has_slept_is_demoted_no_more(enclave: Any) -> None:
    first, second = enclave.worker(), enclave.worker()
    hand = Hand(enclave.mechanism)
    a = place(enclave, hand, first)
    usual = attributes.read(first.pid)
    hand.demote()
    first.rest()
    hand.told(Message.THREAD_BLOCKED, a)
    until(first.blocked, "it sleeps")
    place(enclave, hand, first)
    until(lambda: (enclave.mechanism.attend(), attributes.read(first.pid) == usual)[1], "it is as it was")
    keeps(enclave, hand, first, second)


def test_a_demotion_of_what_no_longer_runs_there_is_passed_over(enclave: Any) -> None:
    first, second = enclave.worker(), enclave.worker()
    hand = Hand(enclave.mechanism)
    place(enclave, hand, first)
    hand.demote(cpu_seq=hand.cpu_seq[0] - 1)
    keeps(enclave, hand, first, second)


def test_a_demotion_ends_with_its_agent(enclave: Any) -> None:
    first, second = enclave.worker(), enclave.worker()
    hand = Hand(enclave.mechanism)
    place(enclave, hand, first)
    usual = attributes.read(first.pid)
    hand.demote()
    enclave.mechanism.agent_gone()
    assert attributes.read(first.pid) == usual
    hand = Hand(enclave.mechanism, generation=2)
    runs(first.pid)
    keeps(enclave, hand, first, second)


def test_a_blocked_thread_is_not_run(enclave: Any) -> None:
    worker = enclave.worker()
    hand, tid = Hand(enclave.mechanism), enclave.number(worker.pid)
    hand.told(Message.THREAD_NEW, tid)
    assert hand.outcome(hand.decide(tid)) is Outcome.TARGET_NOT_RUNNABLE


@pytest.mark.cpus(2)
def test_a_thread_is_not_put_on_two_cpus(enclave: Any) -> None:
    worker = enclave.worker(adopted=False)
    os.sched_setaffinity(worker.pid, {min(os.sched_getaffinity(worker.pid))})
    enclave.mechanism.adopt(worker.pid)
    hand = Hand(enclave.mechanism)
    tid = place(enclave, hand, worker)
    assert hand.outcome(hand.decide(tid, cpu=1)) is Outcome.TARGET_ON_CPU
    runs(worker.pid)


def test_a_thread_that_ended_is_gone(enclave: Any) -> None:
    worker = enclave.worker()
    hand, tid = Hand(enclave.mechanism), enclave.number(worker.pid)
    worker.run()
    hand.told(Message.THREAD_RUNNABLE, tid)
    worker.kill()
    hand.decide(tid)
    dead = hand.told(Message.THREAD_DEAD, tid)
    assert hand.outcome(hand.decide(tid, seq=int(dead["seq"]))) in (Outcome.TARGET_GONE, Outcome.NOT_IN_ENCLAVE)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"cpu": 1}, Outcome.NOT_IN_ENCLAVE),
        ({"cpu": -1}, Outcome.NOT_IN_ENCLAVE),
        ({"cpu": 1 << 20}, Outcome.NOT_IN_ENCLAVE),
        ({"tid": 4000}, Outcome.NOT_IN_ENCLAVE),
        ({"tid": -5}, Outcome.INVALID),
        ({"tid": 1 << 30}, Outcome.INVALID),
        ({"type": 77}, Outcome.INVALID),
        ({"version": 9}, Outcome.INVALID),
        ({"subsystem": 3}, Outcome.INVALID),
    ],
)
def test_what_makes_no_sense_is_refused_and_changes_nothing(enclave: Any, fields: dict[str, int], expected: Outcome) -> None:
    runner, worker = enclave.worker(), enclave.worker()
    hand = Hand(enclave.mechanism)
    place(enclave, hand, runner)
    tid = wait(enclave, hand, worker)
    assert hand.outcome(hand.decide(**{"tid": tid, "seq": hand.seq[tid]} | fields)) is expected
    runs(runner.pid)
    staged = hand.decide(tid, flags=0)
    runner.rest()
    assert hand.outcome(staged) is Outcome.COMMITTED


def test_more_decisions_than_a_cpu_holds_are_congested(enclave: Any) -> None:
    first, second = (enclave.worker() for _ in range(2))
    hand = Hand(enclave.mechanism)
    place(enclave, hand, first)
    b = wait(enclave, hand, second)
    txns = [hand.decide(b, flags=0) for _ in range(9)]
    assert hand.outcome(txns[-1]) is Outcome.CONGESTED


def test_what_is_staged_before_a_run_now_is_superseded(enclave: Any) -> None:
    first, second, third = (enclave.worker() for _ in range(3))
    hand = Hand(enclave.mechanism)
    place(enclave, hand, first)
    b, c = wait(enclave, hand, second), wait(enclave, hand, third)
    hand.listen()
    overtaken = hand.decide(b, flags=0)
    assert hand.outcome(hand.decide(c, flags=KICKED | PREEMPT)) is Outcome.COMMITTED
    assert hand.outcome(overtaken) is Outcome.SUPERSEDED


@pytest.mark.cpus(2)
def test_a_cpu_that_the_thread_may_not_use_is_unavailable(enclave: Any) -> None:
    runner, worker = (enclave.worker(adopted=False) for _ in range(2))
    for each in (runner, worker):
        os.sched_setaffinity(each.pid, {min(os.sched_getaffinity(each.pid))})
        enclave.mechanism.adopt(each.pid)
    hand = Hand(enclave.mechanism)
    place(enclave, hand, runner)
    tid = wait(enclave, hand, worker)
    assert hand.outcome(hand.decide(tid, cpu=1)) is Outcome.CPU_UNAVAILABLE


def test_what_a_lost_agent_staged_is_counted_and_not_done(enclave: Any) -> None:
    first, second = (enclave.worker() for _ in range(2))
    hand = Hand(enclave.mechanism)
    place(enclave, hand, first)
    hand.decide(wait(enclave, hand, second), flags=0)
    enclave.mechanism.attend()
    enclave.mechanism.agent_gone()
    assert enclave.mechanism.counters()["outcomes"]["agent_lost"] == 1


def test_without_an_agent_every_thread_gets_its_turn(enclave: Any) -> None:
    workers = [enclave.worker() for _ in range(4)]
    hand = Hand(enclave.mechanism)
    for worker in workers:
        worker.run()
        hand.told(Message.THREAD_RUNNABLE, enclave.number(worker.pid))
    enclave.mechanism.agent_gone()
    for worker in workers:
        worker.rest()
    for worker in workers:
        until(worker.blocked, "each worker has had its turn")


def test_a_second_agent_goes_on_where_the_first_died(enclave: Any) -> None:
    workers = [enclave.worker() for _ in range(2)]
    hand = Hand(enclave.mechanism, 1)
    place(enclave, hand, workers[0])
    b = wait(enclave, hand, workers[1])
    enclave.mechanism.agent_gone()
    second = Hand(enclave.mechanism, 2)
    second.told(Message.THREAD_RUNNABLE, b)
    staged = second.decide(b)
    workers[0].rest()
    assert second.outcome(staged) is Outcome.COMMITTED
    runs(workers[1].pid)


def test_messages_that_found_no_room_are_replayed_as_state(enclave: Any) -> None:
    runner, worker = enclave.worker(), enclave.worker()
    hand, tid = Hand(enclave.mechanism), enclave.number(worker.pid)
    place(enclave, hand, runner)
    hand.listen()
    hand.flood(tid)
    worker.run()
    hand.listen()
    before = len(hand.heard)

    def resynchronised() -> bool:
        enclave.mechanism.tick()
        return "RESYNC" in [Message(int(m["type"])).name for m in hand.listen()[before:]]

    until(resynchronised, "a replay")
    hand.told(Message.THREAD_RUNNABLE, tid, after=before)
    staged = hand.decide(tid)
    runner.rest()
    assert hand.outcome(staged) is Outcome.COMMITTED


def test_children_of_a_member_join_and_leave(enclave: Any) -> None:
    worker = enclave.worker()
    hand = Hand(enclave.mechanism)
    hand.decide(enclave.number(worker.pid))
    worker.tell(b"f")

    def child() -> list[int]:
        enclave.mechanism.attend()
        enclave.mechanism.tick()
        hand.beat()
        for number in {int(m["tid"]) for m in hand.listen() if m["type"] == Message.THREAD_RUNNABLE}:
            hand.decide(number)
        children = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()
        return [int(pid) for pid in children if enclave.number(int(pid)) is not None]

    (pid,) = until(child, "a child is a member")
    number = enclave.number(pid)
    os.kill(pid, signal.SIGKILL)

    def dead() -> bool:
        if hand.types(number)[-1] == "THREAD_RUNNABLE":
            hand.outcome(hand.decide(number))
        enclave.mechanism.attend()
        return "THREAD_DEAD" in hand.types(number)

    until(dead, "the child's end is told")


def test_a_thread_that_executes_a_program_for_its_process_goes_on_as_the_first_thread(enclave: Any) -> None:
    worker = enclave.worker()
    before, mechanism = os.sched_getaffinity(worker.pid), enclave.mechanism
    worker.tell(b"x")
    until(lambda: (mechanism.attend(), len(mechanism.pids()) == 2)[-1], "the second thread is a member")
    second = next(number for number, pid in mechanism.pids().items() if pid != worker.pid)
    worker.busy[worker.at] = 2
    until(lambda: (mechanism.attend(), enclave.number(worker.pid) == second)[-1], "the process is known by the second's number")
    worker.rest()
    until(worker.blocked, "the program waits for orders")
    hand = Hand(mechanism)
    assert place(enclave, hand, worker) == second
    worker.rest()
    mechanism.release(worker.pid)
    assert os.sched_getscheduler(worker.pid) == os.SCHED_OTHER and os.sched_getaffinity(worker.pid) == before
    until(lambda: (hand.beat(), mechanism.tick(), not mechanism.counters()["threads"])[-1], "both numbers are free")
    assert not enclave.journal.undo_all() and mechanism.pids() == {}


def test_a_released_thread_is_as_it_was(enclave: Any) -> None:
    worker = enclave.worker(adopted=False)
    before, cpus = attributes.read(worker.pid), attributes.affinity(worker.pid)
    enclave.mechanism.adopt(worker.pid)
    hand, tid = Hand(enclave.mechanism), enclave.number(worker.pid)
    assert attributes.read(worker.pid) != before
    enclave.mechanism.release(worker.pid)
    hand.told(Message.THREAD_DEAD, tid)
    assert (attributes.read(worker.pid), attributes.affinity(worker.pid)) == (before, cpus)
    assert enclave.number(worker.pid) is None


def test_closing_leaves_nothing_changed(enclave: Any) -> None:
    workers = [enclave.worker(adopted=False) for _ in range(3)]
    before = [attributes.read(worker.pid) for worker in workers]
    for worker in workers:
        enclave.mechanism.adopt(worker.pid)
    Hand(enclave.mechanism)
    workers[0].run()
    enclave.mechanism.close()
    assert [attributes.read(worker.pid) for worker in workers] == before
    assert enclave.journal.entries == []


def test_a_thread_that_is_not_there_cannot_be_taken(enclave: Any) -> None:
    with pytest.raises(ProcessLookupError):
        enclave.mechanism.adopt(4_194_000)
    assert enclave.journal.entries == []


def test_an_agent_lives_as_long_as_it_beats_and_is_given_up_once_it_is_silent(enclave: Any) -> None:
    hand = Hand(enclave.mechanism)
    enclave.mechanism._silent_ns = 500_000_000
    for _ in range(3):
        hand.beat()
        enclave.mechanism.tick()
    assert not hand.ended() and enclave.mechanism.counters()["fallbacks"] == 0
    until(lambda: enclave.mechanism.tick() or hand.ended(), "the agent is lost")
    assert enclave.mechanism.counters()["fallbacks"] == 1


def test_a_member_whose_end_nobody_heard_of_is_none_for_long(enclave: Any) -> None:
    worker, other = enclave.worker(), enclave.worker()
    number = enclave.number(worker.pid)
    worker.kill()
    until(lambda: worker._process.poll() is not None, "the worker has ended")
    enclave.mechanism._ring.poll()  # and is not told
    assert number in enclave.mechanism.pids()
    until(lambda: enclave.mechanism.tick() or number not in enclave.mechanism.pids(), "the number is free again")
    assert other.pid in enclave.mechanism.pids().values()
