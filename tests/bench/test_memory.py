"""`wave bench memory` and the local world of memory's scenarios: what is told, what is kept, what is refused; nothing real is run here."""

from __future__ import annotations

import json
import math

import pytest
from typer.testing import CliRunner

from waveos import cli
from waveos.bench import memory, memory_live, memory_local, memory_model, memory_safeguards
from waveos.bench.memory_live import ORACLE, Plan, results
from waveos.cli.app import app
from waveos.errors import ConfigError, MissingError
from waveos.report.memory import render_report, table
from waveos.scenario import load_scenario


def made(policy, scrambled=False, **figures):
    """A live run's object."""
    zero = dict.fromkeys([*memory.LIVE_FIGURES, "get_p99_us"], 0.5)
    return {
        "id": policy,
        "policy": policy,
        "placement": policy if policy == ORACLE else "agentd",
        "scrambled": scrambled,
        "figures": zero | figures,
        "series": {"time_s": [1.0, 2.0], "resident_mib": [2.0, 1.0]},
        "maps": {},
        "outcomes": {},
        "stops": [],
    }


class Machine:
    """In place of `Live`: what policies save is made up, and Ctrl-C comes in the run of that number."""

    interrupt_in = math.inf
    asked: list = []

    def __init__(self, plan, watch=False, tell=None):
        self.plan = plan
        Machine.asked = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def run(self, policy, *, scrambled=False, params=None):
        Machine.asked.append((policy, scrambled, params))
        if len(Machine.asked) > Machine.interrupt_in:
            raise KeyboardInterrupt
        saved = {"oracle": 0.3, "sol": 0.25, "psi_backoff": 0.1}[policy] - 0.001 * len(Machine.asked)
        return made(policy, scrambled, saved_share=saved, throughput_ratio=0.97)


@pytest.fixture
def machine(monkeypatch):
    monkeypatch.setattr(memory, "Live", Machine)
    monkeypatch.setattr(memory_local, "Live", Machine)
    monkeypatch.setattr(Machine, "interrupt_in", math.inf)
    return Machine


def bench(*arguments):
    return CliRunner().invoke(app, ["bench", "memory", *arguments, "--json"])


def test_the_step_tells_both_speeds_and_whether_decisions_are_alike():
    told = memory.run(parts="step", batches=65_536, rounds=1)
    assert set(told["metrics"]) >= {"policy_batches_per_s", "numpy_batches_per_s", "iteration_256gib_ms"}
    assert told["metrics"]["step_decisions_p"] > 0.01
    assert "decisions alike" in told["verdict"]


@pytest.mark.slow
def test_the_model_tells_the_same_of_sol_and_of_psi_backoff(monkeypatch):
    monkeypatch.setattr(memory_model, "SMALL_GIB", 1.0)
    told = memory.run(parts="model", quick=True, gib=1, duration_s=30)["metrics"]
    wanted = ("host_cores_on_host", "host_cores_offloaded", "host_cores_saved", "memory_saved_share", "get_p99_ratio")
    assert {f"model_{name}" for name in wanted} | {f"model_psi_{name}" for name in wanted} | {"model_oracle_saved_share"} <= set(told)
    for of in ("model_", "model_psi_"):
        saved = told[f"{of}host_cores_on_host"] - told[f"{of}host_cores_offloaded"]
        assert told[f"{of}host_cores_saved"] == pytest.approx(saved)
        assert saved == pytest.approx(told[f"{of}policy_cores_measured"])  # accounted, not asserted


def test_live_figures_are_told_of_both_hot_sets_and_repeats_with_their_ends(machine, capsys):
    told = memory.run(parts="live", live_repeats=3)
    of_issue = [
        f"live_{name}" for name in ("oracle_saved_share", "sol_saved_share", "psi_saved_share", "sol_throughput_ratio", "psi_throughput_ratio")
    ]
    figures = told["metrics"]
    assert {*of_issue, *(name.replace("live_", "live_scrambled_") for name in of_issue)} <= set(figures)
    assert figures["live_sol_saved_share_least"] < figures["live_sol_saved_share"] < figures["live_sol_saved_share_most"]
    assert len(machine.asked) == 18
    assert "live, contiguous: SOL saves 83%" in told["verdict"]
    assert "meets 70 % at 5 %" in told["verdict"]
    said = capsys.readouterr()
    assert said.out == ""
    assert "live: scrambled hot set, psi_backoff, 3 of 3 ..." in said.err


