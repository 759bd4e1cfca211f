"""hostd and agentd as processes, joined by a socket, over a simulated mechanism: whoever dies, no thread is lost and nothing stays changed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from waveos.agents import agentd
from waveos.cli import run
from waveos.errors import ConfigError, LinkError
from waveos.handover import hear, tell
from waveos.host import doors, restore
from waveos.host.enclave import CGROUPS
from waveos.host.hostd import Hostd
from waveos.host.sched import attributes
from waveos.host.settings import read
from waveos.policy import load_policy

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="hostd is root's")
DEADLINE_S = 300.0
FAKE = Path(__file__).with_name("fake_hostd.py")
WAVE = ["-c", "import sys; from waveos.cli import run; sys.exit(run(['hostd', *sys.argv[1:]]))"]
CORE = str(max(os.sched_getaffinity(0)))


def until(condition: Callable[[], Any], what: str = "") -> Any:
    deadline = time.monotonic() + DEADLINE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, what or "it never came true"
        time.sleep(0.01)
    return found


class World:
    """Sleepers, the folder of enclaves, and the daemons of one test."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, f"test-{os.getpid()}"
        self.processes: list[subprocess.Popen[str]] = []
        self.sleepers = [self.start(["sleep", "1000"]).pid for _ in range(3)]

    def start(self, command: list[str], **options: Any) -> subprocess.Popen[str]:
        process = subprocess.Popen(command, text=True, **options)
        self.processes.append(process)
        return process

    def hostd(self, *arguments: str, pids: list[int] | None = None, fake: bool = True) -> subprocess.Popen[str]:
        program = [str(FAKE)] if fake else WAVE
        members = ["--pids", ",".join(map(str, self.sleepers if pids is None else pids))] if pids != [] else []
        command = [sys.executable, "-P", *program, "--enclave", self.name, "--cpus", "0", *members, *arguments]
        return self.start(command, stderr=subprocess.PIPE)

    def agentd(self, *arguments: str) -> subprocess.Popen[str]:
        return self.start([sys.executable, "-P", "-m", "waveos.agents.agentd", self.url, *arguments], stderr=subprocess.PIPE)

    @property
    def url(self) -> str:
        return f"shm://{self.folder}/{self.name}/agent.sock"

    def status(self) -> dict[str, Any] | None:
        try:
            return doors.ask(self.name, {"do": "status"})
        except ConfigError:
            return None

    def goes_on(self) -> None:
        """Every member runs again and again, from now on."""

        def rounds() -> list[int]:
            status = self.status()
            return status["counters"]["rounds"] if status and status["agent"] else []

        before = until(rounds)
        until(lambda: (now := rounds()) and all(b - a >= 3 for a, b in zip(before, now, strict=False)), f"a thread is stuck: {before}, {rounds()}")

    def nices(self) -> list[int]:
        return [attributes.read(pid).nice for pid in self.sleepers]

    def end(self) -> None:
        for process in reversed(self.processes):
            process.kill()
            process.communicate()


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """What the agents of these tests would compile while their hosts wait."""
    agentd._compile()
    for policy in ("fifo", "shinjuku"):
        load_policy(policy).bind(n_cpus=1)


@pytest.fixture
def world(tmp_path_factory, monkeypatch) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("run")
    monkeypatch.setenv("WAVE_RUN", str(folder))
    monkeypatch.setattr(restore, "RUN", folder)
    made = World(folder)
    yield made
    made.end()


def said(process: subprocess.Popen[str]) -> str:
    return process.communicate(timeout=DEADLINE_S)[1]


def stop(process: subprocess.Popen[str], number: int = signal.SIGTERM) -> str:
    process.send_signal(number)
    return said(process)


