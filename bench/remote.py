"""The network link against plain pyzmq, and the links that share memory beside it: round trips and messages per second between two processes here.

Both sides are Python over TCP on loopback, one process on each of two cores; in every round each kind gets a short block, so that all meet the same
machine; figures are medians over the rounds. A round trip is one record of 64 bytes there and one back. A stream is records in batches, all taken by the
other side, whose answer ends it.

zmq          Wave's verbs on both sides: CURVE, numbered frames, credit, signs of life; round trips without a deadline for batches, streams with one of 200 us
plain_pyzmq  DEALER and ROUTER, a frame of the same bytes, no encryption, nothing else
shm          the shared-memory link, compiled, as `wave bench link` measures it
bar          the link through a PCI BAR, in the same way and in turns with it; a file in memory stands for the device, so what is measured is the code (its
             barriers), not a device: each line that crosses PCIe costs the host some 0.5-1 us more, which the emulator's link profiles charge
"""

from __future__ import annotations

import os
import socket
import tempfile
import time
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from waveos import sched
from waveos.bench.machine import describe_machine
from waveos.errors import ConfigError, WaveError
from waveos.keys import Keys
from waveos.record import RECORD_BYTES

OPTIONS = {
    "rounds": (9, "interleaved rounds, at least 3; figures are medians over them"),
    "round_trips": (1_000, "round trips of a block"),
    "messages": (40_000, "messages of a block"),
    "batch": (64, "messages sent at once, 1 to 256"),
    "shm": (True, "also the links that share memory, shm and bar (compiles the agent's loop, if that was not done before)"),
}
PATIENCE_NS = 10_000_000_000
WARM = 0.1
"""Share of a block that is not counted."""
BATCH_US = 200.0
"""What a batch may wait for others in a stream."""
BAR_BYTES = 1 << 20
WANTED_RTT, WANTED_STREAM = 1.5, 0.55
"""Times plain pyzmq: a round trip at most, a stream at least."""
clock_ns = time.monotonic_ns


def run(rounds: int = 9, round_trips: int = 1_000, messages: int = 40_000, batch: int = 64, shm: bool = True) -> dict[str, Any]:
    """Measure all kinds, interleaved. Raises ConfigError on fewer than two cores or impossible options."""
    cores = sorted(os.sched_getaffinity(0))
    if rounds < 3 or round_trips < 50 or messages < 1_000 or not 1 <= batch <= 256:
        raise ConfigError(
            f"rounds {rounds}, round_trips {round_trips}, messages {messages}, batch {batch}: at least 3, 50 and 1000; a batch of 1 to 256"
        )
    if len(cores) < 2:
        raise ConfigError("bench remote needs two cores, one a side; this process may use one")
    times: dict[str, list[float]] = {}
    context = get_context("fork")
    here, there = context.Pipe()
    with tempfile.TemporaryDirectory(prefix="wave-bench-") as folder:
        keys = Keys(Path(folder))
        keys.add("other", keys.new().public)
        ports = tuple(free_port() for _ in _ends())
        other = context.Process(target=_serve_blocks, args=(there, cores[1], ports, folder, batch), daemon=True)
        other.start()
        there.close()
        os.sched_setaffinity(0, {cores[0]})
        ends = _ends()
        try:
            for kind, port in zip(ends, ports, strict=True):
                ends[kind].open("host", port, folder)
            for _ in range(rounds):
                for kind in ("zmq", "plain_pyzmq"):
                    here.send((kind, round_trips, 0))
                    trips = ends[kind].round_trips(round_trips)[round(WARM * round_trips) :]
                    _expect(here)
                    times.setdefault(f"{kind}_rtt", []).append(float(np.median(trips)))
                    times.setdefault(f"{kind}_rtt_p99", []).append(float(np.quantile(trips, 0.99)))
                for kind in ("zmq_batched", "plain_pyzmq"):
                    here.send((kind, 0, messages))
                    times.setdefault(f"{kind}_stream", []).append(ends[kind].stream(messages, batch))
                    _expect(here)
            here.send(None)
        finally:
            for end in ends.values():
                end.close()
            other.join(5)
            if other.is_alive():
                other.terminate()
                other.join()
            os.sched_setaffinity(0, set(cores))
    middle = {name: median(each) for name, each in times.items()}
    metrics = {
        "zmq_rtt_p50_us": middle["zmq_rtt"] / 1e3,
        "zmq_rtt_p99_us": middle["zmq_rtt_p99"] / 1e3,
        "plain_pyzmq_rtt_p50_us": middle["plain_pyzmq_rtt"] / 1e3,
        "plain_pyzmq_rtt_p99_us": middle["plain_pyzmq_rtt_p99"] / 1e3,
        "zmq_msgs_per_s": middle["zmq_batched_stream"],
        "plain_pyzmq_msgs_per_s": middle["plain_pyzmq_stream"],
        "batch": batch,
        "rounds": rounds,
    }
    metrics["rtt_ratio"] = median(a / b for a, b in zip(times["zmq_rtt"], times["plain_pyzmq_rtt"], strict=True))
    metrics["stream_ratio"] = median(a / b for a, b in zip(times["zmq_batched_stream"], times["plain_pyzmq_stream"], strict=True))
    if shm:
        metrics |= _memory_rtts_ns(cores, rounds)
    return {"name": "remote", "metrics": metrics, "machine": describe_machine(), "timing": "measured", "verdict": _conclude(metrics)}


