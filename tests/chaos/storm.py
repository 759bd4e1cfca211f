"""`make chaos`: daemons of a live enclave are killed, hung and confused at random moments under load, and nothing may be lost, stuck or left behind.

    .venv/bin/python tests/chaos/storm.py --agent-kills 200 --hostd-kills 50 --seed 1

The moments follow from the seed, which is told first. Claims are checked all the time; the first that breaks ends the storm with exit status 1. At the
end the figures are one JSON object on stdout. Times are figures, beside those of the same enclave in quiet windows and of a process outside it; one
of them is a claim, which a whole storm ends with: once its agent was killed, no member waited for longer than FALLBACK_MS for a turn, but for what the
hypervisor took (`over_ms` lists those who did). A short one says so and passes: it is for machines that do other work, too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from typing import Any

from world import COUNT, GAP, Watch, Worker, World, bpf_objects, scheduling, stolen_ms, until, why_not

WINDOW_S = 0.15
FALLBACK_MS = 50.0
"""At most between the death of an agent and the kernel's own order, as a member sees it."""
POLICIES = (("fifo", {}), ("shinjuku", {"quantum_us": 500}), ("round_robin", {"quantum_us": 300}), ("edf", {}), ("shinjuku", {"quantum_us": 3_000}))


class Broken(Exception):
    """A claim does not hold."""


