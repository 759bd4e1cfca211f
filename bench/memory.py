"""Memory: what finding cold pages saves and costs, in the model, in the policy's own code, and on this machine.

`model_*` and `safeguard_*` figures are of virtual time; `policy_*`, `numpy_*` and `iteration_*` are CPU time of the policy's step, measured; `live_*` are
measured on a real RocksDB, and are there where zram, root and the kernel allow. `published_*` are others' results on other systems, beside, not matched.
Ctrl-C keeps what was measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from waveos.bench import memory_live, memory_model, memory_safeguards, memory_step
from waveos.bench.machine import describe_machine
from waveos.bench.memory_live import NOTHING, ORACLE, SETS, Live, Plan
from waveos.cli.terminal import talk
from waveos.errors import ConfigError, MissingError
from waveos.names import nearest

PARTS = ("step", "model", "safeguards", "live")
LIVE_RUNS = (ORACLE, "sol", "psi_backoff")
LIVE_FIGURES = ("saved_share", "saved_usage_share", "throughput_ratio", "wall_throughput_ratio", "get_p99_ratio", "hostd_cores", "agent_cores")
SPREAD = ("saved_share", "throughput_ratio")
QUICK_GIB, QUICK_BATCHES, QUICK_ROUNDS = memory_model.SMALL_GIB, 262_144, 3

OPTIONS = {
    "quick": (
        False,
        "a small copy in some 3 minutes: less of the model, and live a quarter of the memory with all times a quarter, side by side only",
    ),
    "parts": (",".join(PARTS), "which parts, with commas between"),
    "gib": (256.0, "size of the modelled process"),
    "duration_s": (192.0, "virtual seconds that count"),
    "batches": (1_048_576, "batches of the measured step: 256 GiB in batches of 256 KiB"),
    "rounds": (5, "rounds of the measured step; figures are medians"),
    "seed": (1, "seed of everything random"),
    "live_gib": (2.0, "size of the real database's cache"),
    "live_batch_kib": (2_048, "what is looked at and reclaimed as a whole, live; each is a mapping"),
    "live_policies": (",".join(LIVE_RUNS), "what is run live, with commas between; also: nothing"),
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
    live_batch_kib: int = 2_048,
    live_policies: str = ",".join(LIVE_RUNS),
    live_sets: str = "",
    live_repeats: int = 1,
    live_out: str = "",
) -> dict[str, Any]:
    """The bench's object. After Ctrl-C that of what had been measured, marked `interrupted`."""
    wanted = _chosen("parts", parts, PARTS)
    policies, sets = (
        _chosen("live-policies", live_policies, (*LIVE_RUNS, NOTHING)),
        _chosen("live-sets", live_sets or (SETS[0] if quick else ",".join(SETS)), SETS),
    )
    if live_repeats < 1:
        raise ConfigError(f"--live-repeats {live_repeats}: wants 1 or more")
    if live_batch_kib < 64 or live_batch_kib % 4:
        raise ConfigError(f"--live-batch-kib {live_batch_kib}: wants whole pages, a multiple of 4, 64 or more")
    for option, value in (("gib", gib), ("duration-s", duration_s), ("live-gib", live_gib), ("batches", batches), ("rounds", rounds)):
        if value <= 0:
            raise ConfigError(f"--{option} {value:g}: wants a number above 0")
    if live_out and not Path(live_out).resolve().parent.is_dir():
        raise ConfigError(f"--live-out {live_out}: there is no folder {Path(live_out).resolve().parent}; make it first")
    if quick:
        gib, batches, rounds = min(gib, QUICK_GIB), min(batches, QUICK_BATCHES), min(rounds, QUICK_ROUNDS)
    plan = replace(memory_live.QUICK if quick else Plan(gib=live_gib), batch_kib=live_batch_kib, seed=seed)
    if "live" in wanted:
        plan.check()
    metrics: dict[str, float] = {}
    measuring: dict[str, Callable[[], Iterator[str]]] = {
        "step": lambda: _measure_step(metrics, batches, rounds, seed),
        "model": lambda: memory_model.measure(metrics, gib, duration_s, seed, quick),
        "safeguards": lambda: memory_safeguards.measure(metrics),
        "live": lambda: measure_live(metrics, plan, policies, sets, live_repeats, Path(live_out) if live_out else None),
    }
    judging = {"step": _judge_step, "model": memory_model.judge, "safeguards": memory_safeguards.judge, "live": judge_live}
    lines, interrupted = [], False
    for part in (each for each in PARTS if each in wanted):
        try:
            for step in measuring[part]():
                talk(f"memory: {part}: {step} ...")
            lines.append(judging[part](metrics))
        except MissingError as error:
            if part != "live":
                raise
            lines.append(f"not live: {error}")
        except KeyboardInterrupt:
            lines.append(f"interrupted in {part}: what was measured is kept, what was not is left out")
            interrupted = True
            break
    told = {"name": "memory", "metrics": metrics, "machine": describe_machine(), "timing": "measured", "verdict": "; ".join(lines)}
    return told | ({"interrupted": True} if interrupted else {})


