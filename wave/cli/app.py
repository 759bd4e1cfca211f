"""The commands of `wave`, put together from the modules beside this one.

Each module has `commands`, a Typer application whose commands appear at the top level or, where it has a name, as a group.
Modules import nothing heavy at their top: `wave --help` loads them all.
"""

from __future__ import annotations

from importlib import import_module

import typer

from waveos import __version__
from waveos.cli import EXIT_CODES

MODULES = (
    "experiment",
    "sweep",
    "plan",
    "policies",
    "bench",
    "calibrate",
    "doctor",
    "hostd",
    "admin",
    "metrics",
    "top",
    "agentd",
    "restore",
    "limits",
    "serve",
    "demo",
    "probe",
    "recording",
    "net",
    "keys",
    "relay",
)
_EPILOGUE = (
    "Exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items()) + ". "
    "stdout is data, stderr is talk. WAVE_DEBUG=1 shows tracebacks, WAVE_JIT=0 runs policies as plain Python."
)

app = typer.Typer(
    name="wave",
    help="Write an operating-system policy once; learn what it costs and saves on an infrastructure processor; run it.",
    epilog=_EPILOGUE,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"wave {__version__}")
        raise typer.Exit


@app.callback()
def _root(version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Print the version.")) -> None:
    """Write an operating-system policy once; learn what it costs and saves on an infrastructure processor; run it."""


for _module in MODULES:
    app.add_typer(import_module(f"waveos.cli.{_module}").commands)
