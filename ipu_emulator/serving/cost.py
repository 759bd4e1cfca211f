"""What a step of the emulated engine takes: prefill, decode, and bytes on wires.

Prefill and decode follow the limit model (`waveos.ipu_emulator.gpu`) with the shares of the hardware's rates that real engines reach; KV heads that do
not divide evenly make the rank with most of them the one all others wait for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from waveos.errors import ConfigError
from waveos.ipu_emulator.gpu import Gpu, Model, load_table
from waveos.serving import Placement

BYTES = 2
"""Of a parameter and of an element of cache: bf16."""
_C2C_BYTES_PER_S = 200e9
"""A wire to host memory that is faster than any PCIe is coherent."""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Given(_Table):
    """What the paper states."""

    source: str
    copy_s: float
    copy_c2c_s: float
    kernel_share: float
    kernel_c2c_share: float
    prefill_beside_load: float
    decode_beside_load: float
    storage_layer_first_bytes_per_s: float
    storage_page_first_bytes_per_s: float
    in_flight: int
    host_bytes: float


class Assumed(_Table):
    """What no source at hand states."""

    memory_share: float
    sync_s: float
    chunk_copy_s: float


class Fitted(_Table):
    """What was fitted, on one workload."""

    source: str
    compute_share: float
    layer_floor_s: float
    pool_share: float
    question_tokens: float
    question_sigma: float
    context_sigma: float


class Constants(_Table):
    """All constants of the engine."""

    verified: bool
    given: Given
    assumed: Assumed
    fitted: Fitted


@lru_cache(maxsize=1)
def load_constants() -> Constants:
    """The constants that ship with Wave."""
    return load_table(Constants, Path(__file__).parents[1] / "data" / "serving" / "strata.toml")


@dataclass(frozen=True)
class DataPlane:
    """How KV is moved: by `dma`, one copy for each page, layer and K or V; by a `kernel` on a few SMs; or by `chunk`, all layers of a page in one copy.

    With `overlap` a layer computes as soon as its KV is there. Storage keeps pages together (`page_first`) or layers.
    """

    mover: str = "kernel"
    page: int = 1
    overlap: bool = True
    page_first: bool = True

    def __post_init__(self) -> None:
        if self.mover not in ("dma", "kernel", "chunk", "oracle") or self.page < 1:
            raise ConfigError(f"data plane {self.mover!r}, page {self.page}: movers are dma, kernel, chunk, oracle; a page has at least one token")


@dataclass(frozen=True)
class Sharding:
    """KV heads dealt to n ranks: what the rank with most of them holds and computes, as shares of the whole."""

    heads: int
    ranks: int
    placement: Placement = Placement.HYBRID

    @property
    def spread(self) -> int:
        """Heads that every rank has, for all requests."""
        return self.heads // self.ranks

    @property
    def extra(self) -> int:
        """Heads that are left."""
        return self.heads % self.ranks

    @property
    def most(self) -> float:
        """Largest share of the heads of one layer."""
        return -(-self.heads // self.ranks) / self.heads

    def memory_share(self) -> float:
        """Largest share of the KV of all layers that one rank holds."""
        return self.most if self.placement == Placement.STATIC else 1.0 / self.ranks

    def attention_share(self, home_share: float) -> float:
        """Largest share of attention; `home_share` of the requests' tokens have the busiest rank as their home."""
        if self.placement == Placement.HYBRID:
            return (self.spread + self.extra * home_share) / self.heads
        return self.most

    def weight_share(self) -> float:
        """Largest share of the attention weights that one rank reads; heads at home are on every rank."""
        return (self.spread + self.extra) / self.heads if self.placement == Placement.HYBRID else self.most


