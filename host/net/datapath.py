"""The IPU of a network on this machine, in one program: ports at both its wires, the doorway, and the agent in a process of its own. `wave hostd` has the
same as a daemon.
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
import subprocess
import sys

from waveos.errors import ConfigError
from waveos.host import changes
from waveos.host.net.link import Doorway
from waveos.host.net.ports import RING_SIZE, Ports
from waveos.host.net.topology import Network
from waveos.host.restore import Journal

PR_CAPBSET_DROP, CAPABILITIES = 24, 64
JOURNAL = "path-"
_libc = ctypes.CDLL(None)


class Datapath:
    """Opened, and served by whoever comes through the doorway; `start_agent` starts one. Raises ConfigError where the network has a live one."""

    def __init__(self, network: Network, *, port: int, workers: int, ring_size: int = RING_SIZE) -> None:
        self._undo = contextlib.ExitStack()
        self._agent: subprocess.Popen[bytes] | None = None
        try:
            journal = Journal(JOURNAL + network.name)
            self._undo.callback(journal.close)
            self.ports = Ports(network, port=port, workers=workers, ring_size=ring_size)
            self._undo.callback(self.ports.close)
            socket = journal.path.parent / "agent.sock"
            changes.note_new_file(journal, socket)
            self.url = f"xsk://{socket}"
            self._door = Doorway(socket, self.ports)
            self._undo.callback(self._door.close)
        except BaseException:
            self._undo.close()
            raise

    def start_agent(self, policy: str, *arguments: str, user: int | None = None) -> int:
        """An agent for these ports that runs the policy, without any capability, and as that user if one is given; its pid. `serving` says when it serves."""
        command = [sys.executable, "-P", "-m", "waveos.agents.net.agent", self.url, policy, *arguments]
        self._agent = subprocess.Popen(command, user=user, group=user, extra_groups=None if user is None else [], preexec_fn=_drop_capabilities)
        return self._agent.pid

    @property
    def agent_pid(self) -> int:
        """Of the agent that was started. Raises ConfigError before that."""
        if self._agent is None:
            raise ConfigError("no agent was started for this data path")
        return self._agent.pid

    @property
    def serving(self) -> bool:
        """The agent's heart beats."""
        return bool(self.ports.heartbeat_ns)

    @property
    def counters(self) -> dict[str, int]:
        """What the agent did with packets, as it said last: every half second, and when it ends."""
        return self._door.heard

    @property
    def agent_gone(self) -> bool:
        """The agent that was started has ended."""
        return self._agent is not None and self._agent.poll() is not None

    def stop_agent(self) -> None:
        """End the agent; from then on packets take the kernel's path."""
        if self._agent is not None and self._agent.poll() is None:
            self._agent.send_signal(signal.SIGCONT)
            self._agent.terminate()
            try:
                self._agent.wait(5)
            except subprocess.TimeoutExpired:
                self._agent.kill()
                self._agent.wait()

    def close(self) -> None:
        """End the agent and give everything back."""
        self.stop_agent()
        self._undo.close()

    def __enter__(self) -> Datapath:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _drop_capabilities() -> None:
    """Between fork and exec: what the new program could ever have of them."""
    for capability in range(CAPABILITIES):
        _libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
