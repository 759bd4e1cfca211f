"""The network's agent at its end: a signal is seen between two steps, whatever it is in the middle of and whatever it waits for."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from waveos import net
from waveos.agents.net import agent
from waveos.errors import LinkError
from waveos.handover import hear, tell

DEADLINE_S = 60.0


class Queues:
    """A link of queues; a signal comes while decisions are laid into them."""

    def __init__(self, room: int) -> None:
        self.room, self.handed_over, self.closed = room, 0, False

    def poll_messages(self, _limit: int, wait_ns: int) -> Any:
        return np.zeros(1, net.MESSAGE)

    def txn_create(self, n: int) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return np.zeros(n, net.DECISION)

    def txns_commit(self) -> int:
        self.handed_over += self.room
        return self.room

    def check(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("room", [3, 0])
def test_a_signal_in_the_middle_of_a_hand_over_ends_the_agent_after_it_or_when_there_is_no_room(monkeypatch, room):
    queues = Queues(room)
    monkeypatch.setattr(agent, "open_link", lambda *_, **__: queues)
    monkeypatch.setattr(agent, "_bind", lambda *_: (None, {"failed": [0]}))
    monkeypatch.setattr(agent, "feed_all", lambda _runtime, records, _first, _out: (len(records), 3))
    with pytest.raises(SystemExit) as ended:
        agent.main(["shm://x", "jbsq", "--nice", "0"])
    assert (ended.value.code, queues.closed) == (0, True)
    assert queues.handed_over == (6 if room else 0), "what was decided on the message, and on the batch's end"


class Packets:
    """A data path; a signal comes while it is served."""

    def __init__(self) -> None:
        self.served, self.told, self.closed = 0, list[Any](), False

    def serve(self, _runtime: Any, _until_ns: int) -> bool:
        signal.raise_signal(signal.SIGINT)
        self.served += 1
        return True

    def counters(self) -> dict[str, int]:
        return {"requests": self.served}

    def requests(self) -> list[Any]:
        return []

    def tell(self, message: Any) -> None:
        self.told.append(message["report"]["counters"])

    def close(self) -> None:
        self.closed = True


def test_a_signal_ends_a_data_path_after_the_slice_that_is_served_and_its_counters_are_told(monkeypatch):
    packets = Packets()

    def open_link(_url: str, prepare: Any, **_: Any) -> Packets:
        prepare({"workers": 1})
        return packets

    monkeypatch.setattr(agent, "open_link", open_link)
    monkeypatch.setattr(agent, "_bind", lambda *_: (None, None))
    with pytest.raises(SystemExit) as ended:
        agent.main(["xsk:///x", "jbsq", "--nice", "0"])
    assert (ended.value.code, packets.closed, packets.told) == (0, True, [{"requests": 1}])


class Silent:
    """A host's door that lets everybody in and answers nothing; `told` is called with each message."""

    def __init__(self, path: Path, told: Any) -> None:
        self._door, self._told = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET), told
        self._door.bind(str(path))
        self._door.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        line, _ = self._door.accept()
        with line:
            try:
                while True:
                    self._told(line, hear(line)[0])
            except LinkError:
                return

    def close(self) -> None:
        self._door.close()


PATIENT = "import sys; from waveos.host.net import link; link.ANSWER_S = 1e6; from waveos.agents.net.agent import main; sys.exit(main())"


def test_an_agent_whose_host_says_nothing_ends_when_it_is_told_to(tmp_path):
    heard = threading.Event()
    door = Silent(tmp_path / "sock", lambda _line, _message: heard.set())
    waiting = subprocess.Popen([sys.executable, "-P", "-c", PATIENT, f"xsk://{tmp_path / 'sock'}", "jbsq"], stderr=subprocess.PIPE, text=True)
    try:
        assert heard.wait(DEADLINE_S)
        waiting.terminate()
        _, said = waiting.communicate(timeout=DEADLINE_S)
        assert (waiting.returncode, said) == (0, "")
    finally:
        waiting.kill()
        waiting.wait()
        door.close()


def test_an_agent_that_waits_for_new_ports_ends_when_it_is_told_to(tmp_path, monkeypatch):
    from waveos.host.net import link

    class Ports:
        heartbeat_at = 0
        control = np.zeros(1, [("heartbeat_ns", "i8"), ("gone", "i8")])

        def close(self) -> None:
            pass

    def told(line: socket.socket, message: Any) -> None:
        if "hello" in message:
            tell(line, {"facts": {"subsystem": net.SUBSYSTEM, "workers": 1}})
        elif "ready" in message and not asked:
            asked.append(message)
            tell(line, {"attached": {"client": "", "host": "", "port": 1}}, [0] * link.DESCRIPTORS)
            tell(line, {"set-policy": {"policy": "jbsq"}})
        elif "ready" in message:
            os.kill(os.getpid(), signal.SIGTERM)

    def attach(_facts: bytes, descriptors: list[int], share: Any = None) -> Ports:
        for each in descriptors:
            os.close(each)
        return Ports()

    asked: list[Any] = []
    monkeypatch.setattr(link, "ANSWER_S", 1e6)
    monkeypatch.setattr(link.Port, "attach", attach)
    monkeypatch.setattr(link.XskLink, "serve", lambda *_: True)
    monkeypatch.setattr(agent, "_bind", lambda *_: (None, None))
    door = Silent(tmp_path / "sock", told)
    with pytest.raises(SystemExit) as ended:
        agent.main([f"xsk://{tmp_path / 'sock'}", "jbsq", "--nice", "0"])
    assert ended.value.code == 0
    door.close()
