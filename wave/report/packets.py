"""A trace of packets for ui.perfetto.dev: a track for each worker and stack core, the agent, every queue's length, and each packet's whole way."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from waveos.net.trace import PacketEvent
from waveos.report.perfetto import Event, in_us, write_drawn

STACK, AGENT, WORKERS, QUEUES, PACKETS = range(1, 6)
_PROCESSES = {STACK: "stack cores", AGENT: "agent", WORKERS: "workers", QUEUES: "queues", PACKETS: "packets"}
_STACK, _INBOX, _HELD = "stack: waiting", "agent: not yet seen", "policy: held"
# Where a packet is from one event on, as the slices within its own are called.
_STAGES = {
    PacketEvent.ARRIVED: "waits for the stack",
    PacketEvent.STACK_BEGIN: "in the stack",
    PacketEvent.STACK_END: "on its way to the agent",
    PacketEvent.SEEN: "held by the policy",
    PacketEvent.STEERED: "on its way to the worker",
    PacketEvent.QUEUED: "in the worker's queue",
    PacketEvent.WORK_BEGIN: "served",
    PacketEvent.WORK_END: "reply waits for the stack",
}


def write_trace(events: NDArray[np.void], path: str | os.PathLike[str], meta: Mapping[str, Any]) -> int:
    """Write `events` (`waveos.trace.TRACE_EVENT` of kinds `PacketEvent`) to `path`; gzipped where it ends in .gz. Returns how many it drew.

    meta["classes"] names the classes; the rest is kept in the file. Raises ConfigError if the file cannot be written.
    """
    drawing = Drawing(list(meta.get("classes", [])))
    ordered = events[np.argsort(events["time_ns"], kind="stable")]
    for event in zip(*(ordered[name].tolist() for name in ("time_ns", "kind", "cpu", "tid", "value", "extra")), strict=True):
        drawing.take(*event)
    drawing.close()
    write_drawn(drawing.drawn(), path, {key: value for key, value in meta.items() if key != "classes"})
    return len(drawing.events)


class Drawing:
    """Turns events, in order of time, into trace-event objects. Packets whose beginning is not in the trace are drawn where they are served, not as a way."""

    def __init__(self, classes: list[str]) -> None:
        self.events: list[Event] = []
        self._classes = classes
        self._now_ns = 0
        self._tracks: dict[tuple[int, int], str] = {}
        self._begun: dict[tuple[int, int], tuple[int, str]] = {}
        self._ways: dict[int, list[tuple[int, int]]] = {}  # (time, kind) of each packet under way
        self._named: dict[int, int] = {}
        self._lanes: list[int] = []
        self._queues: dict[str, int] = {}

    def take(self, time_ns: int, kind: int, cpu: int, request: int, value: int, extra: int) -> None:
        """Draw one event."""
        self._now_ns = time_ns
        match kind:
            case PacketEvent.ARRIVED:
                self._ways[request], self._named[request] = [], value
                self._count(time_ns, _STACK, +1)
            case PacketEvent.STACK_BEGIN:
                self._count(time_ns, _STACK, -1)
                self._begin(time_ns, STACK, cpu, f"stack core {cpu}", f"{self._name(request)} {'out' if value else 'in'}")
            case PacketEvent.STACK_END:
                self._end(time_ns, STACK, cpu, {"request": request})
                if not value:
                    self._count(time_ns, _INBOX, +1)
            case PacketEvent.AGENT_BEGIN:
                self._begin(time_ns, AGENT, 0, "agent", "batch")
            case PacketEvent.AGENT_END:
                self._end(time_ns, AGENT, 0, {"messages": value, "decisions": extra})
            case PacketEvent.SEEN:
                self._count(time_ns, _INBOX, -1)
                self._count(time_ns, _HELD, +1)
            case PacketEvent.STEERED | PacketEvent.SHED:
                self._count(time_ns, _HELD, -1)
            case PacketEvent.QUEUED:
                self._count(time_ns, f"worker {cpu}: waiting", +1)
            case PacketEvent.WORK_BEGIN:
                self._named[request] = value
                self._count(time_ns, f"worker {cpu}: waiting", -1)
                self._begin(time_ns, WORKERS, cpu, f"worker {cpu}", self._name(request))
            case PacketEvent.WORK_END:
                self._end(time_ns, WORKERS, cpu, {"request": request})
                self._count(time_ns, _STACK, +1)
            case _:
                pass
        if request in self._ways:
            self._ways[request].append((time_ns, kind))
            if kind in (PacketEvent.ANSWERED, PacketEvent.SHED):
                self._draw_way(request, "refused" if kind == PacketEvent.SHED else "answered")

    def close(self) -> None:
        """Draw what the end of the trace cuts off, up to there."""
        for process, track in list(self._begun):
            self._end(self._now_ns, process, track, {"cut": True})
        for request in list(self._ways):
            self._ways[request].append((self._now_ns, 0))
            self._draw_way(request, "cut off by the end of the trace")

    def drawn(self) -> list[Event]:
        """Names of processes and tracks, then the events by time, the longer first."""
        named: list[Event] = []
        for process, name in _PROCESSES.items():
            named.append({"ph": "M", "pid": process, "tid": 0, "name": "process_name", "args": {"name": name}})
            named.append({"ph": "M", "pid": process, "tid": 0, "name": "process_sort_index", "args": {"sort_index": process}})
        for (process, track), name in sorted(self._tracks.items()):
            named.append({"ph": "M", "pid": process, "tid": track + 1, "name": "thread_name", "args": {"name": name}})
            named.append({"ph": "M", "pid": process, "tid": track + 1, "name": "thread_sort_index", "args": {"sort_index": track}})
        return [*named, *sorted(self.events, key=lambda event: (event["ts"], -event.get("dur", 0.0)))]

    def _name(self, request: int) -> str:
        number = self._named.get(request, -1)
        return self._classes[number] if 0 <= number < len(self._classes) else f"class {number}" if number >= 0 else "request"

    def _begin(self, time_ns: int, process: int, track: int, name: str, what: str) -> None:
        self._tracks[process, track] = name
        self._begun[process, track] = time_ns, what

    def _end(self, time_ns: int, process: int, track: int, args: Event) -> None:
        if begun := self._begun.pop((process, track), None):
            self._slice(process, track, begun[0], time_ns, begun[1], args)

    def _draw_way(self, request: int, end: str) -> None:
        """One slice for the packet, and one within it for each stage, on the first lane that is free."""
        way = self._ways.pop(request)
        since_ns, until_ns = way[0][0], way[-1][0]
        lane = next((number for number, free_ns in enumerate(self._lanes) if free_ns <= since_ns), len(self._lanes))
        if lane == len(self._lanes):
            self._lanes.append(0)
        self._lanes[lane] = until_ns
        self._tracks[PACKETS, lane] = f"packets ({lane + 1})"
        self._slice(PACKETS, lane, since_ns, until_ns, self._name(request), {"request": request, "end": end})
        done = False
        for (begin_ns, kind), (end_ns, _) in itertools.pairwise(way):
            stage = _STAGES.get(PacketEvent(kind), "") if kind else ""
            if done and kind in (PacketEvent.STACK_BEGIN, PacketEvent.STACK_END):
                stage = "reply in the stack"
            done = done or kind == PacketEvent.WORK_END
            if stage and end_ns > begin_ns:
                self._slice(PACKETS, lane, begin_ns, end_ns, stage, {})

    def _slice(self, process: int, track: int, since_ns: int, until_ns: int, name: str, args: Event) -> None:
        self.events.append(
            {
                "ph": "X",
                "pid": process,
                "tid": track + 1,
                "ts": in_us(since_ns),
                "dur": in_us(until_ns - since_ns),
                "name": name,
                "cat": _PROCESSES[process],
                "args": args,
            }
        )

    def _count(self, time_ns: int, queue: str, change: int) -> None:
        """A trace that begins in the middle sees some leave that it has not seen come: a queue is at least empty."""
        self._queues[queue] = max(0, self._queues.get(queue, 0) + change)
        self.events.append({"ph": "C", "pid": QUEUES, "tid": 0, "ts": in_us(time_ns), "name": queue, "args": {"packets": self._queues[queue]}})
