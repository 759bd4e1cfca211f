"""The live part of the demo: the same RocksDB requests under the kernel's default and under two policies by an agent, measured here, each beside what the
emulator says from costs that were measured one by one (bench/live_costs.py).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from waveos.bench import live, live_costs, live_prediction
from waveos.bench.live_schedulers import KERNEL, QUANTA_US, WAVE

LOAD_SHARE = 0.6
"""Of what the CPU could serve if it did nothing else."""
KEYS = ("throughput_per_s", "get_p50_us", "get_p99_us", "range_p50_us", "range_p99_us")
WORKERS = 64


@dataclass(frozen=True)
class Row:
    """One scheduler's figures, keys as in `KEYS`: medians over the rounds, or of the model."""

    scheduler: str
    timing: str  # measured | modelled
    figures: dict[str, float]


def run(seconds: float, rounds: int, seed: int = 1) -> dict[str, Any]:
    """All schedulers in turns. Returns rate_per_s, quanta_us, rows ([Row]), noisy_share (of the windows, see bench/live.py) and hostd_cpu_share.

    Ask `live.why_not()` first. Raises WaveError if hostd or its agent do not come up.
    """
    host_core, agent_core = sorted(os.sched_getaffinity(0))[:2]
    plan = live.Plan(seed, rounds, seconds, seconds, 0, 2, (), (), WORKERS, QUANTA_US, host_core, agent_core)
    with live.begin(plan) as bench:
        costs = live_costs.measure(bench.service, bench.watch, host_core, agent_core, seed)
        rate = LOAD_SHARE * costs.capacity_per_s
        windows: dict[str, list[Any]] = {name: [] for name in (KERNEL, *WAVE)}
        for number in range(rounds):
            for name, of in windows.items():
                of.append(bench.window(name, rate, seed + number))
        times = live.decision_times(bench.told["wave"], seed)
        rtt_ns = times.get("decision_rtt_p50_ns", 0.0)
        enforced = {name: live.enforcement(name, bench.told[name], rtt_ns, QUANTA_US[name]) for name in WAVE}
        spent = [live.hostd_share(bench.told[name]) for name in WAVE]
    rows = []
    for name in windows:
        scheduler, by = f"{WAVE[name]} by Wave" if name in WAVE else "the kernel's default", enforced.get(name)
        measured = live.medians(windows[name])
        rows.append(Row(scheduler, "measured", {key: getattr(measured, key) for key in KEYS}))
        rows.append(Row(scheduler, "modelled", live_prediction.predict_rounds(costs, by, rate, WORKERS, range(seed, seed + rounds), seconds)))
    noisy = sum(bench.noisy) / len(bench.noisy)
    return {
        "rate_per_s": rate,
        "quanta_us": {WAVE[name]: value for name, value in QUANTA_US.items()},
        "rows": rows,
        "noisy_share": noisy,
        "hostd_cpu_share": max(spent),
        **times,
    }
