"""What a scenario of virtual machines says: `subsystem = "vm"` at its top. Its policies are those of `sched`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from waveos.scenario import Agent, File, LinkPart, Part, Policies

_Share = Annotated[float, Field(gt=0, le=1)]
_Positive = Annotated[float, Field(gt=0)]


class Machines(Part):
    """The host and its machines. One of the part's cores stays the host's own; an on-host agent polls there."""

    part: str = Field(default="xeon-8468v", description="the server part: turbo bins, sleep states, siblings; a name or TOML file")
    host: str = Field(default="server", description="a host profile's name or TOML file: what switches, interrupts and ticks cost")
    cores: Annotated[int, Field(ge=1, le=63)] = Field(default=47, description="physical cores for machines, two CPUs each, a whole number 1..63")
    machines: Annotated[int, Field(ge=1, le=256)] = Field(default=47, description="virtual machines, a whole number 1..256")
    vcpus: Annotated[int, Field(ge=1, le=128)] = Field(default=2, description="vCPUs of each, a whole number 1..128")
    busy_shares: list[_Share] = Field(
        default=[0.1, 0.25, 0.5, 0.75, 1.0], min_length=1, description="a list: the part of the machines that compute, each above 0 and at most 1"
    )
    ticks: Literal["periodic", "nohz_idle"] = Field(
        default="periodic", description='what ticks are where they are on: "periodic" on all CPUs, or "nohz_idle", on busy ones alone'
    )


class MachineRun(Part):
    """How long, and from which seed."""

    seed: Annotated[int, Field(ge=0)] = Field(default=1, description="a whole number, 0 or more")
    duration_ms: _Positive = Field(default=400.0, description="virtual milliseconds that count, a number above 0")
    warmup_ms: Annotated[float, Field(ge=0)] = Field(default=60.0, description="virtual milliseconds before counting, 0 or more")


class VmScenario(File):
    """Virtual machines on one socket, placed by each policy in turn, with the host's ticks and without."""

    subsystem: Literal["vm"] = Field(default="vm", description='"vm"')
    vm: Machines = Field(default_factory=Machines, description="a [vm] table")
    link: LinkPart = Field(default_factory=LinkPart, description="a [link] table")
    agent: Agent = Field(default_factory=lambda: Agent(message_ns=100.0), description="an [agent] table")
    policies: Policies = Field(default_factory=lambda: Policies(names=["vm", "vm_coscheduling"]), description="a [policies] table")
    run: MachineRun = Field(default_factory=MachineRun, description="a [run] table")


SCHEMA = VmScenario
