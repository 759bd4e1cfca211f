"""`wave doctor`: what it says of machines that have more or less than this one."""

from __future__ import annotations

import json
import platform

import pytest

from waveos.cli import doctor, run
from waveos.cli.doctor import Check, examine
from waveos.host.bpf import library

RELEASE = platform.release()
WHOLE = {
    "dev/shm/.keep": "",
    "proc/self/timerslack_ns": "50000\n",
    "proc/mounts": "none /sys/fs/bpf bpf rw 0 0\n",
    "proc/self/cgroup": "2:cpuacct:/\n1:cpu:/ours\n0::/\n",
    "proc/sys/kernel/perf_event_paranoid": "1\n",
    "sys/devices/system/clocksource/clocksource0/current_clocksource": "tsc\n",
    "sys/fs/cgroup/cpu/ours/cpu.rt_period_us": "1000000\n",
    "sys/fs/cgroup/cpu/ours/cpu.rt_runtime_us": "900000\n",
    "sys/kernel/btf/vmlinux": "BTF",
    "sys/kernel/sched_ext/state": "disabled\n",
    f"lib/modules/{RELEASE}/build/Makefile": "",
    "usr/lib/python3/dist-packages/bcc/__init__.py": "",
}


def machine(root, files):
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return {check.name: check for check in examine(root)}


def test_a_machine_that_has_it_all_misses_nothing_that_lies_in_files(tmp_path):
    checks = machine(tmp_path, WHOLE)
    for name in (
        "shared memory",
        "clock",
        "timer slack",
        "BTF",
        "sched_ext",
        "kernel headers",
        "perf events",
        "bcc",
        "BPF file system",
        "real-time budget",
    ):
        assert checks[name].ok, name
    assert checks["sched_ext"].found == "disabled"
    assert checks["real-time budget"].found == "90% of the time"
    assert checks["timer slack"].found == "50 µs"


@pytest.mark.parametrize(
    ("path", "name", "advice"),
    [
        ("sys/kernel/btf/vmlinux", "BTF", "CONFIG_DEBUG_INFO_BTF"),
        ("sys/kernel/sched_ext/state", "sched_ext", "CONFIG_SCHED_CLASS_EXT"),
        (f"lib/modules/{RELEASE}/build/Makefile", "kernel headers", f"linux-headers-{RELEASE}"),
        ("usr/lib/python3/dist-packages/bcc/__init__.py", "bcc", "python3-bpfcc"),
        ("proc/mounts", "BPF file system", "mount -t bpf"),
        ("sys/devices/system/clocksource/clocksource0/current_clocksource", "clock", "tsc"),
    ],
)
def test_what_is_missing_is_said_with_how_to_get_it(tmp_path, monkeypatch, path, name, advice):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # kernel headers may lie in this user's
    missing = machine(tmp_path, {each: text for each, text in WHOLE.items() if each != path})[name]
    assert not missing.ok
    assert advice in missing.how
    assert missing.why
    assert not missing.base


@pytest.mark.parametrize(
    ("files", "found", "ok"),
    [
        ({"sys/fs/cgroup/cpu/ours/cpu.rt_runtime_us": "0\n"}, "0% of the time", False),
        ({"proc/self/cgroup": "0::/ours\n", "proc/sys/kernel/sched_rt_runtime_us": "-1\n"}, "100% of the time", True),
        ({"proc/self/cgroup": "0::/ours\n", "proc/sys/kernel/sched_rt_runtime_us": "950000\n"}, "95% of the time", True),
        ({"proc/self/cgroup": "0::/ours\n"}, "unknown", False),
    ],
)
def test_the_budget_of_real_time_threads_is_that_of_the_group_or_else_the_kernels(tmp_path, files, found, ok):
    budget = machine(tmp_path, WHOLE | files)["real-time budget"]
    assert (budget.found, budget.ok) == (found, ok)
    assert ok or "cpu.rt_runtime_us" in budget.how or "sched_rt_runtime_us" in budget.how


@pytest.mark.parametrize("found", ["missing", "too old"])
def test_a_libbpf_that_will_not_do_is_told_with_where_a_newer_one_is(tmp_path, monkeypatch, found):
    def refuse():
        raise library.BpfError(f"libbpf is {found}")

    monkeypatch.setattr(library, "version", refuse)
    libbpf = machine(tmp_path, WHOLE)["libbpf"]
    assert (libbpf.ok, libbpf.found) == (False, found)
    assert "backports" in libbpf.how


def test_every_line_says_why_it_matters_and_every_missing_one_how_to_get_it(tmp_path):
    for check in examine(tmp_path):
        assert check.why
        assert check.ok != bool(check.how)


def test_here_the_virtual_world_runs_and_the_exit_code_says_so(capsys):
    assert run(["doctor", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["ok"]
    assert {"python", "numba", "numpy", "cores", "rocksdict", "BTF", "sched_ext", "libbpf", "BPF programs", "bcc", "kernel headers"} <= {
        check["name"] for check in document["checks"]
    }


def test_a_missing_base_part_fails_and_a_missing_optional_one_does_not(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda: [Check("numba", False, "missing", "needed", "pip install numba", base=True)])
    assert run(["doctor"]) == 1
    assert "cannot run here: numba" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "examine", lambda: [Check("bcc", False, "missing", "probes", "apt-get install python3-bpfcc")])
    assert run(["doctor"]) == 0
    assert "apt-get install python3-bpfcc" in capsys.readouterr().out
