"""A job: one run of an experiment, as it travels to a child process. The child makes the engine's setup of it and answers with a point.

This module is light, so that the parent of the processes is; the engine is imported where a job is opened.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import ValidationError

from waveos.errors import ConfigError
from waveos.explain import explain_key
from waveos.ipu_emulator.inputs import Arrivals, Inputs
from waveos.ipu_emulator.profile import MITIGATIONS, HostProfile, LinkProfile, load_host, load_link
from waveos.names import nearest, split_policy_file
from waveos.scenario import RequestClass, Scenario

if TYPE_CHECKING:
    from waveos.ipu_emulator import sched

KERNEL_POLICY = "kernel"
"""What the kernel does by itself."""


@dataclass(frozen=True)
class Configuration:
    """One way to run the host: a policy, where it decides, how many workers it has, and which mitigations the link uses."""

    policy: str
    world: str  # "kernel", "on-host" or "offload"
    workers: int
    column: str = ""  # for on-host: "same workers" or "same machine"
    mitigations: tuple[str, ...] = MITIGATIONS

    @property
    def id(self) -> str:
        """Its name in results: "kernel", "fifo/offload", "fifo/on-host same machine"."""
        return self.world if self.world == "kernel" else f"{self.policy}/{self.world}" + (f" {self.column}" if self.column else "")


class Ask(NamedTuple):
    """A run that is wanted."""

    configuration: Configuration
    load_per_s: float
    seed: int


@dataclass(frozen=True)
class Job:
    """A run, with all that it needs. `trace_for_ns`: record this much from `trace_from_ns` on; 0: nothing."""

    scenario: Scenario
    inputs: Inputs
    ask: Ask
    trace_from_ns: int = 0
    trace_for_ns: int = 0

    @property
    def policy(self) -> str:
        """The policy to name when it does not return."""
        return self.ask.configuration.policy


@dataclass(frozen=True)
class CostJob:
    """Call `MODULE:FUNCTION(policies, params)` in a child, so that the parent loads nothing for it: what the policies' messages cost on this machine."""

    measure: str
    policies: tuple[str, ...]
    params: Mapping[str, Mapping[str, float]]

    @property
    def policy(self) -> str:
        """The policies to name when the child dies."""
        return ", ".join(self.policies)


class OpenCostJob:
    """A cost job as the pool's child runs it."""

    def __init__(self, job: CostJob) -> None:
        self._job = job

    def advance(self, wall_ns: int) -> bool:
        """Nothing is done in slices."""
        return True

    def result(self) -> Any:
        """What the function says, ns by policy."""
        module, _, function = self._job.measure.partition(":")
        return getattr(import_module(module), function)(self._job.policies, self._job.params)


def open_job(job: Job | CostJob, handling: int) -> OpenJob | OpenCostJob:
    """The job, ready to advance. `handling`: address of the word that tells which message the policy is at; 0: none."""
    return OpenCostJob(job) if isinstance(job, CostJob) else OpenJob(job, handling)


@dataclass
class OpenJob:
    """A run as the pool's child runs it: `advance` in slices, then `result`."""

    job: Job
    handling: int
    simulation: Any = field(init=False)

    def __post_init__(self) -> None:
        from waveos.ipu_emulator.sched import Simulation

        self.simulation = Simulation(setup_of(self.job), self.handling)

    def advance(self, wall_ns: int) -> bool:
        """Go on for about so much wall time; True when the run is over."""
        done: bool = self.simulation.advance(wall_ns)
        return done

    def result(self) -> tuple[dict[str, Any], Any]:
        """The point, and the trace or None."""
        result = self.simulation.result()
        return point_of(self.job.ask, result), result.trace


def host_of(scenario: Scenario) -> HostProfile:
    """The scenario's host profile with its own costs over it. Raises ConfigError."""
    profile = load_host(scenario.host.profile, scenario.base)
    return _replaced(profile, "host.costs", scenario.host.costs) if scenario.host.costs else profile


def link_of(scenario: Scenario) -> LinkProfile:
    """The scenario's link profile with its own costs over it; a profile with changed costs is no longer verified. Raises ConfigError."""
    profile = load_link(scenario.link.profile, scenario.base)
    return _replaced(profile, "link.costs", scenario.link.costs) if scenario.link.costs else profile


def policy_file(scenario: Scenario, name: str) -> str:
    """A policy's name as `load_policy` takes it: a file is looked for here, then beside the scenario."""
    from pathlib import Path

    found = split_policy_file(name)
    if found is None or Path(found[0]).is_file() or not (scenario.base / found[0]).is_file():
        return name
    return f"{scenario.base / found[0]}{':' if found[1] else ''}{found[1]}"


def setup_of(job: Job) -> sched.Setup:
    """The engine's setup of a job."""
    from waveos.ipu_emulator.sched import Setup

    scenario, inputs, (configuration, load_per_s, seed) = job.scenario, job.inputs, job.ask
    on_host = configuration.world == "on-host"
    kernel = configuration.world == "kernel"
    speed = scenario.agent.speed
    run_ns = round(1e6 * (scenario.run.warmup_ms + scenario.run.duration_ms))
    return Setup(
        policy=configuration.policy if kernel else policy_file(scenario, configuration.policy),
        params={} if kernel else dict(scenario.policies.params.get(configuration.policy, {})),
        load_per_s=load_per_s,
        classes=tuple(_class_of(each, inputs) for each in scenario.workload.classes),
        placement=configuration.world,  # type: ignore[arg-type]  # one of the three
        workers=configuration.workers,
        threads=scenario.host.threads,
        seed=seed,
        duration_ns=round(1e6 * scenario.run.duration_ms),
        warmup_ns=round(1e6 * scenario.run.warmup_ms),
        host=host_of(scenario),
        link=load_link(scenario.link.on_host, scenario.base) if on_host else link_of(scenario),
        mitigations=configuration.mitigations,
        message_ns=0.0 if kernel else inputs.message_ns[configuration.policy],
        speed=1.0 if on_host else None if speed == "profile" else speed,
        queue=max(65_536, 4 * scenario.host.threads),
        arrivals=None if inputs.arrivals is None else _requests(inputs.arrivals, load_per_s, run_ns),
        trace_from_ns=job.trace_from_ns,
        trace_for_ns=job.trace_for_ns,
    )


