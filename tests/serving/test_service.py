"""The thread between clients and engine: what becomes of a client's request when something is wrong with it, with the agent, or with the engine."""

from __future__ import annotations

import asyncio
import os
import queue
import signal
import socket
import time
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from waveos.errors import PolicyError, WaveError
from waveos.ipu_emulator.serving.live import Emulated
from waveos.ipu_emulator.serving.simulate import load_system
from waveos.keys import Keys
from waveos.serving import driver
from waveos.serving.driver import Across, InProcess
from waveos.serving.service import Ask, Service

pytest.importorskip("starlette", reason="the endpoint needs waveos[serving]")
from waveos.serving.endpoint import Chat, Completion, Endpoint

DEADLINE_S = 60.0
FAILS = """
from waveos import serving
from waveos.policy import Policy

class Fails(Policy, subsystem=serving, name="fails", compiled=False):
    "Fails at every request."

    def request_arrived(self, msg, txns):
        raise ValueError("on purpose")
"""
HANGS = """
from waveos import serving
from waveos.policy import Policy

class Hangs(Policy, subsystem=serving, name="hangs", compiled=False):
    "Never returns from a request."

    def request_arrived(self, msg, txns):
        while True:
            pass
"""
IDLES = """
from waveos import serving
from waveos.policy import Policy

class Idles(Policy, subsystem=serving, name="idles", compiled=False):
    "Decides nothing."

    def request_arrived(self, msg, txns):
        pass
"""


class Client:
    """One request, and what its client is told."""

    def __init__(self, service, outputs=3):
        self.heard = queue.SimpleQueue()
        service.submit(Ask([1] * 300, outputs, lambda what, value: self.heard.put((what, value))))

    def end(self):
        """("done" or "failed", why)."""
        while (told := self.heard.get(timeout=DEADLINE_S))[0] == "token":
            pass
        return told


@pytest.fixture
def make():
    """A service of emulated GPUs with that agent, for the test to start."""
    services = []

    def with_agent(agent):
        services.append(Service(Emulated(load_system("strata"), "h100", "llama-3.1-8b", 1, 1, "fast"), agent))
        return services[-1]

    yield with_agent
    for each in services:
        each.close()


def _until(condition):
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_what_goes_wrong_when_a_request_is_handed_in_is_of_that_request_alone(make, capsys):
    service = make(InProcess("strata"))
    mechanism = service.engine.mechanism
    arrive = mechanism.arrive

    def fail_once(*about):
        mechanism.arrive = arrive
        arrive(*about)
        raise ZeroDivisionError("on purpose")

    mechanism.arrive = fail_once
    service.start()
    what, why = Client(service).end()
    assert what == "failed" and "ZeroDivisionError: on purpose" in str(why) and "in fail_once" in capsys.readouterr().err
    assert not mechanism.requests
    assert Client(service).end() == ("done", "length")


def test_who_comes_while_the_engine_fails_is_told(make):
    service, clients = make(InProcess("strata")), []

    def fail(timeout_s=0.0):
        clients.append(Client(service))
        raise WaveError("broken")

    service.engine.advance = fail
    service.start()
    _until(lambda: clients)
    assert clients[0].end()[1].args == ("broken",)


def test_who_waits_while_no_agent_comes_is_told_and_the_next_is_served_once_one_is_there(make, monkeypatch):
    monkeypatch.setattr(driver, "PATIENCE_S", 0.2)
    agent = Across(f"shm://serving-away-{os.getpid()}", "strata", start=False)
    service = make(agent)
    service.start()
    what, why = Client(service).end()
    assert what == "failed" and "no agent has decided anything" in str(why)
    assert agent.away and not service.engine.mechanism.requests
    monkeypatch.undo()
    agent.link.start_wave_agent("strata")
    _until(lambda: agent.away is None)
    assert Client(service).end() == ("done", "length")


