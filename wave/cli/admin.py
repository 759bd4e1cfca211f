"""`wave admin`, and what one asks of it: `wave enclaves`, `wave status`, `wave set-policy`, `wave drain`."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from waveos.cli.agentd import parameter
from waveos.cli.terminal import Json, print_json, print_table, show_number, talk
from waveos.errors import ConfigError

commands = typer.Typer()
Name = Annotated[str | None, typer.Argument(help="The enclave; may be left out where there is one.", show_default=False)]


@commands.command("admin")
def admin(
    listen: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Serve over TCP as well, with mutual TLS.", show_default=False)] = None,
    cert: Annotated[Path | None, typer.Option(help="The server's certificate (PEM).", show_default=False)] = None,
    key: Annotated[Path | None, typer.Option(help="Its private key (PEM).", show_default=False)] = None,
    clients: Annotated[Path | None, typer.Option(help="The CA whose certificates clients show (PEM).", show_default=False)] = None,
    controller: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A name in a client's certificate whose owner may order, not only read.", show_default=False),
    ] = None,
) -> None:
    """Serve the administration of this machine's enclaves (gRPC) until stopped: a socket to read, a socket to order, and TCP with mutual TLS."""
    daemon = import_module("waveos.host.admin")
    files = {"--cert": cert, "--key": key, "--clients": clients}
    missing = [option for option, path in files.items() if path is None]
    if listen is None and (len(missing) < len(files) or controller):
        raise ConfigError("--cert, --key, --clients and --controller are for --listen HOST:PORT, which is not given")
    if listen is not None and missing:
        raise ConfigError(f"--listen is served with mutual TLS or not at all: give {', '.join(missing)}")
    tls = None
    if listen is not None:
        daemon.parse_listen(listen)
        tls = import_module("waveos.host.tls").Tls(cert, key, clients)
        tls.check()
    daemon.serve(daemon.Orders(listen=listen or "", tls=tls, controllers=frozenset(controller or [])))


@commands.command("enclaves")
def enclaves(as_json: Json = False) -> None:
    """The enclaves of this machine that have a live hostd."""
    with _admin() as asked:
        rows = asked.enclaves()
    if as_json:
        print_json([{key: row.get(key) for key in ("enclave", "mechanism", "cpus", "members", "policy", "agent", "pid", "error")} for row in rows])
        return
    print_table(
        ("enclave", "CPUs", "mechanism", "policy", "agent", "members"),
        [
            (
                row["enclave"],
                row["cpus"],
                row["mechanism"],
                row["policy"] or "",
                f"pid {row['agent']['pid']}" if row["agent"] else "none",
                row["members"],
            )
            if "error" not in row
            else (row["enclave"], "", "", "", "", row["error"])
            for row in rows
        ],
    )


@commands.command("status")
def status(name: Name = None, as_json: Json = False) -> None:
    """What an enclave's hostd and agent have done so far."""
    with _admin() as asked:
        told = asked.status(name or "")
    if as_json:
        print_json(told)
        return
    agent, report = told["agent"], told["report"] or {}
    rows = [
        ("enclave", told["enclave"]),
        *([("CPUs", told["cpus"])] if told["cpus"] else []),
        ("members", told["members"]),
        ("mechanism", told["mechanism"]),
        ("policy", " ".join([told["policy"] or "none", *(f"{key}={value:g}" for key, value in told["params"].items())])),
        ("agent", f"pid {agent['pid']}, for {show_number(round(agent['for_s'], 1))} s" if agent else "none: the enclave is the kernel's"),
        ("agents lost", show_number(told["agents_lost"])),
        *_figures("", told["counters"]),
        *_figures("agent ", {key: value for key, value in report.items() if key not in ("policy", "params", "pid", "start")}),
        *_figures("hostd ", told["hostd"]),
    ]
    print_table(("", ""), rows)


@commands.command("set-policy")
def set_policy(
    name: Annotated[str, typer.Argument(help="The enclave.")],
    policy: Annotated[str, typer.Argument(help="The policy that its agent shall run from now on.")],
    param: Annotated[list[str] | None, typer.Option(metavar="KEY=NUMBER", help="A parameter of it.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Let an enclave's agent run another policy. No thread is lost; if the policy cannot be had, the old one runs on."""
    with _admin(control=True) as asked:
        told = asked.set_policy(name, policy, dict(map(parameter, param or [])))
    if as_json:
        print_json(told)
        return
    print(f"{name}: {told['policy']}, no longer {told['was']}")


@commands.command("drain")
def drain(name: Annotated[str, typer.Argument(help="The enclave.")], as_json: Json = False) -> int:
    """Hand an enclave back to the kernel: its agent is shown out, everything is put back, its hostd ends. Its threads go on."""
    with _admin(control=True) as asked:
        restored = asked.drain(name)
    if as_json:
        print_json({"enclave": name, "restored": restored})
    elif restored:
        print(f"{name}: drained; everything is as it was")
    if not restored:
        talk(f"wave drain: {name}: its hostd has ended, but not everything could be put back: see `wave restore --dry-run {name}`")
    return 0 if restored else 1


def _admin(control: bool = False) -> Any:
    return import_module("waveos.admin").Admin(control=control)


def _figures(prefix: str, values: dict[str, Any]) -> list[tuple[str, str]]:
    """One row a figure; tables of figures by name inside, histograms as p50, p99 and largest."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        label = prefix + key.replace("_", " ")
        if isinstance(value, dict):
            rows += _figures(f"{label} ", {inner: number for inner, number in value.items() if number})
        elif isinstance(value, list):
            rows.append((label, _quantiles(value)))
        else:
            rows.append((label, show_number(value)))
    return rows


def _quantiles(histogram: list[Any]) -> str:
    """Of [(lower edge, count)]: the edges in which they lie."""
    if not histogram or not isinstance(histogram[0], list):
        return ", ".join(map(show_number, histogram))
    total, seen = sum(count for _, count in histogram), 0
    found: dict[float, int] = {}
    for edge, count in histogram:
        seen += count
        for share in (0.5, 0.99):
            if seen >= share * total:
                found.setdefault(share, edge)
    return f"p50 {show_number(found[0.5])}, p99 {show_number(found[0.99])}, most {show_number(histogram[-1][0])} ({show_number(total)} times)"
