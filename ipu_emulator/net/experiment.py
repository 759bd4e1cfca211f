"""A comparison of steering policies: the network card's hash, each policy with stack and agent on the host, and each with both on the IPU."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from waveos import __version__
from waveos.errors import ConfigError
from waveos.ipu_emulator.experiment import Jobs, check_policies, limits_us, pool_or, run_calls
from waveos.ipu_emulator.inputs import Nanoseconds, is_file, mean_service_ns, read_samples, wanted_samples
from waveos.ipu_emulator.job import CallJob, policy_file, watched
from waveos.ipu_emulator.net import Outcome, RequestClass, Setup, simulate, throughput_at
from waveos.names import nearest

PLACEMENTS = ("on-host", "offload")
KERNEL = "rss", "kernel"
"""What there is without Wave: the card's hash picks the worker, the stack is the host's."""
DATA = Path(__file__).parents[1] / "data" / "net"
QUANTILES = {"p50_us": 0.5, "p99_us": 0.99, "p999_us": 0.999}
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Inputs:
    """What a scenario reads besides itself."""

    costs: dict[str, Any]
    samples: dict[str, Nanoseconds]


def read_inputs(scenario: Any) -> Inputs:
    """Raises ConfigError for a file that cannot be used."""
    samples = {}
    for spec in wanted_samples(scenario):
        if not is_file(spec):
            raise ConfigError(f'samples = "{spec}": the network reads "FILE.csv" and "FILE.npz:NAME"; `wave bench net` measures services itself')
        samples[spec] = read_samples(spec, scenario.base)
    return Inputs(_read_costs(scenario.service.costs, scenario.base), samples)


def _read_costs(name: str, base: Path) -> dict[str, Any]:
    path = base / name if name.endswith(".toml") else DATA / f"{name}.toml"
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        known = sorted(each.stem for each in DATA.glob("*.toml"))
        raise ConfigError(f"service.costs = {name!r}{nearest(name, known)}: there is {', '.join(known)}, or a TOML file like it") from None
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"service.costs: {path} cannot be read: {error}") from None


def compare(
    scenario: Any, placements: Iterable[str] = PLACEMENTS, progress: Progress = lambda done, expected, what: None, pool: Jobs | None = None
) -> dict[str, Any]:
    """Run every policy of a network scenario in each placement over its loads; what came out, as it stands in a results file.

    Runs in processes of its own, or in `pool`. On KeyboardInterrupt what has been run is returned, marked `interrupted`. Raises ConfigError, PolicyError.
    """
    inputs = read_inputs(scenario)
    wanted = [KERNEL, *((name, place) for name in scenario.policies.names for place in placements)]
    grid = loads(scenario, inputs)
    results: dict[str, Any] = {
        "name": scenario.name,
        "about": scenario.about,
        "subsystem": "net",
        "wave": __version__,
        "timing": "modelled",
        "scenario": scenario.model_dump(exclude_none=True),
        "costs": {key: inputs.costs[key] for key in ("name", "verified", "source")},
        "loads_per_s": grid,
        "configs": [],
        "notes": [],
        "interrupted": False,
    }
    with pool_or(pool, len(wanted)) as jobs:
        checked = check_policies(scenario, "net", jobs)
        calls = [
            CallJob(f"{__name__}:run_config", (checked, inputs, policy, place, grid), policy, "net", f"{policy} {place}") for policy, place in wanted
        ]
        results["configs"], results["interrupted"] = run_calls(jobs, calls, progress)
    return results


def run_config(scenario: Any, inputs: Inputs, policy: str, place: str, grid: list[float], handling: int = 0) -> dict[str, Any]:
    """One policy in one placement at all loads, and what it serves within the goals. `handling`: see `waveos.ipu_emulator.job.watched`."""
    with watched(handling):
        return _run(scenario, inputs, policy, place, grid, handling)


def _run(scenario: Any, inputs: Inputs, policy: str, place: str, grid: list[float], watch: int) -> dict[str, Any]:
    setup = setup_of(scenario, inputs, policy, place, grid[-1])
    options = {"requests": scenario.run.requests, "warmup": scenario.run.warmup_share, "seed": scenario.run.seed, "watch": watch}
    points = [_point(scenario, load, simulate(setup, load, **options)) for load in grid]
    limits = _limits(scenario, inputs)
    figures: dict[str, float] = {}
    if limits:
        most = capacity_per_s(scenario, inputs)
        figures["goal_per_s"] = throughput_at(
            setup,
            lambda outcome: _meets(scenario, outcome, limits),
            0.002 * most,
            0.999 * most,
            share=scenario.run.resolution_share,
            **options,
        )
    figures["host_cores"] = setup.workers + (setup.stack_cores if place != "offload" else 0) + (place == "on-host")
    figures["ipu_cores"] = setup.stack_cores + 1 if place == "offload" else 0
    return {"id": f"{policy}/{place}", "policy": policy, "placement": place, "stack_cores": setup.stack_cores, "figures": figures, "points": points}


def _point(scenario: Any, load: float, outcome: Outcome) -> dict[str, Any]:
    classes = {}
    for number, each in enumerate(scenario.workload.classes):
        count = int(outcome.latency[number].sum())
        classes[each.name] = {"count": count, **{name: round(outcome.quantile_us(q, number), 3) if count else None for name, q in QUANTILES.items()}}
    return {
        "load_per_s": load,
        "classes": classes,
        "shed_share": outcome.shed / max(1, outcome.counted),
        "saturated": outcome.dropped > 0,
        "stack_cores_busy": round(outcome.stack_cores_busy, 4),
        "agent_cores_busy": round(outcome.agent_cores_busy, 4),
        "workers_busy": round(outcome.workers_busy, 4),
    }


def _limits(scenario: Any, inputs: Inputs) -> dict[int, dict[str, float]]:
    """Goals in us by class number."""
    limits = {}
    for number, each in enumerate(scenario.workload.classes):
        if each.name in scenario.objective:
            limits[number] = limits_us(scenario.objective[each.name], mean_service_ns(each.service, inputs.samples))
    return limits


def _meets(scenario: Any, outcome: Outcome, limits: dict[int, dict[str, float]]) -> bool:
    """The load was served within every goal, and nothing of it refused."""
    if outcome.dropped or outcome.shed:
        return False
    for number, wanted in limits.items():
        for name, limit in wanted.items():
            seen_us = outcome.mean_us if name == "mean_us" else outcome.quantile_us(QUANTILES[name], number)
            if outcome.latency[number].sum() and seen_us > limit:
                return False
    return True


def capacity_per_s(scenario: Any, inputs: Inputs) -> float:
    """Requests per second that the workers could serve if nothing but the service itself took time."""
    mean_ns = sum(each.share * mean_service_ns(each.service, inputs.samples) for each in scenario.workload.classes)
    return float(scenario.service.workers / (mean_ns * 1e-9))


def loads(scenario: Any, inputs: Inputs) -> list[float]:
    """The scenario's grid of offered loads, requests per second, rising."""
    if scenario.workload.loads_per_s:
        return sorted(set(scenario.workload.loads_per_s))
    return [round(share * capacity_per_s(scenario, inputs)) for share in sorted(set(scenario.workload.loads_share))]