def test_an_agent_that_is_stopped_is_away_until_it_goes_on(make, monkeypatch):
    agent = Across(f"shm://serving-stopped-{os.getpid()}", "strata", start=False)
    service = make(agent)
    health = Endpoint(service, "model").health
    pid = agent.link.start_wave_agent("strata")
    agent.link.await_agent(DEADLINE_S)
    service.start()
    assert Client(service).end() == ("done", "length")
    os.kill(pid, signal.SIGSTOP)
    monkeypatch.setattr(driver, "PATIENCE_S", 0.2)
    for _ in range(2):  # the second comes when it is known
        what, why = Client(service).end()
        assert what == "failed" and "no agent has decided anything" in str(why)
        assert asyncio.run(health(None)).status_code == 503
    monkeypatch.undo()
    os.kill(pid, signal.SIGCONT)
    _until(lambda: agent.away is None)
    assert asyncio.run(health(None)).status_code == 200
    assert Client(service).end() == ("done", "length") and agent.restarts == -1


def test_an_agent_that_serve_started_and_that_is_stopped_is_ended_and_another_serves(make, monkeypatch, capfd):
    agent = Across(f"shm://serving-ended-{os.getpid()}", "strata")
    service = make(agent)
    service.start()
    assert Client(service).end() == ("done", "length")
    first = agent.link.await_agent()
    os.kill(first, signal.SIGSTOP)
    monkeypatch.setattr(driver, "PATIENCE_S", 0.2)
    assert Client(service).end()[0] == "failed"
    monkeypatch.undo()
    _until(lambda: agent.restarts == 1 and agent.away is None)
    assert Client(service).end() == ("done", "length")
    assert agent.link.await_agent() != first
    assert capfd.readouterr().err.count("the agent has hung for 0 s: it is ended and another is started\n") == 1


@pytest.mark.parametrize("policy", [HANGS, IDLES], ids=["never returns", "decides nothing"])
def test_who_waits_for_a_policy_that_hangs_is_told_and_another_agent_comes(make, monkeypatch, tmp_path, policy):
    (tmp_path / "bad.py").write_text(policy)
    agent = Across(f"shm://serving-hangs-{os.getpid()}", str(tmp_path / "bad.py"))
    service = make(agent)
    service.start()
    _until(agent.link.peer_joins)
    monkeypatch.setattr(driver, "PATIENCE_S", 1.0)
    what, why = Client(service).end()
    assert what == "failed" and "no agent has decided anything" in str(why)
    monkeypatch.undo()
    _until(lambda: agent.restarts > 0 and agent.link.peer_joins() > 1 and agent.away is None)
    assert service.failed is None


def test_an_agent_that_comes_late_has_its_time_like_any_other(monkeypatch):
    """It is attached a moment before it can give a sign of life."""
    mechanism = Emulated(load_system("strata"), "h100", "llama-3.1-8b", 1, 1, "fast").mechanism
    at_s, calls, away_s = 0.0, [], []
    monkeypatch.setattr(driver, "time", SimpleNamespace(monotonic=lambda: at_s))
    with Across(f"shm://serving-late-{os.getpid()}", "strata") as agent:
        link, child = agent.link, SimpleNamespace(poll=lambda: None)
        agent.link = SimpleNamespace(
            peer_joins=lambda: 0,
            peer_alive=lambda: at_s > 60,
            heartbeat=lambda: 0,
            kill_wave_agent=lambda: calls.append(f"kill at {at_s:g}"),
            start_wave_agent=lambda *orders: setattr(agent.link, "_agent", child),
        )
        for second in range(2, 93):
            at_s = float(second)
            agent.exchange(mechanism)
            away_s += [second] if agent.away else []
        agent.link = link
    assert calls == ["kill at 2", "kill at 92"]  # to begin with, and when it had hung
    assert away_s == [*range(33, 61), 92]


