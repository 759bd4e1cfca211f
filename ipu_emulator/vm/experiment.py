"""A comparison of how virtual machines fare: under the kernel's own scheduler, and under each policy from the host and from the IPU, with ticks and without.

What switching the ticks off gives is taken apart, one effect added to the other: the time that ticks took (`ticks`), what deeper sleep costs in waking up
and leaves of the power budget (`sleep`), and the turbo bins that fewer active cores open (`turbo`). Nothing is fitted to the published gain.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from waveos import __version__
from waveos.errors import ConfigError
from waveos.ipu_emulator.experiment import Jobs, check_policies, pool_or, run_calls
from waveos.ipu_emulator.job import CallJob, link_of, policy_file, watched
from waveos.ipu_emulator.profile import LinkProfile, load_host, load_link
from waveos.ipu_emulator.vm import MS, Placement, Run, Setup, simulate
from waveos.ipu_emulator.vm.cores import Held, Ticks
from waveos.ipu_emulator.vm.part import Assumed, Guests, load_assumptions, load_part
from waveos.names import nearest
from waveos.scenario import load_scenario

PLACEMENTS: tuple[Placement, ...] = ("on-host", "offload")
PLACES: tuple[Placement, ...] = ("kernel", "on-host", "offload")
STEPS: tuple[tuple[str, frozenset[Held]], ...] = (
    ("ticks", frozenset({"sleep", "turbo"})),
    ("sleep", frozenset({"turbo"})),
    ("turbo", frozenset()),
)
"""Effects of no ticks, and what is still held as with them once the effect is let in."""
HOST_COSTS = ("entry_ns", "switch_ns", "wake_ns", "pick_ns", "ipi_wire_ns", "interrupt_ns", "tick_ns")
LINK = "link"
"""In a scale: all costs of the link at once."""
Progress = Callable[[int, int, str], None]


def assumed_names() -> list[str]:
    """Names that `gains` takes in `scale`: every assumed figure of part, guests, host, link and agent that a gain can depend on."""
    guests = [name for name in Guests.model_fields if name not in ("watch_ms", "silent_ms")]
    return [*Assumed.model_fields, *guests, *HOST_COSTS, LINK, "message_ns"]


def gains(
    scale: Mapping[str, float] | None = None,
    *,
    scenario: Any = None,
    part: str = "",
    busy_shares: Sequence[float] = (),
    duration_ms: float = 0.0,
    policy: str = "",
) -> dict[str, float]:
    """What the scenario's machines (by default those of `vm`) gain, offloaded, when the ticks are switched off; with assumed figures times `scale`.

    `vm_gain_max` is the largest gain of the busy machines' performance over `busy_shares`, `vm_gain_max_busy_share` where it is; `vm_gain_from_ticks`,
    `_sleep`, `_turbo` make it up there: the product of 1 + each is 1 + the gain. `vm_gain_full` is the gain with every machine busy, or most.
    Raises ConfigError for a name that is not in `assumed_names()`.
    """
    scale = dict(scale or {})
    for name, factor in scale.items():
        if name not in assumed_names():
            raise ConfigError(f"scale: no assumed figure {name!r}{nearest(name, assumed_names())}; there are: {', '.join(assumed_names())}")
        if not factor > 0:
            raise ConfigError(f"scale: {name} times {factor}; a number above 0 is needed")
    chosen = scenario or load_scenario("vm")
    base = scaled_setup(chosen, policy or chosen.policies.names[0], "offload", scale, part=part, duration_ms=duration_ms)
    found: list[dict[str, float]] = []
    for share in busy_shares or chosen.vm.busy_shares:
        found.append({"busy_share": share, **_steps(replace(base, busy_share=share), chosen.vm.ticks)})
    best = max(found, key=lambda each: each["gain"])
    return {
        "vm_gain_max": best["gain"],
        "vm_gain_max_busy_share": best["busy_share"],
        **{f"vm_gain_from_{name}": best[name] for name, _ in STEPS},
        "vm_gain_full": max(found, key=lambda each: each["busy_share"])["gain"],
    }


def _steps(base: Setup, ticks: Ticks) -> dict[str, float]:
    """The gain without ticks, and its parts."""
    before = with_ticks = simulate(replace(base, ticks=ticks)).figures["performance"]
    parts: dict[str, float] = {}
    for name, held in STEPS:
        now = simulate(replace(base, ticks="off", held=_held(held, ticks))).figures["performance"]
        parts[name] = now / before - 1
        before = now
    return {"gain": before / with_ticks - 1, **parts}


def _held(held: frozenset[Held], ticks: Ticks) -> frozenset[Held]:
    """Ticks of busy CPUs alone do not disturb sleep: then there is nothing to hold."""
    return held if ticks == "periodic" else frozenset()


def compare(
    scenario: Any, placements: Iterable[str] = PLACEMENTS, progress: Progress = lambda done, expected, what: None, pool: Jobs | None = None
) -> dict[str, Any]:
    """Run every policy of a scenario of virtual machines in each placement, with ticks and without; what came out, as it stands in a results file.

    Runs in processes of its own, or in `pool`. On KeyboardInterrupt what has been run is returned, marked `interrupted`. Raises ConfigError, PolicyError.
    """
    places = list(placements)
    assumptions, part = load_assumptions(), load_part(scenario.vm.part, scenario.base)
    link = link_of(scenario)
    wanted: list[tuple[str, Placement, Ticks, str, frozenset[Held]]] = [("kernel", "kernel", "nohz_idle", "", frozenset())]
    on: Ticks = scenario.vm.ticks
    for name in scenario.policies.names:
        if "on-host" in places:
            wanted += [(name, "on-host", on, "", frozenset()), (name, "on-host", "off", "", frozenset())]
        if "offload" in places:
            wanted.append((name, "offload", on, "", frozenset()))
            if name == scenario.policies.names[0] and on == "periodic":
                wanted += [(name, "offload", "off", only, held) for only, (_, held) in zip(("time alone", "time and sleep"), STEPS, strict=False)]
            wanted.append((name, "offload", "off", "", frozenset()))
    results: dict[str, Any] = {
        "name": scenario.name,
        "about": scenario.about,
        "subsystem": "vm",
        "wave": __version__,
        "timing": "modelled",
        "scenario": scenario.model_dump(exclude_none=True),
        "link": {"name": link.name, "verified": link.verified, "source": link.source},
        "part": {"name": part.name, "about": part.about, "verified": part.verified, "sources": part.sources},
        "busy_shares": sorted(scenario.vm.busy_shares),
        "published_gain_max": assumptions.gain_max,
        "configs": [],
        "notes": [],
        "interrupted": False,
    }
    with pool_or(pool, len(wanted)) as jobs:
        checked = check_policies(scenario, "sched", jobs)
        calls = [
            CallJob(f"{__name__}:run_config", (checked, *each, results["busy_shares"]), each[0], "sched", f"{each[0]} {each[1]}, ticks {each[2]}")
            for each in wanted
        ]
        results["configs"], results["interrupted"] = run_calls(jobs, calls, progress)
    results["gains"] = _gains_of(results)
    results["notes"] += _notes(results)
    return results


def run_config(
    scenario: Any, policy: str, place: Placement, ticks: Ticks, kept: str, held: frozenset[Held], busy_shares: Sequence[float], handling: int = 0
) -> dict[str, Any]:
    """One policy in one placement at all shares of busy machines. `handling`: see `waveos.ipu_emulator.job.watched`."""
    setup = setup_of(scenario, policy, place)
    with watched(handling):
        runs = [simulate(replace(setup, busy_share=share, ticks=ticks, held=held), handling) for share in busy_shares]
    return _config(policy, place, ticks, kept, runs)


def _config(policy: str, place: str, ticks: str, kept: str, runs: Sequence[Run]) -> dict[str, Any]:
    return {
        "id": f"{policy}/{place}/{ticks}" + (f"/{kept}" if kept else ""),
        "policy": policy,
        "placement": place,
        "ticks": ticks,
        "only": kept,
        "points": [{**run.figures, "outcomes": run.outcomes} for run in runs],
    }


def _gains_of(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each policy that was offloaded with ticks and without: its gain at each share of busy machines, and its parts where they were run."""
    found = []
    for policy in dict.fromkeys(each["policy"] for each in results["configs"]):
        mine = [each for each in results["configs"] if each["policy"] == policy and each["placement"] == "offload"]
        chain = [each for each in mine if each["ticks"] != "off"] + [each for each in mine if each["ticks"] == "off"]
        if len(chain) < 2 or chain[0]["ticks"] == "off" or chain[-1]["only"]:
            continue
        values = [[point["performance"] for point in each["points"]] for each in chain]
        parts = [[now / before - 1 for before, now in zip(one, two, strict=True)] for one, two in itertools.pairwise(values)]
        row: dict[str, Any] = {"policy": policy, "gain": [last / first - 1 for first, last in zip(values[0], values[-1], strict=True)]}
        if len(parts) == len(STEPS):
            row |= {name: part for (name, _), part in zip(STEPS, parts, strict=True)}
        found.append(row)
    return found


