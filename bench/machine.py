"""The machine a result was made on: the object `machine` of every bench."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

PACKAGES = ("numpy", "numba", "llvmlite", "scipy", "simpy", "pyzmq", "iceoryx2", "rocksdict")


def describe_machine() -> dict[str, object]:
    """CPU model, cores this process may use, memory, kernel, hypervisor, Python and the installed versions of the packages that set the speed."""
    described: dict[str, object] = {
        "cpu": _read_field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "memory_gib": _measure_memory_gib(),
        "virtual_machine": "hypervisor" in (_read_field("/proc/cpuinfo", "flags") or "").split(),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            described[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            described[package] = None
    return described


def _read_field(path: str, name: str) -> str | None:
    """The first value of `name : value` in a file of the kernel's, or None."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None


def _measure_memory_gib() -> float | None:
    """Physical memory, GiB, or None where the system does not say."""
    total = _read_field("/proc/meminfo", "MemTotal")
    return round(int(total.split()[0]) / 2**20, 1) if total else None
