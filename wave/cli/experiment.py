"""`wave run|compare|trace|report|config`: from a scenario to a table, a results file, a report or a trace.

The model and its processes are loaded by name when a command runs: `wave --help` needs none of them. What a command measured is kept when Ctrl-C
stops it: it is printed and written as far as it got, and the exit code is 130.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from waveos.cli.live_trace import trace_live
from waveos.cli.results import check_outputs, files_of, give_results, read_results, write_report
from waveos.cli.running import find_local, measure, open_pool, prepare, run_local, run_subsystem, single_run, trace_subsystem, write_trace
from waveos.cli.terminal import Json, print_json, print_table, talk
from waveos.errors import ConfigError, MissingError
from waveos.names import nearest

commands = typer.Typer()
config = typer.Typer(name="config", help="What a scenario says, and where each value comes from.", no_args_is_help=True)
commands.add_typer(config)

ScenarioName = Annotated[str, typer.Argument(help="A scenario's name, or the path of a TOML file.", metavar="SCENARIO")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Override a key, as --set host.workers=4. May be given again.", metavar="KEY=VALUE")
]
Seed = Annotated[int | None, typer.Option(min=0, help="Seed of arrivals and service times.", show_default=False)]
PolicyNames = Annotated[list[str] | None, typer.Option("--policy", help="A policy's name or file, instead of the scenario's. May be given again.")]
Loads = Annotated[str | None, typer.Option(help="Offered loads in requests/s, as 20000,40000 or 20k,40k.", show_default=False)]
Processes = Annotated[int | None, typer.Option(min=1, help="Processes to simulate in; by default one a core.", show_default=False)]
Out = Annotated[Path | None, typer.Option("--out", help="Write the results to this file, as JSON.", show_default=False)]
Report = Annotated[Path | None, typer.Option("--report", help="Write an HTML report to this file.", show_default=False)]
Placement = Annotated[str, typer.Option(help="Where decisions are made: kernel, on-host or offload.")]
World = Annotated[str, typer.Option(help="virtual, or, for run and compare of memory, local: this machine's own kernel.")]


def register(app: typer.Typer) -> None:
    """Add these commands to `app`."""
    app.add_typer(commands)


@commands.command("run")
def run(
    scenario_name: ScenarioName,
    policies: PolicyNames = None,
    placement: Placement = "offload",
    world: World = "virtual",
    load: Annotated[str | None, typer.Option(help="Offered load in requests/s, as 40000 or 40k; by default the scenario's middle one.")] = None,
    seed: Seed = None,
    settings: Settings = None,
    out: Out = None,
    trace: Annotated[Path | None, typer.Option("--trace", help="Write a Perfetto trace of the first 5 ms after warm-up to this file.")] = None,
    as_json: Json = False,
) -> int | None:
    """One policy, in one place, under one load."""
    scenario = load_scenario_of(scenario_name, settings, seed=seed, policies=policies, loads=load, world=world)
    check_outputs(out, trace, kept=files_of(scenario, scenario_name))
    if world == "virtual" and scenario.subsystem == "sched":
        _one_only(policies, load, "wave compare")
    if world == "local":
        module = find_local(scenario)
        _refuse(scenario, {"--load": load, "--trace": trace})
        results, code = run_local(module, scenario, placement)
        give_results(results, out, None, as_json, stopped=code)
        return code
    if scenario.subsystem != "sched":
        _refuse(scenario, {"--load": None if hasattr(scenario, "workload") else load})
        results, code = run_subsystem(scenario, placement)
        if trace is not None and code is None:
            trace_subsystem(scenario, placement, None, None, 5.0, trace)
        give_results(results, out, None, as_json, stopped=code)
        return code
    with open_pool(1) as pool:
        comparison = single_run(scenario, placement, pool)
        code = measure(comparison, pool, saturation=False)
        if trace is not None and code is None:
            write_trace(comparison, pool, scenario.run.warmup_ms, 5.0, trace)
    results = comparison.results()
    give_results(results, out, None, as_json, stopped=code)
    return code


@commands.command("compare")
def compare(
    scenario_name: ScenarioName,
    policies: PolicyNames = None,
    loads: Loads = None,
    saturation: Annotated[
        bool | None,
        typer.Option("--saturation/--no-saturation", help="Search for the saturation throughput; without --loads it is.", show_default=False),
    ] = None,
    ablation: Annotated[
        bool | None, typer.Option("--ablation/--no-ablation", help="Take the link's mitigations away in turn; as --saturation.", show_default=False)
    ] = None,
    world: World = "virtual",
    seed: Seed = None,
    settings: Settings = None,
    processes: Processes = None,
    out: Out = None,
    report: Report = None,
    as_json: Json = False,
) -> int | None:
    """The kernel's own policy, and each policy with its agent on the host and on the IPU: what offload costs and saves."""
    scenario = load_scenario_of(scenario_name, settings, seed=seed, policies=policies, loads=loads, world=world)
    check_outputs(out, report, kept=files_of(scenario, scenario_name))
    if world == "local":
        module = find_local(scenario)
        _refuse(scenario, {"--loads": loads, "--saturation": saturation, "--ablation": ablation, "--processes": processes})
        results, code = run_local(module, scenario)
        give_results(results, out, report, as_json, stopped=code)
        return code
    if scenario.subsystem != "sched":
        offered = None if hasattr(scenario, "workload") else loads
        _refuse(scenario, {"--loads": offered, "--saturation": saturation, "--ablation": ablation, "--processes": processes})
        results, code = run_subsystem(scenario)
        give_results(results, out, report, as_json, stopped=code)
        return code
    search = loads is None if saturation is None else saturation
    with open_pool(processes) as pool:
        comparison = prepare(scenario, pool)
        code = measure(comparison, pool, saturation=search, ablation=search if ablation is None else ablation)
    give_results(comparison.results(), out, report, as_json, stopped=code)
    return code


