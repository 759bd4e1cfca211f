"""`wave calibrate`: measure this machine into the link and host profiles called `this-machine`.

The measuring is `waveos.bench.calibrate`: `run(out=None) -> dict` with the keys of a benchmark's result and `path`, the profile it wrote.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from waveos.cli.terminal import Json, print_json, print_table, show_number, talk

commands = typer.Typer()


@commands.command("calibrate")
def calibrate(
    out: Annotated[
        Path | None, typer.Option(help="Where to write the profile; by default where profiles of this user are looked for.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure this machine into a link profile, `this-machine`, that scenarios can name."""
    talk("calibrate: measuring this machine ...")
    result = import_module("waveos.bench.calibrate").run(out=out)
    if as_json:
        print_json(result)
        return
    print_table(("cost", "here"), [(key, show_number(value)) for key, value in result["metrics"].items()], numbers=("here",))
    print(f"written: {result['path']}")
