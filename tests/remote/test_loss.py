"""What the network loses: a peer that is gone for seconds, connections that are cut in mid-speech, and hosts that come back out of order."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from two_machines import free_port, until

from waveos.errors import WaveError
from waveos.host.net import topology
from waveos.outcome import Outcome
from waveos.record import VERSION
from waveos.sched import DECISION, MESSAGE, OUTCOME, Decision, Message
from waveos.sched.records import SUBSYSTEM


class Wire(threading.Thread):
    """A way between host and agent that can be cut: what is on it is lost then."""

    def __init__(self, to: int) -> None:
        super().__init__(daemon=True)
        self._to, self._pairs, self.cuts, self.up, self._over = to, [], 0, True, False
        self._door = socket.create_server(("127.0.0.1", 0))
        self.port = self._door.getsockname()[1]
        self.start()

    def run(self) -> None:
        while not self._over:
            sockets = [self._door, *(each for pair in self._pairs for each in pair)]
            try:
                ready = select.select(sockets, [], [], 0.01)[0]
            except (OSError, ValueError):
                continue
            if self._door in ready:
                near = self._door.accept()[0]
                if self.up:
                    try:
                        self._pairs.append((near, socket.create_connection(("127.0.0.1", self._to), 5)))
                    except OSError:
                        near.close()
                else:
                    near.close()
            for pair in list(self._pairs):
                for a, b in (pair, pair[::-1]):
                    if a in ready:
                        try:
                            data = a.recv(1 << 16)
                            if data and self.up:
                                b.sendall(data)
                        except OSError:
                            data = b""
                        if not data or not self.up:
                            self._drop(pair)
                            break

    def _drop(self, pair: tuple[socket.socket, socket.socket]) -> None:
        self._pairs = [each for each in self._pairs if each is not pair]
        for each in pair:
            each.close()

    def cut(self) -> None:
        """Drop all connections, and let none be made until `mend`."""
        self.up = False
        self.cuts += 1
        for pair in list(self._pairs):
            for each in pair:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self.up = True

    def close(self) -> None:
        self._over = True
        self.join(10)
        for pair in list(self._pairs):
            self._drop(pair)
        self._door.close()


@pytest.fixture
def wire(machines) -> Iterator[Wire]:
    """Between the host's port and the agent's."""
    agents_port = free_port()
    made = Wire(agents_port)
    machines.agents_port, machines.port = agents_port, made.port
    yield made
    made.close()


class Truth:
    """A host's half in small: tasks that change state by themselves, whose numbers rise, and decisions that are checked by them."""

    def __init__(self, link: Any, tasks: int = 64, seed: int = 1) -> None:
        self.link, self.random = link, np.random.default_rng(seed)
        self.seq = np.ones(tasks, np.int64)
        self.applied: list[tuple[int, int]] = []
        self.count = dict.fromkeys(Outcome, 0)
        self.joins = self.replays = 0

    def step(self) -> None:
        """Once round, as a mechanism's loop."""
        if (joins := self.link.peer_joins()) != self.joins:
            self.joins = joins
            self.replays += 1
            self._say(Message.RESYNC, [-1], [self.replays])
            self._say(Message.THREAD_NEW, np.arange(len(self.seq)), self.seq)
        changed = self.random.integers(0, len(self.seq), 3)
        self.seq[changed] += 1
        self._say(Message.THREAD_RUNNABLE, changed, self.seq[changed])
        for decision in self.link.poll_txns():
            tid, seq = int(decision["tid"]), int(decision["seq"])
            fresh = 0 <= tid < len(self.seq) and seq == self.seq[tid]
            if fresh:
                self.applied.append((tid, seq))
                self.seq[tid] += 1
            self.count[Outcome.COMMITTED if fresh else Outcome.STALE] += 1

    def _say(self, kind: Message, tids: Any, seqs: Any) -> None:
        records = np.zeros(len(tids), MESSAGE)
        records["version"], records["subsystem"], records["type"] = VERSION, SUBSYSTEM, kind
        records["tid"], records["seq"] = tids, seqs
        self.link.send_messages(records)


class Mirror:
    """An agent that believes what it was told, and decides on all of it; `heard` has every state it may have decided on."""

    def __init__(self, link: Any) -> None:
        self.link, self.seq, self.replays = link, dict[int, int](), list[int]()

    def step(self) -> None:
        news = self.link.poll_messages()
        told = set()
        for message in news:
            if message["type"] == Message.RESYNC:
                self.seq.clear()
                told.clear()
                self.replays.append(int(message["seq"]))
            elif message["tid"] >= 0:
                self.seq[int(message["tid"])] = int(message["seq"])
                told.add(int(message["tid"]))
        if told:
            made = self.link.txn_create(len(told))
            made["type"], made["tid"], made["seq"] = Decision.RUN, sorted(told), [self.seq[tid] for tid in sorted(told)]
            self.link.txns_commit()


def linked(machines, **options: Any) -> tuple[Any, Any]:
    host = machines.link("host", **options)
    machines.port = machines.agents_port
    return host, machines.link("agent")


