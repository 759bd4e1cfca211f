"""The mechanism of memory on this machine's own kernel: what it sees goes to the agent as messages, what the agent decides is done, within the enclave.

Sensor: `damon`, or `referenced` where the kernel has none; what it sees of a process is runs of batches, and a run is a region. A look costs a walk over all
pages, so there is at most one in `pass_ms`, and what was touched is kept for the batches that nobody has asked about. A batch that was reclaimed and faults
(`faults`, where BPF is to be had), or is touched, has come back. Actuator: `process_madvise`, and the cgroup's limit.

Links and processes are given to it: nothing here needs numba, and a made-up /proc does for tests.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from waveos.errors import ConfigError
from waveos.host.memory.advise import PAGEOUT, WILLNEED
from waveos.host.memory.cgroup import MemoryCgroup
from waveos.host.memory.procfs import ROOT, Process, stall_us, swap_free_kib
from waveos.host.memory.referenced import Referenced, Seen
from waveos.memory.records import DECISION_TYPES, GROUP, MESSAGE, OUTCOME, SUBSYSTEM, Decision, Message
from waveos.outcome import Outcome
from waveos.record import VERSION

PRESSURE_MS = 1_000
FAULTS_MS = 300
LEAST_SWAP_KIB = 64 << 10
"""Below this much room in swap nothing is reclaimed: the kernel needs some itself."""
SPARE_BYTES = 16 << 20
"""Left between what is brought back and the limit: pages on their way in cannot be reclaimed, and the kernel ends a process when it finds none that can."""
SEND_AT_ONCE = 1_024


class Advises(Protocol):
    """What the mechanism asks of `advise.Advisor`."""

    def advise(self, advice: int, ranges: Any) -> int: ...

    def close(self) -> None: ...


class Sensor(Protocol):
    """What the mechanism asks of `referenced.Referenced` and `damon.Damon`."""

    name: str

    def follow(self, processes: Any) -> None: ...

    def look(self, process: Process) -> list[Seen]: ...

    def close(self) -> None: ...


class Region:
    """A run of adjacent batches in one process."""

    def __init__(self, number: int, process: Process, start: int, count: int, batch_bytes: int) -> None:
        self.number, self.process, self.start, self.count, self.batch_bytes = number, process, start, count, batch_bytes
        self.padded = -(-count // GROUP) * GROUP
        self.seq = 1
        self.changed = np.ones(self.padded, np.int64)
        self.changed[count:] = 0
        self.rss = np.zeros(self.padded, np.int64)
        self.swap = np.zeros(self.padded, np.int64)
        self.touched = np.zeros(self.padded, bool)  # since that was last told
        self.asked = np.zeros(self.padded, bool)
        self.reclaimed = np.zeros(self.padded, bool)
        self.known = False  # whether the last look told what was touched

    def ranges(self, batches: Any) -> list[tuple[int, int]]:
        """(address, bytes) of these batches, one each."""
        return [(self.start + int(batch) * self.batch_bytes, self.batch_bytes) for batch in batches]

    def change(self, batches: Any) -> None:
        """Count a change of these batches' state."""
        self.seq += 1
        self.changed[batches] = self.seq


