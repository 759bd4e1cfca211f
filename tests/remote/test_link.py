"""The network link: what it promises as a link, and what becomes of a session when something is lost."""

from __future__ import annotations

import numpy as np
import pytest
from two_machines import until

from waveos import memory, record
from waveos.errors import LinkError
from waveos.link import MESSAGES, TXNS, open_link
from waveos.link.frames import Kind, pack, unpack
from waveos.link.session import Session
from waveos.link.zmq import parse_url
from waveos.sched import MESSAGE, OUTCOME, Decision, Message
from waveos.sched.records import SUBSYSTEM
from waveos.testing import check_link

NS = 1_000_000_000


def messages(numbers: range) -> np.ndarray:
    records = np.zeros(len(numbers), MESSAGE)
    records["type"], records["tid"], records["seq"] = Message.THREAD_RUNNABLE, numbers, numbers
    return records


def taken(link, count: int, verb: str = "poll_messages") -> list[int]:
    """The `tid`s of so many records that come."""
    got: list[int] = []
    until(lambda: got.extend(getattr(link, verb)(wait_ns=20_000_000)["tid"].tolist()) or len(got) >= count, f"{len(got)} of {count} came")
    return got


def decide(agent, tids: range) -> int:
    txns = agent.txn_create(len(tids))
    txns["type"], txns["tid"] = Decision.RUN, tids
    return agent.txns_commit()


def test_the_same_messages_give_the_same_decisions_through_the_link(machines, monkeypatch):
    monkeypatch.setenv("WAVE_KEYS", str(machines.host.folder))
    machines.host.add("itself", machines.host.own().public)
    check_link(f"zmq+tcp://itself@127.0.0.1:{machines.port}")


def test_records_cross_bit_for_bit_with_the_mark_at_zero(machines):
    host, agent = machines.both()
    sent = np.frombuffer(np.random.default_rng(1).bytes(64 * 1_000), MESSAGE).copy()
    host.send_messages(sent)
    agent.txn_create(1_000).view(np.uint8)[:] = sent.view(np.uint8)
    agent.txns_commit()
    sent["mark"] = 0
    pieces = []
    until(lambda: pieces.append(agent.poll_messages(wait_ns=NS).copy()) or sum(map(len, pieces)) == 1_000)
    assert np.concatenate(pieces).tobytes() == sent.tobytes()
    pieces.clear()
    until(lambda: pieces.append(host.poll_txns(wait_ns=NS).copy()) or sum(map(len, pieces)) == 1_000)
    assert np.concatenate(pieces).tobytes() == sent.tobytes()


def test_outcomes_keep_their_place_among_the_messages(machines):
    host, agent = machines.both()
    outcomes = np.zeros(2, OUTCOME)
    outcomes["type"], outcomes["txn"], outcomes["tid"] = Message.TXN_OUTCOME, [7, 8], -7
    host.send_messages(messages(range(3)))
    host.set_txns_outcomes(outcomes)
    host.send_messages(messages(range(3, 4)))
    assert taken(agent, 6) == [0, 1, 2, -7, -7, 3]


def test_a_poll_takes_no_more_than_its_limit_and_the_rest_comes_next(machines):
    host, agent = machines.both()
    decide(agent, range(10))
    until(host.prefetch_txns)
    assert host.poll_txns(limit=3)["tid"].tolist() == [0, 1, 2]
    assert host.poll_txns()["tid"].tolist() == list(range(3, 10))
    assert len(host.poll_txns()) == 0
    assert not host.prefetch_txns()


def test_what_does_not_fit_is_refused_and_counted_and_there_is_room_again_once_it_is_taken(machines):
    host, agent = machines.both(messages=64)
    assert host.room() == 64
    assert host.send_messages(messages(range(70))) == 64
    assert host.send_messages(messages(range(70, 71))) == 0
    assert host.overflowed(MESSAGES) == 7
    assert taken(agent, 64) == list(range(64))
    until(lambda: len(agent.poll_messages()) == 0 and host.room() == 64)
    assert host.send_messages(messages(range(71, 73))) == 2
    assert taken(agent, 2) == [71, 72]
    until(lambda: agent.overflowed() == 7, "the agent does not hear of it")


