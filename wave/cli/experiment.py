"""`wave run|compare|sweep|trace|report|config`: from a scenario to a table, a results file, a report or a trace.

The model and its processes are loaded by name when a command runs: `wave --help` needs none of them. What a command measured is kept when Ctrl-C
stops it: it is printed and written as far as it got, and the exit code is 130.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from waveos.cli import INTERRUPTED
from waveos.cli.terminal import Json, print_json, print_table, stdout, talk
from waveos.errors import ConfigError, MissingError
from waveos.names import nearest

if TYPE_CHECKING:
    from waveos.scenario import Scenario

commands = typer.Typer()
config = typer.Typer(name="config", help="What a scenario says, and where each value comes from.", no_args_is_help=True)
commands.add_typer(config)

_EVERY_S = 5.0  # between lines of progress where stderr is no terminal
_COMPILING = "the first run on a machine compiles the engine, which takes up to a minute"

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
World = Annotated[str, typer.Option(help="virtual; local and remote are not here yet.")]


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
    scenario = _load(scenario_name, settings, seed=seed, policies=policies, loads=load, world=world)
    _check_outputs(out, trace)
    with _open_pool(1) as pool:
        comparison = _single(scenario, placement, pool)
        code = _measure(comparison, pool, saturation=False)
        if trace is not None and code is None:
            _write_trace(comparison, pool, scenario.run.warmup_ms, 5.0, trace)
    results = comparison.results()
    _give(results, out, None, as_json, stopped=code)
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
    scenario = _load(scenario_name, settings, seed=seed, policies=policies, loads=loads, world=world)
    _check_outputs(out, report)
    search = loads is None if saturation is None else saturation
    with _open_pool(processes) as pool:
        comparison = prepare(scenario, pool)
        code = _measure(comparison, pool, saturation=search, ablation=search if ablation is None else ablation)
    _give(comparison.results(), out, report, as_json, stopped=code)
    return code


@commands.command("sweep")
def sweep(
    scenario_name: ScenarioName,
    over: Annotated[
        list[str], typer.Option(help="A key and its values, as --over host.workers=4,8. Given again: every combination.", metavar="KEY=V1,V2")
    ],
    policies: PolicyNames = None,
    placement: Annotated[str, typer.Option(help="kernel, on-host, offload, or all.")] = "offload",
    loads: Loads = None,
    world: World = "virtual",
    seed: Seed = None,
    settings: Settings = None,
    processes: Processes = None,
    out: Out = None,
    as_json: Json = False,
) -> int | None:
    """Saturation, or the given loads, for every combination of the values of some keys."""
    combinations = [_combine(each) for each in itertools.product(*(_over(each) for each in over))]
    scenarios = [
        (
            values,
            _load(
                scenario_name, settings, seed=seed, policies=policies, loads=loads, world=world, extra=[(k, v, "--over") for k, v in values.items()]
            ),
        )
        for values in combinations
    ]
    _check_outputs(out)
    rows: list[dict[str, Any]] = []
    code: int | None = None
    with _open_pool(processes) as pool:
        for number, (values, scenario) in enumerate(scenarios, 1):
            comparison = prepare(scenario, pool, only=_only(placement))
            label = f"{number} of {len(scenarios)}: {', '.join(f'{key}={value}' for key, value in values.items())}: "
            code = _measure(comparison, pool, saturation=loads is None, label=label)
            rows.append({"set": values, **comparison.results()})
            if code is not None:
                break
    results = {"name": scenarios[0][1].name, "over": [each.partition("=")[0] for each in over], "interrupted": code is not None, "results": rows}
    _keep(results, out, stopped=code)
    if as_json:
        print_json(results)
    else:
        _print_sweep(rows)
    return code


@commands.command("trace")
def trace(
    scenario_name: ScenarioName,
    out: Annotated[Path, typer.Option("--out", help="The Perfetto trace to write; open it at https://ui.perfetto.dev.")] = Path("trace.json"),
    from_ms: Annotated[float | None, typer.Option(min=0, help="Where it begins, virtual ms; by default after warm-up.", show_default=False)] = None,
    for_ms: Annotated[float, typer.Option(min=0.001, max=1000, help="How long it is, virtual ms.")] = 5.0,
    policies: PolicyNames = None,
    placement: Placement = "offload",
    load: Annotated[str | None, typer.Option(help="Offered load in requests/s; by default the scenario's middle one.", show_default=False)] = None,
    seed: Seed = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Every event of some milliseconds of a run: CPUs, queues, link, agent, one track each."""
    scenario = _load(scenario_name, settings, seed=seed, policies=policies, loads=load)
    _check_outputs(out)
    begin_ms = scenario.run.warmup_ms if from_ms is None else from_ms
    with _open_pool(1) as pool:
        events = _write_trace(_single(scenario, placement, pool), pool, begin_ms, for_ms, out)
    if as_json:
        print_json({"path": str(out), "events": events, "from_ms": begin_ms, "for_ms": for_ms})
    else:
        print(out)
        talk(f"{events:,} events; open the file at https://ui.perfetto.dev")