def _ends() -> dict[str, Any]:
    """All that is measured, not opened yet."""
    return {"zmq": _Wave(), "zmq_batched": _Wave(BATCH_US), "plain_pyzmq": _Plain()}


def _conclude(metrics: dict[str, Any]) -> str:
    reached = metrics["rtt_ratio"] <= WANTED_RTT and metrics["stream_ratio"] >= WANTED_STREAM
    return (
        f"{'reaches' if reached else 'does not reach'} what was asked: a round trip takes {metrics['rtt_ratio']:.2f} times plain pyzmq's "
        f"(at most {WANTED_RTT}), a stream in batches of {metrics['batch']} runs at {metrics['stream_ratio']:.2f} of its speed (at least {WANTED_STREAM})"
    )


def _memory_rtts_ns(cores: list[int], rounds: int) -> dict[str, float]:
    """Both links that share memory, interleaved, each as `wave bench link` measures it."""
    link = import_module("waveos.bench.link")
    times: dict[str, list[float]] = {"shm": [], "bar": []}
    with tempfile.NamedTemporaryFile(prefix="wave-bar-", dir="/dev/shm") as device:
        os.truncate(device.name, BAR_BYTES)
        with link._both_sides(cores, "fifo", 8, f"bar://{device.name}") as block:
            for _ in range(rounds):
                for kind, each in times.items():
                    each.append(float(np.median(block(kind, "", link.BLOCKS["shm"]))))
    return {f"{kind}_rtt_p50_ns": median(each) for kind, each in times.items()}


def free_port() -> int:
    """A TCP port of loopback that nobody has now."""
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return int(asked.getsockname()[1])


def _expect(pipe: Any) -> None:
    if not pipe.poll(60):
        raise WaveError("bench remote: the process of the other side does not answer")
    try:
        said = pipe.recv()
    except EOFError:
        raise WaveError("bench remote: the process of the other side ended before the measurement was over") from None
    if said != "done":
        raise WaveError(f"bench remote: {said}")


def _serve_blocks(pipe: Any, core: int, ports: tuple[int, ...], folder: str, batch: int) -> None:
    """The process of the other side: its part of one block after the other."""
    ends = _ends()
    try:
        os.sched_setaffinity(0, {core})
        for kind, port in zip(ends, ports, strict=True):
            ends[kind].open("agent", port, folder)
        while True:
            while not pipe.poll(0.01):
                for end in ends.values():
                    end.attend()
            if (block := pipe.recv()) is None:
                return
            kind, trips, messages = block
            if trips:
                ends[kind].echo(trips)
            else:
                ends[kind].drain(messages, batch)
            pipe.send("done")
    except (WaveError, OSError) as error:
        pipe.send(str(error))
    finally:
        for end in ends.values():
            end.close()