def setup_of(scenario: Any, inputs: Inputs, policy: str, place: str, highest_per_s: float) -> Setup:
    """One run of the scenario: on the IPU the stack's and the agent's work takes longer, and what they decide is on its way for a while."""
    costs = inputs.costs
    offload = place == "offload"
    speed = costs["relative_speed"] if offload else 1.0
    stack_ns = costs["stack_ns"] / speed
    ways: dict[str, Any] = {key: costs[key] if offload else 0 for key in ("to_agent_ns", "to_host_ns", "pick_up_ns")}
    agent: dict[str, Any] = {key: round(costs[key] / speed) if place != "kernel" else 0 for key in ("message_ns", "decision_ns")}
    return Setup(
        policy_file(scenario, policy),
        scenario.service.workers,
        [_class_of(each, inputs) for each in scenario.workload.classes],
        params=dict(scenario.policies.params.get(policy, {})),
        flows=scenario.service.flows,
        stack_cores=min(64, max(1, math.ceil(highest_per_s * stack_ns * 1e-9 / scenario.service.stack_busy))),
        stack_in_ns=round(stack_ns * costs["in_share"]),
        stack_out_ns=round(stack_ns * (1 - costs["in_share"])),
        **ways,
        **agent,
    )


def _class_of(each: Any, inputs: Inputs) -> RequestClass:
    service, slo_ns = each.service, round(1e3 * each.slo_us)
    mean_ns = mean_service_ns(service, inputs.samples)
    match service.form:
        case "hyperexponential":
            phases = tuple((share, 1e3 * mean_us) for share, mean_us in zip(service.shares, service.hyperexponential_us, strict=True))
            return RequestClass(each.share, mean_ns, "hyper", slo_ns, phases)
        case "samples":
            return RequestClass(each.share, mean_ns, "samples", slo_ns, samples_ns=inputs.samples[service.samples])
        case form:
            return RequestClass(each.share, mean_ns, form, slo_ns)


def trace(scenario: Any, placement: str, load_per_s: float | None, from_ms: float | None, for_ms: float) -> tuple[Any, dict[str, Any]]:
    """The packets of some milliseconds of a run of the last policy, and what their numbers mean. Raises ConfigError."""
    inputs = read_inputs(scenario)
    grid = loads(scenario, inputs)
    load = grid[len(grid) // 2] if load_per_s is None else load_per_s
    policy, place = KERNEL if placement == "kernel" else (scenario.policies.names[-1], placement)
    if place not in ("kernel", *PLACEMENTS):
        raise ConfigError(f"--placement {placement}: no such place{nearest(placement, PLACEMENTS)}; there are kernel, {', '.join(PLACEMENTS)}")
    begin_ns = round((from_ms * 1e-3 if from_ms is not None else scenario.run.warmup_share * scenario.run.requests / load) * 1e9)
    until_ns = begin_ns + round(for_ms * 1e6)
    counted = max(1_000, math.ceil(1.05 * load * until_ns * 1e-9))  # as many as surely are under way until then
    with pool_or(None, 1) as jobs:
        arguments = (check_policies(scenario, "net", jobs), inputs, policy, place, max(load, grid[-1]), load, counted, (begin_ns, until_ns))
        jobs.submit(CallJob(f"{__name__}:run_traced", arguments, policy, "net"))
        [(_, events)] = jobs.finished()
    meta = {
        "scenario": scenario.name,
        "configuration": f"{policy}/{place}",
        "load_per_s": load,
        "seed": scenario.run.seed,
        "timing": "modelled",
        "classes": [each.name for each in scenario.workload.classes],
    }
    return events, meta


def run_traced(
    scenario: Any,
    inputs: Inputs,
    policy: str,
    place: str,
    highest_per_s: float,
    load_per_s: float,
    requests: int,
    trace_ns: tuple[int, int],
    handling: int = 0,
) -> Any:
    """The events of one run. `handling`: see `waveos.ipu_emulator.job.watched`."""
    setup = setup_of(scenario, inputs, policy, place, highest_per_s)
    with watched(handling):
        return simulate(setup, load_per_s, requests=requests, warmup=0.0, seed=scenario.run.seed, trace_ns=trace_ns, watch=handling).trace