def test_an_agent_that_hostd_starts_runs_every_member_and_at_the_end_all_is_as_it_was(world):
    before = world.nices()
    hostd = world.hostd("--policy", "fifo", "--agent-core", CORE)
    world.goes_on()
    assert world.nices() == [7, 7, 7]
    status = world.status()
    assert (status["policy"], status["attachments"], status["agents_lost"]) == ("fifo", 1, 0)
    assert status["report"]["messages"] > 0 and status["report"]["policy"] == "fifo"
    assert status["counters"]["rings"] > 0, "an idle CPU is kicked"
    stop(hostd)
    assert hostd.returncode == 0
    assert world.nices() == before
    assert list(world.folder.iterdir()) == []


def test_an_agent_that_is_killed_is_followed_by_another_and_no_thread_is_lost(world):
    world.hostd("--policy", "fifo", "--agent-core", CORE)
    for kills in range(1, 4):
        world.goes_on()
        os.kill(world.status()["agent"]["pid"], signal.SIGKILL)
        until(lambda kills=kills: world.status()["agents_lost"] == kills)
    world.goes_on()
    assert world.status()["attachments"] == 4


def test_an_agent_that_hangs_is_taken_for_lost_and_comes_back(world):
    world.hostd("--no-agent")
    agent = world.agentd("fifo")
    world.goes_on()
    agent.send_signal(signal.SIGSTOP)
    until(lambda: world.status()["counters"]["falls"] == 1)
    agent.send_signal(signal.SIGCONT)
    agent.kill()
    until(lambda: world.status()["agent"] is None)
    world.agentd("fifo")
    world.goes_on()


def test_a_hostd_that_is_killed_leaves_a_journal_and_the_next_one_has_the_same_agent(world):
    before = world.nices()
    first = world.hostd("--no-agent")
    agent = world.agentd("fifo")
    world.goes_on()
    first.kill()
    first.wait()
    assert world.nices() == [7, 7, 7]
    second = world.hostd("--no-agent")
    world.goes_on()
    assert agent.poll() is None and world.status()["agent"]["pid"] == agent.pid
    second.kill()
    second.wait()
    assert run(["restore"]) == 0
    assert world.nices() == before
    stop(agent)
    assert agent.returncode == 0


def test_the_policy_of_a_running_enclave_is_changed_and_no_thread_is_lost(world, capsys):
    world.hostd("--policy", "fifo", "--agent-core", CORE)
    world.goes_on()
    pid = world.status()["agent"]["pid"]
    assert run(["set-policy", world.name, "shinjuku", "--param", "quantum_us=50"]) == 0
    assert capsys.readouterr().out == f"{world.name}: shinjuku, no longer fifo\n"
    world.goes_on()
    status = world.status()
    assert (status["policy"], status["params"], status["agent"]["pid"], status["agents_lost"]) == ("shinjuku", {"quantum_us": 50.0}, pid, 0)
    assert status["report"]["policy"] == "shinjuku"
    os.kill(pid, signal.SIGKILL)
    until(lambda: (agent := world.status()["agent"]) and agent["pid"] != pid)
    world.goes_on()
    assert world.status()["report"]["policy"] == "shinjuku", "the next agent runs what was set"


def test_a_policy_that_cannot_be_had_leaves_the_old_one_running(world, capsys):
    world.hostd("--policy", "fifo", "--agent-core", CORE)
    world.goes_on()
    for arguments, says in (
        (["fifi"], "no policy 'fifi' (did you mean 'fifo'?)"),
        (["fifo", "--param", "quantum_us=1"], "quantum_us"),
        (["region_age"], "subsystem"),
    ):
        assert run(["set-policy", world.name, *arguments]) == 2
        error = capsys.readouterr().err
        assert says in error and error.rstrip().endswith("'fifo' runs on") and error.count("\n") == 1
    world.goes_on()
    assert world.status()["attachments"] == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--policy", "nope"), "nope"),
        (("--policy", "fifo", "--param", "quantum=1"), "has no parameter 'quantum'"),
        (("--policy", "sol"), "policy 'sol' is of another subsystem"),
    ],
    ids=["no policy", "no parameter", "another subsystem"],
)
def test_a_first_agent_that_cannot_begin_ends_hostd_with_its_line_and_its_status(world, arguments, says):
    before = world.nices()
    hostd = world.hostd(*arguments)
    told = said(hostd)
    assert hostd.returncode == 3
    assert sum(says in line for line in told.splitlines()) == 1
    assert told.splitlines()[-1].endswith("its agent cannot begin (status 3; it has said why), so the enclave ends")
    assert world.nices() == before


