"""The emulated engine for real clients: GPUs in virtual time that keeps pace with the wall clock, or runs as fast as it can.

It computes nothing: what it says is made-up text, one token a character; when each token comes is what the model of the GPUs says.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from waveos.errors import ConfigError
from waveos.ipu_emulator.gpu import load_gpu, load_model
from waveos.ipu_emulator.serving.cost import Costs, DataPlane, Sharding, load_constants
from waveos.ipu_emulator.serving.node import Clock, Node
from waveos.ipu_emulator.serving.simulate import System
from waveos.serving import Placement
from waveos.serving.engine import Request
from waveos.serving.text import name_blocks

S = 1_000_000_000
BLOCK = 128
SAYS = b"As an emulated GPU I have no words of my own, only the time that they would take. "
THINKS_S = 0.005
"""How long, as fast as possible, virtual time waits for what the agent decides on what has happened."""


@dataclass(eq=False)
class Talk:
    """One request: what it has been told of."""

    request: Request
    stop: Callable[[list[int]], bool]
    tokens: list[int]
    first: bool = False
    done: bool = False


class Emulated:
    """One or more instances of a model on emulated GPUs. `pace`: "real", or "fast"."""

    def __init__(self, system: System, gpu: str, model: str, ranks: int, instances: int, pace: str = "real") -> None:
        hardware, shape, constants = load_gpu(gpu), load_model(model), load_constants()
        sharding = Sharding(shape.kv_heads, ranks, Placement.HYBRID)
        costs = [Costs(hardware, shape, sharding, DataPlane(**system.plane), constants) for _ in range(instances)]
        host_tokens = min(2**31 - 1, int(constants.given.host_bytes / costs[0].kv_bytes / instances))
        self.clock = Clock()
        self.node = Node(self.clock, costs, [host_tokens] * instances)
        self.mechanism = self.node.mechanism
        self.node.on_first, self.node.on_done = self._first, self._done
        self.on_token: Callable[[int, int], None] = lambda number, token: None
        self.on_done: Callable[[int, str], None] = lambda number, reason: None
        self.talks: dict[int, Talk] = {}
        self._pace, self._instances = pace, instances
        self._began_ns = time.monotonic_ns()
        self._heard = 0
        self._quiet_since = 0.0

    @property
    def open(self) -> int:
        """Requests that are not done."""
        return len(self.talks)

    def submit(
        self,
        number: int,
        tokens: Sequence[int],
        outputs: int,
        stop: Callable[[list[int]], bool] = lambda generated: False,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Request:
        """A request. Raises ConfigError if it could never be served."""
        if not tokens or outputs < 1:
            raise ConfigError(f"a request of {len(tokens)} tokens, {outputs} to generate: at least one each")
        keys, sizes = name_blocks(tokens, BLOCK)
        self._catch_up()
        self.mechanism.now_ns = self.clock.now_ns
        request = self.mechanism.arrive(number, len(tokens), outputs, keys, sizes, number % self._instances)
        self.talks[number] = Talk(request, stop, [])
        return request

    def leave(self, number: int) -> None:
        """Its client is gone."""
        self.talks.pop(number, None)
        self._catch_up()
        self.mechanism.now_ns = self.clock.now_ns
        self.mechanism.leave(number)

    def advance(self, timeout_s: float = 0.0) -> bool:
        """Let virtual time come to the present, or to the next event, and tell of the tokens that are due."""
        if self._pace == "fast":
            heard = self.mechanism.heard + self.mechanism.said
            if heard != self._heard:
                self._heard, self._quiet_since = heard, time.monotonic()
            if time.monotonic() - self._quiet_since < THINKS_S or not self.clock.step():
                time.sleep(min(timeout_s, 0.001))
                return False
        else:
            time.sleep(timeout_s)
            self._catch_up()
        self.mechanism.now_ns = self.clock.now_ns
        for talk in list(self.talks.values()):
            self._tell(talk, self._progress(talk.request))
        return True

    def close(self) -> None:
        """Nothing to end."""

    def _catch_up(self) -> None:
        if self._pace == "real":
            self.clock.run_until(time.monotonic_ns() - self._began_ns)

    def _progress(self, request: Request) -> int:
        """Tokens that it has by now."""
        talk = self.talks.get(request.number)
        return 0 if talk is None or not talk.first else self.node.generated(request)

    def _first(self, request: Request, _now_ns: int) -> None:
        if (talk := self.talks.get(request.number)) is not None:
            talk.first = True
            self._tell(talk, 1)

    def _done(self, request: Request, _now_ns: int) -> None:
        if (talk := self.talks.get(request.number)) is not None:
            self._tell(talk, request.outputs)
            if self.talks.pop(request.number, None) is not None:
                self.on_done(request.number, "length")

    def _tell(self, talk: Talk, count: int) -> None:
        """Its tokens up to `count`; a stop sequence ends it."""
        number = talk.request.number
        while len(talk.tokens) < count and number in self.talks:
            talk.tokens.append(SAYS[len(talk.tokens) % len(SAYS)])
            stopped = talk.stop(talk.tokens)
            self.on_token(number, talk.tokens[-1])
            if stopped:
                del self.talks[number]
                self.on_done(number, "stop")
                if len(talk.tokens) < talk.request.outputs:
                    self.mechanism.leave(number)
