"""Thompson sampling of scan periods, for a million page batches in some tens of milliseconds.

Each batch has six arms, the periods 1, 2, 4 ... 32 ticks, and for each the Beta posterior of "a scan at this period finds what the last one found". A
batch that keeps its temperature, hot or cold, is best scanned rarely; one that changes is scanned often. The arm to use next is the one with the
highest draw times weight, where longer periods weigh more because they cost less.

The counts of successes and failures stay small: together at most COUNTS, then both are halved, which forgets what is old. So a draw is a look into a
table of quantiles at a random place, where NumPy's and numba's own Beta take 50 to 120 ns each. The random place is a hash of seed, batch and tick.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.special

from waveos.jit import jit

ARMS = 6
COUNTS = 16
QUANTILES = 1_024
SCALE = 65_535  # a draw of 1.0
NOT_DUE = np.uint32(2**32 - 1)


def table() -> Any:
    """[COUNTS, COUNTS, QUANTILES] uint16: entry (a, b, q) is the quantile (q + 0.5) / QUANTILES of Beta(a, b)."""
    made = np.zeros((COUNTS, COUNTS, QUANTILES), np.uint16)
    q = (np.arange(QUANTILES) + 0.5) / QUANTILES
    for a in range(1, COUNTS):
        for b in range(1, COUNTS):
            if a + b <= COUNTS:
                made[a, b] = np.round(scipy.special.betaincinv(a, b, q) * SCALE)
    return made


def weights(cost_share: float) -> Any:
    """What a success is worth at each period, if a scan at the shortest one costs `cost_share` of it."""
    return np.round(SCALE * (1 - cost_share / 2.0 ** np.arange(ARMS))).astype(np.uint32)


@jit
def due_words(due: Any, tick: int, words: Any) -> int:
    """Which batches are due at `tick`, as bits; how many. due: [n] uint32; words: [n / 64] uint64."""
    count = 0
    for group in range(len(words)):
        word = np.uint64(0)
        for k in range(64):
            word |= np.uint64(due[64 * group + k] <= tick) << np.uint64(k)
        words[group] = word
        if word:
            for k in range(64):
                count += (word >> np.uint64(k)) & np.uint64(1)
    return count


@jit
def learn(
    scanned: Any, touched: Any, tick: int, seed: int, counts: Any, arm: Any, idle: Any, due: Any, last: Any, quantiles: Any, weight: Any
) -> int:
    """One step for the batches in `scanned`: compare, update, draw, select. Returns how many there were.

    scanned, touched: [n / 64] uint64; counts: [n, 2 * ARMS] uint8, successes then failures; arm: [n] uint8; idle: [n] uint32, ticks since it was touched;
    due, last: [n] uint32, ticks; quantiles, weight: as `table` and `weights` make them.
    """
    count = 0
    for group in range(len(scanned)):
        left, bits = scanned[group], touched[group]
        if not left:
            continue
        for k in range(64):
            if not (left >> np.uint64(k)) & np.uint64(1):
                continue
            i = 64 * group + k
            count += 1
            now = (bits >> np.uint64(k)) & np.uint64(1)
            used = arm[i]
            side = used if now == np.uint64(idle[i] == 0) else used + ARMS
            counts[i, side] += 1
            if counts[i, used] + counts[i, used + ARMS] > COUNTS:
                counts[i, used] = (counts[i, used] + 1) // 2
                counts[i, used + ARMS] = (counts[i, used + ARMS] + 1) // 2
            idle[i] = 0 if now else idle[i] + np.uint32(tick) - last[i]
            bit = _mixed(seed, i, tick)
            best, best_score = 0, np.uint64(0)
            for each in range(ARMS):
                draw = quantiles[counts[i, each], counts[i, each + ARMS], bit & np.uint64(QUANTILES - 1)]
                bit >>= np.uint64(10)
                score = np.uint64(draw) * np.uint64(weight[each])
                if score >= best_score:
                    best, best_score = each, score
            arm[i], due[i], last[i] = best, tick + (1 << best), tick
    return count


@jit
def _mixed(seed: int, batch: int, tick: int) -> Any:
    """60 bits that look random (the finisher of splitmix64)."""
    z = np.uint64(seed) + np.uint64(batch) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(tick) * np.uint64(0xD1B54A32D192ED03)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
