"""agentd tells of itself whoever connects, between two slices of its loop, and never waits for a reader."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time

import pytest

from waveos.agents.teller import READERS, Teller
from waveos.errors import ConfigError
from waveos.link import open_link
from waveos.watch import source

DEADLINE_S = 300.0


class Enclave:
    """One that tells this."""

    def __init__(self, document: dict) -> None:
        self._document = document

    def tell(self) -> dict:
        return self._document


@pytest.fixture
def teller(tmp_path):
    made = Teller(tmp_path / "agentd.sock")
    yield made
    made.close()


def read(teller: Teller, line: socket.socket, enclaves: list[dict]) -> dict:
    line.setblocking(False)
    heard = b""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        teller.step([Enclave(each) for each in enclaves])
        try:
            data = line.recv(65_536)
        except BlockingIOError:
            continue
        if not data:
            return json.loads(heard)
        heard += data
    raise AssertionError("never told")


def connect(teller: Teller) -> socket.socket:
    line = socket.socket(socket.AF_UNIX)
    line.connect(str(teller.path))
    return line


def test_a_reader_gets_one_document_however_long(teller):
    enclaves = [{"enclave": "x" * 1_000, "serving": True} for _ in range(2_000)]  # more than a socket takes at once
    with connect(teller) as line:
        told = read(teller, line, enclaves)
    assert told["enclaves"] == enclaves and told["serving"] == 2_000 and told["up_s"] >= 0


def test_a_reader_that_does_not_read_is_not_waited_for_and_does_not_keep_others_out(teller, monkeypatch):
    monkeypatch.setattr("waveos.agents.teller.PATIENCE_S", 0.0)
    lines = [connect(teller) for _ in range(READERS)]
    teller.step([Enclave({"enclave": "x" * 10_000_000, "serving": True})])
    with connect(teller) as line:
        assert read(teller, line, [])["enclaves"] == []
    for each in lines:
        each.close()


def test_nothing_is_made_for_nobody(teller):
    class Silent:
        def tell(self) -> dict:
            pytest.fail("nobody asked")

    teller.step([Silent()])


def test_a_socket_left_by_a_killed_agentd_is_taken_over_a_living_ones_is_not(tmp_path):
    path = tmp_path / "agentd.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    first = Teller(path)
    with pytest.raises(ConfigError, match=r"--status .*agentd.sock: Address already in use"):
        Teller(path)
    first.close()
    assert not path.exists()


def test_a_place_that_cannot_be_one_is_said_in_a_line(tmp_path):
    with pytest.raises(ConfigError, match="name a socket that is not there yet"):
        Teller(tmp_path / "no" / "folder.sock")


def test_a_running_agentd_tells_whom_it_serves(tmp_path):
    from waveos import sched

    path, name = tmp_path / "a.sock", f"teller-{time.monotonic_ns()}"
    with open_link(f"shm://{name}", side="host", subsystem=sched) as host:
        host.create_queue("messages", 256)
        host.create_queue("txns", 256)
        command = [sys.executable, "-P", "-m", "waveos.agents.agentd", f"shm://{name}", "fifo", "--status", str(path), "--cpus", "1"]
        agent = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            deadline = time.monotonic() + DEADLINE_S
            told: dict = {}
            while not told.get("serving"):
                assert time.monotonic() < deadline and agent.poll() is None
                if path.exists():
                    told = source.agent_status(path)
                time.sleep(0.02)
        finally:
            agent.send_signal(signal.SIGTERM)
            agent.communicate()
    [served] = told["enclaves"]
    assert (served["enclave"], served["host"], served["policy"]) == (f"shm://{name}", "", "fifo")
    assert served["report"]["messages"] == 0 and told["pid"] == agent.pid
    assert not path.exists(), "it tidies up"