def test_ctrl_c_keeps_what_was_measured_and_the_exit_code_says_so(machine, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(machine, "interrupt_in", 2)
    out = tmp_path / "seen.json"
    arguments = ["bench", "memory", "--parts", "step,live", "--batches", "4096", "--rounds", "1", "--live-out", str(out), "--json"]
    assert cli.run(arguments) == cli.INTERRUPTED
    told = json.loads(capsys.readouterr().out)
    assert told["interrupted"]
    assert {"policy_batches_per_s", "live_oracle_saved_share", "live_sol_saved_share"} <= set(told["metrics"])
    assert "live_psi_saved_share" not in told["metrics"]
    assert "interrupted in live" in told["verdict"]
    assert [each["policy"] for each in json.loads(out.read_text())["configs"]] == ["oracle", "sol"]


def test_where_nothing_can_run_live_the_rest_is_told_and_why_not(monkeypatch):
    class Bare(Machine):
        def __enter__(self):
            raise MissingError("no free zram device")

    monkeypatch.setattr(memory, "Live", Bare)
    done = bench("--parts", "step,live", "--batches", "4096", "--rounds", "1")
    assert done.exit_code == 0
    assert "not live: no free zram device" in json.loads(done.stdout)["verdict"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--parts", "modell"], "--parts: no 'modell' (did you mean 'model'?)"),
        (["--parts", ""], "--parts: no ''; there are: step, model, safeguards, live"),
        (["--live-policies", "soll"], "--live-policies: no 'soll' (did you mean 'sol'?)"),
        (["--live-sets", "scrumbled"], "--live-sets: no 'scrumbled' (did you mean 'scrambled'?)"),
        (["--live-repeats", "0"], "--live-repeats 0: wants 1 or more"),
        (["--live-out", "no/where.json"], "there is no folder"),
        (["--parts", "live", "--live-batch-kib", "6"], "--live-batch-kib 6"),
        (["--parts", "live", "--live-gib", "-1"], "--live-gib -1"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_measured(arguments, told):
    done = bench(*arguments)
    assert isinstance(done.exception, ConfigError), done.output
    assert told in str(done.exception)


def test_the_safeguards_are_judged_by_their_worst():
    good = {"safeguard_jump_stop_assessments": 1.0, "safeguard_jump_throughput_after_epoch": 0.99}
    assert "safeguards work" in memory_safeguards.judge(good)
    assert "do NOT work" in memory_safeguards.judge(good | {"safeguard_adversary_stop_assessments": 2.0})
    assert "do NOT work" in memory_safeguards.judge(good | {"safeguard_nonsense_throughput_after_epoch": 0.94})


# ── --world local ──


def test_a_scenario_runs_in_the_local_world_the_oracle_and_each_policy_in_agentd(machine):
    done = CliRunner().invoke(app, ["run", "memory-live", "--world", "local", "--set", "policies.params.sol.cold_ms=500", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["subsystem"], told["world"], told["timing"], told["name"]) == ("memory", "local", "measured", "memory-live")
    assert [each[0] for each in machine.asked] == ["oracle", "sol", "psi_backoff"]
    assert machine.asked[1][2] == {"cold_ms": 500}
    columns, rows = table(told)
    assert rows[1][columns.index("of oracle")] == "83%"
    assert "<svg" in render_report(told)


def test_ctrl_c_keeps_the_runs_that_are_whole(machine, monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "interrupt_in", 1)
    out = tmp_path / "results.json"
    assert cli.run(["compare", "memory-live", "--world", "local", "--out", str(out)]) == cli.INTERRUPTED
    assert [each["id"] for each in json.loads(out.read_text())["configs"]] == ["oracle"]


def test_the_plan_of_a_scenario_is_what_it_says():
    scenario = load_scenario("memory-live", ["access.move_s=0", "memory.gib=1", "access.hot_share=0.5", "run.seed=7"])
    plan = memory_local.plan_of(scenario)
    assert (plan.gib, plan.batch_kib, plan.hot_share, plan.move_s, plan.seed) == (1.0, 2048, 0.5, math.inf, 7)
    assert (plan.settle_s, plan.count_s) == (30.0, 60.0)
    assert "that stays" in results(plan, [])["about"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run", "memory-live", "--set", "access.pattern=zipf"], 'access.pattern = "zipf" is of the virtual world'),
        (["run", "memory-live", "--placement", "on-host"], "--placement on-host: in the local world the policy is in agentd"),
        (["run", "memory-live", "--policy", "soll"], "no memory policy 'soll' (did you mean 'sol'?)"),
        (["run", "memory-live", "--trace", "t.json"], "--trace"),
        (["compare", "memory-live", "--saturation"], "--saturation"),
        (["sweep", "memory-live", "--grid", "memory.gib=1,2"], "a sweep is of the virtual world"),
    ],
)
def test_what_the_local_world_does_not_have_is_refused(machine, arguments, told):
    done = CliRunner().invoke(app, [*arguments, "--world", "local"])
    assert isinstance(done.exception, ConfigError), done.output
    assert told in str(done.exception)


def test_a_database_that_does_not_fit_on_this_machine_is_refused_with_what_would(monkeypatch, tmp_path):
    (tmp_path / "max_map_count").write_text("65530\n")
    monkeypatch.setattr(memory_live, "MOST_MAPPINGS", tmp_path / "max_map_count")
    monkeypatch.setattr(memory_live, "available_gib", lambda: 18.0)
    Plan(gib=2).check()
    with pytest.raises(ConfigError, match=r"a database of 12 GiB takes some 21.6 GiB in all, .* 18.0 GiB available: take one of 10.0 GiB or less"):
        Plan(gib=12).check()
    with pytest.raises(
        ConfigError, match=r"2 GiB in batches of 32 KiB is some 78,643 mappings, and a process may have 65,530 .* take larger batches"
    ):
        Plan(gib=2, batch_kib=32).check()
