"""hostd's two sockets in /run/wave/NAME: `agent.sock`, where one agent is handed the enclave's queues, and `control.sock`, where people ask and order.

Who connects is known from the kernel (SO_PEERCRED, SO_PEERGROUPS). The agent's protocol is `waveos.handover`'s; control is one JSON object a line each
way: {"do": "status"}, {"do": "watch"}, {"do": "set-policy", "policy": NAME, "params": {...}}, {"do": "stop"}; answered by {"ok": true, ...} or
{"ok": false, "error": line}. A status with "detail": true tells of each CPU; "watch" hands over the two queues' memory, for root to look at
(wave trace --live).
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from waveos.errors import ConfigError, LinkError, WaveError
from waveos.handover import MAX_BYTES, Message, hear, tell
from waveos.host.poll import Poll
from waveos.host.restore import names, owner_alive, path_of, read
from waveos.record import VERSION

_SO_PEERGROUPS = 59
LINE_BYTES = 16_384
"""Of a question at the control door."""
SAID_BYTES = 16_384
"""Of what an agent says unasked: ours say a few hundred, and 8 KiB where a policy's name and parameters are as long as they may be. A report that it was
asked for may have the 128 KiB of any message: with the times that it measures (`--measure`) it has up to three histograms of 1,000 bins, some 60 KB."""
CLIENTS = 32


@dataclass(frozen=True)
class Peer:
    """Who is at the other end of a socket."""

    pid: int
    uid: int
    gids: frozenset[int]

    @classmethod
    def of(cls, line: socket.socket) -> Peer:
        """As the kernel says."""
        pid, uid, gid = struct.unpack("=iII", line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        with contextlib.suppress(OSError):
            more = line.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 4 * 256)
            return cls(pid, uid, frozenset((gid, *struct.unpack(f"={len(more) // 4}I", more))))
        return cls(pid, uid, frozenset((gid,)))


@dataclass(frozen=True)
class Allowed:
    """Who may connect: these users, and members of the group."""

    uids: frozenset[int]
    gid: int | None = None

    def admits(self, peer: Peer) -> bool:
        """Whether this one may."""
        return peer.uid in self.uids or (self.gid is not None and self.gid in peer.gids)


def listen(path: Path, kind: int, allowed: Allowed) -> socket.socket:
    """A socket at that path, in place of one that a dead owner left, open to its owner and group alone. Raises ConfigError."""
    door = socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        path.unlink(missing_ok=True)
        door.bind(str(path))
        os.chmod(path, 0o660)
        others = sorted(allowed.uids - {0, os.geteuid()})
        if others or allowed.gid is not None:
            os.chown(path, others[0] if others else -1, -1 if allowed.gid is None else allowed.gid)
        door.listen(CLIENTS)
    except OSError as error:
        door.close()
        raise ConfigError(f"cannot listen at {path}: {error.strerror}") from error
    return door


class AgentDoor:
    """Where an agent comes in. At most one is inside; `agent` is who."""

    def __init__(
        self,
        poll: Poll,
        path: Path,
        allowed: Allowed,
        facts: Callable[[], Message],
        attach: Callable[[Message], tuple[Message, list[int]]],
        gone: Callable[[], None],
    ) -> None:
        """facts: told to whoever comes. attach(about): it is ready; what to answer, with descriptors; a WaveError it raises is told, and the agent shown out.
        gone(): it was attached and is gone."""
        self._poll, self._allowed, self._facts, self._attach, self._gone = poll, allowed, facts, attach, gone
        self.path = path
        self._door = listen(path, socket.SOCK_SEQPACKET, allowed)
        self._line: socket.socket | None = None
        self.agent: Peer | None = None
        self.attached = False
        self.refused = 0
        self._asked: dict[str, list[Callable[[Message | None], None]]] = {"ready": [], "report": []}
        poll.add(self._door.fileno(), self._come)

    def _come(self) -> None:
        with contextlib.suppress(BlockingIOError):
            line, _ = self._door.accept()
            line.setblocking(False)
            peer = Peer.of(line)
            why = ""
            if not self._allowed.admits(peer):
                why = f"user {peer.uid} (pid {peer.pid}) may not be this enclave's agent: hostd's --agent-user or --group says who may"
            elif self.agent is not None:
                why = f"the enclave already has an agent (pid {self.agent.pid}): stop that one first"
            if why:
                self.refused += 1
                with contextlib.suppress(LinkError):
                    tell(line, {"refused": why, "final": self.agent is None or not self._allowed.admits(peer)})
                line.close()
                return
            self._line, self.agent = line, peer
            self._poll.add(line.fileno(), self._heard)

    def _heard(self) -> None:
        """One message a call, for the loop has other duties between two; epoll tells again of what is left."""
        line = self._line
        assert line is not None
        try:
            # An agent has no descriptors to give. The kernel closes those not taken; to close a file of the agent's own file system may fail, or never end.
            message, _ = hear(line, MAX_BYTES if self._asked["report"] else SAID_BYTES, max_descriptors=0)
            self._take(line, message)
        except BlockingIOError:
            return
        except WaveError as error:
            self._refuse(str(error))
        except (KeyError, TypeError, AttributeError):
            self._refuse("that makes no sense")

    def _take(self, line: socket.socket, message: Message) -> None:
        if "hello" in message:
            if (version := message["hello"]["version"]) != VERSION:
                self._refuse(f"the agent speaks version {version} of the contract, hostd version {VERSION}: install the same waveos for both")
            else:
                tell(line, {"facts": self._facts()})
        elif "ready" in message:
            told, descriptors = self._attach(message["ready"])
            self.attached = True
            tell(line, {"attached": told}, descriptors)
            self._answer("ready", message)
        elif "unwilling" in message:
            self._answer("ready", message)
        elif "report" in message:
            if not isinstance(message["report"], dict):
                raise TypeError
            self._answer("report", message)

    def _answer(self, about: str, message: Message | None) -> None:
        waiting, self._asked[about] = self._asked[about], []
        for call in waiting:
            call(message)

    def ask(self, about: str, request: Message, answered: Callable[[Message | None], None]) -> None:
        """Ask the agent; `answered` gets its "ready" (or "unwilling") or "report", or None if it goes before it has said."""
        if self._line is None or not self.attached:
            answered(None)
            return
        self._asked[about].append(answered)
        if about == "report" and len(self._asked[about]) > 1:
            return  # one report answers all who ask meanwhile, however many they are
        try:
            tell(self._line, request)
        except LinkError:
            self._refuse("")

    def _refuse(self, why: str) -> None:
        """Show the agent out."""
        line, self._line = self._line, None
        if line is None:
            return
        if why:
            with contextlib.suppress(LinkError):
                tell(line, {"refused": why, "final": True})
        self._poll.remove(line.fileno())
        line.close()
        was, self.agent, self.attached = self.attached, None, False
        if was:
            self._gone()
        for about in self._asked:
            self._answer(about, None)

    def close(self) -> None:
        """Show the agent out, and lock the door."""
        self._refuse("")
        self._poll.remove(self._door.fileno())
        self._door.close()
        self.path.unlink(missing_ok=True)


class Client:
    """One who asks at the control door."""

    def __init__(self, line: socket.socket, peer: Peer) -> None:
        self.line, self.peer, self.heard = line, peer, b""

    def answer(self, message: Message, descriptors: list[int] | None = None) -> None:
        """One line, with descriptors at its begin. A client that does not read its answers is shown out."""
        data = json.dumps(message, default=_plain).encode() + b"\n"
        try:
            if descriptors:
                data = data[socket.send_fds(self.line, [data], descriptors) :]
            self.line.sendall(data)
        except OSError:
            with contextlib.suppress(OSError):
                self.line.shutdown(socket.SHUT_RDWR)  # the next that is heard of it is its end


class ControlDoor:
    """Where people ask. `do(request, client)` answers by `client.answer`, now or later."""

    def __init__(self, poll: Poll, path: Path, allowed: Allowed, do: Callable[[Message, Client], None]) -> None:
        self._poll, self._allowed, self._do = poll, allowed, do
        self.path = path
        self._door = listen(path, socket.SOCK_STREAM, allowed)
        self._clients: dict[int, Client] = {}
        poll.add(self._door.fileno(), self._come)

    def _come(self) -> None:
        with contextlib.suppress(BlockingIOError):
            line, _ = self._door.accept()
            peer = Peer.of(line)
            client = Client(line, peer)
            line.setblocking(False)
            line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            if not self._allowed.admits(peer) or len(self._clients) >= CLIENTS:
                why = "too many ask at once" if self._allowed.admits(peer) else f"user {peer.uid} may not ask this enclave's hostd"
                client.answer({"ok": False, "error": why})
                line.close()
                return
            self._clients[line.fileno()] = client
            self._poll.add(line.fileno(), lambda: self._heard(client))

    def _heard(self, client: Client) -> None:
        """One line a call, for the loop has other duties between two; the next stays in the socket, so epoll tells of it."""
        try:
            ahead = client.line.recv(LINE_BYTES, socket.MSG_PEEK)
            data = client.line.recv(ahead.find(b"\n") + 1 or len(ahead)) if ahead else b""
        except BlockingIOError:
            return
        except OSError:
            data = b""
        client.heard += data
        if len(client.heard) > LINE_BYTES:
            client.answer({"ok": False, "error": f"a line has at most {LINE_BYTES} bytes"})
            data = b""
        if not data:
            self._drop(client)
        elif data.endswith(b"\n"):
            line, client.heard = client.heard, b""
            try:
                request: Any = json.loads(line)
                if not isinstance(request, dict) or not isinstance(request.get("do"), str):
                    raise ValueError
            except (ValueError, RecursionError):
                client.answer({"ok": False, "error": 'write one JSON object a line, such as {"do": "status"}'})
            else:
                self._do(request, client)

    def _drop(self, client: Client) -> None:
        self._poll.remove(client.line.fileno())
        self._clients.pop(client.line.fileno(), None)
        client.line.close()

    def close(self) -> None:
        """Lock the door."""
        for client in list(self._clients.values()):
            self._drop(client)
        self._poll.remove(self._door.fileno())
        self._door.close()
        self.path.unlink(missing_ok=True)


def ask(name: str, request: Message, timeout_s: float = 5.0) -> Message:
    """Ask the hostd of that enclave; its answer. Raises ConfigError if there is none, LinkError if it does not answer."""
    answer, descriptors = ask_for(name, request, timeout_s)
    for each in descriptors:
        os.close(each)
    return answer


def ask_for(name: str, request: Message, timeout_s: float = 5.0) -> tuple[Message, list[int]]:
    """Likewise, with the descriptors that come with the answer; they are the caller's to close."""
    path = path_of(name).with_name("control.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as line:
        line.settimeout(timeout_s)
        try:
            line.connect(str(path))
            line.sendall(json.dumps(request).encode() + b"\n")
            heard, descriptors, _, _ = socket.recv_fds(line, 1 << 20, 8, socket.MSG_CMSG_CLOEXEC)
            while not heard.endswith(b"\n"):
                if not (data := line.recv(1 << 20)):
                    raise LinkError(f"the hostd of {name!r} went away before it answered")
                heard += data
        except (FileNotFoundError, ConnectionRefusedError):
            raise ConfigError(f"no hostd runs for an enclave {name!r}; those that do: {', '.join(running()) or 'none'}") from None
        except PermissionError:
            raise ConfigError(f"{path} is not for this user: ask as root, or as a member of the group that hostd was told") from None
        except TimeoutError:
            raise LinkError(f"the hostd of {name!r} does not answer within {timeout_s:g} s") from None
        except (ConnectionResetError, BrokenPipeError):
            raise LinkError(f"the hostd of {name!r} went away before it answered") from None
    return json.loads(heard), descriptors


def running() -> list[str]:
    """The enclaves that have a live hostd."""
    found = []
    for name in names():
        with contextlib.suppress(WaveError, OSError):
            if owner_alive(read(path_of(name))[0]):
                found.append(name)
    return found


def _plain(value: Any) -> Any:
    """NumPy's numbers and arrays as Python's."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
