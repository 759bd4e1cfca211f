"""What `wave run` is asked for is one run: of one policy of the scenario's subsystem, at one load, into files that are none of its own."""

from __future__ import annotations

import json

import pytest

from waveos.cli import run
from waveos.errors import ConfigError
from waveos.ipu_emulator.experiment import check_policies
from waveos.scenario import load_scenario

SCENARIO = """\
name = "tiny"
[host]
workers = 8
[agent]
message_ns = 40
[workload]
loads_per_s = [20000]
[[workload.classes]]
name = "GET"
share = 0.995
service = { fixed_us = 10 }
[[workload.classes]]
name = "RANGE"
share = 0.005
service = { fixed_us = 50000 }
[run]
duration_ms = 20
warmup_ms = 0
[policies]
names = ["fifo"]
[objective]
GET = { p99_us = 200 }
"""
MINE = """\
from waveos import sched
from waveos.policy import Param, Policy, pop, push, ring, size
class ShortFirst(Policy, subsystem=sched, name="short_first"):
    quantum_us: Param
    runq = ring(65536)
    def thread_runnable(self, msg, txns):
        push(self.runq, msg.tid, front=msg.front)
    def cpu_idle(self, msg, txns):
        if {idle}: sched.run(txns, tid=pop(self.runq), cpu=msg.cpu)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text(SCENARIO)
    (tmp_path / "short.py").write_text(MINE.format(idle="size(self.runq)"))
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run", "tiny.toml", "--policy", "jbsq"], "policy 'jbsq' is of subsystem net, not sched; those of sched: edf, fifo"),
        (["compare", "tiny.toml", "--policy", "jbsq"], "policy 'jbsq' is of subsystem net, not sched"),
        (["plan", "tiny.toml", "--policy", "jbsq"], "policy 'jbsq' is of subsystem net, not sched"),
        (["sweep", "tiny.toml", "--grid", "host.workers=1,2", "--policy", "jbsq"], "policy 'jbsq' is of subsystem net, not sched"),
        (["run", "tiny.toml", "--policy", "fifo", "--policy", "edf"], "--policy is there 2 times (fifo, edf)"),
        (["run", "tiny.toml", "--load", "10k,20k"], "--load 10k,20k: one load is run here"),
        (["run", "tiny.toml", "--out", "x.json", "--trace", "./x.json"], "is named for two outputs"),
        (["run", "tiny.toml", "--policy", "short.py", "--out", "short.py"], "this run is made of it"),
        (["run", "tiny.toml", "--out", "tiny.toml"], "this run is made of it"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(folder, capsys, arguments, told):
    before = {path: path.read_text() for path in folder.iterdir()}
    assert run(arguments) == 2
    [line] = [each for each in capsys.readouterr().err.splitlines() if each.startswith("wave: ")]
    assert told in line
    assert {path: path.read_text() for path in folder.iterdir()} == before


@pytest.mark.parametrize("key", ["short_first", '"./short.py"'])
def test_parameters_of_ones_own_policy_stand_under_its_name_or_its_file(key):
    scenario = load_scenario("tiny.toml", [f"policies.params.{key}.quantum_us=5", 'policies.names=["./short.py"]'])
    assert check_policies(scenario).policies.params == {"./short.py": {"quantum_us": 5}}


def test_a_name_that_no_policy_of_the_scenario_has_is_refused_with_those_that_they_have():
    with pytest.raises(ConfigError, match=r"policies.params.shortfirst: no policy of that name .*runs ./short.py \(short_first\)"):
        check_policies(load_scenario("tiny.toml", ["policies.params.shortfirst.quantum_us=5", 'policies.names=["./short.py"]']))


def test_requests_that_had_not_finished_are_told_and_the_legend_has_what_the_table_has(capsys):
    assert run(["run", "tiny.toml"]) == 0
    out, err = capsys.readouterr()
    assert "RANGE requests (fifo/offload at 20,000/s)" in err and "had not finished when the run ended" in err
    assert "saturation:" not in out


def test_a_policy_that_runs_nothing_is_told_as_one(folder, capsys):
    (folder / "short.py").write_text(MINE.format(idle="size(self.runq) > 60000"))
    assert run(["run", "tiny.toml", "--policy", "short.py", "--set", "policies.params.short_first.quantum_us=5", "--json"]) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert any("nothing was served: the policy ran no thread" in note for note in notes)
