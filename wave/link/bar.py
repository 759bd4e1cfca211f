"""`bar://DEVICE`: a host and an agent that share the memory of a PCI device: the host through a BAR, the agent as memory of its own.

The host's side lays the memory out: two notices in the first page (whose it is, what is in it, and who serves it), then the two rings, each from a page
on. They are the rings of `waveos.ring`, over the primitives of `BarMemory` on the host's side and of plain memory on the agent's. The host maps the slots
of the messages write-combining, all else uncached. Both poll; neither can
interrupt the other. The sides are two machines, so neither knows whether the other's process lives: each shows a beat, and one that shows none for
`silence_s` is gone. What a side left that died, or whose machine lost power, is taken over by the next once it has shown no beat for WATCH_S.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import numpy as np

from waveos import ring
from waveos.errors import LinkError
from waveos.link import MESSAGES, TXNS, notice
from waveos.link.device import Device, DeviceError
from waveos.link.shm import KILL_AFTER_S, LONGEST_PAUSE_S, POLL_SLICE_NS
from waveos.link.verbs import BATCH, QueueVerbs, Records, Words
from waveos.primitives import BarMemory
from waveos.record import RECORD_WORDS, VERSION

MAGIC, LAYOUT = 0x5742, 1
NOTICE_WORDS = 512
PAGE_WORDS = 8_192
"""The largest page of the machines at either end (Arm's may have 64 KiB): each ring begins with one."""
HOST_AT, HOST_BEAT_AT = 0, 24
"""The host's notice. Its stamp: magic 16 bits, contract version 8, subsystem 8, layout 8, generation 24. Its words: HOST_WORDS."""
AGENT_AT, AGENT_BEAT_AT = 64, 96
"""The agent's notice. Its stamp is a number of its own; its words: pid, and the policy's name in eight."""
HOST_WORDS = ("pid", "messages", "txns", "cpus", "threads", "ahead")
"""Process, capacities of the queues, and what the host says about its enclave, 1 more than it is (0: it does not say)."""
FACTS = HOST_WORDS[3:]
NAME_BYTES = 64
AGENT_WORDS = 1 + NAME_BYTES // 8
BEAT_S = 0.1
MOST = (1 << 62) - 1
WATCH_S = 0.5
"""How long an end that somebody seems to have is watched for a beat."""
AGENT = (sys.executable, "-P", "-m", "waveos.agents.agentd")
KINDS = ("messages", "txns")
Facts = dict[str, Any]


class Queue(NamedTuple):
    """One queue as this side sees it."""

    kind: str  # "messages" or "txns"
    sends: bool  # this side is the producer
    memory: Any  # the ring's, shared: BarMemory on the host's side, Words on the agent's
    own: Words  # this side's positions
    batch: Records  # what a poll returns
    words: Words  # and its words


class BarLink(QueueVerbs):
    """One side of a link through a BAR; a context manager. Options: `silence_s`, after which a peer without a beat is gone; the host's `messages` and `txns`,
    the capacities (powers of two), and `about`: cpus, threads, ahead of its enclave; the agent's `patience_s`, how long it waits for its host, `about`:
    its policy, and `prepare`, called with what the host says before the agent takes its place."""

    handed = None

    def __init__(
        self,
        url: str,
        side: str = "host",
        subsystem: Any = None,
        messages: int = 4_096,
        txns: int = 1_024,
        patience_s: float = 0.0,
        silence_s: float = 2.0,
        prepare: Callable[[Facts], Facts] = lambda facts: {},
        about: Facts | None = None,
    ) -> None:
        if subsystem is None:
            from waveos import sched as subsystem
        super().__init__(url, side, subsystem)
        self._about, self._prepare, self._silence_s = about or {}, prepare, silence_s
        self._capacities = messages, txns
        self._agent: subprocess.Popen[bytes] | None = None
        self._device: Device | None = None
        self._keeper: threading.Thread | None = None
        self._over = threading.Event()
        self._queues: list[Queue] = []
        self._stamp = 0  # of the host's notice
        self._peer = Watch()
        self.trouble = ""
        """Why the peer is not there."""
        self.policy = ""
        """The agent's, as it says."""
        if side == "host":
            try:
                self._lay_out()
            except BaseException:
                self._leave()
                raise
        else:
            self._attach(patience_s)

    # The host's side

    def _lay_out(self) -> None:
        device = self._device = Device(self.url, "host")
        starts, size = _places(*self._capacities)
        device.need(size, f"queues of {self._capacities[0]} messages and {self._capacities[1]} txns")
        page = self._page = BarMemory(device.map(0, NOTICE_WORDS))
        stamp, told = notice.read(page, HOST_AT, len(HOST_WORDS))
        generation = secrets.randbelow(ring.MAX_GENERATION)
        if _is_ours(stamp):
            if _beats(page, HOST_BEAT_AT):
                raise DeviceError(f"{self.url} already has a host on another machine (pid {told[0]} there): stop that one, or use another device")
            generation = stamp & ring.MAX_GENERATION
        elif stamp and device.is_file:
            raise DeviceError(f"{self.url}: {device.path} holds something that is not Wave's: use another file, or clear it if nobody needs it")
        notice.withdraw(page, HOST_AT)
        if _is_ours(stamp):
            self._retire(stamp, told)
        generation = generation % ring.MAX_GENERATION + 1
        for kind, start, capacity in zip(KINDS, starts, self._capacities, strict=True):
            memory = self._map(start, ring.words(capacity), kind)
            ring.compiled().create(memory, capacity, VERSION, self.subsystem.SUBSYSTEM, generation)
            ring.compiled().settle(memory)  # before it is read
            self._queues.append(self._open_queue(memory, kind, capacity))
        words = [os.getpid(), *self._capacities, *(int(self._about[name]) + 1 if name in self._about else 0 for name in FACTS)]
        self._stamp = MAGIC << 48 | VERSION << 40 | self.subsystem.SUBSYSTEM << 32 | LAYOUT << 24 | generation
        self._begin_beats(HOST_BEAT_AT)
        notice.post(page, HOST_AT, self._stamp, words)

    def _retire(self, stamp: int, told: list[int]) -> None:
        """Tell an agent that is still joined to them that the rings of an older host are over."""
        capacities = told[1:3]
        if stamp >> 24 & 0xFF != LAYOUT or not all(2 <= capacity <= 1 << 30 and not capacity & (capacity - 1) for capacity in capacities):
            return
        starts, size = _places(*capacities)
        if self._device is not None and size <= self._device.bytes:
            for start in starts:
                ring.compiled().retire(self._map(start, NOTICE_WORDS))

    # The agent's side

    def _attach(self, patience_s: float) -> None:
        end, pause_s = time.monotonic() + patience_s, 0.002
        while True:
            try:
                return self._join()
            except LinkError as error:
                self._leave()
                if time.monotonic() >= end or getattr(error, "final", False):
                    raise
                time.sleep(pause_s)
                pause_s = min(1.5 * pause_s, LONGEST_PAUSE_S)
            except BaseException:
                self._leave()
                raise

    def _join(self) -> None:
        device = self._device = Device(self.url, "agent")
        device.need(8 * NOTICE_WORDS, "the notices")
        page = self._page = BarMemory(device.map(0, NOTICE_WORDS))
        stamp, told = notice.read(page, HOST_AT, len(HOST_WORDS))
        self._check(stamp)
        starts, size = _places(*told[1:3])
        device.need(size, f"the queues that its host has made ({told[1]} messages, {told[2]} txns)")
        if not _beats(page, HOST_BEAT_AT):
            raise LinkError(f"the host of {self.url} (pid {told[0]} there) gives no sign of life: restart it; that lays the device out anew")
        if notice.stamp_of(page, AGENT_AT) and _beats(page, AGENT_BEAT_AT):
            raise DeviceError(f"{self.url} already has an agent on another machine: stop that one, or use another device")
        told_policy = self._prepare({name: word - 1 for name, word in zip(HOST_WORDS, told, strict=True) if name in FACTS and word > 0})
        policy = str(told_policy.get("policy") or self._about.get("policy") or "")
        self._stamp = stamp
        notice.withdraw(page, AGENT_AT)  # one that was killed may have left it; the host takes the next that joins the rings for the one it names
        for kind, start, capacity in zip(KINDS, starts, told[1:3], strict=True):
            self._queues.append(self._open_queue(self._map(start, ring.words(capacity)), kind, capacity))
        if notice.stamp_of(page, HOST_AT) != stamp:
            raise LinkError(f"the host of {self.url} has restarted just now: attach again")
        self._peer = Watch(notice.beat_of(page, HOST_BEAT_AT))
        self._begin_beats(AGENT_BEAT_AT)
        name = np.frombuffer(policy.encode()[:NAME_BYTES].ljust(NAME_BYTES, b"\0"), np.int64)
        notice.post(page, AGENT_AT, 1 + secrets.randbits(62), [os.getpid(), *map(int, name)])

    def _check(self, stamp: int) -> None:
        """Raises LinkError unless an agent like this one can join a host whose notice has that stamp."""
        if stamp == -1:
            raise LinkError(f"{self.url} does not answer (all its bits are 1): is the device there, and powered?")
        if not _is_ours(stamp):
            raise LinkError(f"no host has laid {self.url} out: start the host first, with the same device")
        layout, version, subsystem = stamp >> 24 & 0xFF, stamp >> 40 & 0xFF, stamp >> 32 & 0xFF
        if (layout, version) != (LAYOUT, VERSION):
            raise DeviceError(
                f"the host of {self.url} speaks version {version} of the contract, layout {layout}; this agent version {VERSION}, layout {LAYOUT}: "
                "install the same waveos on both"
            )
        if subsystem != self.subsystem.SUBSYSTEM:
            raise DeviceError(
                f"{self.url} carries subsystem {subsystem}, this agent is for {self.subsystem.SUBSYSTEM}: check the device and the policy"
            )

    def reattach(self, patience_s: float = 0.0) -> None:
        """Agent: attach to the host that has the device now. Raises LinkError if none has it within `patience_s`."""
        if self.side != "agent":
            self._refuse("reattach", "agent")
        self._leave()
        self._last, self._created = {}, 0
        self._attach(patience_s)

    # Both

    def _map(self, start: int, n: int, kind: str = "") -> Any:
        """n words of the device from word `start` on, as this side uses them."""
        assert self._device is not None
        if self.side == "agent":
            return self._device.map(start, n)
        return BarMemory(self._device.map(start, n, alone=kind == "messages"))  # but for the first page, which has the consumer's line

    def _open_queue(self, memory: Any, kind: str, capacity: int) -> Queue:
        own, sends = np.zeros(ring.OWN_WORDS, np.int64), (kind == "messages") == (self.side == "host")
        join = ring.compiled().join_producer if sends else ring.compiled().join_consumer
        if join(memory, own, VERSION, self.subsystem.SUBSYSTEM, capacity) != ring.JOINED:
            raise LinkError(f"a queue of {self.url} is not as its host said: it restarts, or the device was reset: attach again")
        batch = np.zeros(0 if sends else BATCH, self._message if kind == "messages" else self._decision)
        return Queue(kind, sends, memory, own, batch, batch.view(np.int64))

    def _begin_beats(self, at: int) -> None:
        page, over = self._page, self._over
        over.clear()
        value = notice.beat_of(page, at)

        def keep() -> None:
            beats = value
            while True:
                beats = beats + 1 & MOST
                notice.beat(page, at, beats)
                if over.wait(BEAT_S):
                    return

        self._keeper = threading.Thread(target=keep, daemon=True, name="bar-beat")
        self._keeper.start()

    def peer_alive(self) -> bool:
        """True while the other side is attached and shows its beat."""
        if not self._queues:
            return False
        if self.side == "agent":
            if notice.stamp_of(self._page, HOST_AT) != self._stamp:
                self.trouble = f"the host of {self.url} has closed it or restarted"
                return False
            beat = notice.beat_of(self._page, HOST_BEAT_AT)
        else:
            if notice.stamp_of(self._page, AGENT_AT) == 0 or self.peer_joins() == 0:
                self.trouble = f"no agent has attached to {self.url}, or it has left: start `wave agentd` on the device"
                return False
            beat = notice.beat_of(self._page, AGENT_BEAT_AT)
        if self._peer.alive(beat, self._silence_s):
            return True
        self.trouble = f"the {'host' if self.side == 'agent' else 'agent'} of {self.url} has shown no sign of life for {self._silence_s:g} s"
        return False

    def heartbeat(self) -> int:
        """Host: the clock of the agent's loop when it last gave a sign of life, on its machine, ns; finer than a beat. 0: none yet."""
        return int(ring.compiled().heartbeat(self.queue(TXNS).memory))

    def peer_joins(self) -> int:
        """Host: how many agents have attached so far. When it rises, send RESYNC and the state. Agent: always 1; a new host is a new link."""
        return int(ring.compiled().joins(self.queue(MESSAGES).memory, ring.CONSUMERS_AT)) if self.side == "host" else 1

    def check(self) -> None:
        """Raises LinkError if the peer's side of the link is gone: for loops that poll the rings themselves, now and then."""
        queue = self.queue(MESSAGES)
        if ring.compiled().restarted(queue.memory, queue.own) or (self.side == "agent" and not self.peer_alive()):
            self._lost()

    def _lost(self) -> NoReturn:
        if self.side == "host":
            raise LinkError(f"{self.url} was reset, is gone, or another host has laid it out anew: close it and open it again")
        raise LinkError(f"{self.trouble or f'the host of {self.url} has restarted'}: reattach when it is back, and expect its whole state anew")

    def queue(self, number: int) -> Queue:
        """The queue of that number, for compiled loops."""
        if not self._queues:
            raise LinkError(f"{self.url} was closed, or lost and not found again: reattach, or open it anew")
        if not 0 <= number < len(self._queues):
            raise LinkError(f"{self.url} has no queue {number}; a link through a BAR has {MESSAGES} (messages) and {TXNS} (txns)")
        return self._queues[number]

    @property
    def messages_memory(self) -> Any:
        """The ring of messages, for compiled loops."""
        return self.queue(MESSAGES).memory

    @property
    def messages_own(self) -> Any:
        """This side's positions in it."""
        return self.queue(MESSAGES).own

    @property
    def txns_memory(self) -> Any:
        """The ring of transactions, for compiled loops."""
        return self.queue(TXNS).memory

    @property
    def txns_own(self) -> Any:
        """This side's positions in it."""
        return self.queue(TXNS).own

    def _send(self, queue: int, records: Records) -> int:
        q = self.queue(queue)
        if not q.sends:
            raise LinkError(f"queue {queue} of {self.url} carries {q.kind}; the {self.side} only takes from it")
        if ring.compiled().restarted(q.memory, q.own):
            self._lost()
        words = np.ascontiguousarray(records).view(np.int64)
        return int(ring.compiled().send(q.memory, q.own, words, len(words) // RECORD_WORDS))

    def _poll(self, queue: int, limit: int, wait_ns: int) -> Records:
        q = self.queue(queue)
        if q.sends:
            raise LinkError(f"queue {queue} of {self.url} carries {q.kind}; the {self.side} only sends to it")
        while True:
            got = int(ring.compiled().poll(q.memory, q.own, q.words, min(limit, BATCH)))
            if got or wait_ns <= 0:
                if not got and ring.compiled().restarted(q.memory, q.own):
                    self._lost()
                return q.batch[:got]
            if not ring.compiled().wait(q.memory, q.own, min(wait_ns, POLL_SLICE_NS)):
                self.check()
            wait_ns -= POLL_SLICE_NS

    def prefetch_txns(self, queue: int = TXNS) -> bool:
        """Start loading the next transaction; True if one is there."""
        if self.side != "host":
            self._refuse("prefetch_txns", "host")
        q = self.queue(queue)
        return bool(ring.compiled().prefetch(q.memory, q.own))

    def room(self, queue: int = MESSAGES, n: int = 1) -> int:
        """How many records surely fit: exactly, if fewer than n; else at least n."""
        q = self.queue(queue)
        return int(ring.compiled().room(q.memory, q.own, n))

    def overflowed(self, queue: int = MESSAGES) -> int:
        """How many records found that queue full since it was made; both sides see it."""
        q = self.queue(queue)
        return int(q.own[ring.LOST] if q.sends else ring.compiled().overflowed(q.memory))

    # Set-up

    def create_queue(self, kind: str, capacity: int) -> int:
        """There are two, for good. Raises LinkError."""
        raise LinkError(f"{self.url}: a link through a BAR has one queue of messages and one of txns; use another device for more")

    def destroy_queue(self, queue: int) -> None:
        """There are two, for good. Raises LinkError."""
        raise LinkError(f"{self.url}: the two queues of a link through a BAR end with it")

    def assoc_queue_with(self, queue: int, cpu: int) -> None:
        """Send messages about that CPU to that queue: there is one."""
        if queue != MESSAGES:
            raise LinkError(f"{self.url} has one queue of messages, {MESSAGES}")

    def start_wave_agent(self, policy: str, *arguments: str) -> int:
        """Start an agent on this machine, where a file stands for the device; its pid. One on a device is started there."""
        if self.side != "host":
            self._refuse("start_wave_agent", "host")
        if self._device is None or not self._device.is_file:
            raise LinkError(f"the agent of {self.url} runs on the device: start `wave agentd bar://PATH {policy}` there")
        if self._agent is not None and self._agent.poll() is None:
            raise LinkError(f"{self.url} already has an agent: kill_wave_agent first")
        self._agent = subprocess.Popen([*AGENT, self.url, policy, *arguments])
        return self._agent.pid

    def await_agent(self, timeout_s: float = 10.0) -> int:
        """Wait until an agent is attached; its pid, on its machine. Raises LinkError if the one that was started ended, or after `timeout_s`."""
        end = time.monotonic() + timeout_s
        while True:
            if self.peer_alive():
                _, words = notice.read(self._page, AGENT_AT, AGENT_WORDS)
                if words:
                    name = b"".join((word & (1 << 64) - 1).to_bytes(8, "little") for word in words[1:])
                    self.policy = "".join(filter(str.isprintable, name.rstrip(b"\0").decode(errors="replace")))
                    return words[0]
            if self._agent is not None and self._agent.poll() is not None:
                raise LinkError(f"the agent of {self.url} ended with status {self._agent.returncode} before it attached; see its messages above")
            if time.monotonic() >= end:
                raise LinkError(f"{self.url}: no agent within {timeout_s:g} s: {self.trouble}")
            self.check()
            time.sleep(0.001)

    def kill_wave_agent(self) -> None:
        """Stop the agent that this link started: SIGTERM, and SIGKILL if it is still there after 2 s. Nothing if there is none."""
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

    def close(self) -> None:
        """Detach. The host's side stops an agent it started, and ends the layout. Twice does no harm."""
        if self.side == "host" and self._agent is not None:
            self.kill_wave_agent()
        self._leave()

    def _leave(self) -> None:
        self._over.set()
        if self._keeper is not None:
            self._keeper.join()
            self._keeper = None
            notice.withdraw(self._page, HOST_AT if self.side == "host" else AGENT_AT)
            for queue in self._queues if self.side == "host" else ():
                ring.compiled().retire(queue.memory)
        self._queues = []
        if self._device is not None:
            self._device.close()
            self._device = None

    def __enter__(self) -> BarLink:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Watch:
    """A peer's beat, and when it was last seen to change."""

    def __init__(self, beat: int = 0) -> None:
        self._beat, self._since_s = beat, time.monotonic()

    def alive(self, beat: int, silence_s: float) -> bool:
        """Whether it has changed within that time."""
        now_s = time.monotonic()
        if beat != self._beat:
            self._beat, self._since_s = beat, now_s
        return now_s - self._since_s < silence_s


def _places(messages: int, txns: int) -> tuple[list[int], int]:
    """Where the rings begin, in words, and how many bytes there are in all. Raises LinkError unless the capacities can be."""
    starts, end = [], PAGE_WORDS
    for kind, capacity in zip(KINDS, (messages, txns), strict=True):
        starts.append(end)
        try:
            end += -(-ring.words(capacity) // PAGE_WORDS) * PAGE_WORDS
        except ValueError as error:
            raise LinkError(f"the queue of {kind}: {error}") from None
    return starts, 8 * end


def _is_ours(stamp: int) -> bool:
    return stamp >> 48 == MAGIC


def _beats(page: Any, at: int) -> bool:
    """Whether a sign of life comes while one watches."""
    before, end = notice.beat_of(page, at), time.monotonic() + WATCH_S
    while notice.beat_of(page, at) == before:
        if time.monotonic() >= end:
            return False
        time.sleep(0.005)
    return True
