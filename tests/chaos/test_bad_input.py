"""What should never be asked, written or sent, against real daemons of the mechanism `priority`: one clear line, and the machine as it was."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.world import COUNT, HERE, World, bpf_objects, scheduling, until, why_not

ROOT = HERE.parents[1]
pytestmark = pytest.mark.skipif(bool(why_not()), reason=str(why_not()))
FLOOD = '''
from waveos import sched
from waveos.policy import Policy

class Flood(Policy, subsystem=sched, name="flood"):
    """Decides far too often."""

    def thread_runnable(self, msg, txns):
        for _ in range({orders}):
            sched.run(txns, tid=msg.tid, cpu=0)
'''


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    made.worker("tick")
    made.worker("spin", "2")
    for worker in made.workers:
        until(lambda worker=worker: made.word(worker, COUNT) > 2, "it begins")
    yield made
    made.close()


def goes_on(world: World) -> None:
    marks = [world.word(each, COUNT) for each in world.workers]
    until(lambda: all(world.word(each, COUNT) > mark + 3 for each, mark in zip(world.workers, marks, strict=True)), "the workers go on")


def is_attached(world: World) -> bool:
    told = world.ask("status")
    return bool(told and told["agent"] and told["counters"]["messages"])


def in_namespace(world: World, mounts: list[tuple[Path | str, Path | str]]) -> tuple[int, str]:
    """hostd's exit status and what it says, where these things hide those."""
    script = "".join(f"mount --bind {new} {old} && " for new, old in mounts) + 'exec "$@"'
    code = "import sys; from waveos.cli import run; sys.exit(run(['hostd', *sys.argv[1:]]))"
    pids = ",".join(str(each.pid) for each in world.workers)
    hostd = [sys.executable, "-P", "-c", code, "--enclave", world.name, "--cpus", "0", "--mechanism", "priority", "--pids", pids, "--no-agent"]
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", *hostd]
    told = subprocess.run(command, env=world.environment, capture_output=True, text=True, timeout=100)
    return told.returncode, told.stderr


