"""agentd over rings by name: several enclaves in one, tapes that can be replayed, times, sleep when idle, and what it says when it cannot go on."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from waveos import tape
from waveos.agents import agentd
from waveos.agents.loop import BATCH, ENCLAVE, TAPE, TAPE_FULL, join, serve
from waveos.cli import run
from waveos.errors import ConfigError
from waveos.histogram import BINS
from waveos.link import MESSAGES, TXNS, open_link
from waveos.policy import load_policy
from waveos.primitives import CoherentMemory, clock_ns
from waveos.record import VERSION
from waveos.ring import heartbeat
from waveos.sched.laws import make_runtime
from waveos.sched.records import DECISION, KICKED, MESSAGE, SUBSYSTEM, Decision, Message
from waveos.testing import Replayed

DEADLINE_S = 300.0


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """What agents would compile while the tests wait."""
    agentd._compile()
    load_policy("fifo").bind(n_cpus=1)


def url() -> str:
    return f"shm://test-{os.getpid()}-{secrets.token_hex(4)}"


def until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + DEADLINE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.002)
    return found


def decided(host: Any) -> list[Any]:
    """The transactions that are there now."""
    taken: list[Any] = host.poll_txns().tolist()
    return taken


def message(kind: Message, tid: int = -1, cpu: int = -1, seq: int = 1) -> np.ndarray:
    made = np.zeros(1, MESSAGE)
    made["version"], made["subsystem"], made["type"], made["time_ns"] = VERSION, SUBSYSTEM, kind, clock_ns()
    made["tid"], made["cpu"], made["seq"] = tid, cpu, seq
    return made


def state(threads: int) -> np.ndarray:
    """One idle CPU and some threads that can run."""
    told = [message(Message.RESYNC), message(Message.CPU_NEW, cpu=0), message(Message.CPU_IDLE, cpu=0)]
    for tid in range(threads):
        told += [message(Message.THREAD_NEW, tid), message(Message.THREAD_RUNNABLE, tid)]
    return np.concatenate(told)


class Loop:
    """A host's side, and an enclave that the loop serves in this process."""

    def __init__(self, policy: str = "fifo", **settings: Any) -> None:
        name = url()
        self.host, self.link = open_link(name, side="host"), open_link(name, side="agent")
        self.bound = load_policy(policy).bind(n_cpus=1)
        self.runtime = make_runtime(self.bound, cpus=1, threads=64)
        self.row = np.zeros(1, ENCLAVE)
        join(self.row, self.link.queue(MESSAGES), self.link.queue(TXNS), self.runtime, **settings)

    def decisions(self) -> list[tuple[int, int]]:
        return [(int(txn["type"]), int(txn["tid"])) for txn in self.host.poll_txns()]

    def close(self) -> None:
        self.link.close()
        self.host.close()


@pytest.fixture
def loop() -> Iterator[Callable[..., Loop]]:
    made: list[Loop] = []

    def make(*arguments: Any, **settings: Any) -> Loop:
        made.append(Loop(*arguments, **settings))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_one_loop_serves_several_enclaves_and_each_gets_its_own_decisions(loop):
    loops = [loop() for _ in range(3)]
    rows = np.concatenate([each.row for each in loops])
    for i, each in enumerate(loops):
        rows["inbox_at"][i] = rows.ctypes.data + i * rows.itemsize + rows.dtype.fields["inbox"][1]
        each.host.send_messages(state(i + 1))
    rows["serving"][1] = 0
    serve(rows, 0, clock_ns() + 5_000_000)
    assert [each.decisions() for each in loops] == [[(Decision.RUN, 0)], [], [(Decision.RUN, 0)]]
    rows["serving"][1] = 1
    serve(rows, 0, clock_ns() + 5_000_000)
    assert loops[1].decisions() == [(Decision.RUN, 0)]


