"""What a policy costs: nanoseconds for a message and for a decision, on one core of this machine, compiled, through the runtime with all its laws.

For each policy a stream of messages is recorded while it schedules an emulated machine under a GET/RANGE load with preemptions; the stream is then
replayed without anything around it. `message_costs` is what the emulator charges its agent for a message, divided by the agent core's speed.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from waveos.bench.machine import describe_machine
from waveos.errors import ConfigError
from waveos.ipu_emulator.sched import RequestClass, Service, Setup, simulate
from waveos.jit import sources_hash
from waveos.output import write_file
from waveos.paths import cache_dir
from waveos.policy import load_policy, policy_names
from waveos.sched.laws import OUT, failure, feed_all, make_runtime
from waveos.sched.records import DECISION

OPTIONS = {
    "messages": (100_000, "messages recorded and replayed for each policy"),
    "rounds": (7, "replays of each policy, interleaved; figures are their medians"),
    "seed": (1, "seed of the recorded load"),
    "policies": ("", "comma-separated; all installed ones by default"),
}
CPUS, THREADS = 8, 4096
_LOAD_PER_S = 120_000.0
_CLASSES = (
    RequestClass("GET", Service("exponential", fixed_ns=10_000, mean_ns=1_000), share=0.995, slo_ns=200_000),
    RequestClass("RANGE", Service(fixed_ns=5_000_000), share=0.005, slo_ns=50_000_000),
)
"""ghOSt's RocksDB harness (specs: 10 us + Exp(1 us), 5 ms at 0.5 %): what the policies decide about while they are recorded."""


def record_load(policy: str, messages: int, seed: int = 1, params: Mapping[str, float] = {}) -> np.ndarray[Any, Any]:
    """[messages] MESSAGE: the stream that `policy` was fed on the emulated machine, batch ends included."""
    seconds = 0.2 + messages / (2.0 * _LOAD_PER_S)
    setup = Setup(
        policy=policy,
        params=params,
        load_per_s=_LOAD_PER_S,
        classes=_CLASSES,
        workers=CPUS,
        threads=THREADS,
        duration_ns=int(seconds * 1e9),
        seed=seed,
        record=messages,
    )
    recorded = simulate(setup).record
    assert recorded is not None
    if len(recorded) < messages:
        raise ConfigError(f"policy {policy!r} was fed only {len(recorded)} of {messages} messages; ask for fewer")
    return recorded


def replay_ns(policy: str, stream: np.ndarray[Any, Any], params: Mapping[str, float] = {}) -> tuple[int, int]:
    """Nanoseconds of CPU time that the policy takes for the whole stream, and the decisions that it makes."""
    bound = load_policy(policy).bind(n_cpus=CPUS, params=dict(params))
    runtime = make_runtime(bound, cpus=CPUS, threads=THREADS, ahead=1)
    out = np.zeros(len(stream) + 2 * OUT, DECISION)
    feed_all(runtime, stream[:0], 0, out)
    begin = time.thread_time_ns()
    taken, decisions = feed_all(runtime, stream, 0, out)
    elapsed = time.thread_time_ns() - begin
    if runtime["failed"][0] or taken < len(stream):
        raise failure(runtime, bound)
    return elapsed, int(decisions)


def message_costs(policies: Iterable[str], params: Mapping[str, Mapping[str, float]] = {}) -> dict[str, float]:
    """Nanoseconds a message for each policy with its `params`, measured once on this machine and kept for as long as the code is the same."""
    path = cache_dir("measured") / "policy_costs.json"
    try:
        known: dict[str, float] = json.loads(path.read_text())
    except (OSError, ValueError):
        known = {}
    costs, before = {}, len(known)
    for name in policies:
        given = dict(params.get(name, {}))
        key = f"{describe_machine()['cpu']} {sources_hash()} {load_policy(name).bind(n_cpus=CPUS, params=given).fingerprint} {sorted(given.items())}"
        if key not in known:
            stream = record_load(name, 50_000, params=given)
            known[key] = round(median(replay_ns(name, stream, given)[0] for _ in range(5)) / len(stream), 2)
        costs[name] = known[key]
    if len(known) != before:
        write_file(path, json.dumps(known, indent=1, sort_keys=True))
    return costs


def run(messages: int = 100_000, rounds: int = 7, seed: int = 1, policies: str = "") -> dict[str, Any]:
    """Record a stream for each policy, replay all of them in turns, and time the compilation of `fifo` with nothing kept from before."""
    names = [name for name in policies.split(",") if name] or policy_names("sched")
    if messages < 1_000 or rounds < 1:
        raise ConfigError(f"messages {messages}, rounds {rounds}: at least 1,000 messages and one round")
    streams = {name: record_load(name, messages, seed) for name in names}
    times: dict[str, list[int]] = {name: [] for name in names}
    decisions = {}
    for _ in range(rounds):
        for name in names:
            elapsed, decisions[name] = replay_ns(name, streams[name])
            times[name].append(elapsed)
    metrics: dict[str, float] = {}
    if "fifo" in names:
        metrics["fifo_msgs_per_s"] = messages / (median(times["fifo"]) * 1e-9)
        metrics["fifo_lines"] = len(Path(inspect.getfile(load_policy("fifo"))).read_text().splitlines())
        metrics["compile_s"] = compile_s("fifo")
    for name in names:
        metrics[f"message_ns_{name}"] = round(median(times[name]) / messages, 2)
        metrics[f"decision_ns_{name}"] = round(median(times[name]) / decisions[name], 2)
    return {"name": "policy", "metrics": metrics, "machine": describe_machine(), "timing": "measured"}


def compile_s(policy: str) -> float:
    """Seconds to bind `policy` in a fresh process that finds nothing compiled; median of three."""
    code = (
        "import sys, time\nfrom waveos.policy import load_policy\nchosen = load_policy(sys.argv[1])\n"
        "begin = time.perf_counter()\nchosen.bind(n_cpus=8)\nprint(time.perf_counter() - begin)\n"
    )
    seconds = []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as empty:
            environment = {**os.environ, "XDG_CACHE_HOME": empty, "NUMBA_CACHE_DIR": empty, "WAVE_JIT": "1"}
            done = subprocess.run([sys.executable, "-P", "-c", code, policy], env=environment, capture_output=True, text=True, check=True)
            seconds.append(float(done.stdout))
    return round(median(seconds), 3)
