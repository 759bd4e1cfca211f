"""The link through a BAR, over files that stand for the device's memory, between real processes. Ordering is tests/ring's, a real BAR tests/vm's."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from waveos import ring
from waveos.errors import LinkError
from waveos.link import MESSAGES, TXNS, bar, device, notice, open_link
from waveos.primitives import BarMemory
from waveos.sched import MESSAGE, Message
from waveos.testing import check_link

DEADLINE_S = 60.0
SMALL = {"messages": 64, "txns": 16}


@pytest.fixture
def path(tmp_path) -> Path:
    made = tmp_path / "memory"
    made.write_bytes(bytes(1 << 20))
    return made


@pytest.fixture
def url(path) -> str:
    return f"bar://{path}"


@pytest.fixture
def pci(tmp_path, monkeypatch, path) -> Path:
    """A device as sysfs shows it, whose BAR 2 is that memory."""
    folder = tmp_path / "pci" / "0000:00:04.0"
    folder.mkdir(parents=True)
    for name in ("resource2", "resource2_wc"):
        os.link(path, folder / name)
    (folder / "enable").write_text("1\n")
    monkeypatch.setattr(device, "PCI", folder.parent)
    return folder


def until(condition: Callable[[], Any], what: str) -> Any:
    end = time.monotonic() + DEADLINE_S
    while not (found := condition()):
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.005)
    return found


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    """Another process that opens `link`, and says "ready" once that is done."""
    start = "import sys\nfrom waveos.link import open_link\nlink = open_link(sys.argv[1], side=sys.argv[2])\nprint('ready', flush=True)\n"
    return subprocess.Popen(
        [sys.executable, "-P", "-c", start + code, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture
def other() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a side in another process, which idles until it is ended."""
    started: list[subprocess.Popen[str]] = []

    def start(url: str, side: str, code: str = "sys.stdin.read()\n") -> subprocess.Popen[str]:
        started.append(python(code, url, side))
        assert started[-1].stdout.readline() == "ready\n", started[-1].stderr.read()
        return started[-1]

    yield start
    for each in started:
        each.kill()
        each.communicate()


def end(process: subprocess.Popen[str], number: signal.Signals = signal.SIGKILL) -> None:
    process.send_signal(number)
    process.communicate(timeout=DEADLINE_S)


def messages(numbers: range) -> np.ndarray:
    records = np.zeros(len(numbers), MESSAGE)
    records["type"], records["tid"], records["seq"] = Message.THREAD_RUNNABLE, numbers, numbers
    return records


def test_the_same_messages_give_the_same_decisions_through_it(url):
    check_link(url)