def test_a_decision_for_an_idle_cpu_rings_the_doorbell_once(loop):
    bell = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        each = loop(doorbell=bell)
        each.host.send_messages(state(2))
        serve(each.row, 0, clock_ns() + 5_000_000)
        (txn,) = each.host.poll_txns()
        assert txn["flags"] & KICKED
        assert os.eventfd_read(bell) == 1 == each.row["rings"][0]
        each.host.send_messages(message(Message.THREAD_BLOCKED, 1, seq=2))
        serve(each.row, 0, clock_ns() + 5_000_000)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(bell)
    finally:
        os.close(bell)


def test_the_loop_shows_that_it_lives_though_there_is_nothing_to_do(loop):
    each = loop()
    seen, memory = [], CoherentMemory(each.link.txns_memory)
    for _ in range(3):
        before = clock_ns()
        serve(each.row, 0, before + 1_000_000)
        seen.append(heartbeat(memory))
        assert before <= seen[-1] <= clock_ns()
    assert seen == sorted(set(seen))


def test_a_full_ring_of_transactions_keeps_the_loop_from_taking_more_and_nothing_is_lost(loop):
    name = url()
    with open_link(name, side="host", txns=2) as host, open_link(name, side="agent") as link:
        bound = load_policy("fifo").bind(n_cpus=4)
        runtime = make_runtime(bound, cpus=4, threads=64)
        row = np.zeros(1, ENCLAVE)
        join(row, link.queue(MESSAGES), link.queue(TXNS), runtime)
        told = [message(Message.RESYNC)]
        told += [message(kind, cpu=cpu) for cpu in range(4) for kind in (Message.CPU_NEW, Message.CPU_IDLE)]
        told += [message(kind, tid) for tid in range(4) for kind in (Message.THREAD_NEW, Message.THREAD_RUNNABLE)]
        host.send_messages(np.concatenate(told))
        taken = []
        for _ in range(3):
            serve(row, 0, clock_ns() + 2_000_000)
            taken += host.poll_txns()["tid"].tolist()
        assert taken == [0, 1, 2, 3]
        assert host.overflowed(TXNS) == 0


def test_times_are_counted_where_they_are_wanted(loop):
    times = np.zeros((3, BINS), np.int64)
    each = loop(times=times)
    told = state(5)
    each.host.send_messages(told)
    serve(each.row, 0, clock_ns() + 5_000_000)
    assert each.row["messages"][0] == len(told)
    event, wakeup, decide = times.sum(axis=1)
    assert event == len(told) - 1, "a RESYNC is no event"
    assert wakeup == event - np.count_nonzero(told["cpu"] >= 0)
    assert decide == 1


def test_a_tape_that_is_full_stops_the_loop_until_it_is_emptied_and_replays_to_the_same_decisions(loop, tmp_path):
    room = np.zeros(TAPE, MESSAGE)
    each = loop(tape=room)
    path = tmp_path / "tape"
    tape.begin(path, {"policy": "fifo", "params": {}, "cpus": 1, "threads": 64, "ahead": 0})
    each.host.send_messages(state(20))
    decided, full = [], 0
    for seq in range(3, 40, 2):
        full += serve(each.row, 0, clock_ns() + 1_000_000) == TAPE_FULL
        tape.append(path, room[: each.row["taped"][0]])
        each.row["taped"] = 0
        for txn in each.host.poll_txns():
            decided.append(txn.tobytes())
            outcome = message(Message.TXN_OUTCOME, int(txn["tid"]), 0, seq)
            blocked, idle = message(Message.THREAD_BLOCKED, int(txn["tid"]), 0, seq + 1), message(Message.CPU_IDLE, cpu=0)
            each.host.send_messages(np.concatenate([outcome, blocked, idle]))
    assert full > 0 and len(decided) >= 5
    facts, messages, decisions = tape.read(path)
    assert facts == {"policy": "fifo", "params": {}, "cpus": 1, "threads": 64, "ahead": 0}
    assert [row.tobytes() for row in decisions] == decided
    assert Replayed(load_policy("fifo"), 1, 64, 0).feed(messages).tobytes() == decisions.tobytes()
    assert decisions.dtype == DECISION


