"""The shared-memory link, between real processes."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from waveos import record
from waveos.errors import LinkError
from waveos.link import MESSAGES, TXNS, open_link, segment, shm
from waveos.sched import DECISION, MESSAGE, OUTCOME, Decision, Message
from waveos.sched.records import SUBSYSTEM

DEADLINE_S = 60.0


@pytest.fixture
def url() -> Iterator[str]:
    name = f"test-{os.getpid()}-{secrets.token_hex(4)}"
    yield f"shm://{name}"
    assert not path_of(f"shm://{name}").exists(), "the segment was left behind"


def path_of(url: str) -> Path:
    return Path("/dev/shm/wave-" + url.removeprefix("shm://"))


def messages(numbers: range) -> np.ndarray:
    records = np.zeros(len(numbers), MESSAGE)
    records["type"], records["tid"], records["seq"] = Message.THREAD_RUNNABLE, numbers, numbers
    return records


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    """Another process that runs this code after opening `link` on argv[1], side argv[2]; it says "ready" once that is done."""
    start = "import sys, os, time, signal\nimport numpy as np\nfrom waveos.link import open_link\nfrom waveos import sched\n"
    return subprocess.Popen(
        [sys.executable, "-P", "-c", start + code, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


OPEN = "link = open_link(sys.argv[1], side=sys.argv[2])\nprint('ready', flush=True)\n"
IDLE = OPEN + "sys.stdin.read()\n"
ECHO = (
    OPEN
    + """
while True:
    for message in link.poll_messages(wait_ns=50_000_000).copy():
        if message["type"] == sched.Message.THREAD_DEAD:
            sys.exit(0)
        txn = link.txn_create()
        txn["type"], txn["tid"], txn["seq"] = sched.Decision.RUN, message["tid"], message["seq"]
        while not link.txns_commit():
            raise SystemExit("the queue of transactions was full")
