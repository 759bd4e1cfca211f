"""`wave top`: what the enclaves of this machine are doing, now."""

from __future__ import annotations

import sys
import time
from importlib import import_module
from typing import Annotated, Any

import typer

from waveos.cli.terminal import Json, print_json, print_table
from waveos.errors import ConfigError, LinkError, MissingError

commands = typer.Typer()


@commands.command("top")
def top(
    name: Annotated[str | None, typer.Argument(help="One enclave; by default all.", show_default=False)] = None,
    interval: Annotated[float, typer.Option(min=0.25, max=60.0, help="Seconds between two looks; each costs hostd one to two milliseconds.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Two looks, and what happened between them, as a table.")] = False,
    as_json: Json = False,
) -> None:
    """Enclaves, CPUs, queues, latencies, staleness and faults, on the whole terminal (q ends it), or once as a table or JSON."""
    source, view = import_module("waveos.watch.source"), import_module("waveos.watch.view")

    def look() -> Any:
        return view.Look(time.time(), source.statuses([name] if name else None, detail=True))

    before = look()
    _refuse_nothing(before, name)
    if once or as_json:
        time.sleep(interval)
        now = look()
        _refuse_nothing(now, name)
        rows = view.compare(now, before)
        if as_json:
            print_json({"interval_s": now.time_s - before.time_s, "enclaves": rows})
        else:
            _print(rows)
        return
    if not sys.stdout.isatty() or not sys.stdin.isatty():
        raise ConfigError("wave top wants a terminal; write wave top --once for a table, --json for JSON")
    try:
        screen = import_module("waveos.watch.top")
    except ImportError as error:
        raise MissingError(f"wave top needs textual ({error.name} is missing; --once does not): pip install 'waveos[host]'") from None
    why = screen.Top(look, interval, name).run()
    if why:
        raise LinkError(why)


def _refuse_nothing(look: Any, name: str | None) -> None:
    """Raises ConfigError when there is nobody to look at."""
    if not any("error" not in each for each in look.statuses):
        if name or look.statuses:
            raise ConfigError(look.statuses[0]["error"])
        raise ConfigError("no hostd runs on this machine: `wave hostd` starts one")


def _print(rows: list[dict[str, Any]]) -> None:
    cells = import_module("waveos.watch.cells")
    print_table(cells.ENCLAVES, [cells.enclave_cells(row) for row in rows], numbers=cells.ENCLAVES[4:])
    for row in rows:
        if "error" in row:
            continue
        for title, columns, make in cells.BLOCKS:
            if found := make(row):
                print()
                print_table(columns, found, title=f"{row['enclave']}: {title}", numbers=columns[1:])
