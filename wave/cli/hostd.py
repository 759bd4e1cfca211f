"""`wave hostd`: the daemon that owns an enclave."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from waveos.cli.agentd import parameter
from waveos.errors import ConfigError

commands = typer.Typer()


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
        **{f"settings.{key}": int(value) if value.is_integer() else value for key, value in (parameter(each, "--setting") for each in setting or [])},
    }
    settings = import_module("waveos.host.settings").read(config, flags)
    status: int = import_module("waveos.host.hostd").serve(settings)
    return status


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise ConfigError(f"--pids {text!r}: write numbers of processes with commas between, as in 12,13") from None
