"""`wave agentd`: the process that decides, for hosts on this machine."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from waveos.errors import ConfigError

commands = typer.Typer()


@commands.command("agentd")
def agentd(
    links: Annotated[
        list[str],
        typer.Argument(
            metavar="URL [POLICY] ...",
            help="Links, each with its policy: an installed one's name, or file.py[:Class]. Without: the one that hostd names.",
        ),
    ],
    cpus: Annotated[int, typer.Option(help="CPUs of an enclave whose host does not say.")] = 8,
    threads: Annotated[int | None, typer.Option(help="Threads of it, at most.  [default: the contract's most]", show_default=False)] = None,
    ahead: Annotated[int, typer.Option(help="Decisions to prestage on a busy CPU of it.")] = 0,
    param: Annotated[list[str] | None, typer.Option(metavar="KEY=NUMBER", help="A parameter of the policies named here.", show_default=False)] = None,
    core: Annotated[int | None, typer.Option(help="Run on this core only.", show_default=False)] = None,
    nice: Annotated[int, typer.Option(help="Added to the nice value: others come first.")] = 0,
    idle_us: Annotated[float, typer.Option(help="After so long without a message sleep between looks; 0: always poll.")] = 0.0,
    patience: Annotated[
        float | None,
        typer.Option(help="Seconds to wait for a host; by default 5 for a ring by name, for ever for hostd.", show_default=False),
    ] = None,
    record: Annotated[Path | None, typer.Option(help="Write down all messages and decisions to this file.", show_default=False)] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Time each message and decision (some 50 ns each).")] = False,
    status: Annotated[
        Path | None, typer.Option(metavar="SOCKET", help="Tell of itself whoever connects here (wave metrics --agent SOCKET).", show_default=False)
    ] = None,
    log: Annotated[str, typer.Option(help="How to speak on stderr: human, json, or auto: json under systemd.")] = "auto",
    parent: Annotated[int | None, typer.Option(hidden=True, help="End when this process does, which started it.")] = None,
    replay: Annotated[bool, typer.Option("--replay", help="The stream is a recording that holds its own batch ends.")] = False,
) -> None:
    """Decide for the hosts at the other end of these links. It needs no privilege, and runs until it is stopped or its hosts are gone for good."""
    import_module("waveos.log").choose(log)
    urls: list[tuple[str, str | None]] = []
    for word in links:
        if "://" in word:
            urls.append((word, None))
        elif urls and urls[-1][1] is None:
            urls[-1] = urls[-1][0], word
        else:
            raise ConfigError(f"{word!r} stands where a link was expected: write URL POLICY, for example shm://demo fifo")
    for url, policy in urls:
        if policy is None and not url.startswith("shm:///"):
            raise ConfigError(f"{url}: name its policy, for example: wave agentd {url} fifo")
    daemon = import_module("waveos.agents.agentd")
    daemon.begin_life(core, nice, parent)
    orders = daemon.Orders(
        cpus=cpus,
        threads=threads or import_module("waveos.record").MAX_THREADS,
        ahead=ahead,
        params=dict(parameter(text) for text in param or []),
        replay=replay,
        idle_us=idle_us,
        patience_s=patience,
        measure=measure,
        record=record,
        status=status,
    )
    daemon.run_agent(urls, orders)


def parameter(text: str, option: str = "--param") -> tuple[str, float]:
    """KEY=NUMBER as a pair. Raises ConfigError."""
    key, separator, value = text.partition("=")
    try:
        if not separator or not key:
            raise ValueError
        return key, float(value)
    except ValueError:
        raise ConfigError(f"{option} {text!r}: write KEY=NUMBER") from None
