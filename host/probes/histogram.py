"""The probes' histograms of times: eight steps to each doubling, as `histogram.c` counts them; percentiles read to an eighth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_STEPS = 8
_UNITS_PER_US = 1024


def lowest_us(bucket: int) -> float:
    """The shortest time that is counted in a bucket, microseconds."""
    if bucket < _STEPS:
        return bucket / _UNITS_PER_US
    doublings, step = divmod(bucket, _STEPS)
    return ((_STEPS + step) << (doublings - 1)) / _UNITS_PER_US


def percentile_us(counts: Mapping[int, int], share: float) -> float | None:
    """The time below which `share` of all lie, as if each bucket's were spread evenly over it; None where there are none."""
    total = sum(counts.values())
    if not total:
        return None
    wanted = share * total
    for bucket in sorted(counts):
        if counts[bucket] >= wanted:
            low, high = lowest_us(bucket), lowest_us(bucket + 1)
            return low + (high - low) * wanted / counts[bucket]
        wanted -= counts[bucket]
    return lowest_us(max(counts) + 1)


def doublings_us(counts: Mapping[int, int]) -> list[dict[str, Any]]:
    """Folded for people: `from_us` (counted in), `to_us` (not) and `count`, from below 1 us in doublings up to the longest; no gaps."""
    rows: list[dict[str, Any]] = []
    low, high = 0, 1
    left = dict(counts)
    while left:
        inside = [bucket for bucket in left if lowest_us(bucket) < high]
        rows.append({"from_us": low, "to_us": high, "count": sum(left.pop(bucket) for bucket in inside)})
        low, high = high, high * 2
    while rows and not rows[0]["count"]:
        del rows[0]
    return rows
