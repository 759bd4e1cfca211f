"""The network's model in figures: host cores that the RPC stack takes and leaves, throughput under a tail goal, and how it agrees with queueing theory."""

from __future__ import annotations

import heapq
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from waveos import ipu_emulator
from waveos.bench import formulas
from waveos.errors import WaveError
from waveos.ipu_emulator.net import RequestClass, Setup, simulate, throughput_at

HALF_WIDTH = 0.02
"""Widest interval of the comparison with theory."""
FLOWS = 1 << 22
GOAL_US = 100.0


def read_rpc() -> dict[str, Any]:
    """The costs of an RPC stack (`ipu_emulator/data/net/rpc.toml`)."""
    return tomllib.loads((Path(ipu_emulator.__path__[0]) / "data" / "net" / "rpc.toml").read_text())


def account_cores(metrics: dict[str, Any], seed: int, requests: int, rpc: dict[str, Any] | None = None) -> list[str]:
    """Host cores of a service with its RPC stack on the host and on the IPU. The stack's cost is what recvmmsg's echo took here, if that was measured.

    `rpc`: other costs than those of `read_rpc`.
    """
    rpc = rpc or read_rpc()
    service, speed = rpc["service"], rpc["relative_speed"]
    stack_ns = metrics.get("mmsg_server_ns_per_packet", rpc["stack_ns"])
    where = "measured here" if "mmsg_server_ns_per_packet" in metrics else "as measured for rpc.toml"
    stack = {"stack_in_ns": round(stack_ns * rpc["in_share"]), "stack_out_ns": round(stack_ns * (1 - rpc["in_share"]))}
    ways = {key: rpc[key] for key in ("to_agent_ns", "to_host_ns", "pick_up_ns", "message_ns", "decision_ns")}
    classes = [RequestClass(1.0, service["mean_ns"])]
    on_host = Setup("jbsq", service["workers"], classes, **stack)
    on_ipu = Setup("jbsq", service["workers"], classes, **ways, **{key: round(value / speed) for key, value in stack.items()})
    cores = {name: _cores_needed(setup, service, seed, requests) for name, setup in (("host", on_host), ("ipu", on_ipu))}
    metrics["model_stack_ns_per_request"] = stack_ns
    metrics["model_host_cores_on_host"] = service["workers"] + cores["host"]
    metrics["model_host_cores_offloaded"] = service["workers"]
    metrics["model_host_cores_saved"] = cores["host"]
    metrics["model_ipu_stack_cores"] = cores["ipu"]
    return [
        f"RPC stack, {stack_ns / 1e3:.1f} us a request ({where}), {service['rate_per_s'] / 1e6:g} M requests/s (chosen): {cores['host']} host cores saved by "
        f"{cores['ipu']} IPU cores; published: 8 saved (Wave)"
    ]


def _cores_needed(setup: Setup, service: dict[str, Any], seed: int, requests: int) -> int:
    """The fewest stack cores with which the service meets its goal."""
    per_request_ns = setup.stack_in_ns + setup.stack_out_ns
    for cores in range(max(1, int(service["rate_per_s"] * per_request_ns / 1e9)), 65):
        outcome = simulate(replace(setup, stack_cores=cores), service["rate_per_s"], requests=requests, seed=seed)
        if outcome.dropped == 0 and outcome.quantile_us(0.99) <= service["goal_p99_us"]:
            return cores
    raise WaveError("no number of stack cores meets the goal of rpc.toml")


def compare_throughput(metrics: dict[str, Any], seed: int, requests: int) -> list[str]:
    """Throughput at which GETs keep their goal, steered by class and slack against RSS; and one class of exponential service, as RPCValet has it."""
    workers = 16
    mixed = [RequestClass(0.995, 10_000.0, "fixed", slo_ns=100_000), RequestClass(0.005, 1_000_000.0, "fixed", slo_ns=20_000_000)]
    most = workers / sum(each.share * each.mean_ns / 1e9 for each in mixed)
    setups = {name: Setup(name, workers, mixed, flows=FLOWS) for name in ("rss", "jbsq", "slo_steering")}
    setups["apart"] = replace(setups["rss"], workers_sort=True)  # steered by the hash, then scheduled by deadline where it has landed
    rates = {
        name: throughput_at(
            setup,
            lambda outcome: outcome.quantile_us(0.99, 0) <= GOAL_US,
            0.005 * most,
            0.999 * most,
            requests=requests,
            seed=seed,
        )
        for name, setup in setups.items()
    }
    for name, rate in rates.items():
        metrics[f"model_{name.partition('_')[0]}_rate_at_slo"] = rate
    metrics["model_slo_throughput_gain"] = rates["slo_steering"] / rates["rss"]
    metrics["model_together_over_apart"] = rates["slo_steering"] / rates["apart"]
    plain = [RequestClass(1.0, 10_000.0)]
    same = {
        policy: throughput_at(
            Setup(policy, workers, plain, flows=FLOWS, params=params),
            lambda outcome: outcome.quantile_us(0.99) <= GOAL_US,
            0.1 * workers / 10e-6,
            0.999 * workers / 10e-6,
            requests=requests,
            seed=seed,
        )
        for policy, params in (("rss", {}), ("jbsq", {"bound": 1.0}))
    }
    metrics["model_exponential_throughput_gain"] = same["jbsq"] / same["rss"]
    return [
        f"model: throughput at GET p99 <= {GOAL_US:g} us {metrics['model_slo_throughput_gain']:.1f}x RSS with 0.5 % of requests 100 times as long "
        f"({metrics['model_together_over_apart']:.1f}x the hash with workers that take the next deadline first), "
        f"{metrics['model_exponential_throughput_gain']:.2f}x with exponential service (RPCValet, on its own workloads: up to 1.4x)",
    ]