def _notes(results: Mapping[str, Any]) -> list[str]:
    lines = []
    for row in results["gains"]:
        at = max(range(len(row["gain"])), key=row["gain"].__getitem__)
        text = f"{row['policy']}, offloaded, gains up to {row['gain'][at]:+.1%} without ticks, with {results['busy_shares'][at]:.0%} of the machines busy"
        if "ticks" in row:
            text += f": {row['ticks'][at]:+.1%} from the ticks' own time, {row['sleep'][at]:+.1%} from sleep, {row['turbo'][at]:+.1%} from turbo"
        lines.append(f"{text}. Published, on another machine under another load: up to {results['published_gain_max']:+.1%}")
    lines.append(
        f"part {results['part']['name']}: what is published of it and what is assumed, see docs/vm.md; link profile: "
        f"{results['link']['name'] if results['link']['verified'] else 'assumed'}"
    )
    return lines


def trace(scenario: Any, placement: str, load_per_s: float | None, from_ms: float | None, for_ms: float) -> tuple[Any, dict[str, Any]]:
    """Which vCPU ran where, of the last policy at the middle share of busy machines without ticks: (events, meta). Raises ConfigError."""
    if load_per_s is not None:
        raise ConfigError("--load is for scenarios that have one; of virtual machines a share is busy: --set vm.busy_shares=[0.5]")
    place = next((each for each in PLACES if each == placement), None)
    if place is None:
        raise ConfigError(f"--placement {placement}: no such place{nearest(placement, PLACES)}; there are {', '.join(PLACES)}")
    begin_ms = scenario.run.warmup_ms if from_ms is None else from_ms
    if begin_ms >= scenario.run.warmup_ms + scenario.run.duration_ms:
        raise ConfigError(f"the window begins at {begin_ms:g} ms, but the run ends at {scenario.run.warmup_ms + scenario.run.duration_ms:g}")
    policy = "kernel" if place == "kernel" else scenario.policies.names[-1]
    share = scenario.vm.busy_shares[len(scenario.vm.busy_shares) // 2]
    ticks: Ticks = "nohz_idle" if place == "kernel" else "off"
    with pool_or(None, 1) as jobs:
        jobs.submit(CallJob(f"{__name__}:run_traced", (check_policies(scenario, "sched", jobs), policy, place, share, ticks), policy, "sched"))
        [(_, events)] = jobs.finished()
    window = (events["time_ns"] >= begin_ms * MS) & (events["time_ns"] < (begin_ms + for_ms) * MS)
    return events[window], {"scenario": scenario.name, "configuration": f"{policy}/{place}/{ticks}", "seed": scenario.run.seed, "timing": "modelled"}


def run_traced(scenario: Any, policy: str, place: Placement, share: float, ticks: Ticks, handling: int = 0) -> Any:
    """The events of one run. `handling`: see `waveos.ipu_emulator.job.watched`."""
    setup = replace(setup_of(scenario, policy, place), busy_share=share, ticks=ticks, trace=True)
    with watched(handling):
        return simulate(setup, handling).trace


def setup_of(scenario: Any, policy: str, placement: Placement) -> Setup:
    """One run of the scenario with its ticks on, at its first share of busy machines. Raises ConfigError."""
    if scenario.agent.message_ns == "measured":
        raise ConfigError('agent.message_ns = "measured": a scenario of virtual machines wants a number of nanoseconds')
    link = load_link(scenario.link.on_host, scenario.base) if placement == "on-host" else link_of(scenario)
    speed = link.relative_speed if scenario.agent.speed == "profile" else float(scenario.agent.speed)
    return Setup(
        policy=policy if policy == "kernel" else policy_file(scenario, policy),
        part=load_part(scenario.vm.part, scenario.base),
        guests=load_assumptions().guests,
        host=load_host(scenario.vm.host, scenario.base),
        link=link,
        placement=placement,
        params=scenario.policies.params.get(policy, {}),
        mitigations=tuple(scenario.link.mitigations),
        message_ns=float(scenario.agent.message_ns),
        speed=1.0 if placement == "on-host" else speed,
        machines=scenario.vm.machines,
        vcpus=scenario.vm.vcpus,
        cores=scenario.vm.cores,
        busy_share=scenario.vm.busy_shares[0],
        ticks=scenario.vm.ticks,
        warmup_ns=round(scenario.run.warmup_ms * MS),
        duration_ns=round(scenario.run.duration_ms * MS),
        seed=scenario.run.seed,
    )


def scaled_setup(scenario: Any, policy: str, placement: Placement, scale: Mapping[str, float], *, part: str = "", duration_ms: float = 0.0) -> Setup:
    """As `setup_of`, with assumed figures times `scale`; on another `part`, or for so long, if they are given."""
    setup = setup_of(scenario, policy, placement)
    costs = {name: round(getattr(setup.host, name) * scale[name]) for name in HOST_COSTS if name in scale}
    return replace(
        setup,
        part=load_part(part or scenario.vm.part, scenario.base, scale),
        guests=load_assumptions(scale).guests,
        host=setup.host.model_copy(update=costs),
        link=_scaled_link(setup.link, scale.get(LINK, 1.0)),
        message_ns=setup.message_ns * scale.get("message_ns", 1.0),
        duration_ns=round(duration_ms * MS) if duration_ms else setup.duration_ns,
    )


def _scaled_link(link: LinkProfile, factor: float) -> LinkProfile:
    """All costs of the link in ns times `factor`."""
    tables = {}
    for name in ("host", "agent", "wire", "doorbell"):
        table = getattr(link, name)
        scaled = {key: round(value * factor) for key, value in table.model_dump().items() if key.endswith("_ns")}
        tables[name] = table.model_copy(update=scaled)
    return link.model_copy(update=tables)
