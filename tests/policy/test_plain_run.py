"""`WAVE_JIT=0 wave run`: what a policy prints is talk, and Ctrl-C is no fault of the policy's."""

import json

import pytest

from tests.scenarios import TINY
from waveos.cli import run

POLICY = """\
import os, signal
from waveos import sched
from waveos.policy import Policy, pop, push, ring, size

print("loaded")

class Loud(Policy, subsystem=sched, name="loud"):
    runq = ring(4096)
    def thread_runnable(self, msg, txns):
        push(self.runq, msg.tid, front=msg.front)
    def cpu_idle(self, msg, txns):
        WHAT
        if size(self.runq): sched.run(txns, tid=pop(self.runq), cpu=msg.cpu)
"""


@pytest.fixture
def wave(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WAVE_JIT", "0")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text(TINY)

    def ran(what):
        (tmp_path / "loud.py").write_text(POLICY.replace("WHAT", what))
        code = run(["run", "tiny.toml", "--policy", "loud.py", "--placement", "offload", "--json"])
        return code, *capsys.readouterr()

    return ran


def test_prints_of_a_policy_leave_stdout_to_the_data(wave):
    code, out, err = wave("print('cpu', msg.cpu)")
    assert code == 0
    assert json.loads(out)
    assert "cpu 0\n" in err
    assert "loaded\n" in err


def test_an_interrupt_inside_a_handler_is_an_interrupt(wave):
    code, _, err = wave("os.kill(os.getpid(), signal.SIGINT)")
    assert code == 130
    assert "wave: interrupted" in err
    assert "policy 'loud'" not in err


def test_a_reader_of_prints_who_leaves_ends_the_run_quietly(wave):
    code, _, err = wave("raise BrokenPipeError(32, 'Broken pipe')")
    assert code == 141
    assert "wave: " not in err
