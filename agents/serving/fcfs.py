"""First come, first served over a cache that is least recently used: the baseline, and what the other serving policies are built on."""

from __future__ import annotations

from collections import deque

from waveos import serving
from waveos.agents.serving.tree import IN_FLIGHT, READY, HiRadixTree, Match, Node
from waveos.policy import Param, Policy


class Waiting:
    """A request as the policy knows it, from its arrival to its end."""

    __slots__ = ("computed", "instance", "keys", "locked", "marked", "number", "outputs", "prompt", "sizes", "told")

    def __init__(self, number: int, instance: int, prompt: int, outputs: int) -> None:
        self.number, self.instance, self.prompt, self.outputs = number, instance, prompt, outputs
        self.keys: list[int] = []
        self.sizes: list[int] = []
        self.computed = 0  # tokens of its prompt that are computed, loaded or decided to be
        self.locked: list[Node] = []
        self.marked: list[Node] = []  # transient nodes that stand for it
        self.told = 0  # tokens of its prompt whose blocks are known


class Plan:
    """A batch in the making, and until it is done."""

    __slots__ = ("loaded", "loads", "need", "new", "open", "parts", "room", "slots")

    def __init__(self, tokens: int, requests: int) -> None:
        self.parts: list[tuple[Waiting, int, int]] = []
        self.loads: set[int] = set()  # keys of nodes that it loads
        self.loaded = 0  # their tokens
        self.new = 0  # tokens to compute
        self.need = 0  # tokens of device memory
        self.open = -1  # the part whose prompt is not finished with this batch, if there is one: it took all room that was left
        self.room, self.slots = tokens, requests


class Local:
    """One instance: its cache, its queue, the batches under way."""

    def __init__(self, number: int, device: int, host: int, cache_seq: int) -> None:
        self.number, self.device, self.host_free, self.cache_seq = number, device, host, cache_seq
        self.free = device
        self.tree = HiRadixTree()
        self.queue: list[Waiting] = []
        self.plans: deque[Plan] = deque()
        self.backlog = 0  # tokens waiting to be computed, at most