def test_a_second_agent_is_refused_until_the_first_is_gone(world):
    world.hostd("--no-agent")
    first = world.agentd("fifo")
    world.goes_on()
    second = world.agentd("fifo")
    until(lambda: world.status()["agents_refused"] > 0)
    assert world.status()["agent"]["pid"] == first.pid
    stop(first)
    until(lambda: (agent := world.status()["agent"]) and agent["pid"] == second.pid)
    world.goes_on()


def as_nobody(function: Callable[[], object]) -> str:
    """What the function returns, or raises, in a process of the user nobody. (Forked: that user may not be able to run this Python.)"""
    reads, writes = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            os.write(writes, str(function()).encode())
        except Exception as error:
            os.write(writes, str(error).encode())
        finally:
            os._exit(0)
    os.close(writes)
    os.waitpid(child, 0)
    with open(reads) as told:
        return told.read()


def test_a_user_who_may_not_is_refused_for_good(world):
    world.hostd("--no-agent")
    until(world.status)
    folder = os.open(world.folder / world.name, os.O_PATH)  # the way to it need not be open to everybody
    try:
        (world.folder / world.name / "agent.sock").chmod(0o666)
        (world.folder / world.name / "control.sock").chmod(0o666)

        def knock(door: str, kind: int) -> bytes:
            with socket.socket(socket.AF_UNIX, kind) as line:
                line.connect(f"/proc/self/fd/{folder}/{door}")
                return line.recv(4_096)

        told = as_nobody(lambda: json.loads(knock("agent.sock", socket.SOCK_SEQPACKET)))
        assert "user 65534" in told and "'final': True" in told
        assert "user 65534" in as_nobody(lambda: json.loads(knock("control.sock", socket.SOCK_STREAM))["error"])
    finally:
        os.close(folder)
    assert world.status()["agents_refused"] == 1


def test_an_agent_of_another_version_and_nonsense_are_refused_and_the_door_stays_open(world):
    world.hostd("--no-agent")
    until(world.status)
    path = str(world.folder / world.name / "agent.sock")
    for message, says in (
        (b'{"hello": {"version": 9}}', "speaks version 9"),
        (b"[1]", ""),
        (b'{"hello": 3}', "makes no sense"),
        (b'{"ready": 1}', "no sense"),
    ):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as line:
            line.settimeout(DEADLINE_S)
            line.connect(path)
            line.send(message)
            assert says in line.recv(4096).decode()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as line:
        line.settimeout(DEADLINE_S)
        line.connect(path)
        tell(line, {"hello": {"version": 1}})
        facts = hear(line)[0]["facts"]
        assert (facts["enclave"], facts["cpus"], facts["threads"], facts["ahead"]) == (world.name, 1, 64, 1)


ODD_WISHES = (
    {"policy": ["fifo"]},
    {"policy": 7},
    {"policy": "--record"},
    {"policy": "fi\0fo"},
    {"policy": "fi\ud800fo"},
    {"policy": "x" * 9_000},
    {"policy": "fifo", "params": [1]},
    {"policy": "fifo", "params": "quantum_us"},
    {"policy": "fifo", "params": {"quantum_us": "1"}},
    {"policy": "fifo", "params": {"quantum_us": True}},
    {"policy": "fifo", "params": {"quantum_us": [1]}},
    {"policy": "fifo", "params": {"quantum_us": float("nan")}},
    {"policy": "fifo", "params": {"quantum_us": 10**400}},
    {"policy": "fifo", "params": {"quan\0tum": 1}},
)
"""Policies and parameters that are told on, to people and to the next agent's command line, and must not be."""