def check_theory(metrics: dict[str, Any], seed: int, *, load: float = 0.7, workers: int = 8, runs: int = 10, requests: int = 400_000) -> list[str]:
    """Mean latencies: RSS is so many M/G/1 queues, one queue is M/G/k (exact for exponential service; else by the recursion of Kiefer and Wolfowitz)."""
    mean_s = 10e-6
    mixed = formulas.Hyperexponential.mix((0.95, 0.05), (5e-6, 105e-6))
    cases: dict[str, tuple[Any, RequestClass]] = {
        "fixed": (formulas.Fixed(mean_s), RequestClass(1.0, 10_000.0, "fixed")),
        "exponential": (formulas.Exponential(mean_s), RequestClass(1.0, 10_000.0)),
        "bimodal": (mixed, RequestClass(1.0, 10_000.0, "hyper", phases=((0.95, 5_000.0), (0.05, 105_000.0)))),
    }
    student = float(stats.t.ppf(0.975, runs - 1))
    rate, widest, wrong = load * workers / mean_s, 0.0, 0
    for name, (service, request_class) in cases.items():
        for policy, params in (("rss", {}), ("jbsq", {"bound": 1.0})):
            setup = Setup(policy, workers, [request_class], params=params, flows=FLOWS)
            n = 5 * requests if name == "bimodal" else requests
            means = np.array([simulate(setup, rate, requests=n, seed=seed + k).mean_us for k in range(runs)])
            if policy == "rss":
                truth = np.array([formulas.fcfs_mean(service, rate / workers) / 1e-6])
            elif name == "exponential":
                truth = np.array([formulas.mmc_mean(service, rate, workers) / 1e-6])
            else:
                truth = np.array([_recursion(name, rate, workers, n, seed + 1_000 + k) for k in range(runs)])
            # Where the truth is numerical both sides have errors.
            error_of_mean = np.sqrt(means.var(ddof=1) / runs + (truth.var(ddof=1) / runs if len(truth) > 1 else 0.0))
            width, error = student * float(error_of_mean) / float(truth.mean()), float(means.mean() / truth.mean() - 1)
            metrics[f"theory_{policy}_{name}_error"], metrics[f"theory_{policy}_{name}_interval"] = error, width
            widest, wrong = max(widest, width), wrong + (abs(error) > max(width, 0.005))
    metrics["theory_widest_interval"], metrics["theory_disagreements"] = widest, wrong
    verdict = "agrees with theory in all 6 cases" if not wrong else f"disagrees with theory in {wrong} of 6 cases"
    return [f"the model {verdict} (intervals at most {widest:.1%}{'' if widest <= HALF_WIDTH else ', wider than the 2 % that are wanted'})"]


def _recursion(kind: str, rate: float, workers: int, n: int, seed: int) -> float:
    """Mean sojourn in us of an M/G/k queue by Kiefer and Wolfowitz' recursion of ordered workloads: independent of the model, with NumPy's random numbers."""
    random = np.random.default_rng(seed)
    gaps = random.exponential(1 / rate, n)
    if kind == "fixed":
        services = np.full(n, 10e-6)
    else:
        services = np.where(random.random(n) < 0.95, random.exponential(5e-6, n), random.exponential(105e-6, n))
    arrivals = np.cumsum(gaps).tolist()
    free = [0.0] * workers
    total = 0.0
    warm = n // 10
    for i, (arrival, service) in enumerate(zip(arrivals, services.tolist(), strict=True)):
        begin = max(arrival, free[0])
        heapq.heapreplace(free, begin + service)
        if i >= warm:
            total += begin + service - arrival
    return total / (n - warm) / 1e-6
