"""A host made by hand: says what a host would say, answers what the runtime decides, and checks that no request is lost or decided twice."""

from __future__ import annotations

from typing import Any

import numpy as np

from waveos.net import DECISION, MAX_REQUESTS, MESSAGE, OUTCOME, SUBSYSTEM, Decision, Message
from waveos.net.laws import feed_all, make_runtime
from waveos.outcome import Outcome
from waveos.policy import load_policy
from waveos.record import VERSION


class FakeHost:
    """Requests wait at workers until `finish`; every decision is answered by what `outcomes` gives, committed by default."""

    def __init__(self, policy: Any, workers: int = 4, **params: float) -> None:
        made = load_policy(policy) if isinstance(policy, str) else policy
        self.bound = made.bind(n_cpus=workers, params=params)
        self.runtime = make_runtime(self.bound, workers=workers)
        self.out = np.zeros(20_000, DECISION)
        self.now_ns, self.seq = 0, [0] * MAX_REQUESTS
        self.waiting: set[int] = set()
        self.at: dict[int, int] = {}
        self.shed: set[int] = set()
        self.made: list[Any] = []
        self.queue: list[Any] = []
        for worker in range(workers):
            self.say("worker_new", worker=worker)

    def say(self, kind: str, request: int = -1, worker: int = -1, **fields: Any) -> None:
        m = np.zeros(1, MESSAGE)
        m["version"], m["subsystem"], m["type"], m["time_ns"] = VERSION, SUBSYSTEM, Message[kind.upper()], self.now_ns
        m["request"], m["worker"], m["seq"] = request, worker, self.seq[request] if request >= 0 else 0
        for field, value in fields.items():
            m[field] = value
        self.queue.append(m)

    def arrive(self, request: int, **fields: Any) -> None:
        self.seq[request] += 1
        self.waiting.add(request)
        self.say("request_arrived", request, **fields)

    def finish(self, request: int, work_ns: int = 1_000) -> None:
        self.seq[request] += 1
        worker = self.at.pop(request)
        self.say("request_done", request, worker, work_ns=work_ns)

    def settle(self, outcome: Any = lambda decision: Outcome.COMMITTED) -> list[Any]:
        """Feed what was said, end the batch, apply what is decided, answer, until nothing more is decided; the decisions."""
        made = []
        while True:
            self.say("batch_end")
            messages, self.queue = np.concatenate(self.queue), []
            taken, n = feed_all(self.runtime, messages, 0, self.out)
            assert taken == len(messages) or self.runtime["failed"][0], "room for all decisions"
            made += [d.copy() for d in self.out[:n]]
            if n == 0 or self.runtime["failed"][0]:
                self.made += made
                return made
            for d in self.out[:n]:
                self._answer(d, outcome(d))

    def _answer(self, d: Any, outcome: Outcome) -> None:
        request = int(d["request"])
        if d["type"] not in (Decision.STEER, Decision.SHED):
            return
        assert request in self.waiting, "decided twice, or never given"
        assert int(d["seq"]) == self.seq[request]
        if outcome == Outcome.COMMITTED:
            self.waiting.discard(request)
            self.seq[request] += 1
            if d["type"] == Decision.STEER:
                self.at[request] = int(d["worker"])
            else:
                self.shed.add(request)
        o = np.zeros(1, OUTCOME)
        o["version"], o["subsystem"], o["type"], o["time_ns"] = VERSION, SUBSYSTEM, Message.TXN_OUTCOME, self.now_ns
        o["request"], o["worker"], o["outcome"], o["txn"], o["seq"] = request, d["worker"], outcome, d["txn"], self.seq[request]
        self.queue.append(o.view(MESSAGE))

    def depth(self, worker: int) -> int:
        return sum(1 for w in self.at.values() if w == worker)
