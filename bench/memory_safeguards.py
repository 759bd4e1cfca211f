"""What SOL's safeguards do, in the model: a hot set that jumps, an adversarial access pattern, a model that predicts nonsense.

Each figure `*_stop_assessments` is how many assessments passed from the moment when it began to hurt, or when the actuator first acted on nonsense, until
the actuator was stopped (1: the next one stopped it); `*_throughput_after_epoch` is the throughput from one epoch after that moment on.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from waveos.ipu_emulator.memory import SECOND, Run, Setup, simulate
from waveos.ipu_emulator.memory.access import Access, Moving
from waveos.ipu_emulator.memory.machine import load_costs
from waveos.ipu_emulator.profile import load_link

BATCHES, HOT_SHARE = 2_048, 0.3
ASSESS_S, EPOCH_S = 2.4, 38.4
JUMP_S, HUNT_S, NONSENSE_S = 100.0, 60.0, 80.0


class Jumping(Moving):
    """The hot set stays where it is, and at JUMP_S it is another one, at once."""

    def __init__(self) -> None:
        super().__init__(BATCHES, HOT_SHARE, 60 * SECOND, 1e-4, False, 1)

    def _at(self, now_ns: int) -> Any:
        return super()._at(0 if now_ns < JUMP_S * SECOND else self.move_ns)


class Adversary(Moving):
    """From HUNT_S on it accesses just what has been reclaimed last: the hot set moves on every 12 s, to what has just become cold enough."""

    def __init__(self) -> None:
        super().__init__(BATCHES, HOT_SHARE, 12 * SECOND, 0.0, False, 1)

    def _at(self, now_ns: int) -> Any:
        return super()._at(now_ns if now_ns > HUNT_S * SECOND else 0)


NONSENSE = f"""
from waveos import memory
from waveos.agents.memory.sol import Sol


class Nonsense(Sol, subsystem=memory, name="nonsense", compiled=False):
    '''From {NONSENSE_S:g} s on it predicts the opposite of what it learned.'''

    def predict(self):
        cold = super().predict()
        return self.batches.live & ~cold if self.tick * self.tick_ms > {NONSENSE_S * 1e3:g} else cold
"""


UNGUARDED = """
    def assess_model(self):
        return ""

    def assess_performance(self):
        return ""
"""


def simulate_jump() -> Run:
    """A Sol whose hot set jumps."""
    return _run("sol", Jumping(), 210)


def simulate_adversary() -> Run:
    """A Sol that is hunted."""
    return _run("sol", Adversary(), 240)


def simulate_nonsense(guarded: bool = True) -> Run:
    """A Sol whose model turns to nonsense, and whose quota would let it do its worst: all that is hot, by a single worker."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "nonsense.py"
        path.write_text(NONSENSE if guarded else NONSENSE + UNGUARDED)
        access = Moving(BATCHES, HOT_SHARE, 0, 1e-4, False, 1)
        return _run(f"{path}:Nonsense", access, 220, workers=1, params={"quota_share_per_s": 1.0})


def measure(metrics: dict[str, float]) -> Iterator[str]:
    """The figures, into `metrics`; yields what is next."""
    acts_s = math.ceil(NONSENSE_S / ASSESS_S) * ASSESS_S
    for name, what, simulated, began_s in (
        ("jump", "the hot set jumps", simulate_jump, JUMP_S),
        ("adversary", "an adversary accesses what was reclaimed last", simulate_adversary, HUNT_S),
        ("nonsense", "the model predicts nonsense", simulate_nonsense, acts_s),
    ):
        yield what
        run = simulated()
        hurts_s = began_s if name == "nonsense" else first_hurt_s(run, began_s)
        metrics |= {
            f"safeguard_{name}_stop_assessments": assessments_to_stop(run, hurts_s),
            f"safeguard_{name}_least_throughput": min(ratio for at_s, ratio in _throughput(run) if at_s > began_s),
            f"safeguard_{name}_throughput_after_epoch": mean_throughput(run, hurts_s + EPOCH_S),
        }
    yield "the same without safeguards"
    unguarded = simulate_nonsense(guarded=False)
    metrics["safeguard_nonsense_unguarded_throughput"] = mean_throughput(unguarded, acts_s + EPOCH_S)


def judge(metrics: dict[str, float]) -> str:
    """The figures in a sentence."""
    stops = max(value for name, value in metrics.items() if name.endswith("_stop_assessments"))
    back = min(value for name, value in metrics.items() if name.endswith("_throughput_after_epoch"))
    works = "work" if stops <= 1 and back >= 0.95 else "do NOT work"
    return f"safeguards {works}: the actuator is stopped after {stops:g} assessment at most, throughput after an epoch is {back:.3f}"


def first_hurt_s(run: Run, began_s: float) -> float:
    """When throughput first falls by 5 % after `began_s`; that time itself if it never does."""
    return next((at_s for at_s, ratio in _throughput(run) if at_s > began_s and ratio < 0.95), began_s)


def assessments_to_stop(run: Run, hurts_s: float) -> float:
    """Assessments from the step in which it hurts to the first stop; infinite if there is none."""
    stopped_s = next((at_s for at_s, _ in run.stops if at_s > hurts_s - 0.3), math.inf)  # a step may end with the stop
    return float(math.ceil(round((stopped_s - hurts_s) / ASSESS_S, 6))) if stopped_s < math.inf else math.inf


def mean_throughput(run: Run, from_s: float) -> float:
    """From then to the end."""
    return float(np.mean([ratio for at_s, ratio in _throughput(run) if at_s > from_s]))


def _throughput(run: Run) -> list[tuple[float, float]]:
    return list(zip(run.series["time_s"], run.series["throughput_ratio"], strict=True))


def _run(policy: str, access: Access, total_s: int, **more: Any) -> Run:
    settings: dict[str, Any] = {
        "batches": BATCHES,
        "workers": 4,
        "warmup_ns": 60 * SECOND,
        "duration_ns": (total_s - 60) * SECOND,
        "message_ns": 50.0,
    }
    return simulate(Setup(policy, access, load_costs("zram", Path()), load_link("mount-evans"), **(settings | more)))
