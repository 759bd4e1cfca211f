"""Results with the shape of real ones: latencies from a queueing formula, so that figures have something to show."""

from __future__ import annotations

from typing import Any

CLASSES = {"GET": 3.4, "RANGE": 1_030.0}
"""Mean service time, us."""


def latency_us(name: str, quantile: str, load: float, capacity: float, policy: str) -> float:
    """Grows as 1/(1-rho); a run-to-completion policy makes a GET wait for a RANGE."""
    rho = min(load / capacity, 0.995)
    stretch = {"p50_us": 1.0, "p99_us": 4.6, "p999_us": 6.9}[quantile]
    blocked = 40 * CLASSES["RANGE"] * 0.005 * rho if policy == "fifo" and quantile != "p50_us" and name == "GET" else 0.0
    return CLASSES[name] * (1 + 0.15 * stretch * rho / (1 - rho)) + blocked * stretch + 5.0


def make_configuration(
    policy: str, world: str, capacity: float, *, workers: int = 8, column: str = "same workers", seeds: int = 3, loads: int = 10
) -> dict[str, Any]:
    points = []
    for step in range(1, loads + 1):
        load = 90_000.0 * step
        for seed in range(1, seeds + 1):
            own = capacity * (1 + 0.01 * (seed - 2))
            classes = {
                name: {"count": 1000, "mean_us": latency_us(name, "p50_us", load, own, policy)}
                | {key: latency_us(name, key, load, own, policy) for key in ("p50_us", "p99_us", "p999_us")}
                for name in CLASSES
            }
            offloaded = world == "offload"
            points.append(
                {
                    "load_per_s": load,
                    "throughput_per_s": min(load, own),
                    "seed": seed,
                    "classes": classes,
                    "saturated": load > own,
                    "host_cores_policy": 0.0 if offloaded else 0.21 if world == "kernel" else 1.0,
                    "agent_busy_share": None if world == "kernel" else min(1.0, load / own * 0.8),
                    "stale_share": None if world == "kernel" else (0.02 if offloaded else 0.002) * load / own,
                    "decision_age_p50_us": None if world == "kernel" else 2.1 if offloaded else 0.4,
                    "decision_age_p99_us": None if world == "kernel" else 9.0 * (1 + load / own) if offloaded else 1.5,
                }
            )
    result: dict[str, Any] = {"id": f"{policy}/{world}", "policy": policy, "world": world, "workers": workers, "column": column, "points": points}
    result |= {"saturation_per_s": 0.9 * capacity, "saturation_low_per_s": 0.885 * capacity, "saturation_high_per_s": 0.912 * capacity}
    if world == "offload":
        result["cost_share"] = {"same workers": 0.034, "same machine": -0.092}
        result["cost_interval"] = {"same workers": [0.011, 0.058], "same machine": [-0.12, -0.07]}
    return result


def make_results(*, seeds: int = 3, loads: int = 10) -> dict[str, Any]:
    """A whole comparison: three policies, kernel, on-host twice, offload; five ablation rows."""
    size = {"seeds": seeds, "loads": loads}
    configs = [make_configuration("kernel", "kernel", 700_000, **size)]
    for policy, capacity in (("fifo", 620_000), ("shinjuku", 800_000), ("shinjuku_mq", 850_000)):
        configs.append(make_configuration(policy, "on-host", capacity, **size))
        configs.append(
            make_configuration(policy, "on-host", capacity * 7 / 8, workers=7, column="same machine", **size)
            | {"id": f"{policy}/on-host/same-machine"}
        )
        configs.append(make_configuration(policy, "offload", capacity * 0.966, **size))
    sets = (("none", [], 9_600, 310_000), ("+ write-back", ["wb"], 6_100, 480_000), ("+ WC/WT mappings", ["wb", "wc_wt"], 4_200, 610_000))
    sets += (("+ prestaging", ["wb", "wc_wt", "prestage"], 2_500, 700_000), ("all", ["wb", "wc_wt", "prestage", "prefetch"], 1_900, 720_000))
    return {
        "name": "rocksdb",
        "scenario": {
            "name": "rocksdb",
            "about": "RocksDB on eight workers, 0.5 % range scans.",
            "host": {"workers": 8},
            "workload": {
                "classes": [{"name": "GET", "share": 0.995, "service": {"samples": "rocksdb:get"}}, {"name": "RANGE", "share": 0.005}],
                "loads_share": [0.2, 0.8],
            },
            "objective": {"GET": {"p99_us": 200.0}, "RANGE": {"p99_x_mean": 10.0}},
        },
        "service": {
            "GET": {"mean_us": 3.4, "p50_us": 3.2, "p99_us": 6.2, "source": "measured"},
            "RANGE": {"mean_us": 1030.0, "p50_us": 1012.0, "p99_us": 1672.0},
        },
        "timing": "modelled",
        "link": {"name": "mount-evans", "verified": False, "source": "orders of magnitude from public PCIe measurements"},
        "machine": {"cpu": "Example 9000", "cpus": 2},
        "wave_version": "0.1.0",
        "configs": configs,
        "ablation": [
            {"mitigations": names, "label": label, "unloaded_decision_ns": ns, "saturation_per_s": rate}
            | {"saturation_low_per_s": 0.98 * rate, "saturation_high_per_s": 1.015 * rate}
            for label, names, ns, rate in sets
        ],
        "notes": ["FIFO misses the GET objective from 30 % of load on: a GET waits for whole RANGEs."],
    }
