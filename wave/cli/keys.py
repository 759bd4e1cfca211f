"""`wave keys`: who may speak with this machine over a network link."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from waveos.cli.terminal import Json, print_json, print_table, talk

commands = typer.Typer()
keys = typer.Typer(no_args_is_help=True, help="Who may speak with this machine over a network link (zmq+tcp://).")
commands.add_typer(keys, name="keys")
Folder = Annotated[
    Path | None, typer.Option("--keys", help="The folder of keys.  [default: $WAVE_KEYS, or as the page on deployment says]", show_default=False)
]
Days = Annotated[float | None, typer.Option(help="Let it expire after so many days.", show_default=False)]


@keys.command("new")
def new(
    days: Days = None,
    replace: Annotated[bool, typer.Option("--replace", help="Also if there is one, which is then of no use any more.")] = False,
    folder: Folder = None,
) -> None:
    """Make this machine's own key; what it prints is to be added at its peers."""
    store = _store(folder)
    print(store.new(days, replace=replace).public)
    talk(f"kept in {store.folder}; on each peer: wave keys add NAME {store.own().public[:8]}...")


@keys.command("add")
def add(
    name: Annotated[str, typer.Argument(help="What this machine calls the peer.")],
    key: Annotated[str, typer.Argument(help="Its public key, as `wave keys list` shows it there.")],
    days: Days = None,
    folder: Folder = None,
) -> None:
    """Let a machine be a peer: a host here if this is an agent, the agent if this is a host."""
    _store(folder).add(name, key, days)
    talk(f"{name} may speak with this machine")


@keys.command("list")
def list_keys(folder: Folder = None, as_json: Json = False) -> None:
    """This machine's own public key, and all peers."""
    store = _store(folder)
    rows = [
        _row(key, own=own)
        for key, own in [*([(store.read_own(), True)] if (store.folder / "own.toml").exists() else []), *((k, False) for k in store.peers())]
    ]
    if as_json:
        print_json(rows)
        return
    if not rows:
        talk(f"no keys in {store.folder}; make this machine's own with: wave keys new")
        return
    for key in store.peers():
        if key.trouble:
            talk(key.trouble)
    print_table(
        ("name", "state", "expires", "public key"),
        [("(this machine)" if r["own"] else r["name"], r["state"], r["expires"] or "never", r["public"]) for r in rows],
    )


@keys.command("revoke")
def revoke(name: Annotated[str, typer.Argument(help="Of the peer.")], folder: Folder = None) -> None:
    """Let a peer speak no more. Daemons that run drop what it sends within a second."""
    _store(folder).revoke(name)
    talk(f"{name} is revoked; daemons that run drop what it sends within a second")


def _store(folder: Path | None) -> Any:
    from waveos.keys import Keys

    return Keys(folder)


def _row(key: Any, *, own: bool) -> dict[str, Any]:
    told = {name: at and datetime.datetime.fromtimestamp(at, datetime.UTC).isoformat(timespec="seconds") for name, at in _times(key)}
    return {"name": key.name, "own": own, "state": key.state, "public": key.public, **told}


def _times(key: Any) -> list[tuple[str, float | None]]:
    return [(name, getattr(key, name)) for name in ("created", "expires", "revoked")]