def test_an_agent_that_is_ready_with_an_odd_policy_is_refused_and_the_policy_stays(world):
    world.hostd("--no-agent", "--policy", "fifo")
    until(world.status)
    path = str(world.folder / world.name / "agent.sock")
    for ready in ODD_WISHES:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as line:
            line.settimeout(DEADLINE_S)
            line.connect(path)
            tell(line, {"ready": ready})
            assert 'may have "policy", a name, and "params", a table of numbers' in str(hear(line)[0].get("refused")), ready
    status = world.status()
    assert (status["policy"], status["params"], status["attachments"]) == ("fifo", {}, 0)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as line:
        line.settimeout(DEADLINE_S)
        line.connect(path)
        tell(line, {"ready": {"policy": "./my policies/new.py:Mine", "params": {"quantum_us": 50, "share": 0.5}}})
        assert "attached" in hear(line)[0]
        assert world.status()["policy"] == "./my policies/new.py:Mine"
    until(lambda: world.status()["agent"] is None)


def test_a_member_of_the_group_may_decide_and_names_no_policy_for_the_next_agent(world):
    world.hostd("--no-agent", "--policy", "fifo", "--group", "nogroup")
    until(world.status)
    folder = os.open(world.folder / world.name, os.O_PATH)  # the way to it need not be open to everybody

    def attach() -> str:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as line:
            line.connect(f"/proc/self/fd/{folder}/agent.sock")
            tell(line, {"ready": {"policy": "/tmp/mine.py:Mine", "params": {}}})
            return next(iter(hear(line)[0]))

    try:
        assert as_nobody(attach) == "attached"
    finally:
        os.close(folder)
    until(lambda: world.status()["agent"] is None)
    assert (world.status()["policy"], world.status()["attachments"]) == ("fifo", 1)


def test_control_takes_json_lines_and_says_what_is_wrong_with_others(world):
    world.hostd("--no-agent")
    until(world.status)
    with socket.socket(socket.AF_UNIX) as line:
        line.settimeout(DEADLINE_S)
        line.connect(str(world.folder / world.name / "control.sock"))
        answers = line.makefile()
        for request, says in (
            ("nonsense", "write one JSON object a line"),
            ('{"do": 3}', "write one JSON object a line"),
            ('{"do": "dance"}', "it knows status, watch, set-policy and stop"),
            ('{"do": "set-policy"}', "wants"),
            ('{"do": "set-policy", "policy": "fifo", "params": {"a": "b"}}', "a table of numbers"),
            *((json.dumps({"do": "set-policy", **wish}), "a table of numbers") for wish in ODD_WISHES),
            ('{"do": "set-policy", "policy": null, "params": null}', "wants"),
            ('{"do": "set-policy", "policy": "fifo"}', "has no agent now"),
        ):
            line.sendall(request.encode() + b"\n")
            answer = json.loads(answers.readline())
            assert not answer["ok"] and says in answer["error"]
        line.sendall(b'{"do": "status"}\n{"do": "stop"}\n')
        assert json.loads(answers.readline())["mechanism"] == "simulated"
        assert json.loads(answers.readline()) == {"ok": True}
    until(lambda: world.status() is None)


def test_a_hostd_that_ends_with_a_question_unread_is_told_as_gone(world):
    (world.folder / "gone").mkdir()
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(world.folder / "gone/control.sock"))
        door.listen(1)

        def end() -> None:
            line, _ = door.accept()
            line.recv(1, socket.MSG_PEEK)
            line.close()

        ending = threading.Thread(target=end)
        ending.start()
        with pytest.raises(LinkError, match="the hostd of 'gone' went away before it answered"):
            doors.ask("gone", {"do": "status"})
        ending.join()


