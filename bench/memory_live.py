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
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from waveos.bench.memory_database import HOT_SHARE, MOVE_S, build, warm
from waveos.bench.memory_watch import Watch
from waveos.errors import ConfigError, LinkError, MissingError
from waveos.host import changes
from waveos.host.doors import ask
from waveos.host.guard import guarded
from waveos.host.memory.advise import PAGEOUT, Advisor
from waveos.host.memory.procfs import Process
from waveos.host.memory.zram import Zram
from waveos.host.restore import Journal
from waveos.policy import load_policy

CGROUPS = Path("/sys/fs/cgroup/memory")
ATTACH_S = 90.0
PASS_MS = 2_400.0
WAVE = (sys.executable, "-P", "-c", "import sys; from waveos.cli import run; sys.exit(run(sys.argv[1:]))")
MOST_MAPPINGS = Path("/proc/sys/vm/max_map_count")

ORACLE, NOTHING = "oracle", "nothing"
SETS = ("contiguous", "scrambled")
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """How long and how large, and what is hot. With `faster` 4 everything that takes time takes a quarter of it, in the database and in policies."""

    gib: float = 2.0
    base_s: float = 30.0
    settle_s: float = 30.0
    """After the agent has come, not counted: it reclaims what was cold from the start."""
    count_s: float = 60.0
    faster: float = 1.0
    hot_share: float = HOT_SHARE
    move_s: float = MOVE_S
    """How often the hot set moves fully; infinite: never."""
    batch_kib: int = 2_048
    seed: int = 1

    @property
    def run_s(self) -> float:
        """How long a run takes about, without the database's start."""
        return self.base_s + self.settle_s + self.count_s

    def check(self) -> None:
        """Raises ConfigError for what does not fit on this machine."""
        if (needed := self.gib * MEMORY_FACTOR) > (free := available_gib()):
            raise ConfigError(
                f"a database of {self.gib:g} GiB takes some {needed:.1f} GiB in all, and this machine has {free:.1f} GiB available:"
                f" take one of {free / MEMORY_FACTOR:.1f} GiB or less"
            )
        mappings, most = int(self.gib * 2**20 * 1.2 / self.batch_kib), int(MOST_MAPPINGS.read_text())
        if mappings > 0.9 * most:
            raise ConfigError(
                f"{self.gib:g} GiB in batches of {self.batch_kib} KiB is some {mappings:,} mappings, and a process may have {most:,} of them:"
                f" take larger batches, or raise it (sysctl vm.max_map_count={2 * mappings})"
            )


QUICK = Plan(gib=0.5, base_s=4.0, settle_s=6.0, count_s=15.0, faster=4.0)
MEMORY_FACTOR = 1.8
"""The cache and what lies around its blocks, and zram with nearly all of it."""


