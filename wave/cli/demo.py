"""`wave demo`: the whole way from a real RocksDB to the table, the report and the trace.

It is `waveos.bench.demo`: `main(arguments: list[str]) -> int | None`, which parses its own flags; what it returns is the exit code.
"""

from __future__ import annotations

from importlib import import_module

import typer

commands = typer.Typer()


@commands.command("demo", context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def demo(context: typer.Context) -> int:
    """Measure a real RocksDB here, then see what moving its scheduling to an IPU costs and saves."""
    result = import_module("waveos.bench.demo").main(context.args)
    return int(result or 0)
