"""One rank of the reference engine: a process that stands for a GPU, with its share of the weights and of the KV.

It does what it is told over its pipe, one command after another, and answers each with ("done" | "aborted", number, result). In a step the ranks meet twice
in each layer. A rank that was killed never comes: the engine sees it end and aborts the step for the others, who go back to their pipes.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from waveos.host.serving.layout import to_device, to_host
from waveos.host.serving.memory import Shared, Sizes
from waveos.host.serving.model import HEAD_ARRAYS, SHARD_ARRAYS, Floats, Ints, attended, head_inputs, logits, normed, shard_term
from waveos.host.serving.sharding import HOME, Sharding

LOOK_S = 0.02
"""How often a rank that waits for others looks whether the step was aborted."""
FROM_HOST = -1


@dataclass
class Segment:
    """A run of tokens of one request in a step: `count` rows, the positions from `first` on. `slots` are the device's, of all positions up to the last."""

    count: int
    first: int
    slots: Ints
    home: int


@dataclass
class Step:
    """One forward pass: tokens of all segments, one after the other. Logits are wanted after the last token of each."""

    tokens: Ints
    segments: list[Segment]


@dataclass
class Move:
    """Bring one head of one layer into this rank's device slots: from host memory's slots, or from the same slots of another rank's device."""

    layer: int
    head: int
    slots: Ints
    source: int = FROM_HOST
    host_slots: Ints = field(default_factory=lambda: np.zeros(0, np.int64))


class Aborted(Exception):
    """Another rank will not come."""


class Rank:
    """The state of one rank."""

    def __init__(self, number: int, shared: Shared, sizes: Sizes, gates: Any, engine: int) -> None:
        self.number, self.shared, self.shape, self.gates, self.engine = number, shared, sizes.shape, gates, engine
        self.device = shared["device"][number]
        self.held: dict[str, dict[tuple[int, int], Floats]] = {name: {} for name in (*HEAD_ARRAYS, *SHARD_ARRAYS)}
        self.sharding: Sharding | None = None
        self._met = 0

    def adopt(self, sharding: Sharding) -> int:
        """Own what the sharding says from now on. Bytes of weights that came from host memory; what is not owned any more is given up."""
        moved = 0
        for names, units in ((HEAD_ARRAYS, sharding.heads), (SHARD_ARRAYS, (sharding.shards,) * self.shape.layers)):
            wanted = {(layer, unit) for layer, row in enumerate(units) for unit, owner in enumerate(row) if owner in (self.number, HOME)}
            for name in names:
                held = self.held[name]
                for gone in held.keys() - wanted:
                    del held[gone]
                for new in wanted - held.keys():
                    held[new] = self.shared[f"weights.{name}"][new].copy()
                    moved += held[new].nbytes
        self.sharding = sharding
        return moved

    def take(self, moves: list[Move]) -> int:
        """Bring KV into this rank's device; its bytes."""
        for move in moves:
            if move.source == FROM_HOST:
                to_device(self.device, move.layer, move.head, move.slots, self.shared["host"], move.host_slots)
            else:
                others = self.shared["device"][move.source]
                self.device[move.layer, :, move.head, move.slots] = others[move.layer, :, move.head, move.slots]
        return sum(2 * 8 * self.shape.head_dim * len(move.slots) for move in moves)

    def give(self, moves: list[Move]) -> int:
        """Copy KV from this rank's device to host memory; its bytes."""
        for move in moves:
            to_host(self.shared["host"], move.host_slots, self.device, move.layer, move.head, move.slots)
        return sum(2 * 8 * self.shape.head_dim * len(move.slots) for move in moves)

    def step(self, step: Step) -> None:
        """This rank's share of a forward pass. Raises Aborted."""
        assert self.sharding is not None
        shared, shape, rows = self.shared, self.shape, len(step.tokens)
        x = shared["weights.embed"][step.tokens]
        everywhere = np.arange(rows)
        positions = np.concatenate([np.arange(each.first, each.first + each.count) for each in step.segments])
        begins = np.cumsum([0, *(each.count for each in step.segments)])
        spans = list(zip(step.segments, begins[:-1].tolist(), strict=True))
        at_home = [(each, begin) for each, begin in spans if each.home == self.number]
        for layer in range(shape.layers):
            h = normed(x)
            for head, owner in enumerate(self.sharding.heads[layer]):
                mine = spans if owner == self.number else at_home if owner == HOME else []
                if not mine:
                    continue
                chosen = everywhere if mine is spans else np.concatenate([np.arange(begin, begin + each.count) for each, begin in mine])
                shared["attention"][head, chosen] = self._attend(layer, head, h[chosen], positions[chosen], [each for each, _ in mine])
            self._meet()
            x = x + _summed(shared["attention"][:, :rows])
            h = normed(x)
            for shard, owner in enumerate(self.sharding.shards):
                if owner == self.number:
                    shared["feed"][shard, :rows] = shard_term(self.held, layer, shard, h)
            self._meet()
            x = x + _summed(shared["feed"][:, :rows])
        if self.number == self.sharding.ranks[0]:
            shared["logits"][: len(spans)] = logits({"head": shared["weights.head"]}, x[begins[1:] - 1])

    def _attend(self, layer: int, head: int, h: Floats, positions: Ints, segments: list[Segment]) -> Floats:
        """One head's term for these segments, whose rows `h` has one after the other; their new KV is written to the device first."""
        queries, keys, values = head_inputs(self.shape, self.held, layer, head, h, positions)
        seen, begin = np.empty_like(queries), 0
        device_keys, device_values = self.device[layer, 0, head], self.device[layer, 1, head]
        for each in segments:
            end = begin + each.count
            new = each.slots[each.first :]
            device_keys[new], device_values[new] = keys[begin:end], values[begin:end]
            seen[begin:end] = attended(queries[begin:end], device_keys[each.slots], device_values[each.slots], each.first)
            begin = end
        made: Floats = seen.reshape(len(h), -1) @ self.held["o"][layer, head]
        return made

    def _meet(self) -> None:
        """Wait until all ranks are here. Two gates in turn: who is through may knock for the next meeting while others still leave this one."""
        assert self.sharding is not None
        turn, self._met = self._met % 2, self._met + 1
        others = [rank for rank in self.sharding.ranks if rank != self.number]
        for rank in others:
            self.gates[rank][turn].release()
        for _ in others:
            while not self.gates[self.number][turn].acquire(timeout=LOOK_S):
                if self.shared["abort"][0] or not os.path.exists(f"/proc/{self.engine}"):
                    raise Aborted

    def calm(self) -> None:
        """After an abort: nobody knocks any more; forget who has."""
        self._met = 0
        for gate in self.gates[self.number]:
            while gate.acquire(block=False):
                pass


def _summed(terms: Floats) -> Floats:
    """In the order of the units, whoever made them."""
    total = terms[0].copy()
    for term in terms[1:]:
        total += term
    return total


def live(number: int, path: str, sizes: Sizes, gates: Any, pipe: Connection, engine: int) -> None:
    """A rank's life: until its engine is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the engine's to answer
    rank = Rank(number, Shared(sizes, path), sizes, gates, engine)
    try:
        while True:
            ticket, name, argument = pipe.recv()
            try:
                answer = getattr(rank, name)(*argument)
                pipe.send(("done", ticket, answer))
            except Aborted:
                pipe.send(("aborted", ticket, None))
    except (EOFError, OSError):
        return
