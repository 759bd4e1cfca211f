"""What a scenario of the network says: `subsystem = "net"` at its top."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from waveos.names import nearest
from waveos.net.records import MAX_WORKERS
from waveos.scenario import File, Goal, Part, Policies, Workload

_Positive = Annotated[float, Field(gt=0)]
_Share = Annotated[float, Field(gt=0, le=1)]


class Service(Part):
    """Who serves the requests, and what their packets cost."""

    workers: Annotated[int, Field(ge=1, le=MAX_WORKERS)] = Field(
        default=16, description=f"workers with a queue each, a whole number 1..{MAX_WORKERS}"
    )
    flows: Annotated[int, Field(ge=1, le=1 << 24)] = Field(default=100_000, description="flows that requests come from, a whole number from 1")
    costs: str = Field(default="rpc", description="the costs of the network and RPC stack, a name or TOML file")
    stack_busy: _Share = Field(
        default=0.7,
        description="how busy the stack's cores are at the highest load, above 0 and at most 1; so many there are, on the host or the IPU",
    )


class NetRun(Part):
    """How long, and from which seed."""

    seed: Annotated[int, Field(ge=0)] = Field(default=1, description="a whole number, 0 or more")
    requests: Annotated[int, Field(ge=1_000, le=100_000_000)] = Field(default=100_000, description="requests that count in each run, from 1000")
    warmup_share: Annotated[float, Field(ge=0, le=10)] = Field(default=0.1, description="how many more come before those, as a share of them")
    resolution_share: Annotated[float, Field(gt=0, le=0.5)] = Field(default=0.02, description="how fine throughput is searched, as a share of it")


class NetScenario(File):
    """A service behind a network and RPC stack: who steers its requests, and on which side of the link the stack runs."""

    subsystem: Literal["net"] = Field(default="net", description='"net"')
    service: Service = Field(default_factory=Service, description="a [service] table")
    workload: Workload = Field(description="a [workload] table with loads and classes")
    policies: Policies = Field(default_factory=lambda: Policies(names=["rss", "jbsq", "darc", "slo_steering"]), description="a [policies] table")
    run: NetRun = Field(default_factory=NetRun, description="a [run] table")
    objective: dict[str, Goal] = Field(default={}, description="a table of goals for each class")

    @model_validator(mode="after")
    def _consistent(self) -> NetScenario:
        names = [each.name for each in self.workload.classes]
        if self.workload.arrivals != "poisson":
            raise ValueError('workload.arrivals: the network has "poisson" alone so far')
        if len(names) > 16:
            raise ValueError(f"{len(names)} classes; packets tell 16 apart")
        for name in self.objective:
            if name not in names:
                raise ValueError(f"objective.{name}: no such class{nearest(name, names)}")
        for each in self.workload.classes:
            if each.service.form not in ("fixed", "exponential", "hyperexponential", "samples") or (
                each.service.fixed_us and each.service.form != "fixed"
            ):
                raise ValueError(
                    f"class {each.name!r}: a service time of the network is one of fixed_us, exponential_us, hyperexponential_us and samples, alone"
                )
        return self


SCHEMA = NetScenario
