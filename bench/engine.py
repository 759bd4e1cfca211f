"""The emulator's engine against SimPy, in requests simulated per second of one core.

Both simulate M/M/8 at load 0.8. The engine does it as in every experiment: the compiled FIFO policy behind its function pointer, messages and
decisions over a link, all costs 0. SimPy does it in its natural form: a `Resource` of capacity 8 and one process a job. Rounds are interleaved, each
whole call is timed, in CPU time of the process, so that neighbours on the machine do not decide (both are of one thread; on an idle machine it is real
time); figures are medians over the rounds; compilation comes before. Speeds are compared only if the two agree: both mean sojourn
times, over all rounds, must hold Erlang's formula and each other within 99.9 % intervals, else the benchmark ends with an error.

`offload_requests_per_s` is what an experiment is made of: a scenario (by default the demo's, with service times measured on this machine) with its policy
on the IPU, preemption, and every link operation charged.
"""

from __future__ import annotations

import random
import time
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import simpy

from waveos.bench.formulas import Exponential, mmc_mean
from waveos.bench.machine import describe_machine
from waveos.errors import ConfigError, WaveError
from waveos.ipu_emulator.statistics import Interval, mean_interval

OPTIONS = {
    "seed": (1, "seeds of all runs are derived from it"),
    "rounds": (5, "interleaved rounds; figures are their medians"),
    "jobs": (1_000_000, "jobs of M/M/8 a round for the engine"),
    "simpy_jobs": (100_000, "jobs of M/M/8 a round for SimPy"),
    "requests": (500_000, "requests a round of the scenario"),
    "scenario": ("rocksdb", "whose workload and link are simulated with offload"),
    "policy": ("shinjuku", "the scenario's policy"),
    "load": (0.7, "the scenario's offered load, as a share of its workers' capacity"),
}
SERVERS = 8
LOAD = 0.8
SERVICE_NS = 10_000
WARMUP_SHARE = 0.05
CHECKED = 200_000
"""Jobs of each round whose sojourn times the check looks at."""
CONFIDENCE = 0.999
"""Of the check that both simulate the same: an honest pair fails it in some three of a thousand runs."""


class Timed(NamedTuple):
    """One round of one simulator."""

    requests: int
    cpu_s: float
    sojourns_ns: Any

    @property
    def per_s(self) -> float:
        """Requests simulated in a second of CPU time."""
        return self.requests / self.cpu_s


def run(
    seed: int = 1,
    rounds: int = 5,
    jobs: int = 1_000_000,
    simpy_jobs: int = 100_000,
    requests: int = 500_000,
    scenario: str = "rocksdb",
    policy: str = "shinjuku",
    load: float = 0.7,
) -> dict[str, Any]:
    """Interleave the rounds, check that both simulators agree, and compare. Raises WaveError when they do not."""
    if rounds < 1 or min(jobs, simpy_jobs, requests) < 1_000 or not 0 < load < 1:
        raise ConfigError(
            f"rounds {rounds}, jobs {jobs} and {simpy_jobs}, requests {requests}, load {load}: at least 1 round, 1,000 jobs, 0 < load < 1"
        )
    offload = _prepare_offload(scenario, policy, load)
    seeds = [int(each) for each in np.random.SeedSequence(seed).generate_state(rounds)]
    simulate_mmc(2_000, seed=0)  # compile, or load what was compiled
    simulate_offload(offload, 2_000, seed=0)
    engine, peer, scene = [], [], []
    for each in seeds:
        engine.append(simulate_mmc(jobs, each))
        peer.append(simulate_with_simpy(simpy_jobs, each))
        scene.append(simulate_offload(offload, requests, each))
    means = _check_agreement(engine, peer)
    metrics = {
        "mmc_jobs_per_s": median(each.per_s for each in engine),
        "simpy_mmc_jobs_per_s": median(each.per_s for each in peer),
        "mmc_ratio": median(ours.per_s / theirs.per_s for ours, theirs in zip(engine, peer, strict=True)),
        "offload_requests_per_s": median(each.per_s for each in scene),
        "offload_ratio": median(ours.per_s / theirs.per_s for ours, theirs in zip(scene, peer, strict=True)),
        "mmc_mean_us": means[0].value / 1000,
        "mmc_mean_half_width_us": means[0].half_width / 1000,
        "simpy_mmc_mean_us": means[1].value / 1000,
        "simpy_mmc_mean_half_width_us": means[1].half_width / 1000,
        "theory_mean_us": _theory_ns() / 1000,
        "rounds": rounds,
    }
    return {"name": "engine", "metrics": metrics, "machine": describe_machine(), "timing": "measured", "verdict": _conclude(metrics)}


