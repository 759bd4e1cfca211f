"""The step of `sol`'s model loop, and its peer: the same step as one would write it with NumPy.

Both are given the same state and the same access bits: which batches are due, the posteriors' update, a draw for each arm, the selection. Decisions are
random, so they are compared as distributions: over classes of batches with equal posteriors, how often each arm was chosen.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.stats

from waveos.agents.memory import posteriors
from waveos.agents.memory.posteriors import ARMS, COUNTS, SCALE

WARM_TICKS = 96
SCAN_COST_SHARE = 0.5


@dataclass
class State:
    """What the step reads and writes, for n batches."""

    counts: Any  # [n, 2 * ARMS] uint8
    arm: Any  # [n] uint8
    idle: Any  # [n] uint32, ticks
    due: Any  # [n] uint32, ticks
    last: Any  # [n] uint32, ticks

    @classmethod
    def new(cls, n: int) -> State:
        ticks = np.zeros(n, np.uint32)
        return cls(np.ones((n, 2 * ARMS), np.uint8), np.full(n, ARMS - 1, np.uint8), ticks.copy(), ticks.copy(), ticks.copy())

    def copy(self) -> State:
        return State(*(array.copy() for array in (self.counts, self.arm, self.idle, self.due, self.last)))


QUANTILES, WEIGHTS = posteriors.table(), posteriors.weights(SCAN_COST_SHARE)


def wave_step(state: State, touched: Any, tick: int, seed: int) -> int:
    """The policy's own. touched: [n / 64] uint64."""
    words = np.zeros(len(state.due) // 64, np.uint64)
    posteriors.due_words(state.due, tick, words)
    return posteriors.learn(words, touched, tick, seed, state.counts, state.arm, state.idle, state.due, state.last, QUANTILES, WEIGHTS)


def numpy_step(state: State, touched: Any, tick: int, rng: np.random.Generator) -> int:
    """The peer: due filter, update, draw, select, in NumPy alone. touched: [n / 64] uint64."""
    here = np.flatnonzero(state.due <= tick)
    now = np.unpackbits(touched.view(np.uint8), bitorder="little").view(bool)[here]
    used = state.arm[here].astype(np.intp)
    expected = now == (state.idle[here] == 0)
    counts = state.counts[here]
    rows = np.arange(len(here))
    counts[rows, used + np.where(expected, 0, ARMS)] += 1
    full = counts[rows, used].astype(np.int16) + counts[rows, used + ARMS] > COUNTS
    for side in (used, used + ARMS):
        counts[rows[full], side[full]] = (counts[rows[full], side[full]] + 1) // 2
    state.counts[here] = counts
    state.idle[here] = np.where(now, 0, state.idle[here] + np.uint32(tick) - state.last[here])
    draws = rng.beta(counts[:, :ARMS], counts[:, ARMS:])
    chosen = np.argmax(draws * (WEIGHTS / SCALE), axis=1).astype(np.uint8)
    state.arm[here], state.last[here] = chosen, tick
    state.due[here] = tick + (1 << chosen.astype(np.uint32))
    return len(here)


def warm_state(n: int, seed: int) -> tuple[State, Any, int]:
    """(state, share of time each batch is touched, tick) after WARM_TICKS of a memory with hot, cold and changing batches."""
    rng = np.random.default_rng(seed)
    chance = rng.choice([0.98, 0.002, 0.4], n, p=[0.3, 0.6, 0.1])
    state = State.new(n)
    state.due[:] = 1 + np.arange(n) % 32
    for tick in range(1, WARM_TICKS + 1):
        wave_step(state, access_bits(rng, chance), tick, seed)
    return state, chance, WARM_TICKS + 1


def access_bits(rng: np.random.Generator, chance: Any) -> Any:
    """[n / 64] uint64."""
    return np.packbits(rng.random(len(chance), dtype=np.float32) < chance, bitorder="little").view(np.uint64)


def time_steps(n: int, rounds: int, seed: int) -> dict[str, float]:
    """Both steps over n batches that are all due, interleaved; medians of CPU time. `decisions_p` is the smallest p-value of their comparison."""
    state, chance, tick = warm_state(n, seed)
    rng = np.random.default_rng(seed + 1)
    typical = float((state.due <= tick).mean())
    state.due[:] = tick
    spent: dict[str, list[float]] = {"wave": [], "numpy": []}
    chosen: dict[str, Any] = {}
    for number in range(rounds):
        bits = access_bits(rng, chance)
        for name in ("wave", "numpy") if number % 2 else ("numpy", "wave"):
            own = state.copy()
            begin = time.process_time()
            done = wave_step(own, bits, tick, seed + number) if name == "wave" else numpy_step(own, bits, tick, rng)
            spent[name].append(time.process_time() - begin)
            assert done == n
            chosen[name] = own
    wave_s, numpy_s = float(np.median(spent["wave"])), float(np.median(spent["numpy"]))
    return {
        "policy_batches_per_s": n / wave_s,
        "numpy_batches_per_s": n / numpy_s,
        "iteration_ms": wave_s * 1e3,
        "numpy_iteration_ms": numpy_s * 1e3,
        "step_typical_due_share": typical,
        "decisions_p": compare(chosen["wave"], chosen["numpy"]),
    }


def compare(ours: State, theirs: State, classes: int = 40) -> float:
    """The smallest p-value, after Bonferroni, that arms were chosen alike over the commonest classes of batches with equal posteriors."""
    if not np.array_equal(ours.counts, theirs.counts) or not np.array_equal(ours.idle, theirs.idle):
        return 0.0
    key = np.ascontiguousarray(ours.counts).view(np.dtype((np.void, 2 * ARMS))).ravel()
    _, inverse, sizes = np.unique(key, return_inverse=True, return_counts=True)
    smallest, tested = 1.0, 0
    for each in np.argsort(-sizes)[:classes]:
        members = inverse == each
        table = np.array([np.bincount(state.arm[members], minlength=ARMS) for state in (ours, theirs)])
        table = table[:, table.sum(axis=0) >= 10]
        if table.shape[1] > 1:
            tested += 1
            smallest = min(smallest, float(scipy.stats.chi2_contingency(table).pvalue))
    return min(1.0, smallest * max(1, tested))