@commands.command("trace")
def trace(
    scenario_name: Annotated[
        str | None,
        typer.Argument(help="A scenario's name, or the path of a TOML file; with --live an enclave's name.", metavar="SCENARIO", show_default=False),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="The Perfetto trace to write; open it at https://ui.perfetto.dev.")] = Path("trace.json"),
    from_ms: Annotated[float | None, typer.Option(min=0, help="Where it begins, virtual ms; by default after warm-up.", show_default=False)] = None,
    for_ms: Annotated[float, typer.Option(min=0.001, max=1000, help="How long it is, virtual ms.")] = 5.0,
    policies: PolicyNames = None,
    placement: Placement = "offload",
    load: Annotated[str | None, typer.Option(help="Offered load in requests/s; by default the scenario's middle one.", show_default=False)] = None,
    seed: Seed = None,
    settings: Settings = None,
    live: Annotated[
        str | None, typer.Option(metavar="TIME", help="Trace an enclave of this machine for so long, as 500ms or 5s (root).", show_default=False)
    ] = None,
    as_json: Json = False,
) -> int | None:
    """Every event of some milliseconds of a run, or of some seconds of a live enclave: CPUs, queues, link, agent, one track each."""
    if live is not None:
        if from_ms is not None or policies or load or seed is not None or settings:
            raise ConfigError("--live traces an enclave as it is: of the other options only --out and --json go with it")
        return trace_live(scenario_name, live, out, as_json)
    if scenario_name is None:
        raise ConfigError("name a scenario (wave config list), or trace an enclave of this machine: wave trace --live 5s")
    scenario = load_scenario_of(scenario_name, settings, seed=seed, policies=policies, loads=load)
    check_outputs(out, kept=files_of(scenario, scenario_name))
    _one_only(policies, load, "a trace each")
    if scenario.subsystem != "sched":
        events = trace_subsystem(scenario, placement, None if load is None else _parse_load(load), from_ms, for_ms, out)
    else:
        with open_pool(1) as pool:
            events = write_trace(single_run(scenario, placement, pool), pool, scenario.run.warmup_ms if from_ms is None else from_ms, for_ms, out)
    if as_json:
        print_json({"path": str(out), "events": events, "from_ms": from_ms, "for_ms": for_ms})
    else:
        print(out)
        talk(f"{events:,} events; open the file at https://ui.perfetto.dev")
    return None


