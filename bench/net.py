"""AF_XDP against sockets (packets/s, round trips); steering policies through three namespaces; the RPC stack's cores and steering in the model.

Live figures are of this machine: kernel work of both ends shares its cores with the benchmark. On fewer than four cores the service is a timed wait, drawn
from RocksDB's service times measured here and stretched so that the kernel's timers can keep them. Modelled costs are assumed ones: `rpc.toml` says so.
"""

from __future__ import annotations

import contextlib
import os
import time
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from waveos import ipu_emulator
from waveos.bench import formulas
from waveos.bench.machine import describe_machine
from waveos.errors import ConfigError, MissingError, WaveError
from waveos.host.net import topology
from waveos.ipu_emulator.net import RequestClass, Setup, simulate, throughput_at

OPTIONS = {
    "rounds": (5, "rounds of the echo comparison, in which each server has its turn"),
    "seconds": (0.4, "of each turn"),
    "payload": (86, "bytes of a UDP packet's payload, 22 or more; headers and all a multiple of 8"),
    "window": (512, "packets under way at most in the comparison of packets/s"),
    "live_seconds": (4.0, "of each live run of a policy"),
    "live_rounds": (3, "live runs of each policy, interleaved"),
    "load": (0.6, "of the live workers"),
    "range_share": (0.005, "of RANGE among the live requests"),
    "stretch": (100.0, "factor on RocksDB's service times in the live comparison"),
    "live": (True, "false: the model alone"),
    "seed": (1, "seed of all loads"),
}
PORT = 5_000
LIVE = ("rss", "jbsq", "slo_steering")
GET_SLO_US, RANGE_SLO_US = 50, 5_000  # before stretching
SAMPLES = 200_000
HALF_WIDTH = 0.02
"""Widest interval of the comparison with theory."""


def run(**options: Any) -> dict[str, Any]:
    """See OPTIONS. Raises MissingError where the live half cannot run; `live=False` leaves it out."""
    chosen = {key: value[0] if isinstance(value, tuple) else value for key, value in OPTIONS.items()} | options
    metrics: dict[str, Any] = {}
    notes = []
    if chosen["live"]:
        if os.geteuid():
            raise MissingError("bench net: namespaces and AF_XDP want root; --live false runs the model alone")
        notes += _echo(metrics, chosen)
        notes += _steering(metrics, chosen)
    notes += _model(metrics, chosen["seed"])
    notes += _theory(metrics, chosen["seed"])
    return {
        "name": "net",
        "metrics": metrics,
        "machine": describe_machine(),
        "timing": "measured" if chosen["live"] else "modelled",
        "verdict": "; ".join(notes),
    }


# ── packets/s and round trips ─────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def _peers(network: topology.Network, payload: int) -> Iterator[list[Any]]:
    from waveos.bench.net_peers import KINDS, Peer

    core = max(os.sched_getaffinity(0))
    peers: list[Any] = []
    try:
        for i, kind in enumerate(KINDS):
            peers.append(Peer(network, kind, PORT + i, core, payload))
        yield peers
    finally:
        for peer in peers:
            peer.close()


