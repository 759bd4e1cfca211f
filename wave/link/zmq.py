"""`zmq+tcp://[AGENT@]HOST:PORT`: a host and an agent on two machines. The agent listens there, the host connects; CURVE encrypts and proves who speaks.

AGENT is the name under which the host knows the agent's key; with one peer known it may be left out. The host opens a session, and again after every loss: then
`peer_joins` rises, and the host sends RESYNC and its state, as it does to an agent that has attached anew. What an agent decided in a session that is
over is dropped here and counted in `stale`; what it decided before it knew of a RESYNC is the host's to refuse, by its sequence numbers.

The host's verbs use the socket themselves: a hand-over to another thread would cost more than the rest. What must happen though no verb is called (asking for
a session, signs of life, a deadline) is done by a thread that takes the socket whenever no verb has it.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import zmq
from zmq.utils.monitor import parse_monitor_message

from waveos.errors import LinkError
from waveos.keys import LOOK_S, Keys
from waveos.link import MESSAGES, TXNS
from waveos.link.frames import MAX_BYTES, MAX_RECORDS, Frame, Kind, pack_json, read_json, unpack
from waveos.link.pipes import gather
from waveos.link.session import Broken, Session
from waveos.link.verbs import BATCH, QueueVerbs, Records
from waveos.record import RECORD_BYTES, VERSION

URL = re.compile(r"zmq\+tcp://(?:([^@/]+)@)?(\[[0-9a-fA-F:.]+\]|[0-9A-Za-z][0-9A-Za-z._-]*|\*):(\d{1,5})")
SILENCE_S = 2.0
"""An agent that says nothing for so long is gone, until it says something in a new session."""
HOST_SILENCE_S = 10.0
BEAT_NS = 100_000_000
HELLO_NS = 200_000_000
AGAIN_NS = 500_000_000
"""From a refusal to the next try."""
TICK_NS = 20_000_000
KEEP_NS = 20_000_000
"""Between two looks of the thread that does what is due."""
AT_ONCE = 64
"""Frames taken in one go: a peer that floods does not keep the caller."""
INBOX_FRAMES = 512
AGENT = (sys.executable, "-P", "-m", "waveos.agents.agentd")
KILL_AFTER_S = 2.0
_REFUSED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL


def open_zmq(url: str, side: str, subsystem: Any, **options: Any) -> QueueVerbs:
    """One side of a network link. Options of the host: those of `ZmqHost`; of the agent: those of `waveos.link.exchange.listen_for_one`."""
    if side == "host":
        return ZmqHost(url, subsystem, **options)
    from waveos.link.exchange import listen_for_one

    return listen_for_one(url, subsystem, **options)


def parse_url(url: str) -> tuple[str, str]:
    """The name of the agent's key ("" if it is not named), and ZeroMQ's endpoint. Raises LinkError."""
    match = URL.fullmatch(url)
    if not match or not 0 < int(match[3]) < 65_536:
        raise LinkError(f"{url!r} names no network link: write zmq+tcp://HOST:PORT, for example zmq+tcp://dpu:5555")
    return match[1] or "", f"tcp://{match[2]}:{match[3]}"


def make_socket(context: zmq.Context[Any], kind: int, keys: Keys, endpoint: str, silence_s: float) -> zmq.Socket[Any]:
    """A socket with this machine's key and the bounds that both sides keep."""
    made: zmq.Socket[Any] = context.socket(kind)
    own = keys.own()
    made.curve_publickey, made.curve_secretkey = bytes.fromhex(own.public), bytes.fromhex(own.secret)
    made.linger = 0
    made.maxmsgsize = MAX_BYTES + 64  # with what CURVE adds
    made.rcvhwm, made.sndhwm = INBOX_FRAMES, 0  # what is sent is bounded by the session's window
    made.ipv6 = endpoint.startswith("tcp://[")
    made.handshake_ivl = 5_000
    # A connection whose peer vanished without a word is given up: TCP alone would wait for a quarter of an hour.
    made.heartbeat_ivl, made.heartbeat_timeout = max(10, int(250 * silence_s)), max(20, int(1_000 * silence_s))
    return made


