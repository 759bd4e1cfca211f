"""The agent of a network data path: `python -m waveos.agents.net.agent xsk://PATH POLICY [--param KEY=VALUE] [--core C] [--nap-us N]`.

It needs no privilege. It ends with the host, on SIGTERM or SIGINT, or with one line when the policy fails; then traffic takes the kernel's own path.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from typing import Any

from waveos import net
from waveos.errors import ConfigError, LinkError, WaveError
from waveos.link import open_link
from waveos.net.laws import failure, make_runtime
from waveos.policy import load_policy
from waveos.primitives import clock_ns

SLICE_NS = 20_000_000
SLICES_A_WORD = 25
"""The host is told the counters after so many."""


def run_agent(url: str, policy: str, params: dict[str, float], **options: Any) -> dict[str, int]:
    """Serve until the host is gone; what the data path did. Raises LinkError when it cannot be opened, PolicyError when the policy fails."""
    chosen = load_policy(policy)
    if chosen.subsystem is not net:
        raise ConfigError(f"policy {policy!r} is not one of the network's")
    link: Any = open_link(url, side="agent", subsystem=net, **options)
    try:
        bound = chosen.bind(n_cpus=link.workers, params=params)
        runtime = make_runtime(bound, workers=link.workers)
        slices = 0
        while link.serve(runtime, clock_ns() + SLICE_NS):
            slices += 1
            if slices % SLICES_A_WORD == 0:
                link.tell(link.counters())
            try:
                link.check()
            except LinkError:
                break
        else:
            raise failure(runtime, bound)
        counters: dict[str, int] = link.counters()
        return counters
    finally:
        link.tell(link.counters())
        link.close()


def _parameter(text: str) -> tuple[str, float]:
    key, separator, value = text.partition("=")
    try:
        if not separator:
            raise ValueError
        return key, float(value)
    except ValueError:
        raise ConfigError(f"--param {text!r}: write KEY=NUMBER") from None


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="net-agent", description="Steer requests by a policy, on AF_XDP sockets that a host hands over.")
    parser.add_argument("url", help="the link, e.g. xsk:///run/wave/net/agent.sock")
    parser.add_argument("policy", help="a policy's name, or file.py[:Class]")
    parser.add_argument("--core", type=int, default=None, help="run on this core only")
    parser.add_argument("--nice", type=int, default=10, help="below the workers that it serves (default 10)")
    parser.add_argument("--nap-us", type=int, default=0, help="sleep that long between looks when nothing comes (default: never)")
    parser.add_argument("--param", action="append", default=[], metavar="KEY=VALUE", help="a parameter of the policy")
    options = parser.parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    try:
        os.setpriority(os.PRIO_PROCESS, 0, options.nice)
        if options.core is not None:
            os.sched_setaffinity(0, {options.core})
        run_agent(options.url, options.policy, dict(map(_parameter, options.param)), nap_us=options.nap_us)
    except (WaveError, ValueError, OSError) as error:
        print(f"net-agent: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, WaveError) else 1
    return 0


def _end(_number: int, _frame: object) -> None:
    raise SystemExit(0)


if __name__ == "__main__":
    sys.exit(main())