def _echo(metrics: dict[str, Any], options: dict[str, Any]) -> list[str]:
    from waveos.host.xsk import PACKET, Port
    from waveos.host.xsk.generator import BATCH, TALLY, generate, udp_packet
    from waveos.primitives import clock_ns

    if (42 + options["payload"]) % 8 or options["payload"] < 24:
        raise ConfigError(f"--payload {options['payload']}: 42 bytes of headers and it make a multiple of 8, from 30 on; for example 86")
    pps: dict[str, list[float]] = {}
    rtt_us: dict[str, list[float]] = {}
    flood: list[float] = []
    shares: dict[str, list[tuple[float, float]]] = {}
    affinity = os.sched_getaffinity(0)
    with contextlib.ExitStack() as stack:
        network = stack.enter_context(topology.network(f"bench-{os.getpid()}", direct=True))
        peers = stack.enter_context(_peers(network, options["payload"]))
        os.sched_setaffinity(0, {min(affinity)})
        stack.callback(os.sched_setaffinity, 0, affinity)
        ports = {}

        def turn(peer: Any, seconds: float, window: int) -> tuple[float, float, npt.NDArray[np.int64]]:
            """(packets/s sent, packets/s back, round trips in ns)."""
            if peer.port not in ports:
                with topology.inside(network.client.namespace):
                    ports[peer.port] = Port.open("eth0", port=peer.port, from_client=False)
            port = ports[peer.port]
            packet = np.frombuffer(
                udp_packet(
                    (network.client.mac, network.client.address, 4_000),
                    (network.host.mac, network.host.address, peer.port),
                    bytes(options["payload"]),
                ),
                np.uint8,
            )
            packets, tally, rtt_ns = np.zeros(BATCH, PACKET), np.zeros(1, TALLY), np.zeros(1 << 20, np.int64)
            arguments = (port.xsk.record[0], port.frames.record[0], packets, packet, tally[0], rtt_ns, port.heartbeat_at, 0, window)
            generate(*arguments, 0)  # compiles
            generate(*arguments, clock_ns() + 50_000_000)
            first, begin = tally.copy(), clock_ns()
            generate(*arguments, begin + int(seconds * 1e9))
            span_s = (clock_ns() - begin) / 1e9
            sent, back = ((int(tally[name][0]) - int(first[name][0])) / span_s for name in ("sent", "back"))
            return sent, back, rtt_ns[int(first["timed"][0]) : int(tally["timed"][0])]

        for _ in range(options["rounds"]):
            for peer in peers:
                peer.go()
                try:
                    with contextlib.ExitStack() as closing:
                        closing.callback(lambda: ports.pop(peer.port).close())  # noqa: B023
                        before = peer.system_s(), os.times().system, time.monotonic()
                        pps.setdefault(peer.kind, []).append(turn(peer, options["seconds"], options["window"])[1])
                        span_s = time.monotonic() - before[2]
                        shares.setdefault(peer.kind, []).append(((peer.system_s() - before[0]) / span_s, (os.times().system - before[1]) / span_s))
                        if peer.kind == "xsk":  # without a window: as much as the generator can, answered or not
                            flood.append(turn(peer, options["seconds"], 1 << 40)[0])
                    with contextlib.ExitStack() as closing:
                        closing.callback(lambda: ports.pop(peer.port).close())  # noqa: B023
                        trips = turn(peer, options["seconds"], 1)[2]
                    if len(trips):
                        rtt_us.setdefault(peer.kind, []).append(float(np.median(trips)) / 1e3)
                finally:
                    peer.stop()
    for kind in pps:
        metrics[f"{kind}_pps"] = float(np.median(pps[kind]))
        metrics[f"{kind}_server_kernel_share"], metrics[f"{kind}_generator_kernel_share"] = np.median(shares[kind], axis=0).tolist()
        metrics[f"{kind}_rtt_p50_us"] = float(np.median(rtt_us[kind])) if rtt_us.get(kind) else float("nan")
    metrics["generator_pps"] = float(np.median(flood))
    against_mmsg, against_socket = (float(np.median(np.array(pps["xsk"]) / np.array(pps[kind]))) for kind in ("mmsg", "socket"))
    metrics["xsk_over_mmsg"], metrics["xsk_over_socket"] = against_mmsg, against_socket
    return [
        f"AF_XDP echoes {against_mmsg:.1f}x recvmmsg and {against_socket:.1f}x a Python socket (medians of {options['rounds']} interleaved rounds)"
    ]


# ── steering, live ────────────────────────────────────────────────────────────────────────────────────────────────────


def _times(stretch: float) -> list[npt.NDArray[np.int64]]:
    from waveos.host import rocksdb

    measured = rocksdb.measure_once()
    return [np.maximum(1, (np.asarray(each) * stretch)).astype(np.int64) for each in (measured.get_ns, measured.range_ns)]


def _slo_parameters(slo_us: tuple[int, int]) -> tuple[str, ...]:
    """GETs cannot wait, RANGEs can, and leave half of the workers to them."""
    return "--param", f"patient_us={2 * slo_us[0]}", "--param", "spare=2"


