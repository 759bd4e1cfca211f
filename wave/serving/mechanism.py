"""The host's half of serving: accounts of requests and KV blocks, the check of every decision, and the messages. It acts through an `Engine`.

    mechanism = Mechanism(engine)
    mechanism.add_instance(0, ranks=4, device_tokens=500_000, host_tokens=5_000_000)
    mechanism.arrive(7, prompt=900, outputs=20, blocks=[11, 12], sizes=[512, 388])
    messages = mechanism.take_messages()          # for the agent
    mechanism.commit(decisions)                   # from the agent; outcomes are among the next messages

A transaction is checked as a whole before any of it is applied. Memory for a request is reserved with its first part for all of its prompt and output, so
that what has begun can always end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from waveos.errors import ConfigError
from waveos.outcome import Outcome
from waveos.record import RECORD_BYTES, VERSION
from waveos.serving.engine import Batch, Block, Engine, Part, Request, Transfer
from waveos.serving.records import (
    BLOCKS_PER_RECORD,
    CONTEXT,
    MESSAGE,
    OUTCOME,
    SUBSYSTEM,
    BatchFlag,
    Decision,
    Message,
    Placement,
    Records,
    Recovery,
    Tier,
)

DEVICE, HOST, STORAGE = int(Tier.DEVICE), int(Tier.HOST), int(Tier.STORAGE)
_TYPES = {int(decision) for decision in Decision}
_FIELDS = ("type", "seq", "request", "instance", "more", "key", "tokens", "how", "txn", "time_ns")


@dataclass(slots=True, eq=False)
class Instance:
    """One copy of the model: its pools, in tokens, and what is held in them."""

    number: int
    ranks: int
    capacity: dict[int, int]
    free: dict[int, int]
    blocks: dict[int, Block] = field(default_factory=dict)
    cache_seq: int = 0
    waiting: int = 0
    staged: Batch | None = None
    running: Batch | None = None
    heads: int = 0  # of keys and values
    alive: bool = True  # False from the loss of a rank until it is recovered
    living: int = 0  # ranks that could be used, from the loss of one until it is recovered
    asked: bool = False  # a batch is wanted, and nothing has changed since that was said


class Refused(Exception):
    """A transaction that is not applied, and why."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.name)
        self.outcome = outcome


