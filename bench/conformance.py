"""Does every policy decide the same in every world: a recorded stream replayed through each link, compiled and as plain Python.

The stream is what the emulator feeds the policy under a load with preemptions, batch ends included; its decisions are first made without any link.
Then the same bytes go through the virtual link and, to a real agentd process, through shared memory, the link of a PCI BAR (a file stands for the
device) and the network link (on loopback), each with WAVE_JIT=1 and 0: eight runs a policy. Where this machine can (root, BTF, two CPUs) a real
enclave runs under each policy, too. What its agent was told is replayed in the same way, and must give what it decided then: nine runs more a policy.
`identical_share` is the share of all these runs whose decisions are the same byte for byte. A stream ends with a resynchronisation that makes known
decisions, so that a decision too many is seen as well as one too few.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from typing import Any

import numpy as np

from waveos import ring
from waveos.bench.conformance_live import record_live, why_not
from waveos.bench.machine import describe_machine
from waveos.bench.remote import BAR_BYTES, free_port
from waveos.errors import ConfigError, WaveError
from waveos.keys import Keys
from waveos.link import MESSAGES, open_link
from waveos.policy import load_policy, policy_names
from waveos.primitives import CoherentMemory
from waveos.record import VERSION
from waveos.sched.records import DECISION, MESSAGE, SUBSYSTEM, Message
from waveos.testing import Replayed, interpreted

OPTIONS = {
    "seed": (1, "of the load that is recorded"),
    "messages": (100_000, "messages of each policy's stream; batch ends are not counted"),
    "policies": ("", "some policies only, with commas between; by default all that are installed"),
    "live_s": (2.0, "seconds that a real enclave runs under each policy; 0: none does"),
    "quick": (False, "streams of 5,000 messages, half a second live: for CI"),
}
QUICK_MESSAGES, QUICK_LIVE_S = 5_000, 0.5
CPUS, THREADS, AHEAD = 8, 512, 1
LOAD_PER_S = 120_000
WORLDS = {"virtual": "virtual://mount-evans", "shm": "shm://", "bar": "bar://", "zmq": "zmq+tcp://itself@127.0.0.1:"}
CHUNK = 1_024
START_S = 120.0
"""An agent of a network link answers once its policy is compiled."""
SILENCE_S = 30.0
"""An agent that answers nothing for so long is taken not to go on."""


def run(seed: int = 1, messages: int = 100_000, policies: str = "", live_s: float = 2.0, quick: bool = False) -> dict[str, Any]:
    """Record, replay and compare. Raises ConfigError on impossible options, PolicyError when a policy fails, LinkError when an agent dies."""
    names = [name.strip() for name in policies.split(",") if name.strip()] or policy_names("sched")
    count = min(messages, QUICK_MESSAGES) if quick else messages
    if count < 100:
        raise ConfigError(f"messages {count}: at least 100")
    runs: dict[str, bool] = {}
    decisions = 0
    for name in names:
        stream = _with_end(record_stream(name, count, seed))
        expected = Replayed(load_policy(name), CPUS, THREADS, AHEAD).feed(stream)
        decisions += len(expected)
        _replay_all(name, stream, expected, (CPUS, THREADS, AHEAD), runs)
    live = _compare_live(names, min(live_s, QUICK_LIVE_S) if quick else live_s, runs)
    metrics = {
        "policies": len(names),
        "worlds": len(WORLDS),
        "identical_share": sum(runs.values()) / len(runs),
        "runs": len(runs),
        "messages": count,
        "decisions": decisions,
        **live,
    }
    return {"name": "conformance", "metrics": metrics, "machine": describe_machine(), "timing": "none", "verdict": _conclude(runs, metrics)}


def _replay_all(name: str, stream: Any, expected: Any, sizes: tuple[int, int, int], runs: dict[str, bool], what: str = "") -> None:
    """The stream through each link, compiled and as plain Python."""
    for world in WORLDS:
        for form, context in (("compiled", contextlib.nullcontext), ("plain Python", interpreted)):
            with context():
                got = replay(world, name, stream, len(expected), *sizes)
            _note(f"{name}{what}, {world}, {form}", got, expected, runs)


def _note(run_name: str, got: Any, expected: Any, runs: dict[str, bool]) -> None:
    runs[run_name] = got.tobytes() == expected.tobytes()
    print(f"{run_name}: {'identical' if runs[run_name] else describe_difference(got, expected)}", file=sys.stderr)


def _compare_live(names: list[str], each_s: float, runs: dict[str, bool]) -> dict[str, int]:
    """What was told and decided on this kernel, decided again; figures about it."""
    reason = "not asked for" if each_s <= 0 else why_not()
    if reason:
        print(f"live: nothing recorded: {reason}", file=sys.stderr)
        return {"live_policies": 0, "live_messages": 0, "live_decisions": 0}
    tapes = record_live(names, each_s)
    if missing := [name for name in names if name not in tapes]:
        raise WaveError(f"bench conformance: no tape of {', '.join(missing)}: the live enclave's agent was lost; is the machine overloaded?")
    for name in names:
        facts, told, decided = tapes[name]
        sizes = facts["cpus"], facts["threads"], facts["ahead"]
        stream = _with_end(told)
        expected = Replayed(load_policy(name), *sizes).feed(stream)
        _note(f"{name} on this kernel, decided again", expected[: len(decided)], decided, runs)
        _replay_all(name, stream, expected, sizes, runs, " on this kernel")
    counted = [int((tapes[name][1]["type"] != Message.BATCH_END).sum()) for name in names]
    return {"live_policies": len(names), "live_messages": sum(counted), "live_decisions": sum(len(tapes[name][2]) for name in names)}


def _conclude(runs: dict[str, bool], metrics: dict[str, Any]) -> str:
    """One line: whether all are the same, or which is not."""
    other = [name for name, same in runs.items() if not same]
    if other:
        return f"does not reach what was asked: decisions differ in {len(other)} of {len(runs)} runs: {'; '.join(other)}"
    live = f", {metrics['live_decisions']} on {metrics['live_messages']} messages of this kernel" if metrics["live_policies"] else ""
    return (
        f"reaches what was asked: {metrics['decisions']} decisions on {metrics['messages']} messages a policy{live}, "
        f"the same bytes in all {len(runs)} runs"
    )


def record_stream(policy: str, messages: int, seed: int) -> Any:
    """The first `messages` messages, and the batch ends among them, that the emulator feeds `policy` under load, [n] MESSAGE."""
    from waveos.ipu_emulator.sched import RequestClass, Service, Setup, simulate

    classes = (
        RequestClass("GET", Service("exponential", mean_ns=20_000), share=0.97, slo_ns=200_000),
        RequestClass("RANGE", Service("fixed", fixed_ns=1_000_000), share=0.03, slo_ns=10_000_000, qos=1),
    )
    # A request is two messages at least, and a batch end follows each message at most.
    duration_ns = round(1.2 * messages / 2 / LOAD_PER_S * 1e9)
    setup = Setup(policy, LOAD_PER_S, classes, workers=CPUS, threads=THREADS, seed=seed, duration_ns=duration_ns, record=3 * messages + 1_000)
    recorded = simulate(setup).record
    assert recorded is not None
    told = np.cumsum(recorded["type"] != Message.BATCH_END)
    if not len(told) or told[-1] < messages:
        raise WaveError(f"bench conformance: the load made {told[-1] if len(told) else 0} messages for {policy!r}, not {messages}")
    return recorded[: int(np.searchsorted(told, messages)) + 1].copy()


def _with_end(stream: Any) -> Any:
    """The stream, and then a host that replays its state: one idle CPU, one thread that can run."""
    end = np.zeros(6, MESSAGE)
    end["version"], end["subsystem"], end["tid"], end["cpu"] = VERSION, SUBSYSTEM, -1, -1
    end["type"] = Message.RESYNC, Message.CPU_NEW, Message.CPU_IDLE, Message.THREAD_NEW, Message.THREAD_RUNNABLE, Message.BATCH_END
    end["cpu"][1:3], end["tid"][3:5] = 0, 0
    end["seq"], end["time_ns"] = 1, stream["time_ns"].max() + 1
    return np.concatenate([stream, end])


def replay(world: str, policy: str, stream: Any, expected: int, cpus: int = CPUS, threads: int = THREADS, ahead: int = AHEAD) -> Any:
    """The decisions that an agent of that world makes on the stream, [n] DECISION: `expected` of them, or more, or fewer if it falls silent."""
    with contextlib.ExitStack() as stack:
        options: dict[str, Any] = {}
        url = WORLDS[world]
        if world == "shm":
            url += f"conformance-{os.getpid()}"
        elif world == "bar":
            device = stack.enter_context(tempfile.NamedTemporaryFile(prefix="wave-bar-", dir="/dev/shm"))
            os.truncate(device.name, BAR_BYTES)
            url += device.name
        elif world == "zmq":
            keys = Keys(stack.enter_context(tempfile.TemporaryDirectory()))
            keys.add("itself", keys.new().public)
            url += str(free_port())
            options = {"keys": keys, "silence_s": SILENCE_S}
        host: Any = open_link(url, side="host", **options)
        stack.callback(host.close)
        host.start_wave_agent(policy, "--replay", "--cpus", str(cpus), "--threads", str(threads), "--ahead", str(ahead))
        host.await_agent(START_S)
        pieces, sent, got = [np.zeros(0, DECISION)], 0, 0
        heard_s = time.monotonic()
        while sent < len(stream) or got < expected:
            part = stream[sent : sent + min(CHUNK, _room(host))]
            if len(part):
                sent += host.send_messages(part)
            taken = host.poll_txns(wait_ns=1_000_000)
            if len(taken) or len(part):
                heard_s = time.monotonic()
            if len(taken):
                pieces.append(taken.copy())
                got += len(taken)
            elif not host.peer_alive():
                raise WaveError(f"bench conformance: the agent of {policy!r} in the world {world!r} ended early; what it said is above")
            elif time.monotonic() > heard_s + SILENCE_S:
                break
        pieces.append(host.poll_txns().copy())
        return np.concatenate(pieces)


def _room(host: Any) -> int:
    """How many messages the link takes now."""
    if hasattr(host, "room"):
        return int(host.room(MESSAGES, CHUNK))
    queue = host.queue(MESSAGES)
    return int(ring.room(CoherentMemory(queue.memory), queue.own, CHUNK))


def describe_difference(got: Any, expected: Any) -> str:
    """Where two arrays of decisions part."""
    n = min(len(got), len(expected))
    differ = np.flatnonzero(got[:n] != expected[:n])
    if len(differ):
        first = int(differ[0])
        return f"decision {first} of {len(expected)} is {got[first]}, not {expected[first]}"
    return f"{len(got)} decisions, not {len(expected)}"
