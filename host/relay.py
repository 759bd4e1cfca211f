"""The relay: it stands in a host's enclave where an agent would, and carries what is said to an agent on another machine, and back: over a network, or
through the BAR of the device that the agent runs on.

To hostd it is an agent (`shm:///run/wave/NAME/agent.sock`); to the agent it is a host. It decides nothing and checks nothing: hostd's half checks
each decision by its sequence number, wherever it was made. When the far agent is lost the relay leaves the enclave, which then has no agent; when it
is back, the relay comes in anew, and hostd replays the enclave's whole state. So nothing that the network loses can be missed.
"""

from __future__ import annotations

import os
import time
from importlib import import_module
from typing import Any

from waveos import log, ring
from waveos.ending import Look, end_between_steps, never
from waveos.errors import ConfigError, LinkError, PolicyError
from waveos.keys import Keys
from waveos.link import open_link
from waveos.link.device import Device
from waveos.link.shm import LONGEST_PAUSE_S, ShmLink
from waveos.primitives import CoherentMemory, clock_ns, ring_doorbell
from waveos.process import start_time

AT_ONCE = 1_024
LOOK_NS = 20_000_000
"""Between two looks at both ends: are they there, do they want something."""
BEAT_NS = 1_000_000
AWAKE_NS = 300_000
"""After so long with nothing to carry it naps between looks: it runs on the host's own CPUs."""
NAP_S = 0.000_05
AWAIT_S = 0.01
"""Between two looks while hostd or the agent is waited for."""
SAY_S = 0.5
"""What is in the way for so long is said: until then hostd may not have seen that we were lost, and have us for its agent still."""