def test_a_tape_cut_off_in_a_record_is_read_up_to_there_and_what_is_none_is_refused(tmp_path):
    path = tmp_path / "tape"
    tape.begin(path, {"policy": "fifo"})
    tape.append(path, state(1))
    with open(path, "r+b") as file:
        file.truncate(tape.HEAD_BYTES + 2 * 64 + 30)
    assert len(tape.read(path)[1]) == 2
    path.write_bytes(b"{}")
    with pytest.raises(ConfigError, match="is no tape of Wave"):
        tape.read(path)
    path.write_bytes(b'{"wave": "tape", "version": 9}\n')
    with pytest.raises(ConfigError, match="of version 9 of the contract"):
        tape.read(path)
    with pytest.raises(ConfigError, match="cannot read"):
        tape.read(tmp_path / "none")
    with pytest.raises(ConfigError, match="cannot record"):
        tape.begin(tmp_path / "no" / "tape", {})


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-P", "-m", "waveos.agents.agentd", *arguments], stderr=subprocess.PIPE, text=True)


def test_one_agent_decides_for_two_hosts_and_goes_on_for_one_when_the_other_is_gone(tmp_path):
    names = url(), url()
    with open_link(names[0], side="host") as first:
        second = open_link(names[1], side="host")
        agent = start(names[0], "fifo", names[1], "round_robin", "--cpus", "1", "--record", str(tmp_path / "tape"))
        try:
            for host in (first, second):
                host.await_agent(DEADLINE_S)
                host.send_messages(state(1))
            assert until(lambda: decided(first)) and until(lambda: decided(second))
            second.close()
            first.send_messages(np.concatenate([message(Message.RESYNC), state(2)]))
            assert until(lambda: decided(first))
            first.close()
            assert agent.wait(DEADLINE_S) == 0, "no host is left"
        finally:
            agent.kill()
            second.close()
            agent.communicate()
    for file in ("tape", "tape-1"):
        facts, messages, decisions = tape.read(tmp_path / file)
        assert Replayed(load_policy(facts["policy"]), 1, facts["threads"], 0).feed(messages).tobytes() == decisions.tobytes()
        assert len(decisions)


def test_an_idle_agent_may_sleep_and_still_decides():
    name = url()
    with open_link(name, side="host") as host:
        agent = start(name, "fifo", "--cpus", "1", "--idle-us", "100")
        try:
            host.await_agent(DEADLINE_S)
            until(lambda: switches(agent.pid) > 200)
            host.send_messages(state(1))
            assert until(lambda: decided(host))
        finally:
            agent.send_signal(signal.SIGTERM)
            agent.communicate(timeout=DEADLINE_S)
    assert agent.returncode == 0


def switches(pid: int) -> int:
    """How often the process has given up its core."""
    return next(int(line.split()[1]) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("voluntary_ctxt_switches"))


def test_a_policy_that_fails_ends_its_enclave_alone(tmp_path, capfd):
    bad = tmp_path / "bad.py"
    bad.write_text(
        "from waveos.policy import Policy\nfrom waveos import sched\n\n\n"
        "class Bad(Policy, subsystem=sched, name='bad'):\n    def thread_runnable(self, msg, txns):\n        sched.run(txns, tid=7, cpu=0)\n"
    )
    names = url(), url()
    with open_link(names[0], side="host") as first, open_link(names[1], side="host") as second:
        agent = start(names[0], str(bad), names[1], "fifo", "--cpus", "1", "--threads", "16")
        try:
            for host in (first, second):
                host.await_agent(DEADLINE_S)
            first.send_messages(state(1))
            until(lambda: not first.peer_alive())
            second.send_messages(state(1))
            assert until(lambda: decided(second))
            second.close()
            assert agent.wait(DEADLINE_S) == 3
        finally:
            agent.kill()
            _, error = agent.communicate()
    lines = error.splitlines()
    assert "policy 'bad'" in lines[0] and lines[0].endswith("the others go on")
    assert lines[1].startswith("wave: policy 'bad'") and len(lines) == 2


