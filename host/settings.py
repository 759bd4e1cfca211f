"""What hostd is told: a TOML file, or flags, or both (flags win). One file is one enclave.

enclave = "demo"
cpus = "0"
cgroup = "/demo"                # or pids = [1234], or command = ["./server", "--port", "80"]
policy = "shinjuku"
params = { quantum_us = 500 }

[agent]
core = 1
user = "nobody"
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from waveos.errors import ConfigError
from waveos.explain import explain_errors


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Agent(_Table):
    """The agent that hostd starts, and starts again when it dies. With `start = false` it waits for one."""

    start: bool = Field(True, description="true or false")
    core: int | None = Field(None, ge=0, description="the number of the core it polls on")
    user: str | None = Field(None, description="the name of the user it runs as")
    nice: int = Field(1, ge=0, le=19, description="a nice value, 0 to 19")
    idle_us: float = Field(0.0, ge=0, description="microseconds, 0 or more")
    measure: bool = Field(False, description="true or false")
    record: Path | None = Field(None, description="a file's path")


class Daemon(_Table):
    """hostd itself."""

    cpu: int | None = Field(None, ge=0, description="the number of a CPU; by default the enclave's first")
    priority: int | None = Field(None, ge=0, le=98, description="a real-time priority above the enclave's threads, or 0: an ordinary process")
    group: str | None = Field(None, description="the name of a group whose members may connect")
    keep_capabilities: bool = Field(False, description="true or false")


class Settings(_Table):
    """One enclave."""

    enclave: str = Field(description="a name")
    subsystem: Literal["sched", "memory", "net"] = Field("sched", description='"sched", "memory" or "net"')
    cpus: str = Field("", description='the CPUs of the enclave, as in "0-3,5"; of memory and net none')
    pids: list[int] = Field([], description="numbers of processes")
    cgroup: str | None = Field(None, description="the path of a cgroup")
    command: list[str] = Field([], description="a command and its arguments, a list of strings")
    command_user: str | None = Field(None, description="the name of the user the command runs as")
    mechanism: str = Field("auto", description='"auto", "priority" or "sched_ext"')
    policy: str | None = Field(None, description="a policy's name")
    params: dict[str, float] = Field({}, description="a table of numbers")
    ahead: int = Field(1, ge=0, le=3, description="decisions to prestage on a busy CPU, 0 to 3")
    agent: Agent = Field(default_factory=lambda: Agent.model_validate({}))
    hostd: Daemon = Field(default_factory=lambda: Daemon.model_validate({}))
    settings: dict[str, Any] = Field({}, description="settings of the mechanism, a table")

    @model_validator(mode="after")
    def _one_kind_of_members(self) -> Settings:
        if bool(self.cpus) != (self.subsystem == "sched"):
            raise ValueError(
                "cpus is missing: say which CPUs the enclave has" if not self.cpus else f"cpus is for scheduling; {self.subsystem} has none"
            )
        named = [name for name in ("pids", "cgroup", "command") if getattr(self, name)]
        if len(named) != 1:
            raise ValueError(f"who belongs to the enclave is said by one of pids, cgroup and command, not by {' and '.join(named) or 'none'}")
        if self.agent.start and self.policy is None:
            raise ValueError("policy is missing: name the policy that the agent runs, or set agent.start = false and start `wave agentd` with one")
        return self


def read(path: Path | None, flags: dict[str, Any]) -> Settings:
    """The settings of a file with these flags (dotted keys) over them. Raises ConfigError in one line."""
    text, raw = "", {}
    if path is not None:
        try:
            text = path.read_text()
            raw = tomllib.loads(text)
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: no TOML: {error}") from error
    if any(flags.get(name) for name in ("pids", "cgroup", "command")):
        for name in ("pids", "cgroup", "command"):
            raw.pop(name, None)
    origin = {}
    for key, value in flags.items():
        if value is None or value == []:
            continue
        table: dict[str, Any] = raw
        *tables, last = key.split(".")
        for name in tables:
            table = table.setdefault(name, {})
        table[last] = value
        origin[key] = "--" + last.replace("_", "-")
    try:
        return Settings.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(explain_errors(error, Settings, raw, source=str(path or "hostd"), text=text, origin=origin)) from None
