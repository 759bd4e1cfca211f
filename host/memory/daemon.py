"""The memory mechanism as a process of its own: it owns one cgroup's memory, and an agent at the other end of a link decides.

    python -m waveos.host.memory.daemon LINK --cgroup PATH [--enclave NAME] [--batch-kib N] [--pass-ms N] [--policy NAME] [--status FILE]

It ends on SIGTERM or SIGINT, or when the cgroup is empty, and leaves no limit behind. What a killed one leaves, `wave restore` puts back.
The link's kind brings what it needs (`shm`: numba, for its rings); the mechanism itself needs none of it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from waveos import memory
from waveos.errors import ConfigError, LinkError, WaveError
from waveos.host.memory.advise import Advisor
from waveos.host.memory.cgroup import MemoryCgroup
from waveos.host.memory.faults import Faults
from waveos.host.memory.mechanism import SEND_AT_ONCE, MemoryMechanism
from waveos.host.restore import Journal
from waveos.link import open_link

NAP_S = 0.002
STATUS_S = 1.0


class Daemon:
    """One enclave, one link."""

    def __init__(self, link: Any, mechanism: MemoryMechanism, status: Path | None = None) -> None:
        self.link, self.mechanism, self.status = link, mechanism, status
        self.joins, self.overflowed = 0, 0
        self.here = False
        self.over = False
        self._told_s = 0.0

    def run(self) -> None:
        """Serve until stopped, or nobody is left."""
        while not self.over:
            self.step()
            time.sleep(NAP_S)

    def step(self) -> None:
        """Once round: the sensor, the agent's comings and goings, its decisions, and what it is to hear."""
        self.mechanism.tick()
        self._greet()
        decisions = self.link.poll_txns()
        if len(decisions):
            self.mechanism.apply(decisions.copy())
        self._send(self.mechanism.take_messages())
        if self.mechanism.passes and not self.mechanism.processes:
            self.over = True
        if self.status is not None and time.monotonic() - self._told_s >= STATUS_S:
            self._told_s = time.monotonic()
            fresh = self.status.with_suffix(".new")
            fresh.write_text(json.dumps(self.facts()))
            fresh.replace(self.status)

    def _greet(self) -> None:
        here = self.link.peer_alive()
        if self.here and not here:
            self.mechanism.agent_gone()
        self.here = here
        if (joins := self.link.peer_joins()) != self.joins:
            self.joins = joins
            self.mechanism.introduce()

    def _send(self, records: Any) -> None:
        if not self.here or not len(records):
            return
        for first in range(0, len(records), SEND_AT_ONCE):
            part = records[first : first + SEND_AT_ONCE]
            if self.link.send_messages(part) < len(part):  # what is lost is lost: the agent begins anew
                self.overflowed += 1
                self.mechanism.introduce()
                return

    def facts(self) -> dict[str, Any]:
        """What has happened so far."""
        mechanism = self.mechanism
        return {
            "agent": self.here,
            "joins": self.joins,
            "overflowed": self.overflowed,
            "passes": mechanism.passes,
            "outcomes": mechanism.counts,
            "advised_kib": mechanism.advised_kib,
            "cpu_s": {name: spent / 1e9 for name, spent in mechanism.spent_ns.items()} | {"all": time.process_time()},
            "regions": {
                number: {"pid": region.process.pid, "batches": region.count, "rss_kib": int(region.rss.sum()), "swap_kib": int(region.swap.sum())}
                for number, region in mechanism.regions.items()
            },
        }


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="memory", description="Manage the memory of one cgroup as an agent decides.")
    parser.add_argument("url", help="the link, e.g. shm://memory")
    parser.add_argument("--cgroup", required=True, help="the folder of a cgroup of the memory controller")
    parser.add_argument("--enclave", default="memory", help="the enclave's name (default memory)")
    parser.add_argument("--batch-kib", type=int, default=2_048, help="size of a mapping that is one batch, KiB (default 2048)")
    parser.add_argument("--pass-ms", type=float, default=2_400.0, help="shortest time between two looks at all pages (default 2400)")
    parser.add_argument("--quota-mib-per-s", type=float, default=0.0, help="what may be moved at most (default: as the policy likes)")
    parser.add_argument("--stall-share", type=float, default=0.0, help="what share of time tasks may stall (default: as the policy likes)")
    parser.add_argument("--policy", default="", help="start an agent with this policy")
    parser.add_argument("--param", action="append", default=[], metavar="KEY=VALUE", help="a parameter of that policy")
    parser.add_argument("--status", type=Path, default=None, help="write what has happened to this file, as JSON, every second")
    parser.add_argument("--core", type=int, default=None, help="run on this core only")
    options = parser.parse_args(arguments)
    try:
        if options.core is not None:
            os.sched_setaffinity(0, {options.core})
        return _serve(options)
    except (WaveError, OSError) as error:
        print(f"memory: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, WaveError) else 1


def _serve(options: argparse.Namespace) -> int:
    if os.geteuid() != 0:
        raise ConfigError("managing other processes' memory takes root: run as root")
    with contextlib.ExitStack() as stack:
        journal = Journal(options.enclave)
        stack.callback(lambda: _say_all(journal.close()))
        _say_all(f"put back what a dead one left: {line}" for line in journal.recovered)
        mechanism = MemoryMechanism(
            MemoryCgroup(options.cgroup, journal),
            batch_kib=options.batch_kib,
            pass_ms=options.pass_ms,
            quota_mib_per_s=options.quota_mib_per_s,
            stall_share=options.stall_share,
            advisor=Advisor,
            faults=_faults(),
            say=_say,
        )
        stack.callback(mechanism.close)
        link: Any = open_link(options.url, side="host", subsystem=memory)
        stack.callback(link.close)
        daemon = Daemon(link, mechanism, options.status)

        def stop(_number: int, _frame: object) -> None:
            daemon.over = True

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        if options.policy:
            flags = [word for each in options.param for word in ("--param", each)]
            link.start_wave_agent(options.policy, *flags)
        with contextlib.suppress(LinkError):
            daemon.run()
    return 0


def _faults() -> Faults | None:
    """The kernel's own count of faults, where it is to be had."""
    try:
        return Faults()
    except WaveError as error:
        _say(f"no BPF ({str(error).splitlines()[0]}): what comes back from swap is seen at the next pass")
        return None


def _say_all(lines: Iterable[str]) -> None:
    for line in lines:
        _say(line)


def _say(line: str) -> None:
    print(f"memory: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
