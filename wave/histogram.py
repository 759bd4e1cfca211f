"""Histograms of nanoseconds with 256 bins in every power of two: a quantile is right to 0.4 %, whatever its size."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.cpython.unsafe.numbers import leading_zeros

from waveos.jit import jit_inline

_BITS = 8
BINS = (63 - _BITS) << _BITS


@jit_inline
def count_ns(histogram: Any, value_ns: int) -> None:
    """Count one value, 0 or more."""
    v = max(0, value_ns)
    shift = max(0, 63 - _BITS - leading_zeros(v))
    histogram[(shift << _BITS) + (v >> shift)] += 1


def quantile_ns(histogram: np.ndarray[Any, Any], q: float) -> float:
    """The q-quantile in ns, interpolated inside its bin; NaN if nothing was counted."""
    total = histogram.sum()
    if total == 0:
        return float("nan")
    cumulative = np.cumsum(histogram)
    i = int(np.searchsorted(cumulative, q * total, side="left"))
    low, high = _edges(i)
    before = cumulative[i] - histogram[i]
    inside = min(1.0, max(0.0, (q * total - before) / histogram[i])) if histogram[i] else 0.0
    return low + inside * (high - low)


def filled_ns(histogram: np.ndarray[Any, Any], most: int = 1_000) -> list[tuple[int, int]]:
    """What was counted, as (lower edge in ns, count) of the bins that are not empty; of neighbours together where there would be more than `most`."""
    filled, width = np.flatnonzero(histogram), 1
    while len(first := np.flatnonzero(np.diff(filled // width, prepend=-1))) > most:
        width *= 2
    counts = np.add.reduceat(histogram[filled], first) if len(filled) else filled
    return [(int(_edges(int(bin) * width)[0]), int(count)) for bin, count in zip(filled[first] // width, counts, strict=True)]


def middles_ns(bins: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The middle of each of these bins, ns."""
    return np.array([sum(_edges(int(each))) / 2 for each in bins])


def _edges(index: int) -> tuple[float, float]:
    shift = max(0, (index >> _BITS) - 1)
    value = index - (shift << _BITS)
    if shift == 0:
        return float(value), float(value)
    return float(value << shift), float((value + 1) << shift)
