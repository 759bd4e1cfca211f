"""Which rank owns which KV head and which shard of the feed-forward layer, on any number of ranks (FailSafe, arXiv 2511.14116, section 3)."""

from __future__ import annotations

from dataclasses import dataclass

from waveos.serving import Placement

HOME = -1
"""Owner of a head that lives on each request's home rank."""


@dataclass(frozen=True)
class Sharding:
    """Owners over the ranks in use: heads[layer][head] is a rank or HOME, shards[shard] a rank."""

    ranks: tuple[int, ...]
    heads: tuple[tuple[int, ...], ...]
    shards: tuple[int, ...]

    def home(self, number: int) -> int:
        """The rank that is home number `number`."""
        return self.ranks[number % len(self.ranks)]


def deal(placement: Placement, ranks: list[int], layers: int, heads: int, shards: int, before: Sharding | None = None) -> Sharding:
    """Deal everything to these ranks. With `before` as much as possible stays where it is: what is moved is what was lost, or what a new rank takes."""
    rows = []
    for layer in range(layers):
        if placement is Placement.HYBRID:
            rows.append(_spread(ranks, heads, before.heads[layer] if before else None))
        else:
            shift = layer % len(ranks) if placement is Placement.CYCLIC else 0
            rows.append(_even(ranks[shift:] + ranks[:shift], heads))
    return Sharding(tuple(ranks), tuple(rows), _kept(ranks, shards, before.shards) if before else _even(ranks, shards))


def _even(ranks: list[int], units: int) -> tuple[int, ...]:
    """Runs of units, the first ranks with one more if they do not divide evenly."""
    each, more = divmod(units, len(ranks))
    return tuple(rank for at, rank in enumerate(ranks) for _ in range(each + (at < more)))


def _spread(ranks: list[int], heads: int, before: tuple[int, ...] | None) -> tuple[int, ...]:
    """Each rank owns as many heads as divide evenly; the others live at home."""
    room = dict.fromkeys(ranks, heads // len(ranks))
    owners = [HOME] * heads
    for head, owner in enumerate(before or ()):
        if room.get(owner, 0):
            owners[head] = owner
            room[owner] -= 1
    free = [rank for rank in ranks for _ in range(room[rank])]
    for head in range(heads):
        if owners[head] == HOME and free:
            owners[head] = free.pop(0)
    return tuple(owners)


def _kept(ranks: list[int], units: int, before: tuple[int, ...]) -> tuple[int, ...]:
    """Units stay with the ranks that are left; lost ones go to whoever has least, and a rank without takes from whoever has most."""
    owners = [owner if owner in ranks else HOME for owner in before]
    count = {rank: owners.count(rank) for rank in ranks}
    for unit in range(units):
        if owners[unit] == HOME:
            owners[unit] = min(ranks, key=lambda rank: count[rank])
            count[owners[unit]] += 1
    while max(count.values()) - min(count.values()) > 1:
        most, least = max(ranks, key=lambda rank: count[rank]), min(ranks, key=lambda rank: count[rank])
        owners[owners.index(most)] = least
        count[most] -= 1
        count[least] += 1
    return tuple(owners)