class Costs:
    """Times of one instance, in seconds, for a model on a number of equal ranks."""

    def __init__(self, gpu: Gpu, model: Model, sharding: Sharding, plane: DataPlane, constants: Constants) -> None:
        if gpu.host_bytes_per_s is None or (sharding.ranks > 1 and gpu.peer_bytes_per_s is None):
            raise ConfigError(f"GPU {gpu.name!r} has no wires: it was only studied on paper; take h100, h200, b200 or gh200")
        self.gpu, self.model, self.sharding, self.plane, self.constants = gpu, model, sharding, plane, constants
        given, assumed, fitted = constants.given, constants.assumed, constants.fitted
        n = sharding.ranks
        heads = model.hidden * model.head_dim * 2 * (model.heads + (0 if model.latent else model.kv_heads))
        self.attention_bytes = BYTES * model.layers * heads
        self.rest_bytes = BYTES * model.parameters - self.attention_bytes
        self.kv_bytes = BYTES * model.kv_elements
        self.rank_kv_bytes = self.kv_bytes / n if model.latent is None else self.kv_bytes
        self.weights = self.rest_bytes / n + self.attention_bytes * sharding.weight_share()
        self.memory_rate = gpu.memory_bytes_per_s * assumed.memory_share
        self.flops = gpu.flops.bf16 * fitted.compute_share
        self.floor_s = model.layers * fitted.layer_floor_s
        self.syncs_s = 2 * model.layers * assumed.sync_s if n > 1 else 0.0
        self.reduce_s = 2 * model.layers * 2 * (n - 1) / n * model.hidden * BYTES / gpu.peer_bytes_per_s if n > 1 and gpu.peer_bytes_per_s else 0.0
        c2c = gpu.host_bytes_per_s > _C2C_BYTES_PER_S
        self.wire = gpu.host_bytes_per_s
        self.copy_s = given.copy_c2c_s if c2c else given.copy_s
        self.kernel_rate = self.wire * (given.kernel_c2c_share if c2c else given.kernel_share)
        by_kernel = plane.mover == "kernel"
        self.prefill_beside_load = given.prefill_beside_load if by_kernel else 1.0
        self.decode_beside_load = given.decode_beside_load if by_kernel else 1.0
        self.storage_rate = given.storage_page_first_bytes_per_s if plane.page_first else given.storage_layer_first_bytes_per_s
        # One token of prefill beyond attention, of which the projections of heads wait for the rank with most of them.
        attention_flops = 2.0 * model.layers * heads
        self.token_flops = (model.flops_per_token - attention_flops) / n + attention_flops * self._projection_share()

    def _projection_share(self) -> float:
        """Projections of heads at home are computed where the request is at home, evenly at best."""
        return 1.0 / self.sharding.ranks if self.sharding.placement == Placement.HYBRID else self.sharding.most

    @property
    def pool_tokens(self) -> int:
        """Tokens of KV that fit beside the weights. Raises ConfigError if the weights alone do not."""
        room = self.gpu.memory_bytes * self.constants.fitted.pool_share - self.weights
        per_token = self.kv_bytes * (self.sharding.memory_share() if self.model.latent is None else 1.0)
        if room < per_token:
            raise ConfigError(
                f"{self.model.name} on {self.sharding.ranks} x {self.gpu.name} does not fit: weights take {self.weights / 2**30:.0f} GiB of each GPU's "
                f"{self.gpu.memory_bytes / 2**30:.0f}; use more ranks"
            )
        return int(room / per_token)

    def prefill_s(self, parts: list[tuple[int, int]], home_share: float | None = None) -> float:
        """A batch of (first token, tokens) without waiting for loads; `home_share` of its attention falls on the busiest rank."""
        tokens = sum(count for _, count in parts)
        pairs = sum(count * (begin + 0.5 * count) for begin, count in parts)
        share = self.sharding.attention_share(1.0 / self.sharding.ranks if home_share is None else home_share)
        compute = (tokens * self.token_flops + pairs * self.model.flops_per_pair * share) / self.flops
        cached = sum(begin for begin, _ in parts) * self.kv_bytes * share
        memory = (self.weights + cached) / self.memory_rate
        return max(self.floor_s, compute, memory) + tokens * self.reduce_s + self.syncs_s

    def decode_line(self, requests: int, home_share: float | None = None) -> tuple[float, float, float]:
        """One iteration of decode takes max(least, fixed + kv_tokens * slope) seconds: (least, fixed, slope)."""
        share = self.sharding.attention_share(1.0 / self.sharding.ranks if home_share is None else home_share)
        active = self.weights
        if self.model.experts is not None:
            active -= BYTES * (self.model.parameters - self.model.active_parameters(requests)) / self.sharding.ranks
        fixed = active / self.memory_rate + self.syncs_s + requests * self.reduce_s
        least = requests * self.token_flops / self.flops + self.syncs_s
        return least, fixed, self.kv_bytes * share / self.memory_rate

    def load_s(self, tokens: int) -> float:
        """Seconds that these tokens' KV takes from host memory, or to it: all ranks at once, each its share."""
        size = tokens * self.rank_kv_bytes
        if self.plane.mover == "oracle":
            return 0.0
        if self.plane.mover == "kernel":
            return size / self.kernel_rate
        pages = -(-tokens // self.plane.page)
        if self.plane.mover == "chunk":
            return pages * self.constants.assumed.chunk_copy_s + size / self.wire
        copies = pages * self.model.layers * (1 if self.model.latent else 2)
        return copies * self.copy_s + size / self.wire

    def storage_s(self, tokens: int) -> float:
        """Seconds that these tokens' KV takes from storage to host memory."""
        return tokens * self.kv_bytes / self.storage_rate
