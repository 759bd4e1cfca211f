"""Memory: what finding cold pages saves and costs, in the model, in the policy's own code, and on this machine.

`model_*` figures are of virtual time; `policy_*`, `numpy_*` and `iteration_*` are CPU time of the policy's step, measured; `live_*` are measured on a real
RocksDB, and are there where zram, root and the kernel allow. `published_*` are others' results on other systems, beside, not matched.
"""

from __future__ import annotations

from typing import Any

from waveos.bench import memory_live, memory_model, memory_step
from waveos.bench.machine import describe_machine
from waveos.errors import MissingError

OPTIONS = {
    "gib": (256.0, "size of the modelled process"),
    "duration_s": (192.0, "virtual seconds that count"),
    "batches": (1_048_576, "batches of the measured step: 256 GiB in batches of 256 KiB"),
    "rounds": (5, "rounds of the measured step; figures are medians"),
    "seed": (1, "seed of everything random"),
    "live": (True, "with the live part, where this machine can: root, zram, cgroup version 1"),
    "live_gib": (2.0, "size of the real database"),
    "live_base_s": (12.0, "seconds without a policy at the beginning of each live run, which its throughput is compared with"),
    "live_count_s": (60.0, "seconds that count in each live run: a whole period of the hot set, which moves every 60 s"),
}


def run(
    gib: float = 256.0,
    duration_s: float = 192.0,
    batches: int = 1_048_576,
    rounds: int = 5,
    seed: int = 1,
    live: bool = True,
    live_gib: float = 2.0,
    live_base_s: float = 12.0,
    live_count_s: float = 60.0,
) -> dict[str, Any]:
    """The bench's object."""
    steps = memory_step.time_steps(batches, rounds, seed)
    modelled, lines = memory_model.measure(gib, duration_s, seed)
    per_256gib = 2**20 / batches
    metrics = {
        **modelled,
        "policy_batches_per_s": steps["policy_batches_per_s"],
        "numpy_batches_per_s": steps["numpy_batches_per_s"],
        "iteration_256gib_ms": steps["iteration_ms"] * per_256gib,
        "numpy_iteration_256gib_ms": steps["numpy_iteration_ms"] * per_256gib,
        "step_typical_due_share": steps["step_typical_due_share"],
        "step_decisions_p": steps["decisions_p"],
    }
    alike = "alike" if steps["decisions_p"] > 0.01 else "NOT alike"
    lines.insert(
        0,
        f"256 GiB iterated in {metrics['iteration_256gib_ms']:.1f} ms, {steps['policy_batches_per_s'] / steps['numpy_batches_per_s']:.0f} times NumPy's speed, "
        f"decisions {alike}",
    )
    if live:
        try:
            measured, said = memory_live.measure(live_gib, live_base_s, live_count_s)
            metrics |= measured
            lines += said
        except MissingError as error:
            lines.append(f"not live: {error}")
    return {"name": "memory", "metrics": metrics, "machine": describe_machine(), "timing": "measured", "verdict": "; ".join(lines)}