def test_the_same_through_a_device_of_which_each_page_has_one_mapping(pci, path):
    host = open_link("bar://00:04.0", side="host")
    with host, open_link(f"bar://{path}", side="agent") as agent:
        starts, _ = bar._places(4_096, 1_024)
        mapped = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(pci) in line]
        offsets = {(int(fields[2], 16) // 8, Path(fields[5]).name) for fields in mapped}
        page = os.sysconf("SC_PAGESIZE") // 8
        assert offsets == {(0, "resource2"), (starts[0], "resource2"), (starts[0] + page, "resource2_wc"), (starts[1], "resource2")}
        host.send_messages(messages(range(200)))
        assert agent.poll_messages()["tid"].tolist() == list(range(200))
        agent.txn_create(2)["cpu"] = [7, 8]
        agent.txns_commit()
        assert host.prefetch_txns()
        assert host.poll_txns()["cpu"].tolist() == [7, 8]
    assert np.fromfile(path, np.int64)[bar.HOST_AT] == 0, "what is left says that nobody has it"


def test_compiled_and_interpreted_primitives_of_a_bar_do_the_same():
    for functions in (ring.compiled(), ring):
        words = np.zeros(ring.words(4), np.int64)
        memory, out = BarMemory(words), np.zeros(8, np.int64)
        producer, consumer = np.zeros(ring.OWN_WORDS, np.int64), np.zeros(ring.OWN_WORDS, np.int64)
        functions.create(memory, 4, 1, 1, 5)
        functions.settle(memory)
        assert functions.join_producer(memory, producer, 1, 1) == functions.join_consumer(memory, consumer, 1, 1) == ring.JOINED
        assert functions.send(memory, producer, np.arange(16) << 32, 2) == 2
        assert functions.poll_one(memory, consumer, out, 0) == 1 and out.tolist() == [k << 32 for k in range(8)]


def test_what_does_not_fit_is_counted_on_both_sides_and_nothing_is_overwritten(url):
    with open_link(url, side="host", messages=4, txns=4) as host, open_link(url, side="agent") as agent:
        assert (host.room(n=9), host.send_messages(messages(range(6)))) == (4, 4)
        assert host.overflowed() == agent.overflowed() == 2
        assert agent.poll_messages()["tid"].tolist() == [0, 1, 2, 3]
        agent.txn_create(5)
        assert agent.txns_commit() == 4
        assert host.overflowed(TXNS) == agent.overflowed(TXNS) == 1


ECHO = """
import numpy as np
while True:
    for message in link.poll_messages(wait_ns=50_000_000).copy():
        txn = link.txn_create()
        txn["tid"], txn["type"] = message["tid"], 1
        link.txns_commit()
"""


def test_records_go_both_ways_between_processes(url, other):
    with open_link(url, side="host", **SMALL) as host:
        agent = other(url, "agent", ECHO)
        assert host.await_agent(DEADLINE_S) == agent.pid
        for first in range(0, 400, 8):
            assert host.send_messages(messages(range(first, first + 8))) == 8
            got: list[int] = []
            while len(got) < 8:
                got += host.poll_txns(wait_ns=10**10)["tid"].tolist()
            assert got == list(range(first, first + 8))


def test_an_agent_learns_what_the_host_says_of_its_enclave_before_it_takes_its_place(url):
    heard = []
    with open_link(url, side="host", about={"cpus": 3, "threads": 100, "ahead": 0, "enclave": "web"}) as host:

        def prepare(facts):
            heard.append((facts, host.peer_alive()))
            return {"policy": "shinjuku"}

        with open_link(url, side="agent", prepare=prepare) as agent:
            assert heard == [({"cpus": 3, "threads": 100, "ahead": 0}, False)]
            assert (host.await_agent(1), host.policy, host.peer_joins()) == (os.getpid(), "shinjuku", 1)
            assert agent.peer_alive()
        assert not host.peer_alive()
        assert "has left" in host.trouble
    with open_link(url, side="host") as host, open_link(url, side="agent", prepare=lambda facts: heard.append(facts) or {}):
        assert heard[-1] == {}


def test_a_second_host_or_agent_of_this_machine_is_refused_while_the_first_lives(url, other):
    with open_link(url, side="host") as host:
        for side in ("host", "agent"):
            if side == "agent":
                other(url, "agent")
            with pytest.raises(LinkError, match=f"already has its {side} on this machine, a process that lives: stop that one"):
                open_link(url, side=side)
        assert host.peer_alive()


def test_a_side_of_another_machine_that_lives_is_refused_too(url, path, monkeypatch, other):
    other(url, "host")
    monkeypatch.setattr(device.Device, "_lock", lambda self, fd, kind=0: None)  # another machine's locks are not seen here
    with pytest.raises(LinkError, match="already has a host on another machine"):
        open_link(url, side="host")
    other(url, "agent")
    with pytest.raises(LinkError, match="already has an agent on another machine"):
        open_link(url, side="agent")


def test_what_a_killed_host_left_is_taken_over_and_its_agent_is_told(url, other):
    first = other(url, "host")
    with open_link(url, side="agent", silence_s=0.5) as agent:
        assert agent.peer_alive()
        end(first)
        until(lambda: not agent.peer_alive(), "its silence is noticed")
        with pytest.raises(LinkError, match=r"no sign of life for 0\.5 s: reattach"):
            agent.check()
        with pytest.raises(LinkError, match="gives no sign of life: restart it"):
            agent.reattach()
        with open_link(url, side="host", **SMALL) as host:
            agent.reattach()
            host.send_messages(messages(range(3)))
            assert agent.poll_messages()["tid"].tolist() == [0, 1, 2]


def test_an_agent_of_rings_that_were_made_anew_gets_and_gives_nothing_more(url, path, other):
    first = other(url, "host")
    with open_link(url, side="agent") as agent:
        end(first)
        with open_link(url, side="host") as host:
            assert not host.peer_alive(), "the old host's agent is not this one's"
            agent.txn_create()["cpu"] = 1
            for call in (agent.txns_commit, agent.poll_messages, agent.check):
                with pytest.raises(LinkError, match="reattach"):
                    call()
            assert len(host.poll_txns()) == 0


def test_a_killed_agent_is_noticed_and_followed_by_another(url, other):
    with open_link(url, side="host", silence_s=0.5) as host:
        first = other(url, "agent")
        assert host.await_agent(DEADLINE_S) == first.pid
        end(first)
        until(lambda: not host.peer_alive(), "its silence is noticed")
        assert "shown no sign of life for 0.5 s" in host.trouble
        with pytest.raises(LinkError, match=r"no agent within 0 s: .* no sign of life"):
            host.await_agent(0)
        second = other(url, "agent")
        assert (host.await_agent(DEADLINE_S), host.peer_joins()) == (second.pid, 2)


def test_an_agent_may_come_before_its_host(url, other):
    agent = python("", url, "agent")
    assert agent.wait(DEADLINE_S) != 0
    assert "no host has laid" in agent.communicate()[1]
    waiting: list[Any] = []
    thread = threading.Thread(target=lambda: waiting.append(open_link(url, side="agent", patience_s=DEADLINE_S)))
    thread.start()
    with open_link(url, side="host") as host:
        host.await_agent(DEADLINE_S)
        thread.join()
        waiting[0].close()


def test_a_device_that_is_reset_is_noticed_by_both_sides(url, path):
    with open_link(url, side="host") as host, open_link(url, side="agent") as agent:
        for filling, says in ((b"\0", "no host has laid"), (b"\xff", r"does not answer \(all its bits are 1\)")):
            with path.open("r+b") as file:
                file.write(filling * (1 << 20))
            for call in (host.check, host.poll_txns, lambda: host.send_messages(messages(range(1)))):
                with pytest.raises(LinkError, match="was reset, is gone, or another host has laid it out anew"):
                    call()
            with pytest.raises(LinkError, match="reattach"):
                agent.check()
            with pytest.raises(LinkError, match=says):
                agent.reattach()


def test_a_host_or_layout_of_another_version_or_subsystem_is_refused(url):
    with open_link(url, side="host") as host:
        stamp = notice.stamp_of(host._page, bar.HOST_AT)
        for bits, says in (
            (9 << 40, "speaks version 8 of the contract, layout 1; this agent version 1, layout 1: install the same waveos"),
            (3 << 24, "version 1 of the contract, layout 2; this agent version 1, layout 1"),
            (9 << 32, "carries subsystem 8, this agent is for 1"),
        ):
            host._page.store(bar.HOST_AT, stamp ^ bits)
            with pytest.raises(LinkError, match=says):
                open_link(url, side="agent", patience_s=DEADLINE_S)
        host._page.store(bar.HOST_AT, stamp)
        open_link(url, side="agent").close()


ATTACH = """
import sys
from waveos.errors import LinkError
from waveos.link import open_link
try:
    open_link(sys.argv[1], side="agent")
except LinkError as error:
    print(error)
"""


@pytest.mark.parametrize(("at", "bits"), [(ring.IDENTITY_AT, 40 << 24), (ring.IDENTITY_AT, 0xFF << 24), (ring.CREDIT_AT, -1 << 63)])
@pytest.mark.parametrize("queue", [MESSAGES, TXNS])
def test_a_ring_in_which_the_host_wrote_what_cannot_be_is_a_line_and_not_the_end_of_the_agents_process(url, queue, at, bits):
    with open_link(url, side="host", **SMALL) as host:
        memory = host.queue(queue).memory
        memory.store(ring.CREDIT_AT, 1 << 39)  # far out, were that capacity believed
        memory.store(at, memory.load(at) & ~(0xFF << 24) | bits)
        ended = subprocess.run([sys.executable, "-P", "-c", ATTACH, url], capture_output=True, text=True, timeout=DEADLINE_S)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "a queue of" in ended.stdout and "is not as its host said" in ended.stdout


def test_a_host_lays_out_anew_what_another_version_left(url):
    with open_link(url, side="host") as host:
        stamp = host._stamp
    older = device.Device(url, "host")
    notice.post(BarMemory(older.map(0, bar.NOTICE_WORDS)), bar.HOST_AT, stamp ^ (7 << 24), [5, 1 << 40, -3, 0, 0, 0])
    older.close()
    check_link(url)


def test_a_bar_that_is_too_small_is_told_with_what_is_needed(url, path):
    os.truncate(path, 1 << 18)
    with pytest.raises(LinkError, match="is too small: 262144 bytes, and queues of 4096 messages and 1024 txns take 524288: ask for smaller queues"):
        open_link(url, side="host")
    with open_link(url, side="host", **SMALL) as host:
        host._page.store(bar.HOST_AT + 9, 1 << 20)
        with pytest.raises(LinkError, match="is too small: 262144 bytes, and the queues that its host has made"):
            open_link(url, side="agent", patience_s=DEADLINE_S)
        host._page.store(bar.HOST_AT + 9, 63)
        with pytest.raises(LinkError, match="power of two"):
            open_link(url, side="agent")
    os.truncate(path, 0)
    with pytest.raises(LinkError, match=r"cannot be mapped|too small"):
        open_link(url, side="agent")


def test_a_file_that_is_not_waves_is_left_alone(url, path):
    path.write_bytes(b"somebody else's" * 100_000)
    with pytest.raises(LinkError, match="holds something that is not Wave's"):
        open_link(url, side="host")
    assert path.read_bytes().startswith(b"somebody else's")


def test_what_is_no_device_is_said_in_one_line(pci, path, tmp_path):
    for url, says in (
        ("bar://nonsense", "'nonsense' is no device: write a PCI address"),
        ("bar://0000:00:05.0", r"this machine has no PCI device 0000:00:05.0 \(did you mean '0000:00:04.0'\?\)"),
        ("bar://0000:00:04.0/4", "0000:00:04.0 has no BAR 4; it has: 2"),
        (f"bar://{tmp_path}/none", f"there is no {tmp_path}/none: it is the device's memory"),
        (f"bar://{tmp_path}", "cannot open .*: Is a directory"),
    ):
        with pytest.raises(LinkError, match=says) as caught:
            open_link(url, side="host")
        assert "\n" not in str(caught.value)
    (pci / "enable").write_text("0\n")
    with pytest.raises(LinkError, match=f"0000:00:04.0 is not enabled, so its memory does not answer: echo 1 >{pci}/enable"):
        open_link("bar://0000:00:04.0", side="host")


def test_a_device_that_this_user_may_not_use_is_said_so(url, monkeypatch):
    def refuse(*_arguments, **_settings):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(device.os, "open", refuse)
    with pytest.raises(LinkError, match=r"is not for this user \(Permission denied\): run as root"):
        open_link(url, side="host")


def test_a_bar_without_write_combining_is_written_uncached(pci):
    (pci / "resource2_wc").unlink()
    check_link("bar://0000:00:04.0")


def test_each_verb_belongs_to_one_side_and_there_are_two_queues(url):
    with open_link(url, side="host") as host, open_link(url, side="agent") as agent:
        for verb in (host.poll_messages, host.txn_create, host.reattach):
            with pytest.raises(LinkError, match=r"is the agent's; this is the host's side"):
                verb()
        for verb in (agent.poll_txns, agent.prefetch_txns, agent.kill_wave_agent, lambda: agent.start_wave_agent("fifo")):
            with pytest.raises(LinkError, match=r"is the host's; this is the agent's side"):
                verb()
        for call in (
            lambda: host.create_queue("messages", 4),
            lambda: host.destroy_queue(0),
            lambda: host.poll_txns(queue=5),
            lambda: host.poll_txns(queue=MESSAGES),
            lambda: agent.txns_commit(MESSAGES) if agent.txn_create() is not None else None,
            lambda: host.assoc_queue_with(TXNS, 3),
        ):
            with pytest.raises(LinkError):
                call()


def test_an_agent_is_started_beside_a_file_and_killed(url, monkeypatch, pci):
    code = "import sys\nfrom waveos.link import open_link\nlink = open_link(sys.argv[1], side='agent')\nlink.poll_messages(wait_ns=10**12)"
    monkeypatch.setattr(bar, "AGENT", (sys.executable, "-P", "-c", code))
    with open_link(url, side="host") as host:
        pid = host.start_wave_agent("fifo")
        assert host.await_agent(DEADLINE_S) == pid
        host.kill_wave_agent()
        until(lambda: not host.peer_alive(), "it left, and said so")
    monkeypatch.setattr(bar, "AGENT", (sys.executable, "-P", "-c", "raise SystemExit(5)"))
    with open_link(url, side="host") as host:
        host.start_wave_agent("fifo")
        with pytest.raises(LinkError, match="ended with status 5 before it attached"):
            host.await_agent(DEADLINE_S)
    with open_link("bar://0000:00:04.0", side="host") as host, pytest.raises(LinkError, match="runs on the device: start `wave agentd"):
        host.start_wave_agent("fifo")


def test_an_agent_that_writes_anything_anywhere_harms_neither_the_host_nor_what_lies_beyond(url, path):
    """It plays 1,000,000 words: random ones, forged marks, credits and notices, while the host goes on with its verbs."""
    rng, choose, dropped = np.random.default_rng(7), random.Random(7), 0
    words = np.memmap(path, np.int64, "r+")
    spots = [ring.CREDIT_AT, ring.CONSUMERS_AT, ring.HEARTBEAT_AT, ring.OVERFLOW_AT]
    host = open_link(url, side="host", **SMALL)
    up, down = (bar._places(*SMALL.values())[0][number] for number in (MESSAGES, TXNS))
    agent = open_link(url, side="agent")
    try:
        for _ in range(2_000):
            words[rng.integers(down + 8, down + ring.words(SMALL["txns"]), 250)] = rng.integers(-(2**63), 2**63 - 1, 250)
            words[rng.integers(up + 8, up + ring.words(SMALL["messages"]), 240)] = rng.integers(-(2**63), 2**63 - 1, 240)
            words[[base + spot for base in (up, down) for spot in spots]] = [choose.choice([-1, 0, 1, 2**62, -(2**63)]) for _ in range(8)]
            words[bar.AGENT_AT : bar.AGENT_AT + 40] = rng.integers(-(2**63), 2**63 - 1, 40)
            position = int(host.txns_own[ring.NEXT])  # and one that looks right
            words[down + ring.HEADER_WORDS + position % SMALL["txns"] * 8] = (host._stamp & 0xFFFF) << 16 | position // SMALL["txns"] + 1
            try:
                taken = host.poll_txns()
                assert len(taken) <= 1_024
                assert 0 <= host.send_messages(messages(range(3))) <= 3
                for look in (host.peer_alive, host.peer_joins, host.room, host.heartbeat, lambda: host.overflowed(TXNS)):
                    look()
                host.await_agent(0)
                assert host.policy.isprintable()
            except LinkError:
                dropped += 1
        words[bar.HOST_AT] = 12345
        for start in (up, down):
            words[start] = 12345
        with pytest.raises(LinkError, match="was reset"):
            host.poll_txns()
    finally:
        agent.close()
        host.close()
    assert dropped < 2_000
    assert path.stat().st_size == 1 << 20
    words[:] = 0
    check_link(url)
