"""hostd's two sockets, and what one without privilege may say there: nonsense, too much, too often. It is refused, and hostd's loop goes on."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from waveos.errors import LinkError, MissingError
from waveos.handover import MAX_BYTES, hear, tell
from waveos.host.doors import LINE_BYTES, SAID_BYTES, AgentDoor, Allowed, ControlDoor
from waveos.host.poll import Poll
from waveos.record import VERSION

DEEP = b"[" * 60_000
HELLO = {"hello": {"version": VERSION}}
ALLOWED = Allowed(frozenset({os.geteuid()}))


class House:
    """Both doors, in a loop that takes a turn when it is told to; what their owner was told."""

    def __init__(self, folder: Path) -> None:
        self.poll = Poll()
        self.came: list[Any] = []
        self.refusal: Exception | None = None
        self.lost = 0
        self.agents = AgentDoor(self.poll, folder / "agent.sock", ALLOWED, lambda: {"enclave": "e"}, self._attach, self._gone)
        self.control = ControlDoor(self.poll, folder / "control.sock", ALLOWED, self._do)
        self._lines: list[socket.socket] = []

    def _attach(self, ready: Any) -> tuple[dict[str, Any], list[int]]:
        if self.refusal is not None:
            raise self.refusal
        self.came.append(ready)
        return {"generation": 1}, []

    def _gone(self) -> None:
        self.lost += 1

    def _do(self, request: Any, client: Any) -> None:
        self.came.append(request)
        client.answer({"ok": True})

    def enter(self, door: AgentDoor | ControlDoor) -> socket.socket:
        line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET if door is self.agents else socket.SOCK_STREAM)
        self._lines.append(line)
        line.settimeout(60)
        line.connect(str(door.path))
        self.poll.once()
        return line

    def agent(self) -> socket.socket:
        """One that is attached."""
        line = self.enter(self.agents)
        for message in (HELLO, {"ready": {}}):
            tell(line, message)
            self.poll.once()
            hear(line)
        self.came.clear()
        return line

    def close(self) -> None:
        for line in self._lines:
            line.close()
        self.agents.close()
        self.control.close()
        self.poll.close()


@pytest.fixture
def house(tmp_path) -> Iterator[House]:
    made = House(tmp_path)
    yield made
    made.close()


def refusal(line: socket.socket) -> str:
    """Why; the line is closed with it."""
    told = hear(line)[0]
    with pytest.raises(LinkError, match="gone"):
        hear(line)
    return str(told["refused"])


@pytest.mark.parametrize("message", [DEEP, b'{"hello": ' + DEEP, b'{"report": ' + b"[" * 500 + b"]" * 500 + b"}"], ids=["list", "table", "closed"])
def test_what_is_nested_too_deep_is_another_language(message):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        theirs.send(message)
        with pytest.raises(LinkError, match="another language"):
            hear(ours)


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (DEEP[:SAID_BYTES], "another language"),
        (b'{"report": {"of": ' + b"[" * 500 + b"]" * 500 + b"}}", "another language"),
        (b'{"report": 3}', "no sense"),
        (b'{"hello": {}}', "no sense"),
        (b'{"hello": {"version": [9]}}', "version [9]"),
    ],
)
def test_an_agent_that_speaks_nonsense_is_told_so_and_the_next_one_may_come(house, message, says):
    line = house.agent()
    line.send(message)
    house.poll.once()
    assert says in refusal(line)
    assert house.lost == 1
    house.agent()


def test_an_agent_whose_enclave_cannot_be_had_is_told_why(house):
    house.refusal = MissingError("cannot register wave_ops: the kernel has one already")
    line = house.enter(house.agents)
    tell(line, {"ready": {}})
    house.poll.once()
    assert refusal(line) == "cannot register wave_ops: the kernel has one already"
    assert house.agents.agent is None and house.lost == 0, "it was never attached"
    house.refusal = None
    house.agent()


def test_an_agent_that_says_much_at_once_is_heard_message_by_message(house):
    line = house.agent()
    for _ in range(5):
        tell(line, HELLO)
    line.setblocking(False)
    for _ in range(5):
        house.poll.once()
        assert "facts" in hear(line)[0]
        with pytest.raises(BlockingIOError):
            hear(line)


def test_an_agent_says_much_only_when_it_is_asked(house):
    large = {"report": {"event_ns": [[n, 1] for n in range(100_000, 109_000)]}}
    assert MAX_BYTES - 20_000 < len(json.dumps(large)) < MAX_BYTES
    line, answers = house.agent(), list[Any]()
    house.agents.ask("report", {"report": {}}, answers.append)
    tell(line, large)
    house.poll.once()
    assert answers == [large]
    assert "report" in hear(line)[0]
    tell(line, large)
    house.poll.once()
    assert "another language" in refusal(line)


def test_an_agent_has_no_descriptors_to_give(house):
    line = house.agent()
    with open(os.devnull) as file:
        tell(line, HELLO, [file.fileno()])
    before = set(os.listdir("/proc/self/fd"))
    house.poll.once()
    assert "another language" in refusal(line)
    assert set(os.listdir("/proc/self/fd")) < before, "its line was closed, and nothing came"


def test_a_client_that_nests_too_deep_is_told_what_to_write(house):
    line = house.enter(house.control)
    answers = line.makefile()
    for nonsense in (b"[" * (LINE_BYTES - 1), b'{"do": ' + b"[" * 10_000, b'{"do": "status", "of": ' + b"{" * 10_000):
        line.sendall(nonsense + b"\n")
        house.poll.once()
        assert "write one JSON object a line" in json.loads(answers.readline())["error"]
    line.sendall(b'{"do": "status"}\n')
    house.poll.once()
    assert json.loads(answers.readline()) == {"ok": True}


def test_a_client_that_asks_much_at_once_is_answered_line_by_line(house):
    line = house.enter(house.control)
    line.sendall(b"".join(b'{"do": "%d"}\n' % n for n in range(5)) + b'{"do": ')
    for n in range(5):
        house.poll.once()
        assert house.came == [{"do": str(each)} for each in range(n + 1)]
    house.poll.once()
    line.sendall(b'"5"}\n')
    house.poll.once()
    assert house.came[-1] == {"do": "5"}


def test_a_line_without_an_end_is_heard_up_to_a_limit(house):
    line = house.enter(house.control)
    line.sendall(b" " * (LINE_BYTES + 1))
    house.poll.once()
    house.poll.once()
    assert f"at most {LINE_BYTES} bytes" in json.loads(line.makefile().readline())["error"]
