"""An engine with its agent, served by a thread of its own: clients hand requests in from any thread, and are told of each token.

Both engines look alike from here: `submit`, `leave`, `advance`, `close`, `mechanism`, and the two calls `on_token` and `on_done`.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from waveos.errors import ConfigError, WaveError
from waveos.serving.driver import InProcess
from waveos.serving.engine import Request
from waveos.serving.mechanism import Mechanism

BUSY_S, IDLE_S = 0.002, 0.02
"""How long the engine may wait for something to happen before the agent and the clients are heard again."""


class Served(Protocol):
    """What an engine is to the service."""

    mechanism: Mechanism
    on_token: Callable[[int, int], None]
    on_done: Callable[[int, str], None]

    @property
    def open(self) -> int:
        """Requests that are not done."""

    def submit(
        self, number: int, tokens: Sequence[int], outputs: int, stop: Callable[[list[int]], bool], temperature: float = 0.0, seed: int = 0
    ) -> Request:
        """A request. Raises ConfigError if it could never be served."""

    def leave(self, number: int) -> None:
        """Its client is gone."""

    def advance(self, timeout_s: float = 0.0) -> bool:
        """Let things happen."""

    def close(self) -> None:
        """End it."""


@dataclass
class Ask:
    """What a client wants; `tell` is called in the service's thread with ("token", token), ("done", reason) or ("failed", WaveError)."""

    tokens: list[int]
    outputs: int
    tell: Callable[[str, Any], None]
    stop: Callable[[list[int]], bool] = lambda generated: False
    temperature: float = 0.0
    seed: int = 0
    number: int = 0
    request: Request | None = None
    arrived_s: float = field(default_factory=time.monotonic)
    last_s: float = 0.0  # when its last token came
    said: int = 0


class Service:
    """The thread. `watch` is told of what happens, for statistics: ("first" | "next" | "done" | "gone", Ask, seconds)."""

    def __init__(self, engine: Served, agent: InProcess) -> None:
        self.engine, self.agent = engine, agent
        self.failed: str | None = None
        self.watch: Callable[[str, Ask, float], None] = lambda what, ask, seconds: None
        self.asks: dict[int, Ask] = {}
        self._numbers = itertools.count(1)
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._ends = threading.Event()
        engine.on_token, engine.on_done = self._token, self._done
        self._thread = threading.Thread(target=self._serve, daemon=True, name="serving")

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def close(self) -> None:
        """End engine and agent; who still waits is told."""
        self._ends.set()
        self._thread.join(30.0)
        self.engine.close()
        self.agent.close()

    @property
    def room(self) -> int:
        """Tokens that prompt and output of one request may have together."""
        return max(each.capacity[1] for each in self.engine.mechanism.instances.values())

    def submit(self, ask: Ask) -> int:
        """Hand a request in; its number. What is wrong with it is told like all else."""
        if self.failed is not None:
            raise WaveError(self.failed)
        ask.number = next(self._numbers) % (1 << 31)
        self._calls.put(lambda: self._submit(ask))
        return ask.number

    def leave(self, number: int) -> None:
        """The client of a request is gone."""
        self._calls.put(lambda: self._leave(number))

    def call(self, action: Callable[[], None]) -> None:
        """Do something in the service's thread."""
        self._calls.put(action)

    def _submit(self, ask: Ask) -> None:
        if why := self.failed or self.agent.away:  # meanwhile; nothing is kept for an agent that is away: it may be for hours
            ask.tell("failed", WaveError(why))
            return
        self.asks[ask.number] = ask
        try:
            ask.request = self.engine.submit(ask.number, ask.tokens, ask.outputs, ask.stop, ask.temperature, ask.seed)
        except ConfigError as error:
            del self.asks[ask.number]
            ask.tell("failed", error)
        except Exception as error:  # of this one alone: what is half in goes out
            traceback.print_exc()
            del self.asks[ask.number]
            self.engine.leave(ask.number)
            ask.tell("failed", WaveError(f"a bug in Wave: {type(error).__name__}: {error}"))

    def _leave(self, number: int) -> None:
        if (ask := self.asks.pop(number, None)) is not None:
            self.engine.leave(number)
            self.watch("gone", ask, 0.0)

    def _give_up(self, why: str) -> None:
        """Nobody decides: who waits for a decision is told so. What decodes goes on."""
        instances = self.engine.mechanism.instances
        for ask in list(self.asks.values()):
            if ask.request is not None and (ask.request.state == "waiting" or not instances[ask.request.instance].alive):
                self._leave(ask.number)
                ask.tell("failed", WaveError(why))

    def _token(self, number: int, token: int) -> None:
        if (ask := self.asks.get(number)) is not None:
            now = time.monotonic()
            self.watch("next" if ask.said else "first", ask, now - (ask.last_s if ask.said else ask.arrived_s))
            ask.last_s, ask.said = now, ask.said + 1
            ask.tell("token", token)

    def _done(self, number: int, reason: str) -> None:
        if (ask := self.asks.pop(number, None)) is not None:
            self.watch("done" if reason == "length" else reason, ask, time.monotonic() - ask.arrived_s)
            ask.tell("done", reason)

    def _serve(self) -> None:
        try:
            while not self._ends.is_set():
                while not self._calls.empty():
                    self._calls.get()()
                decided = self.agent.exchange(self.engine.mechanism)
                if self.agent.away:
                    self._give_up(self.agent.away)
                self.engine.advance(0.0 if decided else BUSY_S if self.asks else IDLE_S)
            self.failed = "the server is closing"
        except WaveError as error:
            self.failed = str(error)
        except Exception as error:
            self.failed = f"a bug in Wave: {type(error).__name__}: {error}"
            raise
        finally:
            asks, self.asks = list(self.asks.values()), {}
            for ask in asks:
                ask.tell("failed", WaveError(self.failed or "the server has failed"))
            while not self._calls.empty():  # who came meanwhile
                self._calls.get()()
