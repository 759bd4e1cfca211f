"""The virtual link: times, order, overflow, the agent in the same process, and what is refused. And the suite for links, on both."""

from __future__ import annotations

import os

import numpy as np
import pytest

from waveos import testing
from waveos.errors import LinkError, PolicyError
from waveos.ipu_emulator.link import VirtualLink
from waveos.ipu_emulator.profile import MITIGATIONS, link_costs, load_link
from waveos.link import MESSAGES, TXNS, open_link
from waveos.outcome import Outcome
from waveos.sched import DECISION, MESSAGE, OUTCOME, Decision, Message

URL = "virtual://mount-evans/test"
COSTS = link_costs(load_link("mount-evans"))


@pytest.fixture
def host():
    with open_link(URL, side="host") as link:
        yield link


@pytest.fixture
def agent(host):
    with open_link(URL, side="agent") as link:
        yield link


def messages(n: int, **fields: object) -> np.ndarray:
    records = np.zeros(n, MESSAGE)
    records["type"], records["tid"], records["cpu"], records["seq"] = Message.THREAD_RUNNABLE, np.arange(n), -1, 1
    for name, value in fields.items():
        records[name] = value
    return records


_KINDS = [Message.CPU_NEW, Message.CPU_IDLE, Message.THREAD_NEW, Message.THREAD_RUNNABLE]
IDLE_CPU_AND_A_THREAD = messages(4, type=_KINDS, cpu=[0, 0, -1, -1], tid=[-1, -1, 5, 5])


@pytest.mark.parametrize("url", ["virtual://mount-evans", "virtual://ideal/named", f"shm://test-{os.getpid()}-check"])
def test_the_link_passes_the_suite(url):
    testing.check_link(url)


def swap_two(batch):
    if len(batch) > 20:
        batch[[10, 15]] = batch[[15, 10]]
    return batch


def lose_one(batch):
    return batch[:-1]


def turn_a_bit(batch):
    batch["seq"] ^= 1
    return batch


@pytest.mark.parametrize("spoil", [swap_two, lose_one, turn_a_bit])
def test_a_link_that_swaps_loses_or_changes_records_fails_the_suite(spoil, monkeypatch):
    poll = VirtualLink.poll_messages
    monkeypatch.setattr(VirtualLink, "poll_messages", lambda self, *args, **options: spoil(poll(self, *args, **options)))
    with pytest.raises(AssertionError):
        testing.check_link(URL)


def test_sending_costs_the_host_and_arrives_a_wire_later(host, agent):
    host.send_messages(messages(3))
    assert host.now_ns == 3 * COSTS.host_write_ns + COSTS.host_flush_ns
    assert agent.now_ns == 0
    arrives_ns = host.now_ns + COSTS.wire_ns
    assert len(agent.poll_messages(wait_ns=arrives_ns - 1)) == 0
    assert agent.now_ns == arrives_ns - 1
    assert agent.poll_messages(wait_ns=1)["tid"].tolist() == [0, 1, 2]
    assert agent.now_ns == arrives_ns + 3 * COSTS.agent_read_ns


def test_a_decision_is_there_once_the_agent_has_written_it_and_reading_it_costs_the_host_a_round_trip(host, agent):
    agent.txn_create(2)["tid"] = [7, 8]
    agent.txns_commit()
    assert agent.now_ns == 2 * COSTS.agent_write_ns
    taken = host.poll_txns(wait_ns=10_000)
    assert taken["tid"].tolist() == [7, 8]
    assert host.now_ns == 2 * COSTS.agent_write_ns + 2 * COSTS.host_read_ns


def test_an_empty_poll_costs_a_look_so_that_a_polling_loop_ends(host, agent):
    host.poll_txns()
    assert host.now_ns == COSTS.host_peek_ns
    host.send_messages(messages(1))
    looks = 0
    while not len(agent.poll_messages()):
        looks += 1
    assert looks > 1
    assert agent.now_ns >= host.now_ns + COSTS.wire_ns


def test_what_a_prefetch_has_loaded_meanwhile_is_not_paid_again(host, agent):
    agent.txn_create(2)
    agent.txns_commit()
    host.now_ns = 1_000
    assert host.prefetch_txns()
    host.now_ns += 500
    host.poll_txns(1)
    assert host.now_ns == 1_500 + COSTS.host_read_ns - 500
    host.prefetch_txns()
    host.now_ns += 10 * COSTS.host_read_ns
    before_ns = host.now_ns
    host.poll_txns(1)
    assert host.now_ns == before_ns + COSTS.host_hit_ns
    assert not host.prefetch_txns()


