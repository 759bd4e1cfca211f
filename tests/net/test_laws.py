"""The runtime's laws for network policies, on streams made by hand and at random: no request is lost, decided twice, or left while a worker has nothing."""

from __future__ import annotations

import random
import textwrap
from pathlib import Path

import numpy as np
import pytest
from fake import FakeHost

from waveos.net import Decision
from waveos.net.laws import failure
from waveos.outcome import Outcome

CONSERVING = ["net_round_robin", "power_of_two", "rss", "jbsq"]
POLICIES = [*CONSERVING, "darc", "slo_steering", "admission"]


def drive(policy: str, seed: int, steps: int = 400) -> FakeHost:
    host, rng, free = FakeHost(policy, workers=4), random.Random(seed), list(range(200))
    for _ in range(steps):
        host.now_ns += rng.randrange(1, 5_000)
        for _ in range(rng.randrange(4)):
            if free:
                host.arrive(free.pop(), flow=rng.randrange(1 << 32), request_class=rng.randrange(3), deadline_ns=host.now_ns + 1_000_000)
        for request in rng.sample(sorted(host.at), min(len(host.at), rng.randrange(4))):
            host.finish(request, rng.choice([1_000, 100_000]))
            free.append(request)
        host.settle(lambda _: rng.choice([Outcome.COMMITTED] * 9 + [Outcome.CONGESTED]))
        free += host.shed
        host.shed.clear()
        assert not host.runtime["failed"][0], failure(host.runtime, host.bound)
        assert int(host.runtime["waiting"][0]) == len(host.waiting)
        assert [int(n) for n in host.runtime["orders"]["depth"][0, :4]] == [host.depth(worker) for worker in range(4)]
    return host


@pytest.mark.parametrize("policy", POLICIES)
def test_no_request_is_lost_or_decided_twice_and_all_are_served_in_the_end(policy: str) -> None:
    host = drive(policy, seed=1)
    assert host.runtime["redelivered"][0] > 0, "failed transactions were part of it"
    while host.at or host.waiting:
        before = len(host.at) + len(host.waiting)
        for request in list(host.at):
            host.finish(request)
        host.now_ns += 10_000_000
        host.settle()
        assert len(host.at) + len(host.waiting) < before, f"{policy} leaves {len(host.waiting)} requests for ever"


@pytest.mark.parametrize("policy", POLICIES)
def test_equal_streams_give_equal_decisions(policy: str) -> None:
    first, second = (np.array(drive(policy, seed=2, steps=100).made) for _ in range(2))
    assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize("policy", POLICIES)
def test_compiled_and_plain_policies_decide_alike(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = np.array(drive(policy, seed=3, steps=60).made)
    monkeypatch.setenv("WAVE_JIT", "0")
    plain = np.array(drive(policy, seed=3, steps=60).made)
    assert compiled.tobytes() == plain.tobytes()


def test_jbsq_leaves_no_worker_idle_while_a_request_waits_and_none_beyond_its_bound() -> None:
    host = FakeHost("jbsq", workers=3, bound=2)
    for request in range(10):
        host.arrive(request)
    host.settle()
    assert [host.depth(worker) for worker in range(3)] == [2, 2, 2]
    assert sorted(host.waiting) == [6, 7, 8, 9], "first come, first served"
    host.finish(next(iter(host.at)))
    host.settle()
    assert sorted(host.waiting) == [7, 8, 9]


TABLE = """
from waveos import net
from waveos.policy import Policy, array

class Table(Policy, subsystem=net, name="table-test"):
    failed = array(1)

    def request_arrived(self, msg, txns):
        net.set_entry(txns, index=msg.size, worker=-1 if msg.size == 1 else 1)
        net.set_rate(txns, request_class=3, per_s=7)
        net.steer(txns, request=msg.request, worker=0)

    def txn_failed(self, msg, txns):
        self.failed[0] += 1
"""


def test_entries_and_rates_are_decided_and_one_that_cannot_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "table.py").write_text(TABLE)
    host = FakeHost(str(tmp_path / "table.py"), workers=2)
    host.arrive(0, size=1)
    host.arrive(1, size=2)
    made = [d for d in host.settle() if d["type"] != Decision.STEER]
    assert [(int(d["type"]), int(d["index"]), int(d["worker"]), int(d["value"])) for d in made] == [
        (Decision.SET_ENTRY, 1, -1, 0),
        (Decision.SET_RATE, 3, -1, 7),
        (Decision.SET_ENTRY, 2, 1, 0),
        (Decision.SET_RATE, 3, -1, 7),
    ]
    host.say("txn_outcome", worker=1, outcome=Outcome.INVALID)
    host.settle()
    assert host.bound.state["failed"][0, 0] == 1, "heard of the one that failed"


