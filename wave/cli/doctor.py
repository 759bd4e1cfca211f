"""`wave doctor`: what of this machine Wave can use, what is missing, why that matters and how to get it.

Only what is marked `base` is needed by the `virtual` world; the rest opens the `local` and `remote` worlds and the benchmarks. Nothing is changed.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

import typer

from waveos.cli.terminal import Json, print_json, print_table
from waveos.errors import MissingError

commands = typer.Typer()

BASE_PACKAGES = ("numpy", "numba", "scipy", "pydantic", "typer", "rich", "matplotlib", "jinja2")
OPTIONAL_PACKAGES = {
    "rocksdict": ("wave demo measures a real RocksDB with it", "pip install 'waveos[host]'"),
    "psutil": ("the host's half looks at processes with it", "pip install 'waveos[host]'"),
    "simpy": ("the peer of wave bench engine", "pip install 'waveos[bench]'"),
    "zmq": ("a peer of wave bench link", "pip install 'waveos[bench]'"),
    "iceoryx2": ("a peer of wave bench link", "pip install 'waveos[bench]'"),
}
_DISTRIBUTIONS = {"zmq": "pyzmq"}


@dataclass(frozen=True)
class Check:
    """One line of the doctor's: what was looked for, what was found, why it matters, and how to get it where it is missing."""

    name: str
    ok: bool
    found: str
    why: str = ""
    how: str = ""
    base: bool = False


@commands.command("doctor")
def doctor(as_json: Json = False) -> int:
    """Say what this machine has and lacks for Wave, and how to get it. Exit code 1 only if the virtual world cannot run."""
    checks = examine()
    healthy = all(check.ok for check in checks if check.base)
    if as_json:
        print_json({"ok": healthy, "checks": [asdict(check) for check in checks]})
        return 0 if healthy else 1
    print_table(
        ("", "part", "here", "what it is for, and how to get it"),
        [(_mark(check), check.name, check.found, check.why if check.ok else f"{check.why}: {check.how}") for check in checks],
    )
    missing = [check.name for check in checks if not check.ok]
    if healthy:
        print("The virtual world runs here." + (f" Missing for more than that: {', '.join(missing)}." if missing else ""))
    else:
        print(f"The virtual world cannot run here: {', '.join(check.name for check in checks if check.base and not check.ok)}.")
    return 0 if healthy else 1


def examine(root: Path = Path("/")) -> list[Check]:
    """All checks, in the order in which they matter. `root` is where /proc, /sys, /lib and /dev are looked for."""
    checks = [*_python(), *_machine(root), *_kernel(root), *_toolchain(root)]
    return [check if not check.ok else replace(check, how="") for check in checks]


def _python() -> Iterator[Check]:
    yield Check(
        "python", sys.version_info >= (3, 11), platform.python_version(), "Wave is written for 3.11 and newer", "install Python >= 3.11", base=True
    )
    for package in BASE_PACKAGES:
        yield _package(package, "Wave does not start without it", "pip install waveos (or make setup)", base=True)
    for package, (why, how) in OPTIONAL_PACKAGES.items():
        yield _package(package, why, how)


def _package(module: str, why: str, how: str, *, base: bool = False) -> Check:
    name = _DISTRIBUTIONS.get(module, module)
    present = find_spec(module) is not None
    try:
        version = metadata.version(name) if present else "missing"
    except metadata.PackageNotFoundError:
        version = "present"
    return Check(name, present, version, why, how, base)


def _machine(root: Path) -> Iterator[Check]:
    cores = len(os.sched_getaffinity(0))
    yield Check(
        "cores",
        cores >= 2,
        str(cores),
        "a polling agent wants a core of its own; on one core every round trip waits for a time slice",
        "a machine with 2 or more",
    )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    yield Check(
        "cache",
        _writable(cache),
        str(cache),
        "compiled policies and measured service times are kept there",
        "make it writable, or set XDG_CACHE_HOME",
        base=True,
    )
    shm = root / "dev/shm"
    yield Check("shared memory", _writable(shm), _free(shm), "rings between host and agent (shm://)", "mount a tmpfs on /dev/shm")
    source = _read(root / "sys/devices/system/clocksource/clocksource0/current_clocksource") or "unknown"
    yield Check(
        "clock", source in ("tsc", "kvm-clock", "arch_sys_counter", "hyperv_clocksource_tsc_page"), f"{source}, {_clock_read_ns():.0f} ns a read",
        "measured times are read from it, without a system call", "boot with clocksource=tsc where the CPU has an invariant TSC",
    )  # fmt: skip
    slack = _read(root / "proc/self/timerslack_ns")
    yield Check(
        "timer slack",
        slack is not None,
        f"{int(slack) / 1000:g} µs" if slack else "unknown",
        "a sleep may end this much late; agents poll instead",
        "nothing to do",
    )