@commands.command("report")
def report(
    results_path: Annotated[Path, typer.Argument(help="A results file, as written by --out: JSON, or Parquet of a sweep.", metavar="RESULTS")],
    out: Annotated[Path, typer.Option("--out", help="The HTML file to write.")] = Path("report.html"),
    as_json: Json = False,
) -> None:
    """One self-contained HTML page from a results file."""
    results = read_results(results_path)
    write_report(results, out)
    if as_json:
        print_json({"path": str(out), "name": results.get("name")})
    else:
        print(out)


@config.command("show")
def show_config(
    scenario_name: ScenarioName,
    with_origin: Annotated[bool, typer.Option("--origin", help="Say where each value comes from.")] = False,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """All values of a scenario, those that it leaves out too."""
    from waveos.scenario import flatten

    scenario = load_scenario_of(scenario_name, settings)
    values, origin = scenario.model_dump(exclude_none=True), scenario.origin
    if as_json:
        print_json({"scenario": values, "origin": {key: origin[key] for key, _ in flatten(values)}} if with_origin else values)
        return
    rows = [(key, json.dumps(value, ensure_ascii=False), origin.get(key, "default")) for key, value in flatten(values)]
    if with_origin:
        print_table(("key", "value", "from"), rows)
    else:
        print_table(("key", "value"), [row[:2] for row in rows])


@config.command("list")
def list_scenarios(as_json: Json = False) -> None:
    """The scenarios that can be named."""
    from waveos.scenario import load_scenario, scenario_names

    rows = [{"name": name, "about": load_scenario(name).about} for name in scenario_names()]
    if as_json:
        print_json(rows)
    else:
        print_table(("scenario", "what it is"), [(row["name"], row["about"]) for row in rows])


# ── from flags to a scenario ─────────────────────────────────────────────────────────────────────────────────────────


def load_scenario_of(
    name: str,
    settings: Sequence[str] | None,
    *,
    seed: int | None = None,
    policies: Sequence[str] | None = None,
    loads: str | None = None,
    world: str = "virtual",
    extra: Sequence[tuple[str, Any, str]] = (),
) -> Any:
    """The scenario with the flags over its keys."""
    from waveos.scenario import load_scenario

    if world == "remote":
        raise MissingError("--world remote: scenarios are not run there yet; `wave hostd` with `wave relay` has an agent on another machine decide")
    if world not in ("virtual", "local"):
        raise ConfigError(f"--world {world}: no such world{nearest(world, ['virtual', 'local'])}; there are: virtual, local")
    flags: list[str | tuple[str, Any, str]] = [*(settings or []), *extra]
    if seed is not None:
        flags.append(("run.seed", seed, "--seed"))
    if policies:
        flags.append(("policies.names", list(policies), "--policy"))
    if loads is not None:
        flags += [("workload.loads_per_s", [_parse_load(each) for each in loads.split(",")], "--loads"), ("workload.loads_share", [], "--loads")]
    return load_scenario(name, flags)


def _refuse(scenario: Any, flags: dict[str, Any]) -> None:
    """Flags that mean nothing for the scenario's subsystem."""
    for flag, value in flags.items():
        if value is not None:
            raise ConfigError(f"{flag} is for scenarios of sched; {scenario.name} is one of {scenario.subsystem}: leave it out")


def _one_only(policies: Sequence[str] | None, load: str | None, instead: str) -> None:
    """Flags that name several of what one is run of."""
    if policies and len(policies) > 1:
        raise ConfigError(
            f"--policy is there {len(policies)} times ({', '.join(policies)}), and one policy is run here: name one; for several: {instead}"
        )
    if load is not None and "," in load:
        raise ConfigError(f"--load {load}: one load is run here: name one; for several: {instead}")


def _parse_load(text: str) -> float:
    scale = {"k": 1e3, "K": 1e3, "M": 1e6}.get(text.strip()[-1:], 1.0)
    try:
        load = float(text.strip().removesuffix("k").removesuffix("K").removesuffix("M").replace("_", "")) * scale
    except ValueError:
        load = -1.0
    if not 0 < load < 1e12:
        raise ConfigError(f"load {text.strip()!r}: wants requests per second above 0, as 40000 or 40k; several with commas between them")
    return load
