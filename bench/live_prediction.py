"""What the emulator says of the live benchmark, from the costs that were measured one by one.

The requests are those of the live window of that seed, and late as those were that came apart, one after another: the client's core has its slow moments, too.
Service times are drawn from the measured ones, less the switch, which the engine charges itself.

The machine's slow moments are in no cost but the pace. The engine's time is the CPU's progress, in ns at its usual speed: a request comes when the CPU would
have got so far, and at the end each time is put back into the wall's. So in a slow moment all is slow that the CPU does; the kernel's slices and the policy's
quanta as well, which in fact are not. What the watch would have told is left out, as in the live window.

The kernel's column is `ipu_emulator/sched/eevdf.py` with the kernel's slice and tick.

Wave's column is the policy itself, run by the engine where things happen, as the kernel keeps the enclave's order between two decisions. What comes from
outside takes effect later and costs the host: a quantum is longer by a decision's way and hostd's work, and a RANGE by that work each time it is cut, or, where
the policy demotes it, by that of lowering it and raising it again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
from numpy.typing import NDArray

from waveos.bench.live_costs import APART_NS, Costs
from waveos.bench.live_watch import PERIOD_NS, find_slow
from waveos.bench.live_window import Usage, look_back
from waveos.host import rocksdb
from waveos.host.service import Served, draw_load
from waveos.ipu_emulator.profile import HostProfile, load_host
from waveos.ipu_emulator.sched import RequestClass, Service, Setup, eevdf, simulate
from waveos.ipu_emulator.sched.machine import REQUEST

OVERLOAD = 1.3
RANGE_SHARE = 0.005
CLASSES = ("GET", "RANGE")
NOTHING = Usage(0, 0, 0.0, 0.0)


def host_profile(costs: Costs) -> HostProfile:
    """The host CPU. What the service times hold (system calls, blocking) is not charged again."""
    assumed = load_host("server")
    return HostProfile(
        name="live",
        verified=True,
        source=f"bench/live_costs.py; assumed: waking by the client {assumed.wake_ns} ns, a tick {assumed.tick_ns} ns, as in 'server'",
        entry_ns=0,
        switch_ns=round(costs.switch_ns),
        wake_ns=assumed.wake_ns,
        pick_ns=0,
        ipi_wire_ns=max(0, round(costs.wake_ns - costs.interrupt_ns)),
        interrupt_ns=round(costs.interrupt_ns),
        resume_ns=round(costs.resume_ns),
        tick_period_us=costs.tick_ns // 1_000,
        tick_ns=assumed.tick_ns,
        cold_ns=costs.cold_ns,
    )


@dataclass(frozen=True)
class Enforcement:
    """How a preemption by Wave gets done: ns from the moment it is due until hostd has the CPU, and ns that hostd has it before the thread is off it; and the
    policy with its quantum."""

    policy: str
    delay_ns: float
    cpu_ns: float
    quantum_us: float

    @property
    def quantum_ns(self) -> float:
        """The quantum as it comes out."""
        return self.quantum_us * 1_000 + self.delay_ns + self.cpu_ns


def services_of(costs: Costs, wave: Enforcement | None) -> list[NDArray[np.int64]]:
    """What GETs take, and what RANGEs take, ns: to draw from."""
    if wave is None:
        samples = [costs.get_ns, costs.range_ns]
    else:
        cuts = np.floor(costs.wave_range_ns / wave.quantum_ns)
        acts = 2 * (cuts > 0) if wave.policy == "mlfq" else cuts
        samples = [costs.wave_get_ns, (costs.wave_range_ns + acts * wave.cpu_ns).astype(np.int64)]
    return [np.maximum(1, each - round(costs.switch_ns)) for each in samples]


def setup_for(costs: Costs, wave: Enforcement | None, rate_per_s: float, workers: int, seed: int, seconds: float) -> Setup:
    """The kernel's default on this machine under a Poisson load, or Wave."""
    if wave is None:
        policy, params = f"{eevdf.__file__}:Eevdf", {"slice_us": costs.slice_ns / 1_000, "tick_us": costs.tick_ns / 1_000}
    else:
        policy, params = wave.policy, {"quantum_us": wave.quantum_ns / 1_000}
    shares = (1 - RANGE_SHARE, RANGE_SHARE)
    return Setup(
        policy=policy,
        params=params,
        load_per_s=rate_per_s,
        classes=tuple(
            RequestClass(name, Service("samples", samples=samples), share=share)
            for name, samples, share in zip(CLASSES, services_of(costs, wave), shares, strict=True)
        ),
        placement="kernel",
        workers=1,
        threads=workers,
        seed=seed,
        duration_ns=round(seconds * 1e9),
        host=host_profile(costs),
    )


