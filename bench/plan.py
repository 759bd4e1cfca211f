"""`wave plan` on the demo's scenario: how long it takes, and whether a direct sweep finds the same break-even.

The plan bisects the speed of an IPU core at the load that the host sustains. Here the question is asked the other way round, and with the scenario's full
number of seeds: for each speed of a grid the saturation is searched, as `wave sweep --grid agent.speed=...` does, and where the line through them crosses the
saturation with the agent on the host, there the policy breaks even.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

from waveos.bench.machine import describe_machine
from waveos.cli.running import gather_inputs
from waveos.cli.terminal import talk
from waveos.errors import ConfigError
from waveos.ipu_emulator.plan import Plan
from waveos.ipu_emulator.pool import Pool
from waveos.ipu_emulator.sweep import FACTORY, PointJob
from waveos.report.plan import verdict
from waveos.scenario import load_scenario

OPTIONS = {
    "scenario": ("rocksdb", "the scenario in question, of sched"),
    "policy": ("", "the policy in question; by default the scenario's last"),
    "speeds": (9, "speeds of the direct sweep, from half to twice the plan's answer"),
    "settings": ("", "settings over the scenario's keys, as run.duration_ms=100;run.replications=2"),
}


def run(scenario: str = "rocksdb", policy: str = "", speeds: int = 9, settings: str = "") -> dict[str, Any]:
    """Plan, then sweep; metrics and a verdict on how far they lie apart."""
    if speeds < 3:
        raise ConfigError(f"speeds {speeds}: a line that crosses another needs at least 3")
    over: list[Any] = [each for each in settings.split(";") if each]
    if policy:
        over.append(("policies.names", [policy], "--policy"))
    loaded = load_scenario(scenario, over)
    if loaded.subsystem != "sched":
        raise ConfigError(f"scenario {scenario}: is one of {loaded.subsystem}; a plan is for sched")
    name = loaded.policies.names[-1]
    chosen = loaded.model_copy(update={"policies": loaded.policies.model_copy(update={"names": [name], "ablation": ""})})
    begin = time.monotonic()
    with Pool() as pool:
        inputs = gather_inputs(chosen, pool)
        plan = Plan(chosen, inputs, name)
        plan.run(pool)
        results = plan.results()
    plan_s = time.monotonic() - begin
    said = verdict(results)
    talk(said["headline"])
    metrics: dict[str, Any] = {"plan_s": plan_s, "plan_runs": results["runs"]}
    answer = results.get("breakeven_speed")
    if not answer:
        told = "the plan finds no break-even within its bounds, so there is nothing to compare"
        return {"name": "plan", "timing": "modelled", "machine": describe_machine(), "metrics": metrics, "verdict": told}
    begin = time.monotonic()
    grid = [float(f"{answer * 2 ** (2 * step / (speeds - 1) - 1):.3g}") for step in range(speeds)]
    host, sustained = _sweep(chosen, inputs, grid)
    swept = crossing(grid, sustained, host)
    apart = abs(answer / swept - 1) if swept else math.nan
    metrics |= {
        "gain_share": results["gain_share"],
        "cores_freed": results["cores_freed"],
        "breakeven_speed": answer,
        "breakeven_by_sweep": swept or math.nan,
        "difference_share": apart,
        "host_per_s": host,
        "sweep_s": time.monotonic() - begin,
        **{f"sustained_at_{speed:g}": load for speed, load in zip(grid, sustained, strict=True)},
    }
    told = "the sweep crosses nowhere, so there is nothing to compare"
    if swept:
        told = f"breaks even at {answer:.3g} of a host core's speed by the plan, at {swept:.3g} by the sweep: {apart:.1%} apart"
    return {
        "name": "plan",
        "timing": "modelled",
        "machine": describe_machine(),
        "metrics": metrics,
        "verdict": f"{told}; the plan took {plan_s:.0f} s for {results['runs']} runs",
    }


def crossing(speeds: Sequence[float], sustained: Sequence[float], level: float) -> float:
    """The speed at which the line through (log speed, load) first rises to `level`; 0 if it does nowhere."""
    points = list(zip(speeds, sustained, strict=True))
    for (slow, less), (fast, more) in pairwise(points):
        if less < level <= more:
            share = (level - less) / (more - less)
            return math.exp(math.log(slow) + share * (math.log(fast) - math.log(slow)))
    return 0.0


def _sweep(scenario: Any, inputs: Any, grid: Sequence[float]) -> tuple[float, list[float]]:
    """Saturation with the agent on the same machine's host, and offloaded at each speed, requests/s; the scenario's seeds, as a sweep's points are run."""
    with Pool(factory=FACTORY) as pool:
        jobs = {}
        for speed in grid:
            at = scenario.model_copy(update={"agent": scenario.agent.model_copy(update={"speed": speed})})
            jobs[pool.submit(PointJob(f"agent.speed={speed:g}", at, inputs, "offload", saturation=True))] = speed
        on_host = pool.submit(PointJob("on-host", scenario, inputs, "on-host", saturation=True))
        found = dict(pool.finished())
    host = next(row["saturation_per_s"] for row in found[on_host] if row["column"] == "same machine")
    return float(host), [fmean(row["saturation_per_s"] for row in found[number]) for number in jobs]
