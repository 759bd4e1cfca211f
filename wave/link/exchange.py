"""The agent's end of network links: one socket, many hosts. It lets in those whose key is known, and gives each of their enclaves a `ZmqAgent`.

A `ZmqAgent` has two rings in this process's memory, so whoever decides uses it as any link, compiled loop or verbs; the exchange carries frames between
rings and socket whenever agentd's loop steps it. An agent that has the exchange to itself steps it by its verbs, and needs no rings.

ZeroMQ asks who may speak when a connection begins, and never again; so the key behind each frame is looked up anew, and what a revoked peer sends is dropped.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from waveos.errors import LinkError, WaveError
from waveos.keys import NAME, Keys
from waveos.link import MESSAGES, TXNS
from waveos.link.frames import MAX_RECORDS, Frame, Kind, pack, pack_json, read_json, unpack
from waveos.link.pipes import Lane, Pipe
from waveos.link.session import Broken, Session
from waveos.link.shm import Queue
from waveos.link.verbs import BATCH, QueueVerbs, Records
from waveos.link.zmq import AT_ONCE, BEAT_NS, HOST_SILENCE_S, TICK_NS, make_socket, parse_url
from waveos.record import RECORD_BYTES, VERSION

CAPACITY = 65_536
"""Records of an agent's ring of messages, at most; a host may ask for less."""
TXNS_CAPACITY = 16_384
HOST_SILENCE_NS = int(HOST_SILENCE_S * 1e9)
MAX_WINDOW = 1 << 24
NUMBERS = ("txns", "messages", "cpus", "threads", "ahead")
"""What a hello may say besides the enclave's name; `txns`, and `messages` if it is said, are windows, and what the others may be `Accept` knows."""
MAX_ENCLAVES = 64
"""Of one address."""
MAX_ROUTES = 1_024
STREAM_BYTES = 1_024
"""A frame as long as this is one of many."""
SAID_EVERY_S = 60.0
Facts = dict[str, Any]
Accept = Callable[["Door", str, str, Facts], "ZmqAgent"]
"""(door, host's name, enclave, facts): the agent for an enclave that has not been here, or LinkError: why not."""


