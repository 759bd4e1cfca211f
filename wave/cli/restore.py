"""`wave restore`: put back what Wave changed on this machine and did not put back itself, say after a crash. It needs nothing that runs."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated

import typer

from waveos.cli.terminal import Json, print_json, talk

commands = typer.Typer()


@commands.command("restore")
def restore(
    names: Annotated[list[str] | None, typer.Argument(help="Enclaves; by default all whose owner is gone.", show_default=False)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be put back, and change nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Also enclaves named here whose owner still runs: it is stopped first.")] = False,
    as_json: Json = False,
) -> int:
    """Put back what Wave changed: scheduling of threads, limits, pinned objects, shared memory. As often as you like; nothing else need run."""
    journals = import_module("waveos.host.restore")
    done, failed = journals.restore(names, dry_run=dry_run, force=force)
    if as_json:
        print_json({"dry_run": dry_run, "restored": done, "failed": failed})
        return 1 if failed else 0
    for line in done:
        print(line)
    for line in failed:
        talk(f"wave restore: {line}")
    if not done and not failed:
        talk("nothing to restore")
    return 1 if failed else 0
