"""Enclaves whose hosts come over a network to an address at which agentd listens: each is served as any other, by a runtime of its own."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from waveos import log
from waveos.agents.agentd import Orders, Served, find_sizes
from waveos.errors import LinkError
from waveos.link.exchange import Door, Exchange, Facts, ZmqAgent
from waveos.policy import load_policy

WAIT_NS = 20_000_000
SOON_NS = 2_000_000
"""A timer that is due so soon is waited for actively."""
BARRED_S = 5.0
"""For so long an enclave is not let in again whose policy failed."""


class Guest(Served):
    """One enclave of another machine. Its host waits for the answer while the policy is compiled for it."""

    def __init__(self, link: ZmqAgent, door: Door, policy: str, orders: Orders, row: np.ndarray[Any, Any], number: int) -> None:
        self._arrived, self._door = link, door
        super().__init__(link.url, policy, orders, row, number)

    def _open(self) -> Any:
        assert self._policy is not None
        self._bound, self._runtime = self._bind(self._arrived.facts, self._policy, self._params)
        return self._arrived

    def _found(self, link: Any) -> None:
        super()._found(link)
        link.ready = True
        link.greet(self._door)

    @property
    def name(self) -> str:
        """Host and enclave."""
        return f"{self._arrived.host}/{self._arrived.facts.get('enclave')}"

    @property
    def whose(self) -> tuple[str, str]:
        """Of another machine."""
        return str(self._arrived.host), str(self._arrived.facts.get("enclave"))

    def wait_ns(self, now_ns: int) -> int:
        """How long nothing is to be done for it, but what comes from its host."""
        if self._runtime is None or self._link is None:
            return WAIT_NS
        if self._link.busy or self._row["unsettled"][0]:
            return 0
        left_ns = int(self._runtime["next_timer_ns"][0]) - now_ns
        return 0 if left_ns < SOON_NS else min(left_ns, WAIT_NS)


class Reception:
    """All addresses at which this agentd listens, and who has come. `rows` are records of the compiled loop, one a guest."""

    def __init__(self, urls: list[tuple[str, str]], orders: Orders, rows: np.ndarray[Any, Any], first: int) -> None:
        self._orders, self._rows, self._first = orders, rows, first
        self.guests: list[Guest | None] = [None] * len(rows)
        self._new: list[Guest] = []
        self._barred: dict[tuple[str, str], tuple[float, str]] = {}
        self._exchange = Exchange(say=lambda line: log.say("agentd", line))
        try:
            for url, policy in urls:
                self._exchange.listen(url, load_policy(policy).subsystem, self._accept_for(policy))
        except BaseException:
            self._exchange.close()
            raise

    def _accept_for(self, policy: str) -> Any:
        def accept(door: Door, host: str, enclave: str, facts: Facts) -> ZmqAgent:
            until_s, why = self._barred.get((host, enclave), (0.0, ""))
            if time.monotonic() < until_s:
                raise LinkError(why)
            find_sizes(facts, self._orders)
            place = next((i for i, guest in enumerate(self.guests) if guest is None), None)
            if place is None:
                raise LinkError(f"{len(self.guests)} enclaves of other machines are served, which is the most: start another agentd at another port")
            link = ZmqAgent(self._exchange, door.url, door.subsystem, alone=False, facts=facts)
            link.host, link.policy = host, policy
            guest = Guest(link, door, policy, self._orders, self._rows[place : place + 1], self._first + place)
            self.guests[place] = guest
            self._new.append(guest)
            return link

        return accept

    def step(self, alone: bool) -> list[Guest]:
        """Carry what there is both ways, waiting a little for it if these are all that is served; who has come since the last call."""
        wait_ns = 0
        if alone:
            now_ns = time.monotonic_ns()
            wait_ns = min((guest.wait_ns(now_ns) for guest in self.guests if guest), default=WAIT_NS)
        self._exchange.step(wait_ns)
        new, self._new = self._new, []
        return new

    def forget(self, guest: Guest, why: str = "") -> None:
        """The guest is served no more; with a reason it stays out for a while. Nothing for whoever is no guest."""
        if guest not in self.guests:
            return
        if why:
            self._barred[guest._arrived.host, str(guest._arrived.facts.get("enclave"))] = time.monotonic() + BARRED_S, why
        self.guests = [None if each is guest else each for each in self.guests]
        self._exchange.leave(guest._arrived)

    def close(self) -> None:
        """Take leave of all hosts."""
        self._exchange.close()
