"""Probes on this kernel: what they count is what really happened, and when they are gone nothing of them is left."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from waveos.bench.probes import run as run_bench
from waveos.cli import INTERRUPTED, run
from waveos.errors import MissingError, WaveError
from waveos.host.probes import KINDS, Probe, Target, headers, probe, runqlat, switches
from waveos.host.probes.command import HeldCommand

SLEEPS = 200
SLACK = 3
"""A thread also sleeps before its first command and after its last; and a waking that meets a thread on its way out may go unseen."""
WAVE = [sys.executable, "-P", "-c", "from waveos.cli import main; main()"]
_BPF = {"x86_64": 321, "aarch64": 280}
_BPF_PROG_GET_NEXT_ID = 11

SLEEPER = f"""
import json, resource, sys, time
open("/proc/self/comm", "w").write(sys.argv[1])
for line in sys.stdin:
    before = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range({SLEEPS}):
        time.sleep(0.001)
    after = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps([after.ru_nvcsw - before.ru_nvcsw, after.ru_nivcsw - before.ru_nivcsw]), flush=True)
"""


def why_not():
    """Why probes cannot run here, or ""."""
    if os.geteuid() != 0:
        return "probes need root"
    if subprocess.run([probe.PYTHON, "-I", "-c", "import bcc"], capture_output=True, check=False).returncode:
        return "bcc is not installed (python3-bpfcc)"
    try:
        headers.find()
    except MissingError as missing:
        return str(missing)
    return "" if platform.machine() in _BPF else "the number of the system call bpf is not known here"


pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")


class Sleeper:
    """A process that on `sleep` sleeps SLEEPS times a millisecond, and says what the kernel's own accounting saw."""

    def __init__(self, name):
        self.process = subprocess.Popen([sys.executable, "-c", SLEEPER, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.name, self.pid = name, self.process.pid
        self.sleep()  # so that it is certainly in its loop

    def begin(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def finish(self):
        """(voluntary, involuntary) context switches of the sleeps."""
        return tuple(json.loads(self.process.stdout.readline()))

    def sleep(self):
        self.begin()
        return self.finish()

    def rests(self):
        """Whether it waits for its next command."""
        return psutil.Process(self.pid).status() == psutil.STATUS_SLEEPING


@pytest.fixture
def sleeper():
    """The one that is watched, and beside it another that is not."""
    with started(Sleeper(f"watched-{os.getpid() % 9999}")) as watched, started(Sleeper("unwatched")) as other:
        watched.other = other
        yield watched


@contextmanager
def started(sleeper):
    try:
        yield sleeper
    finally:
        sleeper.process.kill()
        sleeper.process.communicate()


def measure(name, sleeper, **target):
    """What the probe says, and what the kernel's accounting says, of one round of sleeps; the other sleeps as well."""
    with Probe(name, Target(pids=(sleeper.pid,), **target)) as attached:
        until(sleeper.rests)
        attached.reset()
        sleeper.other.begin()
        truth = sleeper.sleep()
        until(sleeper.rests)
        result = attached.stop()
        sleeper.other.finish()
    assert result["lost"] == 0
    return result, truth


def until(happened, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def programs(pid):
    """Numbers of the BPF programs that a process holds."""
    found = set()
    with suppress(OSError):
        for info in Path(f"/proc/{pid}/fdinfo").iterdir():
            with suppress(OSError):
                found.update(int(line.split()[1]) for line in info.read_text().splitlines() if line.startswith("prog_id:"))
    return found


def loaded(program):
    """Whether the kernel still has a BPF program of that number; numbers are not given out again soon."""
    attr = (ctypes.c_uint32 * 32)(program - 1)
    libc = ctypes.CDLL(None, use_errno=True)
    return libc.syscall(_BPF[platform.machine()], _BPF_PROG_GET_NEXT_ID, ctypes.byref(attr), ctypes.sizeof(attr)) == 0 and attr[1] == program


def none_left(ids):
    until(lambda: not any(map(loaded, ids)))


# ── what is counted ──


def test_switches_are_those_of_the_kernels_own_accounting_and_of_no_other_process(sleeper):
    result, (voluntary, involuntary) = measure("switches", sleeper)
    assert voluntary > SLEEPS / 2  # a timer that is over before the thread has gone costs no switch
    assert voluntary <= result["voluntary"] <= voluntary + SLACK
    assert involuntary <= result["involuntary"]
    assert sum(row["voluntary"] for row in result["rows"]) == result["voluntary"]


def test_every_sleep_ends_with_one_wait_for_a_cpu(sleeper):
    result, (voluntary, involuntary) = measure("runqlat", sleeper)
    assert voluntary + involuntary <= result["count"] + SLACK
    assert sum(row["count"] for row in result["histogram"]) == result["count"]
    assert 0 < result["p50_us"] <= result["p99_us"] <= result["max_us"] <= result["seconds"] * 1e6


def test_absences_are_as_many_as_the_sleeps_and_no_longer_than_the_measurement(sleeper):
    result, (voluntary, _) = measure("offcpu", sleeper)
    assert {row["thread"] for row in result["rows"]} == {sleeper.name}
    asleep = next(row for row in result["rows"] if row["reason"] == "asleep (S)")
    assert voluntary <= asleep["count"] + SLACK <= voluntary + 2 * SLACK
    assert asleep["total_ms"] >= SLEEPS / 2  # of a millisecond each
    assert sum(row["total_ms"] for row in result["rows"]) <= result["seconds"] * 1e3 * 1.001


def test_the_timer_woke_the_sleeper_and_the_test_its_first_step(sleeper):
    result, (voluntary, _) = measure("wakeups", sleeper)
    of_it = {row["waker"]: row for row in result["rows"] if row["woken"] == sleeper.name}
    by_interrupts = sum(row["wakings"] for waker, row in of_it.items() if waker.startswith("["))
    assert voluntary <= by_interrupts + SLACK <= SLEEPS + 2 * SLACK
    us = Path("/proc/self/comm").read_text().strip()
    assert of_it[us]["wakings"] >= 1
    assert "unwatched" not in {row["woken"] for row in result["rows"]} | {row["waker"] for row in result["rows"]}
    assert result["count"] <= result["wakings"]


def test_after_a_reset_nothing_of_before_is_left(sleeper):
    with Probe("switches", Target(pids=(sleeper.pid,))) as attached:
        sleeper.sleep()
        until(sleeper.rests)
        assert attached.read()["voluntary"] > SLEEPS / 2
        attached.reset()
        assert attached.read()["count"] == 0


def test_an_absence_from_before_a_reset_counts_from_the_reset_on(sleeper):
    with Probe("offcpu", Target(pids=(sleeper.pid,))) as attached:
        sleeper.sleep()
        until(lambda: max(row["max_us"] for row in attached.read()["rows"]) > 200_000)  # it waits for its next command
        attached.reset()
        sleeper.sleep()
        result = attached.stop()
        assert 0 < sum(row["total_ms"] for row in result["rows"]) <= result["seconds"] * 1e3 * 1.001


def test_two_that_never_rest_wait_for_one_cpu_half_their_time_and_for_no_other(sleeper):
    cpu, *others = sorted(os.sched_getaffinity(0))
    spin = f"import os; os.sched_setaffinity(0, [{cpu}]); print(flush=True)\nwhile True: pass"
    hogs = [subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE) for _ in range(2)]
    try:
        for hog in hogs:
            hog.stdout.readline()
        pids = tuple(hog.pid for hog in hogs)
        with Probe("runqlat", Target(pids=pids, cpus=(cpu,))) as here, Probe("offcpu", Target(pids=pids)) as away:
            until(lambda: here.read()["count"] >= 20)
            until(lambda: here.read()["total_ms"] >= 0.5e3 * here.read()["seconds"])
            assert here.stop()["max_us"] > 0
            reasons = {row["reason"] for row in away.stop()["reasons"]}
            assert reasons == {"preempted, or it yielded"}
        if others:
            with Probe("runqlat", Target(pids=(*pids, sleeper.pid), cpus=tuple(others))) as elsewhere:
                os.sched_setaffinity(sleeper.pid, others)
                sleeper.sleep()
                result = elsewhere.stop()
                assert result["count"] > SLEEPS / 2 and result["lost"] == 0
            with Probe("switches", Target(pids=pids, cpus=tuple(others))) as elsewhere:
                sleeper.sleep()
                assert elsewhere.stop()["count"] == 0
    finally:
        for hog in hogs:
            hog.kill()
            hog.communicate()


def test_without_a_target_all_threads_are_meant(sleeper):
    with Probe("switches") as attached:
        voluntary, _ = sleeper.sleep()
        assert attached.stop()["voluntary"] >= voluntary
    assert runqlat(duration_s=0.05)["target"] == {"pids": [], "cgroup": None, "cpus": None}


def test_a_group_is_watched_by_its_folder(sleeper):
    group = next((place for place in (Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")) if (place / "cgroup.procs").is_file()), None)
    if group is None:
        pytest.skip("no control groups are mounted here")
    mine = group / f"wave-probe-{os.getpid()}"
    mine.mkdir()
    try:
        (mine / "cgroup.procs").write_text(str(sleeper.pid))
        with Probe("switches", Target(cgroup=mine)) as attached:
            until(sleeper.rests)
            attached.reset()
            voluntary, _ = sleeper.sleep()
            assert voluntary <= attached.stop()["voluntary"] <= voluntary + SLACK
    finally:
        (group / "cgroup.procs").write_text(str(sleeper.pid))
        mine.rmdir()


# ── commands ──


def test_a_command_is_watched_from_its_first_step_with_all_that_it_starts(capsys):
    sleep = f"import time\nfor _ in range({SLEEPS}): time.sleep(0.001)"
    work = (
        "import subprocess, sys, threading\n"
        f"threading.Thread(target=lambda: exec({sleep!r})).start()\n"
        f"subprocess.run([sys.executable, '-c', {sleep!r}])\n"
        "sys.exit(7)"
    )
    assert run(["probe", "switches", "--json", "--command", shlex.join([sys.executable, "-c", work])]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["voluntary"] > SLEEPS  # of twice as many
    assert result["target"]["command"]["exit_code"] == 7


def test_a_command_that_outlasts_the_measurement_is_ended(capsys):
    assert run(["probe", "runqlat", "--json", "--for", "100ms", "--command", "sleep 86400"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert not psutil.pid_exists(result["target"]["pids"][0])


def test_a_held_command_does_nothing_when_it_is_let_down(tmp_path):
    with HeldCommand(["touch", str(tmp_path / "touched")]) as held:
        assert held.wait(0.05) is None
    assert held.wait(0) is not None and not (tmp_path / "touched").exists()


# ── nothing is left ──


def test_nothing_is_attached_after_it_ends_and_nothing_of_the_machine_changes_while_it_runs():
    mounts = Path("/proc/self/mounts").read_text()
    with Probe("wakeups") as attached:
        held = programs(attached.pid)
        assert held and all(map(loaded, held))
        assert Path("/proc/self/mounts").read_text() == mounts
    none_left(held)


def test_tracefs_is_mounted_for_the_holder_alone_where_it_is_not():
    """In a mount namespace of the test's own, from which tracefs is taken first."""
    bare = (
        "for place in /sys/kernel/tracing /sys/kernel/debug/tracing /sys/kernel/debug; do while umount -l $place 2>/dev/null; do :; done; done; "
        '"$@" && grep -c "/sys/kernel.* tracefs" /proc/self/mounts'
    )
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", bare, "sh", *WAVE, "probe", "switches", "--for", "50ms"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "switches in" in done.stdout, done.stderr
    assert done.stdout.endswith("\n0\n")


def test_nothing_is_attached_after_an_error_in_the_block():
    with pytest.raises(ZeroDivisionError), Probe("switches") as attached:
        held, pid = programs(attached.pid), attached.pid
        raise ZeroDivisionError
    none_left(held)
    assert not psutil.pid_exists(pid)


def test_a_probe_that_is_killed_says_so_and_is_detached():
    with Probe("switches") as attached:
        held = programs(attached.pid)
        os.kill(attached.pid, signal.SIGKILL)
        with pytest.raises(WaveError, match=r"ended by itself \(signal 9\)"):
            attached.stop()
    none_left(held)


@contextmanager
def wave_probing():
    """`wave probe switches --for 10m` while it measures, its holder, and what the holder holds."""
    command = [*WAVE, "probe", "switches", "--for", "10m", "--json"]
    started = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    )
    try:
        line = started.stderr.readline()
        assert "measuring for 600 s" in line, line
        (holder,) = psutil.Process(started.pid).children()
        held = programs(holder.pid)
        assert held
        yield started, holder, held
    finally:
        started.kill()
        started.communicate()


def test_when_wave_is_killed_its_probe_goes_with_it():
    with wave_probing() as (wave, holder, held):
        wave.send_signal(signal.SIGKILL)
        wave.wait()
        until(lambda: not holder.is_running())
        none_left(held)


def test_a_holder_ends_with_its_parent_though_another_process_keeps_its_input_open():
    start = "import os, subprocess, sys; print(subprocess.Popen([sys.executable, '-I', sys.argv[1], str(os.getpid())]).pid, flush=True); input()"
    command = [sys.executable, "-c", start, str(Path(probe.__file__).with_name("attached.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        holder = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        parent.wait()
        until(lambda: not holder.is_running() or holder.status() == psutil.STATUS_ZOMBIE)


def test_ctrl_c_ends_early_and_prints_what_was_measured():
    with wave_probing() as (wave, holder, held):
        wave.send_signal(signal.SIGINT)
        out, err = wave.communicate(timeout=60)
        assert wave.returncode == INTERRUPTED
        assert 0 < json.loads(out)["seconds"] < 600
        assert err == "wave: interrupted\n"
        assert not holder.is_running()
        none_left(held)


# ── what they cost is measured over what they see ──


def test_the_bench_has_a_cost_for_each_probe_over_a_pair_and_over_all():
    metrics = run_bench(rounds=1, trips=300)["metrics"]
    assert set(metrics) == {"switch_ns", *(f"{kind}_{whom}_ns" for kind in KINDS for whom in ("pair", "all"))}
    assert metrics["switch_ns"] > 0


# ── where it cannot run ──


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("int x = nosuch;", r"switches\.c:\d+:\d+: error: use of undeclared identifier 'nosuch'"),
        ("TRACEPOINT_PROBE(sched, sched_waking) { return *(u64 *)bpf_get_current_pid_tgid(); }", "R0 invalid mem access"),
    ],
)
def test_what_clang_or_the_verifier_refuses_is_one_line_with_their_word(monkeypatch, capsys, wrong, told):
    text = Probe.text
    monkeypatch.setattr(Probe, "text", lambda self: text(self) + wrong + "\n")
    with pytest.raises(MissingError, match=told):
        switches(duration_s=0.01)
    assert run(["probe", "switches"]) == MissingError.exit_code
    assert capsys.readouterr().err.count("\n") == 1
