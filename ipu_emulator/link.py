"""`virtual://PROFILE[/NAME]`: both sides of a link in one process, joined by what a link profile says it costs, in virtual time.

Each side has its own clock (`now_ns`) and its own copy of every ring's memory. A verb runs the ring code and charges its cost to the clock of the side
that stalls. The lines it wrote reach the other side's copy at their time: a host's store one wire later, an agent's store at once, since the rings lie in the
agent's memory and it is the host's read that makes the round trip. A verb sees what has arrived by its side's clock; an empty poll costs a look, a poll with
`wait_ns` moves the clock to the first arrival, or by `wait_ns`. Nothing else moves the clocks, so equal calls give equal times and equal bytes.

    host = open_link("virtual://mount-evans", side="host")     # the host's side first
    agent = open_link("virtual://mount-evans", side="agent")   # in the same process
    host.start_wave_agent("fifo")                              # or this: a policy in the agent's place, run whenever the host polls
"""

from __future__ import annotations

import argparse
import os
from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple, NoReturn

import numpy as np

from waveos import ring
from waveos.errors import ConfigError, LinkError
from waveos.ipu_emulator.profile import MITIGATIONS, link_costs, load_link
from waveos.link import MESSAGES, TXNS
from waveos.link.verbs import BATCH, QueueVerbs, Records, Words
from waveos.policy import load_policy
from waveos.primitives import LINE_WORDS, CoherentMemory
from waveos.record import RECORD_WORDS, VERSION
from waveos.sched.laws import OUT, failure, feed_all, make_runtime
from waveos.sched.records import DECISION, MAX_THREADS, MESSAGE, Message

KINDS = {"messages": "host", "txns": "agent"}
"""Kinds of queues, and the side that sends."""
AGENT_BATCH = 64
"""Messages after which an agent closes a batch although more are there; as in agentd."""
_hosts: dict[str, VirtualLink] = {}
"""The links that are open in this process, by URL: an agent's side finds its host here."""


class _Arrival(NamedTuple):
    """Lines on their way to one side's copy of a ring."""

    time_ns: int
    first: int  # word
    words: Words


class _Queue:
    """One queue: a ring, as each side has it, and the lines under way between the two."""

    def __init__(self, kind: str, capacity: int) -> None:
        self.kind, self.capacity = kind, capacity
        self.memory: dict[str, Words] = {side: np.zeros(ring.words(capacity), np.int64) for side in ("host", "agent")}
        self.arrivals: dict[str, deque[_Arrival]] = {side: deque() for side in ("host", "agent")}

    def post(self, to: str, time_ns: int, first: int, n: int = LINE_WORDS) -> None:
        """Send n words from `first` on, as the other side of `to` has them now, to `to`'s copy."""
        near = self.memory["agent" if to == "host" else "host"]
        self.arrivals[to].append(_Arrival(time_ns, first, near[first : first + n].copy()))

    def deliver(self, to: str, now_ns: int) -> None:
        """Let arrive what has had the time to."""
        under_way = self.arrivals[to]
        while under_way and under_way[0].time_ns <= now_ns:
            arrival = under_way.popleft()
            self.memory[to][arrival.first : arrival.first + len(arrival.words)] = arrival.words