class ZmqAgent(QueueVerbs):
    """The agent's side of the link with one enclave of one host; a context manager. It is there before its host is, and waits for it."""

    handed = None

    def __init__(self, exchange: Exchange, url: str, subsystem: Any, alone: bool, facts: Facts | None = None) -> None:
        super().__init__(url, "agent", subsystem)
        self.facts: Facts = facts or {}
        self._exchange, self._alone = exchange, alone
        self.capacity = capacity = 1 << (min(self.facts.get("messages", CAPACITY), CAPACITY) - 1).bit_length()
        self._up: Lane | Pipe = Lane(self._message, capacity) if alone else Pipe("messages", capacity, subsystem.SUBSYSTEM, self._message, BATCH)
        self._down: Lane | Pipe = (
            Lane(self._decision, TXNS_CAPACITY) if alone else Pipe("txns", TXNS_CAPACITY, subsystem.SUBSYSTEM, self._decision, MAX_RECORDS)
        )
        self.host = self.policy = ""
        """Name of the host's key, and of the policy that it is told of."""
        self.session: Session | None = None
        self.ready = alone
        self.stale = 0
        """Transactions that were never sent: the session they were made in was over."""
        self.over = ""
        """Why this link is over."""
        self.asked: tuple[int, bytes, int] | None = None  # the session the host asks for, the way to it, its window of transactions
        self.route = b""
        self.heard_ns = self.beat_ns = 0
        self._held: deque[memoryview] = deque()
        self._base = 0  # the consumer's position when the session began

    # What the exchange does with it

    def greet(self, door: Door) -> None:
        """Open the session that the host asks for, once there is a policy to serve it."""
        if self.asked is None or not self.ready:
            return
        number, self.route, window = self.asked
        if self.session is None or self.session.number != number:
            self.session = Session(number, self.subsystem.SUBSYSTEM, window, self.capacity)
            self._held.clear()
            self._base = self._up.put_in
            while body := self._down.take(MAX_RECORDS):  # decided on what is no more
                self.stale += len(body) // RECORD_BYTES
        self.heard_ns = time.monotonic_ns()
        told = {"messages": self.capacity, "pid": os.getpid(), "policy": self.policy}
        door.send(self, pack_json(Kind.WELCOME, VERSION, self.subsystem.SUBSYSTEM, number, told))

    def put(self, body: memoryview) -> None:
        """Records from the host, into the ring, or kept until there is room."""
        if self._held or not self._up.put(body):
            self._held.append(body)

    def carry(self, door: Door, now_ns: int) -> bool:
        """Frames for what has been decided and what is due; False if nothing was."""
        session = self.session
        if session is None:
            return False
        while self._held and self._up.put(self._held[0]):
            self._held.popleft()
        session.taken = max(session.taken, self._up.taken_out - self._base)
        session.lost = self._down.lost
        done = False
        while (n := min(session.room, MAX_RECORDS)) > 0:
            body = self._down.take(n)
            if not body:
                break
            done = True
            if not door.send(self, session.data(body)):
                return True
            if len(body) < n * RECORD_BYTES:
                break
        if session.owes_credit or now_ns >= self.beat_ns:
            self.beat_ns = now_ns + BEAT_NS
            door.send(self, session.say(Kind.BEAT))
        return done

    @property
    def busy(self) -> bool:
        """Messages wait for whoever decides."""
        return self._up.put_in != self._up.taken_out

    # The link's verbs

    def _send(self, queue: int, records: Records) -> int:
        if queue != TXNS:
            raise LinkError(f"queue {queue} of {self.url} is not one of transactions; a network link has {TXNS}")
        self.check()
        session, down = self.session, self._down
        if isinstance(down, Lane) and session and not down.waiting and len(records) <= min(session.room, MAX_RECORDS):  # the shortest way
            session.taken = self._up.taken_out - self._base
            self._exchange.doors[0].send(self, session.data(records.tobytes()))
            return len(records)
        sent = down.offer(records)
        if self._alone:
            self._exchange.carry(time.monotonic_ns())
        else:
            self._exchange.wake()
        return sent

    def _poll(self, queue: int, limit: int, wait_ns: int) -> Records:
        if queue != MESSAGES:
            raise LinkError(f"queue {queue} of {self.url} is not one of messages; a network link has {MESSAGES}")
        end_ns = 0
        while True:
            got = self._up.get(min(limit, BATCH))
            if len(got):
                return got
            self.check()
            now_ns = time.monotonic_ns()
            end_ns = end_ns or now_ns + wait_ns
            if self._alone:
                if not self._exchange.step(max(0, end_ns - now_ns)) and now_ns >= end_ns:
                    return got
            elif now_ns >= end_ns:
                return got
            else:
                time.sleep(0.000_1)

    def queue(self, number: int) -> Queue:
        """The queue of that number, for compiled loops."""
        if number not in (MESSAGES, TXNS):
            raise LinkError(f"{self.url} has no queue {number}; a network link has {MESSAGES} and {TXNS}")
        pipe = self._up if number == MESSAGES else self._down
        if isinstance(pipe, Lane):
            raise LinkError(f"{self.url}: this agent is used by its verbs alone; agentd serves compiled loops")
        return pipe.queue

    def overflowed(self, queue: int = MESSAGES) -> int:
        """How many records found that queue full."""
        if self._alone:
            self._exchange.step(0)
        return self._down.lost if queue == TXNS else self.session.peer_lost if self.session else 0

    def peer_alive(self) -> bool:
        """True while there is a session."""
        if self._alone:
            self._exchange.step(0)
        return self.session is not None and not self.over

    def peer_joins(self) -> int:
        """Always 1; a new host is a new session, which begins with its whole state."""
        return 1

    def check(self) -> None:
        """Raises LinkError if the host has left, or has been silent for long."""
        if self.over:
            raise LinkError(f"{self.url}: {self.over}; reattach waits for a host")

    def reattach(self, patience_s: float = 0.0) -> None:
        """Wait for a host anew."""
        if not self._alone:
            raise LinkError(f"{self.url}: this enclave's link is over; agentd makes another when its host comes back")
        self.over, self.session, self.asked = "", None, None
        self._last, self._created = {}, 0

    def close(self) -> None:
        """Take leave of the host."""
        self._exchange.leave(self)
        if self._alone:
            self._exchange.close()

    def __enter__(self) -> ZmqAgent:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Door:
    """One address at which hosts of one subsystem arrive."""

    def __init__(self, exchange: Exchange, url: str, subsystem: Any, accept: Accept) -> None:
        self.url, self.subsystem, self._exchange, self._accept = url, subsystem, exchange, accept
        self.agents: dict[tuple[str, str], ZmqAgent] = {}
        self._routes: dict[bytes, str] = {}  # the key that a connection proved
        _, endpoint = parse_url(url)
        self.socket = make_socket(exchange.context, zmq.ROUTER, exchange.keys, endpoint, HOST_SILENCE_S)
        self.socket.curve_server = True
        self.socket.zap_domain = b"wave"
        self.socket.router_mandatory = True
        self.socket.rcvtimeo = TICK_NS // 1_000_000
        failed = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        self.monitor = self.socket.get_monitor_socket(failed)
        try:
            self.socket.bind(endpoint)
        except zmq.ZMQError as error:
            self.close()
            hint = (
                "another agent listens there: stop it, or take another port" if error.errno == zmq.EADDRINUSE else "name an address of this machine"
            )
            raise LinkError(f"cannot listen at {endpoint}: {error.strerror}; {hint}") from None

    def send(self, agent: ZmqAgent, frame: bytes) -> bool:
        """Send a frame to the agent's host; False if the way to it is gone, and with it the session."""
        try:
            self.socket.send(agent.route, zmq.NOBLOCK | zmq.SNDMORE)
            self.socket.send(frame, zmq.NOBLOCK)
        except zmq.ZMQError:
            agent.session = None
            return False
        return True

    def hear(self, wait: bool = False) -> int:
        """Take in what has come, waiting for the first up to TICK_NS if that is wanted; how many frames."""
        for heard in range(AT_ONCE):
            try:
                route = self.socket.recv(0 if wait and not heard else zmq.NOBLOCK)
            except zmq.Again:
                return heard
            public = self._routes.get(route)
            if public is None:
                body = self.socket.recv(copy=False)
                public, data = self._prove(route, body), body.bytes
            else:
                data = self.socket.recv()
            whole = True
            while self.socket.getsockopt(zmq.RCVMORE):
                self.socket.recv()
                whole = False
            key = self._exchange.keys.known(public)
            if key is None or key.state != "valid":
                self._exchange.dropped += 1
                self._exchange.say_seldom(
                    f"{self.url}: dropped what {key.name if key else public[:8] + '...'} sends: its key is {key.state if key else 'not known any more'}"
                )
                for agent in self.agents.values():
                    if agent.route == route:
                        agent.session = None
                continue
            frame = unpack(data) if whole and route[:1] == b"\0" else None  # a route of the peer's own choice could be another's before
            if frame is None:
                self._exchange.nonsense += 1
                self._exchange.say_seldom(f"{self.url}: {key.name} sends what is no frame of this version of Wave")
            else:
                self._take(route, public, key.name, frame)
            if wait and len(data) < STREAM_BYTES:  # one record alone: another look would cost more than the next call
                return 1
        return AT_ONCE

    def _prove(self, route: bytes, body: Any) -> str:
        try:
            public = z85.decode(body.get("User-Id")).hex()
        except (zmq.ZMQError, ValueError):
            public = ""
        if len(self._routes) >= MAX_ROUTES:
            self._routes.clear()
        self._routes[route] = public
        return public

    def _take(self, route: bytes, public: str, host: str, frame: Frame) -> None:
        if frame.kind == Kind.HELLO:
            self._greet(route, public, host, frame)
            return
        for (owner, _), agent in self.agents.items():
            session = agent.session
            if owner == public and session is not None and session.number == frame.session:
                break
        else:
            if frame.kind != Kind.BYE:
                self._answer(route, pack(Kind.RESET, VERSION, self.subsystem.SUBSYSTEM, frame.session))
            return
        agent.heard_ns, agent.route = time.monotonic_ns(), route
        if frame.kind == Kind.BYE:
            self.forget(agent, "its host has left")
            return
        try:
            if body := session.hear(frame):
                agent.put(body)
        except Broken:
            agent.session = None
            self._answer(route, pack(Kind.RESET, VERSION, self.subsystem.SUBSYSTEM, frame.session))

    def _greet(self, route: bytes, public: str, host: str, frame: Frame) -> None:
        try:
            if frame.version != VERSION:
                raise LinkError(f"it speaks version {frame.version} of the contract, this agent version {VERSION}: install the same waveos on both")
            if frame.subsystem != self.subsystem.SUBSYSTEM:
                raise LinkError(
                    f"its subsystem is number {frame.subsystem}, this agent's policy is for {self.subsystem.SUBSYSTEM}: choose another port or policy"
                )
            facts = self._read_facts(frame)
            enclave = facts["enclave"]
            agent = self.agents.get((public, enclave))
            if agent is not None and not agent._alone and agent.facts != facts:
                self.forget(agent, "its host has changed")
                agent = None
            if agent is None:
                if len(self.agents) >= MAX_ENCLAVES:
                    raise LinkError(f"{MAX_ENCLAVES} enclaves are served here, which is the most: start another agent at another port")
                agent = self._accept(self, host, enclave, facts)
                agent.host = host
                self.agents[public, enclave] = agent
        except Exception as error:  # of whatever kind: it is this hello's, and others are served
            why = str(error) if isinstance(error, WaveError) else f"{type(error).__name__}: {error}"
            self._exchange.say_seldom(f"{self.url}: refused {host}: {why}")
            self._refuse(route, frame, why)
            return
        agent.asked = frame.session, route, facts["txns"]
        agent.greet(self)

    def _read_facts(self, frame: Frame) -> Facts:
        """What a hello says of its enclave, and nothing else that it may say. Raises LinkError for what is of another kind than that."""
        told = read_json(frame.body) or {}
        enclave, facts = told.get("enclave"), {name: told[name] for name in NUMBERS if name in told}
        if not isinstance(enclave, str) or not NAME.fullmatch(enclave):
            self._exchange.nonsense += 1
            raise LinkError("a hello says enclave, a name of at most 64 letters, digits, '.', '_' and '-'")
        for name in ("txns", *facts):
            window = name in ("txns", "messages")
            if type(facts.get(name)) is not int or (window and not 2 <= facts[name] <= MAX_WINDOW):  # True is none
                self._exchange.nonsense += 1
                raise LinkError(f"a hello says {name} as a whole number" + (f", of 2 to {MAX_WINDOW} records" if window else ""))
        return {"enclave": enclave, **facts}

    def _refuse(self, route: bytes, frame: Frame, why: str) -> None:
        self._answer(route, pack_json(Kind.REFUSED, VERSION, self.subsystem.SUBSYSTEM, frame.session, {"why": why[:300]}))

    def _answer(self, route: bytes, frame: bytes) -> None:
        with contextlib.suppress(zmq.ZMQError):
            self.socket.send_multipart((route, frame), zmq.NOBLOCK)

    def carry(self, now_ns: int) -> bool:
        """Send what all agents have; False if none had anything."""
        done = False
        for agent in tuple(self.agents.values()):
            done |= agent.carry(self, now_ns)
            if agent.heard_ns and now_ns - agent.heard_ns > HOST_SILENCE_NS:
                self.forget(agent, f"its host has been silent for {HOST_SILENCE_S:g} s")
        return done

    def forget(self, agent: ZmqAgent, why: str) -> None:
        """The agent's link is over."""
        agent.over, agent.session = agent.over or why, None
        self.agents = {key: each for key, each in self.agents.items() if each is not agent}

    def close(self) -> None:
        """Stop listening."""
        self.socket.disable_monitor()
        self.monitor.close(0)
        self.socket.close(200)