def _steering(metrics: dict[str, Any], options: dict[str, Any]) -> list[str]:
    from waveos.host.net.client import Client, draw_plan
    from waveos.host.net.datapath import Datapath
    from waveos.host.net.service import UdpService

    workers, stretch, share = 4, options["stretch"], options["range_share"]
    times = _times(stretch)
    slo_us = round(GET_SLO_US * stretch), round(RANGE_SLO_US * stretch)
    found: dict[str, list[float]] = {policy: [] for policy in LIVE}
    missing: dict[str, int] = dict.fromkeys(LIVE, 0)
    affinity = os.sched_getaffinity(0)
    with contextlib.ExitStack() as stack:
        network = stack.enter_context(topology.network(f"bench-{os.getpid()}"))
        stack.enter_context(UdpService(network, port=PORT, workers=workers, times_ns=times))
        client = stack.enter_context(Client(network, PORT))
        os.sched_setaffinity(0, {min(affinity)})
        stack.callback(os.sched_setaffinity, 0, affinity)
        nice = os.getpriority(os.PRIO_PROCESS, 0)
        os.setpriority(os.PRIO_PROCESS, 0, 10)  # who polls is below who works
        stack.callback(os.setpriority, os.PRIO_PROCESS, 0, nice)
        # What a GET really takes a worker, timers included, from requests one at a time; load is a share of that.
        alone = client.run(draw_plan(100, 1.0, 0.0, flows=64, slo_us=slo_us, seed=options["seed"]))
        get_s = float(np.mean(alone.plan["work_ns"][alone.plan["done_ns"] > 0])) / 1e9
        range_s = get_s + float(times[1].mean() - times[0].mean()) / 1e9
        rate = options["load"] * workers / ((1 - share) * get_s + share * range_s)
        for number in range(options["live_rounds"]):
            for policy in LIVE:
                with Datapath(network, port=PORT, workers=workers) as path:
                    path.start_agent(policy, "--core", str(max(affinity)), *(_slo_parameters(slo_us) if policy == "slo_steering" else ()))
                    end = time.monotonic() + 90
                    while not path.serving:
                        if path.agent_gone or time.monotonic() > end:
                            raise WaveError(f"the agent with policy {policy} does not serve")
                        time.sleep(0.01)
                    plan = draw_plan(rate, options["live_seconds"], share, flows=512, slo_us=slo_us, seed=options["seed"] + number)
                    answered = client.run(plan)
                    found[policy].append(float(np.percentile(answered.latency_us(0), 99)))
                    missing[policy] += answered.unanswered
    for policy in LIVE:
        name = {"slo_steering": "slo"}.get(policy, policy)
        metrics[f"live_{name}_get_p99_us"] = float(np.median(found[policy]))
        metrics[f"live_{name}_unanswered"] = missing[policy]
    gain = float(np.median(np.array(found["rss"]) / np.array(found["slo_steering"])))
    metrics["live_rate_per_s"], metrics["live_stretch"], metrics["live_rss_over_slo"] = rate, stretch, gain
    label = "service: timed waits drawn from RocksDB's times measured here"
    return [f"live GET p99 {gain:.1f}x lower with slo_steering than with RSS at {options['load']:.0%} load ({label}, times {stretch:g})"]


# ── the model ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_rpc() -> dict[str, Any]:
    """The assumed costs of an RPC stack (`ipu_emulator/data/net/rpc.toml`)."""
    return tomllib.loads((Path(ipu_emulator.__path__[0]) / "data" / "net" / "rpc.toml").read_text())


def _model(metrics: dict[str, Any], seed: int) -> list[str]:
    rpc = read_rpc()
    service, speed = rpc["service"], rpc["relative_speed"]
    classes = [RequestClass(1.0, service["mean_ns"])]
    stack = {"stack_in_ns": rpc["stack_in_ns"], "stack_out_ns": rpc["stack_out_ns"]}
    ways = {key: rpc[key] for key in ("to_agent_ns", "to_host_ns", "pick_up_ns", "message_ns", "decision_ns")}
    on_host = Setup("jbsq", service["workers"], classes, **stack)
    on_ipu = Setup("jbsq", service["workers"], classes, **ways, **{key: round(value / speed) for key, value in stack.items()})
    cores = {name: _cores_needed(setup, service, seed) for name, setup in (("host", on_host), ("ipu", on_ipu))}
    metrics["model_host_cores_on_host"] = service["workers"] + cores["host"]
    metrics["model_host_cores_offloaded"] = service["workers"]
    metrics["model_host_cores_saved"] = cores["host"]
    metrics["model_ipu_stack_cores"] = cores["ipu"]
    classes = [RequestClass(0.995, 10_000.0, "fixed", slo_ns=100_000), RequestClass(0.005, 1_000_000.0, "fixed", slo_ns=20_000_000)]
    busy = 16 / (0.995 * 10e-6 + 0.005 * 1e-3)
    rates = {
        policy: throughput_at(
            Setup(policy, 16, classes, flows=1 << 22),
            lambda outcome: outcome.quantile_us(0.99, 0) <= 100,
            0.02 * busy,
            0.999 * busy,
            requests=100_000,
            seed=seed,
        )
        for policy in ("rss", "slo_steering")
    }
    metrics["model_rss_rate_at_slo"], metrics["model_slo_rate_at_slo"] = rates["rss"], rates["slo_steering"]
    metrics["model_slo_throughput_gain"] = rates["slo_steering"] / rates["rss"]
    plain = [RequestClass(1.0, 10_000.0)]
    same = {
        policy: throughput_at(
            Setup(policy, 16, plain, flows=1 << 22, params=params),
            lambda outcome: outcome.quantile_us(0.99) <= 100,
            0.1 * 16 / 10e-6,
            0.999 * 16 / 10e-6,
            requests=100_000,
            seed=seed,
        )
        for policy, params in (("rss", {}), ("jbsq", {"bound": 1.0}))
    }
    metrics["model_exponential_throughput_gain"] = same["jbsq"] / same["rss"]
    return [
        f"RPC stack (costs assumed): {cores['host']} host cores saved by {cores['ipu']} IPU cores; published: 8 saved (Wave)",
        f"throughput at the SLO against RSS: {metrics['model_slo_throughput_gain']:.1f}x with 0.5 % of requests 100 times as long, "
        f"{metrics['model_exponential_throughput_gain']:.2f}x with exponential service (RPCValet, on its own workloads: up to 1.4x)",
    ]


