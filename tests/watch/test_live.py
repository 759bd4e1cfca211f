"""The daemons as they are: hostd over a simulated mechanism is asked and looked at, and hostd on this kernel is traced."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from waveos.bench.conformance_live import LOAD, why_not
from waveos.cli import run
from waveos.errors import WaveError
from waveos.host import doors, restore
from waveos.sched.records import Message
from waveos.watch import recording, source
from waveos.watch.metrics import Daemons, registry_of, text
from waveos.watch.view import Look, compare

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="hostd is root's")
FAKE = Path(__file__).parents[1] / "host" / "fake_hostd.py"
HOSTD = ["-c", "import sys; from waveos.cli import run; sys.exit(run(['hostd', *sys.argv[1:]]))"]
DEADLINE_S = 300.0
STARVED_S = 60.0


def until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + DEADLINE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.02)
    return found


@pytest.fixture
def folder(tmp_path_factory, monkeypatch) -> Path:
    made = tmp_path_factory.mktemp("run")
    monkeypatch.setenv("WAVE_RUN", str(made))
    monkeypatch.setattr(restore, "RUN", made)
    return made


@contextlib.contextmanager
def daemon(name: str, program: list[str], *arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-P", *program, "--enclave", name, *arguments]
    process = subprocess.Popen(command, text=True, stderr=subprocess.PIPE)

    def attached() -> bool:
        assert process.poll() is None, process.communicate()[1]
        with contextlib.suppress(WaveError):
            return bool(source.status(name)["agent"])
        return False

    try:
        until(attached, "its agent never came")
        yield process
    finally:
        process.terminate()
        process.communicate()


@pytest.fixture
def enclave(folder) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """hostd and agentd over a simulated mechanism, with JSON logs."""
    name, core = f"see-{os.getpid()}", str(max(os.sched_getaffinity(0)))
    with subprocess.Popen(["sleep", "1000"]) as sleeper:
        try:
            with daemon(name, [str(FAKE)], "--policy", "fifo", "--cpus", "0", "--pids", str(sleeper.pid), "--agent-core", core) as hostd:
                yield name, hostd
        finally:
            sleeper.kill()


def test_a_hostd_of_this_machine_is_told_of_without_naming_it(enclave):
    name, _ = enclave
    samples = {
        (sample.name, sample.labels.get("enclave")): sample.value
        for family in text_string_to_metric_families(text(registry_of(Daemons())))
        for sample in family.samples
    }
    assert samples["wave_hostd_up", name] == 1 and samples["wave_agent_attached", name] == 1
    assert samples["wave_agent_messages_total", name] > 0
    rows = compare(Look(1.0, source.statuses(detail=True)))
    assert [row["enclave"] for row in rows] == [name] and rows[0]["policy"] == "fifo"


def test_what_goes_through_the_queues_is_seen_by_one_who_looks_on_and_hostds_end_ends_it(enclave):
    name, hostd = enclave
    seen = recording.record(name, 1.0)
    assert seen.lost == 0 and seen.over == ""
    kinds = set(seen.messages["type"].tolist())
    assert {int(Message.THREAD_RUNNABLE), int(Message.TXN_OUTCOME), int(Message.THREAD_BLOCKED)} <= kinds
    assert (seen.decisions["tid"] == 0).all() and len(seen.decisions) > 0
    times = seen.messages["time_ns"]
    assert (times[1:] >= times[:-1]).all()

    ticks: list[float] = []

    def kill(share: float) -> None:
        if not ticks:
            hostd.send_signal(signal.SIGKILL)
            hostd.wait()
        ticks.append(share)

    seen = recording.record(name, 120.0, kill)
    assert seen.gone and seen.over == f"the hostd of {name!r} has ended" and len(seen.messages) > 0


def test_the_queues_are_roots_to_look_at(enclave):
    name, _ = enclave
    # As another user of the group would ask: the answer is hostd's, whoever runs the client.
    code = f"import os, sys; from waveos.host import doors; os.setgid(65534); os.setuid(65534); print(doors.ask({name!r}, {{'do': 'watch'}}))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert "is not for this user" in done.stderr or "may not ask" in done.stdout


def test_a_live_enclave_of_this_kernel_is_traced_for_perfetto_and_recorded_for_a_replay(tmp_path, capsys):
    if (why := why_not()) is not None:
        pytest.skip(why)
    cpus = sorted(os.sched_getaffinity(0))
    name, out = f"seen-{os.getpid()}", tmp_path / "trace.json"
    # A policy that preempts: on a busy machine the kernel runs every thread before a late agent says so, and only a preemption still finds its thread there.
    arguments = ["--policy", "shinjuku", "--param", "quantum_us=300"]
    arguments += ["--cpus", str(cpus[0]), "--mechanism", "priority", "--agent-core", str(cpus[1])]

    def traced() -> list[dict[str, Any]] | None:
        """A trace in which a thread was put on a CPU by a decision: on a machine that starves the agent not each has one."""
        assert run(["trace", name, "--live", "1s", "--out", str(out), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["ended"] is None and told["messages"] > 0
        events: list[dict[str, Any]] = json.loads(out.read_text())["traceEvents"]
        return events if any(event["name"].startswith("committed") and event["name"] != "committed: -1" for event in events) else None

    with daemon(name, HOSTD, *arguments, "--", sys.executable, "-S", "-E", "-c", LOAD):
        begin = time.monotonic()
        while (drawn := traced()) is None:
            assert time.monotonic() - begin < DEADLINE_S, "no decision took effect"
            if time.monotonic() - begin > STARVED_S and (lost := source.status(name)["agents_lost"]) > STARVED_S:
                pytest.skip(f"this machine is too busy: the agent was silent for 20 ms {lost} times in a minute")
        status = doors.ask(name, {"do": "status", "detail": True})
        assert run(["record", "--for", "1s", "--out", str(tmp_path / "kept.tape"), name]) == 0
    capsys.readouterr()
    assert run(["replay", str(tmp_path / "kept.tape"), "--policy", "round_robin", "--param", "quantum_us=100", "--json"]) == 0
    replayed = json.loads(capsys.readouterr().out)
    assert replayed["recorded"]["policy"] == "shinjuku"
    assert [each["id"] for each in replayed["configs"]] == ["shinjuku/on-host same workers", "round_robin/on-host same workers"]
    assert all(each["points"][0]["throughput_per_s"] > 0 for each in replayed["configs"])
    tracks = {event["args"]["name"] for event in drawn if event["name"] == "thread_name"}
    assert {f"CPU {cpus[0]}", "host to agent", "agent to host"} <= tracks
    ran = {event["name"] for event in drawn if event["ph"] == "X" and event.get("cat") == "run"}
    assert any(each.startswith("python") for each in ran), "threads are called what they call themselves"
    assert any(event["ph"] == "f" for event in drawn), "an arrow leads from a decision to its run"
    counters = status["counters"]
    runs = sum(count for _, count in counters["age_ns"])
    assert 0 < runs <= counters["outcomes"]["committed"], "but for those that only take a thread off its CPU"
    assert abs(sum(count for _, count in counters["round_trip_ns"]) - sum(count for _, count in counters["enforced_ns"])) <= 1  # it goes on meanwhile
    assert [each["cpu"] for each in status["on_cpus"]] == [cpus[0]]
