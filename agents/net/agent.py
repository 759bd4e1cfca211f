"""The agent of the network: `python -m waveos.agents.net.agent URL [POLICY] [--param KEY=VALUE] [--core C] [--nap-us N]`.

URL is `xsk://PATH`, a data path that it serves, or `shm://NAME`, a host that steers by itself as the policy decides. It needs no privilege. It ends with the
host, on SIGTERM or SIGINT, or with one line when the policy fails; then traffic takes the kernel's own path.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

import numpy as np

from waveos import net
from waveos.agents.agentd import begin_life
from waveos.ending import Look, end_between_steps
from waveos.errors import ConfigError, LinkError, WaveError
from waveos.link import open_link
from waveos.net.laws import OUT, failure, feed_all, make_runtime
from waveos.policy import load_policy
from waveos.primitives import clock_ns
from waveos.process import start_time

SLICE_NS = 20_000_000
AT_ONCE = 1_024
SLICES_A_WORD = 25
"""The host is told the counters after so many."""


def serve_queues(url: str, policy: str, params: dict[str, float], patience_s: float = 5.0) -> None:
    """Decide over a link of queues (`shm://NAME`), for a host that has the packets itself, until it is gone. Raises PolicyError when the policy fails."""
    link: Any = open_link(url, side="agent", subsystem=net, patience_s=patience_s)
    try:
        bound, runtime = _bind(policy, params, net.MAX_WORKERS)
        out, end = np.zeros(2 * OUT, net.DECISION), np.zeros(1, net.MESSAGE)
        end["type"], end["request"], end["worker"] = net.Message.BATCH_END, -1, -1
        look = end_between_steps()
        while True:
            look()
            batch = link.poll_messages(AT_ONCE, wait_ns=SLICE_NS)
            end["time_ns"] = clock_ns()
            for records in (batch, end) if len(batch) else ():
                first = 0
                while first < len(records):
                    first, n = feed_all(runtime, records, first, out)
                    if runtime["failed"][0]:
                        raise failure(runtime, bound)
                    _send(link, out[:n], look)
            if not len(batch):
                link.check()
    except LinkError:
        return  # the host has closed the link, or died: nothing is left to decide
    finally:
        link.close()


def _send(link: Any, decisions: Any, look: Look) -> None:
    """All of them, waiting for room. Raises LinkError once the host is gone."""
    while len(decisions):
        link.txn_create(min(len(decisions), AT_ONCE))[:] = decisions[:AT_ONCE]
        fitted = link.txns_commit()
        decisions = decisions[fitted:]
        link.check()
        if not fitted:
            look()


class Server:
    """One data path and the policy that it is served by."""

    def __init__(self, url: str, policy: str | None, params: dict[str, float], **options: Any) -> None:
        """Raises LinkError when it cannot be opened, ConfigError and PolicyError for a policy that cannot serve it."""
        self.policy, self.params = policy, params
        self._link: Any = open_link(url, side="agent", subsystem=net, prepare=self._prepare, **options)

    def _prepare(self, facts: dict[str, Any]) -> dict[str, Any]:
        """The host has told how many workers there are: compile for them. Its policy counts where the agent has none of its own."""
        if self.policy is None:
            if not facts.get("policy"):
                raise ConfigError("neither the host nor this agent names a policy; give one after the URL")
            self.policy, self.params = facts["policy"], facts.get("params") or {}
        self._bound, self._runtime = _bind(self.policy, self.params, int(facts["workers"]))
        return {"policy": self.policy, "params": self.params}

    def run(self) -> None:
        """Serve until the host is gone. Raises PolicyError when the policy fails."""
        slices, look = 0, end_between_steps()
        try:
            while self._link.serve(self._runtime, clock_ns() + SLICE_NS):
                look()
                slices += 1
                if slices % SLICES_A_WORD == 0:
                    self._link.tell(self._report())
                for request in self._link.requests():
                    self._answer(request, look)
            raise failure(self._runtime, self._bound)
        except LinkError:
            return  # the host is gone
        finally:
            self._link.tell(self._report())
            self._link.close()

    def _report(self) -> dict[str, Any]:
        about = {"policy": self.policy, "params": self.params, "pid": os.getpid(), "start": start_time(os.getpid())}
        return {"report": {**about, "counters": self._link.counters()}}

    def _answer(self, request: dict[str, Any], look: Look) -> None:
        if "report" in request:
            self._link.tell(self._report())
        elif "set-policy" in request:
            name, params = request["set-policy"]["policy"], request["set-policy"].get("params") or {}
            try:
                bound, runtime = _bind(name, params, self._link.workers)
            except (WaveError, ValueError) as error:
                self._link.tell({"unwilling": str(error)})
                return
            self._link.renew({"policy": name, "params": params}, look)
            self.policy, self.params, self._bound, self._runtime = name, params, bound, runtime


def _bind(policy: str, params: dict[str, float], workers: int) -> tuple[Any, Any]:
    chosen = load_policy(policy)
    if chosen.subsystem is not net:
        raise ConfigError(f"policy {policy!r} is not one of the network's")
    bound = chosen.bind(n_cpus=workers, params=params)
    return bound, make_runtime(bound, workers=workers)


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
    parser.add_argument("url", help="the link, e.g. xsk:///run/wave/lab/agent.sock")
    parser.add_argument("policy", nargs="?", help="a policy's name, or file.py[:Class]; by default the host's")
    parser.add_argument("--core", type=int, default=None, help="run on this core only")
    parser.add_argument("--nice", type=int, default=10, help="below the workers that it serves (default 10)")
    parser.add_argument("--nap-us", "--idle-us", type=float, default=0, help="sleep that long between looks when nothing comes (default: never)")
    parser.add_argument("--param", action="append", default=[], metavar="KEY=VALUE", help="a parameter of the policy")
    parser.add_argument("--parent", type=int, default=None, help="end with that process")
    options = parser.parse_args(arguments)
    try:
        begin_life(options.core, 0, options.parent)
        os.setpriority(os.PRIO_PROCESS, 0, max(options.nice, os.getpriority(os.PRIO_PROCESS, 0)))
        params = dict(map(_parameter, options.param))
        if options.url.startswith("xsk://"):
            Server(options.url, options.policy, params, nap_us=int(options.nap_us)).run()
        elif options.policy is None:
            raise ConfigError(f"name the policy that is to decide over {options.url}")
        else:
            serve_queues(options.url, options.policy, params)
    except (WaveError, ValueError, OSError) as error:
        print(f"net-agent: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, WaveError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
