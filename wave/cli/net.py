"""`wave net`: a client, an IPU and a host as network namespaces of this machine."""

from __future__ import annotations

import signal
from importlib import import_module
from typing import Annotated, Any

import typer

from waveos.cli.terminal import Json, print_json, print_table, show_number, talk

commands = typer.Typer()
net = typer.Typer(no_args_is_help=True, help="A client, an IPU and a host as network namespaces of this machine.")
commands.add_typer(net, name="net")
Port = Annotated[int, typer.Option(min=1, max=65_000, help="The service's UDP port.")]
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


@net.command("serve")
def serve(
    name: Name = "wave",
    workers: Annotated[int, typer.Option(min=1, max=64, help="Processes; worker w has port + 1 + w beside the port that all share.")] = 4,
    port: Port = 5_000,
    get_us: Annotated[float, typer.Option(min=0, help="How long a GET waits, microseconds.")] = 500.0,
    range_us: Annotated[float, typer.Option(min=0, help="How long a RANGE waits, microseconds.")] = 50_000.0,
) -> None:
    """Serve a network with workers whose work is a wait, until Ctrl-C: something to steer to. Prints their processes, as `wave hostd --pids` wants them."""
    import numpy as np

    network = import_module("waveos.host.net.topology").find(name)
    times = [np.full(1, round(1e3 * each), np.int64) for each in (get_us, range_us)]
    with import_module("waveos.host.net.service").UdpService(network, port=port, workers=workers, times_ns=times) as service:
        print(",".join(map(str, service.pids)), flush=True)
        talk(f"workers of {network.host.address}:{port}; steer to them: wave hostd --enclave {name} --subsystem net --policy jbsq --pids (the above)")
        signal.pause()


@net.command("load")
def load(
    name: Name = "wave",
    port: Port = 5_000,
    rate: Annotated[float, typer.Option(min=1, max=1e6, help="Requests a second, Poisson.")] = 1_000.0,
    seconds: Annotated[float, typer.Option(min=0.1, max=600, help="For how long.")] = 3.0,
    range_share: Annotated[float, typer.Option(min=0, max=1, help="Of RANGE among the requests.")] = 0.005,
    flows: Annotated[int, typer.Option(min=1, max=50_000, help="Source ports that they come from.")] = 512,
    slo_us: Annotated[float, typer.Option(min=0, help="SLO of a GET, microseconds; of a RANGE a hundred times that.")] = 5_000.0,
    seed: Annotated[int, typer.Option(min=0, help="Of arrivals, classes and flows.")] = 1,
    as_json: Json = False,
) -> None:
    """Send requests from the client's end at times drawn before, and say how long answers took, counted from those times."""
    import numpy as np

    client = import_module("waveos.host.net.client")
    plan = client.draw_plan(rate, seconds, range_share, flows=flows, slo_us=(round(slo_us), round(100 * slo_us)), seed=seed)
    with client.Client(import_module("waveos.host.net.topology").find(name), port) as at_client:
        answered = at_client.run(plan)
    rows: list[dict[str, Any]] = []
    for number, each in enumerate(("GET", "RANGE")):
        own, latency_us = plan[plan["request_class"] == number], answered.latency_us(number)
        quantiles = [float(np.percentile(latency_us, q)) if len(latency_us) else None for q in (50, 99)]
        refused, lost = int(np.sum(own["status"] == 1)), int(np.sum(own["done_ns"] == 0))
        rows.append({"class": each, "sent": len(own), "p50_us": quantiles[0], "p99_us": quantiles[1], "refused": refused, "unanswered": lost})
    if as_json:
        print_json(rows)
        return
    cells = [[str(row["class"]), *("" if value is None else show_number(value) for key, value in row.items() if key != "class")] for row in rows]
    print_table(("class", "sent", "p50, us", "p99, us", "refused", "unanswered"), cells)


def _side(side: object) -> dict[str, str]:
    return {"namespace": side.namespace, "interface": side.interface, "address": side.address, "mac": side.mac.hex(":")}  # type: ignore[attr-defined]
