"""A trace for ui.perfetto.dev: one track a CPU, agent core, link direction and queue.

The format is the Chrome trace-event JSON that Perfetto reads: complete events (`X`) for what lasts, instants (`i`), counters (`C`),
flow arrows (`s`, `f`) from a decision to the run that it led to, and metadata (`M`) for names. Times are virtual or real host
time in microseconds. Events on one track may nest but not overlap; what travels on a link at the same time goes on
further lanes of that direction.
"""

from __future__ import annotations

import gzip
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from waveos.errors import ConfigError
from waveos.outcome import Outcome
from waveos.output import write_file
from waveos.trace import RunEnd, TraceKind

HOST, AGENT, LINK, QUEUES = 1, 2, 3, 4
"""Perfetto's process numbers here."""
_UP, _DOWN, _DOORBELL = 1, 1_001, 2_001
"""First track number of each direction; its further lanes follow."""
_PROCESSES = {HOST: "host CPUs", AGENT: "agent", LINK: "link", QUEUES: "queues"}

_FIELDS = ("time_ns", "kind", "cpu", "tid", "value", "extra")

Event = dict[str, Any]


def write_trace(events: NDArray[np.void], path: str | os.PathLike[str], meta: Mapping[str, Any] | None = None) -> int:
    """Write `events` (dtype `waveos.trace.TRACE_EVENT`, any order of time) to `path`; gzipped where it ends in .gz. Returns how many it drew.

    `meta` may name things: `classes`, `queues` and `cpus` (lists, by number), `messages`, `decisions` and `threads` (number -> name); whatever else it
    holds (policy, world, seed, timing, link) is kept in the file as `otherData`. Raises ConfigError for events of another dtype
    and if the file cannot be written.
    """
    drawn = trace_events(events, meta)
    named = {"classes", "queues", "cpus", "messages", "decisions", "threads"}
    other = {key: value for key, value in (meta or {}).items() if key not in named}
    write_drawn(drawn, path, other)
    return len(drawn)


def write_drawn(drawn: Sequence[Event], path: str | os.PathLike[str], other: Mapping[str, Any]) -> None:
    """Write trace-event objects, and what is to be kept with them. Raises ConfigError if the file cannot be written."""
    content = json.dumps({"displayTimeUnit": "ns", "otherData": other, "traceEvents": drawn}, separators=(",", ":"), default=str).encode()
    write_file(path, gzip.compress(content, mtime=0) if os.fspath(path).endswith(".gz") else content)


def trace_events(events: NDArray[np.void], meta: Mapping[str, Any] | None = None) -> list[Event]:
    """The trace-event objects of `events`, in order of time, names first. Raises ConfigError for events of another dtype."""
    if events.dtype.names is None or not set(_FIELDS) <= set(events.dtype.names):
        raise ConfigError(f"a trace wants events with the fields {', '.join(_FIELDS)} (waveos.trace.TRACE_EVENT), not {events.dtype}")
    ordered = events[np.argsort(events["time_ns"], kind="stable")]
    drawing = _Drawing(_Names(meta or {}), int(ordered["time_ns"][0]) if len(ordered) else 0)
    for event in zip(*(ordered[name].tolist() for name in _FIELDS), strict=True):
        drawing.take(*event)
    drawing.close()
    drawn = sorted(drawing.events, key=lambda event: (event["ts"], -event.get("dur", 0.0), event["ph"] != "X"))
    return [*_metadata(drawing.tracks), *drawn]


class _Names:
    """What numbers are called."""

    def __init__(self, meta: Mapping[str, Any]) -> None:
        self.classes = _by_number(meta.get("classes"))
        self.queues = {0: "messages to the agent"} | _by_number(meta.get("queues"))
        self.cpus, self.threads = _by_number(meta.get("cpus")), _by_number(meta.get("threads"))
        self.messages = _by_number(meta.get("messages")) or _lower(_sched("Message"))
        self.decisions = _by_number(meta.get("decisions")) or _lower(_sched("Decision"))

    def request_class(self, number: int) -> str:
        return self.classes.get(number, f"class {number}")

    def thread(self, number: int) -> str:
        return self.threads.get(number, f"thread {number}")

    def queue(self, number: int) -> str:
        return self.queues.get(number, f"queue {number}")

    def message(self, number: int) -> str:
        return self.messages.get(number, f"message {number}")

    def decision(self, number: int) -> str:
        return self.decisions.get(number, f"decision {number}")


