"""Simulations in child processes: the watchdog, deaths, Ctrl-C."""

import importlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from waveos.errors import ConfigError, PolicyError, WaveError
from waveos.ipu_emulator.pool import Here, Pool

ENGINES = '''
import ctypes, os, signal, time
from dataclasses import dataclass
from waveos.errors import ConfigError, PolicyError

@dataclass(frozen=True)
class Setup:
    policy: str
    number: int = 0

class Engine:
    """Behaves as the setup's policy name says."""
    def __init__(self, setup, handling):
        self.setup, self.handling, self.slices = setup, handling, 0
    def handle(self, kind):
        ctypes.c_uint64.from_address(self.handling).value = kind
    def advance(self, wall_ns):
        self.slices += 1
        policy = self.setup.policy
        if policy == "spin" and self.slices == 3:
            self.handle(2)
            while True: pass
        if policy == "slow_import":
            time.sleep(0.3)
        if policy == "raises":
            raise PolicyError("policy 'raises': thread_runnable raised ZeroDivisionError")
        if policy == "misconfigured":
            raise ConfigError("no such link profile")
        if policy == "segfault":
            self.handle(9)
            ctypes.string_at(8)
        if policy == "oom":
            os.kill(os.getpid(), signal.SIGKILL)
        if policy == "bug":
            raise KeyError("x")
        if policy == "pipe":
            raise BrokenPipeError(32, "Broken pipe")
        if policy == "talks":
            print("what a policy says")
        if policy == "forever":
            return False
        return self.slices >= 4
    def result(self):
        return (self.setup.number, os.getpid())
'''


@pytest.fixture
def engines(tmp_path, monkeypatch):
    (tmp_path / "fake_engines.py").write_text(ENGINES)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("fake_engines", None)
    importlib.invalidate_caches()
    yield importlib.import_module("fake_engines")
    sys.modules.pop("fake_engines", None)


def pool(processes=1, patience_s=2.0):
    return Pool(processes, factory="fake_engines:Engine", patience_s=patience_s)


def test_every_job_answers_once_and_the_parent_is_not_where_it_runs(engines):
    with pool(2) as jobs:
        numbers = [jobs.submit(engines.Setup("fine", n)) for n in range(7)]
        answers = dict(jobs.finished())
    assert sorted(answers) == numbers
    assert [answers[n][0] for n in numbers] == list(range(7))
    assert os.getpid() not in {pid for _, pid in answers.values()}


def test_jobs_may_be_added_while_others_end(engines):
    with pool() as jobs:
        jobs.submit(engines.Setup("fine", 0))
        seen = []
        for _, (number, _pid) in jobs.finished():
            seen.append(number)
            if number < 3:
                jobs.submit(engines.Setup("fine", number + 1))
    assert seen == [0, 1, 2, 3]


def test_a_handler_that_does_not_return_is_stopped_and_named(engines):
    with pool(patience_s=0.3) as jobs, pytest.raises(PolicyError) as stopped:
        jobs.submit(engines.Setup("spin"))
        list(jobs.finished())
    assert str(stopped.value).startswith("policy 'spin' did not return from thread_runnable within 0.3 s and was stopped; ")


def test_time_outside_handlers_does_not_count(engines):
    with pool(patience_s=0.1) as jobs:
        jobs.submit(engines.Setup("slow_import", 5))
        assert [answer[0] for _, answer in jobs.finished()] == [5]


@pytest.mark.parametrize(
    ("policy", "kind", "words"),
    [
        ("raises", PolicyError, "policy 'raises': thread_runnable raised ZeroDivisionError"),
        ("misconfigured", ConfigError, "no such link profile"),
        ("segfault", PolicyError, "the process that simulated policy 'segfault' died in cpu_idle: Segmentation fault"),
        ("oom", WaveError, "the process that simulated policy 'oom' was killed, probably for lack of memory"),
        ("bug", WaveError, "the engine failed on policy 'bug': KeyError: 'x'"),
    ],
)
def test_what_goes_wrong_in_a_child_is_one_line(engines, policy, kind, words):
    with pool() as jobs, pytest.raises(kind) as told:
        jobs.submit(engines.Setup(policy))
        list(jobs.finished())
    assert str(told.value).startswith(words)
    assert "\n" not in str(told.value)


def test_the_traceback_of_a_fault_is_shown_beside_its_line_and_not_in_its_place(engines, monkeypatch, capfd):
    monkeypatch.setenv("WAVE_DEBUG", "1")
    with pool() as jobs, pytest.raises(WaveError, match="the engine failed on policy 'bug': KeyError: 'x'"):
        jobs.submit(engines.Setup("bug"))
        list(jobs.finished())
    shown = capfd.readouterr().err
    assert "Traceback (most recent call last)" in shown
    assert "fake_engines.py" in shown


def test_a_pipe_that_closed_in_a_child_is_no_fault(engines):
    with pool() as jobs, pytest.raises(BrokenPipeError):
        jobs.submit(engines.Setup("pipe"))
        list(jobs.finished())


def test_what_a_policy_prints_in_this_process_is_talk_and_what_the_reader_prints_is_not(engines, capsys):
    with Here(factory="fake_engines:Engine") as jobs:
        jobs.submit(engines.Setup("talks", 4))
        for _, (number, _pid) in jobs.finished():
            print("result", number)
    out, err = capsys.readouterr()
    assert out == "result 4\n"
    assert err == "what a policy says\n" * 4


def test_jobs_can_run_in_this_process_for_debugging(engines):
    with Here(factory="fake_engines:Engine") as jobs:
        number = jobs.submit(engines.Setup("fine", 4))
        assert list(jobs.finished()) == [(number, (4, os.getpid()))]
        jobs.submit(engines.Setup("raises"))
        with pytest.raises(PolicyError, match="ZeroDivisionError"):
            list(jobs.finished())


def test_closed_in_the_middle_the_jobs_here_do_not_go_on(engines):
    with Here(factory="fake_engines:Engine") as jobs:
        for number in range(3):
            jobs.submit(engines.Setup("fine", number))
        answers = jobs.finished()
        next(answers)
        jobs.close()
        assert list(answers) == []


def gone(pid):
    """Whether the process is dead (a zombie is)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until(condition, deadline_s=20.0):
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        time.sleep(0.01)


@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGINT])
def test_children_die_with_their_parent(engines, tmp_path, death):
    script = textwrap.dedent(
        f"""
        import sys; sys.path.insert(0, {str(tmp_path)!r})
        import fake_engines
        from waveos.ipu_emulator.pool import Pool
        with Pool(2, factory="fake_engines:Engine") as pool:
            for n in range(2):
                pool.submit(fake_engines.Setup("forever"))
            print(*[child.process.pid for child in pool._children], flush=True)
            list(pool.finished())
        """
    )
    parent = subprocess.Popen([sys.executable, "-P", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert parent.stdout is not None
    children = [int(word) for word in parent.stdout.readline().split()]
    assert len(children) == 2
    parent.send_signal(death)
    parent.wait(timeout=20)
    parent.stdout.close()
    wait_until(lambda: all(gone(pid) for pid in children))
