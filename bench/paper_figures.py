"""The figures of `wave bench paper`, each obtained from the model of its subsystem, with any of the model's assumptions changed.

A figure is a function of a `Variation`; it runs in a process of its own, with no more state than its arguments.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from waveos.bench import net_model
from waveos.bench.paper_variation import FACTORS, Variation
from waveos.ipu_emulator import experiment
from waveos.ipu_emulator.inputs import Inputs
from waveos.ipu_emulator.job import Ask, Configuration, Job
from waveos.ipu_emulator.memory import experiment as memory
from waveos.ipu_emulator.memory import simulate
from waveos.ipu_emulator.net import experiment as net
from waveos.ipu_emulator.pool import Here
from waveos.ipu_emulator.profile import MITIGATIONS
from waveos.ipu_emulator.vm import experiment as vm
from waveos.ipu_emulator.vm import simulate as simulate_vm
from waveos.scenario import load_scenario

MEMORY_GIB = 256.0
"""The address space that SOL manages (issue of the memory subsystem: 256 GiB, scan periods 300 ms to 9.6 s)."""


class Effort(NamedTuple):
    """How hard a figure is measured."""

    seed: int = 1
    replications: int = 3
    resolution_share: float = 0.005
    requests: int = 200_000
    memory_s: float = 38.4  # virtual seconds that count
    memory_gib: float = MEMORY_GIB
    vm_ms: float = 200.0
    vm_busy_shares: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75, 1.0)


def vm_variations() -> list[Variation]:
    """Each assumed figure of the VM model halved and doubled, and all at once. They are named by the model, not by file and key."""
    names = tuple(f"vm:{name}" for name in vm.assumed_names())
    groups = [(name, (name,)) for name in names] + [("all of them", names)]
    return [Variation(f"{name} x {factor:g}", keys, factor) for name, keys in groups for factor in FACTORS]


def offload_cost(workload: Mapping[str, str], variation: Variation, effort: Effort) -> float:
    """Throughput lost by moving the agent from a host core to the IPU beside the same workers, as a share."""
    ways = {"sched": _sched_cost, "net": _net_cost, "memory": _memory_cost, "vm": _vm_cost}
    with tempfile.TemporaryDirectory(prefix="wave-paper-") as folder:
        return ways[workload["subsystem"]](workload, variation, effort, Path(folder))


def vm_gains(workload: Mapping[str, str], variation: Variation, effort: Effort) -> dict[str, float]:
    """What virtual machines gain when they are scheduled from the IPU with the host's ticks off: the most over loads, and its parts."""
    scale = {key.removeprefix("vm:"): variation.factor for key in variation.keys}
    found = vm.gains(scale, busy_shares=effort.vm_busy_shares, duration_ms=effort.vm_ms, policy=workload["policy"])
    return {name: found[name] for name in ("vm_gain_max", "vm_gain_from_ticks", "vm_gain_from_sleep", "vm_gain_from_turbo")}


def unmitigated_slowdown(workload: Mapping[str, str], variation: Variation, effort: Effort) -> float:
    """Time of a decision without any mitigation, as a multiple of one with all: runnable until switched to, where requests do not meet each other."""
    with tempfile.TemporaryDirectory(prefix="wave-paper-") as folder:
        scenario, inputs = _sched(workload, variation, effort, Path(folder))
        load = experiment.UNLOADED_SHARE * experiment.capacity_per_s(scenario, inputs)
        pool = Here()
        asks = [Ask(Configuration(workload["policy"], "offload", scenario.host.workers, "", each), load, effort.seed) for each in ((), MITIGATIONS)]
        numbers = [pool.submit(Job(scenario, inputs, ask)) for ask in asks]
        points = {number: point for number, (point, _) in pool.finished()}
    without, full = (points[number]["ready_to_running_p50_us"] for number in numbers)
    return float(without / full)


def memory_cores_saved(workload: Mapping[str, str], variation: Variation, effort: Effort) -> float:
    """Host cores that the memory's management takes with its policy on the host, less those with it on the IPU."""
    with tempfile.TemporaryDirectory(prefix="wave-paper-") as folder:
        on_host, offloaded = _memory(workload, variation, effort, Path(folder), effort.memory_gib)
    return memory.cores(on_host, "on-host")["host_cores"] - memory.cores(offloaded, "offload")["host_cores"]


