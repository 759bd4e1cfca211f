"""hostd with mechanism `sched_ext`, agentd as a process of its own, or outside this machine, and real programs in the enclave: they finish, whoever dies."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from waveos import sched
from waveos.cli import run
from waveos.errors import LinkError, WaveError
from waveos.host import doors, restore
from waveos.host.sched import attributes
from waveos.link import open_link
from waveos.record import VERSION
from waveos.sched import Decision, Message

STATE = Path("/sys/kernel/sched_ext/state")
DEADLINE_S = 480.0  # a guest on a busy machine is slow; nothing here is a measurement
WAVE = [sys.executable, "-P", "-c", "import sys; from waveos.cli import run; sys.exit(run(sys.argv[1:]))"]
PATIENT = ["--setting", "silent_ms=3000", "--setting", "default_ms=2000"]
NAP_US = "1"
"""The agent naps once it has nothing to do: QEMU gives the guest's CPUs turns of up to 100 ms, and who polls would sit its turns out."""
IVSHMEM = ["0x1af4", "0x1110"]
POLICIES = {"fifo": ["--policy", "fifo"], "shinjuku": ["--policy", "shinjuku", "--param", "quantum_us=20000"]}
LOADS = (
    "hackbench --pipe --groups 1 --fds 3 --loops 200",
    "stress-ng --quiet --cpu 2 --cpu-ops 20 --switch 1 --switch-ops 200 --fork 1 --fork-ops 5 --timeout 100",
)
WORKERS = """
import os, sys, time
def work():
    while not os.path.exists(sys.argv[1]):
        for _ in range(500):
            pass
        time.sleep(0.05)
children = []
while len(children) < 3:
    children.append(os.fork())
    if not children[-1]:
        work()
        os._exit(0)
work()
sys.exit(max(os.waitpid(child, 0)[1] for child in children))
"""
"""Four processes that compute a little and sleep, until a file is there: who comes up beside them has the same emulated processor. The status is 0 if all
came to their end."""


def until(condition: Callable[[], Any], what: str) -> Any:
    """Wait for something to be true; what it was. It is not asked often: in a guest each question takes its time from those who work."""
    end = time.monotonic() + DEADLINE_S
    while not (found := condition()):
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(2)
    return found


class World:
    """The enclave of one test on CPU 1; its agent, hostd and the test share CPU 0."""

    def __init__(self, folder: Path) -> None:
        self.name, self.folder, self.end = f"guest-{os.getpid()}", folder, folder.with_name("end")
        self._processes: list[subprocess.Popen[Any]] = []
        self._settings = folder.with_name("hostd.toml")
        self._settings.write_text(f"[agent]\ncore = 0\nidle_us = {NAP_US}\n")

    def start(self, command: list[str]) -> subprocess.Popen[Any]:
        self._processes.append(subprocess.Popen(command))
        return self._processes[-1]

    def hostd(self, *arguments: str) -> subprocess.Popen[Any]:
        place = ["--enclave", self.name, "--cpus", "1", "--hostd-cpu", "0", "--mechanism", "sched_ext", *PATIENT]
        return self.start([*WAVE, "hostd", "--config", str(self._settings), *place, *arguments])

    def workers(self) -> subprocess.Popen[Any]:
        return self.start([sys.executable, "-S", "-c", WORKERS, str(self.end)])

    def status(self) -> dict[str, Any]:
        try:
            return doors.ask(self.name, {"do": "status"}, 30)
        except (WaveError, OSError):  # it is not there yet, or no more
            return {}

    def committed(self) -> int:
        status = self.status()
        return int(status["counters"]["outcomes"]["committed"]) if status.get("agent") else 0

    def rules(self) -> dict[str, Any]:
        """Wait until the agent's decisions are done, from now on."""
        before = until(self.committed, "decisions are committed")
        until(lambda: self.committed() > before + 20, "more decisions are committed")
        return self.status()

    def finish(self, process: subprocess.Popen[Any]) -> int:
        """Let the workers come to their end; the status of whoever waits for them."""
        self.end.touch()
        return process.wait(DEADLINE_S)

    def close(self) -> None:
        self.end.touch()
        for process in reversed(self._processes):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.terminate()
                process.wait(10)
            process.kill()
            process.wait()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    folder = tmp_path / "run"
    folder.mkdir()
    monkeypatch.setenv("WAVE_RUN", str(folder))
    monkeypatch.setattr(restore, "RUN", folder)
    os.sched_setaffinity(0, {0})
    made = World(folder)
    yield made
    made.close()
    os.sched_setaffinity(0, {0, 1})


def nothing_is_left(world: World) -> None:
    until(lambda: STATE.read_text().strip() == "disabled", "the scheduler is unregistered")
    assert list(world.folder.iterdir()) == []


@pytest.mark.parametrize("policy", POLICIES)
def test_programs_run_to_their_end_under_a_policy(world, policy):
    begin = world.folder.with_name("begin")
    program = " && ".join([f"until [ -e {begin} ]; do sleep 0.1; done", *LOADS])
    hostd = world.hostd(*POLICIES[policy], "--", "sh", "-c", program)
    world.rules()
    begin.touch()
    last = world.status()
    until(lambda: (last.update(world.status()), hostd.poll() is not None)[1], "the programs end")
    assert hostd.returncode == 0
    assert last["counters"]["ended_by_kernel"] == ""
    nothing_is_left(world)