def _cores_needed(setup: Setup, service: dict[str, Any], seed: int) -> int:
    """The fewest stack cores with which the service meets its goal."""
    per_request_ns = setup.stack_in_ns + setup.stack_out_ns
    for cores in range(max(1, int(service["rate_per_s"] * per_request_ns / 1e9)), 65):
        outcome = simulate(replace(setup, stack_cores=cores), service["rate_per_s"], requests=SAMPLES, seed=seed)
        if outcome.dropped == 0 and outcome.quantile_us(0.99) <= service["goal_p99_us"]:
            return cores
    raise WaveError("no number of stack cores meets the goal of rpc.toml")


# ── the model against theory ──────────────────────────────────────────────────────────────────────────────────────────


def _theory(metrics: dict[str, Any], seed: int, load: float = 0.7, workers: int = 8, runs: int = 10, requests: int = 400_000) -> list[str]:
    """Mean latencies: RSS is so many M/G/1 queues, one queue is M/G/k (exact for exponential service; else by the recursion of Kiefer and Wolfowitz)."""
    mean_s = 10e-6
    mixed = formulas.Hyperexponential.mix((0.95, 0.05), (5e-6, 105e-6))
    cases: dict[str, tuple[Any, RequestClass]] = {
        "fixed": (formulas.Fixed(mean_s), RequestClass(1.0, 10_000.0, "fixed")),
        "exponential": (formulas.Exponential(mean_s), RequestClass(1.0, 10_000.0)),
        "bimodal": (mixed, RequestClass(1.0, 10_000.0, "hyper", phases=((0.95, 5_000.0), (0.05, 105_000.0)))),
    }
    rate, widest, wrong = load * workers / mean_s, 0.0, 0
    for name, (service, request_class) in cases.items():
        for policy, params in (("rss", {}), ("jbsq", {"bound": 1.0})):
            setup = Setup(policy, workers, [request_class], params=params, flows=1 << 22)
            n = 5 * requests if name == "bimodal" else requests
            means = np.array([simulate(setup, rate, requests=n, seed=seed + k).mean_us for k in range(runs)])
            if policy == "rss":
                truth = np.array([formulas.fcfs_mean(service, rate / workers) / 1e-6])
            elif name == "exponential":
                truth = np.array([formulas.mmc_mean(service, rate, workers) / 1e-6])
            else:
                truth = np.array([_recursion(name, rate, workers, n, seed + 1_000 + k) for k in range(runs)])
            # Student's t for 9 degrees of freedom at 95 %; where the truth is numerical both sides have errors.
            width = 2.262 * float(np.sqrt(means.var(ddof=1) / runs + (truth.var(ddof=1) / runs if len(truth) > 1 else 0.0))) / float(truth.mean())
            error = float(means.mean() / truth.mean() - 1)
            metrics[f"theory_{policy}_{name}_error"], metrics[f"theory_{policy}_{name}_interval"] = error, width
            widest, wrong = max(widest, width), wrong + (abs(error) > max(width, 0.005))
    verdict = "agrees with theory" if not wrong and widest <= HALF_WIDTH else f"{wrong} of 6 cases disagree with theory"
    return [f"the model {verdict} (intervals at most {widest:.1%})"]


def _recursion(kind: str, rate: float, workers: int, n: int, seed: int) -> float:
    """Mean sojourn in us of an M/G/k queue by Kiefer and Wolfowitz' recursion of ordered workloads: independent of the model, with NumPy's random numbers."""
    import heapq

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
