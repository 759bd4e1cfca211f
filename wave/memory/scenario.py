"""What a scenario of memory management says: `subsystem = "memory"` at its top."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from waveos.scenario import Agent, File, LinkPart, Part, Policies

_Positive = Annotated[float, Field(gt=0)]
_Share = Annotated[float, Field(gt=0, le=1)]


class Memory(Part):
    """The process whose memory is managed, and what its host charges."""

    gib: _Positive = Field(default=256.0, description="its size, a number of GiB above 0")
    batch_kib: Annotated[int, Field(ge=4, le=1_048_576)] = Field(default=256, description="a page batch, a whole number of KiB, a multiple of 4")
    costs: str = Field(default="zram", description="the costs of memory management on the host, a name or TOML file")


class Accesses(Part):
    """Who accesses what: closed-loop workers that each serve one GET after the other, and each GET accesses one page."""

    pattern: Literal["moving", "zipf", "recorded"] = Field(default="moving", description='"moving", "zipf" or "recorded"')
    workers: Annotated[int, Field(ge=1, le=1024)] = Field(default=16, description="threads that serve GETs, a whole number 1..1024")
    get_us: _Positive = Field(default=5.0, description="the mean time of a GET that finds its page resident, a number of microseconds above 0")
    get_sigma: Annotated[float, Field(ge=0)] = Field(default=0.3, description="standard deviation of the logarithm of that time, 0 or more")
    hot_share: _Share = Field(default=0.3, description="the part of the memory that is hot, above 0 and at most 1")
    stray_share: Annotated[float, Field(ge=0, le=1)] = Field(default=0.0001, description="the part of accesses that go anywhere, 0 to 1")
    move_s: Annotated[float, Field(ge=0)] = Field(default=60.0, description="how often the hot set moves fully, in seconds; 0: never")
    scrambled: bool = Field(default=False, description="true: the hot batches lie all over the memory; false: side by side")
    zipf_s: _Positive = Field(default=0.99, description="the exponent of the Zipf distribution, above 0")
    trace: str = Field(default="", description="a file of recorded accesses, .npz")


class MemoryRun(Part):
    """How long, and from which seed."""

    seed: Annotated[int, Field(ge=0)] = Field(default=1, description="a whole number, 0 or more")
    duration_s: _Positive = Field(default=192.0, description="virtual seconds that count, a number above 0")
    warmup_s: Annotated[float, Field(ge=0)] = Field(default=76.8, description="virtual seconds before counting, 0 or more")


class MemoryScenario(File):
    """A process whose cold pages are found and reclaimed, by each policy in turn, with the policy on the host and on the IPU."""

    subsystem: Literal["memory"] = Field(default="memory", description='"memory"')
    memory: Memory = Field(default_factory=Memory, description="a [memory] table")
    access: Accesses = Field(default_factory=Accesses, description="an [access] table")
    link: LinkPart = Field(default_factory=LinkPart, description="a [link] table")
    agent: Agent = Field(default_factory=Agent, description="an [agent] table")
    policies: Policies = Field(
        default_factory=lambda: Policies(names=["sol", "psi_backoff", "region_age", "clock", "static"]), description="a [policies] table"
    )
    run: MemoryRun = Field(default_factory=MemoryRun, description="a [run] table")


SCHEMA = MemoryScenario