@dataclass
class _Open:
    """Something that has begun: a run, a batch, a message or decision on its way."""

    time_ns: int
    tid: int
    value: int
    extra: int


class _Drawing:
    """Turns events, in order of time, into trace-event objects."""

    def __init__(self, names: _Names, start_ns: int) -> None:
        self.names = names
        self.start_ns = start_ns
        self.now_ns = start_ns
        self.events: list[Event] = []
        self.tracks: dict[tuple[int, int], str] = {}
        self._running: dict[int, _Open] = {}
        self._idle: dict[int, int] = {}
        self._batches: dict[int, _Open] = {}
        self._messages: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
        self._decisions: dict[int, tuple[_Open, int]] = {}
        self._kicks: dict[int, list[int]] = {}
        self._arrows: dict[int, int] = {}
        self._seen_cpus: set[int] = set()
        self._lanes: dict[int, list[int]] = {_UP: [], _DOWN: [], _DOORBELL: []}

    def take(self, time_ns: int, kind: int, cpu: int, tid: int, value: int, extra: int) -> None:
        """Draw one event; a kind of a newer version is left out."""
        self.now_ns = time_ns
        if kind == TraceKind.RUN_BEGIN:
            self._begin_run(time_ns, cpu, tid, value, extra)
        elif kind == TraceKind.RUN_END:
            self._end_run(time_ns, cpu, tid, value)
        elif kind == TraceKind.IDLE_BEGIN:
            if cpu not in self._running:
                self._end_idle(time_ns, cpu)
            self._seen_cpus.add(cpu)
            self._idle[cpu] = time_ns
        elif kind == TraceKind.MESSAGE_SENT:
            self._messages.setdefault((extra, tid, value), []).append((time_ns, cpu))
        elif kind == TraceKind.MESSAGE_SEEN:
            self._arrive_message(time_ns, cpu, tid, value, extra)
        elif kind == TraceKind.DECISION_MADE:
            self._decisions[extra] = (_Open(time_ns, tid, value, extra), cpu)
            self._draw_arrow("s", AGENT, self._agent(), time_ns, extra)
        elif kind == TraceKind.DECISION_APPLIED:
            self._arrive_decision(time_ns, cpu, tid, extra, f"committed, state {value} ns old")
            self._arrows[cpu] = extra
            self._instant(HOST, self._cpu(cpu), time_ns, f"committed: {tid}", {"txn": extra, "state_age_ns": value})
        elif kind == TraceKind.DECISION_REFUSED:
            reason = _name_of(Outcome, value)
            self._arrive_decision(time_ns, cpu, tid, extra, reason)
            self._instant(HOST, self._cpu(cpu), time_ns, f"refused: {reason}", {"tid": tid, "txn": extra, "outcome": reason})
        elif kind == TraceKind.KICK_SENT:
            self._kicks.setdefault(cpu, []).append(time_ns)
            self._instant(AGENT, self._agent(), time_ns, f"kick CPU {cpu}", {"txn": extra})
        elif kind == TraceKind.KICK_SEEN:
            if self._kicks.get(cpu):  # doorbells of one CPU do not overtake each other
                self._travel(_DOORBELL, "doorbells", self._kicks[cpu].pop(0), time_ns, f"kick CPU {cpu}", {"txn": extra})
            self._instant(HOST, self._cpu(cpu), time_ns, "kick", {"txn": extra})
        elif kind == TraceKind.QUEUE_DEPTH:
            self.events.append({"ph": "C", "pid": QUEUES, "tid": 0, "ts": in_us(time_ns), "name": self.names.queue(cpu), "args": {"entries": value}})
        elif kind == TraceKind.AGENT_BEGIN:
            self._batches[cpu] = _Open(time_ns, -1, 0, 0)
        elif kind == TraceKind.AGENT_END:
            begun = self._batches.pop(cpu, None)
            since = begun.time_ns if begun else self.start_ns
            self._slice(AGENT, self._agent(cpu), since, time_ns, "batch", "agent", {"messages": value, "decisions": extra})

    def close(self) -> None:
        """Draw what the end of the trace cuts off, up to there."""
        for cpu, run in list(self._running.items()):
            self._end_run(self.now_ns, cpu, run.tid, -1)
        for cpu in list(self._idle):
            self._end_idle(self.now_ns, cpu)
        for core, begun in self._batches.items():
            self._slice(AGENT, self._agent(core), begun.time_ns, self.now_ns, "batch", "agent", {"cut": True})
        for (number, tid, kind), waiting in self._messages.items():
            for sent_ns, cpu in waiting:
                self.tracks.setdefault((LINK, _UP), "host to agent")
                args = {"tid": tid, "cpu": cpu, "message": number, "read": "not in the trace"}
                self._instant(LINK, _UP, sent_ns, self.names.message(kind), args)

    # ── host CPUs ──

    def _begin_run(self, time_ns: int, cpu: int, tid: int, request_class: int, request: int) -> None:
        if cpu in self._running:
            self._end_run(time_ns, cpu, self._running[cpu].tid, -1)
        self._end_idle(time_ns, cpu)
        self._seen_cpus.add(cpu)
        self._running[cpu] = _Open(time_ns, tid, request_class, request)
        if (txn := self._arrows.pop(cpu, None)) is not None:
            self._draw_arrow("f", HOST, self._cpu(cpu), time_ns, txn)

    def _end_run(self, time_ns: int, cpu: int, tid: int, reason: int) -> None:
        run = self._running.pop(cpu, None)
        if run is None:
            if cpu in self._seen_cpus:
                return
            run = _Open(self.start_ns, tid, -1, -1)
        self._seen_cpus.add(cpu)
        if cpu in self._idle:  # said a little early: a CPU that runs a thread is not idle
            self._idle[cpu] = time_ns
        thread = self.names.thread(run.tid)
        name = thread if run.value < 0 else f"{self.names.request_class(run.value)} · {thread}"
        args: dict[str, Any] = {"tid": run.tid}
        if run.extra >= 0:
            args["request"] = run.extra
        args["end"] = "cut off by the end of the trace" if reason < 0 else _name_of(RunEnd, reason)
        self._slice(HOST, self._cpu(cpu), run.time_ns, time_ns, name, "run", args)
        if reason == RunEnd.PREEMPTED:
            self._instant(HOST, self._cpu(cpu), time_ns, f"preempted: {run.tid}", {"tid": run.tid})

    def _end_idle(self, time_ns: int, cpu: int) -> None:
        since = self._idle.pop(cpu, None)
        if since is not None and time_ns > since:
            self._slice(HOST, self._cpu(cpu), since, time_ns, "idle", "idle", {}, colour="grey")

    # ── the link ──

    def _arrive_message(self, time_ns: int, cpu: int, tid: int, kind: int, number: int) -> None:
        """Messages of one number about one thread arrive in the order in which they were sent."""
        if waiting := self._messages.get((number, tid, kind)):
            sent_ns, sender = waiting.pop(0)
            self._travel(_UP, "host to agent", sent_ns, time_ns, self.names.message(kind), {"tid": tid, "cpu": sender, "message": number})

    def _arrive_decision(self, time_ns: int, cpu: int, tid: int, txn: int, outcome: str) -> None:
        made, _ = self._decisions.pop(txn, (None, cpu))
        if made is not None:
            args = {"tid": tid, "cpu": cpu, "txn": txn, "outcome": outcome}
            self._travel(_DOWN, "agent to host", made.time_ns, time_ns, f"{self.names.decision(made.value)} {tid} on CPU {cpu}", args)

    def _travel(self, direction: int, name: str, since_ns: int, until_ns: int, what: str, args: Event) -> None:
        """Draw what was on the way on the first lane that was free when it set out. Lanes are told by when they are free again."""
        lanes = self._lanes[direction]
        lane = next((number for number, free_ns in enumerate(lanes) if free_ns <= since_ns), len(lanes))
        if lane == len(lanes):
            lanes.append(0)
        lanes[lane] = until_ns
        track = direction + lane
        self.tracks[LINK, track] = name if lane == 0 else f"{name} ({lane + 1})"
        self._slice(LINK, track, since_ns, until_ns, what, "link", args)

    # ── what is drawn with ──

    def _cpu(self, cpu: int) -> int:
        self.tracks[HOST, cpu + 1] = f"CPU {self.names.cpus.get(cpu, cpu)}"
        return cpu + 1

    def _agent(self, core: int | None = None) -> int:
        """The track of an agent core; without one, of the core that is on a batch."""
        core = core if core is not None else next(iter(self._batches), 0)
        self.tracks[AGENT, core + 1] = f"agent core {core}"
        return core + 1

    def _slice(self, process: int, track: int, since_ns: int, until_ns: int, name: str, category: str, args: Event, colour: str = "") -> None:
        event: Event = {
            "ph": "X",
            "pid": process,
            "tid": track,
            "ts": in_us(since_ns),
            "dur": in_us(until_ns - since_ns),
            "name": name,
            "cat": category,
        }
        if colour:
            event["cname"] = colour
        self.events.append(event | {"args": args})

    def _instant(self, process: int, track: int, time_ns: int, name: str, args: Event) -> None:
        self.events.append({"ph": "i", "s": "t", "pid": process, "tid": track, "ts": in_us(time_ns), "name": name, "cat": "event", "args": args})

    def _draw_arrow(self, end: str, process: int, track: int, time_ns: int, txn: int) -> None:
        event: Event = {"ph": end, "id": txn, "pid": process, "tid": track, "ts": in_us(time_ns), "name": "decision", "cat": "decision"}
        self.events.append(event | {"bp": "e"} if end == "f" else event)


