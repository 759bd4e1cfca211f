"""The reference engine: a small real transformer behind the same interface as the emulated GPUs, to prove that policies do no harm.

    engine = Reference(ranks=8)
    engine.submit(1, tokens, outputs=16)
    while engine.open:
        ...                                  # messages to the agent, its decisions to engine.mechanism
        engine.advance(0.01)                 # let the ranks work; calls on_token and on_done

Ranks are processes, KV lies in shared memory and in files, and a rank may be killed at any time. It is slow and exact: what it is for is that the tokens
are the same whatever is cached, moved, evicted, lost and restored. One command to the ranks is under way at a time: copies first, then the staged batch,
then an iteration of decode.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from waveos.errors import ConfigError, WaveError
from waveos.host.serving.memory import ROWS, Sizes
from waveos.host.serving.model import Ints, Shape, choose
from waveos.host.serving.rank import FROM_HOST, Move, Segment, Step
from waveos.host.serving.ranks import Ranks
from waveos.host.serving.sharding import HOME, deal
from waveos.host.serving.store import Files, Slots
from waveos.serving import Placement, Recovery, Tier
from waveos.serving.engine import Batch, Block, Request, Transfer
from waveos.serving.mechanism import Mechanism
from waveos.serving.text import VOCABULARY, name_blocks

BLOCK = 128
"""Tokens of a block of a prompt."""
DEVICE, HOST, STORAGE = int(Tier.DEVICE), int(Tier.HOST), int(Tier.STORAGE)


@dataclass(eq=False)
class Sequence_:
    """One request in the engine. `slots` are the device's, of the positions that have KV; a block's slots are its own, the others the request's."""

    request: Request
    tokens: list[int]  # of the prompt, and what was generated
    stop: Callable[[list[int]], bool]
    temperature: float
    draw: Callable[[], float]
    slots: Ints
    own: Any  # [positions] bool: slots that no block has
    computed: int = 0  # positions whose KV is on the device
    adopted: int = 0  # leading blocks whose slots it uses
    decoding: bool = False
    row: Any = None  # logits after its prompt, until the batch is done

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.request.prompt :]


@dataclass
class Statistics:
    """What has happened since the start."""

    steps: int = 0
    prefilled: int = 0  # tokens
    decoded: int = 0
    margin: float = np.inf  # smallest lead of a chosen token over the second
    loaded: int = 0  # bytes
    backed_up: int = 0
    exchanged: int = 0
    weights: int = 0
    recoveries: list[dict[str, float]] = field(default_factory=list)
    busy_s: dict[str, float] = field(default_factory=dict)