def point_of(ask: Ask, result: sched.Result) -> dict[str, Any]:
    """A run's result as it stands in the results file: times in us, None where nothing was counted."""
    classes = {
        name: {
            "count": of.count,
            "unfinished": of.unfinished,
            "p50_us": _us(of.p50_ns),
            "p99_us": _us(of.p99_ns),
            "p999_us": _us(of.p999_ns),
            "mean_us": _us(of.mean_ns),
        }
        for name, of in result.classes.items()
    }
    return {
        "load_per_s": ask.load_per_s,
        "seed": ask.seed,
        "throughput_per_s": result.throughput_per_s,
        "saturated": result.saturated,
        "classes": classes,
        "host_cores_policy": result.host_cores_policy,
        "worker_busy_share": result.worker_busy_share,
        "agent_busy_share": result.agent_busy_share,
        "stale_share": result.stale_share,
        "stale_age_p50_us": _us(result.stale_age_p50_ns),
        "stale_age_p99_us": _us(result.stale_age_p99_ns),
        "decision_age_p50_us": _us(result.age_p50_ns),
        "decision_age_p99_us": _us(result.age_p99_ns),
        "ready_to_running_p50_us": _us(result.decision_p50_ns),
        "ready_to_running_p99_us": _us(result.decision_p99_ns),
        "preemptions": result.preemptions,
        "switches": result.switches,
        "outcomes": {name: count for name, count in result.outcomes.items() if count},
        "overflowed": result.overflowed,
        "resyncs": result.resyncs,
        "events": result.events,
        "trace_hash": result.trace_hash,
    }


def _class_of(each: RequestClass, inputs: Inputs) -> sched.RequestClass:
    from waveos.ipu_emulator import sched

    service = each.service
    random_us = service.exponential_us or service.erlang_us or service.lognormal_us or 0.0
    phases = zip(service.shares or (), service.hyperexponential_us or (), strict=True)
    drawn = sched.Service(
        form=service.form,  # type: ignore[arg-type]  # the scenario's forms are the engine's
        fixed_ns=1e3 * (service.fixed_us or 0.0),
        mean_ns=1e3 * random_us,
        stages=service.stages or 1,
        sigma=service.sigma or 0.0,
        phases=tuple((share, 1e3 * mean_us) for share, mean_us in phases),
        samples=None if service.samples is None else inputs.samples[service.samples],
    )
    return sched.RequestClass(name=each.name, service=drawn, share=each.share, slo_ns=round(1e3 * each.slo_us), qos=each.qos)


def _requests(trace: Arrivals, load_per_s: float, run_ns: int) -> Any:
    """The trace as the engine's requests, its time stretched to the load, over and over until the run ends."""
    import numpy as np

    from waveos.ipu_emulator.sched.machine import REQUEST

    count = len(trace.time_ns)
    lap_ns = count * 1e9 / load_per_s  # one mean gap separates the last request from the first of the next lap
    once_ns = trace.time_ns * (lap_ns * (count - 1) / count / max(1, int(trace.time_ns[-1])))
    laps = max(1, math.ceil(run_ns / lap_ns))
    requests = np.zeros(laps * count, REQUEST)
    requests["arrival_ns"] = np.rint(np.concatenate([once_ns + lap * lap_ns for lap in range(laps)]))
    requests["request_class"] = np.tile(trace.request_class, laps)
    requests["service_ns"] = np.maximum(1, np.tile(trace.service_ns, laps))
    requests["number"] = np.arange(laps * count)
    return requests[: np.searchsorted(requests["arrival_ns"], run_ns)]


def _replaced(profile: Any, where: str, costs: dict[str, Any]) -> Any:
    """The profile with some costs replaced. Raises ConfigError on one that it does not have."""
    raw = profile.model_dump()
    for key, value in costs.items():
        if key not in raw or isinstance(raw[key], dict) != isinstance(value, dict):
            tables = [each for each in raw if isinstance(raw[each], dict) == isinstance(value, dict)]
            raise ConfigError(f"{where}.{key}: the profile {profile.name!r} has no such cost{nearest(key, tables)}; it has {', '.join(tables)}")
        if isinstance(value, dict):
            if unknown := [inner for inner in value if inner not in raw[key]]:
                raise ConfigError(f"{where}.{key}: {explain_key(unknown[0], value[unknown[0]], [each for each in raw[key] if each != 'source'])}")
            raw[key] |= value
        else:
            raw[key] = value
    raw["verified"] = False
    raw["source"] = f"{raw['source']}; {where} of the scenario replace some costs"
    try:
        return type(profile).model_validate(raw)
    except ValidationError as errors:
        first = errors.errors()[0]
        raise ConfigError(f"{where}.{'.'.join(map(str, first['loc']))} = {first['input']!r}: {first['msg'].lower()}") from None


def _us(ns: float) -> float | None:
    return ns / 1000 if math.isfinite(ns) else None
