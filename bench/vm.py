"""Virtual machines: what they gain when the host's ticks are switched off, taken apart into ticks, sleep and turbo; and that core scheduling held.

`vm_gain_*` are of the scenario `vm`, offloaded, on the named part; `published_vm_gain_max` is the Wave paper's, on another machine under a load that is
not known, and nothing is fitted to it. `_nohz_idle`: next to a host whose ticks come to busy CPUs alone, Linux's default.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from waveos.bench.machine import describe_machine
from waveos.ipu_emulator.vm import simulate
from waveos.ipu_emulator.vm.experiment import gains, setup_of
from waveos.ipu_emulator.vm.part import load_assumptions
from waveos.scenario import load_scenario
from waveos.sched.tenants import shared

OPTIONS = {
    "seed": (1, "of what the guests do"),
    "part": ("xeon-8468v", "the server part"),
    "duration_ms": (400.0, "virtual milliseconds that count in each run"),
    "quick": (False, "two shares of busy machines, 100 ms each"),
}
QUICK_SHARES, QUICK_MS = [0.1, 1.0], 100.0


def run(seed: int = 1, part: str = "xeon-8468v", duration_ms: float = 400.0, quick: bool = False) -> dict[str, Any]:
    """The bench's object. Raises ConfigError for a part that there is not."""
    scenario = load_scenario("vm", [f"run.seed={seed}", ("vm.part", part, "--part")])
    shares, length_ms = (QUICK_SHARES, min(duration_ms, QUICK_MS)) if quick else (scenario.vm.busy_shares, duration_ms)
    periodic = gains(scenario=scenario, busy_shares=shares, duration_ms=length_ms)
    kernel_like = scenario.model_copy(update={"vm": scenario.vm.model_copy(update={"ticks": "nohz_idle"})})
    nohz = gains(scenario=kernel_like, busy_shares=shares, duration_ms=length_ms)
    held, runs = _prove_core_scheduling(scenario, length_ms)
    published = load_assumptions().gain_max
    metrics = {
        **periodic,
        "vm_gain_max_nohz_idle": nohz["vm_gain_max"],
        "coscheduling_violations": held,
        "coscheduling_runs_checked": runs,
        "published_vm_gain_max": published,
    }
    verdict = (
        f"up to {metrics['vm_gain_max']:+.1%} without ticks (published: up to {published:+.1%}); {metrics['vm_gain_max_nohz_idle']:+.1%} next to ticks on busy "
        f"CPUs alone; core scheduling {'held' if not held else 'was BROKEN'} over {runs:,} runs of vCPUs"
    )
    return {"name": "vm", "metrics": metrics, "machine": describe_machine(), "timing": "modelled", "verdict": verdict}


def _prove_core_scheduling(scenario: Any, duration_ms: float) -> tuple[int, int]:
    """(times that two tenants shared a core, runs of vCPUs looked at) with twice as many vCPUs as CPUs, all busy."""
    setup = setup_of(scenario, "vm_coscheduling", "offload")
    crowded = replace(setup, machines=2 * setup.machines, busy_share=1.0, ticks="off", duration_ns=round(duration_ms * 1e6), trace=True)
    trace = simulate(crowded).trace
    found = shared(trace, lambda cpu: cpu % crowded.cores, lambda tid: tid // crowded.vcpus)
    return len(found), len(trace) // 2
