"""An enclave of this machine whose agent is elsewhere: hostd (over a simulated mechanism), `wave relay` and a listening agentd, each a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from two_machines import Machines, until

from waveos import sched
from waveos.agents import agentd
from waveos.cli import run
from waveos.errors import ConfigError, LinkError
from waveos.host import doors, relay, restore
from waveos.keys import Keys
from waveos.policy import load_policy

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="hostd is root's")
FAKE = Path(__file__).parents[1] / "host" / "fake_hostd.py"


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    agentd._compile()
    load_policy("fifo").bind(n_cpus=1)


class Enclave:
    """Sleepers in an enclave of a simulated hostd, which has no agent of its own."""

    def __init__(self, machines: Machines, folder: Path) -> None:
        self.machines, self.name = machines, f"test-{os.getpid()}"
        sleepers = [subprocess.Popen(["sleep", "1000"], text=True) for _ in range(3)]
        machines.processes += sleepers
        pids = ",".join(str(each.pid) for each in sleepers)
        command = [sys.executable, "-P", str(FAKE), "--enclave", self.name, "--cpus", "0", "--pids", pids, "--no-agent"]
        self.hostd = subprocess.Popen(command, text=True, stderr=subprocess.PIPE)
        machines.processes.append(self.hostd)
        self.relay = machines.wave(machines.host, "relay", self.name, machines.url)

    def status(self) -> dict[str, Any] | None:
        try:
            return doors.ask(self.name, {"do": "status"})
        except ConfigError:
            return None

    def rounds(self) -> list[int]:
        status = self.status()
        return status["counters"]["rounds"] if status and status["agent"] else []

    def goes_on(self) -> None:
        """Every member runs again and again, from now on."""
        before = until(self.rounds)
        until(lambda: (now := self.rounds()) and all(b - a >= 3 for a, b in zip(before, now, strict=True)), "a thread is stuck")


@pytest.fixture
def enclave(machines, tmp_path, monkeypatch) -> Iterator[Enclave]:
    monkeypatch.setenv("WAVE_RUN", str(tmp_path))
    monkeypatch.setattr(restore, "RUN", tmp_path)
    return Enclave(machines, tmp_path)


def test_an_enclave_goes_on_through_the_loss_of_agent_relay_and_hostd(machines, enclave):
    agent = machines.agentd("fifo")
    enclave.goes_on()
    assert enclave.status()["policy"] == "fifo"
    assert enclave.status()["report"]["far"] == machines.url
    agent.kill()
    until(lambda: not enclave.status()["agent"], "the relay stays although its agent is lost")
    machines.agentd("fifo")
    enclave.goes_on()
    enclave.relay.kill()
    until(lambda: not enclave.status()["agent"])
    enclave.relay = machines.wave(machines.host, "relay", enclave.name, machines.url)
    enclave.goes_on()
    assert enclave.status()["agents_lost"] >= 2  # the relay may try between the two


def test_the_same_through_a_bar_and_the_agent_takes_what_the_host_says_of_the_enclave(machines, tmp_path, monkeypatch, request):
    machines.device = tmp_path / "memory"
    machines.device.write_bytes(bytes(1 << 20))
    enclave = request.getfixturevalue("enclave")
    agent = machines.agentd("fifo")
    enclave.goes_on()
    assert (enclave.status()["policy"], enclave.status()["report"]["far"]) == ("fifo", machines.url)
    agent.send_signal(signal.SIGSTOP)
    until(lambda: not enclave.status()["agent"], "the relay stays although its agent is silent")
    agent.send_signal(signal.SIGCONT)
    enclave.goes_on()
    agent.kill()
    until(lambda: not enclave.status()["agent"], "the relay stays although its agent is lost")
    agent.wait()
    machines.agentd("fifo")
    enclave.goes_on()
    enclave.relay.kill()
    until(lambda: not enclave.status()["agent"])
    enclave.relay.wait()
    enclave.relay = machines.wave(machines.host, "relay", enclave.name, machines.url)
    enclave.goes_on()
    with machines.device.open("r+b") as memory:
        memory.write(bytes(1 << 20))  # the device was reset: the relay lays it out anew, and the agent comes back
    until(lambda: enclave.status()["agents_lost"] >= 4, "the relay goes on as if nothing had happened")
    enclave.goes_on()


def test_a_policy_of_the_far_side_is_changed_there(machines, enclave):
    machines.agentd("fifo")
    enclave.goes_on()
    answer = doors.ask(enclave.name, {"do": "set-policy", "policy": "shinjuku"})
    assert not answer["ok"] and "change it there" in answer["error"]
    enclave.goes_on()


def test_the_relay_ends_when_it_is_told_to_and_the_enclave_keeps_its_threads(machines, enclave):
    machines.agentd("fifo")
    enclave.goes_on()
    enclave.relay.send_signal(signal.SIGTERM)
    assert enclave.relay.wait(60) == 0
    until(lambda: not enclave.status()["agent"])
    assert enclave.hostd.poll() is None


def test_an_enclave_of_another_subsystem_ends_the_relay_with_a_line(machines, enclave):
    enclave.relay.kill()
    wrong = machines.wave(machines.host, "relay", enclave.name, machines.url, "--subsystem", "memory")
    said = wrong.communicate(timeout=60)[1]
    assert wrong.returncode == 2 and "not for memory: say with --subsystem" in said.splitlines()[-1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda keys, public: (keys.folder / "own.toml").unlink(), "this machine has no key"),
        (lambda keys, public: keys.new(days=1e-9, replace=True), "own key has expired"),
        (lambda keys, public: keys.revoke("dpu"), "no peer is known"),
        (lambda keys, public: keys.add("other", "0" * 64), "say which is meant"),
    ],
)
def test_a_relay_says_what_is_wrong_with_its_keys_before_it_waits(machines, tmp_path, monkeypatch, capsys, change, says):
    monkeypatch.setattr(restore, "RUN", tmp_path)
    monkeypatch.setenv("WAVE_KEYS", str(machines.host.folder))
    change(machines.host, machines.dpu.own().public)
    assert run(["relay", "web", machines.url]) == 4
    assert says in capsys.readouterr().err


def test_a_relay_whose_keys_go_wrong_while_it_waits_says_so_once_and_goes_on_when_they_are_mended(machines, tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(relay, "_say", said.append)
    made, public = relay.Relay("shm:///none", machines.url, sched, keys=Keys(tmp_path / "empty")), machines.dpu.own().public
    for _ in range(3):
        with pytest.raises(LinkError, match="has no key"):
            made._prepare({"enclave": "web"})
    assert len(said) == 1
    Keys(tmp_path / "empty").add("dpu", public)
    machines.dpu.add("late", Keys(tmp_path / "empty").new().public)
    machines.agentd("fifo")
    assert made._prepare({"enclave": "web"})["policy"] == "fifo"
    made.far.close()


@pytest.mark.parametrize(("name", "says"), [("shm://web", "shm:///run/wave/web/agent.sock"), ("../x", "cannot name an enclave")])
def test_what_names_no_enclave_is_told_how_to_write_it(machines, capsys, name, says):
    assert run(["relay", name, machines.url]) == 2
    assert says in capsys.readouterr().err