@commands.command("report")
def report(
    results_path: Annotated[Path, typer.Argument(help="A results file, as written by --out.", metavar="RESULTS.json")],
    out: Annotated[Path, typer.Option("--out", help="The HTML file to write.")] = Path("report.html"),
    as_json: Json = False,
) -> None:
    """One self-contained HTML page from a results file."""
    results = _read_json(results_path)
    import_module("waveos.report.html").write_report(results, out)
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

    scenario = _load(scenario_name, settings)
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


def _load(
    name: str,
    settings: Sequence[str] | None,
    *,
    seed: int | None = None,
    policies: Sequence[str] | None = None,
    loads: str | None = None,
    world: str = "virtual",
    extra: Sequence[tuple[str, Any, str]] = (),
) -> Scenario:
    """The scenario with the flags over its keys."""
    from waveos.scenario import load_scenario

    if world in ("local", "remote"):
        raise MissingError(f"--world {world} is not here yet; --world virtual runs every scenario on a model of the machine")
    if world != "virtual":
        raise ConfigError(
            f"--world {world}: no such world{nearest(world, ['virtual', 'local', 'remote'])}; there is virtual (local and remote are to come)"
        )
    flags: list[str | tuple[str, Any, str]] = [*(settings or []), *extra]
    if seed is not None:
        flags.append(("run.seed", seed, "--seed"))
    if policies:
        flags.append(("policies.names", list(policies), "--policy"))
    if loads is not None:
        flags += [("workload.loads_per_s", [_parse_load(each) for each in loads.split(",")], "--loads"), ("workload.loads_share", [], "--loads")]
    return load_scenario(name, flags)


def _parse_load(text: str) -> float:
    scale = {"k": 1e3, "K": 1e3, "M": 1e6}.get(text.strip()[-1:], 1.0)
    try:
        load = float(text.strip().removesuffix("k").removesuffix("K").removesuffix("M").replace("_", "")) * scale
    except ValueError:
        load = -1.0
    if not 0 < load < 1e12:
        raise ConfigError(f"load {text.strip()!r}: wants requests per second above 0, as 40000 or 40k; several with commas between them")
    return load


def _over(text: str) -> list[tuple[str, Any]]:
    """`key=v1,v2` as pairs. A key that holds a list gets each value as a list of one."""
    from waveos.scenario import parse_value

    key, found, values = text.partition("=")
    if not found or not key or not values:
        raise ConfigError(f"--over {text}: wants a key and its values, as --over host.workers=4,8")
    parsed = parse_value(f"[{values}]") if not values.startswith("[") else parse_value(values)
    parsed = [parse_value(each) for each in values.split(",")] if isinstance(parsed, str) else parsed
    if not isinstance(parsed, list) or not parsed:
        raise ConfigError(f"--over {text}: wants a key and its values, as --over host.workers=4,8")
    is_list = key.rpartition(".")[2] in ("names", "mitigations", "loads_per_s", "loads_share")
    return [(key, [value] if is_list and not isinstance(value, list) else value) for value in parsed]