def test_transactions_wait_for_room_at_the_agent_and_none_is_lost(machines):
    host, agent = machines.both(txns=4)
    assert decide(agent, range(1_000)) == 1_000
    got = []
    until(lambda: got.extend(host.poll_txns()["tid"].tolist()) or agent.poll_messages() is None or len(got) == 1_000)
    assert got == list(range(1_000))
    assert host.broken == 0


def test_a_transaction_made_when_there_is_room_again_does_not_overtake_those_that_waited(machines):
    host, agent = machines.both(txns=4)
    for tid in range(6):
        decide(agent, range(tid, tid + 1))
    got = []
    until(lambda: got.extend(host.poll_txns()["tid"].tolist()) or (agent._down.waiting and len(got) >= 4), "the window was full")
    until(lambda: agent._exchange.doors[0].hear() is None or agent.session.room > 0, "the host says what it has taken")
    decide(agent, range(6, 7))
    until(lambda: got.extend(host.poll_txns()["tid"].tolist()) or agent.poll_messages() is None or len(got) >= 7, f"{len(got)} of 7 came")
    assert got == list(range(7))


def test_each_transaction_tells_the_host_what_the_agent_has_taken(machines):
    host, agent = machines.both(messages=4)
    host.send_messages(messages(range(4)))
    until(lambda: len(agent.poll_messages(1)), "the first of four came")
    decide(agent, range(1))  # three are there to be taken, and the agent does not look at its socket for those
    until(lambda: len(host.poll_txns()), "the transaction came")
    assert host.room(MESSAGES, 1) == 1


def test_messages_wait_for_others_no_longer_than_the_deadline_though_no_verb_is_called(machines):
    host, agent = machines.both(batch_us=2_000)
    for tid in range(10):
        host.send_messages(messages(range(tid, tid + 1)))
    assert taken(agent, 10) == list(range(10))
    frames = host._session.frames_out
    assert frames < 10, "none waited for another"


def test_what_is_said_before_the_agent_is_there_reaches_it(machines):
    host = machines.link("host")
    assert host.send_messages(messages(range(300))) == 300
    assert not host.peer_alive() and host.peer_joins() == 0
    agent = machines.link("agent")
    assert taken(agent, 300) == list(range(300))
    assert host.peer_alive() and host.peer_joins() == 1


def test_an_agent_that_comes_again_is_a_new_session_and_what_the_old_one_decided_is_dropped(machines):
    host, agent = machines.both()
    decide(agent, range(5))
    until(lambda: host.prefetch_txns())
    agent.close()
    until(lambda: not host.peer_alive())
    assert host.stale == 5
    assert len(host.poll_txns()) == 0
    again = machines.link("agent")
    until(lambda: again.peer_alive() and host.peer_alive())
    assert host.peer_joins() == 2
    host.send_messages(messages(range(3)))
    assert taken(again, 3) == [0, 1, 2]


def test_an_agent_knows_that_its_host_has_left_and_may_wait_for_another(machines):
    host, agent = machines.both()
    host.close()
    with pytest.raises(LinkError, match="its host has left"):
        taken(agent, 1)
    agent.reattach()
    again = machines.link("host")
    again.send_messages(messages(range(2)))
    assert taken(agent, 2) == [0, 1]


def test_an_agent_for_one_host_refuses_a_second_and_says_why(machines):
    machines.both()
    second = machines.link("host")
    with pytest.raises(LinkError, match="serves another host"):
        until(lambda: machines.open[1].poll_messages() is None or "serves another" in second.trouble)
        second.await_agent(0.0)


def test_each_subsystem_keeps_to_itself(machines):
    machines.link("agent")
    host = machines.link("host", subsystem=memory)
    until(lambda: machines.open[0].poll_messages() is None or "choose another port" in host.trouble, host.trouble)
    assert not host.peer_alive()


def test_verbs_of_the_other_side_are_refused(machines):
    host, agent = machines.both()
    for call in (
        lambda: host.poll_messages(),
        lambda: host.txn_create(),
        lambda: host.reattach(),
        lambda: host.create_queue("messages", 8),
        lambda: host.destroy_queue(0),
        lambda: host.assoc_queue_with(TXNS, 0),
        lambda: host.poll_txns(queue=7),
        lambda: agent.poll_txns(),
        lambda: agent.send_messages(messages(range(1))),
        lambda: agent.queue(9),
    ):
        with pytest.raises(LinkError):
            call()
    host.assoc_queue_with(MESSAGES, 3)
    host.close()
    host.close()
    with pytest.raises(LinkError, match="closed"):
        host.poll_txns()


