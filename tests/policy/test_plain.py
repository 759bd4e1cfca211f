"""The runtime of plain policies, on streams made by hand."""

from __future__ import annotations

import os
import secrets
import textwrap
import threading

import numpy as np
import pytest

from waveos import memory
from waveos.agents.plain import serve_plain
from waveos.errors import PolicyError
from waveos.link import open_link
from waveos.memory import DECISION, MESSAGE, OUTCOME, Decision, Message
from waveos.outcome import Outcome
from waveos.policy import Param, Policy, load_policy
from waveos.policy.plain import PlainRuntime
from waveos.primitives import clock_ns

SECOND = 1_000_000_000


class Echo(Policy, subsystem=memory, name="echo", compiled=False):
    """Reclaims what is scanned and not touched, at the end of the batch; counts what it hears."""

    quota: Param = 4_096
    every_ms: Param = 0

    def start(self):
        self.heard, self.cold = [], []

    def accessed(self, msgs, txns):
        self.heard.append(("accessed", len(msgs)))
        self.cold += [(each["region"], each["first"], each["batches"] & ~each["touched"]) for each in msgs]

    def pressure(self, msg, txns):
        self.heard.append(("pressure", msg.stall_us))
        if msg.stall_us == 13:
            raise ValueError("unlucky")

    def batch_end(self, msg, txns):
        for region, first, batches in self.cold:
            if batches:
                memory.reclaim(txns, region, first, batches, self.quota)
        self.cold = []
        if self.every_ms:
            txns.wake_after(self.every_ms * 1_000_000)

    def timer_expired(self, msg, txns):
        self.heard.append(("timer", msg.time_ns))


def records(*rows, dtype=MESSAGE):
    made = np.zeros(len(rows), dtype)
    for record, row in zip(made, rows, strict=True):
        record["type"], record["region"] = row.pop("type"), row.pop("region", -1)
        for name, value in row.items():
            record[name] = value
    return made


def end(now_ns):
    return records({"type": Message.BATCH_END, "time_ns": now_ns})


def accessed(seq, first=0, batches=0b11, touched=0b01, region=0, time_ns=5):
    return {"type": Message.ACCESSED, "region": region, "seq": seq, "first": first, "batches": batches, "touched": touched, "time_ns": time_ns}


def outcome(outcome, decision=Decision.RECLAIM, seq=9):
    row = {"type": Message.TXN_OUTCOME, "region": 0, "seq": seq, "batches": 0b10, "outcome": outcome, "decision": decision}
    return records(row, dtype=OUTCOME).view(MESSAGE)


def test_a_decision_carries_the_newest_number_of_its_region_and_the_times_behind_it():
    runtime = PlainRuntime(Echo)
    runtime.feed(records(accessed(7, time_ns=5), accessed(3, first=64, time_ns=6), accessed(2, region=4)))
    made = runtime.feed(end(100))
    assert made["seq"].tolist() == [7, 7, 2]
    assert made["batches"].tolist() == [0b10] * 3
    assert made["time_ns"].tolist() == [6] * 3
    assert made["decided_ns"].tolist() == [100] * 3
    assert made["txn"].tolist() == [1, 2, 3]
    assert set(made["subsystem"].tolist()) == {memory.SUBSYSTEM}


def test_consecutive_messages_of_a_type_come_as_one_array_to_a_handler_that_takes_many():
    runtime = PlainRuntime(Echo)
    pressure = {"type": Message.PRESSURE, "stall_us": 1}
    runtime.feed(records(accessed(1), accessed(2), dict(pressure), dict(pressure), accessed(3)))
    assert runtime.policy.heard == [("accessed", 2), ("pressure", 1), ("pressure", 1), ("accessed", 1)]


def test_a_decision_about_a_region_that_is_gone_carries_no_number():
    runtime = PlainRuntime(Echo)
    runtime.feed(records(accessed(7), {"type": Message.REGION_UNMAPPED, "region": 0, "seq": 8}))
    assert runtime.feed(end(1))["seq"].tolist() == [-1]


