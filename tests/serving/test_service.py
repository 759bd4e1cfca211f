"""The thread between clients and engine: what becomes of a client's request when something is wrong with it, with the agent, or with the engine."""

from __future__ import annotations

import asyncio
import os
import queue
import time

import pytest
from pydantic import ValidationError

from waveos.errors import PolicyError, WaveError
from waveos.ipu_emulator.serving.live import Emulated
from waveos.ipu_emulator.serving.simulate import load_system
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
    agent.link.start_wave_agent("strata")
    _until(lambda: agent.away is None)
    assert Client(service).end() == ("done", "length")


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
