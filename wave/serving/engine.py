"""The seam between Wave and a serving engine: what an engine must be able to do, and what it tells.

`Engine` is what a plugin of vLLM or SGLang would implement; Wave's own are the emulated one and the reference one. It acts and does not decide: it is told
by `waveos.serving.mechanism.Mechanism` what to do, all of it checked, and calls that mechanism's `batch_started`, `batch_done`, `transfer_done`,
`request_done` and `rank_failed` when it has happened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from waveos.serving.records import Placement, Recovery, Tier


@dataclass(slots=True, eq=False)
class Block:
    """KV of consecutive tokens of a prompt; its id stands for the whole prompt up to its end."""

    id: int
    parent: int
    tokens: int
    tiers: int = 0
    users: int = 0  # requests and transfers that need it on the device; never evicted from there while positive
    readers: int = 0  # transfers that read it in host memory; never evicted from there while positive
    transfer: Transfer | None = None  # under way to the device: counts as held there


@dataclass(slots=True, eq=False)
class Transfer:
    """Blocks on their way from one tier to another. `request` is -1 where none asked."""

    instance: int
    blocks: list[Block]
    source: Tier
    target: Tier
    request: int = -1
    done: bool = False

    @property
    def tokens(self) -> int:
        return sum(block.tokens for block in self.blocks)


@dataclass(slots=True, eq=False)
class Request:
    """One request on the host. `computed` tokens of its prompt are on the device or are loaded with its batch."""

    number: int
    instance: int
    prompt: int
    outputs: int
    blocks: list[int]
    sizes: list[int]
    seq: int = 1
    state: str = "waiting"  # waiting, prefilling, decoding
    computed: int = 0
    hit: int = 0  # tokens that were not computed for it
    locked: int = 0  # its leading blocks that it keeps on the device
    reserved: int = 0  # device tokens kept for what it has yet to compute and to generate
    home: int = 0
    chunks: int = 0  # parts that are staged or run
    prefetch: Transfer | None = None


@dataclass(slots=True, eq=False)
class Part:
    """A share of a batch: compute `tokens` of the request's prompt from token `begin` on."""

    request: Request
    begin: int
    tokens: int


@dataclass(slots=True, eq=False)
class Batch:
    """Parts to be prefilled together, once the transfers have brought what they build on."""

    instance: int
    parts: list[Part]
    transfers: list[Transfer] = field(default_factory=list)
    decode_first: bool = False
    mixed: bool = False


class Engine(Protocol):
    """What acts. No call waits: each begins something whose end the engine reports to the mechanism."""

    def move(self, transfer: Transfer) -> None:
        """Begin to copy blocks between tiers; transfers on one wire share it."""

    def stop(self, transfer: Transfer) -> None:
        """Stop a copy. What has arrived in full is reported by `transfer_done` with the rest taken out of `blocks`."""

    def run(self, batch: Batch) -> None:
        """Run the batch after the one that runs now, with its layers as their loads arrive."""

    def free(self, instance: int, block: Block, tier: Tier) -> None:
        """The block is held in that tier no more: its place may be used again."""

    def drop(self, request: Request) -> None:
        """Forget a request that decodes, or of whose prompt a part is computed: its client left."""

    def place(self, instance: int, placement: Placement) -> None:
        """Deal the KV heads anew."""

    def recover(self, instance: int, recovery: Recovery, running: Sequence[Request]) -> None:
        """Make the instance run on the ranks that are alive."""
