"""A job: one run of an experiment, as it travels to a child process. The child makes the engine's setup of it and answers with a point.

This module is light, so that the parent of the processes is; the engine is imported where a job is opened.
"""

from __future__ import annotations

import ctypes
import math
import signal
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from pydantic import ValidationError

from waveos.errors import ConfigError
from waveos.explain import explain_key
from waveos.ipu_emulator.inputs import Arrivals, Inputs
from waveos.ipu_emulator.pool import SLICE_NS
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

    subsystem: ClassVar[str] = "sched"

    @property
    def policy(self) -> str:
        """The policy to name when it does not return."""
        return self.ask.configuration.policy


@dataclass(frozen=True)
class CallJob:
    """Call `MODULE:FUNCTION(*arguments)` in a child: a run of a model that knows no slices, or what the parent loads nothing for.

    With `subsystem` the function is told `handling` as well, and shows there which of that subsystem's messages the policy is at (`watched`).
    """

    function: str
    arguments: tuple[Any, ...]
    policy: str  # to name when the child dies, or the policy does not return
    subsystem: str = ""
    label: str = ""  # for progress


class OpenCallJob:
    """A call as the pool's child runs it: in one slice."""

    def __init__(self, job: CallJob, handling: int) -> None:
        self._job, self._handling = job, handling
        self._result: Any = None

    def advance(self, wall_ns: int) -> bool:
        """All of it."""
        module, _, function = self._job.function.partition(":")
        told = {"handling": self._handling} if self._job.subsystem else {}
        self._result = getattr(import_module(module), function)(*self._job.arguments, **told)
        return True

    def result(self) -> Any:
        """What the function says."""
        return self._result


def open_job(job: Job | CallJob, handling: int) -> OpenJob | OpenCallJob:
    """The job, ready to advance. `handling`: address of the word that tells which message the policy is at; 0: none."""
    return OpenCallJob(job, handling) if isinstance(job, CallJob) else OpenJob(job, handling)


class Inside:
    """A pool for what runs in a pool's child already: its jobs run here, one after the other, and tell the child's watchdog of themselves."""

    def __init__(self, handling: int) -> None:
        self._handling = handling
        self._queue: deque[tuple[int, Any]] = deque()
        self._submitted = 0

    def submit(self, setup: Any) -> int:
        """Add a job, as `Pool.submit`."""
        self._submitted += 1
        self._queue.append((self._submitted, setup))
        return self._submitted

    def finished(self) -> Iterator[tuple[int, Any]]:
        """Run the jobs in turn."""
        while self._queue:
            number, setup = self._queue.popleft()
            job = open_job(setup, self._handling)
            while not job.advance(SLICE_NS):
                pass
            yield number, job.result()


@contextmanager
def watched(handling: int) -> Iterator[None]:
    """While it lasts, the watchdog at `handling` is told that this process goes on; the run itself is told `watch=handling`, and stores which message its
    policy is at. A timer's signal says so, which Python hears between two calls of compiled code and not inside one. 0: nobody looks.
    """
    if not handling:
        yield
        return
    slices = _slices(handling)

    def go_on(_number: int, _frame: Any) -> None:
        slices.value += 2  # odd as before: still inside a slice

    with _ticking(go_on):
        yield


@contextmanager
def watched_plain(handling: int, types: Mapping[str, int]) -> Iterator[Callable[[str], None]]:
    """As `watched`, where policies are plain Python: what a run is to call with the name of each handler, and "" after it.

    `types`: the subsystem's messages. A handler that has something compiled or imported goes on.
    """
    if not handling:
        yield lambda name: None
        return
    slices, word = _slices(handling), ctypes.c_uint64.from_address(handling)

    def tell(name: str) -> None:
        word.value = types.get(name, types["resync"]) if name else 0  # `start` is what a RESYNC calls
        slices.value += 2

    def go_on(_number: int, frame: Any) -> None:
        while frame is not None:
            if str(frame.f_globals.get("__name__")).partition(".")[0] in _MAKING:
                slices.value += 2
                return
            frame = frame.f_back

    with _ticking(go_on):
        yield tell


_MAKING = ("numba", "llvmlite", "importlib", "_frozen_importlib")
"""Modules that compile or import what a plain policy calls for the first time."""


@contextmanager
def _ticking(act: Callable[[int, Any], None]) -> Iterator[None]:
    """Have `act` called each SLICE_NS, in between what Python does."""
    before = signal.signal(signal.SIGALRM, act)
    signal.setitimer(signal.ITIMER_REAL, SLICE_NS / 1e9, SLICE_NS / 1e9)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _slices(handling: int) -> ctypes.c_uint64:
    """The child's other word (`waveos.ipu_emulator.pool`), before this one: slices begun and ended."""
    return ctypes.c_uint64.from_address(handling - ctypes.sizeof(ctypes.c_uint64))


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


def policy_file(scenario: Any, name: str) -> str:
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
