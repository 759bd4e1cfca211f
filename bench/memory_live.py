"""The live part of `wave bench memory`: a real RocksDB of some GiB on this machine's own kernel, zram as swap, policies in agentd over a link.

Each run first serves without anybody reclaiming, which is what its throughput is compared with, and then with the policy. Memory in use is the database's
resident memory and what zram takes itself. The oracle is told when the hot set moves: the new hot set shares nothing with the old one, so paging all out at
that moment leaves exactly the hot pages resident.

Throughput is GETs for each second of the database's own CPU time: a fault from zram is CPU time of the thread that faults, and a neighbour on a shared machine
changes it least. By the clock on the wall it is given, too.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from waveos.bench.memory_database import build
from waveos.errors import MissingError
from waveos.host import changes
from waveos.host.memory.advise import PAGEOUT, Advisor
from waveos.host.memory.procfs import Process
from waveos.host.memory.zram import Zram
from waveos.host.restore import Journal

CGROUPS = Path("/sys/fs/cgroup/memory")
ATTACH_S = 90.0
SETTLE_S = 20.0
"""After the agent has come, not counted: the policy learns what is hot."""
BATCH_KIB = 2_048
PASS_MS = 2_400.0
MOVE_S = 60.0
HOT_SHARE = 0.3


RUNS = ("oracle", "sol", "psi_backoff")


def measure(gib: float, base_s: float, count_s: float) -> tuple[dict[str, float], list[str]]:
    """(metrics, what they say, a line each) of the oracle, sol and psi_backoff, with the hot set side by side and scrambled. Raises MissingError."""
    metrics: dict[str, float] = {}
    with Live(gib, base_s, count_s) as live:
        for scrambled in (False, True):
            for policy in RUNS:
                run = live.run(policy, scrambled=scrambled)
                name = f"live_{'scrambled_' if scrambled else ''}{'psi' if policy == 'psi_backoff' else policy}"
                for key in ("saved_share", "saved_usage_share", "throughput_ratio", "wall_throughput_ratio", "get_p99_ratio"):
                    metrics[f"{name}_{key}"] = run[key]
                if run["status"]:
                    metrics[f"{name}_mechanism_cores"] = run["status"]["cpu_s"]["all"] / count_s
                    metrics[f"{name}_agent_cores"] = run["agent_cpu_s"] / count_s
    share = metrics["live_sol_saved_share"] / max(1e-9, metrics["live_oracle_saved_share"])
    cost = 1 - metrics["live_sol_throughput_ratio"]
    better = "more" if metrics["live_sol_saved_share"] > metrics["live_psi_saved_share"] else "LESS"
    meets = "meets" if share >= 0.7 and cost <= 0.05 else "misses"
    return metrics, [
        f"live: SOL saves {share:.0%} of the oracle's share at {cost:.1%} of throughput ({meets} 70 % at 5 %), {better} than psi_backoff"
    ]


class Live:
    """What the runs share: a folder with the database, zram, a cgroup."""

    def __init__(self, gib: float, base_s: float, count_s: float) -> None:
        """Raises MissingError where this machine cannot."""
        if os.geteuid() != 0:
            raise MissingError("the live part needs root: it makes a cgroup, swap, and advises another process's memory")
        if not (CGROUPS / "cgroup.procs").exists():
            raise MissingError(f"the live part needs the memory controller of cgroup version 1 at {CGROUPS}")
        self.gib, self.base_s, self.count_s = gib, base_s, count_s
        self.folder = Path(tempfile.gettempdir()) / f"wave-memory-{gib:g}gib"
        build(self.folder, gib)
        self._stack = contextlib.ExitStack()
        name = f"bench-memory-{os.getpid()}"
        self.journal = Journal(name)
        self._stack.callback(self.journal.close)
        self.cgroup = CGROUPS / f"wave-{name}"
        changes.note_new_folder(self.journal, self.cgroup)
        self.cgroup.mkdir()
        # A swap that is more than half full gives a page's place back when the page is read; else the page would be held twice.
        self.zram = self._stack.enter_context(Zram(self.journal, int(gib * 2**30)))

    def __enter__(self) -> Live:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, policy: str, *, scrambled: bool = False, link: str = "shm", params: dict[str, float] | None = None) -> dict[str, Any]:
        """One run: `policy` is a policy's name, "oracle" or "nothing". Shares of the database's memory at its fullest, ratios to its own beginning."""
        cores = sorted(os.sched_getaffinity(0))
        with self._database(scrambled, cores[0]) as (process, lines):
            before = self._watch(process.pid, lines, self.base_s)
            with contextlib.ExitStack() as stack:
                status = Path(tempfile.gettempdir()) / f"wave-memory-{os.getpid()}.json"
                stack.callback(status.unlink, missing_ok=True)
                daemon = None
                if policy == "oracle":
                    stack.enter_context(_oracle(process.pid, self.base_s))
                elif policy != "nothing":
                    daemon = stack.enter_context(self._daemon(policy, link, cores[-1], status, params or {}))
                self._await_agent(status, lines, daemon is not None)
                self._watch(process.pid, lines, SETTLE_S)
                after = self._watch(process.pid, lines, self.count_s)
                agent_cpu_s = _children_cpu_s(daemon) if daemon is not None else 0.0
                told = json.loads(status.read_text()) if status.exists() else {}
        full_kib = max(row["rss_kib"] for row in before)
        return {
            "policy": policy,
            "scrambled": scrambled,
            "link": link,
            "saved_share": 1 - fmean(row["rss_kib"] + row["zram_kib"] for row in after) / full_kib,
            "saved_usage_share": 1 - fmean(row["usage_kib"] + row["zram_kib"] for row in after) / max(row["usage_kib"] for row in before),
            "throughput_ratio": _rate(after, "cpu_s") / _rate(before[2:], "cpu_s"),
            "wall_throughput_ratio": _rate(after, "wall_s") / _rate(before[2:], "wall_s"),
            "get_p99_ratio": fmean(row["p99_us"] for row in after) / fmean(row["p99_us"] for row in before[2:]),
            "gets_per_s": fmean(row["gets_per_s"] for row in after),
            "agent_cpu_s": agent_cpu_s,
            "status": told,
            "series": [*before, *after],
        }

    def _await_agent(self, status: Path, lines: Any, wanted: bool) -> None:
        """Until the mechanism says that its agent has come. Raises MissingError after ATTACH_S."""
        end = time.monotonic() + ATTACH_S
        while wanted and not (status.exists() and json.loads(status.read_text())["agent"]):
            lines.readline()
            if time.monotonic() >= end:
                raise MissingError(f"no agent came within {ATTACH_S:g} s; its own messages say why")

    @contextlib.contextmanager
    def _database(self, scrambled: bool, core: int) -> Iterator[tuple[Any, Any]]:
        command = [sys.executable, "-P", "-m", "waveos.bench.memory_database", str(self.folder), "--gib", str(self.gib)]
        command += ["--seconds", str(self.base_s + self.count_s + 600), "--batch-kib", str(BATCH_KIB)]
        command += ["--hot-share", str(HOT_SHARE), "--move-s", str(MOVE_S), *(["--scrambled"] if scrambled else [])]

        def enter() -> None:
            (self.cgroup / "cgroup.procs").write_text(str(os.getpid()))
            os.sched_setaffinity(0, {core})

        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=enter)
        try:
            assert process.stdout is not None and process.stdin is not None
            ready = process.stdout.readline()
            if not ready:
                raise MissingError(f"the database did not come up: {' '.join(command)} ended with status {process.wait()}")
            process.stdin.write("go\n")
            process.stdin.flush()
            yield process, process.stdout
        finally:
            process.kill()
            process.communicate()

    def _watch(self, pid: int, lines: Any, for_s: float) -> list[dict[str, float]]:
        """What the database tells for so long, with the memory in use beside."""
        rows: list[dict[str, float]] = []
        last_s = None
        for line in lines:
            row = json.loads(line)
            row["zram_kib"] = self.zram.used_bytes() >> 10
            row["usage_kib"] = int((self.cgroup / "memory.usage_in_bytes").read_text()) >> 10
            row["wall_s"] = row["s"] - (last_s if last_s is not None else row["s"] - 1)
            row["gets_per_s"] = row["gets"] / row["wall_s"]
            last_s = row["s"]
            rows.append(row)
            if row["s"] - rows[0]["s"] >= for_s - 1:
                return rows
        raise MissingError(f"the database (pid {pid}) ended early")

    @contextlib.contextmanager
    def _daemon(self, policy: str, link: str, core: int, status: Path, params: dict[str, float]) -> Iterator[int]:
        """The mechanism's process (its pid), which starts agentd for the link; both on the core that the database does not have."""
        url = f"shm://bench-memory-{os.getpid()}" if link == "shm" else link
        command = [sys.executable, "-P", "-m", "waveos.host.memory.daemon", url, "--cgroup", str(self.cgroup), "--core", str(core)]
        command += ["--enclave", f"bench-memory-{os.getpid()}-daemon", "--policy", policy, "--status", str(status)]
        command += ["--batch-kib", str(BATCH_KIB), "--pass-ms", str(PASS_MS)]
        for name, value in params.items():
            command += ["--param", f"{name}={value}"]
        process = subprocess.Popen(command)
        try:
            yield process.pid
        finally:
            process.terminate()
            process.wait(30)


@contextlib.contextmanager
def _oracle(pid: int, began_s: float) -> Iterator[None]:
    """Page everything out now and whenever the hot set moves; `began_s` is how long the database has been serving."""
    over = threading.Event()
    next_s = time.monotonic() + (MOVE_S - began_s % MOVE_S)
    advisor, process = Advisor(pid), Process(pid)

    def page_out() -> None:
        mappings = process.mappings()
        advisor.advise(PAGEOUT, list(zip(mappings.start.tolist(), (mappings.end - mappings.start).tolist(), strict=True)))

    def work() -> None:
        nonlocal next_s
        with contextlib.suppress(ProcessLookupError):
            page_out()
            while not over.wait(max(0.0, next_s - time.monotonic())):
                next_s += MOVE_S
                page_out()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        advisor.close()


def _rate(rows: list[dict[str, float]], clock: str) -> float:
    return sum(row["gets"] for row in rows) / sum(row[clock] for row in rows)


def _children_cpu_s(pid: int) -> float:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return sum(_cpu_s(int(child)) for child in children)


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