class MemoryMechanism:
    """The enclave: the processes of one cgroup. `say` gets a line for whatever a person should know, each once."""

    def __init__(
        self,
        cgroup: MemoryCgroup,
        *,
        batch_kib: int = 2_048,
        pass_ms: float = 2_400.0,
        quota_mib_per_s: float = 0.0,
        stall_share: float = 0.0,
        root: Path = ROOT,
        advisor: Callable[[int], Advises],
        sensor: Sensor | None = None,
        faults: Any = None,
        say: Callable[[str], None] = print,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.cgroup, self.batch_bytes, self.pass_ns = cgroup, batch_kib << 10, int(pass_ms * 1e6)
        self.quota_mib_per_s, self.stall_share = quota_mib_per_s, stall_share
        self.root, self._advisor_of, self._faults, self._say, self._clock_ns = root, advisor, faults, say, clock_ns
        self._sensor = sensor or Referenced(self.batch_bytes)
        self.processes: dict[int, Process] = {}
        self.advisors: dict[int, Advises] = {}
        self.regions: dict[int, Region] = {}
        self.counts = {outcome.name.lower(): 0 for outcome in Outcome}
        self.passes, self.spent_ns = 0, {"scan": 0, "act": 0}
        self.advised_kib = {"pageout": 0, "willneed": 0}
        self._next = 0
        self._passed_ns = self._pressed_ns = self._faulted_ns = 0
        self._stall_us = stall_us(root)
        self._out: list[Any] = []
        self._told: set[str] = set()
        if self._stall_us is None:
            self._once("this kernel tells no memory pressure (PSI is off; boot with psi=1): policies that need it hear of none")

    # What the agent is told.

    def take_messages(self) -> Any:
        """All messages since the last call, in order."""
        made, self._out = self._out, []
        return np.concatenate(made) if made else np.zeros(0, MESSAGE)

    def introduce(self) -> None:
        """The whole state, for an agent that is new or has lost messages."""
        self._out = [self._message(Message.RESYNC, -1, 0)]
        for region in self.regions.values():
            region.asked[:] = False
            self._introduce(region)
        if self.quota_mib_per_s or self.stall_share:
            budget = self._message(Message.BUDGET_CHANGED, -1, 0)
            budget["bytes"] = int((self.quota_mib_per_s or 1e6) * 2**20)
            budget["stall_us"] = int((self.stall_share or 1.0) * 1e6)
            self._out.append(budget)

    def tick(self) -> None:
        """Look at the processes, if it is time: the sensor's pass, and pressure."""
        now_ns = self._clock_ns()
        if now_ns - self._passed_ns >= self.pass_ns:
            self._passed_ns = now_ns
            begin_ns = time.thread_time_ns()
            self._pass()
            self.spent_ns["scan"] += time.thread_time_ns() - begin_ns
        if self._faults is not None and now_ns - self._faulted_ns >= FAULTS_MS * 1_000_000:
            self._faulted_ns = now_ns
            for region in self.regions.values():
                self._look_at_faults(region)
        if now_ns - self._pressed_ns >= PRESSURE_MS * 1_000_000:
            self._pressed_ns = now_ns
            self._press()

    def _introduce(self, region: Region) -> None:
        told = self._message(Message.REGION_MAPPED, region.number, region.seq)
        told["count"], told["bytes"] = region.count, region.batch_bytes
        self._out.append(told)

    def _press(self) -> None:
        told = self._message(Message.PRESSURE, -1, 0)
        stall = stall_us(self.root)
        if stall is not None and self._stall_us is not None:
            told["stall_us"] = stall - self._stall_us
        self._stall_us = stall
        told["bytes"] = sum(int(region.rss.sum()) for region in self.regions.values()) << 10
        try:
            told["bytes"] = max(int(told["bytes"][0]), self.cgroup.usage_bytes())
        except OSError:
            self._once(f"{self.cgroup.path} is gone: the enclave has nobody left in it")
        self._out.append(told)

    # The sensor.

    def _pass(self) -> None:
        self.passes += 1
        self._meet()
        try:
            self._sensor.follow(self.processes.values())
        except ConfigError as error:
            self._once(f"{error}: until it can, nothing is known of what is accessed")
            return
        for process in list(self.processes.values()):
            try:
                seen = self._sensor.look(process)
            except (ProcessLookupError, OSError) as error:
                if process.alive():
                    self._once(f"process {process.pid} cannot be looked into ({error}): it is left alone")
                self._forget(process)
                continue
            self._follow(process, seen)
        for region in self.regions.values():
            self._tell(region)

    def _meet(self) -> None:
        """Who has come into the cgroup, who has gone."""
        here = set(self.cgroup.pids())
        for pid in here - set(self.processes):
            process = Process(pid, self.root)
            try:
                self.advisors[pid] = self._advisor_of(pid)
            except (ProcessLookupError, OSError):
                continue
            self.processes[pid] = process
        for process in list(self.processes.values()):
            if process.pid not in here or not process.alive():
                self._forget(process)

    def _forget(self, process: Process) -> None:
        for region in [each for each in self.regions.values() if each.process is process]:
            self._unmap(region)
        self.processes.pop(process.pid, None)
        if (advisor := self.advisors.pop(process.pid, None)) is not None:
            advisor.close()

    def _unmap(self, region: Region) -> None:
        region.seq += 1
        self._out.append(self._message(Message.REGION_UNMAPPED, region.number, region.seq))
        del self.regions[region.number]
        if self._faults is not None:
            self._faults.forget(region.number)

    def _follow(self, process: Process, seen: list[Seen]) -> None:
        """Match regions with what is seen now; take over what was counted."""
        runs = {each.start: each for each in seen}
        known = {region.start: region for region in self.regions.values() if region.process is process}
        for start, region in known.items():
            if start not in runs or len(runs[start].rss) != region.count:  # unmapped, split, grown, or another program's
                self._unmap(region)
        for start, each in runs.items():
            region = known.get(start)  # type: ignore[assignment]
            if region is None or region.number not in self.regions:
                region = Region(self._next, process, start, len(each.rss), self.batch_bytes)
                self._next += 1
                self.regions[region.number] = region
                if self._faults is not None:
                    self._faults.watch(region.number, process.pid, start, region.count, self.batch_bytes)
                self._introduce(region)
            self._count(region, each)

    def _count(self, region: Region, seen: Seen) -> None:
        """What one pass says of a region."""
        n = region.count
        touched = np.zeros(n, bool) if seen.touched is None else seen.touched
        back = region.reclaimed[:n] & touched & (seen.rss > 0)
        region.rss[:n], region.touched[:n] = seen.rss, region.touched[:n] | touched
        region.known = seen.touched is not None
        if back.any():
            self._came_back(region, back, int(np.maximum(0, region.swap[:n] - seen.swap)[back].sum()) // 4)
        region.swap[:n] = seen.swap

    def _look_at_faults(self, region: Region) -> None:
        """What has come back by the kernel's own account: sooner than a pass sees it."""
        came = self._faults.take(region.number)
        if came is not None and (back := (came > 0) & region.reclaimed[: region.count]).any():
            self._came_back(region, back, int(came[back].sum()))

    def _came_back(self, region: Region, back: Any, pages: int) -> None:
        """These were reclaimed and have been touched."""
        region.change(np.flatnonzero(back))
        region.reclaimed[: region.count] &= ~back
        told = self._named(Message.REFAULTED, region, back)
        told["count"] = pages // len(told)
        self._out.append(told)

    def _tell(self, region: Region) -> None:
        """Access bits of the batches that were asked about."""
        if not region.known or not region.asked.any():
            return
        told = self._named(Message.ACCESSED, region, region.asked[: region.count])
        groups = told["first"] // GROUP
        told["touched"] = words(region.touched & region.asked)[groups]
        region.touched[region.asked] = False
        region.asked[:] = False
        self._out.append(told)

    # The actuator.

    def apply(self, decisions: Any) -> None:
        """Carry out decisions; their outcomes go to the agent in the order of its messages."""
        begin_ns = time.thread_time_ns()
        told = np.zeros(len(decisions), OUTCOME)
        for name in ("region", "first", "batches", "txn"):
            told[name] = decisions[name]
        told["version"], told["subsystem"], told["type"], told["decision"] = VERSION, SUBSYSTEM, Message.TXN_OUTCOME, decisions["type"]
        for row, decision in zip(told, decisions, strict=True):
            region = self.regions.get(int(decision["region"]))
            outcome, kib = self._enforce(decision, region)
            row["seq"] = region.seq if region is not None else -1
            row["outcome"], row["kib"], row["time_ns"] = outcome, kib, self._clock_ns()
            row["age_ns"] = row["time_ns"] - decision["time_ns"]
            self.counts[outcome.name.lower()] += 1
        self._out.append(told.view(MESSAGE))
        self.spent_ns["act"] += time.thread_time_ns() - begin_ns

    def _enforce(self, decision: Any, region: Region | None) -> tuple[Outcome, int]:
        """One decision, whole or not at all: (outcome, KiB moved)."""
        kind, quota = int(decision["type"]), int(decision["bytes"])
        if kind not in DECISION_TYPES.values() or int(decision["subsystem"]) != SUBSYSTEM:
            return Outcome.INVALID, 0
        if kind == Decision.LIMIT:
            return self._limit(quota)
        if region is None:
            return Outcome.TARGET_GONE, 0
        first = int(decision["first"])
        if first < 0 or first % GROUP or first >= region.count:
            return Outcome.INVALID, 0
        batches = first + np.flatnonzero(bits(int(decision["batches"])))
        if len(batches) and batches[-1] >= region.count:
            return Outcome.INVALID, 0
        if kind == Decision.SCAN:
            region.asked[batches] = True
            return Outcome.COMMITTED, 0
        if kind == Decision.KEEP:
            return Outcome.COMMITTED, 0  # orders are carried out at once: nothing is left of earlier ones
        if quota <= 0:
            self._once("a decision with a quota of zero moves nothing, so it is refused; see the policy's quota and the enclave's budget")
            return Outcome.INVALID, 0
        if (region.changed[batches] > int(decision["seq"])).any():
            return Outcome.STALE, 0
        return self._move(kind, region, batches[: quota // region.batch_bytes])

    def _move(self, kind: int, region: Region, batches: Any) -> tuple[Outcome, int]:
        if kind == Decision.RECLAIM and swap_free_kib(self.root) < LEAST_SWAP_KIB:
            self._once("there is no room in swap (SwapFree in /proc/meminfo), so nothing can be reclaimed: add swap, or zram")
            return Outcome.CONGESTED, 0
        if kind == Decision.BRING_BACK and self._room_bytes() < len(batches) * region.batch_bytes + SPARE_BYTES:
            self._once("what is to be brought back does not fit under the cgroup's limit: it is left in swap, as the kernel would kill processes")
            return Outcome.CONGESTED, 0
        if not region.process.alive():
            return Outcome.TARGET_GONE, 0
        advice = PAGEOUT if kind == Decision.RECLAIM else WILLNEED
        try:
            kib = self.advisors[region.process.pid].advise(advice, region.ranges(batches)) >> 10
        except ProcessLookupError:
            return Outcome.TARGET_GONE, 0
        except OSError as error:
            self._once(f"process {region.process.pid}: process_madvise: {error.strerror}")
            return Outcome.CONGESTED, 0
        region.change(batches)
        if kind == Decision.RECLAIM:
            region.reclaimed[batches] = True
            region.touched[batches] = False
        else:
            region.reclaimed[batches] = False
        self.advised_kib["pageout" if kind == Decision.RECLAIM else "willneed"] += kib
        return Outcome.COMMITTED, kib

    def _room_bytes(self) -> int:
        try:
            return self.cgroup.room_bytes()
        except OSError:
            return 0  # the cgroup is gone

    def _limit(self, limit_bytes: int) -> tuple[Outcome, int]:
        try:
            if limit_bytes and self.cgroup.usage_bytes() - limit_bytes > (swap_free_kib(self.root) - LEAST_SWAP_KIB) << 10:
                self._once("a limit so far below what is used does not fit into swap: it is not set, as the kernel would kill processes")
                return Outcome.CONGESTED, 0
            if limit_bytes > self.cgroup.given:
                self._once(f"the policy's limit is above the operator's own, {self.cgroup.given >> 20} MiB, which stays")
            return Outcome.COMMITTED, self.cgroup.set_limit(limit_bytes) >> 10 & 0xFFFFFFFF
        except OSError as error:
            self._once(f"{self.cgroup.path}: the limit cannot be set ({error.strerror}); other decisions are carried out")
            return Outcome.CONGESTED, 0

    def facts(self) -> dict[str, Any]:
        """What has happened so far, and what there is."""
        return {
            "sensor": self._sensor.name,
            "passes": self.passes,
            "outcomes": dict(self.counts),
            "advised_kib": dict(self.advised_kib),
            "cpu_ms": {name: spent // 1_000_000 for name, spent in self.spent_ns.items()},
            "processes": len(self.processes),
            "limit_mib": limit >> 20 if (limit := self.cgroup.now) < self.cgroup.given else 0,
            "regions": {
                f"{number}": {
                    "pid": region.process.pid,
                    "batches": region.count,
                    "resident_mib": int(region.rss.sum()) >> 10,
                    "swap_mib": int(region.swap.sum()) >> 10,
                }
                for number, region in self.regions.items()
            },
        }

    # The agent's comings and goings.

    def agent_gone(self) -> None:
        """Nobody decides: the limit is the operator's again, and nothing that was asked counts."""
        for line in self.cgroup.restore():
            self._say(line)
        for region in self.regions.values():
            region.asked[:] = False

    def close(self) -> None:
        """Everything as it was. What is in swap comes back when it is touched. Twice does no harm."""
        self.agent_gone()
        for advisor in self.advisors.values():
            advisor.close()
        self.advisors.clear()
        self._sensor.close()
        if self._faults is not None:
            self._faults.close()

    # Records.

    def _message(self, kind: Message, region: int, seq: int, n: int = 1) -> Any:
        told: Any = np.zeros(n, MESSAGE)
        told["version"], told["subsystem"], told["type"] = VERSION, SUBSYSTEM, kind
        told["region"], told["seq"], told["time_ns"] = region, seq, self._clock_ns()
        return told

    def _named(self, kind: Message, region: Region, batches: Any) -> Any:
        """Messages that name these batches, [count] bool, a group each."""
        flags = np.zeros(region.padded, bool)
        flags[: region.count] = batches
        masks = words(flags)
        groups = np.flatnonzero(masks)
        told = self._message(kind, region.number, region.seq, len(groups))
        told["first"], told["batches"] = GROUP * groups, masks[groups]
        return told

    def _once(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            self._say(line)


def words(flags: Any) -> Any:
    """[n] bool as [n / 64] uint64."""
    return np.packbits(flags, bitorder="little").view(np.uint64)


def bits(word: int) -> Any:
    """[64] bool."""
    return np.unpackbits(np.array([word], np.uint64).view(np.uint8), bitorder="little").view(bool)
