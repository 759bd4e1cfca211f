"""An enclave of this machine whose agent is elsewhere: hostd (over a simulated mechanism), `wave relay` and a listening agentd, each a process."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from two_machines import Machines, until

from waveos import sched
from waveos.agents import agentd
from waveos.cli import run
from waveos.errors import ConfigError, LinkError
from waveos.handover import hear, tell
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


class Door:
    """hostd's door, as far as an agent sees of it: it answers who comes in with `answer`, and keeps what it heard; without one it says nothing."""

    def __init__(self, path: Path, answer: dict[str, Any] | None) -> None:
        self.url, self.heard, self._answer = f"shm://{path}", list[dict[str, Any]](), answer
        self._door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._door.bind(str(path))
        self._door.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                line, _ = self._door.accept()
            except OSError:
                return
            with line, contextlib.suppress(LinkError):
                while True:
                    self.heard.append(hear(line)[0])
                    if self._answer is not None and "hello" in self.heard[-1]:
                        tell(line, self._answer)

    def close(self) -> None:
        self._door.shutdown(socket.SHUT_RDWR)
        self._door.close()


@pytest.fixture
def facts() -> dict[str, Any]:
    return {"facts": {"subsystem": sched.SUBSYSTEM, "enclave": "web", "cpus": 1}}


def test_a_relay_whose_keys_go_wrong_while_it_waits_says_so_once_and_goes_on_when_they_are_mended(machines, tmp_path, monkeypatch, facts):
    said: list[str] = []
    ended = threading.Event()
    monkeypatch.setattr(relay, "_say", said.append)

    def look() -> None:
        if ended.is_set():
            raise SystemExit

    def serve() -> None:
        with contextlib.suppress(SystemExit):
            relay.Relay(door.url, machines.url, sched, look, keys=keys).run()

    door, keys, public = Door(tmp_path / "sock", facts), Keys(tmp_path / "empty"), machines.dpu.own().public
    running = threading.Thread(target=serve)
    running.start()
    try:
        until(lambda: said)
        tries = len(door.heard)
        until(lambda: len(door.heard) > tries + 5)
        assert len(said) == 1 and "has no key" in said[0]
        keys.add("dpu", public)
        machines.dpu.add("late", keys.new().public)
        machines.agentd("fifo")
        until(lambda: any(message.get("ready", {}).get("policy") == "fifo" for message in door.heard), str(said))
    finally:
        ended.set()
        running.join()
        door.close()


# ── how it waits, and how it ends ────────────────────────────────────────────────────────────────────────────────────


def test_a_relay_whose_enclave_has_an_agent_says_once_what_it_waits_for(machines, enclave):
    enclave.relay.kill()
    enclave.relay.wait()
    until(enclave.status)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as agent:
        agent.connect(str(restore.path_of(enclave.name).with_name("agent.sock")))
        waiting = machines.wave(machines.host, "relay", enclave.name, machines.url)
        until(lambda: enclave.status()["agents_refused"] >= 15, "it does not try again and again")
        waiting.send_signal(signal.SIGTERM)
        said = waiting.communicate(timeout=60)[1].splitlines()
    assert waiting.returncode == 0
    assert said == [f"relay: waits: the enclave already has an agent (pid {os.getpid()}): stop that one first"]


PATIENT = "import sys; from waveos.cli import run; from waveos.link import handed; handed.ANSWER_S = 1e6; sys.exit(run(sys.argv[1:]))"


@pytest.mark.parametrize("what", ["a hostd", "a word of hostd", "an agent"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_relay_that_waits_ends_when_it_is_told_to_whatever_it_waits_for(machines, tmp_path, facts, what, number):
    path = tmp_path / "sock"
    door = Door(path, facts if what == "an agent" else None) if what != "a hostd" else None
    command = [sys.executable, "-P", "-c", PATIENT, "relay", f"shm://{path}", machines.url]
    waiting = subprocess.Popen(command, env={**os.environ, "WAVE_KEYS": str(machines.host.folder)}, stderr=subprocess.PIPE, text=True)
    machines.processes.append(waiting)
    assert waiting.stderr is not None
    if door is None or what == "an agent":
        assert ("there is no" if door is None else f"waits for an agent at {machines.url}") in waiting.stderr.readline()
    else:
        until(lambda: door.heard)
    waiting.send_signal(number)
    assert waiting.wait(60) == 0
    assert waiting.stderr.read() == ""
    if door is not None:
        door.close()


class Far:
    """The other end, with decisions to be handed over once."""

    policy, trouble = "fifo", ""

    def __init__(self) -> None:
        self.decisions, self.closed = np.zeros(3, sched.DECISION), False

    def poll_txns(self, _limit: int) -> Any:
        taken, self.decisions = self.decisions, self.decisions[:0]
        return taken

    def peer_alive(self) -> bool:
        return True

    def peer_joins(self) -> int:
        return 0

    def room(self, n: int) -> int:
        return n

    def close(self) -> None:
        self.closed = True


class Near(contextlib.AbstractContextManager[Any]):
    """hostd's rings; a signal comes while decisions are laid into them."""

    handed = None
    txns_memory = np.zeros(64, np.int64)

    def __init__(self) -> None:
        self.handed_over, self.closed = 0, False

    def txn_create(self, n: int) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return np.zeros(n, sched.DECISION)

    def txns_commit(self) -> int:
        self.handed_over += 3
        return 3

    def poll_messages(self, _limit: int) -> Any:
        return np.zeros(0, sched.MESSAGE)

    def check(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.closed = True


def test_a_signal_in_the_middle_of_a_hand_over_ends_the_relay_after_it(machines, monkeypatch):
    near, far = Near(), Far()

    class Joined(relay.Relay):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.far = far

    monkeypatch.setattr(relay, "Relay", Joined)
    monkeypatch.setattr(relay, "ShmLink", lambda *_, **__: near)
    with pytest.raises(SystemExit) as ended:
        relay.run_relay("shm:///near", machines.url, sched, keys=machines.host.folder)
    assert (ended.value.code, near.handed_over, near.closed, far.closed) == (0, 3, True, True)


@pytest.mark.parametrize(("name", "says"), [("shm://web", "shm:///run/wave/web/agent.sock"), ("../x", "cannot name an enclave")])
def test_what_names_no_enclave_is_told_how_to_write_it(machines, capsys, name, says):
    assert run(["relay", name, machines.url]) == 2
    assert says in capsys.readouterr().err
