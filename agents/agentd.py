"""agentd: the process that runs a policy for the host at the other end of a link.

    python -m waveos.agents.agentd shm://NAME POLICY [--cpus N] [--threads N] [--ahead N] [--core C] [--param KEY=VALUE] [--replay]

It needs no privilege. It ends with the host, on SIGTERM or SIGINT, or with one line when the policy fails.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from typing import Any

import numpy as np

from waveos.agents.loop import POLICY_FAILED, serve
from waveos.errors import ConfigError, LinkError, WaveError
from waveos.link import MESSAGES, TXNS, open_link
from waveos.primitives import clock_ns
from waveos.policy import load_policy
from waveos.sched.laws import failure, make_runtime
from waveos.sched.records import MAX_THREADS, MESSAGE

SLICE_NS = 20_000_000


def run_agent(
    url: str, policy: str, *, cpus: int, threads: int, ahead: int, params: dict[str, float], replay: bool = False, patience_s: float = 5.0
) -> None:
    """Serve the link until the host is gone. Raises LinkError when it cannot be opened, PolicyError when the policy fails."""
    bound = load_policy(policy).bind(n_cpus=cpus, params=params)
    runtime = make_runtime(bound, cpus=cpus, threads=threads, ahead=ahead)
    out_words = runtime["out"][0].view(np.int64)
    inbox = np.zeros(1, MESSAGE)
    link: Any = open_link(url, side="agent", patience_s=patience_s)
    try:
        up, down = link.queue(MESSAGES), link.queue(TXNS)
        while True:
            status = serve(up.memory, up.own, down.memory, down.own, runtime, out_words, inbox, inbox.view(np.int64), replay, clock_ns() + SLICE_NS)
            if status == POLICY_FAILED:
                raise failure(runtime, bound)
            try:
                link.check()
            except LinkError:
                return  # the host has closed the link, or died: nothing is left to decide
    finally:
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
    parser = argparse.ArgumentParser(prog="agentd", description="Run a policy for the host at the other end of a link.")
    parser.add_argument("url", help="the link, e.g. shm://demo")
    parser.add_argument("policy", help="a policy's name, or file.py[:Class]")
    parser.add_argument("--cpus", type=int, default=8, help="CPUs of the enclave (default 8)")
    parser.add_argument("--threads", type=int, default=MAX_THREADS, help=f"threads at most (default {MAX_THREADS})")
    parser.add_argument("--ahead", type=int, default=0, help="decisions to prestage on a busy CPU (default 0)")
    parser.add_argument("--core", type=int, default=None, help="run on this core only")
    parser.add_argument("--param", action="append", default=[], metavar="KEY=VALUE", help="a parameter of the policy")
    parser.add_argument("--replay", action="store_true", help="the stream is a recording that holds its own batch ends")
    options = parser.parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    try:
        if options.core is not None:
            os.sched_setaffinity(0, {options.core})
        params = dict(_parameter(text) for text in options.param)
        run_agent(options.url, options.policy, cpus=options.cpus, threads=options.threads, ahead=options.ahead, params=params, replay=options.replay)
    except (WaveError, ValueError, OSError) as error:
        print(f"agentd: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, WaveError) else 1
    return 0


def _end(_number: int, _frame: object) -> None:
    raise SystemExit(0)


if __name__ == "__main__":
    sys.exit(main())