class Mechanism:
    """Accounts, checks and messages; time is given by whoever calls, in ns."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.instances: dict[int, Instance] = {}
        self.requests: dict[int, Request] = {}
        self.now_ns = 0
        self.outcomes = dict.fromkeys(Outcome, 0)
        self.said = 0  # records sent to the agent
        self.heard = 0  # records that came from it
        self._out: list[tuple[int, ...] | Records] = []
        self._open: list[tuple[int, ...]] = []  # a transaction of which records are missing yet

    # ── what happens ─────────────────────────────────────────────────────────────────────────────────────────────────

    def add_instance(self, number: int, ranks: int, device_tokens: int, host_tokens: int, storage_tokens: int = 0, heads: int = 0) -> Instance:
        """An instance with empty pools of these sizes."""
        pools = {DEVICE: device_tokens, HOST: host_tokens, STORAGE: storage_tokens}
        instance = self.instances[number] = Instance(number, ranks, pools, dict(pools), heads=heads)
        self._say(Message.INSTANCE_NEW, instance=number, count=ranks, outputs=heads, tokens=device_tokens, free=host_tokens)
        if storage_tokens:
            self._say(Message.MEMORY_LEVEL, instance=number, tier=STORAGE, free=storage_tokens)
        return instance

    def arrive(self, number: int, prompt: int, outputs: int, blocks: Sequence[int], sizes: Sequence[int], instance: int = 0) -> Request:
        """A request. Raises ConfigError if it could never be served: others are not concerned."""
        pool = max(each.capacity[DEVICE] for each in self.instances.values())
        if prompt + outputs > pool:
            raise ConfigError(f"a request of {prompt} + {outputs} tokens; the KV pool holds {pool}: shorten the prompt or max_tokens")
        if sum(sizes) != prompt or len(sizes) != len(blocks):
            raise ConfigError(f"a request of {prompt} tokens with {len(blocks)} blocks that hold {sum(sizes)}")
        request = self.requests[number] = Request(number, instance, prompt, outputs, list(blocks), list(sizes))
        home = self.instances[instance]
        home.waiting += 1
        home.asked = False
        told = _context(number, self.now_ns, blocks, sizes)
        self._say(Message.REQUEST_ARRIVED, request=number, seq=1, instance=instance, tokens=prompt, outputs=outputs, count=len(told))
        self._out.append(told)
        if stored := self._stored_prefix(home, request):
            self._say(Message.PREFIX_MATCHED, request=number, seq=1, instance=instance, tokens=stored, tier=STORAGE)
        return request

    def leave(self, number: int) -> None:
        """The client of a request is gone. What runs for it runs to the end of its batch."""
        request = self.requests.get(number)
        if request is None:
            return
        instance = self.instances[request.instance]
        if request.chunks:
            request.state = "gone"  # let go when its batch ends
            request.seq += 1
            return
        if request.computed:
            self.engine.drop(request)
        self._forget(instance, request)
        self._say(Message.REQUEST_GONE, request=number, seq=request.seq + 1, instance=instance.number, free=instance.free[DEVICE])

    def batch_started(self, batch: Batch) -> None:
        """The engine has begun with what was staged: the next batch can be formed."""
        instance = self.instances[batch.instance]
        instance.running, instance.staged, instance.asked = batch, None, False

    def batch_done(self, batch: Batch) -> list[Request]:
        """The engine has computed the batch; the requests whose prompt is complete, which it decodes from now on."""
        instance = self.instances[batch.instance]
        instance.running, instance.asked = None, False
        complete = []
        for part in batch.parts:
            request = part.request
            request.chunks -= 1
            if request.state == "gone":  # what was computed for it is nobody's: its agent has been told, or is told now, that it is gone
                if not request.chunks:
                    self._forget(instance, request)
                    self._say(Message.REQUEST_GONE, request=request.number, seq=request.seq, instance=instance.number, free=instance.free[DEVICE])
                continue
            self._hold(instance, request, part.begin + part.tokens)
            if part.begin + part.tokens == request.prompt:
                request.state = "decoding"
                complete.append(request)
        done = sum(part.tokens for part in batch.parts)
        self._say(Message.BATCH_DONE, instance=instance.number, count=len(batch.parts), tokens=done, free=instance.free[DEVICE])
        return complete

    def request_done(self, request: Request) -> None:
        """All its tokens are generated."""
        instance = self.instances[request.instance]
        self._forget(instance, request)
        self._say(Message.REQUEST_DONE, request=request.number, seq=request.seq + 1, instance=instance.number, free=instance.free[DEVICE])

    def transfer_done(self, transfer: Transfer) -> None:
        """Its blocks have arrived. Blocks that were taken out of it, because it was stopped, have not."""
        instance = self.instances[transfer.instance]
        transfer.done, instance.asked = True, False
        target = int(transfer.target)
        for block in transfer.blocks:
            block.users -= 1
            block.readers -= transfer.source is Tier.HOST
            block.tiers |= target
            if block.transfer is transfer:
                block.transfer = None
            if target != DEVICE:
                self._say(Message.TRANSFER_DONE, instance=instance.number, key=block.id, tokens=block.tokens, tier=target, free=instance.free[target])
        if transfer.request >= 0 and target != STORAGE:
            request = self.requests.get(transfer.request)
            if request is not None and request.prefetch is transfer:
                request.prefetch = None
            seq, free = request.seq if request else -1, instance.free[target]
            told = transfer.tokens
            self._say(Message.TRANSFER_DONE, request=transfer.request, seq=seq, instance=instance.number, tokens=told, tier=target, free=free)

    def give_back(self, transfer: Transfer, blocks: Sequence[Block]) -> None:
        """These blocks of a stopped transfer will not arrive."""
        instance = self.instances[transfer.instance]
        for block in blocks:
            transfer.blocks.remove(block)
            block.users -= 1
            block.readers -= transfer.source is Tier.HOST
            instance.free[int(transfer.target)] += block.tokens

    def transfer_failed(self, transfer: Transfer) -> None:
        """A copy to a lower tier was cut off, because what it read is lost."""
        instance, target = self.instances[transfer.instance], int(transfer.target)
        keys = [block.id for block in transfer.blocks]
        self.give_back(transfer, list(transfer.blocks))
        transfer.done = True
        for key in keys:
            self._say(Message.KV_LOST, instance=instance.number, key=key, cache_seq=instance.cache_seq, tier=target, free=instance.free[target])

    def lose(self, number: int, blocks: Sequence[int], tier: Tier) -> None:
        """Blocks left a tier and no decision asked for it. What was decided before is stale."""
        instance = self.instances[number]
        for key in blocks:
            block = instance.blocks.get(key)
            if block is not None and block.tiers & tier and not (block.readers if tier is Tier.HOST else block.users):
                self._drop(instance, block, int(tier))
                instance.cache_seq += 1
                self._say(Message.KV_LOST, instance=number, key=key, cache_seq=instance.cache_seq, tier=int(tier), free=instance.free[int(tier)])

    def rank_failed(self, number: int, rank: int, alive: int) -> None:
        """A GPU of the instance is gone, and a share of all KV on the device with it: every decision made before is stale."""
        instance = self.instances[number]
        instance.cache_seq += 1
        instance.living = alive
        self._say(Message.RANK_FAILED, instance=number, rank=rank, count=alive, cache_seq=instance.cache_seq)
        self.halted(number)

    def halted(self, number: int) -> None:
        """The instance runs nothing until it is recovered: what was staged or running is lost, and its requests wait again."""
        instance = self.instances[number]
        instance.alive = False
        lost = [batch for batch in (instance.staged, instance.running) if batch is not None]
        instance.staged = instance.running = None
        for part in [part for batch in lost for part in batch.parts]:
            self._take_back(instance, part)

    def rank_back(self, number: int, rank: int, alive: int) -> None:
        """A GPU can be used again, once the policy says so."""
        self._say(Message.RANK_BACK, instance=number, rank=rank, count=alive)

    def recovered(self, number: int, ranks: int, took_ns: int, device_tokens: int) -> None:
        """The instance runs on so many ranks, with a pool of another size."""
        instance = self.instances[number]
        instance.free[DEVICE] += device_tokens - instance.capacity[DEVICE]
        instance.capacity[DEVICE], instance.ranks, instance.alive, instance.asked = device_tokens, ranks, True, False
        free = max(0, instance.free[DEVICE])
        self._say(Message.RECOVERED, instance=number, count=ranks, key=took_ns, tokens=device_tokens, free=free, cache_seq=instance.cache_seq)

    def _take_back(self, instance: Instance, part: Part) -> None:
        """A part that was staged or running when its batch was lost: its request waits again."""
        request = part.request
        request.chunks -= 1
        if request.state == "gone":
            if not request.chunks:
                self._forget(instance, request)
                self._say(Message.REQUEST_GONE, request=request.number, seq=request.seq, instance=instance.number, free=instance.free[DEVICE])
        elif part.begin == request.hit and not request.chunks:
            self.restart_prefill(request)
        else:
            instance.waiting += request.state == "prefilling"
            request.computed, request.state, request.seq = part.begin, "waiting", request.seq + 1
            self._say(Message.REQUEST_RETURNED, request=request.number, seq=request.seq, instance=instance.number, tokens=part.begin)

    def restart_prefill(self, request: Request) -> None:
        """Its KV is lost and nothing holds a copy: it waits again, from its first token."""
        instance = self.instances[request.instance]
        self._unlock(instance, request)
        instance.free[DEVICE] += request.reserved
        instance.waiting += request.state != "waiting"
        request.reserved, request.computed, request.state, request.seq = 0, 0, "waiting", request.seq + 1
        instance.asked = False
        self._say(Message.REQUEST_RETURNED, request=request.number, seq=request.seq, instance=instance.number, tokens=0)

    # ── what is decided ──────────────────────────────────────────────────────────────────────────────────────────────

    def commit(self, decisions: Records) -> None:
        """Check and apply transactions, in order; an outcome for each record is among the next messages. A transaction may come in two calls."""
        self.heard += len(decisions)
        columns = [decisions[name].tolist() for name in _FIELDS]
        rows = self._open + list(zip(*columns, strict=True))
        begin = 0
        while begin < len(rows):
            end = begin + rows[begin][4] + 1
            if end > len(rows):
                break
            self._answer(rows[begin:end])
            begin = end
        self._open = rows[begin:]

    @property
    def starved(self) -> bool:
        """An instance runs nothing although requests wait for it: only the agent can go on. While it decodes or fetches they may wait for that, rightly."""
        idle = {each.number for each in self.instances.values() if each.waiting and each.alive and each.staged is None and each.running is None}
        return bool(idle) and bool(idle - {each.instance for each in self.requests.values() if each.state == "decoding" or each.prefetch})

    def agent_lost(self) -> None:
        """The agent is gone: what it had begun to say is dropped."""
        self._open = []

    def replay(self) -> None:
        """Tell a new agent everything: RESYNC, then the whole state."""
        self._open, self._out = [], []
        self._say(Message.RESYNC)
        broken: list[Instance] = []
        for instance in self.instances.values():
            instance.asked = False
            self._say(
                Message.INSTANCE_NEW,
                instance=instance.number,
                count=instance.ranks,
                outputs=instance.heads,
                tokens=instance.capacity[DEVICE],
                free=instance.capacity[HOST],
                cache_seq=instance.cache_seq,
            )
            for key in instance.blocks:
                self._say_held(instance, key)
            for tier in (DEVICE, HOST, *([STORAGE] if instance.capacity[STORAGE] else [])):
                self._say(Message.MEMORY_LEVEL, instance=instance.number, tier=tier, free=instance.free[tier])
            if not instance.alive:
                broken.append(instance)
        for request in self.requests.values():
            told = _context(request.number, self.now_ns, request.blocks, request.sizes)
            number, seq, at = request.number, request.seq, request.instance
            begun = request.state != "waiting"
            self._say(
                Message.REQUEST_ARRIVED,
                request=number,
                seq=seq,
                instance=at,
                tokens=request.prompt,
                outputs=request.outputs,
                count=len(told),
                front=begun,
            )
            self._out.append(told)
            if request.computed and not begun:
                self._say(Message.REQUEST_RETURNED, request=number, seq=seq, instance=at, tokens=request.computed)
            elif not begun and (stored := self._stored_prefix(self.instances[at], request)):
                self._say(Message.PREFIX_MATCHED, request=number, seq=seq, instance=at, tokens=stored, tier=STORAGE)
        for instance in broken:
            self._say(Message.RANK_FAILED, instance=instance.number, count=instance.living, cache_seq=instance.cache_seq)

    def take_messages(self) -> Records:
        """[n] MESSAGE: everything since the last call, and BATCH_WANTED for each instance that could be given one."""
        for instance in self.instances.values():
            if instance.waiting and instance.staged is None and not instance.asked and instance.alive:
                instance.asked = True
                self._say(
                    Message.BATCH_WANTED,
                    instance=instance.number,
                    front=instance.running is not None,
                    free=instance.free[DEVICE],
                    cache_seq=instance.cache_seq,
                )
        out, self._out = self._out, []
        told = bytearray()
        rows: list[tuple[int, ...]] = []
        for each in out:
            if isinstance(each, tuple):
                rows.append(each)
                continue
            if rows:
                told += np.array(rows, MESSAGE).tobytes()
                rows = []
            told += each.tobytes()
        if rows:
            told += np.array(rows, MESSAGE).tobytes()
        self.said += len(told) // RECORD_BYTES
        return np.frombuffer(told, MESSAGE)

    def _answer(self, rows: list[tuple[int, ...]]) -> None:
        try:
            self._apply(rows)
            outcome = Outcome.COMMITTED
        except Refused as refused:
            outcome = refused.outcome
        self.outcomes[outcome] += 1
        told: Any = np.zeros(len(rows), OUTCOME)
        columns = list(zip(*rows, strict=True))
        told["version"], told["subsystem"], told["type"], told["outcome"] = VERSION, SUBSYSTEM, Message.TXN_OUTCOME, outcome
        told["decision"], told["request"], told["instance"], told["more"], told["key"] = columns[0], columns[2], columns[3], columns[4], columns[5]
        told["tokens"], told["txn"] = columns[6], columns[8]
        told["time_ns"], told["age_ns"] = self.now_ns, self.now_ns - np.array(columns[9])
        told["seq"] = [request.seq if (request := self.requests.get(number)) else -1 for number in columns[2]]
        if outcome is Outcome.STALE and rows[0][0] == Decision.FORM_BATCH and rows[0][3] in self.instances:
            self.instances[rows[0][3]].asked = False  # the agent is told what it did not know: it can do better now
        self._out.append(told.view(MESSAGE))
        if outcome is not Outcome.COMMITTED and rows[0][0] == Decision.EVICT:
            self._say_held(self.instances.get(rows[0][3]), rows[0][5])
        if outcome is Outcome.STALE and rows[0][0] == Decision.FORM_BATCH:
            for row in rows[1:]:
                self._say_where(row[2])

    def _say_where(self, number: int) -> None:
        """How far a request is, for an agent that thinks otherwise: one before it may have begun it."""
        if request := self.requests.get(number):
            begun = request.state != "waiting"
            self._say(Message.REQUEST_RETURNED, request=number, seq=request.seq, instance=request.instance, tokens=request.computed, front=begun)

    def _say_held(self, instance: Instance | None, key: int) -> None:
        """Where a block is held, for an agent that thinks it is not."""
        block = instance.blocks.get(key) if instance else None
        if instance is not None and block is not None:
            held = block.tiers | (DEVICE if block.transfer else 0)
            self._say(Message.KV_HELD, instance=instance.number, key=key, cache_seq=block.parent, tokens=block.tokens, tier=held)

    def _apply(self, rows: list[tuple[int, ...]]) -> None:
        """Check a transaction, then apply it; Refused before anything is changed."""
        kind, seq, number, instance_number, more, key, tokens, how, _, _ = rows[0]
        if kind not in _TYPES or kind == Decision.PART or (more and kind != Decision.FORM_BATCH):
            raise Refused(Outcome.INVALID)
        instance = self.instances.get(instance_number)
        if instance is None:
            raise Refused(Outcome.NOT_IN_ENCLAVE)
        if kind == Decision.FORM_BATCH:
            self._form_batch(instance, rows, key, how)
        elif kind in (Decision.BACK_UP, Decision.EVICT):
            self._move_down(instance, kind, key, tokens, how)
        elif kind == Decision.PLACE:
            self.engine.place(instance.number, _member(Placement, how))
        elif kind == Decision.RECOVER:
            running = [each for each in self.requests.values() if each.instance == instance.number and each.state != "waiting"]
            self.engine.recover(instance.number, _member(Recovery, how), running)
        else:
            request = self.requests.get(number)
            if request is None:
                raise Refused(Outcome.TARGET_GONE)
            if request.seq != seq:
                raise Refused(Outcome.STALE)
            self._concerning(instance, request, kind, tokens, how)

    def _concerning(self, instance: Instance, request: Request, kind: int, tokens: int, how: int) -> None:
        """A decision about one request."""
        if kind == Decision.ROUTE:
            if request.state != "waiting" or request.computed:
                raise Refused(Outcome.STALE)
            self.instances[request.instance].waiting -= 1
            request.instance, request.home = instance.number, how
            instance.waiting += 1
            instance.asked = False
            return
        if request.instance != instance.number:
            raise Refused(Outcome.INVALID)
        if kind == Decision.LOAD:
            found, _ = self._prefix(instance, request, min(tokens, request.prompt))
            need = [block for block in found if not block.tiers & DEVICE and block.transfer is None]
            if sum(block.tokens for block in need) > instance.free[DEVICE]:
                raise Refused(Outcome.CONGESTED)
            if need:
                self._load(instance, need, request.number)
        elif kind == Decision.PREFETCH:
            self._prefetch(instance, request, tokens)
        elif kind == Decision.CANCEL:
            if request.prefetch is not None:
                self.engine.stop(request.prefetch)
        elif kind == Decision.REFUSE:
            if request.state != "waiting" or request.computed:
                raise Refused(Outcome.STALE)
            self.leave(request.number)

    def _form_batch(self, instance: Instance, rows: list[tuple[int, ...]], cache_seq: int, how: int) -> None:
        if len(rows) == 1 or any(row[0] != Decision.PART for row in rows[1:]) or len({row[2] for row in rows[1:]}) < len(rows) - 1:
            raise Refused(Outcome.INVALID)
        if instance.cache_seq != cache_seq or not instance.alive:
            raise Refused(Outcome.STALE)
        if instance.staged is not None:
            raise Refused(Outcome.CONGESTED)
        # Look first: nothing is changed until the whole batch is known to be sound.
        need = 0
        loads: dict[int, Block] = {}
        parts: list[tuple[Part, list[Block]]] = []
        for _, seq, number, _, _, begin, tokens, _, _, _ in rows[1:]:
            request = self.requests.get(number)
            if request is None:
                raise Refused(Outcome.TARGET_GONE)
            if request.seq != seq or request.state != "waiting" or request.instance != instance.number:
                raise Refused(Outcome.STALE)
            if tokens < 1 or begin + tokens > request.prompt:
                raise Refused(Outcome.INVALID)
            held: list[Block] = []
            if request.computed:
                if begin != request.computed:
                    raise Refused(Outcome.STALE)
            else:
                held, _ = self._prefix(instance, request, begin)
                need += request.prompt - begin + request.outputs
                for block in held:
                    if not block.tiers & DEVICE and block.transfer is None and block.id not in loads:
                        loads[block.id] = block
                        need += block.tokens
            parts.append((Part(request, begin, tokens), held))
        if need > instance.free[DEVICE]:
            raise Refused(Outcome.CONGESTED)
        if loads:
            self._load(instance, list(loads.values()), -1)
        transfers: dict[int, Transfer] = {}
        for part, held in parts:
            request = part.request
            if not request.computed:
                request.reserved = request.prompt - part.begin + request.outputs
                instance.free[DEVICE] -= request.reserved
                request.hit, request.locked = part.begin, len(held)
                for block in held:
                    block.users += 1
                    if block.transfer is not None:
                        transfers[id(block.transfer)] = block.transfer
            request.computed = part.begin + part.tokens
            request.chunks += 1
            if request.computed == request.prompt:
                request.state = "prefilling"
                instance.waiting -= 1
        batch = Batch(
            instance.number,
            [part for part, _ in parts],
            list(transfers.values()),
            bool(how & BatchFlag.DECODE_FIRST),
            bool(how & BatchFlag.MIXED),
        )
        instance.staged = batch
        self.engine.run(batch)

    def _prefix(self, instance: Instance, request: Request, tokens: int) -> tuple[list[Block], int]:
        """The blocks of the request's first `tokens`, all on the device or in host memory; else Refused as stale."""
        found, end = [], 0
        for key, size in zip(request.blocks, request.sizes, strict=True):
            if end >= tokens:
                break
            block = instance.blocks.get(key)
            if block is None or not (block.tiers & (DEVICE | HOST) or block.transfer):
                raise Refused(Outcome.STALE)
            found.append(block)
            end += size
        return found, end

    def _load(self, instance: Instance, blocks: list[Block], request: int) -> None:
        transfer = Transfer(instance.number, blocks, Tier.HOST, Tier.DEVICE, request)
        for block in blocks:
            block.transfer = transfer
            block.users += 1
            block.readers += 1
        instance.free[DEVICE] -= transfer.tokens
        self.engine.move(transfer)

    def _prefetch(self, instance: Instance, request: Request, tokens: int) -> None:
        if request.prefetch is not None:
            raise Refused(Outcome.CONGESTED)
        blocks, end, room = [], 0, instance.free[HOST]
        for key, size in zip(request.blocks, request.sizes, strict=True):
            block = instance.blocks.get(key)
            if end >= tokens or block is None:
                break
            end += size
            if not block.tiers & (DEVICE | HOST) and block.transfer is None and not block.users:
                if not block.tiers & STORAGE or block.tokens > room:
                    break
                room -= block.tokens
                blocks.append(block)
        if not blocks:
            raise Refused(Outcome.STALE)
        for block in blocks:
            block.users += 1
        instance.free[HOST] = room
        request.prefetch = Transfer(instance.number, blocks, Tier.STORAGE, Tier.HOST, request.number)
        self.engine.move(request.prefetch)

    def _move_down(self, instance: Instance, kind: int, key: int, count: int, tier: int) -> None:
        """BACK_UP or EVICT of a block and the count - 1 before it."""
        if tier not in (DEVICE, HOST, STORAGE) or count < 1 or (kind == Decision.BACK_UP and tier == DEVICE):
            raise Refused(Outcome.INVALID)
        blocks: list[Block] = []
        while len(blocks) < count:
            block = instance.blocks.get(key)
            if block is None:
                raise Refused(Outcome.STALE)
            blocks.append(block)
            key = block.parent
        if kind == Decision.EVICT:
            if any((block.readers if tier == HOST else block.users) or not block.tiers & tier for block in blocks):
                raise Refused(Outcome.STALE)
            for block in blocks:
                self._drop(instance, block, tier)
            return
        source = DEVICE if tier == HOST else HOST
        if any(block.tiers & tier or not block.tiers & source for block in blocks):
            raise Refused(Outcome.STALE)
        if sum(block.tokens for block in blocks) > instance.free[tier]:
            raise Refused(Outcome.CONGESTED)
        for block in blocks:
            block.users += 1
            block.readers += source == HOST
            instance.free[tier] -= block.tokens
        self.engine.move(Transfer(instance.number, blocks, Tier(source), Tier(tier)))

    # ── accounts ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _hold(self, instance: Instance, request: Request, computed: int) -> None:
        """What the request has computed becomes cache, block by block; what another request computed meanwhile is held once."""
        end = sum(request.sizes[: request.locked])
        while request.locked < len(request.blocks) and end + request.sizes[request.locked] <= computed:
            at = request.locked
            key, size = request.blocks[at], request.sizes[at]
            end += size
            block = instance.blocks.get(key)
            if block is None:
                block = instance.blocks[key] = Block(key, request.blocks[at - 1] if at else 0, size)
            request.reserved -= size
            if block.tiers & DEVICE or block.transfer is not None:
                instance.free[DEVICE] += size
            block.tiers |= DEVICE
            block.users += 1
            request.locked += 1

    def _drop(self, instance: Instance, block: Block, tier: int) -> None:
        block.tiers &= ~tier
        instance.free[tier] += block.tokens
        self.engine.free(instance.number, block, Tier(tier))
        if not block.tiers:
            del instance.blocks[block.id]

    def _unlock(self, instance: Instance, request: Request) -> None:
        for key in request.blocks[: request.locked]:
            instance.blocks[key].users -= 1
        request.locked = 0

    def _forget(self, instance: Instance, request: Request) -> None:
        if request.state == "waiting" or (request.state == "gone" and request.computed < request.prompt):
            instance.waiting -= 1
        if request.prefetch is not None:
            self.engine.stop(request.prefetch)
        self._unlock(instance, request)
        instance.free[DEVICE] += request.reserved
        request.reserved, instance.asked = 0, False
        del self.requests[request.number]

    def _stored_prefix(self, instance: Instance, request: Request) -> int:
        """Tokens from the request's first on that some tier holds, if storage has to give any of them."""
        end, stored = 0, 0
        if not instance.capacity[STORAGE]:
            return 0
        for key, size in zip(request.blocks, request.sizes, strict=True):
            block = instance.blocks.get(key)
            if block is None:
                break
            end += size
            if not block.tiers & (DEVICE | HOST):
                stored = end
        return stored

    def _say(
        self,
        kind: Message,
        *,
        request: int = -1,
        seq: int = -1,
        instance: int = 0,
        rank: int = -1,
        key: int = 0,
        cache_seq: int = 0,
        tokens: int = 0,
        outputs: int = 0,
        free: int = 0,
        count: int = 0,
        tier: int = 0,
        front: bool = False,
    ) -> None:
        self._out.append(
            (0, VERSION, SUBSYSTEM, int(kind), seq, self.now_ns, request, instance, rank, key, cache_seq, tokens, outputs, free, count, tier, front)
        )


def _context(request: int, now_ns: int, blocks: Sequence[int], sizes: Sequence[int]) -> Records:
    """The CONTEXT records of a prompt, as messages: runs of blocks of one size, four to a record."""
    rows: list[tuple[Any, ...]] = []
    begin = 0
    while begin < len(blocks):
        end = begin + 1
        while end < len(blocks) and end - begin < BLOCKS_PER_RECORD and sizes[end] == sizes[begin]:
            end += 1
        ids = [*blocks[begin:end], *[0] * (BLOCKS_PER_RECORD - end + begin)]
        rows.append((0, VERSION, SUBSYSTEM, int(Message.CONTEXT), 1, now_ns, request, sizes[begin], ids))
        begin = end
    return np.array(rows, CONTEXT).view(MESSAGE)


def _member(kind: Any, value: int) -> Any:
    try:
        return kind(value)
    except ValueError:
        raise Refused(Outcome.INVALID) from None
