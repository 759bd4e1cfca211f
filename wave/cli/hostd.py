"""`wave hostd` and what one asks of it: `wave enclaves`, `wave status`, `wave set-policy`."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from waveos.cli.agentd import parameter
from waveos.cli.terminal import Json, print_json, print_table, show_number
from waveos.errors import ConfigError, LinkError

commands = typer.Typer()
Name = Annotated[str | None, typer.Argument(help="The enclave; may be left out where there is one.", show_default=False)]


@commands.command("hostd")
def hostd(
    config: Annotated[Path | None, typer.Option(help="A TOML file that says all of this; flags win over it.", show_default=False)] = None,
    enclave: Annotated[str | None, typer.Option(help="The enclave's name.", show_default=False)] = None,
    subsystem: Annotated[str | None, typer.Option(help="sched, memory or net.  [default: sched]", show_default=False)] = None,
    cpus: Annotated[str | None, typer.Option(help="Its CPUs, as in 0-3,5 (sched).", show_default=False)] = None,
    pids: Annotated[str | None, typer.Option(help="Its members: these processes, as in 12,13, with all their threads.", show_default=False)] = None,
    cgroup: Annotated[str | None, typer.Option(help="Its members: all that is and comes into this cgroup.", show_default=False)] = None,
    command: Annotated[
        list[str] | None, typer.Argument(metavar="[-- COMMAND ...]", help="Its members: this command, started now.", show_default=False)
    ] = None,
    mechanism: Annotated[str | None, typer.Option(help="auto, priority or sched_ext.  [default: auto]", show_default=False)] = None,
    policy: Annotated[str | None, typer.Option(help="The policy that its agent runs.", show_default=False)] = None,
    param: Annotated[list[str] | None, typer.Option(metavar="KEY=NUMBER", help="A parameter of the policy.", show_default=False)] = None,
    ahead: Annotated[int | None, typer.Option(help="Decisions to prestage on a busy CPU.  [default: 1]", show_default=False)] = None,
    agent_core: Annotated[int | None, typer.Option(help="The core the agent polls on.", show_default=False)] = None,
    agent_user: Annotated[str | None, typer.Option(help="The user it runs as.", show_default=False)] = None,
    no_agent: Annotated[bool, typer.Option("--no-agent", help="Start none, and wait for one (wave agentd).")] = False,
    measure: Annotated[bool, typer.Option("--measure", help="Let the agent time each message and decision.")] = False,
    record: Annotated[Path | None, typer.Option(help="Let the agent write down all messages and decisions.", show_default=False)] = None,
    hostd_cpu: Annotated[int | None, typer.Option(help="The CPU hostd is bound to; by default the enclave's first.", show_default=False)] = None,
    group: Annotated[str | None, typer.Option(help="Members of this group may be its agent and ask for its status.", show_default=False)] = None,
    setting: Annotated[list[str] | None, typer.Option(metavar="KEY=NUMBER", help="A setting of the mechanism.", show_default=False)] = None,
    log: Annotated[str, typer.Option(help="How to speak on stderr: human, json, or auto: json under systemd.")] = "auto",
) -> int:
    """Own an enclave on this machine: threads and CPUs that an agent schedules, or a cgroup whose memory it manages. Runs as root until stopped; then all
    is as it was."""
    import_module("waveos.log").choose(log)
    flags: dict[str, Any] = {
        "enclave": enclave,
        "subsystem": subsystem,
        "cpus": cpus,
        "pids": None if pids is None else _numbers(pids),
        "cgroup": cgroup,
        "command": command,
        "mechanism": mechanism,
        "policy": policy,
        "ahead": ahead,
        "agent.core": agent_core,
        "agent.user": agent_user,
        "agent.start": False if no_agent else None,
        "agent.measure": measure or None,
        "agent.record": record,
        "hostd.cpu": hostd_cpu,
        "hostd.group": group,
        **{f"params.{key}": value for key, value in map(parameter, param or [])},
        **{f"settings.{key}": int(value) if value.is_integer() else value for key, value in map(parameter, setting or [])},
    }
    settings = import_module("waveos.host.settings").read(config, flags)
    status: int = import_module("waveos.host.hostd").serve(settings)
    return status


@commands.command("enclaves")
def enclaves(as_json: Json = False) -> None:
    """The enclaves of this machine that have a live hostd."""
    doors = import_module("waveos.host.doors")
    rows = []
    for name in doors.running():
        try:
            rows.append(doors.ask(name, {"do": "status"}))
        except (ConfigError, LinkError) as error:
            rows.append({"enclave": name, "error": str(error)})
    if as_json:
        print_json([{key: row.get(key) for key in ("enclave", "mechanism", "cpus", "members", "policy", "agent", "pid", "error")} for row in rows])
        return
    print_table(
        ("enclave", "CPUs", "mechanism", "policy", "agent", "members"),
        [
            (
                row["enclave"],
                row["cpus"],
                row["mechanism"],
                row["policy"] or "",
                f"pid {row['agent']['pid']}" if row["agent"] else "none",
                row["members"],
            )
            if "error" not in row
            else (row["enclave"], "", "", "", "", row["error"])
            for row in rows
        ],
    )


@commands.command("status")
def status(name: Name = None, as_json: Json = False) -> None:
    """What an enclave's hostd and agent have done so far."""
    told = _ask(name, {"do": "status"})
    if as_json:
        print_json(told)
        return
    agent, report = told["agent"], told["report"] or {}
    rows = [
        ("enclave", told["enclave"]),
        *([("CPUs", told["cpus"])] if told["cpus"] else []),
        ("members", told["members"]),
        ("mechanism", told["mechanism"]),
        ("policy", " ".join([told["policy"] or "none", *(f"{key}={value:g}" for key, value in told["params"].items())])),
        ("agent", f"pid {agent['pid']}, for {show_number(round(agent['for_s'], 1))} s" if agent else "none: the enclave is the kernel's"),
        ("agents lost", show_number(told["agents_lost"])),
        *_figures("", told["counters"]),
        *_figures("agent ", {key: value for key, value in report.items() if key not in ("policy", "params", "pid", "start")}),
        *_figures("hostd ", told["hostd"]),
    ]
    print_table(("", ""), rows)


