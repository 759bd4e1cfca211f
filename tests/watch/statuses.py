"""What daemons say, as they say it: one enclave of each subsystem, and an agentd that serves other machines."""

from __future__ import annotations

import copy
from typing import Any

HOSTD = {"up_s": 61.5, "cpu_ns": 2_000_000_000, "page_faults": 3, "page_faults_from_disk": 0, "wakeups": 9_000, "journal": 4}
OUTCOMES = {
    "committed": 950,
    "stale": 40,
    "target_gone": 2,
    "target_not_runnable": 3,
    "target_on_cpu": 1,
    "cpu_unavailable": 0,
    "not_in_enclave": 0,
    "superseded": 4,
    "invalid": 0,
    "congested": 0,
    "agent_lost": 0,
}


def sched(name: str = "web", **more: Any) -> dict[str, Any]:
    """Two CPUs under shinjuku."""
    return copy.deepcopy(
        {
            "enclave": name,
            "pid": 700,
            "subsystem": "sched",
            "mechanism": "priority",
            "cpus": "2-3",
            "members": "cgroup /web",
            "policy": "shinjuku",
            "params": {"quantum_us": 200.0},
            "agent": {"pid": 701, "uid": 0, "for_s": 60.0},
            "attachments": 2,
            "agents_lost": 1,
            "agents_refused": 0,
            "counters": {
                "overflow": 0,
                "messages": 5_000,
                "decisions": 1_000,
                "strays": 7,
                "deviations": 2,
                "acts": 30,
                "fallbacks": 1,
                "outcomes": dict(OUTCOMES),
                "age_ns": [[8_192, 600], [10_240, 300], [131_072, 50]],
                "round_trip_ns": [[8_192, 500], [10_240, 100]],
                "enforced_ns": [[4_096, 600]],
                "threads": 12,
                "queued": {"staged": 1, "runnable": 3},
                "governed": True,
                "outside": 0,
                "running": 2,
            },
            "hostd": dict(HOSTD),
            "report": {
                "messages": 4_900,
                "decisions": 1_000,
                "batches": 800,
                "rings": 650,
                "waiting": 3,
                "dropped": 1,
                "restaged": 2,
                "redelivered": 46,
                "unserved": 0,
                "policy": "shinjuku",
                "params": {"quantum_us": 200.0},
                "pid": 701,
                "start": 5,
                "event_ns": [[9_984, 4_000], [10_048, 900]],
                "decide_ns": [[150, 800]],
            },
            "on_cpus": [
                {"cpu": 2, "state": "run", "tid": 5, "pid": 0, "staged": 1},
                {"cpu": 3, "state": "idle", "tid": -1, "pid": 0, "staged": 0},
            ],
            **more,
        }
    )


def memory(name: str = "cache") -> dict[str, Any]:
    """A cgroup's memory under sol."""
    counters = {
        "sensor": "damon",
        "passes": 20,
        "outcomes": dict(OUTCOMES),
        "advised_kib": {"pageout": 2_048, "willneed": 64},
        "cpu_ms": {"scan": 300, "act": 20},
        "processes": 2,
        "limit_mib": 512,
        "regions": {str(number): {"pid": 9, "batches": 64, "resident_mib": 100, "swap_mib": 20} for number in range(2)},
        "replays_after_loss": 0,
        "silences": 0,
    }
    report = {
        "messages": 90,
        "decisions": 30,
        "batches": 20,
        "batches_known": 128,
        "batches_believed_cold": 3,
        "batches_reclaimed": 2,
        "policy": "sol",
    }
    report |= {"actuator_stops": 0, "last_stop": "", "pid": 31, "start": 2, "params": {}}
    return {**sched(name), "subsystem": "memory", "mechanism": "memory", "cpus": "", "policy": "sol", "counters": counters, "report": report}


def net(name: str = "lab") -> dict[str, Any]:
    """Packets under jbsq; before an agent has reported."""
    events = (
        "requests",
        "replies",
        "steered",
        "shed",
        "malformed",
        "unknown_class",
        "no_slot",
        "lost",
        "late",
        "refused",
        "over_rate",
        "by_table",
        "cuts",
    )
    counters = {"serving": True, "silences": 1, "workers_gone": 0, **dict.fromkeys(events, 10), "client_redirected": 5, "host_rx_dropped": 0}
    return {**sched(name), "subsystem": "net", "mechanism": "xsk", "cpus": "", "policy": "jbsq", "counters": counters, "report": None}


def gone(name: str = "old") -> dict[str, Any]:
    """An enclave whose hostd was killed."""
    return {"enclave": name, "error": f"no hostd runs for an enclave {name!r}; those that do: web"}


def agentd() -> dict[str, Any]:
    """One that serves an enclave of another machine, and this machine's web."""
    served = [
        {"host": "rack7", "enclave": "web", "url": "zmq+tcp://0.0.0.0:5555", "policy": "fifo", "serving": True, "report": sched()["report"]},
        {"host": "", "enclave": "web", "url": "shm:///run/wave/web/agent.sock", "policy": "shinjuku", "serving": True, "report": sched()["report"]},
        {"host": "", "enclave": "later", "url": "shm://later", "policy": "fifo", "serving": False, "report": None},
    ]
    return {"pid": 701, "up_s": 80.0, "cpu_ns": 79_000_000_000, "serving": 2, "enclaves": served}
