"""`wave run` and `wave compare` of a memory scenario: results, table, report, and what is refused."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

from waveos.cli.app import app
from waveos.errors import ConfigError, PolicyError
from waveos.ipu_emulator.memory.experiment import compare, saved_of_oracle, setup_of
from waveos.report.memory import render_report, table
from waveos.scenario import load_scenario

SMALL = ["memory.gib=0.25", "access.workers=1", "run.warmup_s=30", "run.duration_s=60", "agent.message_ns=50", "policies.names=sol,static"]


def scenario(*settings):
    return load_scenario("memory", [*SMALL, *settings])


@pytest.fixture(scope="module")
def results():
    return compare(scenario())


def test_every_policy_is_run_in_both_places_beside_nothing_and_the_oracle(results):
    assert [each["id"] for each in results["configs"]] == ["nothing", "oracle", "sol/on-host", "sol/offload", "static/on-host", "static/offload"]
    assert saved_of_oracle(results, "sol") > 0.3
    assert saved_of_oracle(results, "static") == pytest.approx(0, abs=1e-6)


def test_offload_takes_just_the_policys_cores_off_the_host(results):
    by_id = {each["id"]: each["figures"] for each in results["configs"]}
    on_host, offload = by_id["sol/on-host"], by_id["sol/offload"]
    assert on_host["host_cores"] - on_host["policy_cores"] == pytest.approx(offload["host_cores"], rel=0.05)
    assert on_host["ipu_cores"] == 0
    assert offload["ipu_cores"] > on_host["policy_cores"]  # an IPU's core is slower


def test_equal_scenarios_give_equal_results(results):
    assert json.dumps(compare(scenario())) == json.dumps(results)


def test_the_table_and_the_report_show_all_of_them(results):
    columns, rows = table(results)
    assert [row[0] for row in rows] == [each["id"] for each in results["configs"]]
    assert all(len(row) == len(columns) for row in rows)
    page = render_report(results)
    assert not re.search(r"""(src|href)=["']https?:""", page)  # nothing is fetched
    assert page.count("<svg") >= 5
    for each in results["configs"]:
        assert each["id"] in page
    for why in {why for each in results["configs"] for _, why in each["stops"]}:
        assert why in page


def test_results_of_another_subsystem_are_refused():
    with pytest.raises(ConfigError, match="no results of a memory scenario"):
        table({"configs": []})


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ('policies.names=["soll"]', r"no memory policy 'soll' \(did you mean 'sol'\?\)"),
        ('policies.names=["fifo"]', r"policy 'fifo' is of subsystem sched, not memory; those of memory: .*sol"),
        ("policies.params.soll.seed=1", r"policies.params.soll: no memory policy"),
        ("memory.batch_kib=6", r"memory.batch_kib = 6: a batch is a whole number of pages"),
        ("memory.gib=0.0001", r"memory.gib = 0.0001 is no whole number of batches"),
        ("access.pattern=recorded", r"wants access.trace"),
        ("memory.costs=zran", r"no costs 'zran'"),
    ],
)
def test_a_scenario_that_cannot_be_run_is_told_before_anything_runs(setting, told):
    with pytest.raises(ConfigError, match=told):
        compare(scenario(setting))


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("memory.gibs=3", "gib"),
        ("access.hot_share=2", "hot_share"),
        ("subsystem=memori", "did you mean 'memory'"),
        ("workload.loads_per_s=3", "workload"),
    ],
)
def test_a_key_or_value_that_cannot_be_is_told(setting, told):
    with pytest.raises(ConfigError, match=told):
        scenario(setting)


def test_speed_and_link_follow_the_placement():
    assert setup_of(scenario(), "sol", "offload").relative_speed == 0.6
    assert setup_of(scenario(), "sol", "on-host").relative_speed == 1.0
    assert setup_of(scenario(), "sol", "offload").link.name == "mount-evans"
    assert setup_of(scenario("agent.speed=0.5"), "sol", "offload").relative_speed == 0.5


def test_the_commands_run_it_and_keep_its_results(tmp_path):
    flags = [word for setting in SMALL for word in ("--set", setting)]
    out, page = tmp_path / "results.json", tmp_path / "report.html"
    done = CliRunner().invoke(app, ["compare", "memory", *flags, "--policy", "sol", "--out", str(out), "--report", str(page), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(out.read_text())["subsystem"] == "memory"
    assert "<svg" in page.read_text()
    again = CliRunner().invoke(app, ["report", str(out), "--out", str(tmp_path / "again.html")])
    assert again.exit_code == 0, again.output
    assert (tmp_path / "again.html").read_text() == page.read_text()
    one = CliRunner().invoke(app, ["run", "memory", *flags, "--placement", "on-host"])
    assert one.exit_code == 0, one.output
    assert "static/on-host" in one.output
    assert "offload" not in one.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["compare", "memory", "--no-saturation"],
        ["run", "memory", "--trace", "t.json"],
        ["sweep", "memory", "--grid", "memory.gib=1,2", "--loads", "20k"],
        ["plan", "memory"],
        ["trace", "memory"],
    ],
)
def test_what_scenarios_of_memory_do_not_have_is_refused(arguments):
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, ConfigError), done.output
    assert "memory" in str(done.exception)


LOOP = """\
from waveos import {subsystem}
from waveos.policy import Policy
class Loop(Policy, subsystem={subsystem}, name="loop", compiled={compiled}):
    def {handler}(self, msg, txns):
        i = 1
        while i:
            i += 2
"""


def test_a_handler_that_does_not_return_is_stopped_and_its_policy_named(tmp_path):
    (tmp_path / "loop.py").write_text(LOOP.format(subsystem="memory", handler="region_mapped", compiled=False))
    with pytest.raises(PolicyError, match=r"policy '.*loop.py' did not return from \w+ within 2 s"):
        compare(scenario(f'policies.names=["{tmp_path}/loop.py"]', "run.duration_s=30"), ["offload"])


def test_a_file_of_another_subsystem_is_refused(tmp_path):
    (tmp_path / "loop.py").write_text(LOOP.format(subsystem="net", handler="request_arrived", compiled=True))
    with pytest.raises(ConfigError, match=r"loop.py' is of subsystem net, not memory"):
        compare(scenario(f'policies.names=["{tmp_path}/loop.py"]'))


COMPILES = """\
import sys, time, types
from waveos import memory
from waveos.policy import Policy
made = types.ModuleType("numba.made")
exec("import time\\ndef compile():\\n  end = time.process_time() + 3\\n  while time.process_time() < end: pass", vars(made))
class Slow(Policy, subsystem=memory, name="slow", compiled=False):
    def start(self):
        if "done" not in vars(made):
            made.done = True
            made.compile()
    def region_mapped(self, msg, txns):
        pass
"""


def test_a_policy_that_has_something_compiled_for_long_is_let_go_on(tmp_path):
    (tmp_path / "slow.py").write_text(COMPILES)
    done = compare(scenario(f'policies.names=["{tmp_path}/slow.py"]', "run.duration_s=30"), ["offload"])
    assert [each["placement"] for each in done["configs"]] == ["kernel", "oracle", "offload"]