@pytest.mark.parametrize("decision", [Decision.RECLAIM, Decision.SCAN])
def test_without_a_handler_a_failed_reclaim_or_scan_counts_as_touched(decision):
    runtime = PlainRuntime(Echo)
    assert len(runtime.feed(outcome(Outcome.STALE, decision))) == 0
    assert runtime.policy.heard == [("accessed", 1)]
    assert len(runtime.feed(end(1))) == 0


def test_a_committed_decision_is_not_told_to_a_policy_that_does_not_ask():
    runtime = PlainRuntime(Echo)
    runtime.feed(outcome(Outcome.COMMITTED))
    assert runtime.policy.heard == []


def test_outcomes_reach_the_handlers_that_ask_for_them_and_move_the_sequence_number():
    class Asks(Policy, subsystem=memory, name="asks", compiled=False):
        def start(self):
            self.heard = []

        def txn_failed(self, msg, txns):
            self.heard.append((msg.type, msg.outcome))
            memory.keep(txns, msg.region, 0, 1)

        def txn_committed(self, msg, txns):
            self.heard.append((msg.type, msg.kib))

    runtime = PlainRuntime(Asks)
    made = runtime.feed(np.concatenate([outcome(Outcome.COMMITTED, seq=3), outcome(Outcome.STALE, seq=11), outcome(Outcome.COMMITTED, seq=4)]))
    assert runtime.policy.heard == [(15, 0), (14, 1), (15, 0)]
    assert made["seq"].tolist() == [11]


def test_a_timer_counts_from_the_end_of_its_batch_and_expires_once_at_the_first_end_past_it():
    runtime = PlainRuntime(Echo, {"every_ms": 1000})
    runtime.feed(end(5 * SECOND))
    assert runtime.next_timer_ns == 6 * SECOND
    runtime.policy.every_ms = 0
    runtime.feed(end(6 * SECOND - 1))
    assert runtime.policy.heard == []
    runtime.feed(end(7 * SECOND))
    runtime.feed(end(9 * SECOND))
    assert runtime.policy.heard == [("timer", 7 * SECOND)]
    assert runtime.next_timer_ns > 1 << 61


def test_a_resync_begins_anew():
    runtime = PlainRuntime(Echo, {"every_ms": 1})
    runtime.feed(records(accessed(7)))
    runtime.feed(end(1))
    runtime.feed(records({"type": Message.RESYNC}))
    assert runtime.policy.heard == []
    assert runtime.next_timer_ns > 1 << 61
    runtime.feed(records(accessed(2)))
    assert runtime.feed(end(2))["seq"].tolist() == [2]


def test_a_policy_that_raises_is_stopped_with_its_handler_and_the_message():
    with pytest.raises(
        PolicyError, match=r"policy 'echo': pressure raised ValueError: unlucky \(.*test_plain.py:\d+\); the message: .*stall_us=13"
    ) as error:
        PlainRuntime(Echo).feed(records({"type": Message.PRESSURE, "stall_us": 13}))
    assert "\n" not in str(error.value)


def test_what_a_handler_got_stays_as_it_was_when_the_link_reuses_its_buffer():
    class Keeps(Policy, subsystem=memory, name="keeps", compiled=False):
        def accessed(self, msgs, txns):
            self.kept = msgs

    runtime = PlainRuntime(Keeps)
    buffer = records(accessed(1))
    runtime.feed(buffer)
    buffer["seq"] = 99
    assert runtime.policy.kept["seq"].tolist() == [1]


def test_a_replay_decides_the_same_however_the_stream_is_cut():
    rng = np.random.default_rng(5)
    stream = np.concatenate(
        [
            part
            for step in range(30)
            for part in (
                records(*(accessed(int(seq), first=64 * int(rng.integers(9)), touched=int(rng.integers(4))) for seq in rng.integers(0, 99, 5))),
                outcome(Outcome(int(rng.integers(3)))),
                end(step),
            )
        ]
    )
    whole = PlainRuntime(Echo).feed(stream)
    runtime = PlainRuntime(Echo)
    parts = [runtime.feed(part) for part in np.split(stream, np.sort(rng.integers(0, len(stream), 20)))]
    assert len(whole) > 50
    assert np.concatenate(parts).tobytes() == whole.tobytes()