class Storm:
    """One enclave, its daemons, and what happens to them."""

    def __init__(self, world: World, rng: random.Random) -> None:
        self.world, self.rng = world, rng
        self.counts = dict.fromkeys(
            (
                "agent_kills",
                "attached_kills",
                "hostd_kills",
                "both_kills",
                "agent_stops",
                "hostd_stops",
                "policy_changes",
                "restores",
                "agents_started",
                "hostds_started",
            ),
            0,
        )
        self.over_ms: list[dict[str, float]] = []
        self.gaps: dict[str, list[float]] = {"quiet": [], "agent_kill": [], "hostd_kill": [], "control_quiet": [], "control_kill": []}
        self._start_workers()
        self.before = {each.pid: scheduling(each.pid) for each in self._steady()}
        self.hostd: subprocess.Popen[Any] | None = None
        self.agents: list[subprocess.Popen[Any]] = []
        self._killed: set[int] = set()
        self.watch = Watch(world)

    def _start_workers(self) -> None:
        world, cpus = self.world, self.world.cpus
        self.tick = world.worker("tick")
        world.pair()
        for kind, *arguments in (("spin", "3"), ("spin", "8"), ("give_way",), ("beget",), ("weave",), ("meddle",)):
            world.worker(kind, *arguments)
        for worker in world.workers:
            until(lambda worker=worker: world.word(worker, COUNT) > 2, f"{worker.name} begins")
        # What they are before Wave is various, so that bringing it back is more than a default.
        pings, spins = world.workers[1:3], world.workers[3:5]
        os.setpriority(os.PRIO_PROCESS, pings[0].pid, 5)
        os.sched_setaffinity(pings[1].pid, {cpus[1]})
        os.sched_setscheduler(spins[0].pid, os.SCHED_BATCH, os.sched_param(0))
        os.setpriority(os.PRIO_PROCESS, spins[1].pid, -3)
        os.sched_setscheduler(self.tick.pid, os.SCHED_RR, os.sched_param(4))
        self.members = ",".join(str(each.pid) for each in world.workers)
        self.control = world.worker("tick")  # outside the enclave
        os.sched_setaffinity(self.control.pid, {cpus[1]})
        os.sched_setscheduler(self.control.pid, os.SCHED_FIFO, os.sched_param(10))

    def _steady(self) -> list[Worker]:
        """Workers that do not change themselves."""
        return [each for each in self.world.workers if each.kind != "meddle"]

    def changed(self) -> list[str]:
        """What is not as it was before, of threads that were there then and still are."""
        found = []
        for worker in self._steady():
            now = scheduling(worker.pid)
            for tid, was in self.before[worker.pid].items():
                if tid in now and now[tid] != was:
                    found.append(f"thread {tid} of {worker.name} was {was[0]} on {was[1]}, is {now[tid][0]} on {now[tid][1]}")
            if worker.kind in ("weave",):
                found += [
                    f"thread {tid} of {worker.name}, born later, is {is_[0]}"
                    for tid, is_ in now.items()
                    if tid not in self.before[worker.pid] and is_[0].policy == "FIFO"
                ]
        return found

    def check(self) -> None:
        """The claims that hold at any time."""
        if self.watch.stuck:
            raise Broken(self.watch.stuck)
        for worker in self.world.workers:
            if (status := worker.process.poll()) is not None:
                raise Broken(f"{worker.name} ended with {status} in mid-storm")
        if scheduling(self.control.pid) != self.before[self.control.pid]:
            raise Broken(f"a thread outside the enclave was changed: {scheduling(self.control.pid)}")
        for name in ("hostd.log", "agentd.log"):
            if "Traceback" in (told := self.world.log(name)):
                raise Broken(f"{name}: {told[-3_000:]}")

    def supervise(self) -> None:
        """Start what is not there: a hostd, an agent and one that waits for its place."""
        if self.hostd is None or self.hostd.poll() is not None:
            if self.hostd is not None and self.hostd.pid not in self._killed:
                raise Broken(f"hostd ended by itself with {self.hostd.returncode}: {self.world.log('hostd.log')[-2_000:]}")
            self.hostd = self.world.hostd("--no-agent", "--policy", "shinjuku", members=self.members)
            self.counts["hostds_started"] += 1
        for agent in [each for each in self.agents if each.poll() is not None]:
            if agent.pid not in self._killed:
                raise Broken(f"agentd ended by itself with {agent.returncode}: {self.world.log('agentd.log')[-2_000:]}")
            self.agents.remove(agent)
        while len(self.agents) < 2:
            self.agents.append(self.world.agent(self.rng.choice(("fifo", "shinjuku", "round_robin"))))
            self.counts["agents_started"] += 1

    def _await_attached(self) -> int:
        """The same, once there is one."""

        def there() -> int | None:
            self.supervise()
            return self.world.attached()

        return int(until(there, "an agent is attached"))

    def _kill(self, process: subprocess.Popen[Any], number: int = signal.SIGKILL) -> None:
        self._killed.add(process.pid)
        process.send_signal(number)

    def _window(self, act: Any, name: str) -> None:
        """Longest pauses of the ticking member, and of the ticking process outside, before and after something is done."""
        world, tick = self.world, self.tick
        self._step()
        world.forget_gaps()
        time.sleep(WINDOW_S)
        self._step()
        self.gaps["quiet"].append(world.word(tick, GAP) / 1e6)
        self.gaps["control_quiet"].append(world.word(self.control, GAP) / 1e6)
        world.forget_gaps()
        stolen = stolen_ms(world.cpus[0])
        act()
        time.sleep(WINDOW_S)
        self._step()
        self.gaps[name].append(pause := world.word(tick, GAP) / 1e6)
        self.gaps["control_kill"].append(world.word(self.control, GAP) / 1e6)
        if name == "agent_kill" and pause - (taken := stolen_ms(world.cpus[0]) - stolen) > FALLBACK_MS:
            self.over_ms.append({"kill": self.counts["agent_kills"] + 1, "pause": round(pause, 1), "stolen": taken})

    def _step(self) -> None:
        """The ticking member has made its next step: a pause is seen whole, and in the window in which it began."""
        count = self.world.word(self.tick, COUNT)
        until(lambda: self.world.word(self.tick, COUNT) != count or self.watch.stuck, "the ticking member goes on")

    def kill_agent(self) -> None:
        """The one that decides, mostly; else one that waits, or begins."""
        pid = self._await_attached() if self.rng.random() < 0.8 else None
        victim = next((each for each in self.agents if each.pid == pid), self.rng.choice(self.agents))
        if victim.pid == pid:
            self._window(lambda: self._kill(victim), "agent_kill")
            self.counts["attached_kills"] += 1
        else:
            self._kill(victim)
        victim.wait()
        self.counts["agent_kills"] += 1

    def kill_hostd(self) -> None:
        """At work, or while it begins; then `wave restore`, or the next one, puts back what it left."""
        assert self.hostd is not None
        if self.rng.random() < 0.7:
            until(lambda: self.world.ask("status", 1.0), "hostd answers")
            self._window(lambda: self._kill(self.hostd), "hostd_kill")
        else:
            self._kill(self.hostd)
        self.hostd.wait()
        self.counts["hostd_kills"] += 1
        if self.rng.random() < 0.5:
            told = self.world.restore()
            if told.returncode or "Traceback" in told.stderr:
                raise Broken(f"wave restore: {told.returncode} {told.stdout}{told.stderr}")
            self.counts["restores"] += 1
            if changed := self.changed():
                raise Broken(f"after wave restore ({told.stdout}{told.stderr}): {'; '.join(changed)}")

    def kill_both(self) -> None:
        """At once."""
        assert self.hostd is not None
        for process in (self.hostd, *self.agents):
            self._kill(process)
        for process in (self.hostd, *self.agents):
            process.wait()
        self.counts["both_kills"] += 1
        self.counts["hostd_kills"] += 1
        self.counts["agent_kills"] += len(self.agents)

    def stop_agent(self) -> None:
        """It hangs for a while."""
        pid = self._await_attached()
        victim = next(each for each in self.agents if each.pid == pid)
        victim.send_signal(signal.SIGSTOP)
        time.sleep(self.rng.uniform(0.005, 1.5))
        victim.send_signal(signal.SIGCONT)
        self.counts["agent_stops"] += 1

    def stop_hostd(self) -> None:
        """It hangs for 300 ms."""
        assert self.hostd is not None
        self.hostd.send_signal(signal.SIGSTOP)
        time.sleep(0.3)
        self.hostd.send_signal(signal.SIGCONT)
        self.counts["hostd_stops"] += 1

    def change_policies(self) -> None:
        """Another policy every 100 ms."""
        self._await_attached()
        for _ in range(5):
            policy, params = self.rng.choice(POLICIES)
            told = self.world.ask("set-policy", 30.0, policy=policy, params=params)
            self.counts["policy_changes"] += bool(told and told["ok"])
            time.sleep(0.1)

    def rage(self, agent_kills: int, hostd_kills: int, longest_s: float) -> None:
        """Until so many have been killed, or it was long enough."""
        counts, end = self.counts, time.monotonic() + longest_s
        while (counts["agent_kills"] < agent_kills or counts["hostd_kills"] < hostd_kills) and time.monotonic() < end:
            self.supervise()
            time.sleep(self.rng.expovariate(1 / 0.2))
            acts, weights = [self.stop_agent, self.stop_hostd, self.change_policies], [(agent_kills + hostd_kills) / 25] * 3
            if counts["agent_kills"] < agent_kills:
                acts.append(self.kill_agent)
                weights.append(agent_kills)
            if counts["hostd_kills"] < hostd_kills:
                acts += [self.kill_hostd, self.kill_both]
                weights += [hostd_kills, hostd_kills / 5]
            self.rng.choices(acts, weights)[0]()
            self.check()

    def subside(self) -> None:
        """A last agent runs the members on; then hostd is stopped, all is as it was, and every worker finishes its work."""
        self.supervise()
        self._await_attached()
        marks = [self.world.word(each, COUNT) for each in self.world.workers]
        until(lambda: all(self.world.word(w, COUNT) > m + 3 for w, m in zip(self.world.workers, marks, strict=True)) or self.watch.stuck, "all go on")
        self.status = self.world.ask("status") or {}
        self.check()
        assert self.hostd is not None
        self._kill(self.hostd, signal.SIGTERM)
        self.hostd.wait(30)
        if self.hostd.returncode:
            raise Broken(f"hostd ended with {self.hostd.returncode}: {self.world.log('hostd.log')[-2_000:]}")
        if changed := self.changed():
            raise Broken(f"after hostd's end: {'; '.join(changed)}")
        for agent in self.agents:
            self._kill(agent)
            agent.wait()
        self.world.over = True
        self.world.words[0] = 1
        for worker in self.world.workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(30)
            if worker.process.poll() != 0:
                raise Broken(f"{worker.name} did not finish its work: {worker.process.poll()}")
        until(lambda: not self.world.left() or None, f"nothing is left: {self.world.left()}", 10)


