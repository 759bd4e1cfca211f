"""GPUs and models as data, and the limit model: how long a step of inference takes at best.

The equation is that of "Efficient LLM Inference: Bandwidth, Compute, Synchronization, and Capacity are all you need" (arXiv 2507.14397):
a step takes the longer of arithmetic and memory traffic, and on top the collectives that nothing hides.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from waveos.errors import ConfigError
from waveos.names import nearest

_DATA = Path(__file__).parent / "data"
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Flops(_Table):
    """Dense arithmetic a second."""

    bf16: Positive
    fp8: Positive


class Gpu(_Table):
    """One chip. Wires have one direction's rate; a chip that was only studied on paper has none."""

    name: str
    verified: bool
    source: str
    memory_bytes_per_s: Positive
    memory_bytes: Positive
    host_bytes_per_s: Positive | None = None
    peer_bytes_per_s: Positive | None = None
    flops: Flops


class Experts(_Table):
    """A mixture of experts: `active` of `routed` compute for each token, in `layers` of the layers."""

    routed: Count
    active: Count
    ffn: Count
    layers: Count


class Model(_Table):
    """The shape of a decoder-only transformer."""

    name: str
    verified: bool
    source: str
    parameters: Positive
    layers: Count
    hidden: Count
    heads: Count
    kv_heads: Count
    head_dim: Count
    latent: Count | None = None
    ffn: Count
    vocabulary: Count
    experts: Experts | None = None

    @property
    def kv_elements(self) -> int:
        """Elements of cache that one token takes, over all layers."""
        return self.layers * (self.latent or 2 * self.kv_heads * self.head_dim)

    @property
    def expert_parameters(self) -> float:
        """Parameters of one routed expert, over all layers."""
        return 3.0 * self.experts.layers * self.hidden * self.experts.ffn if self.experts else 0.0

    def active_parameters(self, tokens: float = 1.0) -> float:
        """Parameters that a step over `tokens` reads: with experts, the expected number of distinct ones if tokens choose evenly."""
        if self.experts is None:
            return self.parameters
        routed, active = self.experts.routed, self.experts.active
        return self.parameters - self.expert_parameters * routed * (1.0 - active / routed) ** tokens

    @property
    def flops_per_token(self) -> float:
        """Arithmetic of one token without attention: a multiplication and an addition for each parameter that is active for it."""
        return 2.0 * self.active_parameters(1.0)

    @property
    def flops_per_pair(self) -> float:
        """Arithmetic of attention for one pair of a query and a token of context, over all layers."""
        per_head = 2.0 * (2 * self.latent - 64) if self.latent else 4.0 * self.head_dim
        return self.layers * self.heads * per_head


class LimitConstants(_Table):
    """The constants of the limit study."""

    source: str
    verified: bool
    bytes_per_parameter: Positive
    bytes_per_kv_element: Positive
    syncs_per_layer: Count
    near_sync_s: float
    far_sync_s: float
    near_chips: Count
    published: dict[str, int]

    def exposed_s(self, model: Model, chips: int, sync_s: float | None = None) -> float:
        """Seconds a step spends in collectives; none on one chip."""
        if chips == 1:
            return 0.0
        return (
            model.layers
            * self.syncs_per_layer
            * (sync_s if sync_s is not None else self.near_sync_s if chips <= self.near_chips else self.far_sync_s)
        )


@dataclass(frozen=True)
class Step:
    """What bounds one step of decode."""

    memory_s: float
    compute_s: float
    exposed_s: float
    needed_bytes: float
    capacity_bytes: float

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.capacity_bytes

    @property
    def total_s(self) -> float:
        return max(self.memory_s, self.compute_s) + self.exposed_s

    @property
    def bound(self) -> str:
        """What takes longest."""
        parts = {"memory": self.memory_s, "compute": self.compute_s, "synchronisation": self.exposed_s}
        return max(parts, key=lambda name: parts[name])


def decode_step(gpu: Gpu, model: Model, chips: int, context: int, batch: int = 1, sync_s: float | None = None) -> Step:
    """One token for each of `batch` users with `context` tokens, on `chips` that share the model by tensor parallelism. Attainable at best: a limit."""
    constants = load_limits()
    kv = batch * context * model.kv_elements * constants.bytes_per_kv_element
    flops = gpu.flops.fp8 if constants.bytes_per_parameter == 1 else gpu.flops.bf16
    return Step(
        memory_s=(kv + model.active_parameters(batch) * constants.bytes_per_parameter) / (chips * gpu.memory_bytes_per_s),
        compute_s=batch * (model.flops_per_token + context * model.flops_per_pair) / (chips * flops),
        exposed_s=constants.exposed_s(model, chips, sync_s),
        needed_bytes=kv + model.parameters * constants.bytes_per_parameter,
        capacity_bytes=chips * gpu.memory_bytes,
    )


def gpu_names() -> list[str]:
    """Names of the GPUs that ship with Wave."""
    return sorted(path.stem for path in (_DATA / "gpus").glob("*.toml"))


def model_names() -> list[str]:
    """Names of the models that ship with Wave."""
    return sorted(path.stem for path in (_DATA / "models").glob("*.toml"))


def load_gpu(name: str) -> Gpu:
    """A GPU by name, or by the path of a TOML file. Raises ConfigError."""
    return load_table(Gpu, _find("gpus", "GPU", name, gpu_names()))


def load_model(name: str) -> Model:
    """A model by name, or by the path of a TOML file. Raises ConfigError."""
    return load_table(Model, _find("models", "model", name, model_names()))


@lru_cache(maxsize=1)
def load_limits() -> LimitConstants:
    """The constants of the limit study."""
    return load_table(LimitConstants, _DATA / "limits.toml")


Kind = TypeVar("Kind", bound=BaseModel)


def load_table(kind: type[Kind], path: Path) -> Kind:
    """A TOML file as a checked table. Raises ConfigError with the key that is wrong."""
    try:
        return kind.model_validate(tomllib.loads(path.read_text()))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{path}: {'.'.join(str(part) for part in first['loc'])}: {first['msg'].lower()}, got {first['input']!r}") from error


def _find(folder: str, kind: str, name: str, known: list[str]) -> Path:
    path = Path(name) if name.endswith(".toml") else _DATA / folder / f"{name}.toml"
    if not path.is_file():
        raise ConfigError(f"no {kind} {name!r}{nearest(name, known)}; there are: {', '.join(known)}; or give a path ending in .toml")
    return path
