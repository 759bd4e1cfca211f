"""`wave run|compare|trace` of a network scenario: what is compared, what it says, what it refuses."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from waveos.errors import ConfigError, PolicyError
from waveos.ipu_emulator.net import experiment
from waveos.report import net as report
from waveos.scenario import load_scenario

SHORT = ["run.requests=2000", "workload.loads_share=[0.3, 0.6]", "run.resolution_share=0.2"]


@pytest.fixture(scope="module")
def compared() -> Any:
    return experiment.compare(load_scenario("net", [*SHORT, 'policies.names=["jbsq", "slo_steering"]']))


def figures(compared: Any, name: str) -> dict[str, float]:
    return next(each["figures"] for each in compared["configs"] if each["id"] == name)


def test_offload_leaves_the_host_its_workers_and_steering_serves_more_within_the_goals(compared: Any) -> None:
    kernel, offload, on_host = (figures(compared, name) for name in ("rss/kernel", "jbsq/offload", "jbsq/on-host"))
    assert offload["host_cores"] == 16 < kernel["host_cores"] < on_host["host_cores"]
    assert offload["ipu_cores"] > 0 == kernel["ipu_cores"]
    assert offload["goal_per_s"] > 2 * kernel["goal_per_s"]


def test_the_table_and_the_page_have_every_configuration(compared: Any) -> None:
    columns, rows = report.table(compared)
    assert len(rows) == 5 and all(len(row) == len(columns) for row in rows)
    page = report.render_report(json.loads(json.dumps(compared)))
    assert all(each["id"] in page for each in compared["configs"])
    assert "<script" not in page and "src=" not in page and "<link" not in page, "nothing is fetched"


def test_results_of_another_subsystem_are_one_line() -> None:
    with pytest.raises(ConfigError, match="no results of a network scenario"):
        report.table({"subsystem": "memory"})


def test_a_trace_has_every_packets_way_and_its_stages_follow_one_another(tmp_path: Path) -> None:
    scenario = load_scenario("net", SHORT)
    events, meta = experiment.trace(scenario, "offload", None, None, 0.5)
    written = report.write_trace(events, tmp_path / "trace.json", meta)
    drawn = json.loads((tmp_path / "trace.json").read_text())
    slices = [each for each in drawn["traceEvents"] if each["ph"] == "X"]
    assert written > 100 and drawn["otherData"]["configuration"] == "slo_steering/offload"
    names = {each["args"].get("name") for each in drawn["traceEvents"] if each["ph"] == "M"}
    assert {"stack cores", "agent", "workers", "queues", "packets"} <= names
    assert any(str(name).startswith("worker ") for name in names) and any(str(name).startswith("stack core ") for name in names)
    assert {"GET", "in the stack", "held by the policy", "on its way to the worker", "served", "reply in the stack"} <= {
        each["name"] for each in slices
    }
    for (process, track), own in itertools.groupby(sorted(slices, key=lambda e: (e["pid"], e["tid"], e["ts"])), lambda e: (e["pid"], e["tid"])):
        if process != 5:  # a core does one thing after the other
            ends = 0.0
            for each in own:
                assert each["ts"] >= ends - 0.002, (process, track)
                ends = each["ts"] + each["dur"]
    depths = [each["args"]["packets"] for each in drawn["traceEvents"] if each["ph"] == "C"]
    assert depths and min(depths) >= 0


@pytest.mark.parametrize(
    ("setting", "what"),
    [
        ('policies.names=["jsbq"]', "no network policy 'jsbq'.*jbsq"),
        ('service.costs="rcp"', "rcp.*rpc"),
        ('workload.classes=[{name="a", service={samples="rocksdb:get"}}]', "FILE.csv"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is(setting: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        experiment.compare(load_scenario("net", [*SHORT, "objective={}", setting]))


@pytest.mark.parametrize(
    ("setting", "what"),
    [
        ("service.workers=65", "workers"),
        ("service.worker=8", "worker"),
        ("objective.PUT.p99_us=3", "no such class"),
        ('workload.classes=[{name="GET", service={erlang_us=3, stages=2}}, {name="RANGE", share=1}]', "service"),
    ],
)
def test_a_scenario_that_cannot_be_is_one_line(setting: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        load_scenario("net", [setting])


LOOP = """\
from waveos import {subsystem}
from waveos.policy import Policy
class Loop(Policy, subsystem={subsystem}, name="loop"):
    def {handler}(self, msg, txns):
        i = 1
        while i:
            i += 2
"""


def test_a_handler_that_does_not_return_is_stopped_and_its_policy_named(tmp_path: Path) -> None:
    (tmp_path / "loop.py").write_text(LOOP.format(subsystem="net", handler="request_arrived"))
    with pytest.raises(PolicyError, match=r"policy '.*loop.py' did not return from \w+ within 2 s"):
        experiment.compare(load_scenario("net", [*SHORT, f'policies.names=["{tmp_path}/loop.py"]']), ["offload"])


def test_a_file_of_another_subsystem_is_refused(tmp_path: Path) -> None:
    (tmp_path / "loop.py").write_text(LOOP.format(subsystem="sched", handler="thread_runnable"))
    with pytest.raises(ConfigError, match=r"loop.py' is of subsystem sched, not net; those of net: .*jbsq"):
        experiment.compare(load_scenario("net", [*SHORT, f'policies.names=["{tmp_path}/loop.py"]']))