class Exchange:
    """All doors of one process. Not for two threads, but for `wake`."""

    def __init__(self, keys: Keys | Path | str | None = None, say: Callable[[str], None] = lambda line: None, single: bool = False) -> None:
        """single: it is stepped by the verbs of one agent alone."""
        self._single = single
        self.keys = keys if isinstance(keys, Keys) else Keys(keys)
        self.keys.own()
        self.dropped = 0
        """Frames of peers whose key is not valid."""
        self.nonsense = 0
        self._say, self._said = say, dict[str, float]()
        self.context: zmq.Context[Any] = zmq.Context()
        self._gate = self.context.socket(zmq.REP)
        self._gate.bind("inproc://zeromq.zap.01")
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller = zmq.Poller()
        for each in (self._gate, self._bell):
            self._poller.register(each, zmq.POLLIN)
        self.doors: list[Door] = []
        self._tick_ns = 0

    def listen(self, url: str, subsystem: Any, accept: Accept) -> Door:
        """Let hosts of that subsystem in at that address. Raises LinkError."""
        door = Door(self, url, subsystem, accept)
        self._poller.register(door.socket, zmq.POLLIN)
        self.doors.append(door)
        return door

    def wake(self) -> None:
        """From any thread: there is something to send."""
        with contextlib.suppress(OSError):
            os.eventfd_write(self._bell, 1)

    def step(self, wait_ns: int) -> bool:
        """Carry what there is, both ways, waiting up to `wait_ns` (whole ms) for something to do; False if there was nothing."""
        now_ns = time.monotonic_ns()
        done = self.carry(now_ns)
        if not done and wait_ns >= TICK_NS and self._single:  # one call for all: nothing else would wake it
            if now_ns >= self._tick_ns:
                self._tick(now_ns)
            return bool(self.doors[0].hear(wait=True))
        if not done and wait_ns > 0:
            ready = self._poller.poll(-(-min(wait_ns, TICK_NS) // 1_000_000))
            now_ns = time.monotonic_ns()
            if any(each in (self._bell, self._gate) for each, _ in ready):
                self._tick_ns = 0
        if now_ns >= self._tick_ns:
            self._tick(now_ns)
        for door in self.doors:
            done |= bool(door.hear())
        return done

    def carry(self, now_ns: int) -> bool:
        """Send what there is to send; False if there was nothing."""
        done = False
        for door in self.doors:
            done |= door.carry(now_ns)
        return done

    def _tick(self, now_ns: int) -> None:
        self._tick_ns = now_ns + TICK_NS
        with contextlib.suppress(OSError):
            os.eventfd_read(self._bell)
        while self._gate.poll(0):
            self._let_in(self._gate.recv_multipart())
        for door in self.doors:
            while door.monitor.poll(0):
                parse_monitor_message(door.monitor.recv_multipart())
                self.say_seldom(f"{door.url}: refused a peer that does not speak CURVE, as every peer must")

    def _let_in(self, asked: list[bytes]) -> None:
        """ZeroMQ's question who may connect (ZAP 1.0: version, id, domain, address, identity, mechanism, key)."""
        public = asked[6].hex() if len(asked) == 7 and asked[5] == b"CURVE" and len(asked[6]) == 32 else ""
        key = self.keys.known(public)
        good = key is not None and key.state == "valid"
        if not good:
            address = asked[3].decode("ascii", "replace") if len(asked) > 3 else "?"
            self.say_seldom(
                f"refused the {'key of ' + key.name + ', which is ' + key.state if key else 'unknown key ' + public}", f", from {address}"
            )
        user = z85.encode(asked[6]) if good else b""
        code, text = (b"200", b"OK") if good else (b"400", b"unknown key")
        self._gate.send_multipart((b"1.0", asked[1] if len(asked) > 1 else b"", code, text, user, b""))

    def say_seldom(self, line: str, more: str = "") -> None:
        """Say a line, at most once a minute."""
        now_s = time.monotonic()
        if now_s - self._said.get(line, -SAID_EVERY_S) >= SAID_EVERY_S:
            if len(self._said) >= MAX_ROUTES:
                self._said = {each: at for each, at in self._said.items() if now_s - at < SAID_EVERY_S}
            if len(self._said) < MAX_ROUTES:
                self._said[line] = now_s
                self._say(line + more)

    def leave(self, agent: ZmqAgent) -> None:
        """This side of a link is closed: tell the host."""
        for door in self.doors:
            if agent in door.agents.values():
                if agent.session is not None:
                    door.send(agent, agent.session.say(Kind.BYE))
                door.forget(agent, "this side was closed")
        agent.over = agent.over or "this side was closed"

    def close(self) -> None:
        """Stop listening everywhere. Twice does no harm."""
        if self.context.closed:
            return
        for door in self.doors:
            for agent in list(door.agents.values()):
                self.leave(agent)
            door.close()
        self.doors = []
        self._gate.close(0)
        self.context.destroy(linger=200)
        os.close(self._bell)
        self._bell = -1


def listen_for_one(
    url: str, subsystem: Any, keys: Keys | Path | str | None = None, patience_s: float = 0.0, say: Callable[[str], None] = lambda line: None
) -> ZmqAgent:
    """An agent that serves the first host to come, whose verbs do all the work. It waits up to `patience_s` for the host, and else is there before it."""
    exchange = Exchange(keys, say, single=True)
    agent = ZmqAgent(exchange, url, subsystem, alone=True)

    def accept(door: Door, host: str, enclave: str, facts: Facts) -> ZmqAgent:
        if any(each is agent for each in door.agents.values()):
            raise LinkError("this agent serves another host; `wave agentd` serves many")
        agent.facts = facts
        return agent

    try:
        exchange.listen(url, subsystem, accept)
        end_s = time.monotonic() + patience_s
        while agent.session is None and time.monotonic() < end_s:
            exchange.step(TICK_NS)
    except BaseException:
        exchange.close()
        raise
    return agent
