"""`shm://NAME`: two processes of one machine, joined by rings in a segment of /dev/shm that both poll.

The host's side makes the segment and its queues, the agent's attaches. With a path (`shm:///run/wave/NAME/agent.sock`) the host is hostd, which hands its
queues over that socket. A compiled agent loop uses the rings directly: `queue(MESSAGES)` and
`queue(TXNS)` give the memory and this side's position words for the functions of `waveos.ring`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numba import carray, njit

from waveos import ring
from waveos.ending import Look, never
from waveos.errors import LinkError
from waveos.handover import Message
from waveos.jit import as_pointer, jit
from waveos.link import MESSAGES, TXNS
from waveos.link.handed import Handed, Prepare
from waveos.link.segment import KINDS, Segment
from waveos.link.verbs import BATCH, QueueVerbs, Records, Words
from waveos.primitives import CoherentMemory
from waveos.process import start_time
from waveos.record import RECORD_WORDS, VERSION

POLL_SLICE_NS = 20_000_000
"""Longest stay in compiled code, so that signals reach Python."""
KILL_AFTER_S = 2.0
LONGEST_PAUSE_S = 0.2
"""Between two looks for a host that is not there."""
AGENT = (sys.executable, "-P", "-m", "waveos.agents.agentd")


class Queue(NamedTuple):
    """One queue as this side sees it."""

    kind: str  # "messages" or "txns"
    sends: bool  # this side is the producer
    memory: Words  # the ring's, shared
    own: Words  # this side's positions
    batch: Records  # what a poll returns
    addresses: Words  # of memory, own and batch, with their lengths in words
    at: int  # the address of `addresses`: an integer is the cheapest thing to hand to compiled code


@njit(cache=True)
def _send(at: int, records: Records) -> int:
    addresses = carray(as_pointer(at), 6, np.int64)
    memory = carray(as_pointer(addresses[0]), addresses[1], np.int64)
    own = carray(as_pointer(addresses[2]), addresses[3], np.int64)
    n = len(records)
    words = carray(as_pointer(records.ctypes.data), n * RECORD_WORDS, np.int64)
    if ring.restarted(memory, own):
        return -1
    return ring.send_one(memory, own, words, 0) if n == 1 else ring.send(memory, own, words, n)


@njit(cache=True)  # quick, so it keeps the GIL: giving it up and taking it again would cost more
def _poll(at: int, limit: int) -> int:
    addresses = carray(as_pointer(at), 6, np.int64)
    memory = carray(as_pointer(addresses[0]), addresses[1], np.int64)
    own = carray(as_pointer(addresses[2]), addresses[3], np.int64)
    out = carray(as_pointer(addresses[4]), addresses[5], np.int64)
    got = ring.poll(memory, own, out, min(limit, BATCH))
    return -1 if got == 0 and ring.restarted(memory, own) else got


@jit
def _wait(at: int, wait_ns: int) -> bool:
    addresses = carray(as_pointer(at), 6, np.int64)
    memory = carray(as_pointer(addresses[0]), addresses[1], np.int64)
    own = carray(as_pointer(addresses[2]), addresses[3], np.int64)
    return ring.wait(memory, own, wait_ns)


class ShmLink(QueueVerbs):
    """One side of a shared-memory link; a context manager. Options: `messages` and `txns`, the capacities (powers of two), and
    `patience_s`, how long an agent waits for its host to appear, and `look`, called meanwhile; with a path also `prepare` and `about` of `Handed`."""

    def __init__(
        self,
        url: str,
        side: str = "host",
        subsystem: Any = None,
        messages: int = 4_096,
        txns: int = 1_024,
        patience_s: float = 0.0,
        prepare: Prepare = lambda facts: {},
        about: Message | None = None,
        look: Look = never,
    ) -> None:
        if subsystem is None:
            from waveos import sched as subsystem
        super().__init__(url, side, subsystem)
        self.name = url.removeprefix("shm://")
        self._agent: subprocess.Popen[bytes] | None = None
        self._queues: dict[int, Queue] = {}
        self._segment: Any  # a Segment, or on the agent's side a Handed
        self._prepare, self._about, self._look = prepare, about or {}, look
        if side == "host":
            if self.name.startswith("/"):
                raise LinkError(f"{url}: the host's side of such a link is hostd: `wave hostd`; or give the ring a name, as in shm://demo")
            for kind, capacity in (("messages", messages), ("txns", txns)):
                _words_of(kind, capacity)
            self._segment = Segment.create(self.name, subsystem.SUBSYSTEM)
            try:
                self.create_queue("messages", messages)
                self.create_queue("txns", txns)
            except BaseException:
                self.close()
                raise
        else:
            self._attach(patience_s)

    def _attach(self, patience_s: float) -> None:
        end, pause_s = time.monotonic() + patience_s, 0.002
        while True:
            try:
                self._segment = self._find()
                try:
                    self._join()
                except BaseException:
                    self._segment.close()
                    raise
                return
            except LinkError as error:
                if time.monotonic() >= end or getattr(error, "final", False):
                    raise
                self._look()
                time.sleep(pause_s)
                pause_s = min(1.5 * pause_s, LONGEST_PAUSE_S)

    def _find(self) -> Segment | Handed:
        if self.name.startswith("/"):
            return Handed(self.name, self.subsystem.SUBSYSTEM, self._prepare, self._about, self._look)
        return Segment.attach(self.name, self.subsystem.SUBSYSTEM)

    def _join(self) -> None:
        self._queues = {}
        self.queue(MESSAGES)
        self.queue(TXNS)

    @property
    def handed(self) -> Handed | None:
        """What hostd handed over, and the way to speak with it; None on a link by name."""
        return self._segment if isinstance(self._segment, Handed) else None

    def renew(self, about: Message) -> None:
        """Agent of a hostd: with a new policy, take new queues into which the host's whole state comes. Raises LinkError."""
        if self.handed is None:
            raise LinkError(f"{self.url}: only hostd (shm:///PATH) gives an agent new queues")
        self._last, self._created = {}, 0
        self.handed.attach(about)
        self._join()

    # Set-up

    def create_queue(self, kind: str, capacity: int) -> int:
        """Make a queue of `kind` "messages" or "txns" with `capacity` records, a power of two; its number."""
        if self.side != "host":
            self._refuse("create_queue", "host")
        _words_of(kind, capacity)
        number: int = self._segment.add_queue(kind, capacity)
        memory = self._segment.map_queue(number)
        ring.compiled().create(memory, capacity, VERSION, self.subsystem.SUBSYSTEM, self._segment.generation)
        self._segment.publish_queue(number, kind)
        self._queues[number] = self._open_queue(memory, kind, capacity)
        return number

    def destroy_queue(self, queue: int) -> None:
        """Take a queue out of service; messages associated with it go to the first queue again."""
        if self.side != "host":
            self._refuse("destroy_queue", "host")
        memory = self.queue(queue).memory
        ring.compiled().retire(memory)
        self._segment.remove_queue(queue)
        del self._queues[queue]
        self._route = {cpu: number for cpu, number in self._route.items() if number != queue}

    def assoc_queue_with(self, queue: int, cpu: int) -> None:
        """Send messages about that CPU to that queue from now on; the order across queues is open."""
        if self.queue(queue).kind != "messages":
            raise LinkError(f"queue {queue} of {self.url} carries txns; messages can be associated with a queue of messages alone")
        super().assoc_queue_with(queue, cpu)

    def start_wave_agent(self, policy: str, *arguments: str) -> int:
        """Start `agentd` for this link with that policy in a process of its own; its pid. `await_agent` says when it is attached."""
        if self.side != "host":
            self._refuse("start_wave_agent", "host")
        if self._segment.agent() or (self._agent is not None and self._agent.poll() is None):
            raise LinkError(f"{self.url} already has an agent: kill_wave_agent first")
        self._agent = subprocess.Popen([*AGENT, self.url, policy, *arguments])
        return self._agent.pid

    def await_agent(self, timeout_s: float = 10.0) -> int:
        """Wait until an agent is attached; its pid. Raises LinkError if the one that was started ended, or after `timeout_s`."""
        end = time.monotonic() + timeout_s
        while not (pid := int(self._segment.agent())):
            if self._agent is not None and self._agent.poll() is not None:
                raise LinkError(f"the agent of {self.url} ended with status {self._agent.returncode} before it attached; see its messages above")
            if time.monotonic() >= end:
                raise LinkError(f"no agent attached to {self.url} within {timeout_s} s: start `wave agentd {self.url} POLICY`")
            time.sleep(0.001)
        return pid

    def kill_wave_agent(self) -> None:
        """Stop this link's agent: SIGTERM, and SIGKILL if it is still there after 2 s. Nothing if there is none."""
        if self.side != "host":
            self._refuse("kill_wave_agent", "host")
        child, self._agent = self._agent, None
        if child is not None:
            child.terminate()
            try:
                child.wait(KILL_AFTER_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        elif (pid := self._segment.agent()) and pid != os.getpid():
            started = start_time(pid)
            for number in (signal.SIGTERM, signal.SIGKILL):
                end = time.monotonic() + KILL_AFTER_S
                if start_time(pid) == started:
                    os.kill(pid, number)
                while start_time(pid) == started and time.monotonic() < end:
                    time.sleep(0.001)

    # Records

    def queue(self, number: int) -> Queue:
        """The queue of that number, joined on first use. Raises LinkError if there is none."""
        if number not in self._queues:
            kind, _, capacity = self._segment.entry(number) if 0 <= number < 64 else (0, 0, 0)
            names = {code: name for name, code in KINDS.items()}
            if kind not in names or self.side == "host":
                raise LinkError(f"{self.url} has no queue {number}; it has {self._segment.queues()}")
            self._queues[number] = self._open_queue(self._segment.map_queue(number), names[kind], capacity)
        return self._queues[number]

    def _open_queue(self, memory: Words, kind: str, capacity: int) -> Queue:
        if len(memory) < ring.words(capacity):
            raise LinkError(f"a queue of {self.url} is smaller than its host says: restart the host")
        own = np.zeros(ring.OWN_WORDS, np.int64)
        sends = (kind == "messages") == (self.side == "host")
        join = ring.compiled().join_producer if sends else ring.compiled().join_consumer
        answer = join(memory, own, VERSION, self.subsystem.SUBSYSTEM, capacity)
        if answer == ring.OTHER_VERSION:
            spoken = ring.compiled().identity(memory) >> 40 & 0xFF
            raise LinkError(
                f"a queue of {self.url} is of version {spoken} of the contract, this side of version {VERSION}: install the same waveos on both"
            )
        if answer == ring.OTHER_SUBSYSTEM:
            raise LinkError(f"a queue of {self.url} is another subsystem's: check the ring name and the policy")
        if answer in (ring.OTHER_CAPACITY, ring.NO_POSITION):
            raise LinkError(f"a queue of {self.url} is not as its host made it, so somebody else writes there: restart the host")
        if answer != ring.JOINED:
            raise LinkError(f"a queue of {self.url} is out of service: its host has closed or restarted; reattach")
        batch = np.zeros(0 if sends else BATCH, self._message if kind == "messages" else self._decision)
        words = batch.view(np.int64)
        addresses = np.array([number for array in (memory, own, words) for number in (array.ctypes.data, array.size)])
        return Queue(kind, sends, memory, own, batch, addresses, addresses.ctypes.data)

    def _send(self, queue: int, records: Records) -> int:
        q = self._queues.get(queue) or self.queue(queue)
        if not q.sends:
            raise LinkError(f"queue {queue} of {self.url} carries {q.kind}; the {self.side} only takes from it")
        sent: int = _send(q.at, records if records.flags.c_contiguous else np.ascontiguousarray(records))
        if sent < 0:
            self._lost()
        return sent

    def _poll(self, queue: int, limit: int, wait_ns: int) -> Records:
        q = self._queues.get(queue) or self.queue(queue)
        if q.sends:
            raise LinkError(f"queue {queue} of {self.url} carries {q.kind}; the {self.side} only sends to it")
        while True:
            got = _poll(q.at, limit)
            if got > 0 or (got == 0 and wait_ns <= 0):
                return q.batch[:got]
            if got < 0 or not (_wait(q.at, min(wait_ns, POLL_SLICE_NS)) or self._segment.owned or self._segment.owner_alive()):
                self._lost()
            wait_ns -= POLL_SLICE_NS

    def _lost(self) -> NoReturn:
        if self._segment.owned:
            raise LinkError(f"{self.url} was closed, or that queue destroyed")
        raise LinkError(f"the host of {self.url} has closed, died or restarted: reattach when it is back, and expect its whole state anew")

    def prefetch_txns(self, queue: int = TXNS) -> bool:
        """Start loading the next transaction; True if one is there."""
        if self.side != "host":
            self._refuse("prefetch_txns", "host")
        q = self.queue(queue)
        return bool(ring.compiled().prefetch(q.memory, q.own))

    # State

    @property
    def messages_memory(self) -> Words:
        """The ring of the first queue of messages, for compiled loops."""
        return self.queue(MESSAGES).memory

    @property
    def messages_own(self) -> Words:
        """This side's positions in it."""
        return self.queue(MESSAGES).own

    @property
    def txns_memory(self) -> Words:
        """The ring of the first queue of transactions, for compiled loops."""
        return self.queue(TXNS).memory

    @property
    def txns_own(self) -> Words:
        """This side's positions in it."""
        return self.queue(TXNS).own

    def overflowed(self, queue: int = MESSAGES) -> int:
        """How many records found that queue full since it was made; both sides see it."""
        return ring.overflowed(CoherentMemory(self.queue(queue).memory))

    def heartbeat(self) -> int:
        """Host: the clock of the agent's loop when it last gave a sign of life, ns. 0: none yet."""
        return int(ring.compiled().heartbeat(self.txns_memory))

    def peer_alive(self) -> bool:
        """True while the other side is attached and its process lives."""
        return bool(self._segment.agent()) if self._segment.owned else self._segment.owner_alive()

    def peer_joins(self) -> int:
        """Host: how many agents have attached so far. When it rises, send RESYNC and the state. Agent: always 1; a new host is a new link."""
        return ring.joins(CoherentMemory(self.messages_memory), ring.CONSUMERS_AT) if self.side == "host" else 1

    def check(self) -> None:
        """Raises LinkError if the peer's side of the link is gone: for loops that poll the rings themselves, now and then."""
        q = self.queue(MESSAGES)
        if ring.restarted(CoherentMemory(q.memory), q.own) or not (self._segment.owned or self._segment.owner_alive()):
            self._lost()

    def reattach(self, patience_s: float = 0.0) -> None:
        """Agent: attach to the host that has this ring name now. Raises LinkError if none has it within `patience_s`."""
        if self.side != "agent":
            self._refuse("reattach", "agent")
        self._segment.close()
        self._last, self._created = {}, 0
        self._attach(patience_s)

    def close(self) -> None:
        """Detach. The host's side stops an agent it started, ends the segment and removes its file. Twice does no harm."""
        if self.side == "host" and self._agent is not None:
            self.kill_wave_agent()
        self._segment.close()

    def __enter__(self) -> ShmLink:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _words_of(kind: str, capacity: int) -> int:
    if kind not in KINDS:
        raise LinkError(f"a queue carries 'messages' or 'txns', not {kind!r}")
    try:
        return ring.words(capacity)
    except ValueError as error:
        raise LinkError(f"the queue of {kind}: {error}") from error
