"""What joins a mechanism and its agent: in this process, or across a link in a process of its own.

with open_agent("strata") as agent:              # agentd, across shared memory; it is started again if it dies
    while ...:
        agent.exchange(mechanism)
"""

from __future__ import annotations

import os
import time
from types import TracebackType
from typing import Any

import numpy as np

from waveos import log, serving
from waveos.errors import LinkError, PolicyError
from waveos.link import open_link
from waveos.policy import Policy, load_policy, policy_names
from waveos.policy.plain import PlainRuntime, Records
from waveos.record import VERSION
from waveos.serving.mechanism import Mechanism

PATIENCE_S = 30.0
"""How long an agent may take to come, at first and when one was lost; and to decide what only it can, or to go round at all."""
AGAIN_S = 1.0
"""Between two attempts to start one that died."""


class InProcess:
    """The policy in this process: what it decides is committed at once."""

    away: str | None = None
    """That nobody decides, and has not for PATIENCE_S; None while somebody does."""

    def __init__(self, policy: str, params: dict[str, float] | None = None) -> None:
        self.runtime = PlainRuntime(_load(policy), params)
        self.restarts = 0
        self._end: Any = np.zeros(1, serving.MESSAGE)
        self._end["version"], self._end["subsystem"] = VERSION, serving.SUBSYSTEM
        self._end["type"], self._end["request"] = serving.Message.BATCH_END, -1

    def exchange(self, mechanism: Mechanism, wait_ns: int = 0) -> bool:
        """Messages there, decisions back; True if there were any."""
        told = mechanism.take_messages()
        if not len(told) and self.runtime.next_timer_ns > mechanism.now_ns:
            return False
        self._end["time_ns"] = mechanism.now_ns
        mechanism.commit(self.runtime.feed(np.concatenate([told, self._end])))
        return True

    def close(self) -> None:
        """Nothing to end."""

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Across(InProcess):
    """The policy in agentd, across a link. One that dies or hangs is started again and told everything; without `start` somebody else starts it."""

    def __init__(self, url: str, policy: str, params: dict[str, float] | None = None, *, start: bool = True) -> None:
        _load(policy).param_values(params)  # what is wrong with it is said here, in one line
        self.policy, self.arguments = policy, [part for name, value in (params or {}).items() for part in ("--param", f"{name}={value}")]
        self.link: Any = open_link(url, side="host", subsystem=serving)
        self.restarts = -1
        self._start, self._started = start, 0.0
        self._lost_s = 0.0  # when an agent was last well before it was missed; 0: one has decided since, or had nothing to decide
        self._well_s = self._looked_s = 0.0  # when one was last well; when that was looked at
        self._seen, self._beat = (False, -1, 0), 0.0
        self._joins = self.link.peer_joins()
        self._unsent: Records = np.zeros(0, serving.MESSAGE)
        self._lost = self.link.overflowed()

    def exchange(self, mechanism: Mechanism, wait_ns: int = 0) -> bool:
        """Messages there, what has been decided back, waiting up to `wait_ns` for that; True if there were decisions."""
        self._watch(mechanism)
        if not self._joins:
            return False  # nobody is there to tell
        told = mechanism.take_messages()
        if len(self._unsent):
            told = np.concatenate([self._unsent, told])
        self._unsent = told[self.link.send_messages(told) :] if len(told) else told
        decisions = self.link.poll_txns(wait_ns=wait_ns)
        if not len(decisions):
            return False
        self._lost_s = 0.0
        mechanism.commit(decisions)
        return True

    def await_agent(self, mechanism: Mechanism) -> None:
        """Return when an agent is there; LinkError if none comes."""
        end = time.monotonic() + PATIENCE_S
        while not self._joins:
            self._watch(mechanism)
            if time.monotonic() > end:
                raise LinkError(f"no agent came to {self.link.url} within {PATIENCE_S:.0f} s: see what it said")
            time.sleep(0.005)

    def _watch(self, mechanism: Mechanism) -> None:
        """Start an agent where there is none or it hangs; tell a new one everything. One that comes and dies at what waits for it is as good as none."""
        joins, attached, now = self.link.peer_joins(), self.link.peer_alive(), time.monotonic()
        alive = self._goes_on((attached, joins, mechanism.heard), mechanism.starved, now) and attached
        if not alive:
            self._lost_s = self._lost_s or self._well_s
        elif not mechanism.requests:
            self._lost_s = 0.0
        hangs = attached and not alive
        missing = not alive and now - self._lost_s > PATIENCE_S
        self.away = f"no agent has decided anything for {PATIENCE_S:.0f} s: see what it said" if missing else None
        if joins != self._joins:
            self._joins = joins
            mechanism.agent_lost()
            mechanism.replay()
            self._unsent = self._unsent[:0]
        elif self._start and now - self._started > AGAIN_S and (hangs if self._coming() else not attached):
            if hangs:
                log.say("serve", f"the agent has hung for {PATIENCE_S:.0f} s: it is ended and another is started", "warning")
            self.link.kill_wave_agent()
            self.link.start_wave_agent(self.policy, *self.arguments)
            self._started, self.restarts = time.monotonic(), self.restarts + 1

    def _goes_on(self, seen: tuple[bool, int, int], starved: bool, now: float) -> bool:
        """It does not hang: an agent is well when it comes and when it decides, which changes what is `seen`, and while it goes round and none starves."""
        beat = self.link.heartbeat() if hasattr(self.link, "heartbeat") else now  # across a network its loop is not seen
        self._well_s += max(0.0, now - self._looked_s - AGAIN_S)  # this process was away itself: stopped with its agent, say
        if seen != self._seen or (beat != self._beat and not starved):
            self._well_s = now
        self._looked_s, self._seen, self._beat = now, seen, beat
        return now - self._well_s <= PATIENCE_S

    def _coming(self) -> bool:
        """One that was started has not ended yet."""
        child = getattr(self.link, "_agent", None)
        return child is not None and child.poll() is None

    def close(self) -> None:
        """End the agent that was started, and the link."""
        self.link.close()


def _load(policy: str) -> type[Policy]:
    """The policy. Raises PolicyError if it decides something else than serving."""
    kind = load_policy(policy)
    if kind.subsystem is not serving:
        other = kind.subsystem.__name__.rpartition(".")[2]
        raise PolicyError(f"policy {policy!r} is of subsystem {other}, not serving; those of serving: {', '.join(policy_names('serving'))}")
    return kind


def open_agent(policy: str, params: dict[str, float] | None = None, url: str | None = None) -> InProcess:
    """An agent in a process of its own across shared memory; with `url` across that link, started by somebody else; `url` "none": in this process."""
    if url == "none":
        return InProcess(policy, params)
    return Across(url or f"shm://serving-{os.getpid()}", policy, params, start=url is None)