@pytest.mark.slow
def test_an_agent_that_is_killed_is_followed_by_another_and_all_finish(world):
    hostd = world.hostd(*POLICIES["fifo"], "--", sys.executable, "-S", "-c", WORKERS, str(world.end))
    os.kill(world.rules()["agent"]["pid"], signal.SIGKILL)
    until(lambda: world.status().get("agents_lost") == 1, "hostd saw it die")
    world.rules()
    assert world.finish(hostd) == 0
    nothing_is_left(world)


def test_when_hostd_is_killed_the_kernel_has_its_threads_and_all_finish(world):
    workers = world.workers()
    before = attributes.read(workers.pid), attributes.affinity(workers.pid)
    hostd = world.hostd(*POLICIES["fifo"], "--pids", str(workers.pid))
    world.rules()
    assert attributes.read(workers.pid).policy == "EXT"
    hostd.kill()
    hostd.wait()
    until(lambda: STATE.read_text().strip() == "disabled", "the kernel took its scheduler down")
    assert run(["restore"]) == 0
    assert (attributes.read(workers.pid), attributes.affinity(workers.pid)) == before
    assert world.finish(workers) == 0
    nothing_is_left(world)


@pytest.mark.slow
def test_a_silent_agent_gives_way_to_fifo_then_to_the_kernel_and_takes_over_again_when_it_wakes(world):
    workers = world.workers()
    hostd = world.hostd("--no-agent", "--pids", str(workers.pid))
    agent = world.start([*WAVE, "agentd", f"shm://{world.folder}/{world.name}/agent.sock", "fifo", "--core", "0", "--idle-us", NAP_US])
    world.rules()
    agent.send_signal(signal.SIGSTOP)
    until(lambda: world.status()["counters"]["fallbacks"] > 0, "the queue in the kernel took over")
    until(lambda: STATE.read_text().strip() == "disabled", "the kernel's default took over")
    ran = Path(f"/proc/{workers.pid}/schedstat").read_text()
    until(lambda: Path(f"/proc/{workers.pid}/schedstat").read_text() != ran, "the threads go on")
    agent.send_signal(signal.SIGCONT)
    until(lambda: STATE.read_text().strip() == "enabled", "it is registered again")
    world.rules()
    assert world.finish(workers) == 0
    hostd.wait(DEADLINE_S)
    assert hostd.returncode == 0
    nothing_is_left(world)


@pytest.fixture(scope="module")
def bar() -> str:
    """The URL of the device whose memory an agent outside this machine has as well."""
    found = [
        folder
        for folder in Path("/sys/bus/pci/devices").iterdir()
        if [(folder / name).read_text().strip() for name in ("vendor", "device")] == IVSHMEM
    ]
    assert len(found) == 1, "tests/vm/outside.py gives the guest one such device"
    url = f"bar://{found[0].name}"
    with pytest.raises(LinkError, match="is not enabled, so its memory does not answer"):
        open_link(url, side="host")
    (found[0] / "enable").write_text("1")
    assert (found[0] / "resource2_wc").exists()
    return url


def types_of(bar: str) -> set[str]:
    """The kinds of memory that the kernel has given to pages of the device."""
    begin, last = (
        int(word, 16) for word in Path("/sys/bus/pci/devices", bar.removeprefix("bar://"), "resource").read_text().splitlines()[2].split()[:2]
    )
    debug = Path("/sys/kernel/debug")
    if not (debug / "x86").exists():
        subprocess.run(["mount", "-t", "debugfs", "none", str(debug)], check=True)
    listed = re.findall(r"mem 0x([0-9a-f]+)-0x[0-9a-f]+\] (\S+)", (debug / "x86/pat_memtype_list").read_text())
    return {kind for at, kind in listed if begin <= int(at, 16) <= last}


@pytest.mark.slow
def test_an_agent_outside_this_machine_decides_on_what_it_is_told_through_a_pci_bar(bar):
    told = np.zeros(4, sched.MESSAGE)
    told["version"], told["subsystem"], told["seq"] = VERSION, sched.SUBSYSTEM, 1
    told["type"] = Message.CPU_NEW, Message.CPU_IDLE, Message.THREAD_NEW, Message.THREAD_RUNNABLE
    told["tid"], told["cpu"] = [-1, -1, 3, 3], [0, 0, -1, -1]
    with open_link(bar, side="host", silence_s=DEADLINE_S) as host:
        host.await_agent(DEADLINE_S)
        assert host.policy == "fifo"
        assert types_of(bar) >= {"write-combining", "uncached-minus"}, "each page has the type that was asked for"
        assert host.send_messages(told) == 4
        decided = host.poll_txns(wait_ns=round(DEADLINE_S * 1e9))
        assert [(int(each["type"]), int(each["tid"]), int(each["cpu"])) for each in decided] == [(Decision.RUN, 3, 0)]


def test_threads_of_this_machine_are_scheduled_by_an_agent_outside_it_through_a_pci_bar(world, bar):
    workers = world.workers()
    hostd = world.hostd("--no-agent", "--pids", str(workers.pid))
    relay = world.start([*WAVE, "relay", world.name, bar])
    assert world.rules()["agent"]["pid"] == relay.pid
    assert world.finish(workers) == 0
    hostd.wait(DEADLINE_S)
    assert hostd.returncode == 0
    nothing_is_left(world)