def test_cuts_in_mid_speech_lose_frames_but_no_state_and_what_was_decided_on_lost_state_is_not_applied(machines, wire):
    host, agent = linked(machines, silence_s=0.3)
    truth, mirror = Truth(host), Mirror(agent)

    def turn() -> bool:
        truth.step()
        mirror.step()
        return True

    for cut in range(5):
        mark = len(truth.applied)
        until(lambda mark=mark: turn() and len(truth.applied) > mark + 20, f"nothing goes on after {cut} cuts")
        for _ in range(30):  # speech that the other side does not hear
            turn()
        wire.cut()
        for _ in range(30):
            turn()
        until(lambda: turn() and not host.peer_alive(), "the host does not notice")
        wire.mend()
    until(lambda: turn() and host.peer_alive(), "it does not come back")
    until(lambda: turn() and truth.joins == host.peer_joins() and mirror.replays[-1:] == [truth.replays], "it came back without its state")
    assert len(mirror.replays) >= 6 and truth.replays <= host.peer_joins(), "at first, and after each cut"
    assert mirror.replays == sorted(set(mirror.replays)), "a replay was heard twice, or after a later one"
    assert len(set(truth.applied)) == len(truth.applied), "a decision was applied twice"
    assert truth.count[Outcome.STALE] > 0 or host.stale > 0
    # Once all is said both sides know the same.
    truth.random = type("Still", (), {"integers": lambda self, *a: np.zeros(0, np.int64)})()
    until(lambda: turn() and host.peer_alive() and all(mirror.seq.get(tid, 0) in (seq, seq - 1) for tid, seq in enumerate(truth.seq.tolist())))


def test_a_host_that_was_cut_off_comes_back_by_the_same_session_if_nothing_was_lost(machines, wire):
    host, agent = linked(machines, silence_s=60.0)
    until(lambda: agent.peer_alive() and host.peer_alive())
    records = np.zeros(3, MESSAGE)
    records["tid"] = [1, 2, 3]
    host.send_messages(records)
    got: list[int] = []
    until(lambda: got.extend(agent.poll_messages()["tid"].tolist()) or len(got) == 3)
    wire.cut()
    wire.mend()
    until(lambda: agent.peer_alive() and host.peer_alive() and host.send_messages(records) and len(agent.poll_messages()) >= 1)


def test_hosts_that_come_back_in_another_order_each_find_their_own_state(machines, wire):
    hosts = [machines.link("host", silence_s=0.5, about={"enclave": f"e{n}", "cpus": 1, "threads": 8}) for n in range(3)]
    machines.port = machines.agents_port
    agentd, told = machines.agentd("fifo"), dict[int, int]()
    for number, host in enumerate(hosts):
        until(host.peer_alive, "no agent for a host")
        told[number] = _introduce(host, number)
    for number, host in enumerate(hosts):
        assert _decided(host, number, told[number]) == number
    wire.cut()
    until(lambda: not any(host.peer_alive() for host in hosts))
    wire.mend()
    for number in (2, 0, 1):
        until(hosts[number].peer_alive)
        told[number] = _introduce(hosts[number], number + 3)
    for number, host in enumerate(hosts):
        assert _decided(host, number + 3, told[number]) == number + 3
    assert agentd.poll() is None


def _introduce(host: Any, tid: int) -> int:
    """Tell the state of an enclave with one idle CPU, and one thread that can run. The agent that is told, by its join."""
    joins, told = int(host.peer_joins()), np.zeros(5, MESSAGE)
    told["version"], told["subsystem"], told["tid"], told["cpu"] = VERSION, SUBSYSTEM, -1, -1
    told["type"] = Message.RESYNC, Message.CPU_NEW, Message.CPU_IDLE, Message.THREAD_NEW, Message.THREAD_RUNNABLE
    told["cpu"][1:3], told["tid"][3:], told["seq"] = 0, tid, 1
    assert host.send_messages(told) == 5
    return joins


def _decided(host: Any, tid: int, joins: int) -> int:
    """The thread that is to run, by an agent that was told; one that has joined since is told, too. Its outcome is told."""

    def look() -> Any:
        nonlocal joins
        if host.peer_alive() and host.peer_joins() != joins:
            joins = _introduce(host, tid)
        return host.poll_txns(wait_ns=10_000_000).copy().tolist() or None

    got = until(look)
    record = np.array(got, DECISION)[:1]
    outcome = np.zeros(1, OUTCOME)
    for name in ("version", "subsystem", "tid", "cpu", "txn"):
        outcome[name] = record[name]
    outcome["type"], outcome["seq"], outcome["outcome"], outcome["cpu_seq"] = Message.TXN_OUTCOME, 2, Outcome.COMMITTED, 1
    host.set_txns_outcomes(outcome)
    return int(record["tid"][0])


@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces are root's")
def test_a_peer_behind_a_cable_that_is_pulled_for_seconds_is_gone_and_comes_back_with_all_state(machines):
    try:
        network = topology.network(f"wz{os.getpid()}", direct=True)
        here = network.__enter__()
    except WaveError as error:
        pytest.skip(f"no network namespaces here: {error}")
    try:
        from waveos.link import open_link

        port = 5555
        with topology.inside(here.client.namespace):  # sockets and their threads stay where they were made
            agent = open_link(f"zmq+tcp://0.0.0.0:{port}", side="agent", keys=machines.dpu)
            machines.open.append(agent)
            agent.peer_alive()
        with topology.inside(here.host.namespace):
            host = open_link(f"zmq+tcp://{here.client.address}:{port}", side="host", keys=machines.host, silence_s=1.0)
            machines.open.append(host)
        truth, mirror = Truth(host), Mirror(agent)

        def turn() -> bool:
            truth.step()
            mirror.step()
            return True

        until(lambda: turn() and len(truth.applied) > 20)
        pull = ["ip", "-n", here.client.namespace, "link", "set", here.client.interface]
        subprocess.run([*pull, "down"], check=True)
        until(lambda: turn() and not host.peer_alive(), "the host does not notice that the cable is pulled")
        for _ in range(200):
            turn()
        subprocess.run([*pull, "up"], check=True)
        mark = len(truth.applied)
        until(lambda: turn() and len(truth.applied) > mark + 20, "it does not come back")
        assert len(mirror.replays) == host.peer_joins() >= 2
        assert len(set(truth.applied)) == len(truth.applied)
    finally:
        for each in machines.open:
            each.close()
        network.__exit__(None, None, None)