class ZmqHost(QueueVerbs):
    """The host's side; a context manager.

    messages, txns: records that may be out and not taken, in each direction. about: what the agent is told of the enclave (`enclave`, a name; `cpus`,
    `threads`, `ahead`). silence_s: after so long the agent is gone. batch_us: let messages wait so long for others, while verbs are called; 0: none waits.
    """

    def __init__(
        self,
        url: str,
        subsystem: Any,
        messages: int = 65_536,
        txns: int = 16_384,
        keys: Keys | Path | str | None = None,
        about: dict[str, Any] | None = None,
        silence_s: float = SILENCE_S,
        batch_us: float = 0.0,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        super().__init__(url, "host", subsystem)
        peer, self._endpoint = parse_url(url)
        for name, capacity in (("messages", messages), ("txns", txns)):
            if not 2 <= capacity <= 1 << 24:
                raise LinkError(f"the queue of {name} holds 2 to {1 << 24} records, not {capacity}")
        self._keys = keys if isinstance(keys, Keys) else Keys(keys)
        self._public = self._keys.own().public  # said now if there is none
        self._peer = self._keys.peer(peer)
        self._trusted = True
        self._windows = messages, txns
        self._about = {"enclave": f"{socket.gethostname()[:40]}-{os.getpid()}-{secrets.token_hex(3)}", **(about or {})}
        self._silence_ns, self._batch_ns, self._say = int(silence_s * 1e9), int(batch_us * 1e3), say
        self._agent: subprocess.Popen[bytes] | None = None
        self._session: Session | None = None
        self._asked = secrets.randbits(63)
        self._told: dict[str, Any] = {}
        self._inbox: deque[memoryview] = deque()
        self._waiting = bytearray()  # records not yet sent: there is no session, or they wait for others
        self._flush_ns = 0
        self._lost_before = [0, 0]  # in sessions that are over
        self._joins = 0
        self.stale = 0
        """Transactions dropped because their session was over."""
        self.nonsense = 0
        """Frames that were none, or not for this link."""
        self.broken = 0
        """Sessions that ended by a loss."""
        self.trouble = "no agent has answered yet"
        """Why there is no session."""
        now_ns = time.monotonic_ns()
        self._heard_ns = self._tick_ns = self._hello_ns = self._beat_ns = now_ns
        self._keys_ns = now_ns + int(LOOK_S * 1e9)
        self._again_ns = 0
        self._context: zmq.Context[Any] = zmq.Context()
        self._lock = threading.Lock()
        self._hurry = threading.Event()  # a deadline is to be kept
        self._open()
        self._keeper = threading.Thread(target=self._keep, name="wave-zmq", daemon=True)
        self._keeper.start()

    def _open(self) -> None:
        """A socket that tries to connect until it is closed."""
        made = self._socket = make_socket(self._context, zmq.DEALER, self._keys, self._endpoint, self._silence_ns / 1e9)
        made.curve_serverkey = bytes.fromhex(self._peer.public)
        made.rcvtimeo = TICK_NS // 1_000_000
        made.immediate = True  # nothing is kept for a connection that there is not: it would be old
        made.reconnect_ivl, made.reconnect_ivl_max = 20, 200
        self._monitor = made.get_monitor_socket(_REFUSED | zmq.EVENT_CONNECT_RETRIED)
        try:
            made.connect(self._endpoint)
        except zmq.ZMQError as error:
            self._context.destroy(0)
            raise LinkError(f"cannot connect to {self.url} ({error.strerror}): name a host, as in zmq+tcp://HOST:PORT") from None

    def _keep(self) -> None:
        """The thread's: what is due, when nobody calls a verb."""
        while not self._context.closed:
            left_ns = self._flush_ns - time.monotonic_ns() if self._waiting and self._session else KEEP_NS
            if self._hurry.wait(max(0, min(left_ns, KEEP_NS)) / 1e9):
                self._hurry.clear()
            elif self._lock.acquire(blocking=False):
                try:
                    if not self._context.closed:
                        self._take_in()
                finally:
                    self._lock.release()

    # Transport

    def _send(self, queue: int, records: Records) -> int:
        if queue != MESSAGES:
            self._refuse_queue(queue)
        with self._lock:
            self.check()
            return self._offer(records)

    def _offer(self, records: Records) -> int:
        now_ns = time.monotonic_ns()
        if now_ns >= self._tick_ns:
            self._tick(now_ns)
        session = self._session
        room = self._room()
        if room < len(records) and session:
            self._take_in()
            session, room = self._session, self._room()
        fit = min(len(records), room)
        if fit < len(records):
            self._count_lost(len(records) - fit)
        if not fit:
            return 0
        body = records[:fit].tobytes()
        if session is None or self._batch_ns or self._waiting:
            if not self._waiting:
                self._flush_ns = now_ns + self._batch_ns
                self._hurry.set()
            self._waiting += body
            self._flush(now_ns)
        elif fit <= MAX_RECORDS:
            self._push(session, body)
        else:
            self._waiting += body
            self._flush(now_ns, all_of_it=True)
        return fit

    def _flush(self, now_ns: int, all_of_it: bool = False) -> None:
        """Send what waits: whole frames, and the rest once it has waited long enough."""
        whole = MAX_RECORDS * RECORD_BYTES
        while (session := self._session) and self._waiting and (all_of_it or len(self._waiting) >= whole or now_ns >= self._flush_ns):
            body = bytes(self._waiting[:whole])
            del self._waiting[:whole]
            self._push(session, body)

    def _push(self, session: Session, body: bytes) -> None:
        try:
            self._socket.send(session.data(body), zmq.NOBLOCK)
        except zmq.Again:
            self._break("the connection is lost")

    def _poll(self, queue: int, limit: int, wait_ns: int) -> Records:
        if queue != TXNS:
            self._refuse_queue(queue)
        with self._lock:
            self.check()
            return self._await_txns(limit, wait_ns)

    def _await_txns(self, limit: int, wait_ns: int) -> Records:
        end_ns = 0
        while True:
            if not self._inbox and not (wait_ns >= TICK_NS and self._await_frame()):
                self._take_in()
            if self._inbox:
                return self._unpack_inbox(min(limit, BATCH))
            if wait_ns <= 0:
                return np.zeros(0, self._decision)
            now_ns = time.monotonic_ns()
            end_ns = end_ns or now_ns + wait_ns
            if now_ns >= end_ns:
                return np.zeros(0, self._decision)
            if (left_ns := min(end_ns, self._tick_ns, self._flush_ns if self._waiting and self._session else end_ns) - now_ns) > 300_000:
                self._socket.poll(-(-left_ns // 1_000_000))

    def _await_frame(self) -> bool:
        """Wait up to TICK_NS for one frame, in one call; True if it brought transactions."""
        if self._waiting or time.monotonic_ns() >= self._tick_ns:
            return False
        try:
            self._hear(self._socket.recv())
        except zmq.Again:
            return False
        return bool(self._inbox)

    def _unpack_inbox(self, limit: int) -> Records:
        """Up to `limit` transactions that have come, as an array of their own."""
        records = gather(self._inbox, limit, self._decision)
        if session := self._session:
            session.taken += len(records)
            if session.owes_credit:
                self._beat(session)
        return records

    def _take_in(self) -> None:
        """What has come, and what is due."""
        for _ in range(AT_ONCE):
            try:
                data = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            self._hear(data)
        now_ns = time.monotonic_ns()
        if self._waiting and self._session:
            self._flush(now_ns)
        if now_ns >= self._tick_ns:
            self._tick(now_ns)

    def _hear(self, data: bytes) -> None:
        frame = unpack(data)
        session = self._session
        if frame is None or frame.version != VERSION or frame.subsystem != self.subsystem.SUBSYSTEM:
            self.nonsense += 1
            if frame is not None and frame.kind == Kind.REFUSED:
                self._note_refusal(frame)
        elif session is not None and frame.session == session.number:
            self._heard_ns = time.monotonic_ns()
            if frame.kind in (Kind.RESET, Kind.BYE):
                self._break("the agent has left" if frame.kind == Kind.BYE else "the agent has lost the session")
            elif frame.kind != Kind.WELCOME:
                try:
                    if body := session.hear(frame):
                        self._inbox.append(body)
                except Broken as error:
                    self._break(str(error))
        elif session is None and frame.session == self._asked:
            if frame.kind == Kind.WELCOME:
                self._begin(frame)
            elif frame.kind == Kind.REFUSED:
                self._note_refusal(frame)
        elif frame.kind == Kind.DATA:
            self.stale += len(frame.body) // RECORD_BYTES

    def _note_refusal(self, frame: Frame) -> None:
        why = _text((read_json(frame.body) or {}).get("why"), 300) or "it does not say why"
        self._note(f"the agent at {self._endpoint} refuses this host: {why}")

    def _begin(self, frame: Frame) -> None:
        """The agent has agreed to the session that was asked for."""
        told = read_json(frame.body)
        window = told.get("messages") if told else None
        if told is None or not isinstance(window, int) or not 2 <= window <= 1 << 24:
            self.nonsense += 1
            return
        self._told = told
        self._session = Session(self._asked, self.subsystem.SUBSYSTEM, min(window, self._windows[0]), self._windows[1])
        del self._waiting[min(window, self._windows[0]) * RECORD_BYTES :]
        self._heard_ns = time.monotonic_ns()
        self._joins += 1
        self.trouble = ""
        self._flush(self._heard_ns, all_of_it=True)

    def _break(self, why: str) -> None:
        """The session is over: what is under way belongs to it, and another is asked for."""
        session, self._session = self._session, None
        if session is not None:
            self.broken += 1
            self._lost_before[0] += session.lost
            self._lost_before[1] += session.peer_lost
            self.stale += sum(len(body) for body in self._inbox) // RECORD_BYTES
        self._inbox.clear()
        self._waiting.clear()
        self._asked = secrets.randbits(63)
        self._hello_ns = 0
        self._note(f"{why}; a new session is asked for")

    def _tick(self, now_ns: int) -> None:
        """What is due now and then: signs of life, asking for a session, silence, the keys."""
        self._tick_ns = now_ns + TICK_NS
        while self._monitor.poll(0):
            self._explain(parse_monitor_message(self._monitor.recv_multipart()))
        if self._again_ns and now_ns >= self._again_ns and self._trusted:
            self._again_ns = 0
            with contextlib.suppress(zmq.ZMQError):
                self._socket.disconnect(self._endpoint)
            self._socket.connect(self._endpoint)
        if now_ns >= self._keys_ns:
            self._keys_ns = now_ns + int(LOOK_S * 1e9)
            self._check_peer()
        session = self._session
        if session is None:
            if now_ns >= self._hello_ns and self._trusted:
                told = {**self._about, "messages": self._windows[0], "txns": self._windows[1]}
                hello = pack_json(Kind.HELLO, VERSION, self.subsystem.SUBSYSTEM, self._asked, told)
                with contextlib.suppress(zmq.Again):  # there is no connection yet
                    self._socket.send(hello, zmq.NOBLOCK)
                    self._hello_ns = now_ns + HELLO_NS
        elif now_ns - self._heard_ns > self._silence_ns and not self._socket.poll(0):
            self._break(f"the agent has been silent for {self._silence_ns / 1e9:g} s")
        elif now_ns >= self._beat_ns:
            self._beat(session)

    def _beat(self, session: Session) -> None:
        self._beat_ns = time.monotonic_ns() + BEAT_NS
        try:
            self._socket.send(session.say(Kind.BEAT), zmq.NOBLOCK)
        except zmq.Again:
            self._break("the connection is lost")

    def _check_peer(self) -> None:
        """An agent whose key was revoked is not heard any more; one whose key was added again is."""
        peer = self._keys.known(self._peer.public)
        trusted = peer is not None and peer.state == "valid"
        if self._trusted and not trusted:
            with contextlib.suppress(zmq.ZMQError):
                self._socket.disconnect(self._endpoint)
            self._break(f"the key of {self._peer.name!r} is {peer.state if peer else 'not known any more'} here")
        elif trusted and not self._trusted:
            self._socket.connect(self._endpoint)
        self._trusted = trusted

    def _explain(self, event: Any) -> None:
        """Why there is no connection, in words. ZeroMQ never knocks again where it was refused, so that is done here."""
        if event["event"] & _REFUSED:
            self._again_ns = time.monotonic_ns() + AGAIN_NS
        if self._session is not None:
            return
        if event["event"] == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            self._note(f"the agent at {self._endpoint} does not let this host's key in: there, `wave keys add NAME {self._public}`")
        elif event["event"] & _REFUSED:
            self._note(f"whoever answers at {self._endpoint} does not have the key of {self._peer.name!r}, or is no agent of Wave")
        elif not self.trouble.startswith("the agent at"):
            self._note(
                f"nobody answers at {self._endpoint}: start `wave agentd zmq+tcp://ADDRESS:PORT POLICY` there, or mend the address", said=False
            )

    def _note(self, why: str, said: bool = True) -> None:
        if why != self.trouble and said:
            self._say(why)
        self.trouble = why

    def _count_lost(self, n: int) -> None:
        if self._session is not None:
            self._session.lost += n
        else:
            self._lost_before[0] += n

    def _refuse_queue(self, queue: int) -> NoReturn:
        raise LinkError(
            f"{self.url} has no queue {queue} for this; a network link has messages ({MESSAGES}, to the agent) and txns ({TXNS}, from it)"
        )

    # The other verbs

    def prefetch_txns(self, queue: int = TXNS) -> bool:
        """Take in what has come; True if a transaction is there."""
        if queue != TXNS:
            self._refuse_queue(queue)
        self._catch_up()
        return bool(self._inbox)

    def create_queue(self, kind: str, capacity: int) -> int:
        """There are two, for good. Raises LinkError."""
        raise LinkError(f"{self.url}: a network link has one queue of messages and one of txns; open another link for more")

    def destroy_queue(self, queue: int) -> None:
        """There are two, for good. Raises LinkError."""
        raise LinkError(f"{self.url}: the two queues of a network link end with it")

    def assoc_queue_with(self, queue: int, cpu: int) -> None:
        """Send messages about that CPU to that queue: there is one."""
        if queue != MESSAGES:
            self._refuse_queue(queue)

    def room(self, queue: int = MESSAGES, n: int = 1) -> int:
        """How many messages there is room for: exactly, if fewer than n; else at least n."""
        if queue != MESSAGES:
            self._refuse_queue(queue)
        if (room := self._room()) < n:
            self._catch_up()
            room = self._room()
        return room

    def _room(self) -> int:
        session = self._session
        return (session.room if session else self._windows[0]) - len(self._waiting) // RECORD_BYTES

    def overflowed(self, queue: int = MESSAGES) -> int:
        """How many records found that queue full since the link was opened."""
        session = self._session
        if queue == MESSAGES:
            return self._lost_before[0] + (session.lost if session else 0)
        return self._lost_before[1] + (session.peer_lost if session else 0)

    def peer_alive(self) -> bool:
        """True while there is a session."""
        self._catch_up()
        return self._session is not None

    def peer_joins(self) -> int:
        """How many sessions there were: when it rises, send RESYNC and the state."""
        self._catch_up()
        return self._joins

    def _catch_up(self) -> None:
        with self._lock:
            self.check()
            self._take_in()

    @property
    def policy(self) -> str:
        """The agent's policy, as it says; "" before it has."""
        return _text(self._told.get("policy"), 64)

    def check(self) -> None:
        """Raises LinkError once the link is closed."""
        if self._context.closed:
            raise LinkError(f"{self.url} was closed")

    def start_wave_agent(self, policy: str, *arguments: str) -> int:
        """Start an agent on this machine that listens where this link connects to; its pid. One on another machine is started there."""
        if self._agent is not None and self._agent.poll() is None:
            raise LinkError(f"{self.url} already has an agent: kill_wave_agent first")
        environment = {**os.environ, "WAVE_KEYS": str(self._keys.folder)}
        self._agent = subprocess.Popen([*AGENT, "zmq+" + self._endpoint, policy, *arguments], env=environment)
        return self._agent.pid

    def await_agent(self, timeout_s: float = 10.0) -> int:
        """Wait for a session; the agent's pid, on its machine. Raises LinkError after `timeout_s`, saying what is in the way."""
        end_s = time.monotonic() + timeout_s
        while self._session is None:
            if self._agent is not None and self._agent.poll() is not None:
                raise LinkError(f"the agent of {self.url} ended with status {self._agent.returncode} before it answered; see its messages above")
            if time.monotonic() >= end_s:
                raise LinkError(f"{self.url}: no agent within {timeout_s:g} s: {self.trouble}")
            with self._lock:
                self._socket.poll(10)
                self._take_in()
        pid = self._told.get("pid")
        return pid if isinstance(pid, int) and not isinstance(pid, bool) else 0

    def kill_wave_agent(self) -> None:
        """Stop the agent that this link started: SIGTERM, and SIGKILL if it is still there after 2 s. Nothing if there is none."""
        child, self._agent = self._agent, None
        if child is not None:
            child.terminate()
            try:
                child.wait(KILL_AFTER_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()

    def reattach(self) -> None:
        """The agent's verb. Raises LinkError."""
        self._refuse("reattach", "agent")

    def close(self) -> None:
        """Take leave of the agent, and stop one that this link started. Twice does no harm."""
        with self._lock:
            if self._context.closed:
                return
            if self._session is not None:
                with contextlib.suppress(zmq.ZMQError):
                    self._socket.send(self._session.say(Kind.BYE), zmq.NOBLOCK)
            self._session = None
            self._socket.disable_monitor()
            self._monitor.close(0)
            self._context.destroy(linger=200)
        self._hurry.set()
        self._keeper.join()
        self.kill_wave_agent()

    def __enter__(self) -> ZmqHost:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _text(told: Any, most: int) -> str:
    """What the other side says, as far as it is text that can stand in a line of this one's; "" for what is none."""
    return "".join(filter(str.isprintable, told[:most])) if isinstance(told, str) else ""
