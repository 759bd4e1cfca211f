"""`wave sweep`: every combination of the values of some keys, over all cores of this machine or of a Ray cluster.

A point that is finished is on the disk before the next is counted (`waveos.journal`), so a sweep can be killed at any moment, and the same command goes
on where it ended. What it found is one Parquet file, written when it ends or Ctrl-C stops it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from waveos import __version__
from waveos.cli import INTERRUPTED
from waveos.cli.experiment import Loads, PolicyNames, Processes, Report, ScenarioName, Seed, Settings, World, load_scenario_of
from waveos.cli.results import check_outputs, write_report
from waveos.cli.running import gather_inputs, only_in, open_pool
from waveos.cli.terminal import Json, print_json, print_table, talk
from waveos.errors import ConfigError, WaveError

commands = typer.Typer()
FORMAT = 1
"""Of the file and the journal; raised when either changes."""
_EVERY_S = 5.0  # between lines of progress where stderr is no terminal
_SHOWN = 60  # rows of the table; the file has all


@commands.command("sweep")
def sweep(
    scenario_name: ScenarioName,
    grid: Annotated[
        list[str], typer.Option(help="A key and its values, as --grid host.workers=4,8. Given again: every combination.", metavar="KEY=V1,V2")
    ],
    policies: PolicyNames = None,
    placement: Annotated[str, typer.Option(help="Where decisions are made: kernel, on-host, offload, or all.")] = "offload",
    loads: Loads = None,
    on: Annotated[
        str, typer.Option(help="A Ray cluster, as ray://HOST:10001, or ray://local; without it this machine's cores.", metavar="ray://...")
    ] = "",
    world: World = "virtual",
    seed: Seed = None,
    settings: Settings = None,
    processes: Processes = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The Parquet file for its results; by default named by what is swept.", show_default=False)
    ] = None,
    report: Report = None,
    as_json: Json = False,
) -> int | None:
    """A grid of keys: saturation, or the given loads, at every point. Killed, it goes on where it was when given again."""
    from waveos.grid import parse_grid

    if world == "local":
        raise ConfigError("--world local: a sweep is of the virtual world; wave run SCENARIO --world local --set KEY=VALUE, once for each")
    parsed = parse_grid(grid)
    points = parsed.points()
    flags: dict[str, Any] = {"seed": seed, "policies": policies, "loads": loads, "world": world}
    scenarios = [
        load_scenario_of(scenario_name, settings, **flags, extra=[(key, value, "--grid") for key, value in point.items()]) for point in points
    ]
    saturation = _check(scenarios, placement, loads, on, processes)
    about = _about(load_scenario_of(scenario_name, settings, **flags), parsed.values, placement, saturation)
    path = out or Path(f"{about['name']}-sweep-{about['sweep'][:8]}.parquet")
    _check_out(path, report)
    rows, finished = _finished(path, about)
    journal_path = path.with_name(path.name + ".journal")
    code = None
    if len(finished) < len(points) or journal_path.exists():
        with import_module("waveos.journal").Journal(journal_path, about, lambda theirs: _differs(about, theirs)) as journal:
            rows += [row for number in journal.entries.keys() - finished for row in journal.entries[number]["rows"]]
            finished |= journal.entries.keys()
            missing = [number for number in range(len(points)) if number not in finished]
            if finished and missing:
                talk(f"{len(finished)} of {len(points)} points are there already: going on with the others")
            code = (
                _measure(points, scenarios, missing, journal, placement=placement, saturation=saturation, on=on, processes=processes)
                if missing
                else None
            )
            rows += [row for number in missing if number in journal.entries for row in journal.entries[number]["rows"]]
            finished |= journal.entries.keys()
            results = _results(about, rows, len(points), len(finished), code)
            if rows:
                import_module("waveos.parquet").write_parquet(path, results["rows"], {key: value for key, value in results.items() if key != "rows"})
            journal.remove()
    else:
        talk(f"all {len(points)} points are there already: nothing is run again")
        results = _results(about, rows, len(points), len(finished), None)
    _give(results, path, report, as_json, code)
    return code


# ── what is swept ────────────────────────────────────────────────────────────────────────────────────────────────────


def _check(scenarios: list[Any], placement: str, loads: str | None, on: str, processes: int | None) -> bool:
    """Refuse what no point could be run with. Returns whether saturation is searched for."""
    first = scenarios[0]
    if on and processes is not None:
        raise ConfigError("--processes is for this machine; with --on ray://... there is one for each core of the cluster: leave it out")
    subsystems = {each.subsystem for each in scenarios}
    if len(subsystems) > 1:
        raise ConfigError(f"--grid: the points are of several subsystems ({', '.join(sorted(subsystems))}): sweep each by itself")
    if first.subsystem == "sched":
        only_in(placement)
        job = import_module("waveos.ipu_emulator.job")
        for each in scenarios:
            job.host_of(each), job.link_of(each)
        return loads is None
    if loads is not None and not hasattr(first, "workload"):
        raise ConfigError(f"--loads is for scenarios with a [workload]; {first.name} is one of {first.subsystem}: leave it out")
    places = import_module(f"waveos.ipu_emulator.{first.subsystem}.experiment").PLACEMENTS
    if placement not in (*places, "all"):
        raise ConfigError(f"--placement {placement}: {first.subsystem} has {', '.join(places)}, or all")
    return False


def _about(base: Any, grid: Mapping[str, Any], placement: str, saturation: bool) -> dict[str, Any]:
    """What the results are of: the file's metadata, and the journal's first line. `sweep` and `code` say whether two of them may be joined."""
    scenario = base.model_dump(exclude_none=True)
    asked = {"scenario": scenario, "grid": grid, "placement": placement, "saturation": saturation, "policy_files": _policy_files(base, grid)}
    return {
        "kind": "sweep",
        "format": FORMAT,
        "name": base.name,
        "subsystem": base.subsystem,
        "timing": "modelled",
        "wave_version": __version__,
        "sweep": hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()[:16],
        "code": import_module("waveos.ipu_emulator.sweep").code_hash(),
        "grid": dict(grid),
        "placement": placement,
        "saturation": saturation,
        "machine": import_module("waveos.bench.machine").describe_machine(),
        "scenario": scenario,
    }


def _policy_files(base: Any, grid: Mapping[str, Any]) -> dict[str, str]:
    """Hashes of policies that are files: a point that another text decided is of another sweep."""
    from waveos.names import split_policy_file

    names = [*base.policies.names, *(name for value in grid.get("policies.names", []) for name in value)]
    found = {}
    for name in names:
        if (parts := split_policy_file(str(name))) is not None:
            for path in (Path(parts[0]), base.base / parts[0]):
                if path.is_file():
                    found[parts[0]] = hashlib.sha256(path.read_bytes()).hexdigest()
                    break
    return found


def _differs(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """Why points of `theirs` are none of `mine`; "" if they are."""
    remedy = "name another file with --out, or remove this one"
    if theirs.get("kind") != "sweep" or theirs.get("format") != FORMAT:
        return f"is of another version of wave sweep (format {theirs.get('format')}, this one writes {FORMAT}); {remedy}"
    if theirs.get("sweep") != mine["sweep"]:
        over = ", ".join(theirs.get("grid", {})) or "nothing"
        return f"holds another sweep (of {theirs.get('name')}, over {over}; or other values, flags, or scenario); {remedy}"
    if theirs.get("code") != mine["code"]:
        return f"holds points that another version of Wave made ({theirs.get('wave_version')}, this is {__version__}, or other sources); {remedy}"
    return ""


def _check_out(path: Path, report: Path | None) -> None:
    check_outputs(path, report)
    if path.suffix != ".parquet":
        raise ConfigError(f"--out {path}: a sweep's results are a Parquet file: name one that ends in .parquet")
    if path.exists() and not path.is_file():
        raise ConfigError(f"--out {path}: is no regular file; a sweep goes on from what is in its file, so name one on a disk")
    if not os.access(path.resolve().parent, os.W_OK):
        raise ConfigError(f"cannot write {path}: permission denied in its folder; name a file where you may write")


def _finished(path: Path, about: Mapping[str, Any]) -> tuple[list[dict[str, Any]], set[int]]:
    """Rows that are in the file already, and the numbers of their points. Raises ConfigError for a file of something else."""
    if not path.exists():
        return [], set()
    rows, theirs = import_module("waveos.parquet").read_parquet(path)
    if why := _differs(about, theirs):
        raise ConfigError(f"{path} {why}")
    return rows, {row["point"] for row in rows}


# ── how it runs ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _measure(
    points: list[dict[str, Any]],
    scenarios: list[Any],
    missing: list[int],
    journal: Any,
    *,
    placement: str,
    saturation: bool,
    on: str,
    processes: int | None,
) -> int | None:
    """Run the points that are missing, each kept as it ends. Returns the exit code 130 when Ctrl-C stopped it, else None."""
    sweeping = import_module("waveos.ipu_emulator.sweep")
    try:
        inputs = _gather([scenarios[number] for number in missing])
        with _open_pool(on, processes, len(missing), sweeping.FACTORY) as pool, _show_points(len(points), len(points) - len(missing)) as progress:
            started = time.monotonic()
            numbers = {}
            for number, read in zip(missing, inputs, strict=True):
                label = ", ".join(f"{key}={_text(value)}" for key, value in points[number].items())
                numbers[pool.submit(sweeping.PointJob(label, scenarios[number], read, placement, saturation))] = number
            for done, (ticket, rows) in enumerate(pool.finished(), 1):
                number = numbers[ticket]
                journal.add(number, {"rows": [{"point": number, **points[number], **row} for row in rows]})
                progress(done, time.monotonic() - started)
    except KeyboardInterrupt:
        return INTERRUPTED
    except WaveError as error:
        if not journal.entries:
            journal.remove()
            raise
        raise type(error)(f"{error}; the {len(journal.entries)} points that were finished are kept in {journal.path}") from error
    return None


def _open_pool(on: str, processes: int | None, points: int, factory: str) -> Any:
    if on:
        pool = import_module("waveos.ipu_emulator.cluster").RayPool(on, factory=factory)
        talk(f"{on}: {len(pool)} cores")
        return pool
    pools = import_module("waveos.ipu_emulator.pool")
    if os.environ.get("WAVE_JIT") == "0" and processes is None:
        return pools.Here(factory=factory)
    return pools.Pool(min(points, processes or len(os.sched_getaffinity(0))), factory=factory)


def _gather(scenarios: list[Any]) -> list[Any]:
    """What each scenario of `sched` reads besides itself; what several have in common is read, or measured, once."""
    if scenarios[0].subsystem != "sched":
        return [None] * len(scenarios)
    known: dict[str, Any] = {}
    check = import_module("waveos.ipu_emulator.experiment").check_policies
    with contextlib.ExitStack() as stack:
        pool = None
        for scenario in scenarios:
            key = _reads(scenario)
            if key not in known:
                pool = pool or stack.enter_context(open_pool(1))
                known[key] = gather_inputs(check(scenario, pool=pool), pool)
        return [known[_reads(scenario)] for scenario in scenarios]


def _reads(scenario: Any) -> str:
    """Equal for scenarios that read the same."""
    services = [(each.name, each.service.samples) for each in scenario.workload.classes]
    return json.dumps([services, str(scenario.workload.arrivals), scenario.agent.message_ns, scenario.policies.model_dump()], default=str)


@contextlib.contextmanager
def _show_points(total: int, before: int) -> Iterator[Callable[[int, float], None]]:
    """Progress on stderr, called as (points done now, seconds since the first began): a bar on a terminal, else a line now and then."""

    def left(done: int, elapsed_s: float) -> str:
        return show_span(elapsed_s / done * (total - before - done))

    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (BarColumn(bar_width=30), MofNCompleteColumn(), TextColumn("points; {task.description}"))
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("starting", total=total, completed=before)
            yield lambda done, elapsed_s: bar.update(task, completed=before + done, description=f"about {left(done, elapsed_s)} left")
        return
    told_s = -_EVERY_S

    def say(done: int, elapsed_s: float) -> None:
        nonlocal told_s
        if elapsed_s - told_s >= _EVERY_S and before + done < total:
            told_s = elapsed_s
            talk(f"{before + done} of {total} points done, about {left(done, elapsed_s)} left")

    yield say


def show_span(seconds: float) -> str:
    """A span of time for people: "40 s", "3 min 20 s", "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


# ── what it gives ────────────────────────────────────────────────────────────────────────────────────────────────────


def _results(about: Mapping[str, Any], rows: list[dict[str, Any]], total: int, done: int, code: int | None) -> dict[str, Any]:
    ordered = sorted(rows, key=lambda row: row["point"])
    return {**about, "points": total, "points_done": done, "interrupted": code is not None, "rows": ordered}


def _give(results: Mapping[str, Any], path: Path, report: Path | None, as_json: bool, code: int | None) -> None:
    if as_json:
        print_json(results)
    elif results["rows"]:
        columns, rows = import_module("waveos.report.sweep").table(results)
        print_table(columns, rows[:_SHOWN], title=f"{results['name']}: timing {results['timing']}", numbers=columns)
        if len(rows) > _SHOWN:
            talk(f"{_SHOWN} of {len(rows)} rows are shown; the file has all")
    if results["rows"]:
        talk(f"{'stopped; what was measured is kept in' if code else 'results:'} {path}")
    if report is not None and code is None:
        write_report(results, report)
        talk(f"report: {report}")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
