"""`wave plan`: should this workload's policy leave the host? A verdict in plain words, and what it rests on."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any

import typer

from waveos.cli import INTERRUPTED
from waveos.cli.experiment import Out, Processes, Report, ScenarioName, Seed, Settings, load_scenario_of
from waveos.cli.results import check_outputs, files_of, keep_results, write_report
from waveos.cli.running import gather_inputs, open_pool, show_progress
from waveos.cli.terminal import Json, print_json, print_table, talk
from waveos.errors import ConfigError

commands = typer.Typer()


@commands.command("plan")
def plan(
    scenario_name: ScenarioName,
    policy: Annotated[str, typer.Option(help="The policy in question; by default the scenario's last.", show_default=False)] = "",
    seed: Seed = None,
    settings: Settings = None,
    processes: Processes = None,
    out: Out = None,
    report: Report = None,
    as_json: Json = False,
) -> int | None:
    """Should this workload's policy be offloaded? Over links, IPU cores, mitigations and loads: where it pays, what it costs, what limits it."""
    scenario = load_scenario_of(scenario_name, settings, seed=seed, policies=[policy] if policy else None)
    check_outputs(out, report, kept=files_of(scenario, scenario_name))
    if scenario.subsystem != "sched":
        raise ConfigError(
            f"wave plan is for scenarios of sched; {scenario.name} is one of {scenario.subsystem}: "
            f"`wave compare {scenario_name}` tells host cores with the policy in each place, `wave sweep` over any of its keys"
        )
    name = scenario.policies.names[-1]
    chosen = scenario.model_copy(update={"policies": scenario.policies.model_copy(update={"names": [name], "ablation": ""})})
    with open_pool(processes) as pool:
        chosen = import_module("waveos.ipu_emulator.experiment").check_policies(chosen, pool=pool)
        planned = import_module("waveos.ipu_emulator.plan").Plan(
            chosen, gather_inputs(chosen, pool), name, machine=import_module("waveos.bench.machine").describe_machine()
        )
        try:
            with show_progress("") as progress:
                planned.run(pool, progress)
        except KeyboardInterrupt:
            pool.close()
            return INTERRUPTED
    results: dict[str, Any] = planned.results()
    results["verdict"] = import_module("waveos.report.plan").verdict(results)
    keep_results(results, out, stopped=None)
    if as_json:
        print_json(results)
    else:
        _show(results)
    if report is not None:
        write_report(results, report)
        talk(f"report: {report}")
    return None


def _show(results: dict[str, Any]) -> None:
    said = results["verdict"]
    print(said["headline"])
    for sentence in said["sentences"]:
        print(sentence)
    if results["answered"]:
        print()
        columns, rows = import_module("waveos.report.plan").table(results)
        print_table(
            columns, rows, title=f"{results['name']}, {results['policy']}: timing {results['timing']}; * is the scenario's", numbers=columns[2:]
        )
