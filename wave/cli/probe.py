"""`wave probe`: what the kernel itself says of scheduling, through bcc, independent of all that Wave counts (`waveos.host.probes`)."""

from __future__ import annotations

import re
import shlex
import time
from contextlib import ExitStack
from importlib import import_module
from typing import Annotated, Any

import typer

from waveos.cli import INTERRUPTED
from waveos.cli.terminal import Json, print_json, print_table, show_number, talk
from waveos.errors import ConfigError

commands = typer.Typer()
probe = typer.Typer(no_args_is_help=True, help="Watch the kernel's scheduling with bcc: the ground truth of live experiments. Needs root.")
commands.add_typer(probe, name="probe")

Pids = Annotated[str, typer.Option("--pids", help="Processes, with all they start: 1234,5678.", show_default=False)]
Cgroup = Annotated[
    str, typer.Option("--cgroup", help="A control group, and those below it: a path, or a name below /sys/fs/cgroup.", show_default=False)
]
Command = Annotated[str, typer.Option("--command", help="Run this, and watch it and all that it starts, from its first step on.", show_default=False)]
Cpus = Annotated[str, typer.Option("--cpus", help="Only what happens on these CPUs: 0,2-3.", show_default=False)]
For = Annotated[str, typer.Option("--for", help="How long: 500ms, 5s, 2m. By default 5s, and with --command until it ends.", show_default=False)]
_UNITS_S = {"ms": 0.001, "s": 1.0, "": 1.0, "m": 60.0}
_BAR = 40


@probe.command("runqlat")
def runqlat(pids: Pids = "", cgroup: Cgroup = "", command: Command = "", cpus: Cpus = "", length: For = "", as_json: Json = False) -> int:
    """How long threads that could run wait for a CPU: histogram, p50, p99."""
    return _run("runqlat", pids, cgroup, command, cpus, length, as_json)


@probe.command("offcpu")
def offcpu(pids: Pids = "", cgroup: Cgroup = "", command: Command = "", cpus: Cpus = "", length: For = "", as_json: Json = False) -> int:
    """Why threads are not on a CPU (asleep, woken and waiting, preempted), and for how long."""
    return _run("offcpu", pids, cgroup, command, cpus, length, as_json)


@probe.command("wakeups")
def wakeups(pids: Pids = "", cgroup: Cgroup = "", command: Command = "", cpus: Cpus = "", length: For = "", as_json: Json = False) -> int:
    """Who wakes whom, and how long the woken then takes to run."""
    return _run("wakeups", pids, cgroup, command, cpus, length, as_json)


@probe.command("switches")
def switches(pids: Pids = "", cgroup: Cgroup = "", command: Command = "", cpus: Cpus = "", length: For = "", as_json: Json = False) -> int:
    """Context switches, voluntary and not, by CPU."""
    return _run("switches", pids, cgroup, command, cpus, length, as_json)


@probe.command("headers")
def headers(
    fetch: Annotated[bool, typer.Option("--fetch", help="Download the distribution's packages and unpack them into Wave's cache (80 MB).")] = False,
    remove: Annotated[bool, typer.Option("--remove", help="Delete them from the cache.")] = False,
    as_json: Json = False,
) -> None:
    """Which kernel headers bcc compiles the probes with. Fetching installs nothing and changes nothing but Wave's cache."""
    if fetch and remove:
        raise ConfigError("--fetch and --remove at once; give one of them")
    kernel_headers = import_module("waveos.host.probes.headers")
    if remove:
        removed = kernel_headers.remove()
        talk("headers: removed from the cache" if removed else "headers: there were none in the cache")
        return
    if fetch:
        talk("headers: fetching ...")
        kernel_headers.fetch()
    label, folder = kernel_headers.find()
    if as_json:
        print_json({"headers": label, "folder": folder})
    else:
        print(label)


