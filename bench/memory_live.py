"""The live part of `wave bench memory`: a real RocksDB of some GiB on this machine's own kernel, zram as swap, hostd, and policies in agentd.

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
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from waveos.bench.memory_database import HOT_SHARE, MOVE_S, build, warm
from waveos.bench.memory_watch import Watch
from waveos.errors import ConfigError, LinkError, MissingError
from waveos.host import changes
from waveos.host.doors import ask
from waveos.host.memory.advise import PAGEOUT, Advisor
from waveos.host.memory.procfs import Process
from waveos.host.memory.zram import Zram
from waveos.host.restore import Journal
from waveos.names import nearest
from waveos.policy import load_policy

CGROUPS = Path("/sys/fs/cgroup/memory")
ATTACH_S = 90.0
BATCH_KIB = 2_048
PASS_MS = 2_400.0
WAVE = (sys.executable, "-P", "-c", "import sys; from waveos.cli import run; sys.exit(run(sys.argv[1:]))")

ORACLE, NOTHING = "oracle", "nothing"
RUNS = (ORACLE, "sol", "psi_backoff")
SETS = ("contiguous", "scrambled")
FIGURES = ("saved_share", "saved_usage_share", "throughput_ratio", "wall_throughput_ratio", "get_p99_ratio", "hostd_cores", "agent_cores")


@dataclass(frozen=True)
class Plan:
    """How long and how large. With `faster` 4 everything that takes time takes a quarter of it, in the database and in policies."""

    gib: float = 2.0
    base_s: float = 8.0
    settle_s: float = 30.0
    """After the agent has come, not counted: it reclaims what was cold from the start."""
    count_s: float = 60.0
    faster: float = 1.0


QUICK = Plan(gib=0.5, base_s=4.0, settle_s=6.0, count_s=15.0, faster=4.0)


def measure(plan: Plan, policies: Sequence[str] = RUNS, sets: Sequence[str] = SETS, repeats: int = 1, out: Path | None = None) -> dict[str, float]:
    """Figures of these policies on these hot sets; medians where there are repeats. `out`: a file for all that was seen. Raises MissingError, ConfigError."""
    for name, known, given in (("live-policies", (*RUNS, NOTHING), policies), ("live-sets", SETS, sets)):
        if unknown := [each for each in given if each not in known]:
            raise ConfigError(f"--{name}: no {unknown[0]!r}{nearest(unknown[0], known)}; there are: {', '.join(known)}")
    metrics: dict[str, float] = {}
    runs = []
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that hostd, the database and the swap end with us
    with Live(plan, watch=out is not None) as live:
        for kind in sets:
            made = {policy: [] for policy in policies}  # type: dict[str, list[dict[str, Any]]]
            for _ in range(repeats):
                for policy in policies:
                    made[policy].append(live.run(policy, scrambled=kind == "scrambled"))
            for policy, several in made.items():
                name = f"live_{'scrambled_' if kind == 'scrambled' else ''}{'psi' if policy == 'psi_backoff' else policy}"
                metrics |= {f"{name}_{key}": median(run["figures"][key] for run in several) for key in FIGURES}
                if repeats > 1:
                    for key in ("saved_share", "throughput_ratio"):
                        values = [run["figures"][key] for run in several]
                        metrics |= {f"{name}_{key}_least": min(values), f"{name}_{key}_most": max(values)}
                runs += several
    if out is not None:
        out.write_text(json.dumps(results(plan, runs)))
    return metrics


def judge(metrics: dict[str, float]) -> str:
    """The figures in a sentence, if those that it takes are there."""
    try:
        share = metrics["live_sol_saved_share"] / max(1e-9, metrics["live_oracle_saved_share"])
        cost = 1 - metrics["live_sol_throughput_ratio"]
        better = "more" if metrics["live_sol_saved_share"] > metrics["live_psi_saved_share"] else "LESS"
    except KeyError:
        return "live: not all of oracle, sol and psi_backoff were run, so nothing is judged"
    meets = "meets" if share >= 0.7 and cost <= 0.05 else "misses"
    return f"live: SOL saves {share:.0%} of the oracle's share at {cost:.1%} of throughput ({meets} 70 % at 5 %), {better} than psi_backoff"


def results(plan: Plan, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """As `wave report` reads it."""
    return {
        "name": "memory, live",
        "about": f"RocksDB with {plan.gib:g} GiB in its cache, a hot {HOT_SHARE:.0%} that moves every {MOVE_S / plan.faster:g} s, on this machine's kernel",
        "subsystem": "memory",
        "world": "local",
        "timing": "measured",
        "configs": runs,
        "notes": [
            f"Each run: {plan.base_s:g} s without a policy, then {plan.settle_s:g} s for it to settle, then {plan.count_s:g} s that count.",
            "Saved is resident memory less what zram takes; throughput is GETs for each second of the database's CPU time, against its own first seconds.",
        ],
    }


class Live:
    """What the runs share: a folder with the database, zram, a cgroup."""

    def __init__(self, plan: Plan, watch: bool = False) -> None:
        """watch: keep for each batch when it was resident, and find out what was hot. Raises MissingError where this machine cannot."""
        if os.geteuid() != 0:
            raise MissingError("the live part needs root: it makes a cgroup, swap, and advises another process's memory")
        if not (CGROUPS / "cgroup.procs").exists():
            raise MissingError(f"the live part needs the memory controller of cgroup version 1 at {CGROUPS}")
        try:
            import rocksdict as _  # noqa: F401
        except ImportError as error:
            raise MissingError("the live part needs RocksDB: pip install 'waveos[bench]' (rocksdict)") from error
        self.plan, self.watch = plan, watch
        self.folder = Path(tempfile.gettempdir()) / f"wave-memory-{plan.gib:g}gib"
        build(self.folder, plan.gib)
        warm(self.folder)
        self._stack = contextlib.ExitStack()
        name = f"bench-memory-{os.getpid()}"
        self.enclave = f"{name}-hostd"
        self.journal = Journal(name)
        self._stack.callback(self.journal.close)
        self.cgroup = CGROUPS / f"wave-{name}"
        changes.note_new_folder(self.journal, self.cgroup)
        self.cgroup.mkdir()
        # A swap that is more than half full gives a page's place back when the page is read; else the page would be held twice.
        self.zram = self._stack.enter_context(Zram(self.journal, int(plan.gib * 2**30)))

    def __enter__(self) -> Live:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, policy: str, *, scrambled: bool = False, params: dict[str, float] | None = None) -> dict[str, Any]:
        """One run: `policy` is a policy's name, "oracle" or "nothing". Shares of the database's memory at its fullest, ratios to its own beginning."""
        cores, plan = sorted(os.sched_getaffinity(0)), self.plan
        with self._database(scrambled, cores[0]) as (process, lines, ready), contextlib.ExitStack() as stack:
            watch = Watch(process.pid, self.cgroup, self.zram, ready["places"] if self.watch else {}, scrambled, MOVE_S / plan.faster)
            before = watch.follow(lines, plan.base_s)
            began_s = watch.rows[-1]["s"]
            if policy == ORACLE:
                stack.enter_context(_oracle(process.pid, began_s, MOVE_S / plan.faster, cores[-1]))
            elif policy != NOTHING:
                hostd = stack.enter_context(self._hostd(policy, cores[-1], params or self._params_of(policy)))
                self._await_agent(watch, lines, hostd)
            watch.follow(lines, plan.settle_s)
            after = watch.follow(lines, plan.count_s)
            status = ask(self.enclave, {"do": "status"}) if policy not in (ORACLE, NOTHING) else {}
        return {
            "id": f"{policy}{', scrambled' if scrambled else ''}",
            "policy": policy,
            "placement": policy if policy in (ORACLE, NOTHING) else "agentd",
            "scrambled": scrambled,
            "figures": watch.figures(before[2:] or before, after),
            "series": watch.series(),
            "maps": watch.maps(),
            "began_s": began_s,
            "outcomes": status.get("counters", {}).get("outcomes", {}),
            "status": status,
            "stops": [],
        }

    def _params_of(self, policy: str) -> dict[str, float]:
        """Its defaults, as much faster as all is: times are shorter, rates higher."""
        faster, params = self.plan.faster, load_policy(policy).param_values()
        if faster == 1:
            return {}
        sped = {name: value / faster for name, value in params.items() if name.endswith(("_ms", "_us"))}
        return sped | {name: value * faster for name, value in params.items() if name.endswith("_per_s")}

    def _await_agent(self, watch: Watch, lines: Any, hostd: Any) -> None:
        """Until hostd says that its agent has come. Raises MissingError after ATTACH_S."""
        end = time.monotonic() + ATTACH_S
        while True:
            with contextlib.suppress(ConfigError, LinkError):
                told = ask(self.enclave, {"do": "status"})
                if told["agent"]:
                    watch.daemons = {"hostd": told["pid"], "agent": told["agent"]["pid"]}
                    return
            watch.follow(lines, 0)
            if time.monotonic() >= end or hostd.poll() is not None:
                raise MissingError(f"no agent came within {ATTACH_S:g} s; its own messages say why")

    @contextlib.contextmanager
    def _database(self, scrambled: bool, core: int) -> Iterator[tuple[Any, Any, dict[str, Any]]]:
        plan = self.plan
        command = [sys.executable, "-P", "-m", "waveos.bench.memory_database", str(self.folder), "--gib", str(plan.gib)]
        command += ["--seconds", str(plan.base_s + plan.count_s + 600), "--batch-kib", str(BATCH_KIB)]
        command += ["--hot-share", str(HOT_SHARE), "--move-s", str(MOVE_S / plan.faster)]
        command += [*(["--scrambled"] if scrambled else []), *(["--map"] if self.watch else [])]

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
            yield process, process.stdout, json.loads(ready)
        finally:
            process.kill()
            process.communicate()

    @contextlib.contextmanager
    def _hostd(self, policy: str, core: int, params: dict[str, float]) -> Iterator[Any]:
        """hostd, which starts agentd; both on the core that the database does not have."""
        command = [*WAVE, "hostd", "--subsystem", "memory", "--enclave", self.enclave, "--cgroup", str(self.cgroup), "--hostd-cpu", str(core)]
        command += ["--agent-core", str(core), "--policy", policy, "--setting", f"batch_kib={BATCH_KIB}"]
        command += ["--setting", f"pass_ms={PASS_MS / self.plan.faster}"]
        for name, value in params.items():
            command += ["--param", f"{name}={value}"]
        process = subprocess.Popen(command)
        try:
            yield process
        finally:
            process.terminate()
            process.wait(30)


@contextlib.contextmanager
def _oracle(pid: int, began_s: float, move_s: float, core: int) -> Iterator[None]:
    """Page everything out now and whenever the hot set moves; `began_s` is how long the database has been serving."""
    over = threading.Event()
    next_s = time.monotonic() + (move_s - began_s % move_s)
    advisor, process = Advisor(pid), Process(pid)

    def page_out() -> None:
        mappings = process.mappings()
        advisor.advise(PAGEOUT, list(zip(mappings.start.tolist(), (mappings.end - mappings.start).tolist(), strict=True)))

    def work() -> None:
        nonlocal next_s
        os.sched_setaffinity(0, {core})  # of this thread
        with contextlib.suppress(ProcessLookupError):
            page_out()
            while not over.wait(max(0.0, next_s - time.monotonic())):
                next_s += move_s
                page_out()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        advisor.close()
