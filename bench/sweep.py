"""`wave sweep` as users get it: how much faster on all cores than on one, and whether kills lose or repeat a point.

The command runs as a process of its own, start and Parquet file included: once with one process, once with one a core, and once more killed with SIGKILL
again and again at random moments until it is whole. Every round of the latter is a new command line on the same file; the journal that a kill leaves is
read before the next begins, so a point that is lost, or finished a second time, is seen.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from waveos.bench.machine import describe_machine
from waveos.errors import ConfigError, WaveError
from waveos.parquet import read_parquet

OPTIONS = {
    "points": (500, "points of the grid"),
    "run_ms": (250.0, "virtual time of each point, at 120,000 requests/s"),
    "kills": (5, "how often the third sweep is killed"),
    "seed": (1, "of the moments of the kills"),
}
_SCENARIO = "ghost-rocksdb"
_FIXED = ("--policy", "fifo", "--loads", "120k", "--set", "host.workers=8", "--set", "run.warmup_ms=1")


def run(points: int = 500, run_ms: float = 250.0, kills: int = 5, seed: int = 1) -> dict[str, Any]:
    """Sweep three times; times, the ratio, and what the kills did."""
    if points < 2 or kills < 0 or run_ms <= 0:
        raise ConfigError(f"points {points}, kills {kills}, run_ms {run_ms:g}: at least 2 points, 0 kills and more than 0 ms")
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="wave-sweep-") as folder:
        alone_s = _time(_command(Path(folder) / "one.parquet", points, run_ms, 1))
        together_s = _time(_command(Path(folder) / "all.parquet", points, run_ms, cores))
        killed = _kill(_command(path := Path(folder) / "killed.parquet", points, run_ms, cores), path, kills, together_s, random.Random(seed))
        same = _hashes(path) == _hashes(Path(folder) / "one.parquet")
    metrics = {
        "points": points,
        "cores": cores,
        "one_core_s": alone_s,
        "all_cores_s": together_s,
        "speedup": alone_s / together_s,
        "points_per_s": points / together_s,
        **killed,
        "same_results": int(same),
    }
    fine = same and not killed["points_repeated"] and not killed["points_lost"]
    verdict = (
        f"{metrics['speedup']:.2f}x as fast on {cores} cores as on one; after {killed['kills']} kills every point is there"
        f"{', none repeated, all results equal' if fine else ': NOT as it should be'}"
    )
    return {"name": "sweep", "timing": "measured", "machine": describe_machine(), "metrics": metrics, "verdict": verdict}


def _command(path: Path, points: int, run_ms: float, processes: int) -> list[str]:
    seeds = ",".join(str(number) for number in range(points))
    wave = [sys.executable, "-P", "-c", "from waveos.cli import main; main()", "sweep", _SCENARIO, "--grid", f"run.seed={seeds}", *_FIXED]
    return [*wave, "--set", f"run.duration_ms={run_ms:g}", "--processes", str(processes), "--out", str(path)]


def _time(command: list[str]) -> float:
    begin = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise WaveError(f"wave sweep failed: {done.stderr.strip().splitlines()[-1]}")
    return time.monotonic() - begin


def _kill(command: list[str], path: Path, kills: int, whole_s: float, chance: random.Random) -> dict[str, int]:
    """Kill it at moments spread over the time that a whole sweep takes; then let it end. What was finished must stay, and stay once."""
    journal = path.with_name(path.name + ".journal")
    kept: list[int] = []
    repeated = lost = happened = 0
    for _ in range(kills):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=2 + chance.random() * whole_s / max(1, kills))
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        happened += 1
        found = _finished(journal)
        repeated += len(found) - len(set(found))
        lost += len(set(kept) - set(found))
        kept = found
    _time(command)
    rows, about = read_parquet(path)
    numbers = [row["point"] for row in rows]
    lost += about["points"] - len(set(numbers))
    repeated += len(numbers) - len(set(numbers))
    return {"kills": happened, "points_before_last": len(kept), "points_repeated": repeated, "points_lost": lost}


def _finished(journal: Path) -> list[int]:
    """Numbers of the points of whole lines."""
    lines = journal.read_bytes().split(b"\n")[1:-1] if journal.exists() else []
    return [json.loads(line)["number"] for line in lines]


def _hashes(path: Path) -> dict[int, str]:
    rows, _ = read_parquet(path)
    return {row["point"]: row["trace_hash"] for row in rows}