class VirtualLink(QueueVerbs):
    """One side of a virtual link; a context manager. Options of the host's side: `messages` and `txns`, the capacities (powers of two), and
    `mitigations`, those of the paper's four that are on. The agent's side has none (`patience_s` is for links that may come later, and ignored)."""

    def __init__(
        self,
        url: str,
        side: str = "host",
        subsystem: Any = None,
        messages: int = 4_096,
        txns: int = 1_024,
        mitigations: Iterable[str] = MITIGATIONS,
        patience_s: float = 0.0,
    ) -> None:
        if subsystem is None:
            from waveos import sched as subsystem
        super().__init__(url, side, subsystem)
        self.now_ns = 0
        self.peer: VirtualLink | None = None
        self._open = False
        self._own: dict[int, Words] = {}
        self._batch: dict[int, Records] = {}
        self._prefetched_ns: dict[int, int] = {}
        self._agent: _InlineAgent | None = None
        self._agents = 0
        if side == "host":
            try:
                self.profile = load_link(url.removeprefix("virtual://").partition("/")[0])
                self.costs = link_costs(self.profile, mitigations)
            except ConfigError as error:
                raise LinkError(f"{url}: {error}") from error
            if url in _hosts:
                raise LinkError(f"{url} is already open in this process: close it, or give this one a name, {url.rstrip('/')}/NAME")
            self.queues: dict[int, _Queue] = {}
            self._next_queue = 0
            self._open = True
            self.create_queue("messages", messages)
            self.create_queue("txns", txns)
            _hosts[url] = self
        else:
            self._attach()

    def _attach(self) -> None:
        host = _hosts.get(self.url)
        if host is None:
            raise LinkError(f'no host has opened {self.url} in this process: open its side="host" first; a virtual link does not leave the process')
        if host.peer is not None:
            raise LinkError(f"{self.url} already has an agent: close that one, or kill_wave_agent, first")
        if host.subsystem.SUBSYSTEM != self.subsystem.SUBSYSTEM:
            raise LinkError(f"{self.url} carries subsystem {host.subsystem.SUBSYSTEM}, this agent is for {self.subsystem.SUBSYSTEM}")
        self.profile, self.costs, self.queues = host.profile, host.costs, host.queues
        self._own, self._batch = {}, {}
        self.peer, host.peer = host, self
        self._open = True
        host._agents += 1
        for number in self.queues:
            self._join(number)

    # Set-up

    def create_queue(self, kind: str, capacity: int) -> int:
        """Make a queue of `kind` "messages" or "txns" with `capacity` records, a power of two; its number. Both sides see it at once."""
        self._belongs("create_queue", "host")
        if kind not in KINDS:
            raise LinkError(f"a queue carries 'messages' or 'txns', not {kind!r}")
        try:
            queue = _Queue(kind, capacity)
        except ValueError as error:
            raise LinkError(f"the queue of {kind}: {error}") from error
        for memory in queue.memory.values():
            ring.compiled().create(memory, capacity, VERSION, self.subsystem.SUBSYSTEM, 1)
        number, self._next_queue = self._next_queue, self._next_queue + 1
        self.queues[number] = queue
        self._join(number)
        if self.peer is not None:
            self.peer._join(number)
        return number

    def destroy_queue(self, queue: int) -> None:
        """Take a queue out of service; messages associated with it go to the first queue again."""
        self._belongs("destroy_queue", "host")
        self._queue(queue)
        del self.queues[queue]
        self._route = {cpu: number for cpu, number in self._route.items() if number != queue}

    def assoc_queue_with(self, queue: int, cpu: int) -> None:
        """Send messages about that CPU to that queue from now on; the order across queues is open."""
        self._belongs("assoc_queue_with", "host")
        if self._queue(queue).kind != "messages":
            raise LinkError(f"queue {queue} of {self.url} carries txns; messages can be associated with a queue of messages alone")
        super().assoc_queue_with(queue, cpu)

    def start_wave_agent(self, policy: str, *arguments: str) -> int:
        """Put a policy's runtime at the agent's side, in this process; its pid, which is this one's.

        It has a clock of its own and runs when the host polls: all batches that begin, in virtual time, before the poll's answer. It takes the
        arguments of agentd: --cpus, --threads, --ahead, --param KEY=VALUE, --replay. Link costs are charged to it, the policy's own time is not.
        Raises PolicyError from `poll_txns` when the policy fails.
        """
        self._belongs("start_wave_agent", "host")
        if self.peer is not None:
            raise LinkError(f"{self.url} already has an agent: kill_wave_agent first")
        self._agent = _InlineAgent(self, policy, arguments)
        return os.getpid()

    def await_agent(self, timeout_s: float = 0.0) -> int:
        """The pid of the agent, which is there as soon as it is started. Raises LinkError if there is none."""
        if self.peer is None:
            raise LinkError(f'no agent is attached to {self.url}: start_wave_agent, or open its side="agent"')
        return os.getpid()

    def kill_wave_agent(self) -> None:
        """Take the agent off its side. Nothing if there is none."""
        self._belongs("kill_wave_agent", "host")
        if self.peer is not None:
            self.peer.close()
        self._agent = None

    # Records

    def _belongs(self, verb: str, side: str) -> None:
        if self.side != side:
            self._refuse(verb, side)
        self.check()

    def _queue(self, number: int) -> _Queue:
        self.check()
        if number not in self.queues:
            raise LinkError(f"{self.url} has no queue {number}; it has {sorted(self.queues)}")
        return self.queues[number]

    def _join(self, number: int) -> None:
        """Become the queue's producer or consumer, once all that is under way has arrived."""
        queue = self.queues[number]
        other = "agent" if self.side == "host" else "host"
        for side in (self.side, other):
            if arrivals := queue.arrivals[side]:
                self.now_ns = max(self.now_ns, arrivals[-1].time_ns)
            queue.deliver(side, self.now_ns)
        memory, own = queue.memory[self.side], np.zeros(ring.OWN_WORDS, np.int64)
        sends = KINDS[queue.kind] == self.side
        join = ring.compiled().join_producer if sends else ring.compiled().join_consumer
        if join(memory, own, VERSION, self.subsystem.SUBSYSTEM) != ring.JOINED:
            raise LinkError(f"queue {number} of {self.url} is out of service")
        queue.memory[other][:] = memory
        self._own[number] = own
        if not sends:
            self._batch[number] = np.zeros(BATCH, self._message if queue.kind == "messages" else self._decision)

    def _send(self, queue: int, records: Records) -> int:
        q = self._queue(queue)
        if KINDS[q.kind] != self.side:
            raise LinkError(f"queue {queue} of {self.url} carries {q.kind}; the {self.side} only takes from it")
        to, own, memory = "agent" if self.side == "host" else "host", self._own[queue], q.memory[self.side]
        q.deliver(self.side, self.now_ns)
        first, lost = int(own[ring.NEXT]), int(own[ring.LOST])
        sent = int(ring.compiled().send(memory, own, np.ascontiguousarray(records).view(np.int64), len(records)))
        if self.side == "host":
            self.now_ns += sent * self.costs.host_write_ns + self.costs.host_flush_ns
        else:
            self.now_ns += sent * self.costs.agent_write_ns
        arrives_ns = self._arrival_ns()
        at = first & (q.capacity - 1)
        before_wrap = min(sent, q.capacity - at)
        for slot, n in ((at, before_wrap), (0, sent - before_wrap)):
            if n:
                q.post(to, arrives_ns, ring.HEADER_WORDS + slot * RECORD_WORDS, n * RECORD_WORDS)
        if own[ring.LOST] != lost:
            q.post(to, arrives_ns, ring.OVERFLOW_AT)
        return sent

    def _arrival_ns(self) -> int:
        """When the other side sees what this one has just stored."""
        return self.now_ns + (self.costs.wire_ns if self.side == "host" else 0)

    def _poll(self, queue: int, limit: int, wait_ns: int) -> Records:
        q = self._queue(queue)
        if KINDS[q.kind] == self.side:
            raise LinkError(f"queue {queue} of {self.url} carries {q.kind}; the {self.side} only sends to it")
        end_ns = self.now_ns + max(0, wait_ns)
        while True:
            if self._agent is not None:
                self._agent.run(self.now_ns)
            got = self._take(q, queue, limit)
            if got or self.now_ns >= end_ns:
                break
            arrivals = q.arrivals[self.side]
            due_ns = arrivals[0].time_ns if arrivals else end_ns
            if self._agent is not None:
                due_ns = min(due_ns, self._agent.due_ns())
            self.now_ns = max(self.now_ns, min(due_ns, end_ns))
        if got:
            self.now_ns += self._read_ns(queue, got)
        elif wait_ns <= 0:
            self.now_ns += self._look_ns()
        return self._batch[queue][:got]

    def _take(self, q: _Queue, queue: int, limit: int) -> int:
        """Take what has arrived, up to `limit`, into the queue's batch."""
        q.deliver(self.side, self.now_ns)
        own = self._own[queue]
        credit = int(own[ring.CREDIT])
        got = int(ring.compiled().poll(q.memory[self.side], own, self._batch[queue].view(np.int64), min(limit, BATCH)))
        if own[ring.CREDIT] != credit:
            q.post("agent" if self.side == "host" else "host", self._arrival_ns(), ring.CREDIT_AT)
        return got

    def _read_ns(self, queue: int, n: int) -> int:
        """What it costs to read n records."""
        if self.side == "agent":
            return n * self.costs.agent_read_ns
        first_ns = self.costs.host_read_ns
        if (begun_ns := self._prefetched_ns.pop(queue, -1)) >= 0:
            first_ns = max(min(self.costs.host_hit_ns, first_ns), first_ns - (self.now_ns - begun_ns))
        return first_ns + (n - 1) * self.costs.host_read_ns

    def _look_ns(self) -> int:
        """What it costs to find that there is none: never nothing, or a loop that polls would stop its own clock."""
        costs = self.costs
        return max(1, costs.host_peek_ns if self.side == "host" else min(costs.agent_read_ns, self.profile.agent.uc_read_ns))

    def prefetch_txns(self, queue: int = TXNS) -> bool:
        """Start loading the next transaction; True if one is there. The poll that follows stalls for what is left of the load."""
        self._belongs("prefetch_txns", "host")
        q = self._queue(queue)
        q.deliver(self.side, self.now_ns)
        there = bool(ring.compiled().prefetch(q.memory[self.side], self._own[queue]))
        if there and self.costs.prefetch:
            self._prefetched_ns.setdefault(queue, self.now_ns)
        return there

    # State

    def room(self, queue: int, n: int) -> int:
        """How many records the sender's side has room for: exactly, if fewer than n; else at least n."""
        q = self._queue(queue)
        q.deliver(self.side, self.now_ns)
        return int(ring.room(CoherentMemory(q.memory[self.side]), self._own[queue], n))

    def arrival_ns(self, queue: int = MESSAGES) -> int:
        """When the next lines come to this side's copy of the queue; far in the future if nothing is under way."""
        arrivals = self._queue(queue).arrivals[self.side]
        return arrivals[0].time_ns if arrivals else 1 << 62

    def overflowed(self, queue: int = MESSAGES) -> int:
        """How many records found that queue full since it was made, as this side knows by now."""
        q = self._queue(queue)
        q.deliver(self.side, self.now_ns)
        return int(ring.overflowed(CoherentMemory(q.memory[self.side])))

    def peer_alive(self) -> bool:
        """True while the other side is open."""
        return self._open and self.peer is not None

    def peer_joins(self) -> int:
        """Host: how many agents have attached so far. When it rises, send RESYNC and the state. Agent: always 1."""
        return self._agents if self.side == "host" else 1

    def check(self) -> None:
        """Raises LinkError if this side is closed or its host gone."""
        if not self._open:
            self._lost()

    def _lost(self) -> NoReturn:
        if self.side == "host":
            raise LinkError(f"{self.url} was closed")
        raise LinkError(f"{self.url}: this side was closed, or its host was: reattach when a host is there, and expect its whole state anew")

    def reattach(self, patience_s: float = 0.0) -> None:
        """Agent: attach to the host that has this URL now. Raises LinkError if there is none."""
        if self.side != "agent":
            self._refuse("reattach", "agent")
        self.close()
        self._last, self._created = {}, 0
        self._attach()

    def close(self) -> None:
        """Detach; the host's side ends the link. Twice does no harm."""
        if not self._open:
            return
        self._open = False
        peer, self.peer = self.peer, None
        if self.side == "host":
            self._agent = None
            _hosts.pop(self.url, None)
            if peer is not None:
                peer.peer, peer._open = None, False
        elif peer is not None:
            peer.peer = None

    def __enter__(self) -> VirtualLink:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise LinkError(f"the agent of a virtual link: {message}")


