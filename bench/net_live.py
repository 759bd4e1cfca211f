"""Steering policies end to end through the three namespaces under one offered load, and what an agent that dies or hangs under load costs.

On fewer than four cores the workers' service is a timed wait, drawn from RocksDB's service times measured on the machine and stretched so that the kernel's
timers can keep them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from waveos.errors import WaveError
from waveos.host.net import topology
from waveos.host.net.client import Client, draw_plan
from waveos.host.net.datapath import Datapath
from waveos.host.net.service import UdpService
from waveos.ipu_emulator.net import RequestClass, Setup, simulate

PORT, WORKERS, FLOWS = 5_000, 4, 512
POLICIES = {"rss": "rss", "jbsq": "jbsq", "slo_steering": "slo"}
"""And what they are called in the figures."""
GET_SLO_US, RANGE_SLO_US = 50, 5_000  # before stretching
START_S = 90.0
STRIKES = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}
STRIKE_RATE_PER_S, STRIKE_AT_S, STRIKE_UNTIL_S = 3_000, 1.0, 2.0
STRIKE_NS = np.full(16, 100_000, np.int64)
"""Service time while the agent is struck: short, so that much is under way."""
FALLBACK_NS = 50_000_000


def compare_policies(metrics: dict[str, Any], options: dict[str, Any]) -> list[str]:
    """Fill in `live_rss_get_p99_us` and the others; lines for the verdict."""
    stretch, share = options["stretch"], options["range_share"]
    times = _rocksdb_times(stretch)
    slo_us = round(GET_SLO_US * stretch), round(RANGE_SLO_US * stretch)
    found: dict[str, list[float]] = {policy: [] for policy in POLICIES}
    missing, unserved = (dict.fromkeys(POLICIES, 0) for _ in range(2))
    with _world(times) as (network, client, core):
        # What a GET really takes a worker, timers included, from requests one at a time; load is a share of that.
        alone = client.run(draw_plan(100, 1.0, 0.0, flows=64, slo_us=slo_us, seed=options["seed"]))
        get_s = float(np.mean(alone.plan["work_ns"][alone.plan["done_ns"] > 0])) / 1e9
        range_s = get_s + float(times[1].mean() - times[0].mean()) / 1e9
        rate = options["load"] * WORKERS / ((1 - share) * get_s + share * range_s)
        for number in range(options["live_rounds"]):
            plan = draw_plan(rate, options["live_seconds"], share, flows=FLOWS, slo_us=slo_us, seed=options["seed"] + number)
            for policy in POLICIES:
                params = [word for key, value in _params(policy, slo_us).items() for word in ("--param", f"{key}={value:g}")]
                with _serving(network, policy, core, *params) as path:
                    answered = client.run(plan.copy())
                    unserved[policy] += path.ports.counters()["client_unserved"]
                found[policy].append(float(np.percentile(answered.latency_us(0), 99)))
                missing[policy] += answered.unanswered
    predicted = _predict(alone, times, rate, share, slo_us, options)
    for policy, name in POLICIES.items():
        metrics[f"live_{name}_get_p99_us"] = float(np.median(found[policy]))
        metrics[f"live_{name}_get_p99_us_low"], metrics[f"live_{name}_get_p99_us_high"] = min(found[policy]), max(found[policy])
        metrics[f"predicted_{name}_get_p99_us"] = predicted[policy]
        metrics[f"live_{name}_unanswered"] = missing[policy]
        metrics[f"live_{name}_on_kernels_path"] = unserved[policy]  # while the agent had to wait for its core: the machine was not quiet
    gain = float(np.median(np.array(found["rss"]) / np.array(found["slo_steering"])))
    metrics["live_rate_per_s"], metrics["live_stretch"], metrics["live_rss_over_slo"] = rate, stretch, gain
    label = f"{WORKERS} workers, service: timed waits drawn from RocksDB's times measured here, stretched {stretch:g} times"
    return [f"live GET p99 {gain:.1f}x lower with slo_steering than with RSS at {options['load']:.0%} load ({label})"]


def _params(policy: str, slo_us: tuple[int, int]) -> dict[str, float]:
    """Live and in the model: GETs cannot wait, RANGEs can, and leave half of the workers to them."""
    return {"patient_us": 2.0 * slo_us[0], "spare": 2.0} if policy == "slo_steering" else {}


def _predict(
    alone: Any, times: list[npt.NDArray[np.int64]], rate_per_s: float, share: float, slo_us: tuple[int, int], options: dict[str, Any]
) -> dict[str, float]:
    """GET p99 in us that the model gives each policy: RocksDB's times, each longer by what a wait took a worker beyond them, and the way there and back."""
    answered = alone.plan["done_ns"] > 0
    extra_ns = max(0.0, float(np.mean(alone.plan["work_ns"][answered])) - float(times[0].mean()))
    way_us = float(np.median(alone.latency_us(0)) - np.median(alone.plan["work_ns"][answered]) / 1e3)
    classes = [
        RequestClass(part, float(each.mean() + extra_ns), "samples", 1_000 * slo, samples_ns=(each + extra_ns).astype(np.int64))
        for part, each, slo in zip((1 - share, share), times, slo_us, strict=True)
    ]
    requests = int(rate_per_s * options["live_seconds"] * options["live_rounds"])
    return {
        policy: way_us
        + simulate(
            Setup(policy, WORKERS, classes, params=_params(policy, slo_us), flows=FLOWS), rate_per_s, requests=requests, seed=options["seed"]
        ).quantile_us(0.99, 0)
        for policy in POLICIES
    }