def test_rss_sends_a_flow_to_one_worker_whatever_waits_there() -> None:
    host = FakeHost("rss", workers=4)
    for request in range(20):
        host.arrive(request, flow=7)
    host.settle()
    assert set(host.at.values()) == {3}


def test_slo_steering_keeps_a_worker_for_what_cannot_wait_and_takes_the_most_urgent_first() -> None:
    host = FakeHost("slo_steering", workers=2, spare=1, patient_us=1_000)
    for request in (0, 1):
        host.arrive(request, request_class=1, deadline_ns=50_000_000)
    host.settle()
    assert len(host.at) == 1, "the second patient request does not take the last worker"
    for request, deadline_ns in ((2, 300_000), (3, 100_000)):
        host.arrive(request, request_class=0 if request == 2 else 2, deadline_ns=deadline_ns)
    host.settle()
    assert 3 in host.at and 2 not in host.at


def test_darc_reserves_a_worker_for_the_short_class_once_it_knows_them() -> None:
    host = FakeHost("darc", workers=4, window=20)
    for round_ in range(20):
        for k, work_ns in ((0, 1_000), (1, 1_000_000)):
            host.arrive(round_ * 2 + k, request_class=k)
            host.settle()
            host.finish(round_ * 2 + k, work_ns)
    for request in range(100, 110):
        host.arrive(request, request_class=1)
    host.settle()
    assert len(host.at) == 3, "long requests do not take the reserved worker"
    host.arrive(200, request_class=0)
    host.settle()
    assert 200 in host.at


def test_admission_sheds_what_would_be_late_and_nothing_at_low_load() -> None:
    host = FakeHost("admission", workers=1)
    host.arrive(0, deadline_ns=1_000_000)
    host.settle()
    host.finish(0, work_ns=100_000)
    host.settle()
    for request in range(1, 30):
        host.arrive(request, deadline_ns=1_000_000)
    decisions = host.settle()
    shed = sum(1 for d in decisions if d["type"] == Decision.SHED)
    assert shed == 29 - 10, "ten times 100 us fit into 1 ms"


def test_a_request_that_a_policy_does_not_hold_stops_it_with_one_line(tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text(
        textwrap.dedent("""
        from waveos import net
        from waveos.policy import Policy

        class Bad(Policy, subsystem=net, name="bad"):
            def request_arrived(self, msg, txns):
                net.steer(txns, msg.request, 0)
                net.steer(txns, msg.request, 0)
        """)
    )
    host = FakeHost(str(file))
    host.arrive(5)
    host.settle()
    assert "request 5, which is already steered" in str(failure(host.runtime, host.bound))


DEPTH = """
from waveos import net
from waveos.policy import Policy

class Depth(Policy, subsystem=net, name="depth-test"):
    def request_arrived(self, msg, txns):
        net.steer(txns, msg.request, net.depth(txns, msg.size))
"""


@pytest.mark.parametrize("jit", ["0", "1"])
def test_the_depth_of_a_worker_that_is_none_is_told_and_not_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jit: str) -> None:
    monkeypatch.setenv("WAVE_JIT", jit)
    (tmp_path / "depth.py").write_text(DEPTH)
    for worker in (2, 63):
        host = FakeHost(str(tmp_path / "depth.py"), workers=2)
        host.arrive(0, size=1)
        host.settle()
        assert host.at == {0: 0}
        host.arrive(1, size=worker)
        host.settle()
        assert "IndexError: depth of a worker that is none; workers are 0..self.cpus - 1 (" in str(failure(host.runtime, host.bound))


def test_a_worker_that_is_gone_gets_nothing(tmp_path: Path) -> None:
    host = FakeHost("jbsq", workers=2)
    host.say("worker_gone", worker=0)
    for request in range(6):
        host.arrive(request)
    host.settle()
    assert set(host.at.values()) == {1}


def test_resync_forgets_everything() -> None:
    host = FakeHost("jbsq", workers=1)
    for request in range(5):
        host.arrive(request)
    host.settle()
    host.say("resync")
    host.say("worker_new", worker=0)
    host.waiting.clear()
    host.at.clear()
    host.arrive(9)
    host.settle()
    assert host.at == {9: 0}