def test_the_loop_serves_a_link_and_ends_with_its_host():
    url = f"shm://test-{os.getpid()}-{secrets.token_hex(4)}"
    host = open_link(url, side="host", subsystem=memory, messages=256, txns=64)
    agent = open_link(url, side="agent", subsystem=memory)
    thread = threading.Thread(target=serve_plain, args=(agent, Echo))
    thread.start()
    try:
        sent = records(*(accessed(7, first=64 * number) for number in range(200)))
        assert host.send_messages(sent) == 200
        taken, deadline = [], clock_ns() + 30 * SECOND
        while len(taken) < 200 and clock_ns() < deadline:
            taken += host.poll_txns(wait_ns=1_000_000)["first"].tolist()
        assert taken == sent["first"].tolist()
    finally:
        host.close()
        thread.join(30)
        agent.close()
    assert not thread.is_alive()


# What is wrong with a policy is said when it is loaded.

HEAD = "from waveos import memory\nfrom waveos.policy import Param, Policy\n"


@pytest.fixture
def load(tmp_path):
    def made(body, options=", compiled=False"):
        path = tmp_path / "mine.py"
        path.write_text(HEAD + f"class Mine(Policy, subsystem=memory, name='mine'{options}):\n" + textwrap.indent(textwrap.dedent(body), "    "))
        return load_policy(f"{path}:Mine")

    return made


def test_a_misspelt_handler_is_told_with_the_nearest(load):
    with pytest.raises(PolicyError, match=r"mine.py:4: 'acessed' is not a message of memory \(did you mean 'accessed'\?\)"):
        load("def acessed(self, msgs, txns):\n    pass\n")


def test_a_policy_of_a_plain_subsystem_says_that_it_is_not_compiled(load):
    with pytest.raises(PolicyError, match=r"mine.py:3: policies of memory run as plain Python; say so: compiled=False"):
        load("def accessed(self, msgs, txns):\n    pass\n", options="")


def test_a_policy_that_handles_nothing_is_refused(load):
    with pytest.raises(PolicyError, match="handles no message"):
        load("def assess(self):\n    pass\n")


def test_an_unknown_parameter_is_told_with_the_nearest():
    with pytest.raises(PolicyError, match=r"has no parameter 'quotas' \(did you mean 'quota'\?\)"):
        PlainRuntime(Echo, {"quotas": 1})


def test_a_plain_policy_may_have_any_state_and_methods_and_be_inherited_from(load):
    class Milder(Echo, subsystem=memory, name="milder", compiled=False):
        quota = 8_192

        def timer_expired(self, msg, txns):
            super().timer_expired(msg, txns)
            self.heard.append("twice")

    assert Milder.params == {"quota": 8_192, "every_ms": 0}
    runtime = PlainRuntime(Milder, {"every_ms": 1})
    runtime.feed(records(accessed(1)))
    assert runtime.feed(end(1))["bytes"].tolist() == [8_192]
    runtime.feed(end(SECOND))
    assert runtime.policy.heard[-2:] == [("timer", SECOND), "twice"]
    policy = load("states = {}\ndef accessed(self, msgs, txns):\n    pass\ndef assess(self, share):\n    return share\n")
    assert list(policy.handlers) == ["accessed"]


def test_an_order_that_does_not_exist_is_an_error_with_the_nearest():
    class Wrong(Policy, subsystem=memory, name="wrong", compiled=False):
        def batch_end(self, msg, txns):
            txns.order("reclaime")

    with pytest.raises(PolicyError, match=r"no decision 'reclaime' \(did you mean 'reclaim'\?\)"):
        PlainRuntime(Wrong).feed(end(1))


def test_orders_for_many_groups_are_one_array_of_decisions():
    class Scans(Policy, subsystem=memory, name="scans", compiled=False):
        def batch_end(self, msg, txns):
            memory.scan(txns, 3, 64 * np.arange(1_000), np.full(1_000, 2**64 - 1, np.uint64))

    made = PlainRuntime(Scans).feed(end(1))
    assert made.dtype == DECISION
    assert len(made) == 1_000
    assert made["region"].tolist() == [3] * 1_000