def test_without_a_mitigation_the_same_calls_cost_more():
    spent = {}
    for mitigations in [MITIGATIONS, *(tuple(each for each in MITIGATIONS if each != off) for off in ("wb", "wc_wt", "prefetch"))]:
        with VirtualLink(URL, side="host", mitigations=mitigations) as host, VirtualLink(URL, side="agent") as agent:
            host.send_messages(messages(1))
            agent.poll_messages(wait_ns=10_000)
            agent.txn_create()
            agent.txns_commit()
            host.now_ns = max(host.now_ns, agent.now_ns)
            host.prefetch_txns()
            host.now_ns += 200
            host.poll_txns()
            spent[mitigations] = host.now_ns
    assert all(spent[MITIGATIONS] < each for mitigations, each in spent.items() if mitigations != MITIGATIONS)


def test_equal_calls_give_equal_times_and_equal_bytes():
    def play():
        with VirtualLink(URL, side="host") as host:
            host.start_wave_agent("shinjuku", "--cpus", "2")
            host.send_messages(IDLE_CPU_AND_A_THREAD)
            taken = [host.poll_txns(wait_ns=700).tobytes() for _ in range(20)]
            return taken, host.now_ns, host.peer.now_ns

    assert play() == play()


def test_what_does_not_fit_is_refused_counted_and_never_overwrites():
    with VirtualLink(URL, side="host", messages=4, txns=4) as host, VirtualLink(URL, side="agent") as agent:
        assert host.send_messages(messages(6)) == 4
        assert host.overflowed() == 2
        assert agent.overflowed() == 0, "the agent cannot know yet"
        assert agent.poll_messages(wait_ns=10_000)["tid"].tolist() == [0, 1, 2, 3]
        assert agent.overflowed() == 2
        host.now_ns = agent.now_ns
        assert host.send_messages(messages(2)) == 2, "there is room again"


def test_outcomes_keep_their_place_among_the_messages(host, agent):
    outcomes = np.zeros(1, OUTCOME)
    outcomes["type"], outcomes["txn"] = Message.TXN_OUTCOME, 9
    host.send_messages(messages(1))
    host.set_txns_outcomes(outcomes)
    host.send_messages(messages(1))
    agent.now_ns = host.now_ns + COSTS.wire_ns
    assert agent.poll_messages()["type"].tolist() == [2, 32, 2]
    assert agent.poll_txns_outcomes()["txn"].tolist() == [9]


def test_messages_about_a_cpu_go_to_the_queue_that_was_given_it(host, agent):
    queue = host.create_queue("messages", 16)
    host.assoc_queue_with(queue, 1)
    host.send_messages(messages(3, cpu=[0, 1, 0]))
    assert agent.poll_messages(wait_ns=10_000)["tid"].tolist() == [0, 2]
    assert agent.poll_messages(wait_ns=10_000, queue=queue)["tid"].tolist() == [1]
    host.destroy_queue(queue)
    with pytest.raises(LinkError, match="has no queue"):
        agent.poll_messages(queue=queue)
    host.send_messages(messages(1, cpu=1))
    assert len(agent.poll_messages(wait_ns=10_000)) == 1


def test_a_ring_works_over_many_laps(host, agent):
    for lap in range(40):
        host.send_messages(messages(300, seq=lap))
        got = agent.poll_messages(wait_ns=100_000)
        assert got["seq"].tolist() == [lap] * 300
        host.now_ns = agent.now_ns = max(host.now_ns, agent.now_ns)


# An agent in the same process


def test_a_started_agent_decides_while_the_host_polls(host):
    assert host.start_wave_agent("fifo", "--cpus", "2") == os.getpid() == host.await_agent()
    host.send_messages(IDLE_CPU_AND_A_THREAD)
    sent_ns = host.now_ns
    taken = host.poll_txns(wait_ns=1_000_000)
    assert taken.dtype == DECISION
    assert [(int(d["type"]), int(d["tid"]), int(d["cpu"])) for d in taken] == [(Decision.RUN, 5, 0)]
    made_ns = sent_ns + COSTS.wire_ns + 4 * COSTS.agent_read_ns + COSTS.agent_write_ns
    assert host.now_ns == made_ns + COSTS.host_read_ns
    assert host.peer_alive() and host.peer_joins() == 1
    assert len(host.poll_txns(wait_ns=1_000_000)) == 0