def strike_agents(metrics: dict[str, Any], options: dict[str, Any]) -> list[str]:
    """Kill, and stop, the agent under load: how long until what is sent is answered again, and what is lost."""
    ok, places = True, 0
    with _world([STRIKE_NS]) as (network, client, core):
        for name, number in STRIKES.items():
            with _serving(network, "jbsq", core) as path:
                places = path.ports.places
                pid = path.agent_pid
                hit: list[int] = []

                def strike(since_s: float) -> None:
                    if since_s > STRIKE_AT_S and not hit:  # noqa: B023
                        os.kill(pid, number)  # noqa: B023
                        hit.append(time.monotonic_ns())  # noqa: B023

                plan = draw_plan(STRIKE_RATE_PER_S, STRIKE_UNTIL_S, 0.0, flows=FLOWS, slo_us=(0, 0), seed=options["seed"])
                answered = client.run(plan, heard=strike)
            lost = answered.start_ns + plan["at_ns"][plan["done_ns"] == 0]
            after_ns = max(0, int(lost.max()) - hit[0]) if len(lost) else 0
            metrics[f"live_{name}_fallback_ms"], metrics[f"live_{name}_lost"] = after_ns / 1e6, len(lost)
            ok = ok and after_ns <= FALLBACK_NS and len(lost) <= places
        as_before = topology.find(network.name) == network
    metrics["live_ring_places"], metrics["live_strike_rate_per_s"] = places, STRIKE_RATE_PER_S
    what = (
        f"agent killed / stopped at {STRIKE_RATE_PER_S:,} requests/s: the kernel's path after {metrics['live_killed_fallback_ms']:.0f} / "
        f"{metrics['live_stopped_fallback_ms']:.0f} ms, {metrics['live_killed_lost']} / {metrics['live_stopped_lost']} requests lost"
    )
    return [what + ("" if ok and as_before else ": NOT within 50 ms and the rings, or the namespaces have changed")]


@contextlib.contextmanager
def _world(times: list[npt.NDArray[np.int64]]) -> Iterator[tuple[topology.Network, Client, int]]:
    """A network, its service and a client on the first core, below the workers in priority; and the core for agents."""
    affinity = os.sched_getaffinity(0)
    with contextlib.ExitStack() as stack:
        network = stack.enter_context(topology.network(f"bench-{os.getpid()}"))
        stack.enter_context(UdpService(network, port=PORT, workers=WORKERS, times_ns=times))
        client = stack.enter_context(Client(network, PORT))
        os.sched_setaffinity(0, {min(affinity)})
        stack.callback(os.sched_setaffinity, 0, affinity)
        nice = os.getpriority(os.PRIO_PROCESS, 0)
        os.setpriority(os.PRIO_PROCESS, 0, max(10, nice))  # who polls is below who works
        stack.callback(os.setpriority, os.PRIO_PROCESS, 0, nice)
        yield network, client, max(affinity)


@contextlib.contextmanager
def _serving(network: topology.Network, policy: str, core: int, *arguments: str) -> Iterator[Datapath]:
    """The data path with an agent that serves."""
    with Datapath(network, port=PORT, workers=WORKERS) as path:
        path.start_agent(policy, "--core", str(core), *arguments)
        end = time.monotonic() + START_S
        while not path.serving:
            if path.agent_gone or time.monotonic() > end:
                raise WaveError(f"the agent with policy {policy} does not serve")
            time.sleep(0.01)
        yield path


def _rocksdb_times(stretch: float) -> list[npt.NDArray[np.int64]]:
    from waveos.host import rocksdb

    measured = rocksdb.measure_once()
    return [np.maximum(1, (np.asarray(each) * stretch)).astype(np.int64) for each in (measured.get_ns, measured.range_ns)]