def predict(costs: Costs, wave: Enforcement | None, rate_per_s: float, workers: int, seed: int, seconds: float = 4.0) -> dict[str, float]:
    """Keys of a Window: throughput_per_s, get_p50_us, get_p99_us, range_p50_us, range_p99_us. `wave` None: of the kernel's default."""
    random = np.random.default_rng(seed)
    load = draw_load(rate_per_s, round(seconds * 1e9), RANGE_SHARE, rocksdb.ENTRIES, rocksdb.RANGE_ENTRIES, seed)
    is_range, number = load.keys < 0, np.arange(len(load.at_ns))
    late_ns, pace = (np.roll(each, random.integers(len(each))) for each in (costs.late_ns, costs.pace_ns))
    cpu = Pace(pace)
    sent_ns = np.maximum.accumulate(load.at_ns + late_ns[load.at_ns // APART_NS % len(late_ns)])
    arrivals = np.zeros(len(number), REQUEST)
    arrivals["arrival_ns"] = np.maximum.accumulate(cpu.progress(sent_ns) - number) + number  # no two at once, so that each is known by it
    arrivals["number"], arrivals["request_class"] = number, is_range
    for of, services in zip((~is_range, is_range), services_of(costs, wave), strict=True):
        arrivals["service_ns"][of] = random.choice(services, of.sum())
    setup = setup_for(costs, wave, rate_per_s, workers, seed, seconds)
    samples = simulate(replace(setup, arrivals=arrivals, samples=len(arrivals))).samples
    assert samples is not None
    done_ns = np.zeros(len(number), np.int64)
    done_ns[np.searchsorted(arrivals["arrival_ns"], samples["arrival_ns"])] = cpu.time(samples["arrival_ns"] + samples["sojourn_ns"])
    served = Served(is_range, load.at_ns, sent_ns, done_ns)
    window = look_back(served, NOTHING, NOTHING, cpu.slow(int(done_ns.max())))
    return {key: getattr(window, key) for key in ("throughput_per_s", "get_p50_us", "get_p99_us", "range_p50_us", "range_p99_us")}


def predict_rounds(costs: Costs, wave: Enforcement | None, rate_per_s: float, workers: int, seeds: Iterable[int], seconds: float) -> dict[str, float]:
    """The medians over several windows, as what is measured."""
    windows = [predict(costs, wave, rate_per_s, workers, seed, seconds) for seed in seeds]
    return {key: median(each[key] for each in windows) for key in windows[0]}


def saturation(costs: Costs, wave: Enforcement | None, workers: int, seed: int) -> float:
    """What the emulated CPU gets done under a third too much load: the highest load at which it keeps up."""
    usual = simulate(replace(setup_for(costs, wave, OVERLOAD * costs.capacity_per_s, workers, seed, 1.0), warmup_ns=100_000_000)).throughput_per_s
    return usual * float(np.median(costs.pace_ns) / costs.pace_ns.mean())


class Pace:
    """How far the CPU has come at a time, in ns at its usual speed, and back: `pieces_ns`, the times of equal pieces of work, over and over."""

    def __init__(self, pieces_ns: NDArray[np.int64]) -> None:
        self._ends_ns = np.concatenate([[0], np.cumsum(pieces_ns)])
        self._usual_ns = float(np.median(pieces_ns))

    def progress(self, at_ns: NDArray[np.int64]) -> NDArray[np.int64]:
        """Of times."""
        turns, rest_ns = np.divmod(at_ns, self._ends_ns[-1])
        pieces = np.interp(rest_ns, self._ends_ns, np.arange(len(self._ends_ns)))
        return ((turns * (len(self._ends_ns) - 1) + pieces) * self._usual_ns).astype(np.int64)

    def time(self, progress_ns: NDArray[np.int64]) -> NDArray[np.int64]:
        """Of progress."""
        turns, pieces = np.divmod(progress_ns / self._usual_ns, len(self._ends_ns) - 1)
        return (turns * self._ends_ns[-1] + np.interp(pieces, np.arange(len(self._ends_ns)), self._ends_ns)).astype(np.int64)

    def slow(self, until_ns: int) -> NDArray[np.int64]:
        """When the CPU was slow, as the watch would have told: see `Watch.slow`."""
        pieces = np.diff(self._ends_ns)
        at = np.searchsorted(self._ends_ns[:-1], np.arange(0, self._ends_ns[-1], PERIOD_NS))
        at = at[at < len(pieces)]
        turns = np.arange(until_ns // self._ends_ns[-1] + 1)[:, None] * self._ends_ns[-1]
        begun_ns, took_ns = (self._ends_ns[at] + turns).reshape(-1), np.tile(pieces[at], len(turns))
        return find_slow(np.column_stack([begun_ns, took_ns]), 0, until_ns)