def _chosen(option: str, text: str, known: Sequence[str]) -> list[str]:
    chosen = text.split(",")
    for each in chosen:
        if each not in known:
            raise ConfigError(f"--{option}: no {each!r}{nearest(each, known)}; there are: {', '.join(known)}")
    return chosen


def _measure_step(metrics: dict[str, float], batches: int, rounds: int, seed: int) -> Iterator[str]:
    yield f"{batches:,} batches, the policy's own and NumPy's, {rounds} rounds"
    steps = memory_step.time_steps(batches, rounds, seed)
    per_256gib = 2**20 / batches
    metrics |= {
        "policy_batches_per_s": steps["policy_batches_per_s"],
        "numpy_batches_per_s": steps["numpy_batches_per_s"],
        "iteration_256gib_ms": steps["iteration_ms"] * per_256gib,
        "numpy_iteration_256gib_ms": steps["numpy_iteration_ms"] * per_256gib,
        "step_typical_due_share": steps["step_typical_due_share"],
        "step_decisions_p": steps["decisions_p"],
    }


def _judge_step(metrics: dict[str, float]) -> str:
    alike = "alike" if metrics["step_decisions_p"] > 0.01 else "NOT alike"
    times = metrics["policy_batches_per_s"] / metrics["numpy_batches_per_s"]
    return f"256 GiB iterated in {metrics['iteration_256gib_ms']:.1f} ms, {times:.0f} times NumPy's speed, decisions {alike}"


def measure_live(
    metrics: dict[str, float], plan: Plan, policies: Sequence[str], sets: Sequence[str], repeats: int, out: Path | None = None
) -> Iterator[str]:
    """Figures of these policies on these hot sets, into `metrics` after each run; medians where there are repeats. Yields what is next. `out`: a file for
    all that was seen. Raises MissingError, ConfigError."""
    runs: list[dict[str, Any]] = []
    try:
        with Live(plan, watch=out is not None, tell=talk) as live:
            for kind in sets:
                made: dict[str, list[dict[str, float]]] = {policy: [] for policy in policies}
                for number in range(repeats):
                    for policy in policies:
                        yield f"{kind} hot set, {policy}{f', {number + 1} of {repeats}' if repeats > 1 else ''}"
                        runs.append(live.run(policy, scrambled=kind == "scrambled"))
                        made[policy].append(runs[-1]["figures"])
                        metrics |= _figures(policy, kind, made[policy])
    finally:
        if out is not None and runs:
            out.write_text(json.dumps(memory_live.results(plan, runs)))


def _figures(policy: str, kind: str, runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """Medians, and the ends of what matters."""
    name = f"live_{'scrambled_' if kind == 'scrambled' else ''}{'psi' if policy == 'psi_backoff' else policy}"
    told = {f"{name}_{key}": median(run[key] for run in runs) for key in LIVE_FIGURES}
    if len(runs) > 1:
        for key in SPREAD:
            values = [run[key] for run in runs]
            told |= {f"{name}_{key}_least": min(values), f"{name}_{key}_most": max(values)}
    return told


def judge_live(metrics: dict[str, float]) -> str:
    """The figures in a sentence, a hot set each, where those that it takes are there."""
    told = []
    for kind in SETS:
        name = "live_scrambled" if kind == "scrambled" else "live"
        try:
            oracle, sol, psi = (metrics[f"{name}_{each}_saved_share"] for each in ("oracle", "sol", "psi"))
            cost = 1 - metrics[f"{name}_sol_throughput_ratio"]
        except KeyError:
            continue
        share = sol / max(1e-9, oracle)
        meets = f" ({'meets' if share >= 0.7 and cost <= 0.05 else 'misses'} 70 % at 5 %)" if kind == "contiguous" else ""
        told.append(
            f"live, {kind}: SOL saves {share:.0%} of the oracle's share at {cost:.1%} of throughput{meets}, {'more' if sol > psi else 'LESS'} than psi_backoff"
        )
    return "; ".join(told) or "live: of no hot set all of oracle, sol and psi_backoff were run, so nothing is judged"
