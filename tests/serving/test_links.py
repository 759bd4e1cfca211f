"""A serving policy in a process of its own, across a link: the same requests are served, also when its agent is killed in mid-run."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from waveos import serving
from waveos.ipu_emulator.serving.cost import load_constants
from waveos.ipu_emulator.serving.simulate import Setup, Simulation, load_system
from waveos.ipu_emulator.serving.workload import make_workload
from waveos.keys import Keys
from waveos.link import open_link
from waveos.policy import load_policy
from waveos.policy.plain import PlainRuntime

sys.path.insert(0, str(Path(__file__).parent))
from engines import Host

DEADLINE_S = 60.0
QUIET_NS = 5_000_000
"""Wall time an agent is given to answer before virtual time goes on; a later answer is as good, for what it was decided on is checked."""


class Across(Simulation):
    """A simulation whose policy decides at the other end of a link; `disturb` is called after each step with the number of requests done."""

    def __init__(self, setup, workload, link, disturb):
        super().__init__(setup, workload)
        self.link, self.disturb, self.joins = link, disturb, link.peer_joins()

    def run_across(self):
        until = time.monotonic() + DEADLINE_S
        self._begun = True
        self._arrivals()
        while self.mechanism.requests or self._next < len(self.workload.asks):
            assert time.monotonic() < until, f"{len(self.mechanism.requests)} requests are left"
            self.disturb(len(self.ttft))
            if self.link.peer_joins() != self.joins:
                self.joins = self.link.peer_joins()
                self.mechanism.replay()
            told = self.mechanism.take_messages()
            while len(told):
                told = told[self.link.send_messages(told) :]
            decisions = self.link.poll_txns(wait_ns=QUIET_NS)
            self.mechanism.now_ns = self.clock.now_ns
            if len(decisions):
                self.mechanism.commit(decisions)
            else:
                self.clock.step()


def start(url, **environment):
    command = [sys.executable, "-P", "-m", "waveos.agents.agentd", url, "strata"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, **environment})


@pytest.mark.parametrize("kills", [0, 1])
def test_every_request_is_served_from_another_process_also_if_that_is_killed_once(kills):
    url = f"shm://serving-{os.getpid()}-{kills}"
    host = open_link(url, side="host", subsystem=serving)
    agents = [start(url)]
    try:
        workload = make_workload("loogle", 20.0, load_constants().fitted, queries=40)

        def disturb(done):
            if done >= 10 and len(agents) <= kills:
                agents[-1].send_signal(signal.SIGKILL)
                agents[-1].wait()
                across.mechanism.agent_lost()
                agents.append(start(url))

        across = Across(Setup(load_system("strata")), workload, host, disturb)
        across.run_across()
        assert across.outputs == sum(ask.outputs for ask in workload.asks)
        assert len(agents) == kills + 1
    finally:
        host.close()
        for each in agents:
            each.terminate()
            each.wait(10)


def test_what_was_meant_for_an_agent_that_died_is_not_told_to_the_next():
    host = Host()
    host.arrive(1, [11])
    host.messages()
    host.arrive(2, [12])
    late = host.mechanism.take_messages()  # taken, not credited: the ring gives it to the next agent, too
    host.mechanism.replay()
    end = np.zeros(1, serving.MESSAGE)
    end["type"] = serving.Message.BATCH_END
    runtime = PlainRuntime(load_policy("strata"))
    assert not len(runtime.feed(np.concatenate([late, end])))
    decided = runtime.feed(np.concatenate([host.mechanism.take_messages(), end]))
    assert sorted(decided["request"][decided["type"] == serving.Decision.PART].tolist()) == [1, 2]


def test_an_agent_that_comes_later_knows_what_running_requests_keep_on_the_device():
    """It would evict it, be refused, and try again for as long as they run."""
    host = Host(device=500)
    host.arrive(1, [11, 12])
    assert host.batch((1, 0, 200)) == ["COMMITTED"] * 2
    batch = host.engine.batches[-1]
    host.mechanism.batch_started(batch)
    host.mechanism.batch_done(batch)
    host.arrive(2, [21, 22, 23])
    host.mechanism.replay()
    end = np.zeros(1, serving.MESSAGE)
    end["type"] = serving.Message.BATCH_END
    runtime = PlainRuntime(load_policy("fcfs_lru"), {"write_threshold": 1e9})
    assert not len(runtime.feed(np.concatenate([host.mechanism.take_messages(), end])))
    host.mechanism.request_done(host.mechanism.requests[1])
    decided = runtime.feed(np.concatenate([host.mechanism.take_messages(), end]))
    assert decided["type"].tolist() == [serving.Decision.EVICT, serving.Decision.FORM_BATCH, serving.Decision.PART]


def test_every_request_is_served_by_an_agent_across_the_network(tmp_path, monkeypatch):
    """Keys of two machines, encrypted, on loopback."""
    zmq = pytest.importorskip("zmq", reason="the network link needs pyzmq: pip install 'waveos[agent]'")
    assert zmq.has("curve")
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"zmq+tcp://dpu@127.0.0.1:{free.getsockname()[1]}"
    ours, theirs = Keys(tmp_path / "host"), Keys(tmp_path / "dpu")
    ours.add("dpu", theirs.new().public)
    theirs.add("host", ours.new().public)
    monkeypatch.setenv("WAVE_KEYS", str(ours.folder))
    agent = start(url.replace("dpu@", ""), WAVE_KEYS=str(theirs.folder))
    host = open_link(url, side="host", subsystem=serving)
    try:
        workload = make_workload("loogle", 20.0, load_constants().fitted, queries=30)
        across = Across(Setup(load_system("strata")), workload, host, lambda done: None)
        across.run_across()
        assert across.outputs == sum(ask.outputs for ask in workload.asks)
        assert agent.poll() is None
    finally:
        host.close()
        agent.terminate()
        agent.wait(10)
