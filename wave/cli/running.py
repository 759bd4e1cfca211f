"""How commands run a scenario: what it reads is read or measured, its runs go to processes, progress to stderr; Ctrl-C keeps what is done."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from waveos.cli import INTERRUPTED
from waveos.cli.terminal import talk
from waveos.errors import ConfigError, MissingError
from waveos.names import nearest, split_policy_file
from waveos.paths import cache_dir

if TYPE_CHECKING:
    from waveos.scenario import Scenario

_EVERY_S = 5.0  # between lines of progress where stderr is no terminal
_COMPILING = "the first run on a machine compiles the engine, which takes up to a minute"


def only_in(placement: str) -> Callable[[Any], bool]:
    """Which configurations a placement means. Raises ConfigError for one that there is not."""
    worlds = ("kernel", "on-host", "offload")
    if placement not in (*worlds, "all"):
        raise ConfigError(f"--placement {placement}: no such place{nearest(placement, worlds)}; there are {', '.join(worlds)}")
    return lambda each: placement == "all" or each.world == placement


def prepare(scenario: Scenario, pool: Any = None, *, only: Callable[[Any], bool] = lambda configuration: True) -> Any:
    """The scenario's comparison (`waveos.ipu_emulator.experiment.Comparison`), with everything it reads read, ready to run."""
    experiment = import_module("waveos.ipu_emulator.experiment")
    scenario = experiment.check_policies(scenario, pool=pool)
    link = import_module("waveos.ipu_emulator.job").link_of(scenario)
    return experiment.Comparison(
        scenario,
        gather_inputs(scenario, pool),
        link={"name": link.name, "verified": link.verified, "source": link.source},
        machine=import_module("waveos.bench.machine").describe_machine(),
        only=only,
    )


def run_subsystem(scenario: Any, placement: str = "all") -> tuple[Any, int | None]:
    """The comparison of a subsystem other than sched, and the exit code 130 when Ctrl-C stopped it, else None.

    Such a subsystem has `compare(scenario, placements, progress)` in `waveos.ipu_emulator.<subsystem>.experiment`, which gives the results (a dict with
    `subsystem`, `configs`, `notes`, `interrupted`) and, stopped, those it has; and in `waveos.report.<subsystem>` `table(results)` as (columns, rows)
    and `render_report(results)` as HTML.
    """
    experiment = import_module(f"waveos.ipu_emulator.{scenario.subsystem}.experiment")
    places = experiment.PLACEMENTS
    if placement not in (*places, "all"):
        raise ConfigError(f"--placement {placement}: no such place{nearest(placement, places)}; there are {', '.join(places)}")
    with show_progress("", "") as progress:
        results = experiment.compare(scenario, places if placement == "all" else (placement,), progress)
    results["machine"] = import_module("waveos.bench.machine").describe_machine()
    return results, INTERRUPTED if results["interrupted"] else None


def find_local(scenario: Any) -> Any:
    """What runs such a scenario on this machine's own kernel: a module `waveos.bench.<subsystem>_local` with `PLACEMENTS` and `compare(scenario, progress,
    tell)`, which gives results as `run_subsystem`'s. Raises MissingError for a subsystem that has none."""
    name = f"waveos.bench.{scenario.subsystem}_local"
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
    instead = {"sched": "wave bench live", "net": "wave bench net", "serving": "wave serve"}.get(scenario.subsystem, "wave bench")
    raise MissingError(
        f"--world local runs scenarios of memory so far; {scenario.name} is one of {scenario.subsystem}: `{instead}` has what runs for real of it"
    )


def run_local(module: Any, scenario: Any, placement: str = "all") -> tuple[Any, int | None]:
    """As `run_subsystem`, by a module that `find_local` has found."""
    if placement not in (*module.PLACEMENTS, "all"):
        raise ConfigError(f"--placement {placement}: in the local world the policy is in agentd, always: leave it out")
    with show_progress("", "") as progress:
        results = module.compare(scenario, progress, talk)
    results["machine"] = import_module("waveos.bench.machine").describe_machine()
    return results, INTERRUPTED if results["interrupted"] else None


def trace_subsystem(scenario: Any, placement: str, load_per_s: float | None, from_ms: float | None, for_ms: float, out: Path) -> int:
    """Write a trace of a subsystem that has `trace` in its experiment and `write_trace` in its report. Returns the number of events."""
    experiment = import_module(f"waveos.ipu_emulator.{scenario.subsystem}.experiment")
    if not hasattr(experiment, "trace"):
        raise ConfigError(f"there are no traces of {scenario.subsystem}; {scenario.name} is a scenario of it")
    events, meta = experiment.trace(scenario, placement, load_per_s, from_ms, for_ms)
    written: int = import_module(f"waveos.report.{scenario.subsystem}").write_trace(events, out, meta)
    return written


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
        costs = import_module("waveos.bench.policy").message_costs(files.values(), _params(scenario, files))
    else:
        costs = _measured_costs(scenario, inputs.Inputs(samples, dict.fromkeys(names, 0.0), arrivals), files, pool)
    return inputs.Inputs(samples, {name: costs[file] for name, file in files.items()}, arrivals)


