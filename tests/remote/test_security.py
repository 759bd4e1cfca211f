"""An agent that means no good, behind the network link: whatever it sends changes nothing but what the enclave's own host half lets through."""

from __future__ import annotations

import os
import subprocess
import time

import numpy as np
import pytest
from two_machines import until

from tests.chaos.forger import BATCH, forge
from tests.chaos.world import COUNT, World, scheduling, why_not
from waveos import record
from waveos.link.exchange import Door, ZmqAgent
from waveos.link.frames import HEADER, MAX_BYTES, Kind, pack, read_json, unpack
from waveos.link.session import Broken, Session
from waveos.sched.records import SUBSYSTEM

FORGED = 1_000_000
NONSENSE = 20_000


def door_of(agent: ZmqAgent) -> Door:
    door: Door = agent._exchange.doors[0]
    return door


@pytest.mark.slow
@pytest.mark.skipif(bool(why_not()), reason=str(why_not()))
def test_a_million_forged_decisions_from_another_machine_are_refused_and_nothing_outside_has_changed(machines):
    world = World()
    try:
        for kind in (("tick",), ("spin", "2")):
            world.worker(*kind)
        bystander = world.start(["sleep", "1000"])
        os.setpriority(os.PRIO_PROCESS, bystander.pid, 3)
        outside = {pid: scheduling(pid)[pid] for pid in (bystander.pid, os.getpid())}
        before = {each.pid: scheduling(each.pid) for each in world.workers}
        hostd = world.hostd("--no-agent")
        until(lambda: world.ask("status"))
        agent = machines.link("agent")
        machines.wave(machines.host, "relay", world.name, machines.url, environment={"WAVE_RUN": str(world.run)})
        rng, sent, old = np.random.default_rng(1), 0, forge(np.random.default_rng(2), 1, np.zeros(0))
        end = time.monotonic() + 240
        while sent < FORGED and time.monotonic() < end:
            agent.poll_messages()
            session = agent.session
            if session is None or session.room < BATCH:
                time.sleep(0.000_2)
                continue
            old = words = forge(rng, sent // BATCH % 4, old)
            sent += BATCH if door_of(agent).send(agent, session.data(words.tobytes())) else 0
        assert sent >= FORGED, f"{sent} were taken"
        until(lambda: agent.poll_messages() is None or ((told := world.ask("status")) and told["counters"]["decisions"] >= 0.9 * FORGED))
        counters = world.ask("status")["counters"]
        assert all(counters["outcomes"][name] > 0 for name in ("invalid", "not_in_enclave", "stale")), counters["outcomes"]
        assert {pid: scheduling(pid)[pid] for pid in outside} == outside
        agent.close()
        marks = [world.word(each, COUNT) for each in world.workers]
        until(lambda: all(world.word(each, COUNT) > mark + 3 for each, mark in zip(world.workers, marks, strict=True)), "the workers go on")
        assert hostd.poll() is None
        hostd.terminate()
        assert hostd.wait(30) == 0
        assert {each.pid: scheduling(each.pid) for each in world.workers} == before
        assert "Traceback" not in world.log("hostd.log")
    finally:
        world.close()


def test_frames_of_an_agent_that_are_none_change_nothing_and_cost_it_at_most_its_session(machines):
    host, agent = machines.both()
    rng, door = np.random.default_rng(3), door_of(agent)
    good = agent.session.say(Kind.BEAT)
    for number in range(NONSENSE):
        match number % 4:
            case 0:
                frame = rng.bytes(int(rng.integers(0, 200)))
            case 1:
                frame = good[: int(rng.integers(0, len(good)))]
            case 2:
                frame = bytes(byte ^ int(rng.integers(0, 2)) << int(rng.integers(0, 8)) for byte in good)
            case _:
                kind = Kind(int(rng.integers(1, 8)))
                frame = pack(
                    kind, record.VERSION, SUBSYSTEM, int(rng.integers(0, 1 << 63)), *(int(n) for n in rng.integers(0, 1 << 63, 3)), rng.bytes(64)
                )
        door.socket.send_multipart((agent.route, frame))
        if number % 100 == 0:
            assert len(host.poll_txns()) == 0
    until(lambda: agent.poll_messages() is None or (host.peer_alive() and agent.peer_alive()), "an honest session does not come back")
    assert host.nonsense > NONSENSE // 4
    agent.txn_create(3)
    agent.txns_commit()
    got: list[int] = []
    until(lambda: got.extend(host.poll_txns()["txn"].tolist()) or agent.poll_messages() is None or len(got) >= 3)


def test_a_host_that_floods_its_agent_with_nonsense_does_not_keep_it_from_serving_another(machines, tmp_path):
    agentd = machines.agentd("fifo")
    flooder = machines.link("host", about={"enclave": "flooder", "cpus": 1, "threads": 8})
    honest = machines.link("host", about={"enclave": "honest", "cpus": 1, "threads": 8})
    until(lambda: flooder.peer_alive() and honest.peer_alive())
    rng = np.random.default_rng(4)
    for number in range(20_000):
        with flooder._lock:
            flooder._socket.send(
                rng.bytes(int(rng.integers(0, 300))) if number % 2 else pack(Kind.HELLO, record.VERSION, SUBSYSTEM, number, body=b"{" * 100)
            )
    assert honest.peer_alive() and honest.broken == 0
    assert agentd.poll() is None


# ── decoders, without sockets ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("inputs", [100_000, pytest.param(600_000, marks=pytest.mark.slow)])
def test_no_bytes_make_a_decoder_fail_and_no_frame_that_is_not_the_sessions_next_changes_it(inputs):
    """Random bytes, and good frames with bytes changed, cut or repeated; the seeds are the frames of a real session."""
    rng = np.random.default_rng(inputs)
    peer = Session(7, SUBSYSTEM, 1 << 20, 1 << 20)
    seeds = [peer.data(bytes(64 * n)) for n in (1, 2, 3)] + [
        peer.say(Kind.BEAT),
        pack(Kind.HELLO, record.VERSION, SUBSYSTEM, 9, body=b'{"enclave": "x"}'),
    ]
    session = Session(7, SUBSYSTEM, 100, 100)
    noise, where, taken = rng.bytes(1 << 20), rng.integers(0, (1 << 20) - 400, inputs).tolist(), 0
    kinds, sizes, changes = (rng.integers(0, n, inputs).tolist() for n in (8, 240, HEADER.size))
    for number, (at, kind, size, change) in enumerate(zip(where, kinds, sizes, changes, strict=True)):
        if kind < 3:
            data = noise[at : at + size]
        else:
            good = seeds[number % len(seeds)]
            data = good[:size] if kind == 3 else good[:change] + noise[at : at + 1] + good[change + 1 :]
        frame = unpack(data)
        if frame is None:
            continue
        read_json(frame.body)
        before = session.frames_in, session.got, session.taken
        try:
            body = session.hear(frame)
        except Broken:
            body = None
        if body is None:
            assert (session.frames_in, session.got, session.taken) == before
        else:
            taken += 1
            assert session.got - before[1] == len(body) // 64 and session.frames_in == before[0] + 1
            session.taken = session.got
    assert session.frames_in == taken
    assert unpack(bytes(MAX_BYTES + 1)) is None


def test_json_that_nests_without_end_is_no_message():
    assert read_json(b"[" * 4_000) is None
    assert read_json(b"\xff\xfe") is None
    assert read_json(b"7") is None


def test_ps_shows_no_secret(machines):
    agentd = machines.agentd("fifo")
    shown = subprocess.run(["ps", "-ww", "-o", "args,cmd", "-p", str(agentd.pid)], capture_output=True, text=True, check=True).stdout
    assert machines.dpu.own().secret not in shown