def test_status_and_enclaves_are_tables_and_json(world, capsys):
    hostd = world.hostd("--no-agent")
    until(world.status)
    assert run(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["enclave"] == world.name
    assert run(["status"]) == 0
    assert "none: the enclave is the kernel's" in capsys.readouterr().out
    assert run(["enclaves", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["pid"] == hostd.pid
    assert run(["enclaves"]) == 0
    assert world.name in capsys.readouterr().out
    assert run(["status", "nobody"]) == 2
    assert f"no hostd runs for an enclave 'nobody'; those that do: {world.name}" in capsys.readouterr().err


def test_drained_an_enclave_is_as_it_was_and_its_hostd_has_ended(world, capsys):
    before = world.nices()
    hostd = world.hostd("--no-agent")
    world.agentd("fifo")
    world.goes_on()
    assert run(["set-policy", world.name, "shinjuku", "--param", "quantum_us=500"]) == 0
    assert f"{world.name}: shinjuku, no longer fifo" in capsys.readouterr().out
    assert run(["drain", world.name]) == 0
    assert "everything is as it was" in capsys.readouterr().out
    said(hostd)
    assert hostd.returncode == 0, "systemd does not start it again"
    assert world.nices() == before and list(world.folder.iterdir()) == []


def test_a_command_runs_in_the_enclave_from_its_first_instruction_and_its_status_is_hostds(world):
    code = "import os, sys; sys.exit(os.nice(0))"
    hostd = world.hostd("--no-agent", "--", sys.executable, "-c", code, pids=[])
    said(hostd)
    assert hostd.returncode == 7, "the nice value that members get"


def test_a_command_ends_with_its_hostd(world):
    hostd = world.hostd("--no-agent", "--", "sh", "-c", "sleep 1000 & sleep 1000", pids=[])
    until(world.status)
    tree = until(lambda: [pid for pid in sessions() if pid[1] == "sleep"])
    stop(hostd)
    assert not [pid for pid in tree if restore.start_time(pid[0]) is not None]


def sessions() -> list[tuple[int, str]]:
    """(pid, name) of processes whose session is led by a child of a child of ours, that is, by a hostd's command."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit():
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                leader = (Path("/proc") / fields[3] / "stat").read_text().rpartition(")")[2].split()
                grandparent = (Path("/proc") / leader[1] / "stat").read_text().rpartition(")")[2].split()
                if grandparent[1] == str(os.getpid()):
                    found.append((int(folder.name), (folder / "comm").read_text().strip()))
        except (OSError, IndexError):
            continue
    return found


def test_hostd_ends_when_its_last_member_has(world):
    hostd = world.hostd("--no-agent")
    until(world.status)
    for process in world.processes[:3]:
        process.kill()
        process.wait()
    said(hostd)
    assert hostd.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "pids", "says"),
    [
        (["--policy", "fifo"], [2], "PID 2 (kthreadd) is a kernel thread"),
        (["--policy", "fifo"], [1], "PID 1 starts and reaps all others"),
        (["--policy", "fifo"], [2**22 + 1], "is not there"),
        ([], None, "policy is missing"),
        (["--policy", "fifo"], [], "who belongs to the enclave is said by one of pids, cgroup and command, not by none"),
        (["--policy", "fifo", "--cgroup", "/no/such/group"], [], "there is no cgroup '/no/such/group'"),
        (["--policy", "fifo", "--agent-user", "no-such-user"], None, "there is no user 'no-such-user'"),
        (["--policy", "fifo", "--group", "no-such-group"], None, "there is no group 'no-such-group'"),
        (["--policy", "fifo", "--agent-core", "0"], None, "is a CPU of the enclave"),
        (["--policy", "fifo", "--cpus", "4096"], None, "CPU 4096 is not online"),
        (["--policy", "fifo", "--cpus", "zero"], None, "is no list of CPUs"),
        (["--no-agent", "--", "no-such-command"], [], "there is no command 'no-such-command'"),
        (["--no-agent", "--config", "/no/such/file.toml"], None, "/no/such/file.toml: No such file"),
    ],
)
def test_what_cannot_be_is_one_line_and_changes_nothing(world, arguments, pids, says):
    before = world.nices()
    hostd = world.hostd(*arguments, pids=pids)
    error = said(hostd)
    assert hostd.returncode == 2
    assert says in error and error.count("\n") == 1, error
    assert world.nices() == before
    assert list(world.folder.iterdir()) == []


def test_an_enclave_that_has_an_owner_and_a_thread_that_has_an_enclave_are_refused(world):
    first = world.hostd("--no-agent")
    until(world.status)
    assert f"already has an owner, pid {first.pid}" in said(world.hostd("--no-agent"))
    name, world.name = world.name, world.name + "-other"
    assert f"belongs to the enclave '{name}'" in said(world.hostd("--no-agent"))
    world.name = name
    assert world.nices() == [7, 7, 7]


def test_without_root_it_is_one_line():
    settings = read(None, {"enclave": "x", "cpus": "0", "pids": [os.getpid()], "agent.start": False})
    assert (
        as_nobody(lambda: Hostd(settings))
        == "hostd changes how threads are scheduled and loads BPF programs: run it as root, or let systemd start it"
    )


@pytest.fixture
def cgroup() -> Iterator[Path]:
    hierarchy = next((CGROUPS / part for part in ("unified", "", "pids", "cpu") if (CGROUPS / part / "cgroup.procs").exists()), None)
    if hierarchy is None:
        pytest.skip("no cgroups are mounted here")
    folder = hierarchy / f"wave-test-{os.getpid()}"
    folder.mkdir()
    yield folder
    for pid in (folder / "cgroup.procs").read_text().split():
        (hierarchy / "cgroup.procs").write_text(pid)
    until(lambda: not (folder / "cgroup.procs").read_text())
    folder.rmdir()


def test_what_is_in_a_cgroup_is_in_the_enclave_and_what_leaves_it_is_as_it_was(world, cgroup):
    before = world.nices()
    for pid in world.sleepers[:2]:
        (cgroup / "cgroup.procs").write_text(str(pid))
    world.hostd("--no-agent", "--cgroup", str(cgroup), pids=[])
    until(world.status)
    assert world.nices() == [7, 7, before[2]]
    (cgroup / "cgroup.procs").write_text(str(world.sleepers[2]))
    until(lambda: world.nices() == [7, 7, 7])
    (cgroup.parent / "cgroup.procs").write_text(str(world.sleepers[0]))
    until(lambda: world.nices() == [before[0], 7, 7])


def test_the_root_of_a_hierarchy_is_no_enclave(world, cgroup):
    assert "holds every process of the machine" in said(world.hostd("--no-agent", "--cgroup", str(cgroup.parent), pids=[]))


def test_hostd_keeps_no_more_than_it_needs(world):
    from waveos.host.privilege import HOSTD, held

    hostd = world.hostd("--no-agent")
    until(world.status)
    assert held(hostd.pid) <= set(HOSTD)
    assert "CAP_SYS_ADMIN" not in held(hostd.pid)
    assert attributes.read(hostd.pid).policy == "FIFO"
    assert attributes.affinity(hostd.pid) == [0]
    locked = next(line for line in Path(f"/proc/{hostd.pid}/status").read_text().splitlines() if line.startswith("VmLck"))
    assert int(locked.split()[1]) > 1_000


def test_hostd_brings_no_compiler_with_it():
    modules = "waveos.cli.hostd, waveos.host.hostd, waveos.host.settings, waveos.host.doors, waveos.host.sched.mechanism"
    code = f"import sys; import waveos.cli.app, {modules}; sys.exit(bool({{'numba', 'llvmlite', 'scipy'}} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-P", "-c", code]).returncode == 0
