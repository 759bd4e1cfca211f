"""`make soak`: a live enclave under load for half an hour, whose agent is replaced every minute; its daemons' memory must not grow, nor a member wait long.

    .venv/bin/python tests/chaos/soak.py --minutes 30 --upgrade-s 60

An upgrade is what `docs/deploy.md` says: the next agent is started and waits for its place, the one that decides is ended, and the host replays its whole
state. Claims: over the last two thirds of the time hostd's resident memory, and that of the agents at their ends, grows by less than GROWTH; no member
that waits for nobody but its CPU (ALONE) pauses longer than PAUSE_MS beyond what the hypervisor took. The others' steps are chains of turns of several
threads: told, not judged. The figures are one JSON object on stdout; exit status 1 if a claim does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from world import GAP, Watch, World, stolen_ms, until, why_not

GROWTH = 0.01
PAUSE_MS = 100.0
SAMPLE_S = 2.0
SHORTEST_MIN = 0.2
POLICIES = ("shinjuku", "fifo", "round_robin")
ALONE = ("tick", "spin", "give_way")
LOAD = (("tick",), ("spin", "3"), ("spin", "8"), ("give_way",), ("beget",), ("weave",))


def rss_kib(pid: int) -> int:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * (os.sysconf("SC_PAGE_SIZE") // 1024)


def growth(samples: list[tuple[float, int]], begin_s: float) -> float:
    """How much the values have grown since `begin_s`, as a share of the first, by the line through them (Theil and Sen: the median of all slopes)."""
    late = [each for each in samples if each[0] >= begin_s]
    slopes = [(y - x) / (t - s) for at, (s, x) in enumerate(late) for t, y in late[at + 1 :]]
    return statistics.median(slopes) * (late[-1][0] - late[0][0]) / late[0][1] if slopes else 0.0


class Soak:
    """One enclave, its hostd, and one agent after another."""

    def __init__(self, world: World) -> None:
        self.world = world
        for kind, *arguments in LOAD:
            world.worker(kind, *arguments)
        world.pair()
        self.hostd = world.hostd("--no-agent", "--policy", POLICIES[0])
        self.watch = Watch(world)
        self.agents: list[Any] = []
        self.upgrades = 0
        self.hostd_rss: list[tuple[float, int]] = []
        self.agent_rss: list[tuple[float, int]] = []
        self.pauses: list[dict[str, Any]] = []
        self.longest_ms: dict[str, float] = {}

    def upgrade(self, now_s: float) -> None:
        """The next agent is there and waits; the one that decides is ended as a service is, and the next decides."""
        refused = self._refused()
        new = self.world.agent(POLICIES[self.upgrades % len(POLICIES)])
        until(lambda: not self.agents or self._refused() > refused or new.poll() is not None, "the next agent knocks")
        for old in self.agents:
            self.agent_rss.append((now_s, rss_kib(old.pid)))
            old.send_signal(signal.SIGTERM)
            old.wait(30)
        self.agents = [new]
        until(lambda: self.world.attached() == new.pid, "the next agent decides")
        self.upgrades += 1

    def _refused(self) -> int:
        """How often an agent found another there."""
        told = self.world.ask("status", 1.0)
        return told["agents_refused"] if told else 0

    def look(self, now_s: float, stolen: float) -> None:
        """Sample memory, and the longest pause of each member since the last look."""
        self.hostd_rss.append((now_s, rss_kib(self.hostd.pid)))
        for worker in self.world.workers:
            pause = self.world.word(worker, GAP) / 1e6
            self.longest_ms[worker.kind] = max(pause, self.longest_ms.get(worker.kind, 0.0))
            if worker.kind in ALONE and pause - stolen > PAUSE_MS:
                self.pauses.append({"at_s": round(now_s), "of": worker.name, "ms": round(pause, 1), "stolen_ms": round(stolen, 1)})
        self.world.forget_gaps()

    def run(self, minutes: float, upgrade_s: float) -> None:
        """Until the time is over, or a claim broke."""
        world = self.world
        self.upgrade(0.0)
        begin = time.monotonic()
        world.forget_gaps()
        next_s, taken = upgrade_s, stolen_ms(world.cpus[0])
        while (now_s := time.monotonic() - begin) < 60 * minutes:
            if now_s >= next_s:
                self.upgrade(now_s)
                next_s += upgrade_s
            time.sleep(SAMPLE_S)
            before, taken = taken, stolen_ms(world.cpus[0])
            self.look(time.monotonic() - begin, taken - before)
            if self.hostd.poll() is not None or self.watch.stuck or any(each.poll() is not None for each in self.agents):
                raise AssertionError(self.watch.stuck or f"a daemon ended: {world.log('hostd.log')[-800:]} {world.log('agentd.log')[-800:]}")
            print(f"\rsoak: {now_s / 60:.1f} of {minutes:g} min, {self.upgrades} agents", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)

    def figures(self, minutes: float) -> dict[str, Any]:
        """What was seen."""
        late_s = 60 * minutes / 3
        status = until(lambda: self.world.ask("status"), "hostd answers")
        return {
            "minutes": minutes,
            "upgrades": self.upgrades - 1,
            "hostd_rss_mib": round(self.hostd_rss[-1][1] / 1024, 1),
            "hostd_rss_growth": round(growth(self.hostd_rss, late_s), 5),
            "agent_rss_mib": round(self.agent_rss[-1][1] / 1024, 1) if self.agent_rss else None,
            "agent_rss_growth": round(growth(self.agent_rss, late_s), 5),
            "longest_pause_ms": {kind: round(ms, 1) for kind, ms in self.longest_ms.items()},
            "pauses_over": self.pauses,
            "messages": status["counters"]["messages"],
            "outcomes": {name: count for name, count in status["counters"]["outcomes"].items() if count},
        }


def main() -> int:
    """Exit status: 0 as it should be, 1 a claim broke."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--upgrade-s", type=float, default=60.0)
    told = parser.parse_args()
    if told.minutes < SHORTEST_MIN or told.upgrade_s <= 0:
        parser.error(
            f"--minutes {told.minutes:g} --upgrade-s {told.upgrade_s:g}: at least {SHORTEST_MIN:g} minutes, and some time between two upgrades"
        )
    if reason := why_not():
        print(f"soak: not here: {reason}", file=sys.stderr)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    world = World(f"soak-{os.getpid()}")
    try:
        soak = Soak(world)
        soak.run(told.minutes, told.upgrade_s)
        found = soak.figures(told.minutes)
        print(json.dumps(found, indent=1))
        broken = [name for name in ("hostd_rss_growth", "agent_rss_growth") if found[name] > GROWTH] + ["pauses_over"] * bool(found["pauses_over"])
        if broken:
            print(f"soak: BROKEN: {', '.join(broken)}", file=sys.stderr)
        return bool(broken)
    except (AssertionError, subprocess.TimeoutExpired) as error:
        print(f"\nsoak: BROKEN: {error}", file=sys.stderr)
        return 1
    finally:
        world.close()


if __name__ == "__main__":
    sys.exit(main())