def test_the_time_that_the_server_itself_was_stopped_is_not_its_agents(monkeypatch):
    """Ctrl-Z stops both, and either may go on first."""
    mechanism = Emulated(load_system("strata"), "h100", "llama-3.1-8b", 1, 1, "fast").mechanism
    with Across(f"shm://serving-both-{os.getpid()}", "strata", start=False) as agent:
        pid = agent.link.start_wave_agent("strata")
        agent.link.await_agent(DEADLINE_S)
        os.kill(pid, signal.SIGSTOP)
        agent.exchange(mechanism)
        later_s = time.monotonic() + 3_600
        monkeypatch.setattr(driver, "time", SimpleNamespace(monotonic=lambda: later_s))
        agent.exchange(mechanism)
        assert agent.away is None


def test_a_policy_that_fails_at_every_request_does_not_keep_clients_waiting(make, monkeypatch, tmp_path):
    (tmp_path / "fails.py").write_text(FAILS)
    monkeypatch.setattr(driver, "PATIENCE_S", 3.0)
    agent = Across(f"shm://serving-fails-{os.getpid()}", str(tmp_path / "fails.py"))
    service = make(agent)
    service.start()
    _until(agent.link.peer_alive)
    assert Client(service).end()[0] == "failed"
    assert agent.restarts > 0 and service.failed is None
    _until(lambda: agent.away is None)  # nothing waits, and an agent is there


def test_a_policy_that_never_returns_is_told_of_across_the_network_too(make, monkeypatch, tmp_path):
    """Its agent's process lives, and its loop is not seen from here: what tells is that a decision is due."""
    pytest.importorskip("zmq", reason="the network link needs pyzmq: pip install 'waveos[agent]'")
    (tmp_path / "hangs.py").write_text(HANGS)
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"zmq+tcp://127.0.0.1:{free.getsockname()[1]}"
    keys = Keys(tmp_path / "keys")
    keys.add("dpu", keys.new().public)  # one folder for both sides
    monkeypatch.setenv("WAVE_KEYS", str(keys.folder))
    agent = Across(url, str(tmp_path / "hangs.py"), start=False)
    service = make(agent)
    service.start()
    agent.link.start_wave_agent(str(tmp_path / "hangs.py"))
    _until(agent.link.peer_alive)
    monkeypatch.setattr(driver, "PATIENCE_S", 1.0)
    what, why = Client(service).end()
    assert what == "failed" and "no agent has decided anything" in str(why) and agent.link.peer_alive()


def test_who_comes_while_nobody_decides_is_told_at_once_and_nothing_is_kept_of_it(make):
    agent = InProcess("strata")
    service = make(agent)
    agent.away = "nobody decides"
    service.start()
    assert Client(service).end()[0] == "failed"
    assert not service.engine.mechanism.heard and not service.engine.talks
    assert service.engine.mechanism.said == 1  # of the instance alone


def test_health_is_bad_while_nobody_decides(make):
    agent = InProcess("strata")
    service = make(agent)
    service.start()
    health = Endpoint(service, "model").health
    assert asyncio.run(health(None)).status_code == 200
    agent.away = "nobody decides"
    told = asyncio.run(health(None))
    assert told.status_code == 503 and b"nobody decides" in told.body


@pytest.mark.parametrize(("kind", "asked", "errors"), [(Completion, {"prompt": [{}] * 9}, 3), (Chat, {"messages": [{}] * 9}, 2)])
def test_of_a_list_the_first_wrong_item_is_told_not_a_million(kind, asked, errors):
    """Of `prompt` one for each of the three things that it may be; of a message its two fields."""
    with pytest.raises(ValidationError) as error:
        kind.model_validate({"model": "m", **asked})
    assert error.value.error_count() == errors


@pytest.mark.parametrize("kind", [InProcess, lambda policy: Across(f"shm://serving-other-{os.getpid()}", policy)])
def test_a_policy_of_another_subsystem_is_refused_by_name(kind):
    with pytest.raises(PolicyError, match=r"'fifo' is of subsystem sched, not serving; those of serving: .*strata"):
        kind("fifo")
