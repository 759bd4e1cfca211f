"""FailSafe (arXiv 2511.14116): serving goes on when GPUs of a tensor-parallel group fail, on however many are left.

KV heads that divide evenly are spread over all ranks; the rest of a request's heads live on its home rank. The policy deals homes so that no rank has more
to do than others, forms prefill batches in which the homes' work is even, keeps a copy of all KV in host memory, and on a failure moves only what was lost.
"""

from __future__ import annotations

from waveos import serving
from waveos.agents.serving.fcfs import Fcfs, Local, Plan, Waiting
from waveos.policy import Param

STEP = 256
"""Tokens that are dealt at a time."""


class FailSafe(Fcfs, subsystem=serving, name="failsafe", compiled=False):
    """Even homes, even prefill batches, KV copied ahead of need, recovery of the lost share alone."""

    recovery: Param = 2  # serving.Recovery: 0 recompute, 1 host, 2 full, 3 oracle
    balance: Param = 1  # 0: homes in turn, and batches in the order of arrival
    most_replicated: Param = 0.3  # share of the heads that may be on every rank; beyond, owners rotate with the layer instead
    window: Param = 64  # requests from the head of the queue that a batch is formed of

    def start(self) -> None:
        super().start()
        self.ranks: dict[int, int] = {}
        self.pending: dict[int, list[float]] = {}  # tokens of work by home rank
        self.home: dict[int, tuple[int, float]] = {}  # request -> (home, work)

    def instance_new(self, msg, txns):
        super().instance_new(msg, txns)
        self.heads = msg.outputs
        self._place(msg.instance, msg.count, txns)
        self._use(msg.instance, msg.count)

    def request_done(self, msg, txns):
        self._leave(msg)
        super().request_done(msg, txns)

    def request_gone(self, msg, txns):
        self._leave(msg)
        super().request_gone(msg, txns)

    def rank_failed(self, msg, txns):
        here = self.here[msg.instance]
        here.cache_seq = msg.cache_seq
        here.plans.clear()
        self._place(msg.instance, msg.count, txns)
        serving.recover(txns, msg.instance, serving.Recovery(int(self.recovery)))

    def rank_back(self, msg, txns):
        """Use it again: shards move as after a failure, the other way."""
        self._place(msg.instance, msg.count, txns)
        serving.recover(txns, msg.instance, serving.Recovery(max(1, int(self.recovery))))

    def recovered(self, msg, txns):
        super().recovered(msg, txns)
        self._use(msg.instance, msg.count)

    def form(self, here: Local, now: int, txns) -> Plan | None:
        """Requests begin until every home has work; then tokens go, a step at a time, to the home that has least to compute in this batch."""
        plan, ranks = Plan(int(self.batch_tokens), int(self.batch_requests)), self.ranks[here.number]
        if not self.balance:
            for request in here.queue[: plan.slots]:
                self._settle(request, request.number % ranks, txns)
            return super().form(here, now, txns)
        work: dict[int, list[list]] = {rank: [] for rank in range(ranks)}  # by home: [request, first token, tokens of this batch]
        load = dict.fromkeys(work, 0.0)
        for request in here.queue:
            if request.computed:
                work[self.home[request.number][0] % ranks].append([request, request.computed, 0])
        for request in [each for each in here.queue[: int(self.window)] if not each.computed]:
            idle = [rank for rank, parts in work.items() if not parts]
            if not idle or plan.slots <= 0 or plan.room < STEP:
                break
            room, plan.room = plan.room, STEP
            admitted = self.admit(here, plan, request)
            plan.room += room - STEP
            if not admitted:
                break
            home = min(work, key=lambda rank: self.pending[here.number][rank])
            self._settle(request, home, txns)
            _, begin, tokens = plan.parts[-1]
            work[home].append([request, begin, tokens])
            load[home] += _cost(begin, 0, tokens)
        while plan.room > 0:
            left = {rank: part for rank, parts in work.items() if (part := _unfinished(parts))}
            if not left:
                break
            home = min(left, key=lambda rank: load[rank])
            part = left[home]
            more = min(STEP, plan.room, part[0].prompt - part[1] - part[2])
            load[home] += _cost(part[1], part[2], more)
            part[2] += more
            plan.room -= more
        plan.parts = [tuple(part) for parts in work.values() for part in parts if part[2]]
        plan.new = sum(tokens for _, _, tokens in plan.parts)
        return plan

    def _place(self, instance: int, ranks: int, txns) -> None:
        """Heads at home are on every rank: with many of them the weights take more memory than even KV gives back."""
        replicated = self.heads % ranks / self.heads if self.heads else 0.0
        serving.place(txns, instance, serving.Placement.CYCLIC if replicated > self.most_replicated else serving.Placement.HYBRID)

    def _use(self, instance: int, ranks: int) -> None:
        """So many ranks from now on; what is at home keeps its number, modulo."""
        self.ranks[instance] = ranks
        self.pending[instance] = [0.0] * ranks
        for number, (home, work) in self.home.items():
            request = self.requests.get(number)
            if request is not None and request.instance == instance:
                self.pending[instance][home % ranks] += work

    def _settle(self, request: Waiting, home: int, txns) -> None:
        """The request's odd heads live on this rank from now on."""
        if request.number in self.home:
            return
        work = float(request.prompt + request.outputs)
        self.home[request.number] = home, work
        self.pending[request.instance][home] += work
        serving.route(txns, request.number, request.instance, home)

    def _leave(self, msg) -> None:
        if msg.request in self.home:
            home, work = self.home.pop(msg.request)
            pending = self.pending[msg.instance]
            pending[home % len(pending)] -= work


def _unfinished(parts: list[list]) -> list | None:
    """The first request of a home that has tokens left to compute."""
    return next((part for part in parts if part[1] + part[2] < part[0].prompt), None)


def _cost(begin: int, done: int, tokens: int) -> float:
    """Of attention for these tokens, after `done` of a part that begins at `begin`."""
    return tokens * (begin + done + 0.5 * tokens)