"""
)


def ready(process: subprocess.Popen[str]) -> subprocess.Popen[str]:
    line = process.stdout.readline()
    assert line == "ready\n", process.communicate()[1]
    return process


def end(process: subprocess.Popen[str], number: int = signal.SIGKILL) -> int:
    process.send_signal(number)
    process.communicate(timeout=DEADLINE_S)
    return process.returncode


def until(condition) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "it never came true"


def test_each_message_comes_to_an_agent_in_another_process_and_each_decision_back_in_order(url):
    with open_link(url, side="host") as host:
        agent = ready(python(ECHO, url, "agent"))
        taken = []
        for first in range(0, 5_000, 100):
            assert host.send_messages(messages(range(first, first + 100))) == 100
            until(lambda upto=first + 100: taken.extend(host.poll_txns(wait_ns=1_000_000)["tid"].tolist()) or len(taken) >= upto)
        assert taken == list(range(5_000))
        stop = messages(range(1))
        stop["type"] = Message.THREAD_DEAD
        host.send_messages(stop)
        assert agent.wait(DEADLINE_S) == 0
        agent.communicate()
        assert host.overflowed(MESSAGES) == host.overflowed(TXNS) == 0


def test_records_cross_bit_for_bit_with_the_mark_at_zero(url):
    with open_link(url, side="host") as host, open_link(url, side="agent") as agent:
        sent = np.frombuffer(np.random.default_rng(1).bytes(64 * 50), MESSAGE).copy()
        for first in range(0, 50, 7):
            host.send_messages(sent[first : first + 7])
        sent["mark"] = 0
        assert agent.poll_messages().tobytes() == sent.tobytes()


def test_outcomes_keep_their_place_among_the_messages(url):
    with open_link(url, side="host") as host, open_link(url, side="agent") as agent:
        outcomes = np.zeros(2, OUTCOME)
        outcomes["type"], outcomes["txn"] = Message.TXN_OUTCOME, [7, 8]
        host.send_messages(messages(range(3)))
        host.set_txns_outcomes(outcomes)
        host.send_messages(messages(range(3, 4)))
        assert agent.poll_messages()["type"].tolist() == [2, 2, 2, 32, 32, 2]
        assert agent.poll_txns_outcomes()["txn"].tolist() == [7, 8]
        assert agent.poll_txns_outcomes().dtype == OUTCOME


def test_created_transactions_are_numbered_and_sent_by_commit(url):
    with open_link(url, side="host") as host, open_link(url, side="agent") as agent:
        assert len(host.poll_txns()) == 0
        assert not host.prefetch_txns()
        txns = agent.txn_create(2)
        txns["type"], txns["cpu"] = Decision.RUN, [4, 5]
        agent.txn_create()["cpu"] = 6
        assert len(host.poll_txns()) == 0, "nothing is sent before the commit"
        assert agent.txns_commit() == 3
        assert host.prefetch_txns()
        taken = host.poll_txns()
        assert taken.dtype == DECISION
        assert (taken["cpu"].tolist(), taken["txn"].tolist()) == ([4, 5, 6], [1, 2, 3])
        assert set(taken["version"]) == {record.VERSION}
        assert set(taken["subsystem"]) == {SUBSYSTEM}
        assert agent.txns_commit() == 0


def test_what_does_not_fit_is_refused_counted_on_both_sides_and_never_overwrites(url):
    with open_link(url, side="host", messages=4, txns=4) as host, open_link(url, side="agent") as agent:
        assert host.send_messages(messages(range(6))) == 4
        assert host.send_messages(messages(range(6, 7))) == 0
        assert host.overflowed() == agent.overflowed() == 3
        assert agent.poll_messages()["tid"].tolist() == [0, 1, 2, 3]
        assert host.send_messages(messages(range(7, 9))) == 2, "there is room again"
        assert agent.poll_messages()["tid"].tolist() == [7, 8]
        agent.txn_create(5)
        assert agent.txns_commit() == 4
        assert host.overflowed(TXNS) == agent.overflowed(TXNS) == 1


def test_a_second_run_with_the_ring_name_of_a_live_one_is_refused_and_the_first_goes_on(url):
    with open_link(url, side="host") as host:
        other = python(IDLE, url, "host")
        _, error = other.communicate(timeout=DEADLINE_S)
        assert other.returncode != 0
        assert f"two runs with the same ring name: '{url[6:]}' is in use by pid {os.getpid()}" in error
        with pytest.raises(LinkError, match="two runs with the same ring name"):
            open_link(url, side="host")
        with open_link(url, side="agent") as agent:
            host.send_messages(messages(range(1)))
            assert len(agent.poll_messages()) == 1


def test_a_killed_host_is_noticed_and_its_segment_is_replaced_by_the_next(url):
    first = ready(python(IDLE, url, "host"))
    agent = open_link(url, side="agent")
    assert agent.peer_alive()
    generation = agent._segment.generation
    assert end(first) == -signal.SIGKILL
    assert path_of(url).exists()
    assert not agent.peer_alive()
    with pytest.raises(LinkError, match="reattach"):
        agent.check()
    with pytest.raises(LinkError, match=f"pid {first.pid}\\) is dead: restart it"):
        open_link(url, side="agent")
    with open_link(url, side="host") as host:
        for lost in (agent.poll_messages, lambda: agent.txn_create() is None or agent.txns_commit()):
            with pytest.raises(LinkError, match="reattach"):
                lost()
        agent.reattach()
        assert agent._segment.generation == generation + 1
        host.send_messages(messages(range(5)))
        assert agent.poll_messages()["tid"].tolist() == [0, 1, 2, 3, 4]
    agent.close()


def test_a_waiting_agent_notices_that_its_host_was_killed(url):
    host = ready(python(IDLE, url, "host"))
    agent = ready(python(OPEN + "link.poll_messages(wait_ns=10**12)", url, "agent"))
    end(host)
    _, error = agent.communicate(timeout=DEADLINE_S)
    assert "LinkError" in error
    assert "reattach" in error
    open_link(url, side="host").close()


def test_the_segment_goes_with_the_host_at_exit_and_at_sigterm(url):
    process = ready(python(OPEN, url, "host"))
    process.communicate(timeout=DEADLINE_S)
    assert not path_of(url).exists()
    process = ready(python(IDLE, url, "host"))
    assert path_of(url).exists()
    assert end(process, signal.SIGTERM) == -signal.SIGTERM, "it still ends by the signal"
    assert not path_of(url).exists()


def test_a_forked_child_does_not_remove_its_parents_segment(url):
    with open_link(url, side="host"):
        if (child := os.fork()) == 0:
            segment._clean()
            os._exit(0)
        os.waitpid(child, 0)
        assert path_of(url).exists()


def test_of_hosts_that_start_at_once_over_a_stale_segment_one_wins(url):
    end(ready(python(IDLE, url, "host")))
    rivals = [python("sys.stdin.readline()\n" + IDLE, url, "host") for _ in range(4)]
    for rival in rivals:
        rival.stdin.write("go\n")
        rival.stdin.flush()
    said = [rival.stdout.readline() for rival in rivals]
    assert sorted(said) == ["", "", "", "ready\n"]
    for rival, line in zip(rivals, said, strict=True):
        _, error = rival.communicate(timeout=DEADLINE_S)
        assert line or "two runs with the same ring name" in error


def test_a_second_agent_is_refused_while_the_first_lives_and_counted_after(url):
    with open_link(url, side="host") as host:
        assert not host.peer_alive()
        first = ready(python(IDLE, url, "agent"))
        assert (host.peer_alive(), host.peer_joins(), host.await_agent()) == (True, 1, first.pid)
        with pytest.raises(LinkError, match=f"already has an agent \\(pid {first.pid}\\)"):
            open_link(url, side="agent")
        end(first)
        assert not host.peer_alive()
        with open_link(url, side="agent") as agent:
            assert host.peer_joins() == 2
            host.send_messages(messages(range(2)))
            assert len(agent.poll_messages()) == 2


def test_a_new_agent_goes_on_where_the_dead_ones_transactions_end(url):
    with open_link(url, side="host") as host:
        dying = ready(
            python(
                "link = open_link(sys.argv[1], side='agent')\nlink.txn_create(3)['cpu'] = 1\nlink.txns_commit()\nprint('ready', flush=True)\nsys.stdin.read()",
                url,
            )
        )
        end(dying)
        with open_link(url, side="agent") as agent:
            agent.txn_create(2)["cpu"] = 2
            agent.txns_commit()
            assert host.poll_txns()["cpu"].tolist() == [1, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("at", "value", "says"),
    [
        (segment.VERSION_AT, 9, "speaks version 9 of the contract, this agent version 1: install the same waveos on both"),
        (segment.SUBSYSTEM_AT, 9, "carries subsystem 9, this agent is for 1"),
        (segment.MAGIC_AT, 12345, "is no segment of Wave"),
    ],
)
def test_a_host_of_another_version_or_subsystem_is_refused(url, at, value, says):
    with open_link(url, side="host") as host:
        right, host._segment.header[at] = int(host._segment.header[at]), value
        with pytest.raises(LinkError, match=says):
            open_link(url, side="agent")
        host._segment.header[at] = right


def test_a_queue_of_another_version_is_refused(url):
    with open_link(url, side="host") as host:
        host.messages_memory[0] ^= 3 << 40
        with pytest.raises(LinkError, match="of version 2 of the contract, this side of version 1"):
            open_link(url, side="agent")


@pytest.mark.parametrize("size", [0, 100, 4_096, 8_192])
def test_a_truncated_segment_is_refused_by_the_agent_and_replaced_by_the_next_host(url, size):
    end(ready(python(IDLE, url, "host")))
    os.truncate(path_of(url), size)
    with pytest.raises(LinkError, match=r"is cut off|is dead"):
        open_link(url, side="agent")
    open_link(url, side="host").close()


def test_a_live_but_truncated_segment_is_refused_by_the_agent(url):
    with open_link(url, side="host") as host:
        os.truncate(path_of(url), 8_192)
        with pytest.raises(LinkError, match="is cut off: 8192 bytes, but its queue 0 ends at"):
            open_link(url, side="agent")
        os.truncate(path_of(url), 1 << 20)  # so that closing may touch its pages again
        host.close()


def test_a_file_that_is_not_waves_is_left_alone(url):
    path_of(url).write_bytes(b"somebody else's" * 1_000)
    try:
        with pytest.raises(LinkError, match="is in the way and is no segment of Wave"):
            open_link(url, side="host")
        assert path_of(url).read_bytes().startswith(b"somebody else's")
    finally:
        path_of(url).unlink()


def test_no_room_in_shared_memory_is_said_before_anything_is_left_behind(url):
    with pytest.raises(LinkError, match=r"no room for the ring .* ask for smaller queues"):
        open_link(url, side="host", messages=1 << 30)


def test_more_queues_can_be_made_associated_and_destroyed(url):
    with open_link(url, side="host") as host, open_link(url, side="agent") as agent:
        queue = host.create_queue("messages", 16)
        host.assoc_queue_with(queue, cpu=3)
        mixed = messages(range(4))
        mixed["cpu"] = [3, 1, 3, 1]
        assert host.send_messages(mixed) == 4
        assert agent.poll_messages()["tid"].tolist() == [1, 3]
        assert agent.poll_messages(queue=queue)["tid"].tolist() == [0, 2]
        host.destroy_queue(queue)
        with pytest.raises(LinkError, match="reattach"):
            agent.poll_messages(queue=queue)
        with pytest.raises(LinkError, match=f"has no queue {queue}; it has \\[0, 1\\]"):
            host.assoc_queue_with(queue, cpu=3)
        assert host.send_messages(mixed) == 4
        assert len(agent.poll_messages()) == 4
        with pytest.raises(LinkError, match="carries txns"):
            host.assoc_queue_with(TXNS, cpu=3)


def test_an_agent_is_started_found_and_killed(url, monkeypatch):
    monkeypatch.setattr(
        shm,
        "AGENT",
        (
            sys.executable,
            "-P",
            "-c",
            "import sys\nfrom waveos.link import open_link\nlink = open_link(sys.argv[1], side='agent')\nlink.poll_messages(wait_ns=10**12)",
        ),
    )
    with open_link(url, side="host") as host:
        pid = host.start_wave_agent("fifo")
        assert host.await_agent(DEADLINE_S) == pid
        with pytest.raises(LinkError, match="already has an agent"):
            host.start_wave_agent("fifo")
        host.kill_wave_agent()
        assert not host.peer_alive()
        assert segment.start_time(pid) is None


def test_an_agent_that_ends_before_it_attaches_is_reported(url, monkeypatch):
    monkeypatch.setattr(shm, "AGENT", (sys.executable, "-P", "-c", "raise SystemExit(5)"))
    with open_link(url, side="host") as host:
        host.start_wave_agent("fifo")
        with pytest.raises(LinkError, match="ended with status 5 before it attached"):
            host.await_agent(DEADLINE_S)


def test_an_agent_that_another_process_started_is_killed_by_its_pid(url):
    with open_link(url, side="host") as host:
        agent = ready(python(IDLE, url, "agent"))
        host.kill_wave_agent()
        assert agent.wait(DEADLINE_S) == -signal.SIGTERM
        agent.communicate()


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "a b", "x" * 65])
def test_a_bad_ring_name_is_refused(name):
    with pytest.raises(LinkError, match="is no ring name"):
        open_link(f"shm://{name}")


def test_an_unknown_ring_gets_the_nearest_name(url):
    with open_link(url, side="host"), pytest.raises(LinkError, match=f"did you mean '{url[6:]}'"):
        open_link(url + "x", side="agent")


def test_each_verb_belongs_to_one_side(url):
    with open_link(url, side="host") as host, open_link(url, side="agent") as agent:
        for verb in (host.poll_messages, host.poll_txns_outcomes, host.txn_create, host.txns_commit, host.reattach):
            with pytest.raises(LinkError, match=r"is the agent's; this is the host's side"):
                verb()
        for call in (
            lambda: agent.send_messages(messages(range(1))),
            lambda: agent.set_txns_outcomes(np.zeros(1, OUTCOME)),
            agent.poll_txns,
            agent.prefetch_txns,
            lambda: agent.create_queue("messages", 4),
            lambda: agent.destroy_queue(0),
            lambda: agent.start_wave_agent("fifo"),
            agent.kill_wave_agent,
        ):
            with pytest.raises(LinkError, match=r"is the host's; this is the agent's side"):
                call()


def test_arrays_of_another_dtype_and_queues_of_odd_sizes_are_refused(url):
    with open_link(url, side="host") as host:
        with pytest.raises(LinkError, match=r"messages are arrays of waveos\.sched\.MESSAGE"):
            host.send_messages(np.zeros(1, DECISION))
        with pytest.raises(LinkError, match="power of two of slots"):
            host.create_queue("messages", 100)
        with pytest.raises(LinkError, match="'messages' or 'txns', not 'message'"):
            host.create_queue("message", 128)
        every_other = messages(range(6))[::2]
        assert host.send_messages(every_other) == 3
        with open_link(url, side="agent") as agent:
            assert agent.poll_messages()["tid"].tolist() == [0, 2, 4]


def test_an_agent_can_wait_for_its_host_to_appear(url):
    process = python("link = open_link(sys.argv[1], side='agent', patience_s=60)\nprint('ready', flush=True)\nsys.stdin.read()", url)
    with open_link(url, side="host") as host:
        ready(process)
        assert host.await_agent() == process.pid
        end(process)
