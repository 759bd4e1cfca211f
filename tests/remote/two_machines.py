"""A host and a DPU with keys of their own, a free port, and what runs on them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from waveos import sched
from waveos.keys import Keys
from waveos.link import open_link

DEADLINE_S = 60.0


def until(condition: Callable[[], Any], what: str = "it never came true") -> Any:
    """What the condition gives once it is true."""
    deadline = time.monotonic() + DEADLINE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.002)
    return found


@dataclass
class Machines:
    """A host and a DPU that know each other's keys, and what runs on them."""

    host: Keys
    dpu: Keys
    port: int
    said: list[str] = field(default_factory=list)
    open: list[Any] = field(default_factory=list)
    processes: list[subprocess.Popen[str]] = field(default_factory=list)
    device: Path | None = None  # memory that both have, instead of a network between them

    @property
    def url(self) -> str:
        return f"bar://{self.device}" if self.device else f"zmq+tcp://127.0.0.1:{self.port}"

    def link(self, side: str, subsystem: Any = sched, **options: Any) -> Any:
        """One side of the link; closed with the test. A machine that is stopped for seconds is no silent agent here."""
        options = {"silence_s": DEADLINE_S, **options} if side == "host" else options
        keys = self.host if side == "host" else self.dpu
        made = open_link(self.url, side=side, subsystem=subsystem, **{"keys": keys, "say": self.said.append, **options})
        self.open.append(made)
        return made

    def both(self, **options: Any) -> tuple[Any, Any]:
        """Host and agent in a session."""
        host, agent = self.link("host", **options), self.link("agent")
        until(lambda: agent.peer_alive() and host.peer_alive())
        return host, agent

    def wave(self, keys: Keys, *arguments: str, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
        """A `wave` command as a process of its own, with that machine's keys."""
        code = "import sys; from waveos.cli import run; sys.exit(run(sys.argv[1:]))"
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", code, *arguments],
            env={**os.environ, "WAVE_KEYS": str(keys.folder), **(environment or {})},
            stderr=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        return process

    def agentd(self, *arguments: str) -> subprocess.Popen[str]:
        """`wave agentd` on the DPU, listening."""
        return self.wave(self.dpu, "agentd", self.url, *arguments)


def free_port() -> int:
    """A TCP port that nobody has now."""
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return int(asked.getsockname()[1])
