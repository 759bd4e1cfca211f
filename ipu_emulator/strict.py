"""The strict memory model: two sides over one memory that is as unhelpful as a link to an IPU may be.

A write-combining (WC) side's stores wait in a buffer and reach the memory late, word by word and in any order; without a flush perhaps
never, and a fence waits for those flushed alone. A write-through (WT) side's lines, once read, stay as they were until invalidated or evicted,
and may be fetched unasked. A write-back (WB) side is a weakly ordered core on its own memory: its stores arrive by themselves, but in any
order until a fence. An uncached (UC) side reads what the memory has, past its own stores that wait in a buffer, as if it had another mapping for them.
A doorbell overtakes whatever is still in a buffer.

The parties are plain functions that use the primitives of `waveos.primitives` on a `StrictSide`; each primitive is a point where
the other party or the hardware may go first, as `Choices` say (bytes from hypothesis, then numbers derived from them, so that
equal bytes give equal runs). After `patience` steps the hardware turns orderly: what was flushed arrives at once, what was not never
does, and stale stays stale. Who is not done after as many steps again never will be: `Stuck`.

What the model takes for granted: a word is whole, a line fill is a snapshot, loads of one side happen in program order.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from enum import Enum
from typing import TypeVar

from greenlet import GreenletExit, getcurrent, greenlet  # type: ignore[import-untyped]

LINE_WORDS = 8
T = TypeVar("T")


class Stuck(Exception):
    """A party waits for something that will never come: a flush or an invalidate is missing."""


class Mapping(Enum):
    """How a side maps the memory: how it stores and how it loads."""

    _value_: tuple[str, str]
    AGENT = ("WB", "WB")  # the IPU, on its own memory
    HOST = ("WC", "WT")  # the host, through the link
    BAR = ("WC", "UC")  # the host, through a PCI BAR, of which it writes one part and reads another

    @property
    def combines(self) -> bool:
        """Stores may be withheld until flushed."""
        return self.value[0] == "WC"

    @property
    def caches(self) -> bool:
        """Lines may be stale until invalidated."""
        return self.value[1] == "WT"

    @property
    def forwards(self) -> bool:
        """A load sees this side's own stores that have not arrived. Nothing of a BAR relies on that: its parts may be mapped in two ways."""
        return self.value[1] != "UC"


class Choices:
    """A stream of choices: first the given bytes, then pseudo-random ones that follow from them."""

    def __init__(self, data: bytes) -> None:
        self._data = iter(data)
        self._more = random.Random(data)

    def below(self, n: int) -> int:
        """A number from 0 to n - 1 (n at most 256 while the bytes last)."""
        byte = next(self._data, None)
        return self._more.randrange(n) if byte is None else byte % n

    def among(self, options: Sequence[T]) -> T:
        """One of the options."""
        return options[self.below(len(options))]


