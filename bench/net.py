"""AF_XDP against sockets (packets/s, round trips); steering policies through three namespaces; the RPC stack's cores and steering in the model.

Live figures are of this machine: kernel work of both ends shares its cores with the benchmark. On fewer than four cores the live service is a timed wait,
drawn from RocksDB's service times measured here and stretched so that the kernel's timers can keep them.
"""

from __future__ import annotations

import os
from typing import Any

from waveos.bench import net_echo, net_model
from waveos.bench.machine import describe_machine
from waveos.errors import ConfigError, MissingError

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
    "live": (True, "false: the model alone, which needs no root"),
    "model": (True, "false: the live parts alone, which want a quiet machine for some 100 s"),
    "quick": (False, "a short form of all parts: the figures are there, but they are rough"),
    "seed": (1, "seed of all loads"),
}
QUICK = {"rounds": 1, "live_seconds": 2.0, "live_rounds": 1}


def run(**options: Any) -> dict[str, Any]:
    """See OPTIONS. Raises MissingError where the live half cannot run; `live=False` leaves it out."""
    quick = {key: value for key, value in QUICK.items() if key not in options} if options.get("quick") else {}
    chosen = {key: value[0] if isinstance(value, tuple) else value for key, value in OPTIONS.items()} | quick | options
    metrics: dict[str, Any] = {}
    notes = []
    if not (chosen["live"] or chosen["model"]):
        raise ConfigError("--live false and --model false leave nothing to measure")
    if chosen["live"]:
        if os.geteuid():
            raise MissingError("bench net: namespaces and AF_XDP want root; --live false runs the model alone")
        from waveos.bench import net_live  # what it opens wants root's libraries, too

        for part in (net_echo.compare_echoes, net_live.compare_policies, net_live.strike_agents):
            notes += part(metrics, chosen)
    if chosen["model"]:
        seed, share = chosen["seed"], 4 if chosen["quick"] else 1
        notes += net_model.account_cores(metrics, seed, 200_000 // share)
        notes += net_model.compare_throughput(metrics, seed, 100_000 // share)
        notes += net_model.check_theory(metrics, seed, runs=10 // (share // 2 or 1), requests=400_000 // share)
    return {
        "name": "net",
        "metrics": metrics,
        "machine": describe_machine(),
        "timing": " and ".join(word for word, there in (("measured", chosen["live"]), ("modelled", chosen["model"])) if there),
        "verdict": "; ".join(notes),
    }