def available_gib() -> float:
    """Memory that programs of this machine may still take."""
    found = re.search(r"^MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(found[1]) / 2**20 if found else 0.0


def results(plan: Plan, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """As `wave report` reads it."""
    moves = f"that moves every {plan.move_s / plan.faster:g} s" if plan.move_s < math.inf else "that stays"
    return {
        "name": "memory, live",
        "about": f"RocksDB with {plan.gib:g} GiB in its cache, a hot {plan.hot_share:.0%} {moves}, on this machine's kernel",
        "subsystem": "memory",
        "world": "local",
        "timing": "measured",
        "configs": runs,
        "notes": [
            f"Each run: {plan.base_s:g} s without a policy, then {plan.settle_s:g} s for it to settle, then {plan.count_s:g} s that count.",
            "Saved is resident memory less what zram takes; throughput is GETs for each second of the database's CPU time, against its own first seconds.",
        ],
        "interrupted": False,
    }


class Live:
    """What the runs share: a folder with the database, zram, a cgroup."""

    def __init__(self, plan: Plan, watch: bool = False, tell: Tell = lambda line: None) -> None:
        """watch: keep for each batch when it was resident, and find out what was hot. `tell` gets a line a step. Raises MissingError where this machine
        cannot, ConfigError where it is too small."""
        if os.geteuid() != 0:
            raise MissingError("the live part needs root: it makes a cgroup, swap, and advises another process's memory")
        if not (CGROUPS / "cgroup.procs").exists():
            raise MissingError(f"the live part needs the memory controller of cgroup version 1 at {CGROUPS}")
        try:
            import rocksdict as _  # noqa: F401
        except ImportError as error:
            raise MissingError("the live part needs RocksDB: pip install 'waveos[bench]' (rocksdict)") from error
        if len(os.sched_getaffinity(0)) < 2:
            raise MissingError("the live part needs two cores: one for the database, one for those who look after its memory")
        plan.check()
        self.plan, self.watch, self._tell = plan, watch, tell
        self.folder = Path(tempfile.gettempdir()) / f"wave-memory-{plan.gib:g}gib"
        self.enclave = f"bench-memory-{os.getpid()}-hostd"
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Live:
        with contextlib.ExitStack() as stack:  # what has been made is taken back if the next cannot be
            if threading.current_thread() is threading.main_thread():
                before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that hostd, the database and the swap end with us
                stack.callback(signal.signal, signal.SIGTERM, before)
            self._tell(f"a database of {self.plan.gib:g} GiB in {self.folder}")
            build(self.folder, self.plan.gib)
            warm(self.folder)
            name = f"bench-memory-{os.getpid()}"
            stack.enter_context(guarded(name))  # should we be killed
            self.journal = Journal(name)
            stack.callback(self.journal.close)
            self.cgroup = CGROUPS / f"wave-{name}"
            changes.note_new_folder(self.journal, self.cgroup)
            self.cgroup.mkdir()
            # A swap that is more than half full gives a page's place back when the page is read; else the page would be held twice.
            self.zram = stack.enter_context(Zram(self.journal, int(self.plan.gib * 2**30)))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, policy: str, *, scrambled: bool = False, params: dict[str, float] | None = None) -> dict[str, Any]:
        """One run: `policy` is a policy's name, "oracle" or "nothing". Shares of the database's memory at its fullest, ratios to its own beginning."""
        cores, plan = sorted(os.sched_getaffinity(0)), self.plan
        move_s = plan.move_s / plan.faster
        with self._database(scrambled, cores[0]) as (process, lines, ready), contextlib.ExitStack() as stack:
            watch = Watch(process.pid, self.cgroup, self.zram, ready["places"] if self.watch else {}, scrambled, plan.hot_share, move_s)
            before = watch.follow(lines, plan.base_s)
            began_s = watch.rows[-1]["s"]
            if policy == ORACLE:
                stack.enter_context(_oracle(process.pid, began_s, move_s, cores[-1]))
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
        command += ["--seconds", str(plan.base_s + plan.settle_s + plan.count_s + 600)]
        command += ["--batch-kib", str(plan.batch_kib), "--seed", str(plan.seed)]
        command += ["--hot-share", str(plan.hot_share), "--move-s", str(plan.move_s / plan.faster)]
        command += [*(["--scrambled"] if scrambled else []), *(["--map"] if self.watch else [])]

        def enter() -> None:
            (self.cgroup / "cgroup.procs").write_text(str(os.getpid()))
            os.sched_setaffinity(0, {core})

        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=enter, start_new_session=True)
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
        command += ["--agent-core", str(core), "--policy", policy, "--setting", f"batch_kib={self.plan.batch_kib}"]
        command += ["--setting", f"pass_ms={PASS_MS / self.plan.faster}"]
        for name, value in params.items():
            command += ["--param", f"{name}={value}"]
        process = subprocess.Popen(command, start_new_session=True)  # Ctrl-C is ours: we end them
        try:
            yield process
        finally:
            process.terminate()
            process.wait(30)


@contextlib.contextmanager
def _oracle(pid: int, began_s: float, move_s: float, core: int) -> Iterator[None]:
    """Page everything out now and whenever the hot set moves; `began_s` is how long the database has been serving."""
    over = threading.Event()
    next_s = time.monotonic() + (move_s - began_s % move_s)  # never, if that is infinite
    advisor, process = Advisor(pid), Process(pid)

    def page_out() -> None:
        mappings = process.mappings()
        advisor.advise(PAGEOUT, list(zip(mappings.start.tolist(), (mappings.end - mappings.start).tolist(), strict=True)))

    def work() -> None:
        nonlocal next_s
        os.sched_setaffinity(0, {core})  # of this thread
        with contextlib.suppress(ProcessLookupError):
            page_out()
            while not over.wait(max(0.0, next_s - time.monotonic()) if next_s < math.inf else None):
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
