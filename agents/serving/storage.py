"""A cache of three tiers: what is used often is kept in storage, too, and comes back to host memory while its request waits (Strata, section 3)."""

from __future__ import annotations

from waveos import serving
from waveos.agents.serving.fcfs import Fcfs, Local, Waiting
from waveos.agents.serving.tree import IN_FLIGHT, READY
from waveos.policy import Param

MS = 1_000_000


class Tiered(Fcfs, subsystem=serving, name="fcfs_tiered", compiled=False):
    """As fcfs_lru, with storage: prefetches while a request waits, and stops when waiting longer would not pay."""

    store_threshold: Param = 2  # uses after which a block in host memory is written to storage; 0: never
    prefetch_threshold: Param = 256  # tokens: what storage has beyond the other tiers is not fetched if it is less
    prefetch_wait_ms: Param = 100  # a request that could begin waits so long for its prefetch ...
    prefetch_wait_ki_ms: Param = 250  # ... and so much longer for each 1,024 tokens of it; then it begins with what has come

    def start(self) -> None:
        super().start()
        self.fetching: dict[
            int, tuple[Waiting, int, int]
        ] = {}  # request -> it, tokens to fetch, and until when on the agent's clock; 0: not yet said
        self.cancelled: set[int] = set()

    def instance_new(self, msg, txns):
        super().instance_new(msg, txns)
        here = self.here[msg.instance]
        here.storage_free = 0
        here.stored = {}  # key -> tokens, by last use
        here.coming = {}  # key -> (parent, tokens) of what is being fetched

    def memory_level(self, msg, txns):
        super().memory_level(msg, txns)
        if msg.tier == serving.Tier.STORAGE:
            self.here[msg.instance].storage_free = msg.free

    def kv_held(self, msg, txns):
        super().kv_held(msg, txns)
        if msg.tier & serving.Tier.STORAGE:
            self.here[msg.instance].stored[msg.key] = msg.tokens

    def prefix_matched(self, msg, txns):
        """Storage has the request's first tokens: fetch those that no other tier has, if they are worth it."""
        request = self.requests.get(msg.request)
        if request is None or request.computed or msg.request in self.fetching:
            return
        here = self.here[request.instance]
        end, tokens, parent, wanted = 0, 0, 0, []
        for key, size in zip(request.keys, request.sizes, strict=True):
            if end >= msg.tokens:
                break
            end += size
            node = here.tree.nodes.get(key)
            if key not in here.coming and (node is None or not (node.device or node.host)):
                wanted.append((key, parent, size))
                tokens += size
            parent = key
        if tokens < self.prefetch_threshold:
            return
        self._make_room(here, tokens, txns)
        if tokens > here.host_free:
            return
        here.host_free -= tokens
        for key, above, size in wanted:
            here.coming[key] = above, size
            here.tree.add(key, above, size).state = IN_FLIGHT  # who shares it can wait for it, too
        self.fetching[msg.request] = request, tokens, 0
        serving.prefetch(txns, msg.request, here.number, msg.tokens)

    def transfer_done(self, msg, txns):
        here = self.here[msg.instance]
        if msg.request >= 0:
            if msg.tier == serving.Tier.HOST:
                self._fetched(here, msg.request)
            return
        if msg.tier == serving.Tier.HOST and msg.key in here.coming:
            above, size = here.coming.pop(msg.key)
            here.tree.add(msg.key, above, size).state = READY
        super().transfer_done(msg, txns)
        if msg.tier == serving.Tier.HOST:
            self._store(here, [msg.key], txns)

    def txn_failed(self, msg, txns):
        if msg.decision == serving.Decision.PREFETCH and msg.request in self.fetching:
            here = self.here[msg.instance]
            here.host_free += self.fetching[msg.request][1]
            self._fetched(here, msg.request)
        elif msg.decision == serving.Decision.BACK_UP and msg.tokens and msg.key in self.here[msg.instance].stored and not self._is_copied(msg):
            here = self.here[msg.instance]
            here.storage_free += here.stored.pop(msg.key)
            return
        super().txn_failed(msg, txns)

    def request_gone(self, msg, txns):
        if msg.request in self.fetching:
            self._fetched(self.here[msg.instance], msg.request)
        super().request_gone(msg, txns)

    def batch_end(self, msg, txns):
        """Requests whose prefetch is under way are left out, for a while; then it is stopped, and they begin with what has come."""
        asked, began = dict(self.wanted), {number: len(self.here[number].plans) for number in self.wanted}
        late: dict[int, list[Waiting]] = {}
        for number in asked:
            here = self.here[number]
            late[number] = [request for request in here.queue if request.number in self.fetching]
            here.queue = [request for request in here.queue if request.number not in self.fetching]
        super().batch_end(msg, txns)
        for number, requests in late.items():
            here = self.here[number]
            here.queue = requests + here.queue
            if not requests or len(here.plans) > began[number]:
                continue  # the GPU has something else to do: let them come
            self.wanted[number] = asked[number]
            self._hurry(requests, msg.time_ns, txns)

    def _hurry(self, requests: list[Waiting], now: int, txns) -> None:
        """Nothing else is there to run: the first of them waits its time, and no longer."""
        request, tokens, until = self.fetching[requests[0].number]
        if not until:
            until = now + int((self.prefetch_wait_ms + self.prefetch_wait_ki_ms * tokens / 1024) * MS)
            self.fetching[request.number] = request, tokens, until
        if now < until:
            txns.wake_after(until - now)
        elif request.number not in self.cancelled:
            self.cancelled.add(request.number)
            serving.cancel(txns, request.number, request.instance)

    def _fetched(self, here: Local, number: int) -> None:
        """The prefetch has ended: what has not come by now does not come."""
        if (fetch := self.fetching.pop(number, None)) is not None:
            for key in fetch[0].keys:
                if lost := here.coming.pop(key, None):
                    here.host_free += lost[1]
                    if node := here.tree.nodes.get(key):
                        node.state = READY
                        here.tree._prune(node)
        self.cancelled.discard(number)

    def _used(self, here: Local, request: Waiting, txns) -> None:
        super()._used(here, request, txns)
        for key in reversed(request.keys):
            if key in here.stored:  # a parent stays longer than what is below it
                here.stored[key] = here.stored.pop(key)
        self._store(here, request.keys, txns)

    def _store(self, here: Local, keys: list[int], txns) -> None:
        """Write what is used often and lies in host memory to storage."""
        if not self.store_threshold:
            return
        write = []
        for key in keys:
            node = here.tree.nodes.get(key)
            if node is None or not node.host or node.hits < self.store_threshold or key in here.stored:
                continue
            while here.storage_free < node.tokens and here.stored:
                oldest = next(iter(here.stored))
                here.storage_free += here.stored.pop(oldest)
                serving.evict(txns, here.number, [oldest], serving.Tier.STORAGE)
            if here.storage_free >= node.tokens:
                here.storage_free -= node.tokens
                here.stored[key] = node.tokens
                write.append(key)
        if write:
            serving.back_up(txns, here.number, write, serving.Tier.STORAGE)

    def _make_room(self, here: Local, tokens: int, txns) -> None:
        """In host memory, from what was used least recently."""
        if tokens > here.host_free and (gone := here.tree.evict_host(tokens - here.host_free)):
            serving.evict(txns, here.number, [node.key for node in gone], serving.Tier.HOST)
            here.host_free += sum(node.tokens for node in gone)

    def _is_copied(self, msg) -> bool:
        """Whether the copy that failed was one to host memory."""
        node = self.here[msg.instance].tree.nodes.get(msg.key)
        return node is not None and node.writing