def _metadata(tracks: Mapping[tuple[int, int], str]) -> Iterator[Event]:
    """Names and order of processes and tracks."""
    for process, name in _PROCESSES.items():
        yield {"ph": "M", "pid": process, "tid": 0, "name": "process_name", "args": {"name": name}}
        yield {"ph": "M", "pid": process, "tid": 0, "name": "process_sort_index", "args": {"sort_index": process}}
    for (process, track), name in sorted(tracks.items()):
        yield {"ph": "M", "pid": process, "tid": track, "name": "thread_name", "args": {"name": name}}
        yield {"ph": "M", "pid": process, "tid": track, "name": "thread_sort_index", "args": {"sort_index": track}}


def in_us(ns: int) -> float:
    """Microseconds that a reader who multiplies by 1000 and cuts off the rest gets the same nanoseconds from: else neighbours overlap."""
    us = ns / 1_000
    return us if int(us * 1_000.0) == ns else math.nextafter(us, math.inf)


def _by_number(names: Sequence[str] | Mapping[Any, str] | None) -> dict[int, str]:
    if not names:
        return {}
    if isinstance(names, Mapping):
        return {int(number): str(name) for number, name in names.items()}
    return {number: str(name) for number, name in enumerate(names)}


def _sched(name: str) -> Iterable[IntEnum]:
    from waveos.sched import records

    members: Iterable[IntEnum] = getattr(records, name)
    return members


def _lower(members: Iterable[IntEnum]) -> dict[int, str]:
    return {member.value: member.name.lower() for member in members}


def _name_of(enum: type[IntEnum], value: int) -> str:
    """A member's name in words; the number where it has none."""
    return enum(value).name.lower().replace("_", " ") if value in [member.value for member in enum] else str(value)
