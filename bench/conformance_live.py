"""Messages of the live world for `wave bench conformance`: a real enclave, whose policy changes in mid-run, recorded by its agent."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from waveos import tape
from waveos.errors import WaveError
from waveos.host import doors
from waveos.sched.records import Message

LOAD = """
import os, random, time
for seed in range(4):
    if os.fork() == 0:
        rng = random.Random(seed)
        while os.getppid() != 1:
            end = time.monotonic() + rng.expovariate(2_000)
            while time.monotonic() < end:
                pass
            time.sleep(rng.expovariate(500))
        os._exit(0)
while True:
    time.sleep(0.01)
    if (child := os.fork()) == 0:
        os._exit(0)
    os.waitpid(child, 0)
"""
"""Processes that wake, compute, sleep, are born and end: some two thousand messages a second."""
START_S, CHANGE_S = 60.0, 60.0

Tape = tuple[dict[str, Any], Any, Any]


def why_not() -> str | None:
    """Why nothing can be recorded live here."""
    if os.geteuid():
        return "hostd needs root"
    if not Path("/sys/kernel/btf/vmlinux").exists():
        return "this kernel has no BTF"
    if len(os.sched_getaffinity(0)) < 2:
        return "it takes two CPUs, one for the enclave and one for its agent"
    return None


def record_live(policies: list[str], each_s: float) -> dict[str, Tape]:
    """For each policy what an agent was told while it ruled for `each_s`, and what it decided. Raises WaveError when the daemons fail."""
    cpus = sorted(os.sched_getaffinity(0))
    name = f"conformance-{os.getpid()}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tape"
        code = "import sys; from waveos.cli import run; sys.exit(run(['hostd', *sys.argv[1:]]))"
        what = ["--enclave", name, "--cpus", str(cpus[0]), "--policy", policies[0], "--agent-core", str(cpus[1]), "--record", str(path)]
        command = [sys.executable, "-P", "-c", code, *what, "--", sys.executable, "-S", "-E", "-c", LOAD]
        with (Path(folder) / "said").open("w+b") as said:
            hostd = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=said)
            try:
                _await_agent(name, hostd, said.name)
                for policy in policies:
                    if policy != policies[0]:
                        told = doors.ask(name, {"do": "set-policy", "policy": policy}, CHANGE_S)
                        if not told["ok"]:
                            raise WaveError(f"bench conformance: {told['error']}")
                    time.sleep(each_s)
            finally:
                hostd.terminate()
                hostd.wait()
        return _tapes(path)


def _await_agent(name: str, hostd: subprocess.Popen[bytes], said: str) -> None:
    end = time.monotonic() + START_S
    while True:
        with contextlib.suppress(WaveError):
            if doors.ask(name, {"do": "status"})["agent"]:
                return
        if hostd.poll() is not None or time.monotonic() > end:
            raise WaveError(f"bench conformance: the live enclave did not begin: {Path(said).read_text().strip() or 'its agent did not come'}")
        time.sleep(0.02)


def _tapes(path: Path) -> dict[str, Tape]:
    """The longest tape of each policy, up to its last whole batch."""
    found: dict[str, Tape] = {}
    for each in path.parent.glob("tape*"):
        facts, messages, decisions = tape.read(each)
        before = found.get(facts["policy"])
        if len(messages) and (before is None or len(messages) > len(before[1])):
            ends = (messages["type"] == Message.BATCH_END).nonzero()[0]
            if len(ends) and ends[-1] == len(messages) - 1:
                found[facts["policy"]] = (facts, messages, decisions)
    return found