def figures(storm: Storm) -> dict[str, Any]:
    """What is told at the end."""
    told: dict[str, Any] = dict(storm.counts)
    for name, values in storm.gaps.items():
        if values:
            told[f"pause_{name}_ms"] = {"n": len(values), "p50": round(statistics.median(values), 2), "max": round(max(values), 2)}
    told["over_ms"] = storm.over_ms
    told["longest_standstill_ms"] = {kind: round(ms) for kind, ms in storm.watch.longest_ms.items()}
    told["steps"] = {each.name: storm.world.word(each, COUNT) for each in storm.world.workers}
    counters = storm.status.get("counters", {})
    told["last_hostd"] = {
        key: counters.get(key) for key in ("messages", "decisions", "overflow", "strays", "deviations", "acts", "fallbacks", "outcomes", "outside")
    }
    return told


def main() -> int:
    """Exit status: 0 as it should be, 1 a claim broke."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agent-kills", type=int, default=200)
    parser.add_argument("--hostd-kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--longest-s", type=float, default=3_600.0, help="end after that time, however many were killed")
    parser.add_argument("--quick", action="store_true", help="8 and 3, half a minute at most: for CI")
    told = parser.parse_args()
    if told.quick:
        told.agent_kills, told.hostd_kills, told.longest_s = 8, 3, 30.0
    seed = told.seed if told.seed is not None else random.SystemRandom().randrange(1 << 31)
    if reason := why_not():
        print(f"chaos: not here: {reason}", file=sys.stderr)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all is put back then, too
    print(f"chaos: seed {seed}, {told.agent_kills} kills of agentd, {told.hostd_kills} of hostd", file=sys.stderr)
    began = time.monotonic()
    objects, shared = bpf_objects(), set(os.listdir("/dev/shm"))
    world = World()
    storm: Storm | None = None
    try:
        storm = Storm(world, random.Random(seed))
        storm.rage(told.agent_kills, told.hostd_kills, told.longest_s)
        storm.subside()
        until(lambda: not bpf_objects() - objects or None, f"BPF objects go: {sorted(bpf_objects() - objects)}", 20)
        if left := {name for name in set(os.listdir("/dev/shm")) - shared if world.name in name}:
            raise Broken(f"shared memory is left: {left}")
        result = {"seed": seed, "seconds": round(time.monotonic() - began), **figures(storm), "left_behind": 0}
        print(json.dumps(result, indent=1))
        if storm.over_ms:
            line = f"chaos: after {len(storm.over_ms)} of {storm.counts['attached_kills']} kills of an agent a member waited longer than {FALLBACK_MS:g} ms"
            print(line + (": on a busy machine that may be" if told.quick else ""), file=sys.stderr)
        return 1 if storm.over_ms and not told.quick else 0
    except (Broken, AssertionError) as error:
        counts = storm.counts if storm else {}
        print(f"chaos: BROKEN after {time.monotonic() - began:.0f} s (seed {seed}): {error}\n{counts}", file=sys.stderr)
        return 1
    finally:
        world.close()


if __name__ == "__main__":
    sys.exit(main())