class Fcfs(Policy, subsystem=serving, name="fcfs_lru", compiled=False):
    """First come, first served; least recently used leaves; KV written through to host memory."""

    page: Param = 1  # tokens: what is hit is whole pages
    batch_tokens: Param = 8192  # most new tokens of a prefill batch; longer prompts come in chunks
    batch_requests: Param = 128
    ahead: Param = 1  # 1: the next batch is formed while one runs
    mixed: Param = 0  # 1: running requests decode along with prefill
    write_threshold: Param = 1  # uses after which a block is copied to host memory
    load_threshold: Param = 10  # tokens: shorter host hits are computed again

    def start(self) -> None:
        """Nothing is known yet."""
        self.here: dict[int, Local] = {}
        self.requests: dict[int, Waiting] = {}
        self.wanted: dict[int, int] = {}  # instances that can be given a batch, and when they said so

    # ── what the host tells ──────────────────────────────────────────────────────────────────────────────────────────

    def instance_new(self, msg, txns):
        self.here[msg.instance] = Local(msg.instance, msg.tokens, msg.free, msg.cache_seq)

    def kv_held(self, msg, txns):
        if not msg.tier & (serving.Tier.DEVICE | serving.Tier.HOST):
            return
        tree = self.here[msg.instance].tree
        node = tree.add(msg.key, msg.cache_seq, msg.tokens)
        if msg.tier & serving.Tier.DEVICE:
            tree.to_device(node)
        if msg.tier & serving.Tier.HOST:
            tree.to_host(node)

    def memory_level(self, msg, txns):
        if msg.tier == serving.Tier.HOST:
            self.here[msg.instance].host_free = msg.free

    def request_arrived(self, msg, txns):
        request = self.requests[msg.request] = Waiting(msg.request, msg.instance, msg.tokens, msg.outputs)
        if msg.front:
            request.computed = msg.tokens
        else:
            here = self.here[msg.instance]
            here.queue.append(request)
            here.backlog += request.prompt

    def context(self, msgs, txns):
        told = msgs.view(serving.CONTEXT)
        for number, size, blocks in zip(told["request"].tolist(), told["tokens"].tolist(), told["blocks"].tolist(), strict=True):
            request = self.requests[number]
            for key in blocks:
                if key:
                    request.keys.append(key)
                    request.sizes.append(size)
            request.told += size * sum(map(bool, blocks))
            if request.told == request.prompt and not request.computed and len(self.here) > 1:
                self.route(request, txns)
            elif request.told == request.prompt and request.computed:
                self._keep(request)

    def _keep(self, request: Waiting) -> None:
        """An agent before this one has begun it: what it has on the device is in use."""
        tree = self.here[request.instance].tree
        for key in request.keys:
            node = tree.nodes.get(key)
            if node is None or not node.device:
                break
            tree.lock(node)
            request.locked.append(node)

    def route(self, request: Waiting, txns) -> None:
        """To the instance that has least to compute before it is done with this request: its backlog, and what its cache lacks of the prompt."""
        hits = {number: here.tree.match(request.keys, request.prompt).hit for number, here in self.here.items()}
        best = min(self.here.values(), key=lambda here: (here.backlog - hits[here.number], here.number != request.instance))
        if best.number != request.instance:
            old = self.here[request.instance]
            old.queue.remove(request)
            old.backlog -= request.prompt
            best.queue.append(request)
            best.backlog += request.prompt
            request.instance = best.number
            serving.route(txns, request.number, best.number)

    def request_returned(self, msg, txns):
        """It waits again, first in the queue."""
        request = self.requests.get(msg.request)
        if request is None:
            return
        here = self.here[request.instance]
        if msg.front:
            request.computed = request.prompt
            if request in here.queue:
                here.queue.remove(request)
            return
        if msg.tokens == 0:
            self._release(here, request, msg.time_ns)
        elif not request.locked:
            self._keep(request)
        request.computed = msg.tokens
        if request not in here.queue:
            here.queue.insert(0, request)
            here.backlog += request.prompt - msg.tokens

    def request_done(self, msg, txns):
        request = self.requests.pop(msg.request, None)
        if request is None:
            return
        here = self.here[request.instance]
        here.free = msg.free
        parent = 0
        for key, size in zip(request.keys, request.sizes, strict=True):
            node = here.tree.add(key, parent, size)
            node.state, parent = READY, key
            here.tree.to_device(node)
        self._release(here, request, msg.time_ns)
        self._used(here, request, txns)

    def request_gone(self, msg, txns):
        request = self.requests.pop(msg.request, None)
        if request is None:
            return
        here = self.here[request.instance]
        if request in here.queue:
            here.queue.remove(request)
            here.backlog -= request.prompt - request.computed
        self._release(here, request, msg.time_ns)

    def kv_lost(self, msg, txns):
        here = self.here[msg.instance]
        here.cache_seq = msg.cache_seq
        if msg.tier == serving.Tier.HOST:
            here.host_free = msg.free
        if node := here.tree.nodes.get(msg.key):
            if msg.tier == serving.Tier.HOST and node.writing:  # a copy that was cut off
                node.writing = False
                here.tree.unlock(node, node.last)
            here.tree.forget(node, device=msg.tier == serving.Tier.DEVICE, host=msg.tier == serving.Tier.HOST)

    def rank_failed(self, msg, txns):
        """What was under way is lost, and its requests come back; all KV on the device is given up."""
        here = self.here[msg.instance]
        here.cache_seq = msg.cache_seq
        here.plans.clear()
        serving.recover(txns, msg.instance, serving.Recovery.RECOMPUTE)

    def recovered(self, msg, txns):
        """Batches that were under way are lost; their requests have come back before this."""
        here = self.here[msg.instance]
        here.plans.clear()
        here.device, here.free, here.cache_seq = msg.tokens, msg.free, msg.cache_seq

    def transfer_done(self, msg, txns):
        here = self.here[msg.instance]
        if msg.tier == serving.Tier.HOST and msg.request < 0:
            here.host_free = msg.free
            if node := here.tree.nodes.get(msg.key):
                here.tree.to_host(node)

    def batch_done(self, msg, txns):
        """What was computed is cache now."""
        here = self.here[msg.instance]
        here.free = msg.free
        if not here.plans:
            return  # decided by an agent before this one
        for request, begin, tokens in here.plans.popleft().parts:
            end = 0
            for key, size in zip(request.keys, request.sizes, strict=True):
                end += size
                if end > begin + tokens:
                    break
                node = here.tree.nodes.get(key)
                if node is not None and node.state == IN_FLIGHT:
                    node.state = READY
                    here.tree.to_device(node)
            if begin + tokens == request.prompt:
                self._used(here, request, txns)

    def txn_failed(self, msg, txns):
        """A batch that was not applied: its requests wait again. A copy that was not begun: it may be tried again."""
        here = self.here.get(msg.instance)
        if here is not None and msg.decision == serving.Decision.BACK_UP:
            node = here.tree.nodes.get(msg.key)
            if node is not None and node.writing:
                node.writing = False
                here.host_free += node.tokens
                here.tree.unlock(node, node.last)
        if here is None or msg.decision != serving.Decision.FORM_BATCH or not here.plans:
            return
        plan = here.plans.pop()
        for key in plan.loads:
            if node := here.tree.nodes.get(key):
                here.tree.forget(node, device=True)
        for request, begin, tokens in reversed(plan.parts):
            fresh = begin + tokens == request.computed and request.number in self.requests
            if not fresh:
                continue
            if not self._was_begun(here, request):
                self._release(here, request, msg.time_ns)
                request.computed = 0
            else:
                request.computed = begin
            if request not in here.queue:
                here.queue.insert(0, request)
            here.backlog += tokens

    def batch_wanted(self, msg, txns):
        """The level-triggered question. It is answered when the queue is drained, once, however often it was asked."""
        here = self.here[msg.instance]
        here.free, here.cache_seq = msg.free, msg.cache_seq
        if not (here.plans and msg.front and not self.ahead):
            self.wanted[msg.instance] = msg.time_ns

    def batch_end(self, msg, txns):
        """Form the best batch there is."""
        for number, asked_ns in self.wanted.items():
            here = self.here[number]
            plan = self.form(here, asked_ns, txns)
            if plan is not None and plan.parts:
                self._send(here, plan, txns, asked_ns)
        self.wanted.clear()

    # ── how a batch is formed ────────────────────────────────────────────────────────────────────────────────────────

    def form(self, here: Local, now: int, txns) -> Plan | None:
        """From the head of the queue on, until tokens or memory run out."""
        plan = Plan(int(self.batch_tokens), int(self.batch_requests))
        for request in here.queue:
            if plan.room <= 0 or plan.slots <= 0 or not self.admit(here, plan, request):
                break
        return plan

    def match(self, here: Local, request: Waiting) -> Match:
        """The cached prefix in whole pages."""
        match = here.tree.match(request.keys, request.prompt)
        page = int(self.page)
        if page > 1:
            match.hit -= match.hit % page
        if match.load and sum(node.tokens for node in match.load) < self.load_threshold:
            match.hit, match.load = 0, []
        if not match.hit:
            match.load = []
        return match

    def admit(self, here: Local, plan: Plan, request: Waiting, match: Match | None = None) -> bool:
        """Make the request part of the batch if memory allows."""
        if request.computed:
            tokens = min(plan.room, request.prompt - request.computed)
            plan.parts.append((request, request.computed, tokens))
        else:
            match = match or self.match(here, request)
            loads = [node for node in match.load if node.key not in plan.loads]
            nodes = _cover(match)
            for node in nodes:
                here.tree.lock(node)
            extra = sum(node.tokens for node in loads)
            need = request.prompt - match.hit + request.outputs + extra
            if plan.need + need > here.free + here.tree.evictable:
                for node in nodes:
                    here.tree.unlock(node, node.last)
                return False
            request.locked = nodes
            plan.loads.update(node.key for node in loads)
            plan.loaded += extra
            plan.need += need
            tokens = min(plan.room, request.prompt - match.hit)
            plan.parts.append((request, match.hit, tokens))
        if plan.parts[-1][1] + tokens < request.prompt:
            plan.open = len(plan.parts) - 1
        plan.new += tokens
        plan.room -= tokens
        plan.slots -= 1
        return True

    def flags(self, plan: Plan) -> int:
        """How the batch is run."""
        return int(serving.BatchFlag.MIXED) if self.mixed else 0

    def _send(self, here: Local, plan: Plan, txns, now: int) -> None:
        if plan.need > here.free:
            gone = here.tree.evict_device(plan.need - here.free)
            if gone:
                serving.evict(txns, here.number, [node.key for node in gone])
                here.free += sum(node.tokens for node in gone)
            if plan.need > here.free:  # a leaf that is being written to host memory keeps what is above it; asked again when it is
                for request, _, _ in plan.parts:
                    if not request.computed:
                        for node in request.locked:
                            here.tree.unlock(node, node.last)
                        request.locked = []
                return
        here.free -= plan.need
        nodes = here.tree.nodes
        for key in plan.loads:
            here.tree.to_device(nodes[key])
        complete = set()
        for request, begin, tokens in plan.parts:
            if not request.computed:
                self._mark(here, request, IN_FLIGHT, now)
            request.computed = begin + tokens
            if request.computed == request.prompt:
                complete.add(request.number)
            here.backlog -= tokens
        here.queue = [request for request in here.queue if request.number not in complete]
        here.plans.append(plan)
        parts = [(request.number, begin, tokens) for request, begin, tokens in plan.parts]
        serving.form_batch(txns, here.number, parts, here.cache_seq, self.flags(plan))

    def _mark(self, here: Local, request: Waiting, state: int, now: int) -> None:
        """Transient nodes for what the request will make. What it has locked is there already."""
        held = len(request.locked)
        parent = request.keys[held - 1] if held else 0
        request.marked = []
        for key, size in zip(request.keys[held:], request.sizes[held:], strict=True):
            node = here.tree.add(key, parent, size)
            node.last = now
            if not (node.device or node.host) and (node.state == READY or state == IN_FLIGHT):
                node.state = state
            if state == IN_FLIGHT:
                here.tree.lock(node)
                request.locked.append(node)
            request.marked.append(node)
            parent = key

    def _release(self, here: Local, request: Waiting, now: int) -> None:
        """The request needs its nodes no more, and makes none."""
        for node in request.locked:
            here.tree.unlock(node, now)
        for node in {id(node): node for node in request.locked + request.marked}.values():
            if node.state != READY and not node.users:
                node.state = READY
                here.tree._prune(node)
        request.locked, request.marked = [], []

    def _used(self, here: Local, request: Waiting, txns) -> None:
        """Count a use of the request's blocks, and copy to host memory what was used often enough."""
        write = []
        for key in request.keys:
            node = here.tree.nodes.get(key)
            if node is None or not node.device:
                break
            node.hits += 1
            if node.hits >= self.write_threshold and not node.host and not node.writing:
                write.append(node)
        short = sum(node.tokens for node in write) - here.host_free
        if short > 0:
            gone = here.tree.evict_host(short)
            if gone:
                serving.evict(txns, here.number, [node.key for node in gone], serving.Tier.HOST)
                here.host_free += sum(node.tokens for node in gone)
        fits = []
        for node in write:
            if node.tokens > here.host_free:
                break
            here.tree.write(node)
            here.host_free -= node.tokens
            fits.append(node.key)
        if fits:
            serving.back_up(txns, here.number, fits)

    def _was_begun(self, here: Local, request: Waiting) -> bool:
        """Whether an earlier part of it is under way or done."""
        return any(request is other for plan in here.plans for other, _, _ in plan.parts) or not request.marked


def _cover(match: Match) -> list[Node]:
    """The nodes that hold the hit tokens, the last perhaps in part."""
    end, nodes = 0, []
    for node in match.nodes:
        if end >= match.hit:
            break
        nodes.append(node)
        end += node.tokens
    return nodes