def _combine(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    return dict(pairs)


def _only(placement: str) -> Callable[[Any], bool]:
    worlds = ("kernel", "on-host", "offload")
    if placement not in (*worlds, "all"):
        raise ConfigError(f"--placement {placement}: no such place{nearest(placement, worlds)}; there are {', '.join(worlds)}")
    return lambda each: placement == "all" or each.world == placement


# ── running ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def prepare(scenario: Scenario, pool: Any = None, *, only: Callable[[Any], bool] = lambda configuration: True) -> Any:
    """The scenario's comparison (`waveos.ipu_emulator.experiment.Comparison`), with everything it reads read, ready to run."""
    experiment = import_module("waveos.ipu_emulator.experiment")
    experiment.check_policies(scenario)
    link = import_module("waveos.ipu_emulator.job").link_of(scenario)
    return experiment.Comparison(
        scenario,
        gather_inputs(scenario, pool),
        link={"name": link.name, "verified": link.verified, "source": link.source},
        machine=import_module("waveos.bench.machine").describe_machine(),
        only=only,
    )


def gather_inputs(scenario: Scenario, pool: Any = None) -> Any:
    """What the scenario reads besides itself: files, service times measured on this machine, costs of the policies' messages on it.

    With a pool the costs are measured in one of its processes. Raises MissingError where a measurement needs a package that is not installed,
    ConfigError for a file that cannot be used, PolicyError for a policy that fails while its cost is measured.
    """
    inputs = import_module("waveos.ipu_emulator.inputs")
    samples = {}
    for spec in inputs.wanted_samples(scenario):
        samples[spec] = inputs.read_samples(spec, scenario.base) if inputs.is_file(spec) else _measured_samples(spec)
    arrivals = None
    if not isinstance(scenario.workload.arrivals, str):
        arrivals = inputs.read_arrivals(scenario.base / scenario.workload.arrivals.trace, [each.name for each in scenario.workload.classes])
    names = list(dict.fromkeys([*scenario.policies.names, *([scenario.policies.ablation] if scenario.policies.ablation else [])]))
    if scenario.agent.message_ns != "measured":
        return inputs.Inputs(samples, dict.fromkeys(names, float(scenario.agent.message_ns)), arrivals)
    job = import_module("waveos.ipu_emulator.job")
    files = {name: job.policy_file(scenario, name) for name in names}
    if pool is None:
        costs = import_module("waveos.bench.policy").message_costs(files.values())
    else:
        costs = _measured_costs(scenario, inputs.Inputs(samples, dict.fromkeys(names, 0.0), arrivals), files, pool)
    return inputs.Inputs(samples, {name: costs[file] for name, file in files.items()}, arrivals)


def _measured_costs(scenario: Scenario, inputs: Any, files: Mapping[str, str], pool: Any) -> Any:
    """Costs of policies' messages, ns. A policy from a file first runs for a moment under the watchdog: a measurement has none."""
    job, experiment = import_module("waveos.ipu_emulator.job"), import_module("waveos.ipu_emulator.experiment")
    short = scenario.model_copy(update={"run": scenario.run.model_copy(update={"duration_ms": 5.0, "warmup_ms": 0.0})})
    for name, file in files.items():
        if ".py" in file:
            configuration = job.Configuration(name, "offload", scenario.host.workers)
            pool.submit(job.Job(short, inputs, job.Ask(configuration, experiment.capacity_per_s(scenario, inputs) / 2, 1)))
    for _ in pool.finished():
        pass
    pool.submit(job.CostJob("waveos.bench.policy:message_costs", tuple(files.values())))
    [(_, costs)] = pool.finished()
    return costs


def _measured_samples(spec: str) -> Any:
    """`rocksdb:get`, `rocksdb:range`: measured once on this machine and kept."""
    source, _, name = spec.partition(":")
    if source != "rocksdb" or name not in ("get", "range"):
        raise ConfigError(
            f'samples = "{spec}": nothing of that name can be measured; there are "rocksdb:get", "rocksdb:range", "FILE.csv" and "FILE.npz:NAME"'
        )
    rocksdb = import_module("waveos.host.rocksdb")
    if not rocksdb.cache_path().is_file():
        talk("measuring the service times of a real RocksDB on this machine (once, some 15 s) ...")
    times = rocksdb.measure_once()
    return times.get_ns if name == "get" else times.range_ns


def _single(scenario: Scenario, placement: str, pool: Any) -> Any:
    """A comparison of one configuration at one load: the last policy where there are several, the middle load."""
    comparison = prepare(scenario, pool, only=_only(placement))
    if not comparison.configurations:
        raise ConfigError(f"--placement {placement}: the scenario has no such configuration")
    comparison.configurations = comparison.configurations[-1:] if placement != "on-host" else _same_workers(comparison.configurations)
    comparison.grid = [comparison.grid[len(comparison.grid) // 2]]
    return comparison


def _same_workers(configurations: Sequence[Any]) -> list[Any]:
    return [each for each in configurations if each.column == "same workers"][-1:]


def _open_pool(processes: int | None) -> Any:
    """Processes to simulate in. A single run as plain Python (WAVE_JIT=0) stays in this process, for print and pdb."""
    pool = import_module("waveos.ipu_emulator.pool")
    if os.environ.get("WAVE_JIT") == "0" and processes == 1:
        return pool.Here()
    return pool.Pool(processes)


def _measure(comparison: Any, pool: Any, *, saturation: bool, ablation: bool = False, label: str = "") -> int | None:
    """Run it with progress on stderr. Returns the exit code 130 when Ctrl-C stopped it, else None."""
    scenario = comparison.scenario
    ablated = (scenario.policies.ablation or scenario.policies.names[-1]) if ablation else ""
    try:
        with _show_progress(label) as progress:
            comparison.run(pool, comparison.searches(saturation=saturation, ablation=ablated), progress)
    except KeyboardInterrupt:
        pool.close()
        return INTERRUPTED
    return None


@contextlib.contextmanager
def _show_progress(label: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar where stderr is a terminal, else a line now and then."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(), TextColumn("runs"), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(f"{label}starting; {_COMPILING}", total=None)
            yield lambda done, expected, what: bar.update(task, completed=done, total=expected, description=f"{label}{what}")
        return
    last = time.monotonic() - _EVERY_S + 1  # the first line soon
    waiting = threading.Timer(3, talk, (_COMPILING,))
    waiting.daemon = True

    def say(done: int, expected: int, what: str) -> None:
        nonlocal last
        waiting.cancel()
        if time.monotonic() - last >= _EVERY_S and expected > done:
            last = time.monotonic()
            talk(f"{label}{done} runs done, at least {expected - done} to go; last: {what}")

    waiting.start()
    try:
        yield say
    finally:
        waiting.cancel()


def _write_trace(comparison: Any, pool: Any, from_ms: float, for_ms: float, out: Path) -> int:
    """Run the first configuration once more, recording a window, and write it for Perfetto. Returns the number of events."""
    scenario = comparison.scenario
    until_ms = scenario.run.warmup_ms + scenario.run.duration_ms
    if from_ms >= until_ms:
        raise ConfigError(
            f"the window begins at {from_ms:g} ms, but the run ends at {until_ms:g}; begin earlier, or lengthen it with --set run.duration_ms=..."
        )
    configuration, load = comparison.configurations[0], comparison.grid[0]
    events = comparison.trace(pool, configuration, load, from_ms, for_ms)
    meta = {"scenario": scenario.name, "configuration": configuration.id, "load_per_s": load, "seed": scenario.run.seed, "timing": "modelled"}
    import_module("waveos.report.perfetto").write_trace(events, out, meta)
    return len(events)


# ── giving results ───────────────────────────────────────────────────────────────────────────────────────────────────


def _give(results: Mapping[str, Any], out: Path | None, report: Path | None, as_json: bool, *, stopped: int | None = None) -> None:
    """Results to stdout, and to the files that were asked for."""
    _keep(results, out, stopped=stopped)
    if as_json:
        print_json(results)
    elif results["configs"]:
        stdout().print(import_module("waveos.report.table").comparison_table(results))
        for note in results["notes"]:
            talk(f"note: {note}")
    if report is not None and stopped is None:
        import_module("waveos.report.html").write_report(results, report)
        talk(f"report: {report}")


def _keep(results: Mapping[str, Any], out: Path | None, *, stopped: int | None) -> None:
    """Write the results file; after Ctrl-C also where none was asked for, so that nothing measured is lost."""
    measured = bool(results.get("configs") or any(each["configs"] for each in results.get("results", [])))
    if out is None and stopped is not None and measured:
        out = Path(f"{results['name']}-stopped.json")
    if out is not None:
        import_module("waveos.output").write_file(out, json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False, default=_as_number) + "\n")
        talk(f"{'stopped; what was measured is kept in' if stopped else 'results:'} {out}")


def _as_number(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _check_outputs(*paths: Path | None) -> None:
    """Refuse an output that cannot be written before anything long is run."""
    for path in paths:
        if path is not None and path.is_dir():
            raise ConfigError(f"cannot write {path}: it is a folder; name a file")
        if path is not None and not path.resolve().parent.is_dir():
            raise ConfigError(f"cannot write {path}: there is no folder {path.resolve().parent}; make it first")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; wants a results file as `wave compare SCENARIO --out {path}` writes it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no results file ({error}); is it cut off? `wave compare SCENARIO --out {path}` writes one") from None


def _print_sweep(rows: Sequence[Mapping[str, Any]]) -> None:
    """One line a combination and configuration: saturation where it was searched, else the latencies at each load."""
    keys = list(rows[0]["set"]) if rows else []
    lines = []
    for row in rows:
        for each in row["configs"]:
            named = [json.dumps(row["set"][key]).strip('"') for key in keys] + [each["id"]]
            if each["saturation_per_s"] is not None:
                lines.append(
                    [*named, f"{each['saturation_per_s']:,.0f}", f"{each['saturation_low_per_s']:,.0f}..{each['saturation_high_per_s']:,.0f}", ""]
                )
            else:
                lines += [[*named, f"{point['load_per_s']:,.0f}", "", _latencies(point)] for point in each["points"]]
    searched = any(each["saturation_per_s"] is not None for row in rows for each in row["configs"])
    names = [*keys, "configuration", "saturation/s" if searched else "load/s", "95 %" if searched else "", "" if searched else "p50/p99/p99.9 us"]
    kept = [index for index, name in enumerate(names) if name]
    print_table([names[index] for index in kept], [[line[index] for index in kept] for line in lines], numbers=[names[len(keys) + 1]])


def _latencies(point: Mapping[str, Any]) -> str:
    return "; ".join(f"{name} {of['p50_us']:.1f}/{of['p99_us']:.1f}/{of['p999_us']:.1f}" for name, of in point["classes"].items() if of["count"])