def _measured_costs(scenario: Scenario, inputs: Any, files: Mapping[str, str], pool: Any) -> Any:
    """Costs of policies' messages, ns. A policy from a file first runs for a moment under the watchdog: a measurement has none."""
    job, experiment = import_module("waveos.ipu_emulator.job"), import_module("waveos.ipu_emulator.experiment")
    short = scenario.model_copy(update={"run": scenario.run.model_copy(update={"duration_ms": 5.0, "warmup_ms": 0.0})})
    for name, file in files.items():
        if split_policy_file(file) is not None:
            configuration = job.Configuration(name, "offload", scenario.host.workers)
            pool.submit(job.Job(short, inputs, job.Ask(configuration, experiment.capacity_per_s(scenario, inputs) / 2, 1)))
    for _ in pool.finished():
        pass
    pool.submit(job.CallJob("waveos.bench.policy:message_costs", (tuple(files.values()), _params(scenario, files)), ", ".join(files.values())))
    [(_, costs)] = pool.finished()
    return costs


def _params(scenario: Scenario, files: Mapping[str, str]) -> dict[str, Mapping[str, float]]:
    """The scenario's parameters, by the name under which a policy is loaded."""
    return {file: scenario.policies.params.get(name, {}) for name, file in files.items()}


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


def single_run(scenario: Scenario, placement: str, pool: Any) -> Any:
    """A comparison of one configuration at one load: the last policy where there are several, the middle load."""
    comparison = prepare(scenario, pool, only=only_in(placement))
    if not comparison.configurations:
        raise ConfigError(f"--placement {placement}: the scenario has no such configuration")
    comparison.configurations = comparison.configurations[-1:] if placement != "on-host" else _same_workers(comparison.configurations)
    comparison.grid = [comparison.grid[len(comparison.grid) // 2]]
    return comparison


def _same_workers(configurations: Sequence[Any]) -> list[Any]:
    return [each for each in configurations if each.column == "same workers"][-1:]


def open_pool(processes: int | None) -> Any:
    """Processes to simulate in. A single run as plain Python (WAVE_JIT=0) stays in this process, for print and pdb."""
    pool = import_module("waveos.ipu_emulator.pool")
    if os.environ.get("WAVE_JIT") == "0" and processes == 1:
        return pool.Here()
    return pool.Pool(processes)


def measure(comparison: Any, pool: Any, *, saturation: bool, ablation: bool = False, label: str = "") -> int | None:
    """Run it with progress on stderr. Returns the exit code 130 when Ctrl-C stopped it, else None."""
    scenario = comparison.scenario
    ablated = (scenario.policies.ablation or scenario.policies.names[-1]) if ablation else ""
    try:
        with show_progress(label) as progress:
            comparison.run(pool, comparison.searches(saturation=saturation, ablation=ablated), progress)
    except KeyboardInterrupt:
        pool.close()
        return INTERRUPTED
    return None


@contextlib.contextmanager
def show_progress(label: str, compiling: str = _COMPILING) -> Iterator[Callable[[int, int, str], None]]:
    """A bar where stderr is a terminal, else a line now and then; `compiling` is said while nothing is done yet."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(), TextColumn("runs"), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(f"{label}starting" + (f"; {compiling}" if compiling and _compiles() else ""), total=None)
            yield lambda done, expected, what: bar.update(task, completed=done, total=expected, description=f"{label}{what}")
        return
    last = time.monotonic() - _EVERY_S + 1  # the first line soon
    waiting = threading.Timer(3, lambda: talk(compiling) if _compiles() else None) if compiling else threading.Timer(0, lambda: None)
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


def _compiles() -> bool:
    """Whether the newest folder of compiled code (`waveos.jit`) has no engine yet."""
    root = Path(os.environ.get("NUMBA_CACHE_DIR") or cache_dir("compiled"))
    folders = [each for each in root.glob("*") if each.is_dir()]
    newest = max(folders, key=lambda each: each.stat().st_mtime, default=None)
    return newest is None or not any(newest.rglob("engine.advance-*.nbi"))


def write_trace(comparison: Any, pool: Any, from_ms: float, for_ms: float, out: Path) -> int:
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