def test_a_started_agent_wakes_for_a_timer(host):
    host.start_wave_agent("round_robin", "--cpus", "1", "--ahead", "0", "--param", "quantum_us=100")
    host.send_messages(IDLE_CPU_AND_A_THREAD)
    first = host.poll_txns(wait_ns=1_000_000)[0].copy()
    committed = np.zeros(1, OUTCOME)
    committed["type"], committed["tid"], committed["cpu"], committed["seq"], committed["time_ns"] = Message.TXN_OUTCOME, 5, 0, 2, host.now_ns
    committed["outcome"], committed["txn"], committed["cpu_seq"] = Outcome.COMMITTED, first["txn"], 1
    host.set_txns_outcomes(committed)
    running_ns = host.now_ns
    host.send_messages(messages(1, tid=6))
    taken = host.poll_txns(wait_ns=10_000_000)
    assert len(taken), "a thread that waits takes the CPU once the quantum is over"
    assert 100_000 <= host.now_ns - running_ns < 10_000_000


def test_a_policy_that_fails_is_named_by_the_poll(host, tmp_path):
    path = tmp_path / "raises.py"
    path.write_text(
        "from waveos import sched\nfrom waveos.policy import Policy\n\n\n"
        "class Raises(Policy, subsystem=sched, name='raises'):\n    def thread_runnable(self, msg, txns):\n        sched.run(txns, tid=msg.tid, cpu=77)\n"
    )
    host.start_wave_agent(str(path), "--cpus", "2")
    host.send_messages(IDLE_CPU_AND_A_THREAD)
    with pytest.raises(PolicyError, match=r"'raises'.*CPU 77, which is outside the enclave"):
        host.poll_txns(wait_ns=1_000_000)


@pytest.mark.parametrize(
    ("arguments", "says"), [(("--cores", "3"), "unrecognized arguments"), (("--param", "x"), "KEY=NUMBER"), (("--cpus", "0"), "cpus 0 of 1")]
)
def test_a_wrong_argument_of_an_agent_is_one_clear_error(host, arguments, says):
    with pytest.raises(LinkError, match=says):
        host.start_wave_agent("fifo", *arguments)
    assert not host.peer_alive()


# What is refused


def test_a_second_host_or_agent_and_an_agent_without_a_host_are_refused(host, agent):
    with pytest.raises(LinkError, match="already open in this process"):
        open_link(URL, side="host")
    with pytest.raises(LinkError, match="already has an agent"):
        open_link(URL, side="agent")
    with pytest.raises(LinkError, match="already has an agent"):
        host.start_wave_agent("fifo")
    with pytest.raises(LinkError, match="no host has opened"):
        open_link("virtual://mount-evans/nobody", side="agent")


def test_an_unknown_profile_is_answered_with_the_nearest_one():
    with pytest.raises(LinkError, match="did you mean 'mount-evans'"):
        open_link("virtual://mount-evens")


def test_each_verb_belongs_to_one_side(host, agent):
    with pytest.raises(LinkError, match="is the agent's"):
        host.poll_messages()
    with pytest.raises(LinkError, match="is the host's"):
        agent.prefetch_txns()
    with pytest.raises(LinkError, match="only takes from it"):
        host._send(TXNS, messages(1))
    with pytest.raises(LinkError, match="only sends to it"):
        host._poll(MESSAGES, 1, 0)


def test_when_the_host_closes_the_agent_is_told_and_may_reattach_to_the_next(host, agent):
    host.close()
    with pytest.raises(LinkError, match="reattach"):
        agent.poll_messages()
    with pytest.raises(LinkError, match="was closed"):
        host.send_messages(messages(1))
    with pytest.raises(LinkError, match="no host has opened"):
        agent.reattach()
    with open_link(URL, side="host") as other:
        agent.reattach()
        other.send_messages(messages(1))
        assert len(agent.poll_messages(wait_ns=10_000)) == 1


def test_a_new_agent_takes_up_what_the_last_one_left(host):
    with open_link(URL, side="agent"):
        host.send_messages(messages(2))
    assert not host.peer_alive()
    with open_link(URL, side="agent") as second:
        assert second.poll_messages()["tid"].tolist() == [0, 1]
        assert host.peer_joins() == 2
    host.start_wave_agent("fifo")
    host.kill_wave_agent()
    assert not host.peer_alive()


@pytest.mark.parametrize(("kind", "capacity", "says"), [("packets", 8, "'messages' or 'txns'"), ("messages", 5, "power of two")])
def test_a_queue_that_cannot_be_is_refused(host, kind, capacity, says):
    with pytest.raises(LinkError, match=says):
        host.create_queue(kind, capacity)
