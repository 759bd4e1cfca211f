"""The physical cores of one socket: which of their CPUs are busy, how deep the others sleep, and how fast that lets work go.

A core sleeps as deep as the shallower of its two CPUs. A CPU that falls idle picks a state as Linux's menu governor does: the deepest whose target
residency fits the stay that recent ones let expect, and the time to the next tick, if ticks wake it. All cores that are awake run at one frequency:
the lower of the turbo limit for the number of active cores and of what the power budget allows (`Part`). The frequency falls at once when a core wakes,
and rises when power control next looks, half its interval later on average.

Ticks come to all CPUs at the same moment, Linux's default (`skew_tick=0`): for the share of time in which they keep sleeping cores awake, all count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from waveos.ipu_emulator.vm.part import Part

Ticks = Literal["periodic", "nohz_idle", "off"]
Held = Literal["sleep", "turbo"]
PREDICTED_NS = 10_000_000.0
"""What a CPU that has not slept yet expects."""
WEIGHT = 0.25
"""Of the newest stay in what is expected of the next."""


@dataclass(frozen=True)
class Tick:
    """The host's timer tick: on whom, how often, and what one takes of a CPU that runs a vCPU and of one that sleeps."""

    ticks: Ticks
    period_ns: int
    busy_ns: float
    idle_ns: float


class Cores:
    """CPUs c and c + n of n cores are siblings. CPUs outside `n` that are always awake (the host's own core) are in `others`.

    `held`: effects that stay as they are with periodic ticks although there are none: how deep cores sleep, how many count for the turbo bins.
    """

    def __init__(self, part: Part, n: int, others: int, tick: Tick, memory_share: float, held: frozenset[Held] = frozenset()) -> None:
        self.part, self.n, self.tick, self.memory_share = part, n, tick, memory_share
        self.idle_depth = [0] * (2 * n)  # of a CPU: 0 busy, 1 shallow, 2 deep
        self.ticked_depth = [0] * (2 * n)  # the same if periodic ticks woke it
        self.since_ns = [0] * (2 * n)
        self.predicted_ns = [PREDICTED_NS] * (2 * n)
        self.recent = [False] * n  # asleep, but power control has not seen it yet
        self.stay = [0] * n  # of a core: which of its stays this is
        self.wakes = tick.ticks == "periodic"
        self.sleeps_ticked = self.wakes or "sleep" in held
        self.turbo_ticked = self.wakes or "turbo" in held
        self._others = others
        self._speeds: dict[tuple[int, ...], tuple[float, float]] = {}
        # How many cores are awake, shallow, deep; and deep but not seen yet: as they sleep, and as they would if ticks woke them.
        self.real, self.ticked = [n, 0, 0, 0], [n, 0, 0, 0]
        self.mhz, self.speed = self._frequency()

    def sibling(self, cpu: int) -> int:
        """The other CPU of the core."""
        return cpu + self.n if cpu < self.n else cpu - self.n

    def share(self, cpu: int, other_runs: bool) -> float:
        """How fast a thread on `cpu` goes beside its sibling, next to one alone on the core; ticks taken off."""
        tick = self.tick
        contended = (1 + self.part.assumed.smt_gain) / 2
        share = contended if other_runs else 1.0
        if tick.ticks == "off":
            return share
        share *= 1 - tick.busy_ns / tick.period_ns
        if tick.ticks == "periodic" and not other_runs:
            share *= 1 - (1 - contended) * tick.idle_ns / tick.period_ns
        return share

    def fall_idle(self, cpu: int, now_ns: int) -> bool:
        """The CPU has nothing to run. True if its core now sleeps deep: `settle` is to be called when power control has seen it."""
        self.since_ns[cpu] = now_ns
        expected = self.predicted_ns[cpu]
        ticked = self._depth(min(expected, self.tick.period_ns)) if self.tick.period_ns else self._depth(expected)
        return self._set(cpu, ticked if self.sleeps_ticked else self._depth(expected), ticked)

    def wake(self, cpu: int, now_ns: int) -> int:
        """The CPU is woken. Returns how long that takes, ns."""
        depth = self._core_depth(self.idle_depth, cpu)
        stayed = now_ns - self.since_ns[cpu]
        self.predicted_ns[cpu] += WEIGHT * (stayed - self.predicted_ns[cpu])
        self._set(cpu, 0, 0)
        if depth == 0:
            return 0
        return self.part.exit_ns(self.part.deep if depth == 2 else self.part.shallow)

    def settle(self, core: int, stay: int) -> bool:
        """Power control looks at a core that fell asleep. True if it had not been woken since, so that the frequency may change."""
        if self.stay[core] != stay or not self.recent[core]:
            return False
        self._count(core, -1)
        self.recent[core] = False
        self._count(core, +1)
        self.mhz, self.speed = self._frequency()
        return True

    @property
    def control_ns(self) -> int:
        """How long a core that fell asleep still counts as active, on average."""
        return round(self.part.assumed.control_us * 1_000 / 2)

    def _depth(self, expected_ns: float) -> int:
        return 2 if expected_ns >= self.part.deep.residency_us * 1_000 else 1

    def _core_depth(self, depths: list[int], cpu: int) -> int:
        return min(depths[cpu], depths[self.sibling(cpu)])

    def _set(self, cpu: int, depth: int, ticked: int) -> bool:
        core = cpu % self.n
        self._count(core, -1)
        before = self._core_depth(self.idle_depth, cpu)
        self.idle_depth[cpu], self.ticked_depth[cpu] = depth, ticked
        after = self._core_depth(self.idle_depth, cpu)
        if after != before:
            self.stay[core] += 1
            self.recent[core] = after == 2
        self._count(core, +1)
        self.mhz, self.speed = self._frequency()
        return after == 2 and before != 2

    def _count(self, core: int, by: int) -> None:
        for counts, depths in ((self.real, self.idle_depth), (self.ticked, self.ticked_depth)):
            depth = self._core_depth(depths, core)
            counts[depth] += by
            if depth == 2 and self.recent[core]:
                counts[3] += by

    def _frequency(self) -> tuple[float, float]:
        """(MHz, speed of work next to that at base frequency), as the cores are now."""
        key = (*self.real, *self.ticked)
        if key not in self._speeds:
            self._speeds[key] = self._compute()
        return self._speeds[key]

    def _compute(self) -> tuple[float, float]:
        part, tick = self.part, self.tick
        woken_ns = part.exit_ns(part.deep) + tick.idle_ns if tick.period_ns else 0.0
        sleep = self.ticked if self.sleeps_ticked else self.real
        power = part.power_mhz(
            sleep[0] + self._others, sleep[1], sleep[2], min(1.0, woken_ns / tick.period_ns) if self.sleeps_ticked and tick.period_ns else 0.0
        )
        turbo = self.ticked if self.turbo_ticked else self.real
        asleep = turbo[2] - turbo[3]
        active = turbo[0] + turbo[1] + turbo[3] + self._others
        ceiling = part.ceiling_mhz(active)
        if self.turbo_ticked and tick.period_ns:
            awake_share = min(1.0, (woken_ns + self.control_ns) / tick.period_ns)
            ceiling += awake_share * (part.ceiling_mhz(active + asleep) - ceiling)
        mhz = min(ceiling, power)
        base = part.published.base_mhz
        return mhz, 1 / (self.memory_share + (1 - self.memory_share) * base / mhz)