def rpc_cores_saved(workload: Mapping[str, str], variation: Variation, effort: Effort) -> float:
    """Host cores of a service with its RPC stack on the host, less those with it on the IPU."""
    metrics: dict[str, Any] = {}
    net_model.account_cores(metrics, effort.seed, effort.requests, variation.read("net/rpc"))
    return float(metrics["model_host_cores_saved"])


def _sched(workload: Mapping[str, str], variation: Variation, effort: Effort, folder: Path) -> tuple[Any, Inputs]:
    """The scenario and what it reads; its changed profiles lie in `folder`, where each run looks for them."""
    settings = {
        "link.profile": variation.file("links/mount-evans", folder),
        "link.on_host": variation.file("links/on-host", folder),
        "host.profile": variation.file("hosts/server", folder),
        "policies.names": [workload["policy"]],
        "workload.loads_per_s": [30_000, 90_000, 150_000],  # where the search for saturation begins
        "run.seed": effort.seed,
        "run.replications": effort.replications,
        "run.resolution_share": effort.resolution_share,
    }
    scenario = load_scenario(workload["scenario"], [(key, value, "bench paper") for key, value in settings.items()])
    return scenario, Inputs({}, {workload["policy"]: float(scenario.agent.message_ns)}, None)


def _sched_cost(workload: Mapping[str, str], variation: Variation, effort: Effort, folder: Path) -> float:
    scenario, inputs = _sched(workload, variation, effort, folder)
    compared = experiment.Comparison(scenario, inputs, link={}, only=lambda each: each.world == "offload" or each.column == "same workers")
    compared.run(Here(), compared.searches())
    [offloaded] = [each for each in compared.results()["configs"] if each["world"] == "offload"]
    return float(offloaded["cost_share"]["same workers"])


def _net_cost(workload: Mapping[str, str], variation: Variation, effort: Effort, folder: Path) -> float:
    settings = {
        "service.costs": variation.file("net/rpc", folder),
        "policies.names": [workload["policy"]],
        "workload.loads_share": [0.8],  # throughput at the goal is searched; the grid would only be run besides
        "run.requests": effort.requests,
        "run.resolution_share": effort.resolution_share,
        "run.seed": effort.seed,
    }
    results = net.compare(load_scenario(workload["scenario"], [(key, value, "bench paper") for key, value in settings.items()]))
    rates = {each["placement"]: each["figures"]["goal_per_s"] for each in results["configs"]}
    return float(1 - rates["offload"] / rates["on-host"])


def _memory_cost(workload: Mapping[str, str], variation: Variation, effort: Effort, folder: Path) -> float:
    on_host, offloaded = _memory(workload, variation, effort, folder, min(8.0, effort.memory_gib))
    return 1 - offloaded["throughput_ratio"] / on_host["throughput_ratio"]


def _vm_cost(workload: Mapping[str, str], variation: Variation, effort: Effort, folder: Path) -> float:
    """Of the guests' performance, every machine busy, the host's ticks off."""
    scale = {key.removeprefix("vm:"): variation.factor for key in variation.keys}
    scenario = load_scenario(workload["scenario"], [f"run.seed={effort.seed}"])
    on_host, offloaded = (
        replace(vm.scaled_setup(scenario, workload["policy"], place, scale), busy_share=1.0, ticks="off", duration_ns=round(effort.vm_ms * 1e6))
        for place in vm.PLACEMENTS
    )
    return 1 - simulate_vm(offloaded).figures["performance"] / simulate_vm(on_host).figures["performance"]


def _memory(workload: Mapping[str, str], variation: Variation, effort: Effort, folder: Path, gib: float) -> tuple[dict[str, float], dict[str, float]]:
    """What a run gave with the policy on the host, and with it on the IPU."""
    settings = {
        "memory.gib": gib,
        "memory.costs": variation.file("memory/zram", folder),
        "link.profile": variation.file("links/mount-evans", folder),
        "link.on_host": variation.file("links/on-host", folder),
        "access.workers": max(1, round(gib / 2)),
        "run.seed": effort.seed,
        "run.duration_s": effort.memory_s,
    }
    scenario = load_scenario(workload["scenario"], [(key, value, "bench paper") for key, value in settings.items()])
    on_host, offloaded = (simulate(memory.setup_of(scenario, workload["policy"], place)).figures for place in ("on-host", "offload"))
    return on_host, offloaded