class StrictMachine:
    """Memories, their sides, and the parties that run on them, one primitive at a time."""

    def __init__(self, choices: Choices, patience: int = 2_500) -> None:
        self.choices, self.patience = choices, patience
        self.orderly = False
        self.steps = 0
        self.sides: list[StrictSide] = []
        # How capricious this run is, out of 16: 0 is hardware that does nothing unless told.
        self.drains, self.evicts, self.fills, self.switches = (choices.among((0, 1, 4, 12)) for _ in range(4))
        self._parties: list[greenlet] = []
        self._current = 0

    def memory(self, words: int) -> StrictMemory:
        """A memory of that many words, all 0."""
        return StrictMemory(self, words)

    def start(self, party: Callable[[], None]) -> greenlet:
        """Add a party; it runs when `run` does."""
        self._parties.append(greenlet(party))
        return self._parties[-1]

    def run(self) -> None:
        """Run until all parties are done. Raises Stuck, and whatever a party raises."""
        try:
            while live := [party for party in self._parties if not party.dead]:
                self.steps += 1
                self.orderly = self.steps > self.patience
                if self.steps > 2 * self.patience:
                    raise Stuck(f"{len(live)} parties still wait after {self.steps} steps")
                self._hardware()
                if self.orderly or self.choices.below(16) < max(1, self.switches):
                    self._current += 1
                live[self._current % len(live)].switch()
        finally:
            for party in self._parties:
                if not party.dead:
                    party.throw(GreenletExit)

    def kill(self, party: greenlet, side: StrictSide) -> None:
        """The party dies where it is; its core lives on, so all it stored arrives before another can take its place."""
        party.throw(GreenletExit)
        side.drain_all()

    def step(self) -> None:
        """Let others go first; called at each primitive."""
        hub = getcurrent().parent
        if hub is not None and getcurrent() in self._parties:
            hub.switch()

    def _hardware(self) -> None:
        for side in self.sides:
            if self.orderly:
                side.drain_flushed()
                continue
            if side.pending and self.choices.below(16) < self.drains:
                side.drain(self.choices.among(list(side.pending)))
            if side.lines and self.choices.below(16) < self.evicts:
                del side.lines[self.choices.among(list(side.lines))]
            if side.caches and self.choices.below(16) < self.fills:
                side.fill(self.choices.below(min(256, len(side.memory.words) // LINE_WORDS)))


class StrictMemory:
    """What the words really are."""

    def __init__(self, machine: StrictMachine, words: int) -> None:
        self.machine = machine
        self.words = [0] * words

    def side(self, mapping: Mapping) -> StrictSide:
        """A side that maps this memory so."""
        side = StrictSide(self, mapping)
        self.machine.sides.append(side)
        return side


class StrictSide:
    """One side's view of a memory: the five primitives. `line_fills` counts line transfers."""

    def __init__(self, memory: StrictMemory, mapping: Mapping) -> None:
        self.memory, self.combines, self.caches, self.forwards = memory, mapping.combines, mapping.caches, mapping.forwards
        self.pending: dict[int, tuple[int, bool]] = {}  # word: (value, flushed)
        self.lines: dict[int, list[int]] = {}
        self.line_fills = 0

    def load(self, i: int) -> int:
        """The word: this side's own last store (if it `forwards`), or what its copy of the line says, or the memory."""
        self.memory.machine.step()
        if self.forwards and i in self.pending:
            return self.pending[i][0]
        if not self.caches:
            return self.memory.words[i]
        line = i // LINE_WORDS
        self.fill(line)
        return self.lines[line][i % LINE_WORDS]

    def store(self, i: int, value: int) -> None:
        """Into the buffer. A later store to the same word takes the place of an earlier one that is still there."""
        self.memory.machine.step()
        self.pending[i] = (int(value), not self.combines)

    def flush(self, i: int) -> None:
        """The stores so far to the line will arrive without further action."""
        self.memory.machine.step()
        line = i // LINE_WORDS
        for word, (value, _) in self.pending.items():
            if word // LINE_WORDS == line:
                self.pending[word] = (value, True)

    def fence(self) -> None:
        """What was flushed arrives before anything that follows."""
        self.memory.machine.step()
        self.drain_flushed()

    def invalidate(self, i: int) -> None:
        """Forget the copy of the line."""
        self.memory.machine.step()
        self.lines.pop(i // LINE_WORDS, None)

    def fill(self, line: int) -> None:
        """Fetch the line, unless there is a copy."""
        if line not in self.lines:
            self.lines[line] = self.memory.words[line * LINE_WORDS : (line + 1) * LINE_WORDS]
            self.line_fills += 1

    def drain(self, word: int) -> None:
        """Let one pending store arrive."""
        value, _ = self.pending.pop(word)
        self.memory.words[word] = value
        if word // LINE_WORDS in self.lines:
            self.lines[word // LINE_WORDS][word % LINE_WORDS] = value

    def drain_flushed(self) -> None:
        """Let all flushed stores arrive."""
        for word in [word for word, (_, flushed) in self.pending.items() if flushed]:
            self.drain(word)

    def drain_all(self) -> None:
        """Let all pending stores arrive."""
        for word in list(self.pending):
            self.drain(word)


class Doorbell:
    """An interrupt line: it waits for no store."""

    def __init__(self, machine: StrictMachine) -> None:
        self._machine, self._rung = machine, False

    def ring(self) -> None:
        """Post the interrupt; those not yet taken become one."""
        self._machine.step()
        self._rung = True

    def wait(self) -> None:
        """Sleep until it is rung."""
        while not self._rung:
            self._machine.step()
        self._rung = False
