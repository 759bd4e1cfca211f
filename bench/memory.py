"""Memory: what finding cold pages saves and costs, in the model, in the policy's own code, and on this machine.

`model_*` and `safeguard_*` figures are of virtual time; `policy_*`, `numpy_*` and `iteration_*` are CPU time of the policy's step, measured; `live_*` are
measured on a real RocksDB, and are there where zram, root and the kernel allow. `published_*` are others' results on other systems, beside, not matched.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from waveos.bench import memory_live, memory_model, memory_safeguards, memory_step
from waveos.bench.machine import describe_machine
from waveos.errors import ConfigError, MissingError
from waveos.names import nearest

PARTS = ("step", "model", "safeguards", "live")
OPTIONS = {
    "quick": (False, "a small copy in some 100 s: less of the model, and live a quarter of the memory with all times a quarter, side by side only"),
    "parts": (",".join(PARTS), "which parts, with commas between"),
    "gib": (256.0, "size of the modelled process"),
    "duration_s": (192.0, "virtual seconds that count"),
    "batches": (1_048_576, "batches of the measured step: 256 GiB in batches of 256 KiB"),
    "rounds": (5, "rounds of the measured step; figures are medians"),
    "seed": (1, "seed of everything random"),
    "live_gib": (2.0, "size of the real database's cache"),
    "live_policies": (",".join(memory_live.RUNS), "what is run live, with commas between"),
    "live_sets": ("", "the hot set: contiguous, scrambled, or both with a comma between  [default: both; of a small copy the first]"),
    "live_repeats": (1, "runs of each; figures are their medians"),
    "live_out": ("", "write all that was seen live to this file; wave report FILE makes a page of it"),
}


def run(
    quick: bool = False,
    parts: str = ",".join(PARTS),
    gib: float = 256.0,
    duration_s: float = 192.0,
    batches: int = 1_048_576,
    rounds: int = 5,
    seed: int = 1,
    live_gib: float = 2.0,
    live_policies: str = ",".join(memory_live.RUNS),
    live_sets: str = "",
    live_repeats: int = 1,
    live_out: str = "",
) -> dict[str, Any]:
    """The bench's object."""
    wanted = parts.split(",")
    for part in wanted:
        if part not in PARTS:
            raise ConfigError(f"--parts: no part {part!r}{nearest(part, PARTS)}; there are: {', '.join(PARTS)}")
    if quick:
        gib, batches, rounds = min(gib, memory_model.SMALL_GIB), min(batches, 262_144), min(rounds, 3)
        live_sets = live_sets or memory_live.SETS[0]
    metrics: dict[str, float] = {}
    lines = []
    if "step" in wanted:
        metrics |= _measure_step(batches, rounds, seed)
        alike = "alike" if metrics["step_decisions_p"] > 0.01 else "NOT alike"
        times = metrics["policy_batches_per_s"] / metrics["numpy_batches_per_s"]
        lines.append(f"256 GiB iterated in {metrics['iteration_256gib_ms']:.1f} ms, {times:.0f} times NumPy's speed, decisions {alike}")
    if "model" in wanted:
        modelled, said = memory_model.measure(gib, duration_s, seed, quick)
        metrics |= modelled
        lines += said
    if "safeguards" in wanted:
        guarded = memory_safeguards.measure()
        metrics |= guarded
        lines.append(memory_safeguards.judge(guarded))
    if "live" in wanted:
        plan = memory_live.QUICK if quick else memory_live.Plan(gib=live_gib)
        try:
            sets = live_sets.split(",") if live_sets else memory_live.SETS
            measured = memory_live.measure(plan, live_policies.split(","), sets, live_repeats, Path(live_out) if live_out else None)
            metrics |= measured
            lines.append(memory_live.judge(measured))
        except MissingError as error:
            lines.append(f"not live: {error}")
    return {"name": "memory", "metrics": metrics, "machine": describe_machine(), "timing": "measured", "verdict": "; ".join(lines)}


def _measure_step(batches: int, rounds: int, seed: int) -> dict[str, float]:
    steps = memory_step.time_steps(batches, rounds, seed)
    per_256gib = 2**20 / batches
    return {
        "policy_batches_per_s": steps["policy_batches_per_s"],
        "numpy_batches_per_s": steps["numpy_batches_per_s"],
        "iteration_256gib_ms": steps["iteration_ms"] * per_256gib,
        "numpy_iteration_256gib_ms": steps["numpy_iteration_ms"] * per_256gib,
        "step_typical_due_share": steps["step_typical_due_share"],
        "step_decisions_p": steps["decisions_p"],
    }
