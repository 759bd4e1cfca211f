"""`wave relay`: an enclave of this machine, and an agent on another."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated

import typer

from waveos.errors import ConfigError
from waveos.names import nearest

commands = typer.Typer()
SUBSYSTEMS = ("sched", "memory", "net", "serving")


@commands.command("relay")
def relay(
    enclave: Annotated[str, typer.Argument(help="The enclave's name, or the URL of its agent's socket (shm:///...).")],
    url: Annotated[
        str,
        typer.Argument(metavar="URL", help="The agent: zmq+tcp://[KEY@]HOST:PORT, where `wave agentd` listens, or bar://DEVICE, on which it runs."),
    ],
    subsystem: Annotated[str, typer.Option(help="What the enclave is for.")] = "sched",
    log: Annotated[str, typer.Option(help="How to speak on stderr: human, json, or auto: json under systemd.")] = "auto",
) -> None:
    """Let an agent on another machine, or on a PCI device of this one, decide for an enclave here. It runs until it is stopped, and survives both ends."""
    import_module("waveos.log").choose(log)
    if subsystem not in SUBSYSTEMS:
        raise ConfigError(f"no subsystem {subsystem!r}{nearest(subsystem, SUBSYSTEMS)}; there are: {', '.join(SUBSYSTEMS)}")
    if "://" in enclave and not enclave.startswith("shm:///"):
        raise ConfigError(f"{enclave!r} is no enclave: write its name, as web, or the URL of its agent's socket, as shm:///run/wave/web/agent.sock")
    near = enclave if "://" in enclave else f"shm://{import_module('waveos.host.restore').path_of(enclave).with_name('agent.sock')}"
    import_module("waveos.host.relay").run_relay(near, url, import_module(f"waveos.{subsystem}"))
