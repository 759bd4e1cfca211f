"""A server part: turbo bins and sleep states as published, power as assumed; and what frequency comes of them.

`data/parts/NAME.toml`; `[published]` and `[assumed]` keep the two apart, `[sources]` names a source for every figure.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from waveos.errors import ConfigError
from waveos.names import nearest

DATA = Path(__file__).parents[1] / "data"
_Positive = Annotated[float, Field(gt=0)]
_Share = Annotated[float, Field(ge=0, le=1)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Sleep(_Table):
    """A sleep state: worst-case time to leave it, the stay from which on it is worth entering, and whether the core still counts for the turbo bins."""

    name: str
    exit_us: _Positive
    residency_us: _Positive
    active: bool


class Published(_Table):
    """What the maker, or a machine, says of the part."""

    cores: Annotated[int, Field(ge=2, le=512)]
    threads_per_core: Literal[2]
    base_mhz: _Positive
    turbo_cores: list[Annotated[int, Field(ge=1)]] = Field(min_length=1)
    turbo_mhz: list[_Positive] = Field(min_length=1)
    sleep: list[Sleep] = Field(min_length=2, max_length=2)

    @model_validator(mode="after")
    def _consistent(self) -> Published:
        if len(self.turbo_cores) != len(self.turbo_mhz) or sorted(self.turbo_cores) != self.turbo_cores or self.turbo_cores[-1] != self.cores:
            raise ValueError(f"turbo_cores rise to the part's {self.cores} cores, with one of turbo_mhz each")
        if sorted(self.turbo_mhz, reverse=True) != self.turbo_mhz or self.turbo_mhz[-1] < self.base_mhz:
            raise ValueError("turbo_mhz fall with the number of active cores, and not below base_mhz")
        if not self.sleep[0].active or self.sleep[1].active:
            raise ValueError("sleep names two states: a shallow one (active = true), then a deep one (active = false)")
        return self


class Assumed(_Table):
    """What nobody publishes. Powers are shares of what a core draws at base frequency under the load that defines the part's TDP."""

    load_share: Annotated[float, Field(gt=0, le=1)]
    shallow_share: _Share
    deep_share: _Share
    power_exponent: Annotated[float, Field(ge=1)]
    smt_gain: _Share
    control_us: Annotated[float, Field(ge=0)]
    exit_share: _Share


class Part(_Table):
    """One socket."""

    name: str
    about: str
    verified: bool
    between: Literal["steps", "line"]
    published: Published
    assumed: Assumed
    sources: dict[str, str]

    @model_validator(mode="after")
    def _has_sources(self) -> Part:
        wanted = {*Published.model_fields, *Assumed.model_fields}
        if missing := wanted - set(self.sources):
            raise ValueError(f"[sources] names none for {', '.join(sorted(missing))}")
        return self

    @property
    def shallow(self) -> Sleep:
        """The sleep in which a core still counts as active."""
        return self.published.sleep[0]

    @property
    def deep(self) -> Sleep:
        """The sleep in which it does not."""
        return self.published.sleep[1]

    def exit_ns(self, sleep: Sleep) -> int:
        """What waking from that sleep takes on average."""
        return round(sleep.exit_us * 1_000 * self.assumed.exit_share)

    def ceiling_mhz(self, active: int) -> float:
        """The turbo limit with so many cores active."""
        cores, mhz = self.published.turbo_cores, self.published.turbo_mhz
        if active <= cores[0]:
            return mhz[0]
        at = next(i for i, most in enumerate(cores) if active <= most)
        if self.between == "steps":
            return mhz[at]
        share = (active - cores[at - 1]) / (cores[at] - cores[at - 1])
        return mhz[at - 1] + share * (mhz[at] - mhz[at - 1])

    def power_mhz(self, awake: int, shallow: int, deep: int, woken_share: float) -> float:
        """The frequency at which the awake cores draw what is left of the part's power: it sustains all cores at base frequency under the heaviest load.

        `woken_share`: of the time of a core in deep sleep, what ticks take of it.
        """
        assumed = self.assumed
        idle = shallow * assumed.shallow_share + deep * (assumed.deep_share + woken_share * max(0.0, assumed.load_share - assumed.deep_share))
        left = self.published.cores - idle
        if awake == 0:
            return self.published.turbo_mhz[0]
        scale = float(max(0.0, left) / (awake * assumed.load_share)) ** (1 / assumed.power_exponent)
        return self.published.base_mhz * max(1.0, scale)


class Guests(_Table):
    """What a guest's work is like, and who polices the agent."""

    vm_exit_ns: Annotated[float, Field(ge=0)]
    memory_share: _Share
    burst_ms: _Positive
    pause_us: _Positive
    idle_wake_ms: _Positive
    idle_work_us: _Positive
    watch_ms: _Positive
    silent_ms: _Positive


@dataclass(frozen=True)
class Assumptions:
    """`data/vm.toml`: what is assumed of guests, and the published gain, which nothing is fitted to."""

    source: str
    guests: Guests
    gain_max: float


Model = TypeVar("Model", bound=BaseModel)


def part_names() -> list[str]:
    """Names of the shipped parts."""
    return sorted(path.stem for path in (DATA / "parts").glob("*.toml"))


def load_part(name: str, base: Path | None = None, scale: Mapping[str, float] | None = None) -> Part:
    """A part by name or by path of a TOML file (relative to `base`), each assumed figure times its `scale`, if any. Raises ConfigError."""
    path = DATA / "parts" / f"{name}.toml"
    if name.endswith(".toml"):
        path = Path(name) if base is None else base / name
    if not path.is_file():
        known = part_names()
        raise ConfigError(f"no part {name!r}{nearest(name, known)}; there are: {', '.join(known)}; or give a path ending in .toml")
    raw = _read(path)
    raw["assumed"] = _scaled(raw.get("assumed", {}), scale or {}, Assumed)
    return _validate(Part, raw, path)


def load_assumptions(scale: Mapping[str, float] | None = None) -> Assumptions:
    """What is assumed of guests, each figure times its `scale`, if any."""
    path = DATA / "vm.toml"
    raw = _read(path)
    guests = _validate(Guests, _scaled(raw["assumed"], scale or {}, Guests), path)
    return Assumptions(raw["source"], guests, raw["published"]["gain_max"])


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _scaled(figures: Mapping[str, Any], scale: Mapping[str, float], model: type[BaseModel]) -> dict[str, Any]:
    """The figures times their scales; a share stays one, and an exponent at least 1."""
    scaled = dict(figures)
    for name, factor in scale.items():
        if name not in scaled or name not in model.model_fields:
            continue
        bounds = {type(limit).__name__: limit for limit in model.model_fields[name].metadata}
        value = scaled[name] * factor
        if "Le" in bounds:
            value = min(value, bounds["Le"].le)
        if "Ge" in bounds:
            value = max(value, bounds["Ge"].ge)
        scaled[name] = value
    return scaled


def _validate(model: type[Model], raw: Any, path: Path) -> Model:
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"{path}: {place + ': ' if place else ''}{first['msg'].removeprefix('Value error, ')}, got {_short(first['input'])}"
        ) from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
