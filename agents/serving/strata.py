"""Strata's scheduler (arXiv 2508.18572, section 4): batches that know what their KV costs to load."""

from __future__ import annotations

from waveos import serving
from waveos.agents.serving.fcfs import Local, Plan, Waiting
from waveos.agents.serving.storage import Tiered
from waveos.agents.serving.tree import IN_QUEUE, Match, Node
from waveos.policy import Param


class Strata(Tiered, subsystem=serving, name="strata", compiled=False):
    """Defers what is being computed, balances loads against computation, decodes while a batch still loads; writes through what is used twice."""

    write_threshold: Param = 2
    theta_delay: Param = 100  # tokens on transient nodes beyond which a request is deferred
    theta_load: Param = 100  # tokens loaded for each token computed beyond which a batch is loading-bound
    window: Param = 256  # requests from the head of the queue that are looked at
    chunk_share: Param = 0.5  # of a batch's tokens that a prompt which is computed in chunks keeps when others join; 1: all
    defer: Param = 1  # 0 leaves a stage out
    balance: Param = 1
    fill: Param = 1

    def form(self, here: Local, now: int, txns) -> Plan | None:
        """The three stages; the third is the batch's flag."""
        ready = self._ready(here, now)
        if not ready:
            return None
        plan = Plan(int(self.batch_tokens), int(self.batch_requests))
        if not self.balance:
            for request, match in ready:
                if plan.room <= 0 or plan.slots <= 0 or not self.admit(here, plan, request, match):
                    break
            return plan
        head = ready.pop(0)
        if not self.admit(here, plan, *head):
            return None
        ready = self._absorb(here, plan, ready)
        late: list[tuple[Waiting, Match]] = []
        fits = True
        for request, match in ready:
            if plan.slots <= 0:
                fits = False
                break
            if not self._has_room(plan, request, match):
                continue
            if self._ratio(plan, request, match) > self.theta_load:
                late.append((request, match))
            elif not self._join(here, plan, request, match):
                fits = False
                break
        if fits:
            for request, match in late:
                if plan.slots <= 0 or not self._has_room(plan, request, match) or not self._join(here, plan, request, match):
                    break
        taken = {request.number for request, _, _ in plan.parts}
        self._absorb(here, plan, [each for each in ready if each[0].number not in taken])
        return plan

    def _cut(self, plan: Plan, request: Waiting, match: Match) -> int:
        """Tokens by which the batch lacks room for all that is left of the request's prompt."""
        return max(0, request.prompt - (request.computed or match.hit) - plan.room)

    def _has_room(self, plan: Plan, request: Waiting, match: Match) -> bool:
        """A prompt in chunks does not fill the batch: it takes what is left once the others are in, so that it can hide their loads.

        Who would only bring a second unfinished prompt waits: it adds nothing to compute.
        """
        cut = self._cut(plan, request, match)
        if not cut or plan.room:
            return plan.room > 0
        (_, _, tokens), keeps = plan.parts[plan.open], self.chunk_share * self.batch_tokens
        return plan.open >= 0 and tokens - cut >= keeps

    def _join(self, here: Local, plan: Plan, request: Waiting, match: Match) -> bool:
        """Admit a request that there is room for; False if memory does not allow."""
        cut = 0 if plan.room else self._cut(plan, request, match)
        if cut:
            self._resize(plan, -cut)
        if self.admit(here, plan, request, match):
            return True
        if cut:
            self._resize(plan, cut)
        return False

    def _resize(self, plan: Plan, tokens: int) -> None:
        """The batch's unfinished prompt gets so many tokens more."""
        owner, begin, old = plan.parts[plan.open]
        plan.parts[plan.open] = owner, begin, old + tokens
        plan.new += tokens
        plan.room -= tokens

    def flags(self, plan: Plan) -> int:
        """Running requests decode while a batch loads, until the moment from which on its computation hides the rest."""
        return super().flags(plan) | (int(serving.BatchFlag.DECODE_FIRST) if self.fill and plan.loaded else 0)

    def _ready(self, here: Local, now: int) -> list[tuple[Waiting, Match]]:
        """Stage 1: requests in order, without those whose prefix another one is about to make; these go to the head of the queue."""
        ready: list[tuple[Waiting, Match]] = []
        deferred: list[Waiting] = []
        looked, rest = here.queue[: int(self.window)], here.queue[int(self.window) :]
        for request in looked:
            if request.computed:
                ready.append((request, Match(request.computed, [], [], 0)))
                continue
            if request.marked:
                self._unmark(here, request)
            match = self.match(here, request)
            if self.defer and match.transient > self.theta_delay:
                deferred.append(request)
                continue
            ready.append((request, match))
            if self.defer:
                self._announce(here, request, len(match.nodes), now)
        if deferred:
            here.queue = deferred + [request for request, _ in ready] + rest
        ready.sort(key=lambda each: not each[0].computed)  # a prompt that is begun goes on: the memory for all of it is taken
        return ready

    def _announce(self, here: Local, request: Waiting, held: int, now: int) -> None:
        """Transient nodes for what a queued request will make, where no other stands for it."""
        tree, parent = here.tree, request.keys[held - 1] if held else 0
        for key, size in zip(request.keys[held:], request.sizes[held:], strict=True):
            if key not in tree.nodes:
                node = tree.add(key, parent, size)
                node.state, node.last = IN_QUEUE, now
                request.marked.append(node)
            parent = key

    def _unmark(self, here: Local, request: Waiting) -> None:
        for node in request.marked:
            if node.state == IN_QUEUE and not node.users:
                here.tree.nodes.pop(node.key, None)
        request.marked = []

    def _ratio(self, plan: Plan, request: Waiting, match: Match) -> float:
        """Tokens to load for each to compute, were the request part of the batch; what is shared is loaded once."""
        extra = sum(node.tokens for node in match.load if node.key not in plan.loads)
        return (plan.loaded + extra) / (plan.new + min(plan.room, request.prompt - match.hit))

    def _absorb(self, here: Local, plan: Plan, others: list[tuple[Waiting, Match]]) -> list[tuple[Waiting, Match]]:
        """Take in every request that needs nothing loaded but what the batch loads already (a bundle hit); the rest comes back."""
        rest: list[tuple[Waiting, Match]] = []
        for request, match in others:
            shared: list[Node] = match.load
            bundle = bool(shared) and all(node.key in plan.loads for node in shared)
            if not (bundle and plan.slots > 0 and self._has_room(plan, request, match) and self._join(here, plan, request, match)):
                rest.append((request, match))
        return rest