def test_a_host_that_says_of_its_enclave_what_cannot_be_ends_its_enclave_alone(tmp_path):
    memory, name = tmp_path / "memory", url()
    memory.write_bytes(bytes(1 << 20))
    with open_link(f"bar://{memory}", side="host", about={"cpus": 1 << 40, "threads": 8}), open_link(name, side="host") as second:
        agent = start(f"bar://{memory}", "fifo", name, "fifo", "--cpus", "1")
        try:
            assert "bar://" in (line := agent.stderr.readline()), line
            second.await_agent(DEADLINE_S)
            second.send_messages(state(1))
            assert until(lambda: decided(second))
        finally:
            agent.terminate()
            _, error = agent.communicate(timeout=DEADLINE_S)
    assert line.endswith("the host says of its enclave cpus 1099511627776: 1 to 1024 can be; mend what it says; the others go on\n")
    assert (agent.returncode, error) == (0, "")


UNFORESEEN = """
import sys
from waveos.agents import agentd
from waveos.cli import run

make_runtime = agentd.make_runtime

def make(bound, **sizes):
    if bound.policy.name == "round_robin":
        raise ZeroDivisionError("what nobody foresaw")
    return make_runtime(bound, **sizes)

agentd.make_runtime = make
sys.exit(run(["agentd", *sys.argv[1:]]))
"""


def test_what_nobody_foresaw_ends_one_enclave_and_is_said_once():
    names = url(), url()
    with open_link(names[0], side="host"), open_link(names[1], side="host") as second:
        agent = subprocess.Popen(
            [sys.executable, "-P", "-c", UNFORESEEN, names[0], "round_robin", names[1], "fifo", "--cpus", "1"], stderr=subprocess.PIPE, text=True
        )
        try:
            second.await_agent(DEADLINE_S)
            second.send_messages(state(1))
            assert until(lambda: decided(second))
            second.close()
            assert agent.wait(DEADLINE_S) == 70
        finally:
            agent.kill()
            _, error = agent.communicate()
    said = "ZeroDivisionError: what nobody foresaw (<string>:10); this is a bug in Wave, please report it"
    assert error.splitlines() == [f"agentd: {names[0]}: {said}; the others go on", f"wave: {said} (WAVE_DEBUG=1 shows where)"]


SIGNALLED = """
import os, signal, sys
from waveos.agents import agentd
from waveos.cli import run

wait = agentd.Task.some_done.wait

def signalled(timeout):
    os.kill(os.getpid(), signal.SIGINT)
    print("went on", flush=True)
    return wait(timeout)

agentd.Task.some_done.wait = signalled
sys.exit(run(["agentd", "shm:///nowhere/agent.sock", "fifo"]))
"""


def test_a_signal_ends_the_agent_after_what_it_is_in_the_middle_of():
    ended = subprocess.run([sys.executable, "-P", "-c", SIGNALLED], capture_output=True, text=True, timeout=DEADLINE_S)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "went on\n", "")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["fifo"], "'fifo' stands where a link was expected"),
        (["shm://x"], "shm://x: name its policy"),
        (["shm://x", "fifo", "--param", "quantum"], "--param 'quantum': write KEY=NUMBER"),
        (["shm://x", "fifi", "--patience", "0"], "did you mean 'fifo'"),
        (["shm://no-such-ring", "fifo", "--patience", "0"], "no host has a ring named 'no-such-ring'"),
        (["shm://x", "fifo", "--cpus", "0"], "--cpus 0: 1 to 1024 can be"),
        (["shm://x", "fifo", "--ahead", "9"], "--ahead 9: 0 to 3 can be"),
        (["shm:///no/such.sock", "fifo", "--patience", "0"], "there is no /no/such.sock: start `wave hostd` first"),
    ],
)
def test_what_cannot_be_served_is_one_line(arguments, says):
    agent = start(*arguments)
    _, error = agent.communicate(timeout=DEADLINE_S)
    assert agent.returncode in (2, 3, 4)
    assert says in error and error.count("\n") == 1, error


def test_a_core_that_is_not_there_is_one_line(capsys):
    assert run(["agentd", "shm://x", "fifo", "--core", "4096"]) == 2
    assert "--core 4096: this process may use the cores" in capsys.readouterr().err


def test_a_batch_is_at_most_what_a_tape_takes():
    assert TAPE > BATCH + 1