def _run(name: str, pids: str, cgroup: str, command: str, cpus: str, length: str, as_json: bool) -> int:
    """Measure until the time is over, the command ends or Ctrl-C; what was measured is printed in all three cases."""
    target_of = import_module("waveos.host.probes.target")
    duration_s = parse_length(length) if length else None if command else 5.0
    with ExitStack() as open_now:
        held = None
        watched = target_of.parse_numbers(pids, "--pids")
        group = target_of.find_cgroup(cgroup) if cgroup else None
        if command:
            held = open_now.enter_context(import_module("waveos.host.probes.command").HeldCommand(_split(command)))
            watched = (*watched, held.pid)
        target = target_of.Target(watched, group, target_of.parse_numbers(cpus, "--cpus"))
        measured = open_now.enter_context(import_module("waveos.host.probes.probe").Probe(name, target))
        interrupted = False
        try:
            talk(f"{name}: measuring{f' for {duration_s:g} s' if duration_s else ''}; Ctrl-C ends it early ...")
            if held:
                held.go()
                held.wait(duration_s)
            elif duration_s is not None:
                time.sleep(duration_s)
        except KeyboardInterrupt:
            interrupted = True
        result = measured.stop()
        if held:
            result["target"]["command"] = {"words": held.words, "exit_code": held.wait(0)}
    if as_json:
        print_json(result)
    else:
        _PRINTERS[name](result)
    if result["lost"]:
        talk(f"{name}: {result['lost']} events found no room in the kernel's tables and are missing above")
    return INTERRUPTED if interrupted else 0


def parse_length(text: str, option: str = "--for") -> float:
    """Seconds of `500ms`, `5s`, `2m` or `5`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*(ms|s|m|)", text.strip(), re.ASCII)
    seconds = float(match[1]) * _UNITS_S[match[2]] if match else 0.0
    if not 0 < seconds <= 86_400:
        raise ConfigError(f"{option} {text}: wants a time above zero and up to a day, for example 500ms, 5s or 2m")
    return seconds


def _split(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"--command {command}: {error}") from None


def _print_times(result: dict[str, Any], what: str) -> None:
    """A histogram in doublings, and a line that sums it up."""
    most = max((row["count"] for row in result["histogram"]), default=0)
    print_table(
        ("µs", what, ""),
        [(f"{row['from_us']:,} .. {row['to_us']:,}", f"{row['count']:,}", "▇" * -(-_BAR * row["count"] // most)) for row in result["histogram"]],
        numbers=("µs", what),
    )
    times = ", ".join(
        f"{label} {show_number(result[key])}" for label, key in (("mean", "mean_us"), ("p50", "p50_us"), ("p99", "p99_us"), ("max", "max_us"))
    )
    print(f"{result['count']:,} {what} in {result['seconds']:.3g} s" + (f": {times} µs" if result["count"] else ""))


def _print_runqlat(result: dict[str, Any]) -> None:
    _print_times(result, "waits")


def _print_offcpu(result: dict[str, Any]) -> None:
    columns = ("thread", "not on a CPU because", "times", "ms in all", "mean µs", "longest µs")
    rows = [*result["rows"], *({"thread": "(all)", **reason} for reason in result["reasons"])]
    figures = ("count", "total_ms", "mean_us", "max_us")
    print_table(columns, [(row["thread"], row["reason"], *(show_number(row[figure]) for figure in figures)) for row in rows], numbers=columns[2:])
    print(f"{sum(row['count'] for row in result['reasons']):,} absences in {result['seconds']:.3g} s")


def _print_wakeups(result: dict[str, Any]) -> None:
    columns = ("waker", "woken", "wakings", "mean µs", "longest µs")
    figures = ("wakings", "mean_us", "max_us")
    print_table(
        columns, [(row["waker"], row["woken"], *(show_number(row[figure]) for figure in figures)) for row in result["rows"]], numbers=columns[2:]
    )
    print()
    _print_times(result, "times from waking to running")


def _print_switches(result: dict[str, Any]) -> None:
    kinds = ("voluntary", "involuntary")
    columns = ("CPU", *(f"{kind}/s" for kind in kinds))
    rows = [*result["rows"], {"cpu": "all", **{kind: result[kind] for kind in kinds}}]
    print_table(columns, [(str(row["cpu"]), *(show_number(row[kind] / result["seconds"]) for kind in kinds)) for row in rows], numbers=columns[1:])
    print(f"{result['count']:,} switches in {result['seconds']:.3g} s")


_PRINTERS = {"runqlat": _print_runqlat, "offcpu": _print_offcpu, "wakeups": _print_wakeups, "switches": _print_switches}