def libbpf_file() -> str:
    ctypes.CDLL("libbpf.so.1")
    return next(line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libbpf.so" in line)


@pytest.mark.parametrize("lacks", ["BTF", "libbpf", "the verifier's consent"])
def test_what_the_machine_lacks_is_said_in_a_line_and_nothing_has_changed(world: World, lacks: str, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    nothing = tmp_path / "nothing"
    nothing.touch()
    mounts, says = {
        "BTF": ([(empty, "/sys/kernel/btf")], "this kernel has no BTF (/sys/kernel/btf/vmlinux)"),
        "libbpf": ([(nothing, libbpf_file())], "libbpf is missing, which loads BPF programs"),
        "the verifier's consent": (
            [(ROOT / "tests/bpf/refused.bpf.o", ROOT / "host/sched/priority.bpf.o")],
            "the kernel's verifier refuses program",
        ),
    }[lacks]
    before, objects = {each.pid: scheduling(each.pid) for each in world.workers}, bpf_objects()
    status, error = in_namespace(world, mounts)
    assert status == 5, error
    assert says in error.splitlines()[0] and "Traceback" not in error, error
    if lacks != "the verifier's consent":  # whose log follows the line
        assert error.count("\n") == 1, error
    assert {each.pid: scheduling(each.pid) for each in world.workers} == before
    assert world.left() == []
    until(lambda: not bpf_objects() - objects, "its BPF objects go")


def test_a_million_forged_decisions_are_refused_and_counted_and_nothing_outside_has_changed(world: World) -> None:
    bystander = world.start(["sleep", "1000"])
    os.setpriority(os.PRIO_PROCESS, bystander.pid, 3)
    outside = {pid: scheduling(pid)[pid] for pid in (bystander.pid, os.getpid())}
    before = {each.pid: scheduling(each.pid) for each in world.workers}
    hostd = world.hostd("--no-agent")
    until(lambda: world.ask("status"), "hostd answers")
    socket_path = world.run / world.name / "agent.sock"
    forger = world.start([sys.executable, "-P", str(HERE / "forger.py"), str(socket_path), "1000000", "1"], stdout=subprocess.PIPE, text=True)
    taken = int(forger.communicate(timeout=400)[0])
    counters = world.ask("status")["counters"]
    assert taken >= 990_000 and counters["decisions"] >= taken
    refused = {name: n for name, n in counters["outcomes"].items() if name != "committed"}
    assert all(refused[name] > 0 for name in ("invalid", "not_in_enclave", "stale")), refused
    assert {pid: scheduling(pid)[pid] for pid in outside} == outside
    goes_on(world)
    world.agent("fifo")
    until(lambda: is_attached(world), "an honest agent takes its place")
    goes_on(world)
    assert hostd.poll() is None
    hostd.send_signal(signal.SIGTERM)
    assert hostd.wait(30) == 0
    assert {each.pid: scheduling(each.pid) for each in world.workers} == before
    assert "Traceback" not in world.log("hostd.log")


@pytest.mark.parametrize(("orders", "says"), [(5_000, "too many orders from one handler call"), (60, "which is already staged")])
def test_a_policy_that_floods_is_stopped_with_one_line_and_the_members_go_on(world: World, tmp_path: Path, orders: int, says: str) -> None:
    hostd = world.hostd("--no-agent")
    until(lambda: world.ask("status"), "hostd answers")
    world.environment["WAVE_JIT"] = "0"
    flood = tmp_path / "flood.py"
    flood.write_text(FLOOD.format(orders=orders))
    agent = world.agent(str(flood), log="flood.log")
    assert agent.wait(100) == 3
    told = world.log("flood.log")
    assert told.count("\n") == 1 and says in told, told
    goes_on(world)
    assert hostd.poll() is None and "Traceback" not in world.log("hostd.log")


def test_control_clients_that_send_garbage_or_never_read_keep_nobody_from_being_answered(world: World) -> None:
    hostd = world.hostd("--no-agent")
    agent = world.agent("fifo")
    until(lambda: is_attached(world), "an agent is attached")
    path = str(world.run / world.name / "control.sock")
    deaf = socket.socket(socket.AF_UNIX)
    deaf.settimeout(0)
    deaf.connect(path)
    for _ in range(200):
        try:
            deaf.send(b'{"do": "dance"}\n{"do": "status"}\n' * 50)
        except OSError:  # it is full, or hostd has shown out who does not read
            break
    garbage = socket.socket(socket.AF_UNIX)
    garbage.settimeout(20)
    garbage.connect(path)
    garbage.sendall(os.urandom(2_000).replace(b"\n", b" ") + b"\n")
    with garbage.makefile() as answers:
        assert not json.loads(answers.readline())["ok"]
    endless = socket.socket(socket.AF_UNIX)
    endless.settimeout(20)
    endless.connect(path)
    with pytest.raises(OSError):  # noqa: PT011 - shown out in one of several ways
        while True:
            endless.sendall(b"x" * 65_536)
    half = socket.socket(socket.AF_UNIX)
    half.connect(path)
    half.sendall(b'{"do": "sta')
    assert world.ask("status", 30.0)["enclave"] == world.name
    twice = socket.socket(socket.AF_UNIX)
    twice.settimeout(20)
    twice.connect(path)
    twice.sendall(b'{"do": "status"}\n{"do": "status"}\n')
    answers = twice.makefile()
    assert [json.loads(answers.readline())["enclave"] for _ in range(2)] == [world.name] * 2
    answers.close()
    for each in (deaf, garbage, endless, half, twice):
        each.close()
    assert hostd.poll() is None and "Traceback" not in world.log("hostd.log")
    told = world.ask("status")
    assert told["agent"] and told["agent"]["pid"] == agent.pid and told["attachments"] == 1, f"{agent.poll()}, {world.log('agentd.log')}, {told}"
    goes_on(world)


def test_members_that_fork_while_they_are_taken_in_lose_no_grandchild(world: World) -> None:
    worker = world.worker("beget")
    until(lambda: world.word(worker, COUNT) > 2, "it begins")
    hostd = world.hostd("--no-agent")
    until(lambda: world.ask("status"), "hostd answers")
    goes_on(world)
    world.words[0] = 1
    for each in world.workers:
        assert each.process.wait(30) == 0
    assert hostd.wait(30) == 0, "its last member has ended"
    assert world.left() == []