class Reference:
    """`Engine` with one instance. Raises WaveError when the last rank has died; ConfigError for what could never be served."""

    def __init__(
        self,
        ranks: int = 8,
        device_tokens: int = 6_144,
        host_tokens: int = 16_384,
        storage: Path | None = None,
        storage_tokens: int = 65_536,
        shape: Shape | None = None,
        block: int = BLOCK,
    ) -> None:
        shape = shape or Shape()
        if not 1 <= ranks <= shape.kv_heads:
            raise ConfigError(f"{ranks} ranks: the reference engine has 1 to {shape.kv_heads}, one for each KV head")
        if min(device_tokens, host_tokens) < 2 * ROWS:
            raise ConfigError(f"pools of {device_tokens} and {host_tokens} tokens: at least {2 * ROWS} each")
        self.shape, self.block, self.device_tokens, self.host_tokens = shape, block, device_tokens, host_tokens
        self.ranks = Ranks(Sizes(shape, ranks, device_tokens, host_tokens))
        self.mechanism = Mechanism(self)
        self.statistics = Statistics()
        self.sequences: dict[int, Sequence_] = {}
        self.on_token: Callable[[int, int], None] = lambda number, token: None
        self.on_done: Callable[[int, str], None] = lambda number, reason: None
        self._device, self._host = Slots(device_tokens), Slots(host_tokens)
        self._held: dict[int, Any] = {}  # block -> [rank, layer, head] bool: whose device has it
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._files = Files(storage, self.ranks.shared["host"], self._wake) if storage else None
        self._placement = Placement.HYBRID
        self._before: dict[int, Any] | None = None  # _held before what is being brought now, which a death would cut off
        self._copies: deque[Transfer] = deque()
        self._copying: Transfer | None = None
        self._unsettled: set[int] = set()  # requests that changed to the slots of blocks which others computed
        self._staged: Batch | None = None
        self._running: Batch | None = None
        self._left: list[list[int]] = []  # of the running batch: [part, begin, tokens] yet to compute
        self._recovery: Recovery | None = None
        self._paused = False
        self._then: Callable[[dict[int, Any]], None] | None = None
        self._asked = ("", 0.0)
        self.mechanism.add_instance(0, ranks, device_tokens, host_tokens, storage_tokens if self._files else 0, shape.kv_heads)
        self.sharding = deal(self._placement, self.ranks.alive, shape.layers, shape.kv_heads, shape.shards)
        self._adopt(self._settled)
        if self._files:
            self._find_stored()
        self._settle()

    def _settle(self) -> None:
        """Let what is under way end."""
        while self._then is not None:
            self.advance(1.0)

    def _settled(self, results: dict[int, Any]) -> None:
        self.statistics.weights = sum(results.values())

    def _find_stored(self) -> None:
        assert self._files is not None
        instance = self.mechanism.instances[0]
        for key, parent, tokens in self._files.held():
            if tokens <= instance.free[STORAGE]:
                instance.blocks[key] = Block(key, parent, tokens, STORAGE)
                instance.free[STORAGE] -= tokens
        if instance.blocks:
            self.mechanism.replay()

    # ── clients ──────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def open(self) -> int:
        """Requests that are not done."""
        return len(self.sequences)

    def submit(
        self,
        number: int,
        tokens: Sequence[int],
        outputs: int,
        stop: Callable[[list[int]], bool] = lambda generated: False,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Request:
        """A request. `stop` is asked after each token whether it was the last. Raises ConfigError if it could never be served."""
        if not tokens or not all(0 <= each < VOCABULARY for each in tokens) or outputs < 1:
            raise ConfigError(f"a request of {len(tokens)} tokens, {outputs} to generate: at least one each, below {VOCABULARY}")
        keys, sizes = name_blocks(tokens, self.block)
        draw = np.random.default_rng(seed % 2**64).random  # a client's may be negative
        self.mechanism.now_ns = time.monotonic_ns()
        request = self.mechanism.arrive(number, len(tokens), outputs, keys, sizes)
        room = len(tokens) + outputs
        self.sequences[number] = Sequence_(request, list(tokens), stop, temperature, draw, np.full(room, -1), np.zeros(room, bool))
        return request

    def leave(self, number: int) -> None:
        """The client of a request is gone."""
        self.mechanism.now_ns = time.monotonic_ns()
        self.mechanism.leave(number)
        if number not in self.mechanism.requests:
            self._release(number)

    # ── what the mechanism asks for ──────────────────────────────────────────────────────────────────────────────────

    def move(self, transfer: Transfer) -> None:
        """Queue a copy; its target's slots are taken at once."""
        if transfer.target is not Tier.STORAGE:
            slots = self._device if transfer.target is Tier.DEVICE else self._host
            for block in transfer.blocks:
                slots.of[block.id] = slots.take(block.tokens)
        if transfer.target is Tier.DEVICE:
            for block in transfer.blocks:
                self._held[block.id] = self._nowhere()
        if Tier.STORAGE in (transfer.source, transfer.target):
            assert self._files is not None
            self._files.begin(transfer, self._host.of)
        else:
            self._copies.append(transfer)

    def stop(self, transfer: Transfer) -> None:
        """Stop a copy from storage after the block that is under way; it is told of when that is there."""
        if self._files:
            self._files.stop(transfer)

    def free(self, instance: int, block: Block, tier: Tier) -> None:
        """The block's place in that tier may be used again."""
        if tier is Tier.DEVICE:
            self._device.drop(block.id)
            self._held.pop(block.id, None)
        elif tier is Tier.HOST:
            self._host.drop(block.id)
        elif self._files:
            self._files.forget(block)

    def run(self, batch: Batch) -> None:
        """Stage a batch: it begins when the present one is done."""
        self._staged = batch

    def drop(self, request: Request) -> None:
        """Its client left."""
        self._release(request.number)

    def place(self, instance: int, placement: Placement) -> None:
        """How heads are dealt from now on: at once while there is no KV, else with the next recovery."""
        changed, self._placement = placement is not self._placement, placement
        if changed and not self._held and not self.sequences and not self.ranks.busy and not self._paused:
            self._deal(None)
            self._adopt(self._settled)

    def recover(self, instance: int, recovery: Recovery, running: Sequence[Request]) -> None:
        """Go on with the ranks that are alive, once what is under way has ended."""
        self.mechanism.halted(0)
        self._staged, self._running, self._left = None, None, []
        self._paused, self._recovery = True, recovery

    # ── the ranks at work ────────────────────────────────────────────────────────────────────────────────────────────

    def advance(self, timeout_s: float = 0.0) -> bool:
        """Give the ranks their next command, hear what became of the last, and wait for that up to `timeout_s`; False if there was nothing to do."""
        self.mechanism.now_ns = time.monotonic_ns()
        if self._then is None:
            self._begin()
        worked = self._then is not None
        died, results = self.ranks.listen(timeout_s, [self._wake])
        self.mechanism.now_ns = time.monotonic_ns()
        if self._files:
            self._hear_files()
        if results is not None:
            then, self._then = self._then, None
            name, begun = self._asked
            self.statistics.busy_s[name] = self.statistics.busy_s.get(name, 0.0) + time.monotonic() - begun
            if self.ranks.aborted:
                self.ranks.calm()
            elif then is not None:
                self._before = None
                then(results)
        for number in died:
            self._lose(number)
        return worked or results is not None or bool(died)

    def kill(self, rank: int) -> None:
        """SIGKILL a rank: what a broken GPU looks like."""
        os.kill(self.ranks.pid(rank), 9)

    def come_back(self, rank: int) -> None:
        """A rank that died can be used again; the policy says from when."""
        self.mechanism.now_ns = time.monotonic_ns()
        self.ranks.start(rank)
        self.mechanism.rank_back(0, rank, len(self.ranks.alive))

    def close(self) -> None:
        """End the ranks; files stay."""
        if self._files:
            self._files.close()
        self.ranks.close()
        os.close(self._wake)

    def _ask(self, name: str, arguments: dict[int, tuple[Any, ...]], then: Callable[[dict[int, Any]], None]) -> None:
        self._then, self._asked = then, (name, time.monotonic())
        self.ranks.ask(name, arguments)

    def _begin(self) -> None:
        """The next command, if there is one."""
        if self._recovery is not None:
            self._restore(self._recovery)
        elif self._paused:
            return
        elif self._copies:
            self._copying = self._copies.popleft()
            self._copy(self._copying)
        elif self._unsettled:
            moves = self._missing([number for number in self._unsettled if number in self.sequences])
            self._unsettled = set()
            self._take(moves, self._exchanged)
        elif self._running is not None or self._staged is not None:
            self._prefill()
        elif any(each.decoding for each in self.sequences.values()):
            self._decode()

    # Copies

    def _copy(self, transfer: Transfer) -> None:
        """Between host memory and the devices: each rank its heads. Heads at home go to any one: where they are wanted is known when a batch begins."""
        up = transfer.target is Tier.DEVICE
        self._remember()
        moves: dict[int, list[Move]] = {rank: [] for rank in self.ranks.alive}
        for layer, row in enumerate(self.sharding.heads):
            for head, owner in enumerate(row):
                for block in transfer.blocks:
                    slots, below = self._device.of[block.id], self._host.of[block.id]
                    holders = self._held[block.id][:, layer, head]
                    rank = int(np.argmax(holders)) if not up else self.sharding.home(block.id) if owner == HOME else owner
                    moves[rank].append(Move(layer, head, slots, FROM_HOST, below))
                    if up:
                        holders[rank] = True
        wanted = {rank: (each,) for rank, each in moves.items()}
        self._ask("take" if up else "give", wanted, lambda results: self._copied(transfer, results))

    def _copied(self, transfer: Transfer, results: dict[int, Any]) -> None:
        self._copying = None
        if transfer.target is Tier.DEVICE:
            self.statistics.loaded += sum(results.values())
        else:
            self.statistics.backed_up += sum(results.values())
        self.mechanism.transfer_done(transfer)

    def _hear_files(self) -> None:
        assert self._files is not None
        try:
            os.eventfd_read(self._wake)
        except BlockingIOError:
            return
        while not self._files.done.empty():
            transfer, arrived = self._files.done.get()
            missing = [block for block in transfer.blocks if block not in arrived]
            if transfer.target is Tier.HOST:
                for block in missing:
                    self._host.drop(block.id)
            self.mechanism.give_back(transfer, missing)
            self.mechanism.transfer_done(transfer)

    # Batches

    def _prefill(self) -> None:
        """The next tokens of the running batch, which begins here if it has not."""
        if self._running is None:
            assert self._staged is not None
            batch = self._running = self._staged
            self._staged = None
            self.mechanism.batch_started(batch)
            self._left = [[at, part.begin, part.tokens] for at, part in enumerate(batch.parts) if part.request.number in self.sequences]
            for part in batch.parts:
                self._join(part.request, part.begin)
            moves = self._missing([part.request.number for part in batch.parts if part.request.number in self.sequences])
            if any(moves.values()):
                self._take(moves, self._exchanged)
                return
        batch, room = self._running, ROWS
        wanted: list[tuple[Sequence_, int, int]] = []
        for each in self._left:
            part = batch.parts[each[0]]
            tokens = min(room, each[2])
            if tokens and part.request.number in self.sequences:
                wanted.append((self.sequences[part.request.number], each[1], tokens))
                each[1] += tokens
                each[2] -= tokens
                room -= tokens
            elif part.request.number not in self.sequences:
                each[2] = 0
        if batch.mixed:
            wanted += self._next_tokens(room)
        self._left = [each for each in self._left if each[2]]
        if not wanted:
            self._batch_over(batch)
            return
        self._step(wanted, lambda results: self._prefilled(batch, wanted))

    def _join(self, request: Request, begin: int) -> None:
        """The first part of a request: the KV that it builds on is that of its blocks."""
        sequence = self.sequences.get(request.number)
        if sequence is None or sequence.computed:
            return
        end = 0
        for key, size in zip(request.blocks[: request.locked], request.sizes[: request.locked], strict=True):
            sequence.slots[end : end + size] = self._device.of[key]
            end += size
        sequence.slots[begin:] = -1  # it computes the rest of the last block for itself
        sequence.computed, sequence.adopted = begin, 0

    def _step(self, wanted: list[tuple[Sequence_, int, int]], then: Callable[[dict[int, Any]], None]) -> None:
        """A forward pass over runs of tokens (sequence, first, count)."""
        segments, tokens = [], []
        for sequence, first, count in wanted:
            end = first + count
            new = np.flatnonzero(sequence.slots[first:end] < 0) + first
            sequence.slots[new] = self._device.take(len(new))
            sequence.own[new] = True
            segments.append(Segment(count, first, sequence.slots[:end].copy(), self.sharding.home(sequence.request.home)))
            tokens += sequence.tokens[first:end]
        self.statistics.steps += 1
        step = Step(np.array(tokens), segments)
        self._ask("step", dict.fromkeys(self.sharding.ranks, (step,)), then)

    def _exchanged(self, results: dict[int, Any]) -> None:
        self.statistics.exchanged += sum(results.values())

    def _prefilled(self, batch: Batch, wanted: list[tuple[Sequence_, int, int]]) -> None:
        for at, (sequence, first, count) in enumerate(wanted):
            if sequence.decoding:
                self._decoded(sequence, first + count, at)
                continue
            sequence.computed = first + count
            self.statistics.prefilled += count
            if sequence.computed == sequence.request.prompt:
                sequence.row = self.ranks.shared["logits"][at].copy()
        if batch is self._running and not self._left:
            self._batch_over(batch)

    def _batch_over(self, batch: Batch) -> None:
        """The mechanism is told; prompts that are complete have their first token."""
        self._running = None
        complete = self.mechanism.batch_done(batch)
        for part in batch.parts:
            number = part.request.number
            if number not in self.mechanism.requests:
                self._release(number)
            elif number in self.sequences:
                self._adopt_blocks(self.sequences[number])
        for request in complete:
            sequence = self.sequences[request.number]
            sequence.decoding = True
            if not sequence.generated:
                self._say(sequence, sequence.row)
            sequence.row = None

    def _adopt_blocks(self, sequence: Sequence_) -> None:
        """What was computed is cache now: a new block takes the request's slots; one that was there lends its own."""
        request, end = sequence.request, 0
        for at, (key, size) in enumerate(zip(request.blocks[: request.locked], request.sizes[: request.locked], strict=True)):
            begin, end = end, end + size
            if at < sequence.adopted:
                continue
            span = slice(begin, end)
            if key in self._device.of:
                self._device.give(sequence.slots[span][sequence.own[span]])
                sequence.slots[span] = self._device.of[key]
                self._unsettled.add(request.number)
            else:
                self._device.of[key] = sequence.slots[span].copy()
                self._held[key] = self._now_held(request.home)
            sequence.own[span] = False
        sequence.adopted = request.locked

    # Decode

    def _next_tokens(self, room: int) -> list[tuple[Sequence_, int, int]]:
        """Of all that decode; after a loss a request may have several tokens whose KV is to be made again."""
        wanted = []
        for sequence in self.sequences.values():
            count = min(room, len(sequence.tokens) - sequence.computed)
            if sequence.decoding and count:
                wanted.append((sequence, sequence.computed, count))
                room -= count
        return wanted

    def _decode(self) -> None:
        wanted = self._next_tokens(ROWS)
        self._step(wanted, lambda results: self._all_decoded(wanted))

    def _all_decoded(self, wanted: list[tuple[Sequence_, int, int]]) -> None:
        for at, (sequence, first, count) in enumerate(wanted):
            self._decoded(sequence, first + count, at)

    def _decoded(self, sequence: Sequence_, computed: int, row: int) -> None:
        """KV is there up to `computed`; if that is all there was to compute, the next token is known."""
        if self.sequences.get(sequence.request.number) is not sequence or not sequence.decoding:
            return
        sequence.computed = computed
        if computed == len(sequence.tokens):
            self._say(sequence, self.ranks.shared["logits"][row])

    def _say(self, sequence: Sequence_, row: Any) -> None:
        """Choose the next token from these logits."""
        request = sequence.request
        token, margin = choose(row, sequence.temperature, sequence.draw)
        self.statistics.margin = min(self.statistics.margin, margin)
        self.statistics.decoded += 1
        sequence.tokens.append(token)
        generated = sequence.generated
        stopped = sequence.stop(generated)
        self.on_token(request.number, token)
        if stopped or len(generated) >= request.outputs:
            self.mechanism.request_done(request)
            self._release(request.number)
            self.on_done(request.number, "stop" if stopped else "length")

    def _release(self, number: int) -> None:
        """The request is over: what is its own is free."""
        if (sequence := self.sequences.pop(number, None)) is not None:
            self._device.give(sequence.slots[sequence.own])

    # Loss and recovery

    def _nowhere(self) -> Any:
        return np.zeros((self.ranks.sizes.ranks, self.shape.layers, self.shape.kv_heads), bool)

    def _now_held(self, home: int) -> Any:
        """Which rank has which head of what a request with this home computes."""
        held = self._nowhere()
        for layer, row in enumerate(self.sharding.heads):
            for head, owner in enumerate(row):
                held[self.sharding.home(home) if owner == HOME else owner, layer, head] = True
        return held

    def _remember(self) -> None:
        """What is brought from now on is there when the command is done, and not before."""
        if self._before is None:
            self._before = {key: held.copy() for key, held in self._held.items()}

    def _missing(self, numbers: list[int]) -> dict[int, list[Move]]:
        """What has to be brought so that these requests can go on; raises KeyError if nobody has it."""
        self._remember()
        assert self._before is not None
        moves: dict[int, list[Move]] = {rank: [] for rank in self.sharding.ranks}
        for number in numbers:
            request = self.sequences[number].request
            wanted = self._now_held(request.home)
            for key in request.blocks[: request.locked]:
                held = self._held[key]
                for rank, layer, head in np.argwhere(wanted & ~held).tolist():
                    others = np.flatnonzero(self._before[key][:, layer, head])
                    if not len(others) and key not in self._host.of:
                        raise KeyError(number)
                    source = int(others[0]) if len(others) else FROM_HOST
                    moves[rank].append(Move(layer, head, self._device.of[key], source, self._host.of.get(key, np.zeros(0, np.int64))))
                    held[rank, layer, head] = True
        return moves

    def _take(self, moves: dict[int, list[Move]], then: Callable[[dict[int, Any]], None]) -> None:
        self._ask("take", {rank: (moves.get(rank, []),) for rank in self.sharding.ranks}, then)

    def _lose(self, number: int) -> None:
        """A rank died: what it had is lost, and what runs is not to be finished."""
        if self._before is not None:
            self._held.update({key: held for key, held in self._before.items() if key in self._held})
            self._before = None
        for held in self._held.values():
            held[number] = False
        self._staged, self._running, self._left = None, None, []
        self._paused, self._recovery = True, None
        if not self.ranks.alive:
            raise WaveError("the last rank has died: nothing can be served any more; start the engine anew")
        self.mechanism.rank_failed(0, number, len(self.ranks.alive))
        copies = [*([self._copying] if self._copying else []), *self._copies]
        self._copying, self._copies = None, deque()
        for transfer in copies:
            if transfer.target is Tier.DEVICE:
                self.mechanism.transfer_done(transfer)  # nowhere, in truth: recovery gives up what nobody uses
            else:
                for block in transfer.blocks:
                    self._host.drop(block.id)
                self.mechanism.transfer_failed(transfer)

    def _deal(self, before: Any) -> None:
        shape = self.shape
        self.sharding = deal(self._placement, self.ranks.alive, shape.layers, shape.kv_heads, shape.shards, before)

    def _adopt(self, then: Callable[[dict[int, Any]], None]) -> None:
        self._ask("adopt", dict.fromkeys(self.sharding.ranks, (self.sharding,)), then)

    def _restore(self, recovery: Recovery) -> None:
        """Deal anew, see what is lost, bring back what is needed; requests whose KV nobody has wait again. Own KV of requests is made again as they go on."""
        begun = time.monotonic()
        self._recovery = None
        self.ranks.calm()
        self._deal(self.sharding if recovery in (Recovery.FULL, Recovery.ORACLE) else None)
        self._unsettled = set()
        for number, sequence in list(self.sequences.items()):
            self._give_up_own(sequence)
            if number not in self.mechanism.requests:
                del self.sequences[number]
            elif not sequence.decoding or recovery is Recovery.RECOMPUTE:
                self._restart(sequence)
        moves: dict[int, list[Move]] = {}
        for number in [number for number, each in self.sequences.items() if each.decoding]:
            before = {key: self._held[key].copy() for key in self.sequences[number].request.blocks if key in self._held}
            try:
                for rank, each in self._missing([number]).items():
                    moves.setdefault(rank, []).extend(each)
            except KeyError:
                self._held.update(before)
                self._restart(self.sequences[number])
        self.mechanism.lose(0, list(self.mechanism.instances[0].blocks), Tier.DEVICE)
        self._adopt(lambda results: self._refill(recovery, begun, sum(results.values()), moves))

    def _refill(self, recovery: Recovery, begun: float, weights: int, moves: dict[int, list[Move]]) -> None:
        """Sources first: what one rank takes from another is there before anybody computes."""
        self._remember()
        self._take(moves, lambda results: self._recovered(recovery, begun, weights, sum(results.values())))

    def _recovered(self, recovery: Recovery, begun: float, weights: int, kv: int) -> None:
        seconds, ranks = time.monotonic() - begun, len(self.sharding.ranks)
        self.statistics.recoveries.append({"how": float(recovery), "ranks": ranks, "seconds": seconds, "weights_bytes": weights, "kv_bytes": kv})
        self._paused = False
        pool = self.device_tokens * ranks // self.ranks.sizes.ranks
        self.mechanism.recovered(0, ranks, round(seconds * 1e9), pool)

    def _give_up_own(self, sequence: Sequence_) -> None:
        self._device.give(sequence.slots[sequence.own])
        sequence.slots[sequence.own] = -1
        sequence.own[:] = False
        sequence.computed = min(sequence.computed, sum(sequence.request.sizes[: sequence.adopted]))

    def _restart(self, sequence: Sequence_) -> None:
        """Its prompt is computed again; what it has said stays said."""
        if sequence.computed or sequence.request.computed:
            self.mechanism.restart_prefill(sequence.request)
        sequence.slots[:] = -1
        sequence.computed = sequence.adopted = 0
        sequence.decoding = False