@pytest.mark.parametrize(
    "url",
    [
        "zmq+tcp://dpu",
        "zmq+tcp://dpu:0",
        "zmq+tcp://dpu:99999",
        "zmq+tcp://:5555",
        "zmq+tcp://a@b@c:1",
        "zmq+tcp://dpu:5555/x",
        "zmq+tcp://a b:5555",
        "zmq+tcp://-dpu:5555",
    ],
)
def test_an_address_that_is_none_is_told_how_to_write_it(url):
    with pytest.raises(LinkError, match="write zmq\\+tcp://HOST:PORT"):
        parse_url(url)


def test_a_host_that_connects_to_all_addresses_is_told_to_name_one(machines):
    with pytest.raises(LinkError, match="name a host"):
        open_link(f"zmq+tcp://*:{machines.port}", side="host", keys=machines.host)


def test_an_address_in_use_is_said_to_be(machines):
    machines.link("agent")
    with pytest.raises(LinkError, match="another agent listens there"):
        machines.link("agent")


def test_an_agent_that_is_nowhere_is_said_to_be(machines):
    with pytest.raises(LinkError, match="nobody answers at tcp://127"):
        machines.link("host").await_agent(1.5)


def test_a_host_without_a_key_or_a_peer_is_told_what_to_do(machines, tmp_path):
    with pytest.raises(LinkError, match="make one with `wave keys new`"):
        open_link(machines.url, side="agent", keys=tmp_path / "none")
    with pytest.raises(LinkError, match=r"'dup' is not known \(did you mean 'dpu'\?\)"):
        open_link(f"zmq+tcp://dup@127.0.0.1:{machines.port}", side="host", keys=machines.host)


# ── sessions, without sockets ────────────────────────────────────────────────────────────────────────────────────────


def hear(session: Session, frame: bytes):
    return session.hear(unpack(frame))


def test_a_session_takes_each_frame_once_and_in_order_or_is_broken():
    a, b = Session(7, SUBSYSTEM, 100, 100), Session(7, SUBSYSTEM, 100, 100)
    frames = [a.data(bytes(64)) for _ in range(4)]
    assert len(hear(b, frames[0])) == 64
    assert hear(b, frames[0]) is None, "a late copy is nothing"
    with pytest.raises(Exception, match="1 frames are lost"):
        hear(b, frames[2])


def test_a_sign_of_life_shows_that_the_newest_frame_was_lost():
    a, b = Session(7, SUBSYSTEM, 100, 100), Session(7, SUBSYSTEM, 100, 100)
    a.data(bytes(64))
    with pytest.raises(Exception, match="1 frames are lost"):
        hear(b, a.say(Kind.BEAT))


def test_a_peer_that_takes_what_was_not_sent_or_sends_what_has_no_room_is_not_believed():
    session = Session(7, SUBSYSTEM, 4, 4)
    with pytest.raises(Exception, match="taken more than was sent"):
        hear(session, pack(Kind.BEAT, record.VERSION, SUBSYSTEM, 7, 0, 1))
    with pytest.raises(Exception, match="more than there is room for"):
        hear(session, pack(Kind.DATA, record.VERSION, SUBSYSTEM, 7, 1, body=bytes(64 * 5)))


def test_a_window_never_has_more_out_than_it_holds():
    a, b = Session(7, SUBSYSTEM, 8, 8), Session(7, SUBSYSTEM, 8, 8)
    rng = np.random.default_rng(3)
    for _ in range(2_000):
        if (n := int(rng.integers(0, a.room + 1))) > 0:
            body = hear(b, a.data(bytes(64 * n)))
            assert len(body) == 64 * n
        assert a.sent - a.peer_took <= 8
        b.taken += int(rng.integers(0, b.got - b.taken + 1))
        if b.owes_credit or a.room == 0:
            hear(a, b.say(Kind.BEAT))
            assert a.peer_took == b.taken
    assert b.got > 500
