"""The shared-memory link against what else joins two processes: round trips and messages per second.

Two processes, one on each of two cores; in every round each kind gets a short block, so that all meet the same machine; figures are medians over the
rounds of a block's median or 99th percentile. A round trip is 64 bytes up and 64 bytes down, and is timed by two readings of CLOCK_MONOTONIC, whose own cost
(`clock_ns`) is within every figure.

shm          a compiled host sends thread_runnable and waits for the decision; agentd's compiled loop and the policy are in the other process. What brings the
             state back (outcome, blocked, idle) is sent, and done with, between the timed parts
raw          one word there and one back, two cache lines, nothing else: what the machine can do at all
shm_python   Wave's verbs as Python code calls them, on both sides, no policy
pyzmq_ipc    PAIR sockets over ipc://, pyzmq
iceoryx2     two publish-subscribe services through its Python binding: loan, write, send; the receiver polls
socketpair   AF_UNIX datagrams

For pyzmq and sockets a block is made twice, once with a blocking receive and once polling; the quicker counts. `shm_msgs_per_s` counts messages that
the policy has been told of; `pyzmq_ipc_msgs_per_s` those that Python has received.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from statistics import median
from typing import Any

import numpy as np

from waveos import ring
from waveos.bench import peers
from waveos.bench.machine import describe_machine
from waveos.errors import ConfigError, WaveError
from waveos.jit import jit
from waveos.link import MESSAGES, TXNS, open_link
from waveos.link.shm import ShmLink
from waveos.outcome import Outcome
from waveos.policy import load_policy
from waveos.primitives import LINE_WORDS, clock_ns, load, pause, store
from waveos.record import VERSION
from waveos.sched.laws import failure, make_runtime
from waveos.sched.records import MESSAGE, SUBSYSTEM, Message

OPTIONS = {
    "rounds": (15, "interleaved rounds, at least 5; figures are medians over them"),
    "policy": ("fifo", "the policy that decides in the other process"),
    "cpus": (8, "CPUs of its enclave; one of them idles"),
    "scale": (1.0, "length of the blocks, as a share of the usual"),
}
BLOCKS = {
    "raw": 30_000,
    "shm": 20_000,
    "shm_python": 4_000,
    "iceoryx2": 2_000,
    "pyzmq_ipc": 400,
    "socketpair": 400,
    "shm_stream": 400_000,
    "pyzmq_stream": 20_000,
}
"""Round trips or messages of one block."""
SETTLE_NS = 2_000
"""Between two timed round trips: the agent has seen that the thread is done and looks at an empty queue again."""
STREAM_BATCH = 64
"""Messages that a stream sends at once."""
SLICE_NS = 1_000_000
PATIENCE_NS = 5_000_000_000
"""A round trip that takes longer is a failure."""
WARM = 0.1
"""Share of a block that is not counted."""


def run(rounds: int = 15, policy: str = "fifo", cpus: int = 8, scale: float = 1.0) -> dict[str, Any]:
    """Measure all kinds, interleaved. Raises MissingError when a peer is not installed, ConfigError on fewer than two cores."""
    cores = sorted(os.sched_getaffinity(0))
    if rounds < 5 or not 0.01 <= scale <= 100 or not 1 <= cpus <= 1024:
        raise ConfigError(f"rounds {rounds}, scale {scale}, cpus {cpus}: at least 5 rounds, scale 0.01 to 100, 1 to 1024 CPUs")
    if len(cores) < 2:
        raise ConfigError("bench link needs two cores, one a side; this process may use one")
    peers.require()
    blocks = {kind: max(100, round(n * scale)) for kind, n in BLOCKS.items()}
    times: dict[str, list[Any]] = {}
    with _both_sides(cores, policy, cpus) as block:
        for _ in range(rounds):
            for kind, n in blocks.items():
                for variant in peers.VARIANTS.get(kind, ("",)):
                    times.setdefault(kind + variant, []).append(block(kind, variant, n))
    middle = {kind: median(float(np.median(each)) for each in blocks) for kind, blocks in times.items() if "stream" not in kind}
    metrics = {
        "shm_rtt_p50_ns": middle["shm"],
        "shm_rtt_p99_ns": median(float(np.quantile(each, 0.99)) for each in times["shm"]),
        "raw_rtt_p50_ns": middle["raw"],
        "shm_python_rtt_p50_ns": middle["shm_python"],
        "pyzmq_ipc_rtt_p50_ns": _quickest(middle, "pyzmq_ipc"),
        "iceoryx2_rtt_p50_ns": _quickest(middle, "iceoryx2"),
        "socketpair_rtt_p50_ns": _quickest(middle, "socketpair"),
        "shm_msgs_per_s": median(times["shm_stream"]),
        "pyzmq_ipc_msgs_per_s": median(times["pyzmq_stream"]),
        "clock_ns": measure_clock_ns(),
        "rounds": rounds,
    }
    for kind, variants in peers.VARIANTS.items():
        metrics |= {f"{kind}_{variant}_rtt_p50_ns": middle[kind + variant] for variant in variants}
    return {"name": "link", "metrics": metrics, "machine": describe_machine(), "timing": "measured", "verdict": _conclude(metrics)}


def _quickest(middle: dict[str, float], kind: str) -> float:
    return min(middle[kind + variant] for variant in peers.VARIANTS[kind])


def _conclude(metrics: dict[str, Any]) -> str:
    """One line: what was asked, and what is."""
    shm, python = metrics["shm_rtt_p50_ns"], metrics["shm_python_rtt_p50_ns"]
    raw, zmq = shm / metrics["raw_rtt_p50_ns"], metrics["pyzmq_ipc_rtt_p50_ns"] / shm
    iceoryx2 = metrics["iceoryx2_rtt_p50_ns"]
    enough = raw <= 3 and zmq >= 100 and python <= iceoryx2
    return (
        f"{'reaches' if enough else 'does not reach'} what was asked: {raw:.2f} times the bare cache line (at most 3), {zmq:.0f} times below pyzmq (at least "
        f"100), from Python {python / iceoryx2:.2f} times iceoryx2 (at most 1)"
    )


@contextlib.contextmanager
def _both_sides(cores: list[int], policy: str, cpus: int, device: str = "") -> Iterator[Callable[[str, str, int], Any]]:
    """Yields what runs one block, with the other side in a process on the second core. With a `device` (bar://...) there is a kind `bar`, too: as `shm`."""
    before = os.sched_getaffinity(0)
    lines = np.frombuffer(mmap.mmap(-1, 8_192), np.int64)
    context = get_context("fork")
    here, there = context.Pipe()
    url, python_url = (f"shm://bench-{os.getpid()}-{kind}" for kind in ("policy", "python"))
    with ShmLink(url) as link, ShmLink(python_url) as python, contextlib.ExitStack() as stack:
        pairs = peers.make(f"wave-bench-{os.getpid()}")
        other = context.Process(target=_serve_blocks, args=(there, cores[1], lines, (url, python_url, device), policy, cpus, pairs), daemon=True)
        other.start()
        there.close()
        try:
            os.sched_setaffinity(0, {cores[0]})
            bar: Any = stack.enter_context(contextlib.closing(open_link(device))) if device else None
            _expect(here)
            for pair in pairs.values():
                pair.open("host")
            hosts = {kind: _Host(each, cpus) for kind, each in (("shm", link), ("bar", bar)) if each is not None}

            def block(kind: str, variant: str, n: int) -> Any:
                here.send((kind, variant, n))
                _expect(here)
                pair: Any = pairs.get(kind.replace("_stream", "_ipc"))
                match kind:
                    case "raw":
                        result: Any = _times(lambda out: _ping(lines, out), n)
                    case "shm" | "bar":
                        result = hosts[kind].round_trips(n)
                    case "shm_stream":
                        result = hosts["shm"].stream(n)
                    case "shm_python":
                        result = _python_round_trips(python, n)
                    case "pyzmq_stream":
                        result = pair.stream(n)
                    case _:
                        result = pair.round_trips(n, variant)[round(WARM * n) :]
                here.send("over")
                _expect(here)
                return result

            yield block
            here.send(None)
        finally:
            other.join(1)
            if other.is_alive():
                other.terminate()
                other.join()
            for pair in pairs.values():
                pair.close()
            os.sched_setaffinity(0, before)


def _expect(pipe: Any) -> None:
    """Wait for the other side to be ready. Raises what it says went wrong."""
    try:
        said = pipe.recv()
    except EOFError:
        raise WaveError("bench link: the process of the other side ended before the measurement was over") from None
    if said != "ready":
        raise WaveError(f"bench link: {said}")


def _times(block: Callable[[Any], None], n: int) -> Any:
    """The times that a compiled block fills in, without the first ones."""
    out = np.zeros(n, np.int64)
    block(out)
    return out[round(WARM * n) :]


# The other side


def _serve_blocks(pipe: Any, core: int, lines: Any, urls: tuple[str, str, str], policy: str, cpus: int, pairs: dict[str, Any]) -> None:
    """The process of the other side: does its part of one block after the other."""
    url, python_url, device = urls
    try:
        os.sched_setaffinity(0, {core})
        link, python = ShmLink(url, side="agent"), ShmLink(python_url, side="agent")
        for pair in pairs.values():
            pair.open("agent")
        agents = {"shm": _Agent(link, policy, cpus)}
        if device:
            agents["bar"] = _Agent(open_link(device, side="agent", patience_s=PATIENCE_NS / 1e9), policy, cpus)
        for agent in agents.values():
            agent.serve()  # compiles, or loads what was compiled
        pipe.send("ready")
        while (block := pipe.recv()) is not None:
            kind, variant, n = block
            pipe.send("ready")
            match kind:
                case "raw":
                    _pong(lines, n)
                case "shm" | "shm_stream" | "bar":
                    while not pipe.poll():
                        agents[kind.removesuffix("_stream")].serve()
                case "shm_python":
                    _python_echo(python, n)
                case "pyzmq_stream":
                    pairs["pyzmq_ipc"].drain(n)
                case _:
                    pairs[kind].echo(n, variant)
            pipe.recv()
            pipe.send("ready")
        for pair in pairs.values():
            pair.close()
    except (WaveError, OSError) as error:
        pipe.send(str(error))


class _Agent:
    """What agentd does with a link: the policy's runtime and the compiled loop."""

    def __init__(self, link: Any, policy: str, cpus: int) -> None:
        from waveos.agents.loop import ENCLAVE, POLICY_FAILED, join, serve

        self._serve, self._failed = serve, POLICY_FAILED
        self._link = link  # the loop knows addresses alone, and they hold as long as this does
        self.bound = load_policy(policy).bind(n_cpus=cpus)
        self.runtime = make_runtime(self.bound, cpus=cpus)
        self.enclave = np.zeros(1, ENCLAVE)
        join(self.enclave, link.queue(MESSAGES), link.queue(TXNS), self.runtime)

    def serve(self) -> None:
        """One slice. Raises PolicyError."""
        if self._serve(self.enclave, 0, clock_ns() + SLICE_NS) == self._failed:
            raise failure(self.runtime, self.bound)


# Compiled: bare lines, and a host with one thread


@jit
def _ping(lines: Any, out: Any) -> None:
    for i in range(out.shape[0]):
        begun = clock_ns()
        store(lines, 0, i + 1)
        while load(lines, 64) != i + 1:
            pass
        out[i] = clock_ns() - begun
    store(lines, 0, 0)
    store(lines, 64, 0)


@jit
def _pong(lines: Any, n: int) -> None:
    for i in range(n):
        while load(lines, 0) != i + 1:
            pass
        store(lines, 64, i + 1)


@jit
def _clock(n: int) -> int:
    begun = clock_ns()
    for _ in range(n - 1):
        clock_ns()
    return clock_ns() - begun


def measure_clock_ns() -> float:
    """What one reading of the clock costs, ns."""
    return float(min(_clock(10_000) for _ in range(5)) / 10_000)


@jit
def _round_trips(up: Any, up_own: Any, down: Any, down_own: Any, records: Any, fields: Any, decision: Any, out: Any) -> bool:
    """Wake the thread, wait for the decision, let it run and block; `out`: the time of each. False if a decision did not come.

    fields: [4] MESSAGE (runnable, outcome, blocked, idle) and records: their words.
    """
    runnable, outcome, blocked, idle = fields[0], fields[1], fields[2], fields[3]
    for i in range(out.shape[0]):
        runnable.seq += 2
        begun = clock_ns()
        runnable.time_ns = begun
        ring.send_one(up, up_own, records, 0)
        polls = 0
        while not ring.poll_one(down, down_own, decision, 0):
            polls += 1
            if polls & 0xFFFF == 0 and clock_ns() > begun + PATIENCE_NS:
                return False
        now = clock_ns()
        out[i] = now - begun
        outcome.seq, outcome.cpu_seq, outcome.time_ns = runnable.seq + 1, outcome.cpu_seq + 1, now
        blocked.seq, blocked.cpu_seq, blocked.time_ns = runnable.seq + 2, outcome.cpu_seq + 1, now
        idle.cpu_seq, idle.time_ns = outcome.cpu_seq + 1, now
        ring.send_one(up, up_own, records, LINE_WORDS)
        ring.send_one(up, up_own, records, 2 * LINE_WORDS)
        ring.send_one(up, up_own, records, 3 * LINE_WORDS)
        while clock_ns() < now + SETTLE_NS:
            pause()
    return True


@jit
def _stream(up: Any, up_own: Any, records: Any, n: int) -> None:
    """Send n messages, `records` over and over, waiting for room."""
    batch = records.shape[0] // LINE_WORDS
    for _ in range(n // batch):
        while ring.room(up, up_own, batch) < batch:
            pause()
        ring.send(up, up_own, records, batch)


class _Host:
    """The compiled host's records: CPU 0 idles, the others run a thread each; thread 0 comes and goes, and thread 1 is the stream's: it wakes and blocks."""

    def __init__(self, link: Any, cpus: int) -> None:
        self.rings = link.messages_memory, link.messages_own, link.txns_memory, link.txns_own
        kinds = Message.THREAD_RUNNABLE, Message.TXN_OUTCOME, Message.THREAD_BLOCKED, Message.CPU_IDLE
        self.fields = np.concatenate([_message(kind, 0, 0) for kind in kinds])
        self.fields["tid"][0], self.fields["cpu"][0] = 0, -1
        self.fields["tid"][3] = -1
        self.fields["outcome"][1] = Outcome.COMMITTED
        self.noise = np.concatenate([_message(Message.THREAD_RUNNABLE, 1, -1), _message(Message.THREAD_BLOCKED, 1, -1)] * (STREAM_BATCH // 2))
        self.decision = np.zeros(LINE_WORDS, np.int64)
        others = [_message(Message.CPU_NEW, 1 + cpu, cpu) for cpu in range(1, cpus)]
        threads = [_message(Message.THREAD_NEW, tid, -1) for tid in (0, 1)]
        link.send_messages(np.concatenate([_message(Message.CPU_NEW, -1, 0), _message(Message.CPU_IDLE, -1, 0), *others, *threads]))

    def round_trips(self, n: int) -> Any:
        """Times of n decisions, ns. Raises WaveError if one does not come."""
        out = np.zeros(n, np.int64)
        if not _round_trips(*self.rings, self.fields.view(np.int64), self.fields, self.decision, out):
            raise WaveError(f"bench link: the policy made no decision within {PATIENCE_NS / 1e9:.0f} s")
        return out[round(WARM * n) :]

    def stream(self, n: int) -> float:
        """Messages that the policy took in, per second; the decision that ends it shows that it has seen them all."""
        up, up_own = self.rings[:2]
        self.round_trips(100)
        cpu_taken, cpu_back = _message(Message.CPU_TAKEN, -1, 0), _message(Message.CPU_BACK, -1, 0)
        begun = clock_ns()
        for edge, count in ((cpu_taken, n), (cpu_back, 0)):
            ring.compiled().send_one(up, up_own, edge.view(np.int64), 0)
            _stream(up, up_own, self.noise.view(np.int64), count)
        ring.compiled().send_one(up, up_own, self.fields[3:].view(np.int64), 0)
        _round_trips(*self.rings, self.fields.view(np.int64), self.fields, self.decision, np.zeros(1, np.int64))
        return n / (clock_ns() - begun) * 1e9


def _message(kind: Message, tid: int, cpu: int) -> Any:
    m = np.zeros(1, MESSAGE)
    m["version"], m["subsystem"], m["type"], m["tid"], m["cpu"] = VERSION, SUBSYSTEM, kind, tid, cpu
    return m


# Wave's verbs from Python


def _python_round_trips(link: ShmLink, n: int) -> Any:
    message, out = _message(Message.THREAD_RUNNABLE, 0, -1), np.zeros(n, np.int64)
    for i in range(n):
        begun = clock_ns()
        link.send_messages(message)
        got = link.poll_txns(1, PATIENCE_NS)
        out[i] = clock_ns() - begun
        if not len(got):
            raise WaveError("bench link: no transaction came back")
    return out[round(WARM * n) :]


def _python_echo(link: ShmLink, n: int) -> None:
    decision = np.zeros(1, link.subsystem.DECISION)
    for _ in range(n):
        if not len(link.poll_messages(1, PATIENCE_NS)):
            raise WaveError("no message came")
        link.txn_create()[:] = decision
        link.txns_commit()