class _Wave:
    """The link's verbs."""

    link: Any = None

    def __init__(self, batch_us: float = 0.0) -> None:
        self.batch_us = batch_us

    def open(self, side: str, port: int, folder: str) -> None:
        from waveos.link import open_link

        options = {"silence_s": 60.0, "batch_us": self.batch_us} if side == "host" else {}  # a machine that pauses is no agent that is gone
        self.link = open_link(f"zmq+tcp://127.0.0.1:{port}", side=side, keys=folder, **options)
        self.records = np.zeros(256, sched.MESSAGE)
        if side == "host":
            self.link.await_agent(60)

    def attend(self) -> None:
        self.link.poll_messages()

    def round_trips(self, n: int) -> Any:
        out, link, one = np.zeros(n, np.int64), self.link, self.records[:1]
        for i in range(n):
            begun = clock_ns()
            link.send_messages(one)
            got = link.poll_txns(1, PATIENCE_NS)
            out[i] = clock_ns() - begun
            if not len(got):
                raise WaveError(f"bench remote: no answer came ({self.link.trouble or 'and yet the session goes on'})")
        return out

    def echo(self, n: int) -> None:
        link = self.link
        for _ in range(n):
            if not len(link.poll_messages(1, PATIENCE_NS)):
                raise WaveError("no message came")
            link.txn_create()
            link.txns_commit()

    def stream(self, n: int, batch: int) -> float:
        link, many, left = self.link, self.records[:batch], n
        begun = clock_ns()
        while left:
            if (part := min(batch, left, link.room(0, batch))) > 0:
                left -= link.send_messages(many[:part])
        if not len(link.poll_txns(1, PATIENCE_NS)):
            raise WaveError("bench remote: no answer came")
        return n / (clock_ns() - begun) * 1e9

    def drain(self, n: int, batch: int) -> None:
        while n > 0:
            got = len(self.link.poll_messages(1_024, PATIENCE_NS))
            if not got:
                raise WaveError("no message came")
            n -= got
        self.link.txn_create()
        self.link.txns_commit()

    def close(self) -> None:
        if self.link is not None:
            self.link.close()


class _Plain:
    """pyzmq as anybody would use it."""

    context: Any = None

    def open(self, side: str, port: int, folder: str) -> None:
        zmq = import_module("zmq")
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER if side == "host" else zmq.ROUTER)
        self.socket.linger = 0
        self.socket.rcvtimeo = PATIENCE_NS // 1_000_000
        if side == "host":
            self.socket.connect(f"tcp://127.0.0.1:{port}")
        else:
            self.socket.bind(f"tcp://127.0.0.1:{port}")

    def attend(self) -> None:
        pass

    def round_trips(self, n: int) -> Any:
        out, end, one = np.zeros(n, np.int64), self.socket, bytes(RECORD_BYTES)
        for i in range(n):
            begun = clock_ns()
            end.send(one)
            end.recv()
            out[i] = clock_ns() - begun
        return out

    def echo(self, n: int) -> None:
        end = self.socket
        for _ in range(n):
            end.send_multipart(end.recv_multipart())

    def stream(self, n: int, batch: int) -> float:
        end, many, left = self.socket, bytes(batch * RECORD_BYTES), n
        begun = clock_ns()
        while left > 0:
            end.send(many)
            left -= batch
        end.recv()
        return n / (clock_ns() - begun) * 1e9

    def drain(self, n: int, batch: int) -> None:
        route = b""
        while n > 0:
            route, _ = self.socket.recv_multipart()
            n -= batch
        self.socket.send_multipart((route, b"done"))

    def close(self) -> None:
        if self.context is not None:
            self.context.destroy(0)
