"""One run of the emulated engine: clients, the engine in virtual time, and a policy behind an emulated link."""

from __future__ import annotations

import resource
import time
import tomllib
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from waveos import serving
from waveos.errors import ConfigError
from waveos.ipu_emulator.gpu import load_gpu, load_model
from waveos.ipu_emulator.profile import link_costs, load_link
from waveos.ipu_emulator.serving.cost import Constants, Costs, DataPlane, Sharding, load_constants
from waveos.ipu_emulator.serving.node import BatchRecord, Clock, Node
from waveos.ipu_emulator.serving.workload import Ask, Workload
from waveos.names import nearest
from waveos.policy import load_policy
from waveos.policy.plain import NEVER_NS, PlainRuntime
from waveos.record import VERSION
from waveos.serving import Placement
from waveos.serving.engine import Block, Request

S = 1_000_000_000
_SYSTEMS = Path(__file__).parents[1] / "data" / "serving" / "systems.toml"
RECORD_NS = 10_000
"""What a policy takes for one record at host speed: measured, 10 us in Python (`wave bench serving_speed`)."""


class System(BaseModel):
    """A policy with its parameters, and how KV is moved for it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    policy: str
    params: dict[str, float] = {}
    plane: dict[str, Any]


@lru_cache(maxsize=1)
def load_systems() -> dict[str, System]:
    """The systems that ship with Wave."""
    raw = tomllib.loads(_SYSTEMS.read_text())
    return {name: System.model_validate(table) for name, table in raw.items() if isinstance(table, dict)}


def load_system(name: str) -> System:
    """A system by name. Raises ConfigError."""
    systems = load_systems()
    if name not in systems:
        raise ConfigError(f"no serving system {name!r}{nearest(name, systems)}; there are: {', '.join(systems)}")
    return systems[name]


@dataclass
class Setup:
    """What runs: a system on instances of a model. `in_flight` requests at most are open (0: no limit)."""

    system: System
    gpu: str = "h200"
    model: str = "llama-3.1-8b"
    ranks: int = 1
    instances: int = 1
    link: str = "mount-evans"
    in_flight: int = 0
    host_bytes: float | None = None
    storage_bytes: float = 0.0
    placement: Placement = Placement.HYBRID
    constants: Constants = field(default_factory=load_constants)


@dataclass
class Result:
    """What came of a run. Times in seconds; arrays are by request, in the order of completion."""

    requests: int
    refused: int
    duration_s: float
    ttft_s: np.ndarray
    output_tokens: int
    prompt_tokens: int
    hit_tokens: int
    batches: list[BatchRecord]
    decode_s: float
    iterations: int
    loaded_tokens: int
    load_busy_s: float
    load_gb_per_s: float
    records: int
    stale: int
    link_us_per_iteration: float
    policy_us_per_iteration: float
    wall_s: float
    peak_mib: float

    @property
    def throughput(self) -> float:
        """Output tokens a second."""
        return self.output_tokens / self.duration_s

    @property
    def stall_share(self) -> float:
        """Share of prefill time in which the GPU waits for KV."""
        total = sum(each.end_ns - each.begin_ns for each in self.batches)
        return sum(each.stall_ns for each in self.batches) / total if total else 0.0


class Simulation:
    """Clients, engine and agent on one clock."""

    def __init__(self, setup: Setup, workload: Workload, runtime: Any = None) -> None:
        self.setup, self.workload = setup, workload
        gpu, model = load_gpu(setup.gpu), load_model(setup.model)
        plane = DataPlane(**setup.system.plane)
        sharding = Sharding(model.kv_heads, setup.ranks, setup.placement)
        costs = [Costs(gpu, model, sharding, plane, setup.constants) for _ in range(setup.instances)]
        host_bytes = setup.constants.given.host_bytes if setup.host_bytes is None else setup.host_bytes
        host_tokens = min(2**31 - 1, int(host_bytes / costs[0].kv_bytes / setup.instances))
        self.clock = Clock()
        storage_tokens = min(2**31 - 1, int(setup.storage_bytes / costs[0].kv_bytes / setup.instances))
        self.node = Node(self.clock, costs, [host_tokens] * setup.instances, storage_tokens)
        self.mechanism = self.node.mechanism
        self.node.on_first, self.node.on_done = self._first, self._done
        self.runtime = runtime or PlainRuntime(load_policy(setup.system.policy), dict(setup.system.params))
        link = link_costs(load_link(setup.link))
        speed = load_link(setup.link).relative_speed
        self._wire_ns = link.wire_ns
        self._agent_ns = RECORD_NS / speed + link.agent_read_ns + link.agent_write_ns
        self._host_ns = link.host_write_ns + link.host_read_ns
        self._agent_free_ns = 0
        self._begun = self._pumping = False
        self._arrived_ns: dict[int, int] = {}
        self._next = 0
        self._behind_ns = 0  # how much later than in the workload the client's clock is
        self._waking_ns = -1  # when it comes again
        self.open = self.refused = 0
        self.ttft: list[int] = []
        self.outputs = self.prompts = self.hits = 0
        for instance in self.mechanism.instances.values():
            for key, parent, tokens in workload.warm:
                instance.blocks[key] = Block(key, parent, tokens, int(serving.Tier.HOST))
                instance.free[int(serving.Tier.HOST)] -= tokens
        if workload.warm:
            self.mechanism.replay()

    def run(self) -> Result:
        """All of the workload, to the last token."""
        begin = time.perf_counter()
        while self.step():
            pass
        if self.mechanism.requests:
            stuck = next(iter(self.mechanism.requests.values()))
            raise ConfigError(
                f"policy {self.setup.system.policy!r} left {len(self.mechanism.requests)} requests waiting for ever, "
                f"the first of them {stuck.number} with {stuck.prompt} tokens"
            )
        return self._result(time.perf_counter() - begin)

    def step(self) -> bool:
        """Everything that is due at the next time, and what the agent says to it; False if nothing is left to happen."""
        if not self._begun:
            self._begun = True
            self._arrivals()
            self._pump()
            return True
        if not self.clock.step():
            return False
        self._pump()
        return True

    # ── clients ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _arrivals(self) -> None:
        """Send what is due and allowed; come again for the next.

        A client that has as many requests open as it may stops its clock: it sends the next when one ends, and goes on with the gaps between arrivals from
        there. It does not make up for what it could not send (so does SGLang's `bench_long_context.py`, which the paper's workloads resemble).
        """
        asks, limit = self.workload.asks, self.setup.in_flight
        while self._next < len(asks):
            ask = asks[self._next]
            due_ns = ask.at_ns + self._behind_ns
            if due_ns > self.clock.now_ns:
                if due_ns != self._waking_ns:
                    self._waking_ns = due_ns
                    self.clock.at(due_ns, self._arrivals)
                return
            if limit and self.open >= limit:
                return  # the next one that ends sends it
            if limit:
                self._behind_ns = self.clock.now_ns - ask.at_ns
            self._send(self._next, ask)
            self._next += 1

    def _send(self, number: int, ask: Ask) -> None:
        self.mechanism.now_ns = self.clock.now_ns
        try:
            self.mechanism.arrive(number, ask.prompt, ask.outputs, ask.blocks, ask.sizes, self._choose(number))
        except ConfigError:
            self.refused += 1  # the API's own error to this client; the others go on
            return
        self.open += 1
        self._arrived_ns[number] = self.clock.now_ns

    def _choose(self, number: int) -> int:
        """Where a request is first told of, before any policy routes it."""
        return number % self.setup.instances

    def _first(self, request: Request, now_ns: int) -> None:
        self.ttft.append(now_ns - self._arrived_ns[request.number])
        self.prompts += request.prompt
        self.hits += request.hit

    def _done(self, request: Request, _now_ns: int) -> None:
        self.outputs += request.outputs
        self.open -= 1
        del self._arrived_ns[request.number]
        if self.setup.in_flight:
            self._arrivals()

    # ── the agent behind its link ────────────────────────────────────────────────────────────────────────────────────

    def _pump(self) -> None:
        """Let the agent see what there is to see, once it is free."""
        if self._pumping:
            return
        messages = self.mechanism.take_messages()
        if not len(messages) and self.runtime.next_timer_ns > self.clock.now_ns:
            return
        end = np.zeros(1, serving.MESSAGE)
        end["version"], end["subsystem"], end["type"] = VERSION, serving.SUBSYSTEM, serving.Message.BATCH_END
        seen = self.clock.now_ns + self._wire_ns
        end["time_ns"] = seen
        decisions = self.runtime.feed(np.frombuffer(messages.tobytes() + end.tobytes(), serving.MESSAGE))
        busy = round((len(messages) + len(decisions)) * self._agent_ns)
        self._pumping = True
        self.clock.at(seen + busy + self._wire_ns, self._answered, decisions)

    def _answered(self, decisions: Any) -> None:
        self._pumping = False
        self.mechanism.now_ns = self.clock.now_ns
        if len(decisions):
            self.mechanism.commit(decisions)
        if self.runtime.next_timer_ns < NEVER_NS:
            self.clock.at(self.runtime.next_timer_ns, self._pump)

    def _result(self, wall_s: float) -> Result:
        executors = self.node.executors
        iterations = sum(each.iterations for each in executors)
        batches = [batch for each in executors for batch in each.batches]
        loaded, busy = sum(each.load.tokens for each in executors), sum(each.load.busy_ns for each in executors) / S
        records = self.mechanism.said + self.mechanism.heard
        costs = executors[0].costs
        per_iteration = 1e-3 * records / max(1, iterations)
        return Result(
            requests=len(self.ttft),
            refused=self.refused,
            duration_s=max(1, self.clock.now_ns) / S,
            ttft_s=np.array(self.ttft) / S,
            output_tokens=self.outputs,
            prompt_tokens=self.prompts,
            hit_tokens=self.hits,
            batches=batches,
            decode_s=sum(each.decode_ns for each in executors) / S,
            iterations=iterations,
            loaded_tokens=loaded,
            load_busy_s=busy,
            load_gb_per_s=loaded * costs.rank_kv_bytes / busy / 1e9 if busy else 0.0,
            records=records,
            stale=sum(count for outcome, count in self.mechanism.outcomes.items() if outcome.name == "STALE"),
            link_us_per_iteration=per_iteration * self._host_ns,
            policy_us_per_iteration=per_iteration * RECORD_NS,
            wall_s=wall_s,
            peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        )


def simulate(setup: Setup, workload: Workload) -> Result:
    """Run a workload on a setup."""
    return Simulation(setup, workload).run()
