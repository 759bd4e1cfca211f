"""`wave run` with a policy that misbehaves: one line that names it and what it did, exit code 3, nothing on stdout and nothing written."""

import textwrap

import pytest

from tests.scenarios import TINY
from waveos.cli import run

POLICY = """\
from waveos import sched
from waveos.policy import Policy, pop, push, ring, size

class Bad(Policy, subsystem=sched, name="bad"):
    runq = ring({room})
    def thread_runnable(self, msg, txns):
{runnable}
    def cpu_idle(self, msg, txns):
{idle}
"""
PUSH = "push(self.runq, msg.tid, front=msg.front)"
RUN = "if size(self.runq): sched.run(txns, tid=pop(self.runq), cpu=msg.cpu)"
SPIN = "i = 1\nwhile i:\n    i += 2"
FLOOD = "for _ in range(1_000): sched.preempt(txns, 0)"


@pytest.mark.parametrize(
    ("runnable", "idle", "room", "told"),
    [
        pytest.param("raise ValueError('no')", RUN, 64, ["thread_runnable at ", "ValueError: no (", "bad.py:7)"], id="raises"),
        pytest.param(SPIN, RUN, 64, ["did not return from thread_runnable within 2 s and was stopped"], id="never answers"),
        pytest.param(
            PUSH, RUN.replace("msg.cpu", "2"), 64, ["cpu_idle at ", "named CPU 2, which is outside the enclave (CPUs 0..1)"], id="foreign CPU"
        ),
        pytest.param(PUSH, "sched.run(txns, tid=99, cpu=0)", 4096, ["ran thread 99, which is gone or was never there"], id="thread that is gone"),
        pytest.param(PUSH, "pass", 2, ["OverflowError: push onto a full ring", "'runq' holds 2 entries and is full"], id="overflows"),
        pytest.param(PUSH, FLOOD, 64, ["OverflowError: too many orders from one handler call"], id="floods"),
    ],
)
def test_it_is_stopped_and_named_in_one_line(tmp_path, monkeypatch, capsys, runnable, idle, room, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text(TINY)
    indented = {"runnable": textwrap.indent(runnable, " " * 8), "idle": textwrap.indent(idle, " " * 8)}
    (tmp_path / "bad.py").write_text(POLICY.format(room=room, **indented))
    assert run(["run", "tiny.toml", "--policy", "bad.py", "--placement", "offload", "--json", "--out", "out.json"]) == 3
    out, err = capsys.readouterr()
    [line] = [line for line in err.splitlines() if line.startswith("wave: ")]
    assert "bad" in line
    assert all(words in line for words in told), line
    assert out == ""
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == ["bad.py", "tiny.toml"]
