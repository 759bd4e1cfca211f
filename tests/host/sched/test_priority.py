"""What mechanism `priority` does beyond what every mechanism promises: threads that the kernel runs before a decision says so."""

from __future__ import annotations

import select
from typing import Any

import pytest

from tests.host.sched.conftest import PATIENCE_S, Hand
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