class _InlineAgent:
    """A policy's runtime behind the agent's side of a virtual link, with that side's clock."""

    def __init__(self, host: VirtualLink, policy: str, arguments: tuple[str, ...]) -> None:
        parser = _Parser(add_help=False, allow_abbrev=False)
        parser.add_argument("--cpus", type=int, default=8)
        parser.add_argument("--threads", type=int, default=MAX_THREADS)
        parser.add_argument("--ahead", type=int, default=int(host.costs.prestage))
        parser.add_argument("--param", type=_parameter, action="append", default=[])
        parser.add_argument("--replay", action="store_true")
        options = parser.parse_args(arguments)
        self.bound = load_policy(policy).bind(n_cpus=options.cpus, params=dict(options.param))
        try:
            self.runtime = make_runtime(self.bound, cpus=options.cpus, threads=options.threads, ahead=options.ahead)
        except ValueError as error:
            raise LinkError(f"the agent of {host.url}: {error}") from error
        self.replay = options.replay
        self.link = VirtualLink(host.url, side="agent", subsystem=host.subsystem)
        self._out, self._left = np.zeros(4 * OUT, DECISION), np.zeros(0, DECISION)
        self._ready = True  # messages may be there that the last batch has left

    def due_ns(self) -> int:
        """When it has something to do next; far in the future if nothing is under way."""
        link = self.link
        due_ns = link.now_ns if self._ready else link.arrival_ns(MESSAGES)
        if len(self._left):
            due_ns = min(due_ns, link.now_ns if link.room(TXNS, 1) else link.arrival_ns(TXNS))
        return max(link.now_ns, min(due_ns, self._timer_ns()))

    def _timer_ns(self) -> int:
        """When the first timer that has not been looked at expires."""
        head = self.runtime[0]
        cpu = head["cpu"][: int(head["cpus"])]
        open_ns = cpu["timer_ns"][(cpu["timer_ns"] > head["now_ns"]) & (cpu["running"] >= 0) & (cpu["ordered"] == 0)]
        return int(open_ns.min()) if len(open_ns) and not self.replay else 1 << 62

    def run(self, until_ns: int) -> None:
        """Run every batch that begins by then."""
        while (due_ns := self.due_ns()) <= until_ns:
            self.link.now_ns = due_ns
            if len(self._left):
                self._commit()
            if not len(self._left):
                self._serve()

    def _serve(self) -> None:
        """One batch: drain, decide, commit."""
        batch = self.link.poll_messages(AGENT_BATCH)
        self._ready = len(batch) == AGENT_BATCH
        if not self.replay:
            end = np.zeros(1, MESSAGE)
            end["type"], end["time_ns"], end["tid"], end["cpu"] = Message.BATCH_END, self.link.now_ns, -1, -1
            batch = np.concatenate([batch, end])
        pieces, taken = [self._left], 0
        while taken < len(batch):
            taken, made = feed_all(self.runtime, batch, taken, self._out)
            if self.runtime["failed"][0]:
                raise failure(self.runtime, self.bound)
            pieces.append(self._out[:made].copy())
        self._left = np.concatenate(pieces)
        self._commit()

    def _commit(self) -> None:
        """Send what there is room for."""
        while len(self._left) and (n := min(len(self._left), BATCH, self.link.room(TXNS, BATCH))):
            self.link.txn_create(n)[:] = self._left[:n]
            self._left = self._left[n:]
            self.link.txns_commit()


def _parameter(text: str) -> tuple[str, float]:
    key, _, value = text.partition("=")
    try:
        return key, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write KEY=NUMBER") from None
