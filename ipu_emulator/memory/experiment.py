"""A comparison of memory policies: nothing reclaimed, each policy on a host core and on the IPU, and the oracle that is told the hot set."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import fmean
from typing import Any

from waveos import __version__
from waveos.errors import ConfigError
from waveos.ipu_emulator.experiment import Jobs, check_policies, pool_or, run_calls
from waveos.ipu_emulator.job import CallJob, policy_file, watched_plain
from waveos.ipu_emulator.memory import NOTHING, ORACLE, SECOND, Setup, simulate
from waveos.ipu_emulator.memory.access import Access, Moving, Recorded, Zipf
from waveos.ipu_emulator.memory.machine import load_costs
from waveos.ipu_emulator.profile import load_link
from waveos.memory import MESSAGE_TYPES

PLACEMENTS = ("on-host", "offload")
MAP_STEPS = 160
Progress = Callable[[int, int, str], None]


def compare(
    scenario: Any, placements: Iterable[str] = PLACEMENTS, progress: Progress = lambda done, expected, what: None, pool: Jobs | None = None
) -> dict[str, Any]:
    """Run every policy of a memory scenario in each placement; what came out, as it stands in a results file.

    Runs in processes of its own, or in `pool`; one after the other where the policies' CPU time is measured. On KeyboardInterrupt what has been run is
    returned, marked `interrupted`. Raises ConfigError, PolicyError.
    """
    wanted = [(NOTHING, "kernel"), (ORACLE, "oracle"), *((name, place) for name in scenario.policies.names for place in placements)]
    costs = load_costs(scenario.memory.costs, scenario.base)
    link = load_link(scenario.link.profile, scenario.base)
    results: dict[str, Any] = {
        "name": scenario.name,
        "about": scenario.about,
        "subsystem": "memory",
        "wave": __version__,
        "timing": "modelled",
        "scenario": scenario.model_dump(exclude_none=True),
        "link": {"name": link.name, "verified": link.verified, "source": link.source},
        "costs": {"name": costs.name, "verified": costs.verified, "source": costs.source},
        "configs": [],
        "notes": [],
        "interrupted": False,
    }
    if scenario.agent.message_ns == "measured":
        results["notes"].append("policy cores are CPU time measured on this machine while the policy ran; everything else is modelled")
    with pool_or(pool, 1 if scenario.agent.message_ns == "measured" else len(wanted)) as jobs:
        checked = check_policies(scenario, "memory", jobs)
        calls = [CallJob(f"{__name__}:run_config", (checked, policy, place), policy, "memory", f"{policy} {place}") for policy, place in wanted]
        results["configs"], results["interrupted"] = run_calls(jobs, calls, progress)
    return results


def run_config(scenario: Any, policy: str, place: str, handling: int = 0) -> dict[str, Any]:
    """One policy in one placement. `handling`: see `waveos.ipu_emulator.job.watched_plain`."""
    with watched_plain(handling, MESSAGE_TYPES) as tell:
        run = simulate(setup_of(scenario, policy, place), tell)
    return {
        "id": policy if place in ("kernel", "oracle") else f"{policy}/{place}",
        "policy": policy,
        "placement": place,
        "figures": {**run.figures, **cores(run.figures, place)},
        "series": {name: [round(value, 5) for value in values] for name, values in run.series.items()},
        "maps": {name: _coarse(rows) for name, rows in run.maps.items()} if place != "on-host" else {},
        "outcomes": run.outcomes,
        "stops": run.stops,
    }


def _coarse(rows: Any) -> list[list[float]]:
    """At most MAP_STEPS of the steps, as numbers short enough to write down."""
    every = max(1, len(rows) // MAP_STEPS)
    return [[float(f"{value:.4g}") for value in row] for row in rows[::every]]


def cores(figures: dict[str, float], placement: str) -> dict[str, float]:
    """Cores that memory management takes on each side."""
    mechanism = figures["scan_cores"] + figures["reclaim_cores"] + figures["link_cores"]
    on_host = placement == "on-host"
    return {"host_cores": mechanism + (figures["policy_cores"] if on_host else 0.0), "ipu_cores": 0.0 if on_host else figures["policy_cores"]}


def access_of(scenario: Any) -> Access:
    """The access process that a scenario describes. Raises ConfigError for a recorded one that cannot be read."""
    access, batches, seed = scenario.access, batches_of(scenario), scenario.run.seed
    if access.pattern == "recorded":
        if not access.trace:
            raise ConfigError('access.pattern = "recorded" wants access.trace = "FILE.npz"')
        return Recorded(scenario.base / access.trace, batches, access.hot_share)
    if access.pattern == "zipf":
        return Zipf(batches, access.zipf_s, access.hot_share, seed)
    return Moving(batches, access.hot_share, int(access.move_s * SECOND), access.stray_share, access.scrambled, seed)


def batches_of(scenario: Any) -> int:
    """Page batches of the process. Raises ConfigError if its size is no whole number of them."""
    memory = scenario.memory
    if memory.batch_kib % 4:
        raise ConfigError(f"memory.batch_kib = {memory.batch_kib}: a batch is a whole number of pages of 4 KiB")
    batches = memory.gib * 2**20 / memory.batch_kib
    if batches != int(batches) or batches < 1:
        raise ConfigError(f"memory.gib = {memory.gib:g} is no whole number of batches of {memory.batch_kib} KiB")
    return int(batches)


def setup_of(scenario: Any, policy: str, placement: str) -> Setup:
    """One run of the scenario."""
    offload = placement == "offload"
    link = load_link(scenario.link.profile if offload else scenario.link.on_host, scenario.base)
    speed = link.relative_speed if scenario.agent.speed == "profile" else float(scenario.agent.speed)
    return Setup(
        policy_file(scenario, policy),
        access_of(scenario),
        load_costs(scenario.memory.costs, scenario.base),
        link,
        params=scenario.policies.params.get(policy, {}),
        mitigations=tuple(scenario.link.mitigations),
        message_ns=None if scenario.agent.message_ns == "measured" else float(scenario.agent.message_ns),
        relative_speed=speed if offload else 1.0,
        batches=batches_of(scenario),
        batch_bytes=scenario.memory.batch_kib << 10,
        workers=scenario.access.workers,
        get_ns=scenario.access.get_us * 1e3,
        get_sigma=scenario.access.get_sigma,
        warmup_ns=int(scenario.run.warmup_s * SECOND),
        duration_ns=int(scenario.run.duration_s * SECOND),
        seed=scenario.run.seed,
    )


def saved_of_oracle(results: dict[str, Any], policy: str) -> float:
    """What share of the oracle's savings a policy makes, over its placements."""

    def saved(name: str) -> float:
        return fmean(each["figures"]["saved_share"] for each in results["configs"] if each["policy"] == name)

    return saved(policy) / max(1e-9, saved(ORACLE))
