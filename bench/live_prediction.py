"""What the emulator says of the live benchmark, from the costs that were measured one by one.

The kernel's column is `ipu_emulator/sched/eevdf.py` with the kernel's slice and tick; service times are drawn from the measured ones, less the switch,
which the engine charges itself. The client's lateness is drawn from what was measured and added: it delays a request, and uses none of the host's time.

Wave's column is the policy itself, run by the engine where things happen, as the kernel keeps the enclave's order between two decisions. What comes from
outside takes effect later and costs the host: a quantum is longer by a decision's way and hostd's work, and a RANGE by that work each time it is cut, or, where
the policy demotes it, by that of lowering it and raising it again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from waveos.bench.live_costs import Costs
from waveos.bench.live_window import quantiles_us
from waveos.ipu_emulator.profile import HostProfile, load_host
from waveos.ipu_emulator.sched import RequestClass, Service, Setup, eevdf, simulate

OVERLOAD = 1.3
RANGE_SHARE = 0.005
CLASSES = ("GET", "RANGE")


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


def setup_for(costs: Costs, wave: Enforcement | None, rate_per_s: float, workers: int, seed: int, seconds: float) -> Setup:
    """The kernel's default on this machine under this load, or Wave."""
    if wave is None:
        samples = [costs.get_ns, costs.range_ns]
        policy, params = f"{eevdf.__file__}:Eevdf", {"slice_us": costs.slice_ns / 1_000, "tick_us": costs.tick_ns / 1_000}
    else:
        quantum_ns = wave.quantum_us * 1_000 + wave.delay_ns + wave.cpu_ns
        cuts = np.floor(costs.wave_range_ns / quantum_ns)
        acts = 2 * (cuts > 0) if wave.policy == "mlfq" else cuts
        samples = [costs.wave_get_ns, (costs.wave_range_ns + acts * wave.cpu_ns).astype(np.int64)]
        policy, params = wave.policy, {"quantum_us": quantum_ns / 1_000}
    services = [np.maximum(1, each - round(costs.switch_ns)) for each in samples]
    shares = (1 - RANGE_SHARE, RANGE_SHARE)
    return Setup(
        policy=policy,
        params=params,
        load_per_s=rate_per_s,
        classes=tuple(
            RequestClass(name, Service("samples", samples=samples), share=share)
            for name, samples, share in zip(CLASSES, services, shares, strict=True)
        ),
        placement="kernel",
        workers=1,
        threads=workers,
        seed=seed,
        duration_ns=round(seconds * 1e9),
        warmup_ns=round(seconds * 1e8),
        host=host_profile(costs),
        samples=round(1.2 * rate_per_s * seconds),
    )


def predict(costs: Costs, wave: Enforcement | None, rate_per_s: float, workers: int, seed: int, seconds: float = 4.0) -> dict[str, float]:
    """Keys of a Window: throughput_per_s, get_p50_us, get_p99_us, range_p50_us, range_p99_us. `wave` None: of the kernel's default."""
    result = simulate(setup_for(costs, wave, rate_per_s, workers, seed, seconds))
    assert result.samples is not None
    times = _with_lateness(result.samples, costs, seed)
    get, ranges = (quantiles_us(times[result.samples["request_class"] == k]) for k in range(2))
    return {
        "throughput_per_s": result.throughput_per_s,
        "get_p50_us": get[0],
        "get_p99_us": get[1],
        "range_p50_us": ranges[0],
        "range_p99_us": ranges[1],
    }


def _with_lateness(samples: Any, costs: Costs, seed: int) -> Any:
    return samples["sojourn_ns"] + np.random.default_rng(seed).choice(costs.late_ns, len(samples))


def saturation(costs: Costs, wave: Enforcement | None, workers: int, seed: int) -> float:
    """What the emulated CPU gets done under a third too much load: the highest load at which it keeps up."""
    return simulate(setup_for(costs, wave, OVERLOAD * costs.capacity_per_s, workers, seed, 1.0)).throughput_per_s
