"""When GPUs fail: traces of it, and what recovery moves (FailSafe, arXiv 2511.14116)."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from waveos.errors import ConfigError
from waveos.ipu_emulator.gpu import load_table
from waveos.ipu_emulator.serving.cost import BYTES, Costs
from waveos.serving import Recovery

_DATA = Path(__file__).parents[1] / "data"
_LONGEST_S = 2**62 / 1e9
"""Of a trace: in ns it is a 64-bit number."""


class RecoveryConstants(BaseModel):
    """What recovery is made of."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    verified: bool
    rebuild_s: float
    wire_bytes_per_s: float
    peer_share: float
    openthoughts_prompt: int
    openthoughts_outputs: int
    pool_share: float


@lru_cache(maxsize=1)
def load_recovery() -> RecoveryConstants:
    """The constants that ship with Wave."""
    return load_table(RecoveryConstants, _DATA / "serving" / "failsafe.toml")


def recovery_s(recovery: Recovery, before: Costs, after: Costs, kv_bytes: float) -> float:
    """Seconds until the instance runs again; `kv_bytes` lay on the ranks that were lost. RECOMPUTE has its prefills still to come.

    An ordinary re-shard deals the model in n contiguous pieces anew: the worst rank keeps nothing of its piece. On demand, only the lost rank's weights move,
    each survivor loads its share of them, and of the lost KV; what heads at home need of the attention weights comes from the others over NVLink.
    """
    constants, n = load_recovery(), after.sharding.ranks
    peer = (after.gpu.peer_bytes_per_s or 1.0) * constants.peer_share
    weights = BYTES * before.model.parameters
    lost = max(0, before.sharding.ranks - n)
    if recovery is Recovery.ORACLE:
        return constants.rebuild_s
    resharded = weights / before.sharding.ranks / constants.wire_bytes_per_s
    restored = kv_bytes / n / constants.wire_bytes_per_s
    if recovery is Recovery.RECOMPUTE:
        return constants.rebuild_s + resharded
    if recovery is Recovery.HOST:
        return constants.rebuild_s + resharded + restored
    on_demand = lost * weights / before.sharding.ranks / n / constants.wire_bytes_per_s
    exchanged = (kv_bytes / n + max(0.0, after.weights - weights / n)) / peer
    return constants.rebuild_s + on_demand + restored + exchanged


@dataclass(frozen=True)
class Alive:
    """How many GPUs are alive in a cluster from a time on, s."""

    at_s: float
    gpus: int


def bundled_fault_trace() -> Path:
    """A GCP trace of 64 A100s; data/traces/traces.toml has its origin and licence."""
    return _DATA / "traces" / "gcp-a100-east1b.txt"


def read_fault_trace(path: Path) -> list[Alive]:
    """`YYYY-MM-DD, HH:MM:SS, n` (so many alive), or `ms,add|remove,node` (one comes or goes). Raises ConfigError with the line that is wrong."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or 'not text'}") from error
    found: list[Alive] = []
    begin, alive = 0.0, 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        fields = [field.strip() for field in line.split(",")]
        try:
            if fields[1] in ("add", "remove"):
                at, alive = float(fields[0]) / 1e3, alive + (1 if fields[1] == "add" else -1)
            else:
                at, alive = datetime.fromisoformat(f"{fields[0]} {fields[1]}").timestamp(), int(fields[2])
            begin = begin if found else at
            if not at - begin < _LONGEST_S:  # NaN, too
                raise ValueError
        except (ValueError, IndexError, OverflowError):
            raise ConfigError(f"{path}:{number}: {line.strip()!r}; wanted: DATE, TIME, ALIVE or MS,add|remove,NODE") from None
        if alive < 0 or (found and at - begin < found[-1].at_s):
            raise ConfigError(f"{path}:{number}: {'fewer than no GPUs are alive' if alive < 0 else 'time goes back'}")
        found.append(Alive(at - begin, alive))
    if len(found) < 2:
        raise ConfigError(f"{path}: a fault trace has at least two lines")
    return found


def deal(trace: list[Alive], nodes: int, gpus: int, seed: int) -> list[tuple[float, list[int]]]:
    """The GPUs alive in each node from each time on: the trace's largest count is all of them; which fail and come back is drawn evenly."""
    rng = np.random.default_rng(seed)
    most = max(each.gpus for each in trace)
    total = nodes * gpus
    down: list[int] = []
    dealt = []
    for each in trace:
        wanted = total - round(each.gpus / most * total)
        while len(down) < wanted:
            up = np.setdiff1d(np.arange(total), down)
            down.append(int(rng.choice(up)))
        while len(down) > wanted:
            down.pop(int(rng.integers(len(down))))
        dealt.append((each.at_s, [gpus - sum(1 for gpu in down if gpu // gpus == node) for node in range(nodes)]))
    return dealt
