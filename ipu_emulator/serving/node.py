"""The emulated engine: GPU instances in virtual time behind the interface `waveos.serving.engine.Engine`.

Each instance does one thing at a time: a prefill batch, or iterations of decode over all running requests, which go on until a batch is staged. Runs of
equal iterations are taken in one step: an iteration's time grows linearly with the tokens in cache, so their sum has a closed form, and the result is that of
stepping through them one by one. Time is integer nanoseconds; equal inputs give equal results.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from waveos.errors import ConfigError
from waveos.ipu_emulator.serving.cost import Costs, Sharding
from waveos.ipu_emulator.serving.faults import recovery_s
from waveos.serving import Placement, Recovery, Tier
from waveos.serving.engine import Batch, Block, Request, Transfer
from waveos.serving.mechanism import Mechanism

S = 1_000_000_000


class Clock:
    """Events in virtual time, in the order of their time and then of their making."""

    def __init__(self) -> None:
        self.now_ns = 0
        self._events: list[tuple[int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._made = 0

    def at(self, when_ns: int, action: Callable[..., None], *arguments: Any) -> None:
        """Call `action` at that time, or now if that is past."""
        self._made += 1
        heapq.heappush(self._events, (max(when_ns, self.now_ns), self._made, action, arguments))

    def step(self) -> bool:
        """Do everything that is due at the next time; False if nothing is left."""
        if not self._events:
            return False
        self.now_ns = self._events[0][0]
        while self._events and self._events[0][0] == self.now_ns:
            _, _, action, arguments = heapq.heappop(self._events)
            action(*arguments)
        return True

    def run_until(self, when_ns: int) -> None:
        """Do everything that is due by then."""
        while self._events and self._events[0][0] <= when_ns:
            self.step()
        self.now_ns = max(self.now_ns, when_ns)


class Wire:
    """One direction of a wire: transfers take it in turn, so that they wait for one another and none is lost."""

    def __init__(self) -> None:
        self.free_ns = 0
        self.busy_ns = 0
        self.tokens = 0

    def take(self, now_ns: int, lasts_ns: int, tokens: int) -> tuple[int, int]:
        """(begin, end) of a transfer that is asked for now."""
        begin = max(now_ns, self.free_ns)
        self.free_ns = begin + lasts_ns
        self.busy_ns += lasts_ns
        self.tokens += tokens
        return begin, self.free_ns


@dataclass(slots=True)
class BatchRecord:
    """What a prefill batch took."""

    begin_ns: int
    end_ns: int
    stall_ns: int
    loaded: int
    computed: int
    requests: int


@dataclass
class Executor:
    """One instance: what it does now, and what it has done."""

    number: int
    costs: Costs
    load: Wire = field(default_factory=Wire)
    back_up: Wire = field(default_factory=Wire)
    storage: Wire = field(default_factory=Wire)
    staged: Batch | None = None
    running: Batch | None = None
    ends: list[tuple[int, int, Request]] = field(default_factory=list)  # (iteration, order, request) of requests that decode
    gone: set[int] = field(default_factory=set)
    homes: list[int] = field(default_factory=list)  # tokens in cache of decoding requests, by home rank
    home_counts: list[int] = field(default_factory=list)
    iteration: int = 0  # of decode, since the start
    kv_tokens: int = 0
    decoding: int = 0
    begin_ns: int = 0  # of the present run of decode iterations
    steps: int = 0  # planned in it
    slowed: bool = False
    ticket: int = 0  # of the run's end; an older one means nothing
    paused: bool = False  # a GPU was lost, or shards move
    alive: int = 0
    decode_ns: int = 0
    decoded: int = 0  # tokens
    iterations: int = 0  # of any kind
    batches: list[BatchRecord] = field(default_factory=list)
    ready_at: dict[int, tuple[int, int]] = field(default_factory=dict)  # transfer -> (begin, end)


class Node:
    """`Engine` for any number of instances. `costs` gives each instance's times; `on_token` is told of first tokens, `on_done` of the last."""

    def __init__(self, clock: Clock, costs: Sequence[Costs], host_tokens: Sequence[int], storage_tokens: int = 0) -> None:
        self.clock = clock
        self.mechanism = Mechanism(self)
        self.executors = [
            Executor(number, each, homes=[0] * each.sharding.ranks, home_counts=[0] * each.sharding.ranks, alive=each.sharding.ranks)
            for number, each in enumerate(costs)
        ]
        self.on_first: Callable[[Request, int], None] = lambda request, now_ns: None
        self.on_done: Callable[[Request, int], None] = lambda request, now_ns: None
        self._order = 0
        for number, each in enumerate(costs):
            self.mechanism.add_instance(number, each.sharding.ranks, each.pool_tokens, host_tokens[number], storage_tokens, each.sharding.heads)

    # ── what the mechanism asks for ──────────────────────────────────────────────────────────────────────────────────

    def move(self, transfer: Transfer) -> None:
        """Begin a copy on the wire it needs."""
        executor = self.executors[transfer.instance]
        tokens = transfer.tokens
        if transfer.source is Tier.STORAGE or transfer.target is Tier.STORAGE:
            wire, seconds = executor.storage, executor.costs.storage_s(tokens)
        else:
            wire = executor.load if transfer.target is Tier.DEVICE else executor.back_up
            seconds = executor.costs.load_s(tokens)
        span = wire.take(self.clock.now_ns, round(seconds * S), tokens)
        executor.ready_at[id(transfer)] = span
        self.clock.at(span[1], self._arrived, executor, transfer)

    def _arrived(self, executor: Executor, transfer: Transfer) -> None:
        if executor.ready_at.pop(id(transfer), None) is not None:
            self._sync()
            self.mechanism.transfer_done(transfer)

    def stop(self, transfer: Transfer) -> None:
        """Keep what has arrived block by block; the wire is free from now on if nobody waits behind."""
        executor = self.executors[transfer.instance]
        span = executor.ready_at.pop(id(transfer), None)
        if span is None:
            return
        begin, end = span
        share = min(1.0, max(0.0, (self.clock.now_ns - begin) / max(1, end - begin)))
        left, arrived = share * transfer.tokens, 0
        for block in transfer.blocks:
            if block.tokens > left:
                break
            left -= block.tokens
            arrived += 1
        if executor.storage.free_ns == end:
            executor.storage.free_ns = max(begin, self.clock.now_ns)
        missing: list[Block] = transfer.blocks[arrived:]
        self._sync()
        self.mechanism.give_back(transfer, missing)
        self.mechanism.transfer_done(transfer)

    def run(self, batch: Batch) -> None:
        """Stage the batch: it begins at the end of the present batch or iteration."""
        executor = self.executors[batch.instance]
        executor.staged = batch
        if executor.running is not None or executor.paused:
            return
        if executor.decoding:
            self._interrupt(executor)
        else:
            self._next(executor)

    def free(self, instance: int, block: Block, tier: Tier) -> None:
        """Nothing to do: only amounts are kept here, and the mechanism keeps them."""

    def drop(self, request: Request) -> None:
        """A request is left by its client: if it decodes, it ends with the present iteration."""
        executor = self.executors[request.instance]
        if request.state != "decoding":
            return
        executor.gone.add(id(request))
        if executor.steps:
            executor.steps = min(executor.steps, self._steps_by(executor, self.clock.now_ns))
            self._schedule(executor)
        else:
            self._shed(executor)

    def _shed(self, executor: Executor) -> None:
        """Requests whose clients left take part no more."""
        for end, _, request in [each for each in executor.ends if id(each[2]) in executor.gone]:
            self._leave(executor, request, request.prompt + request.outputs - 1 - (end - executor.iteration))
        executor.ends = [each for each in executor.ends if id(each[2]) not in executor.gone]
        heapq.heapify(executor.ends)
        executor.gone.clear()

    def generated(self, request: Request) -> int:
        """Tokens that a request which decodes has by now."""
        executor = self.executors[request.instance]
        for end, _, each in executor.ends:
            if each is request:
                steps = 0
                if executor.steps and executor.begin_ns < self.clock.now_ns:
                    steps = self._steps_by(executor, self.clock.now_ns + 1) - 1
                return request.outputs - (end - executor.iteration) + steps
        return 0

    def place(self, instance: int, placement: Placement) -> None:
        """Deal the heads anew. Only an idle instance can be placed: a model of what a restart does."""
        executor = self.executors[instance]
        costs = executor.costs
        sharding = Sharding(costs.sharding.heads, costs.sharding.ranks, placement)
        executor.costs = Costs(costs.gpu, costs.model, sharding, costs.plane, costs.constants)
        account = self.mechanism.instances[instance]
        pool = executor.costs.pool_tokens
        account.free[int(Tier.DEVICE)] += pool - account.capacity[int(Tier.DEVICE)]
        account.capacity[int(Tier.DEVICE)] = pool

    def recover(self, instance: int, recovery: Recovery, running: Sequence[Request]) -> None:
        """Run again on the ranks that are alive, once lost state is back; RECOMPUTE gives up all KV, and requests are prefilled anew."""
        executor, before = self.executors[instance], self.executors[instance].costs
        sharding = Sharding(before.sharding.heads, executor.alive, before.sharding.placement)
        after = Costs(before.gpu, before.model, sharding, before.plane, before.constants)
        lost = max(0, before.sharding.ranks - executor.alive)
        self._sync()
        self._pause(executor)
        self.mechanism.halted(instance)
        self.mechanism.lose(instance, list(self.mechanism.instances[instance].blocks), Tier.DEVICE)  # what nobody uses is not worth its transfer
        used = sum(block.tokens for block in self.mechanism.instances[instance].blocks.values() if block.tiers & Tier.DEVICE)
        used += sum(max(0, request.computed - sum(request.sizes[: request.locked])) for request in running)
        lasts = round(recovery_s(recovery, before, after, used * before.kv_bytes * lost / before.sharding.ranks) * S)
        self.clock.at(self.clock.now_ns + lasts, self._recovered, executor, after, recovery, list(running), lasts)

    def _recovered(self, executor: Executor, costs: Costs, recovery: Recovery, running: list[Request], lasted_ns: int) -> None:
        self._sync()
        executor.costs, executor.paused = costs, False
        counts = [0] * costs.sharding.ranks
        executor.homes, executor.home_counts = list(counts), list(counts)
        if recovery is Recovery.RECOMPUTE:
            executor.ends, executor.decoding, executor.kv_tokens = [], 0, 0
            for request in running:
                self.mechanism.restart_prefill(request)
            self.mechanism.lose(executor.number, list(self.mechanism.instances[executor.number].blocks), Tier.DEVICE)
        for end, _, request in executor.ends:
            rank = request.home % len(counts)
            executor.homes[rank] += request.prompt + request.outputs - 1 - end
            executor.home_counts[rank] += 1
        self.mechanism.recovered(executor.number, costs.sharding.ranks, lasted_ns, costs.pool_tokens)
        self._next(executor)

    def _pause(self, executor: Executor) -> None:
        """Whatever runs is lost: iterations of decode since the last whole one, and batches that are not done."""
        if executor.paused:
            return
        executor.paused = True
        executor.ticket += 1
        if executor.running is None and executor.steps:
            done = self._steps_by(executor, self.clock.now_ns) - 1
            executor.decode_ns += self._run_ns(executor, done)
            executor.iterations += done
            self._advance(executor, done)
        executor.staged = executor.running = None
        executor.steps = 0

    # ── what happens to them ─────────────────────────────────────────────────────────────────────────────────────────

    def fail(self, instance: int, rank: int) -> None:
        """A GPU of the instance is lost. Raises ConfigError when it was the last."""
        executor = self.executors[instance]
        if executor.alive <= 1:
            raise ConfigError(f"instance {instance} has lost its last GPU: its requests cannot be served")
        self._sync()
        self._pause(executor)
        executor.alive -= 1
        self.mechanism.rank_failed(instance, rank, executor.alive)

    def come_back(self, instance: int, rank: int) -> None:
        """A GPU can be used again; the policy says when."""
        self._sync()
        self.executors[instance].alive += 1
        self.mechanism.rank_back(instance, rank, self.executors[instance].alive)

    # ── what the GPUs do ─────────────────────────────────────────────────────────────────────────────────────────────

    def _sync(self) -> None:
        self.mechanism.now_ns = self.clock.now_ns

    def _next(self, executor: Executor) -> None:
        """Begin the staged batch, or go on decoding, or rest."""
        batch = executor.staged
        if batch is not None:
            ready_ns = self._ready_ns(executor, batch) if executor.decoding and batch.decode_first else 0
            if ready_ns <= self.clock.now_ns:
                self._prefill(executor, batch)
                return
            self._decode(executor, ready_ns)
        elif executor.decoding:
            self._decode(executor, None)

    def _ready_ns(self, executor: Executor, batch: Batch) -> int:
        """When the batch can begin without a stall."""
        spans = [span for each in batch.transfers if (span := executor.ready_at.get(id(each)))]
        if not spans:
            return 0
        end = max(span[1] for span in spans)
        if not executor.costs.plane.overlap:
            return end
        layers = executor.costs.model.layers
        compute = round(self._compute_s(executor, batch) * S)
        return max(min(span[0] for span in spans), end + compute // layers - compute)

    def _compute_s(self, executor: Executor, batch: Batch) -> float:
        return executor.costs.prefill_s([(part.begin, part.tokens) for part in batch.parts], self._home_share(executor, batch))

    def _home_share(self, executor: Executor, batch: Batch) -> float | None:
        """The busiest rank's share of the batch's attention, where heads live at home."""
        sharding = executor.costs.sharding
        if sharding.ranks == 1 or not sharding.extra:
            return None
        work = [0.0] * sharding.ranks
        for part in batch.parts:
            work[part.request.home % sharding.ranks] += part.tokens * (part.begin + 0.5 * part.tokens)
        return max(work) / sum(work)

    def _prefill(self, executor: Executor, batch: Batch) -> None:
        """Run a batch. Layer i computes once its KV is there and layer i - 1 is done; loads arrive evenly, so only the first and last layer can decide."""
        costs, now = executor.costs, self.clock.now_ns
        executor.staged, executor.running = None, batch
        compute = self._compute_s(executor, batch)
        if batch.mixed and executor.decoding:
            _, _, slope = costs.decode_line(executor.decoding)
            compute += executor.kv_tokens * slope
        spans = [span for each in batch.transfers if (span := executor.ready_at.get(id(each)))]
        load_end = max((span[1] for span in spans), default=0)
        if load_end > now:
            compute *= 1.0 + (1.0 / costs.prefill_beside_load - 1.0) * min(1.0, (load_end - now) / (compute * S))
        lasts = round(compute * S)
        end = now + lasts
        if load_end > now:
            if costs.plane.overlap:
                layers, load_begin = costs.model.layers, min(span[0] for span in spans)
                first = max(now, load_begin + (load_end - load_begin) // layers)
                end = max(end, first + lasts, load_end + lasts // layers)
            else:
                end = load_end + lasts
        loaded = sum(each.tokens for each in batch.transfers)
        computed = sum(part.tokens for part in batch.parts)
        executor.batches.append(BatchRecord(now, end, end - now - lasts, loaded, computed, len(batch.parts)))
        executor.iterations += 1
        self.mechanism.batch_started(batch)
        self.clock.at(end, self._prefilled, executor, batch)

    def _prefilled(self, executor: Executor, batch: Batch) -> None:
        if executor.running is not batch:
            return  # lost with a GPU
        self._sync()
        executor.running = None
        now = self.clock.now_ns
        if batch.mixed and executor.decoding:
            self._advance(executor, 1)
        for request in self.mechanism.batch_done(batch):
            self.on_first(request, now)
            self._begin_decode(executor, request)
        self._next(executor)

    def _begin_decode(self, executor: Executor, request: Request) -> None:
        if request.outputs <= 1:
            self.mechanism.request_done(request)
            self.on_done(request, self.clock.now_ns)
            return
        self._order += 1
        heapq.heappush(executor.ends, (executor.iteration + request.outputs - 1, self._order, request))
        executor.decoding += 1
        executor.kv_tokens += request.prompt
        rank = request.home % len(executor.homes)
        executor.homes[rank] += request.prompt - executor.iteration  # so that it grows by one with each iteration
        executor.home_counts[rank] += 1

    def _decode(self, executor: Executor, until_ns: int | None) -> None:
        """Begin a run of iterations, up to the first request's last token, or until the staged batch can begin."""
        executor.begin_ns, executor.steps = self.clock.now_ns, 0
        if executor.paused:
            return
        executor.slowed = executor.load.free_ns > self.clock.now_ns
        executor.steps = executor.ends[0][0] - executor.iteration
        if until_ns is not None:
            executor.steps = min(executor.steps, self._steps_by(executor, until_ns))
        self._schedule(executor)

    def _interrupt(self, executor: Executor) -> None:
        """A batch was staged while iterations run: end them at the next boundary, or when it can begin."""
        batch = executor.staged
        assert batch is not None
        ready_ns = self._ready_ns(executor, batch) if batch.decode_first else 0
        steps = min(executor.steps, self._steps_by(executor, max(ready_ns, self.clock.now_ns)))
        if steps < executor.steps:
            executor.steps = steps
            self._schedule(executor)

    def _schedule(self, executor: Executor) -> None:
        executor.ticket += 1
        self.clock.at(executor.begin_ns + self._run_ns(executor, executor.steps), self._decoded, executor, executor.ticket)

    def _run_ns(self, executor: Executor, steps: int) -> int:
        """Nanoseconds of the next `steps` iterations: each as long as the limit model says, with the cache growing by a token a request and step."""
        n, tokens = executor.decoding, executor.kv_tokens
        least, fixed, slope = executor.costs.decode_line(n, self._decode_home_share(executor))
        floor_steps = 0
        if fixed + slope * tokens < least:
            floor_steps = min(steps, int((least - fixed - slope * tokens) / (slope * n)) + 1)
        rest = steps - floor_steps
        seconds = floor_steps * least + rest * (fixed + slope * (tokens + n * (floor_steps + 0.5 * (rest - 1)))) if rest else floor_steps * least
        if executor.slowed:
            seconds /= executor.costs.decode_beside_load
        return round(seconds * S)

    def _decode_home_share(self, executor: Executor) -> float | None:
        sharding = executor.costs.sharding
        if sharding.ranks == 1 or not sharding.extra or not executor.kv_tokens:
            return None
        held = [base + count * executor.iteration for base, count in zip(executor.homes, executor.home_counts, strict=True)]
        return max(held) / executor.kv_tokens

    def _steps_by(self, executor: Executor, when_ns: int) -> int:
        """The fewest iterations of this run, at least one, that end no earlier than `when_ns`."""
        low, high = 1, max(1, executor.steps)
        while low < high:
            middle = (low + high) // 2
            if executor.begin_ns + self._run_ns(executor, middle) >= when_ns:
                high = middle
            else:
                low = middle + 1
        return low

    def _decoded(self, executor: Executor, ticket: int) -> None:
        if ticket != executor.ticket or executor.paused:
            return
        self._sync()
        executor.decode_ns += self.clock.now_ns - executor.begin_ns
        executor.iterations += executor.steps
        steps, executor.steps = executor.steps, 0
        self._advance(executor, steps)
        self._next(executor)

    def _advance(self, executor: Executor, steps: int) -> None:
        """So many iterations are done: every running request has as many tokens more; those that are complete leave."""
        executor.iteration += steps
        executor.decoded += steps * executor.decoding
        executor.kv_tokens += steps * executor.decoding
        if executor.gone:
            self._shed(executor)
        while executor.ends and executor.ends[0][0] <= executor.iteration:
            _, _, request = heapq.heappop(executor.ends)
            self._leave(executor, request, request.prompt + request.outputs - 1)
            self.mechanism.request_done(request)
            self.on_done(request, self.clock.now_ns)

    def _leave(self, executor: Executor, request: Request, tokens: int) -> None:
        executor.decoding -= 1
        executor.kv_tokens -= tokens
        rank = request.home % len(executor.homes)
        executor.homes[rank] -= tokens - executor.iteration
        executor.home_counts[rank] -= 1
