"""`wave metrics`: the daemons' statistics for Prometheus."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from waveos.cli.terminal import Json, print_json, talk
from waveos.errors import MissingError

commands = typer.Typer()
PORT = 19283
"""None of Prometheus's list of default ports (9100 to 9999 are all given)."""


@commands.command("metrics")
def metrics(
    listen: Annotated[str, typer.Option(help="Where Prometheus asks: HOST:PORT, or unix:PATH.")] = f"127.0.0.1:{PORT}",
    agent: Annotated[
        list[Path] | None, typer.Option(metavar="SOCKET", help="An agentd's socket (wave agentd --status). May be given again.", show_default=False)
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Print them once on stdout, for node_exporter's textfile collector or a person.")] = False,
    about: Annotated[bool, typer.Option("--list", help="Print what there is: name, type, unit, meaning, labels.")] = False,
    as_json: Json = False,
) -> None:
    """What hostd and agentd have counted, for Prometheus, until stopped. It asks each daemon when it is scraped, at most once a second."""
    if about:
        print_list(as_json)
        return
    try:
        told: Any = import_module("waveos.watch.metrics")
    except ImportError as error:
        raise MissingError(f"wave metrics needs prometheus-client ({error.name} is missing): pip install 'waveos[host]' or 'waveos[agent]'") from None
    registry = told.registry_of(told.Daemons([str(path) for path in agent or []]))
    if once:
        print(told.text(registry), end="")
        return
    exporter = import_module("waveos.watch.exporter").Exporter(listen, registry)
    if exporter.open_to_all:
        talk(f"wave metrics: {listen}: whoever reaches this address can read them; there is no password and no encryption")
    talk(f"wave metrics: {exporter.url}")
    import_module("waveos.cli.endings").until_stopped(exporter.serve, exporter.close)


def print_list(as_json: bool) -> None:
    """The statistics describe themselves."""
    from waveos.cli.terminal import print_table

    statistics = import_module("waveos.watch.statistics")
    rows = [
        (each.exposed, each.kind.name.lower(), each.unit, each.meaning, ", ".join(statistics.labels_of(each))) for each in statistics.everything()
    ]
    columns = ("name", "type", "unit", "meaning", "labels")
    if as_json:
        print_json([dict(zip(columns, row, strict=True)) for row in rows])
    else:
        print_table(columns, rows)
