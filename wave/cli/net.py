"""`wave net`: a client, an IPU and a host as network namespaces of this machine."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated

import typer

from waveos.cli.terminal import Json, print_json, print_table, talk

commands = typer.Typer()
net = typer.Typer(no_args_is_help=True, help="A client, an IPU and a host as network namespaces of this machine.")
commands.add_typer(net, name="net")
Name = Annotated[str, typer.Argument(help="Of the network; its namespaces are NAME-client, NAME-ipu and NAME-host.")]


@net.command("up")
def up(name: Name = "wave", queues: Annotated[int, typer.Option(min=1, max=64, help="Queues of each interface.")] = 1, as_json: Json = False) -> None:
    """Make the namespaces and join them, the IPU as a bump in the wire. They stay until `wave net down`; `wave restore` takes them down, too."""
    made = import_module("waveos.host.net.topology").up(name, queues=queues)
    if as_json:
        print_json({"name": name, "ipu": made.ipu, **{s: _side(getattr(made, s)) for s in ("client", "host")}})
        return
    print_table(
        ("namespace", "interface", "address"),
        [
            (made.client.namespace, made.client.interface, made.client.address),
            (made.ipu, "client, host", "a bridge between them"),
            (made.host.namespace, made.host.interface, made.host.address),
        ],
    )
    talk(f"run in it: ip netns exec {made.client.namespace} COMMAND; take it down: wave net down {name}")


@net.command("down")
def down(name: Name = "wave") -> None:
    """Remove the namespaces, in whatever state they are, also after a crash of what made them."""
    for line in import_module("waveos.host.net.topology").down(name):
        print(line)


@net.command("list")
def list_networks(as_json: Json = False) -> None:
    """The networks that are up, whole or in part."""
    names = import_module("waveos.host.net.topology").names()
    if as_json:
        print_json(names)
    elif names:
        print("\n".join(names))
    else:
        talk("no network is up; wave net up makes one")


def _side(side: object) -> dict[str, str]:
    return {"namespace": side.namespace, "interface": side.interface, "address": side.address, "mac": side.mac.hex(":")}  # type: ignore[attr-defined]