def _kernel(root: Path) -> Iterator[Check]:
    release = platform.release()
    btf = root / "sys/kernel/btf/vmlinux"
    yield Check(
        "BTF", btf.exists(), release, "BPF programs that fit any kernel (world local)", "a kernel with CONFIG_DEBUG_INFO_BTF=y, as distributions ship"
    )
    ext = root / "sys/kernel/sched_ext"
    yield Check(
        "sched_ext", ext.exists(), (_read(ext / "state") or "present") if ext.exists() else "missing",
        "policies schedule real threads through it; without it: priorities and affinity", "a kernel >= 6.12 with CONFIG_SCHED_CLASS_EXT=y",
    )  # fmt: skip
    pins = any(line.split()[1:3] == ["/sys/fs/bpf", "bpf"] for line in (_read(root / "proc/mounts") or "").splitlines())
    yield Check(
        "BPF file system", pins, "/sys/fs/bpf" if pins else "not mounted", "what is pinned there outlives its process; bpftool shows it",
        "mount -t bpf bpf /sys/fs/bpf",
    )  # fmt: skip
    yield _realtime(root)
    kernel_headers = import_module("waveos.host.probes.headers")
    try:
        headers = kernel_headers.find(root)[0]
    except MissingError:
        headers = None
    yield Check("kernel headers", headers is not None, headers or "missing", "bcc compiles its probes (wave probe) against them", kernel_headers.HOW)
    paranoid = _read(root / "proc/sys/kernel/perf_event_paranoid")
    yield Check(
        "perf events", paranoid is not None and (int(paranoid) <= 1 or os.geteuid() == 0), f"perf_event_paranoid={paranoid or 'missing'}",
        "cache misses and cycles beside measured times", "sysctl kernel.perf_event_paranoid=1, or run as root",
    )  # fmt: skip


def _realtime(root: Path) -> Check:
    """The share of each period that real-time threads of our control group may run; the kernel says EPERM to the first where it is nothing."""
    groups = [line.split(":", 2) for line in (_read(root / "proc/self/cgroup") or "").splitlines()]
    own = next((path for _, controllers, path in groups if "cpu" in controllers.split(",")), None)
    folders = [root / "sys/fs/cgroup" / name / (own or "").strip("/") for name in ("cpu", "cpu,cpuacct")]
    limits = [(folder / "cpu.rt_runtime_us", folder / "cpu.rt_period_us") for folder in folders] if own else []
    kernel = root / "proc/sys/kernel"
    limits.append((kernel / "sched_rt_runtime_us", kernel / "sched_rt_period_us"))  # cgroup v2, or no budgets of groups: the kernel's holds
    file, runtime, period = next(((a, _read(a), _read(b)) for a, b in limits if a.exists()), (limits[-1][0], None, None))
    budget = 0 if runtime is None else 1 if int(runtime) < 0 else int(runtime) / int(period or 1_000_000)
    return Check(
        "real-time budget",
        budget > 0,
        f"{budget:.0%} of the time" if runtime is not None else "unknown",
        "mechanism priority makes an enclave's threads SCHED_FIFO; the rest of the time is for ordinary ones",
        f"echo 950000 >{file} (first in the groups above it), or start Wave outside that group",
    )


def _toolchain(root: Path) -> Iterator[Check]:
    bpf = import_module("waveos.host.bpf.library")
    try:
        libbpf, fits = bpf.version(), True
    except MissingError as error:
        libbpf, fits = "too old" if "too old" in str(error) else "missing", False
    yield Check("libbpf", fits, libbpf, "loads BPF programs (world local)", bpf.GET_LIBBPF)
    programs = [path.name for package in import_module("waveos.host").__path__ for path in Path(package).rglob("*.bpf.o")]
    yield Check(
        "BPF programs", bool(programs), f"{len(programs)} compiled" if programs else "missing", "the host's half in the kernel (world local)",
        "in a checkout: apt-get install clang-19, then make setup; an installed wheel has them",
    )  # fmt: skip
    clang = _first_on_path(("clang-19", "clang", "clang-18", "clang-17", "clang-16", "clang-15", "clang-14"))
    yield Check(
        "clang",
        clang is not None,
        clang or "missing",
        "compiles the BPF programs of a checkout (make bpf); a wheel needs none",
        "apt-get install clang-19",
    )
    bcc = next((folder for folder in (root / "usr/lib/python3/dist-packages").glob("bcc") if folder.is_dir()), None)
    yield Check(
        "bcc",
        bcc is not None,
        str(bcc or "missing"),
        "independent probes of live experiments (the system's python3)",
        "apt-get install python3-bpfcc",
    )


def _mark(check: Check) -> str:
    return "ok" if check.ok else "MISSING" if check.base else "missing"


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _writable(folder: Path) -> bool:
    """Whether something can be made in the folder, or the folder itself be made."""
    place = next(each for each in (folder, *folder.parents) if each.exists())
    return place.is_dir() and os.access(place, os.W_OK | os.X_OK)


def _free(folder: Path) -> str:
    try:
        status = os.statvfs(folder)
    except OSError:
        return "missing"
    return f"{status.f_bavail * status.f_frsize / 2**20:,.0f} MiB free"


def _first_on_path(names: tuple[str, ...]) -> str | None:
    from shutil import which

    return next((found for name in names if (found := which(name))), None)


def _clock_read_ns(read: Callable[[], int] = time.perf_counter_ns, reads: int = 2_000) -> float:
    """Time from one read of the clock to the next, averaged over `reads`; most of it is Python's call."""
    start = read()
    for _ in range(reads):
        read()
    return (read() - start) / reads