class Relay:
    """One enclave and one link. `look` is called between two steps; `options` are those of the far link's host side."""

    def __init__(self, near: str, far: str, subsystem: Any, look: Look = never, **options: Any) -> None:
        self.near_url, self.far_url, self.subsystem, self._look, self._options = near, far, subsystem, look, options
        self.far: Any = None
        self.counts = {"messages": 0, "decisions": 0, "losses": 0}
        self._about: dict[str, Any] = {}
        self._joins = 0
        self._bell = 0

    def run(self) -> None:
        """Until `look` raises."""
        try:
            while True:
                with self._join() as near:
                    _say(f"{self.near_url} is joined to {self.far_url}")
                    try:
                        self._carry(near)
                    except LinkError as error:
                        self.counts["losses"] += 1
                        _say(f"{error}; joining anew")
        finally:
            if self.far is not None:
                self.far.close()

    def _join(self) -> ShmLink:
        """Come into the enclave, however long that takes; each thing that is in the way is said once."""
        about, said = {"pid": os.getpid(), "policy": None}, set[str]()
        pause_s, say_s = AWAIT_S, time.monotonic() + SAY_S
        while True:
            try:
                return ShmLink(self.near_url, "agent", self.subsystem, prepare=self._prepare, about=about, look=self._look)
            except PolicyError:
                name = self.subsystem.__name__.rpartition(".")[2]
                raise ConfigError(f"{self.near_url} is of an enclave that is not for {name}: say with --subsystem what it is for") from None
            except LinkError as error:
                if getattr(error, "final", False):
                    raise
                if (why := str(error)) not in said and time.monotonic() >= say_s:
                    said.add(why)
                    _say(f"waits: {why}")
            again_s = time.monotonic() + pause_s
            while time.monotonic() < again_s:
                self._look()
                time.sleep(AWAIT_S)
            pause_s = min(1.5 * pause_s, LONGEST_PAUSE_S)

    def _prepare(self, facts: dict[str, Any]) -> dict[str, Any]:
        """hostd has told about its enclave: find the agent for it. hostd asks for nothing until then."""
        about: dict[str, Any] = {name: facts[name] for name in ("enclave", "cpus", "threads", "ahead") if name in facts}
        if self.far is not None and (about != self._about or not self._lasts()):
            self.far.close()
            self.far = None
        if self.far is None:
            self._about = about
            self.far = open_link(self.far_url, side="host", subsystem=self.subsystem, about=about, **self._options)
            _say(f"waits for an agent at {self.far_url}")
        while not self.far.peer_alive():
            self._look()
            self.far.check()
            time.sleep(AWAIT_S)
        self.far.await_agent(AWAIT_S)
        self._joins = self.far.peer_joins()
        self.far.poll_txns(AT_ONCE)  # decided on a state that is no more
        self._bell = facts.get("bell", 0xFFFF_FFFF)
        return {"policy": self.far.policy, "params": {}}

    def _lasts(self) -> bool:
        """False once the far link itself is over: the memory of a device was reset."""
        try:
            self.far.check()
        except LinkError:
            return False
        return True

    def _carry(self, near: Any) -> None:
        """Both ways, until one end is lost. Raises LinkError."""
        far, handed = self.far, near.handed
        beat = CoherentMemory(near.txns_memory)
        has_flags = "flags" in (self.subsystem.DECISION.names or ())
        busy_ns = look_ns = beat_ns = heard = 0
        while True:
            now_ns = clock_ns()
            if now_ns >= look_ns:
                look_ns = now_ns + LOOK_NS
                self._attend(near)
            if now_ns >= beat_ns:
                beat_ns = now_ns + BEAT_NS
                before, heard = heard, far.heartbeat() if hasattr(far, "heartbeat") else now_ns
                if heard != before:  # where the agent's own sign of life is seen from here, hostd's watchdog counts on that
                    ring.beat(beat, now_ns)
            decisions = far.poll_txns(AT_ONCE)
            if n := len(decisions):
                if far.peer_joins() != self._joins:
                    raise LinkError("the agent was lost for a moment")
                self.counts["decisions"] += n
                self._hand_over(near, decisions)
                if handed is not None and handed.doorbell >= 0 and (not has_flags or (decisions["flags"] & self._bell).any()):
                    ring_doorbell(handed.doorbell)
                busy_ns = now_ns
            messages = near.poll_messages(min(AT_ONCE, far.room(n=AT_ONCE)))
            if m := len(messages):
                self.counts["messages"] += m
                if far.send_messages(messages) < m:
                    raise LinkError("the agent was lost in mid-speech")
                busy_ns = now_ns
            elif not n and now_ns - busy_ns > AWAKE_NS:
                time.sleep(NAP_S)

    def _hand_over(self, near: Any, decisions: Any) -> None:
        """All of them into hostd's ring, waiting for room."""
        while len(decisions):
            near.txn_create(len(decisions))[:] = decisions
            decisions = decisions[near.txns_commit() :]
            if len(decisions):
                self._look()
                near.check()
                time.sleep(NAP_S)

    def _attend(self, near: Any) -> None:
        """Are we to end, are both ends there, does hostd want something?"""
        self._look()
        near.check()
        if not self.far.peer_alive() or self.far.peer_joins() != self._joins:
            raise LinkError(self.far.trouble or "the agent was lost for a moment")
        for request in near.handed.requests() if near.handed is not None else ():
            if "report" in request:
                about = {"policy": self.far.policy, "params": {}, "pid": os.getpid(), "start": start_time(os.getpid()), "far": self.far_url}
                near.handed.answer({"report": {**self.counts, **about}})
            elif "set-policy" in request:
                near.handed.answer({"unwilling": f"the policy is that of the agent at {self.far_url}: change it there"})


def run_relay(near: str, far: str, subsystem: Any, **options: Any) -> None:
    """Carry until SIGTERM or SIGINT. Raises LinkError if the far address is none, a key of the link is missing, or hostd does not want an agent of this
    user; ConfigError if the enclave is of another subsystem."""
    if far.startswith("bar://"):
        Device(far, "host").close()
    else:
        peer, _ = import_module("waveos.link.zmq").parse_url(far)
        keys = Keys(options.get("keys"))
        keys.own()
        keys.peer(peer)
        options = {"say": _say, **options}
    Relay(near, far, subsystem, end_between_steps(), **options).run()


def _say(line: str) -> None:
    log.say("relay", line)