@commands.command("set-policy")
def set_policy(
    name: Annotated[str, typer.Argument(help="The enclave.")],
    policy: Annotated[str, typer.Argument(help="The policy that its agent shall run from now on.")],
    param: Annotated[list[str] | None, typer.Option(metavar="KEY=NUMBER", help="A parameter of it.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Let an enclave's agent run another policy. No thread is lost; if the policy cannot be had, the old one runs on."""
    told = _ask(name, {"do": "set-policy", "policy": policy, "params": dict(map(parameter, param or []))}, timeout_s=120)
    if as_json:
        print_json(told)
        return
    print(f"{name}: {told['policy']}, no longer {told['was']}")


def _ask(name: str | None, request: dict[str, Any], timeout_s: float = 5.0) -> dict[str, Any]:
    doors = import_module("waveos.host.doors")
    if name is None:
        known = doors.running()
        if len(known) != 1:
            raise ConfigError(f"name the enclave: {', '.join(known)}" if known else "no hostd runs on this machine: `wave hostd` starts one")
        name = known[0]
    told: dict[str, Any] = doors.ask(name, request, timeout_s)
    if not told.pop("ok"):
        raise ConfigError(told["error"])
    return told


def _figures(prefix: str, values: dict[str, Any]) -> list[tuple[str, str]]:
    """One row a figure; tables of figures by name inside, histograms as p50, p99 and largest."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        label = prefix + key.replace("_", " ")
        if isinstance(value, dict):
            rows += _figures(f"{label} ", {inner: number for inner, number in value.items() if number})
        elif isinstance(value, list):
            rows.append((label, _quantiles(value)))
        else:
            rows.append((label, show_number(value)))
    return rows


def _quantiles(histogram: list[Any]) -> str:
    """Of [(lower edge, count)]: the edges in which they lie."""
    if not histogram or not isinstance(histogram[0], list):
        return ", ".join(map(show_number, histogram))
    total, seen = sum(count for _, count in histogram), 0
    found: dict[float, int] = {}
    for edge, count in histogram:
        seen += count
        for share in (0.5, 0.99):
            if seen >= share * total:
                found.setdefault(share, edge)
    return f"p50 {show_number(found[0.5])}, p99 {show_number(found[0.99])}, most {show_number(histogram[-1][0])} ({show_number(total)} times)"


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise ConfigError(f"--pids {text!r}: write numbers of processes with commas between, as in 12,13") from None


for _module in ("metrics", "top"):  # what is to be seen of the daemons
    commands.add_typer(import_module(f"waveos.cli.{_module}").commands)
