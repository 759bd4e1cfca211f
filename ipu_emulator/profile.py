"""Profiles: what a link, and a host core, cost. TOML files with `source` and `verified`; every number is in nanoseconds unless its key says otherwise."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from waveos.errors import ConfigError
from waveos.names import nearest
from waveos.paths import cache_dir
from waveos.record import RECORD_WORDS

MITIGATIONS = ("wb", "wc_wt", "prestage", "prefetch")
COLD = 12
"""Steps of `cold_ns` at most: step k is for up to 2**k turns of others on the CPU since the thread's own last one."""
Ns = Annotated[int, Field(ge=0, le=10**9)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class HostSide(_Table):
    """A host core on the shared memory: uncached word by word, or write-combining and write-through by the line."""

    source: str
    uc_read_ns: Ns
    uc_write_ns: Ns
    wc_write_ns: Ns
    wc_flush_ns: Ns
    wt_read_ns: Ns
    wt_hit_ns: Ns
    invalidate_ns: Ns


class AgentSide(_Table):
    """An agent core on its own memory: uncached word by word, or write-back by the line."""

    source: str
    uc_read_ns: Ns
    uc_write_ns: Ns
    wb_read_ns: Ns
    wb_write_ns: Ns


class Wire(_Table):
    """When the other side sees a posted write."""

    source: str
    one_way_ns: Ns


class Doorbell(_Table):
    """The interrupt from the agent to a host core."""

    source: str
    send_ns: Ns
    ioctl_ns: Ns
    wire_ns: Ns
    receive_ns: Ns


class Dma(_Table):
    """Bulk transfer."""

    source: str
    setup_ns: Ns
    bytes_per_us: Annotated[int, Field(gt=0)]


class LinkProfile(_Table):
    """One kind of link."""

    name: str
    verified: bool
    source: str
    coherent: bool
    relative_speed: Annotated[float, Field(gt=0)]
    host: HostSide
    agent: AgentSide
    wire: Wire
    doorbell: Doorbell
    dma: Dma


class HostProfile(_Table):
    """Costs on one host core."""

    name: str
    verified: bool
    source: str
    entry_ns: Ns
    switch_ns: Ns
    wake_ns: Ns
    pick_ns: Ns
    ipi_wire_ns: Ns
    interrupt_ns: Ns
    tick_period_us: Annotated[int, Field(ge=0)]
    tick_ns: Ns
    cold_ns: Annotated[tuple[Ns, ...], Field(max_length=COLD)] = ()
    """What a thread takes longer for others that have run on its CPU since it did: after up to 1, 2, 4, ... turns of theirs; of more, or after another CPU, the
    last. Empty: switch_ns is all. Of scheduling alone."""
    resume_ns: Ns = 0
    """What a thread that was preempted, and the one that had the CPU in its place, lose of their caches to each other; charged when it goes on. Likewise."""

    @model_validator(mode="after")
    def _ticks_leave_time(self) -> HostProfile:
        if self.tick_period_us and self.tick_ns >= 1_000 * self.tick_period_us:
            raise ValueError(f"a tick of {self.tick_ns} ns every {self.tick_period_us} us leaves no time to run anything")
        return self


@dataclass(frozen=True)
class LinkCosts:
    """What one operation on the link costs the core that does it, with the chosen mitigations.

    Uncached, a record is eight words; a write-combined or cached record is one line. A read of a line that may be stale is an invalidation and a fill.
    A prefetch works on cacheable mappings only: it starts the fill when the host core enters the kernel, and what is left of it stalls.
    """

    host_write_ns: int  # one record
    host_flush_ns: int  # after a batch: payload, then the word that publishes it
    host_read_ns: int  # one record
    host_peek_ns: int  # find that there is none
    host_hit_ns: int  # read what a prefetch has brought
    prefetch: bool
    prestage: bool
    agent_read_ns: int
    agent_write_ns: int
    wire_ns: int
    kick_send_ns: int
    kick_wire_ns: int
    kick_receive_ns: int


def link_costs(profile: LinkProfile, mitigations: Iterable[str] = MITIGATIONS) -> LinkCosts:
    """The costs of a link with these mitigations on. Raises ConfigError on a mitigation that does not exist.

    On a coherent link both sides are always mapped cacheable: `wb` and `wc_wt` change nothing there.
    """
    chosen = set(mitigations)
    for name in chosen - set(MITIGATIONS):
        raise ConfigError(f"no mitigation {name!r}{nearest(name, MITIGATIONS)}; there are: {', '.join(MITIGATIONS)}")
    lines = profile.coherent or "wc_wt" in chosen
    own = profile.coherent or "wb" in chosen
    host, agent = profile.host, profile.agent
    return LinkCosts(
        host_write_ns=host.wc_write_ns if lines else RECORD_WORDS * host.uc_write_ns,
        host_flush_ns=2 * host.wc_flush_ns if lines else 0,
        host_read_ns=host.invalidate_ns + host.wt_read_ns if lines else RECORD_WORDS * host.uc_read_ns,
        host_peek_ns=host.invalidate_ns + host.wt_read_ns if lines else host.uc_read_ns,
        host_hit_ns=host.wt_hit_ns,
        prefetch=lines and "prefetch" in chosen,
        prestage="prestage" in chosen,
        agent_read_ns=agent.wb_read_ns if own else RECORD_WORDS * agent.uc_read_ns,
        agent_write_ns=agent.wb_write_ns if own else RECORD_WORDS * agent.uc_write_ns,
        wire_ns=profile.wire.one_way_ns,
        kick_send_ns=profile.doorbell.send_ns,
        kick_wire_ns=profile.doorbell.wire_ns,
        kick_receive_ns=profile.doorbell.receive_ns,
    )


Kind = TypeVar("Kind", LinkProfile, HostProfile)
_DATA = Path(__file__).parent / "data"


def user_profiles(folder: str) -> Path:
    """Where this user's own profiles are, those of `wave calibrate`: `folder` is "links" or "hosts"."""
    return cache_dir("profiles") / folder


def profile_names(folder: str) -> list[str]:
    """Names of the shipped profiles: `folder` is "links" or "hosts"."""
    return sorted(path.stem for path in (_DATA / folder).glob("*.toml"))


def load_link(name: str, base: Path | None = None) -> LinkProfile:
    """A link profile by name or by path of a TOML file (relative to `base`). Raises ConfigError."""
    return _load(LinkProfile, "links", name, base)


def load_host(name: str, base: Path | None = None) -> HostProfile:
    """A host profile by name or by path of a TOML file (relative to `base`). Raises ConfigError."""
    return _load(HostProfile, "hosts", name, base)


def _load(kind: type[Kind], folder: str, name: str, base: Path | None) -> Kind:
    path = _DATA / folder / f"{name}.toml"
    if not path.is_file():
        path = user_profiles(folder) / f"{name}.toml"
    if name.endswith(".toml"):
        path = Path(name) if base is None else base / name
    if not path.is_file():
        known = profile_names(folder)
        if name == "this-machine":
            raise ConfigError(f"no {folder[:-1]} profile 'this-machine' yet: run `wave calibrate`, which measures it")
        raise ConfigError(f"no {folder[:-1]} profile {name!r}{nearest(name, known)}; there are: {', '.join(known)}; or give a path ending in .toml")
    try:
        raw: dict[str, Any] = tomllib.loads(path.read_text())
        return kind.model_validate(raw)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{path}: {'.'.join(str(part) for part in first['loc'])}: {first['msg'].lower()}, got {first['input']!r}") from error
