"""An open-loop client over AF_XDP: requests go out at times that were drawn before, whatever has become of earlier ones; latency counts from those times."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from waveos.host.net.forwarder import CLASS_AT, HEADERS_BYTES, RPC_AT, STATUS_AT, UDP_AT, WORK_AT
from waveos.host.net.topology import Network, inside
from waveos.host.xsk import PACKET, Port
from waveos.host.xsk.generator import udp_packet
from waveos.host.xsk.rings import complete, fill, give_back, load8, load32, load64, receive, send, store8, store16, store64, take, wake
from waveos.jit import jit, store_word
from waveos.net.records import REPLY, REQUEST, RPC, RPC_MAGIC, RPC_VERSION
from waveos.primitives import clock_ns, pause

FIELDS: Any = RPC.fields
ID_AT, SENT_AT, KIND_AT, MAGIC_AT = (RPC_AT + int(FIELDS[name][1]) for name in ("id", "sent_ns", "kind", "magic"))
WORKER_AT = RPC_AT + int(FIELDS["worker"][1])
WORDS_AT = RPC_AT + int(FIELDS["slo_us"][1]), RPC_AT + int(FIELDS["argument"][1])
BATCH = 64
PLAN = np.dtype(
    [
        ("at_ns", "i8"),  # when to send, after the start
        ("done_ns", "i8"),  # CLOCK_MONOTONIC of the reply; 0: none
        ("slo_us", "u4"),
        ("argument", "u4"),
        ("source_port", "u2"),  # which flow
        ("request_class", "u1"),
        ("status", "u1"),
        ("worker", "i4"),
        ("work_ns", "i8"),  # what the worker says that it took
    ],
    align=True,
)
"""One request, and what became of it."""


def draw_plan(rate_per_s: float, duration_s: float, range_share: float, *, flows: int, slo_us: tuple[int, int], seed: int) -> npt.NDArray[np.void]:
    """Poisson arrivals of two classes (0 GET, 1 RANGE), each of a flow picked at random; [n] PLAN."""
    random = np.random.default_rng(seed)
    n = random.poisson(rate_per_s * duration_s)
    plan = np.zeros(n, PLAN)
    plan["at_ns"] = np.sort(random.random(n) * duration_s * 1e9).astype(np.int64)
    plan["request_class"] = random.random(n) < range_share
    plan["slo_us"] = np.where(plan["request_class"], slo_us[1], slo_us[0])
    plan["argument"] = random.integers(0, 1 << 20, n)
    plan["source_port"] = 10_000 + random.integers(0, flows, n)
    return plan


@jit
def drive(xsk: Any, frames: Any, packets: Any, template: Any, plan: Any, first: int, start_ns: int, heartbeat_at: int, until_ns: int) -> int:
    """Send plan[first:] at their times and take replies until `until_ns`; the first request not sent."""
    x, stack, words, length = xsk[0], frames[0], template.shape[0] // 8, template.shape[0]
    i, n = first, plan.shape[0]
    now = clock_ns()
    while now < until_ns:
        store_word(heartbeat_at, now)
        complete(x, stack)
        fill(x, stack)
        count = 0
        while i < n and count < BATCH and start_ns + plan[i].at_ns <= now:
            frame = take(stack)
            if frame < 0:
                break
            at = x.umem_at + frame
            for w in range(words):
                store64(at + 8 * w, template.view(np.int64)[w])
            p = plan[i]
            store16(at + UDP_AT, (p.source_port & 0xFF) << 8 | p.source_port >> 8)
            store8(at + CLASS_AT, p.request_class)
            store64(at + ID_AT, i)
            store64(at + SENT_AT, start_ns + p.at_ns)
            store16(at + WORDS_AT[0], p.slo_us & 0xFFFF)
            store16(at + WORDS_AT[0] + 2, p.slo_us >> 16)
            store16(at + WORDS_AT[1], p.argument & 0xFFFF)
            store16(at + WORDS_AT[1] + 2, p.argument >> 16)
            packets[count].at, packets[count].length = frame, length
            count += 1
            i += 1
        fit = send(x, packets, 0, count) if count else 0
        for k in range(fit, count):
            give_back(stack, packets[k].at)
        i -= count - fit
        wake(x)
        got = receive(x, packets, BATCH)
        now = clock_ns()
        for k in range(got):
            at = x.umem_at + packets[k].at
            number = load64(at + ID_AT)
            if packets[k].length >= HEADERS_BYTES and load8(at + KIND_AT) == REPLY and 0 <= number < n and plan[number].done_ns == 0:
                plan[number].done_ns, plan[number].status, plan[number].worker = now, load8(at + STATUS_AT), load8(at + WORKER_AT)
                plan[number].work_ns = load32(at + WORK_AT)
            give_back(stack, packets[k].at)
        if got == 0 and count == 0:
            pause()
    return i


@dataclass(frozen=True)
class Answered:
    """A plan with what became of it, and when it began on CLOCK_MONOTONIC."""

    plan: npt.NDArray[np.void]
    start_ns: int

    def latency_us(self, request_class: int) -> npt.NDArray[np.float64]:
        """From intended send to reply, of the requests of a class that were answered (not refused)."""
        p = self.plan[(self.plan["request_class"] == request_class) & (self.plan["done_ns"] > 0) & (self.plan["status"] == 0)]
        return (p["done_ns"] - self.start_ns - p["at_ns"]) / 1e3

    @property
    def unanswered(self) -> int:
        """Requests without any reply."""
        return int(np.sum(self.plan["done_ns"] == 0))


class Client:
    """An AF_XDP port in the client's namespace."""

    def __init__(self, network: Network, port: int) -> None:
        with inside(network.client.namespace):
            self._port = Port.open(network.client.interface, port=port, from_client=False)
        self._port.control["patience_ns"] = 60_000_000_000  # whoever else uses the cores: replies are this process's
        payload = np.zeros(1, RPC)
        payload["magic"], payload["version"], payload["kind"] = RPC_MAGIC, RPC_VERSION, REQUEST
        source = (network.client.mac, network.client.address, 10_000)
        body = payload.tobytes()
        body += bytes(-(RPC_AT + len(body)) % 8)
        self._template = np.frombuffer(udp_packet(source, (network.host.mac, network.host.address, port), body), np.uint8)
        self._packets = np.zeros(BATCH, PACKET)
        drive(self._port.xsk.record, self._port.frames.record, self._packets, self._template, np.zeros(1, PLAN), 0, 0, 0, 0)  # compiles

    def run(self, plan: npt.NDArray[np.void], *, patience_s: float = 1.0, heard: Any = None) -> Answered:
        """Send the plan and wait for replies, at most `patience_s` after the last send. `heard` is called every 50 ms with the time since the start in s."""
        start_ns = time.monotonic_ns() + 5_000_000
        end_ns = start_ns + (int(plan["at_ns"][-1]) if len(plan) else 0) + int(patience_s * 1e9)
        x, frames, sent = self._port.xsk.record, self._port.frames.record, 0
        while time.monotonic_ns() < end_ns and not (sent == len(plan) and np.all(plan["done_ns"])):
            until_ns = min(end_ns, time.monotonic_ns() + 50_000_000)
            sent = drive(x, frames, self._packets, self._template, plan, sent, start_ns, self._port.heartbeat_at, until_ns)
            if heard is not None:
                heard((time.monotonic_ns() - start_ns) / 1e9)
        return Answered(plan, start_ns)

    def close(self) -> None:
        """Leave the interface."""
        self._port.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