def simulate_mmc(jobs: int, seed: int) -> Timed:
    """M/M/8 by the engine, with nothing that costs time."""
    from waveos.ipu_emulator.sched import RequestClass, Service, Setup, simulate

    per_s = LOAD * SERVERS / SERVICE_NS * 1e9
    setup = Setup(
        policy="fifo",
        load_per_s=per_s,
        classes=(RequestClass("job", Service("exponential", mean_ns=SERVICE_NS)),),
        workers=SERVERS,
        seed=seed,
        duration_ns=round(jobs / per_s * 1e9),
        host="ideal",
        link="ideal",
        mitigations=(),
        samples=min(jobs, CHECKED),
    )
    begun = time.process_time()
    result = simulate(setup)
    cpu_s = time.process_time() - begun
    assert result.samples is not None
    return Timed(result.classes["job"].count, cpu_s, result.samples["sojourn_ns"])


def simulate_with_simpy(jobs: int, seed: int) -> Timed:
    """M/M/8 as SimPy's documentation would have it."""
    draw = random.Random(seed).expovariate
    sojourns: list[float] = []

    def serve(env: Any, servers: Any) -> Any:
        arrived = env.now
        with servers.request() as turn:
            yield turn
            yield env.timeout(draw(1 / SERVICE_NS))
        sojourns.append(env.now - arrived)

    def arrive(env: Any, servers: Any) -> Any:
        for _ in range(jobs):
            yield env.timeout(draw(LOAD * SERVERS / SERVICE_NS))
            env.process(serve(env, servers))

    begun = time.process_time()
    env = simpy.Environment()
    env.process(arrive(env, simpy.Resource(env, capacity=SERVERS)))
    env.run()
    return Timed(jobs, time.process_time() - begun, np.array(sojourns))


def simulate_offload(setup: Any, requests: int, seed: int) -> Timed:
    """The prepared scenario for about so many requests."""
    from dataclasses import replace

    from waveos.ipu_emulator.sched import simulate

    begun = time.process_time()
    result = simulate(replace(setup, seed=seed, duration_ns=round(requests / setup.load_per_s * 1e9), warmup_ns=0))
    cpu_s = time.process_time() - begun
    if result.saturated:
        raise WaveError(f"bench engine: {setup.policy} does not serve {setup.load_per_s:,.0f} requests/s; give a lower --load than was given")
    return Timed(sum(each.count for each in result.classes.values()), cpu_s, None)


def _prepare_offload(name: str, policy: str, load: float) -> Any:
    """The engine's setup for a scenario with its policy on the IPU."""
    from waveos.cli.running import gather_inputs
    from waveos.ipu_emulator.experiment import capacity_per_s
    from waveos.ipu_emulator.job import Ask, Configuration, Job, setup_of
    from waveos.scenario import load_scenario

    scenario = load_scenario(name, [("policies.names", [policy], "--policy")])
    inputs = gather_inputs(scenario)
    configuration = Configuration(policy, "offload", scenario.host.workers, mitigations=tuple(scenario.link.mitigations))
    return setup_of(Job(scenario, inputs, Ask(configuration, load * capacity_per_s(scenario, inputs), 1)))


def _check_agreement(engine: list[Timed], peer: list[Timed]) -> tuple[Interval, Interval]:
    """Both means, ns, if they agree with each other and with theory; raises WaveError if not."""
    ours, theirs = (mean_interval(np.concatenate([_settled(each) for each in runs]), confidence=CONFIDENCE) for runs in (engine, peer))
    apart = abs(ours.value - theirs.value)
    if apart > (ours.half_width**2 + theirs.half_width**2) ** 0.5 or not ours.holds(_theory_ns()) or not theirs.holds(_theory_ns()):
        raise WaveError(
            f"bench engine: mean sojourn {_show(ours)} here, {_show(theirs)} in SimPy, {_theory_ns() / 1000:.4g} us by Erlang: "
            "not the same queue, so speeds are not compared; try another --seed and report it if it stays"
        )
    return ours, theirs


def _settled(timed: Timed) -> Any:
    """The sojourns after the warm-up."""
    return timed.sojourns_ns[round(WARMUP_SHARE * len(timed.sojourns_ns)) :]


def _theory_ns() -> float:
    """The mean sojourn time of M/M/8 at load 0.8."""
    return mmc_mean(Exponential(SERVICE_NS), LOAD * SERVERS / SERVICE_NS, SERVERS)


def _show(interval: Interval) -> str:
    return f"{interval.value / 1000:.4g} ± {interval.half_width / 1000:.2g} us"


def _conclude(metrics: dict[str, Any]) -> str:
    """One line: how many times SimPy's speed."""
    enough = metrics["mmc_ratio"] >= 30 and metrics["offload_ratio"] >= 3
    return (
        f"{'reaches' if enough else 'does not reach'} what was asked: {metrics['mmc_ratio']:.1f} times SimPy on the same queue (at least 30), "
        f"{metrics['offload_ratio']:.1f} times with the whole link model (at least 3)"
    )
