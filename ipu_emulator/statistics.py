"""Confidence intervals for what one simulation run says, and how long a run must be: batch means, fixed length.

The requests of one run depend on their neighbours (a long queue is met by many in a row), so the textbook interval of independent samples is far too
narrow. Batch means (Law, *Simulation Modeling and Analysis*, section 9.5.3) cut the run into a few dozen long batches, whose means are nearly
independent. The length of a run is chosen beforehand (`requests_for`): a run that stops when its interval looks narrow enough stops too often when
the interval happens to be too narrow, and then covers the truth less often than it claims.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri, stdtrit

BATCHES = 32


class Interval(NamedTuple):
    """An estimate and its confidence interval, all in the unit of the samples; an end that the run cannot bound is infinite."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half the distance between the ends."""
        return (self.high - self.low) / 2

    def holds(self, truth: float) -> bool:
        """Whether `truth` lies within the interval."""
        return self.low <= truth <= self.high


def mean_interval(samples: NDArray[Any], batches: int = BATCHES, confidence: float = 0.95) -> Interval:
    """The mean of `samples` (one run, in order, warm-up removed) with its batch-means interval by Student's t on `batches` - 1 degrees of freedom.

    The first `len(samples) % batches` samples are left out, so that all batches are equally long. A run shorter than two batches of one sample has
    an infinite interval. Raises ValueError on an empty run.
    """
    rows = _split(samples, batches)
    means = rows.mean(axis=1, dtype=np.float64)
    value = float(means.mean())
    reach = _reach(means, confidence)
    return Interval(value, value - reach, value + reach)


def quantile_interval(samples: NDArray[Any], q: float, batches: int = BATCHES, confidence: float = 0.95) -> Interval:
    """The `q`-quantile (0 < q < 1) of `samples` (one run, in order, warm-up removed) with its interval.

    Batch means give the standard error of the share of samples at or below the estimated quantile; the interval's ends are the order statistics
    that many standard errors below and above rank `q` (Iglehart 1976; Heidelberger and Lewis 1984, section 2). No density is estimated, and no
    quantile of a short batch, which would be biased, is taken. The end beyond the largest sample is infinite. Raises ValueError on an empty run or
    a `q` outside (0, 1).
    """
    if not 0 < q < 1:
        raise ValueError(f"a quantile lies between 0 and 1, exclusive; got {q}")
    rows = _split(samples, batches)
    flat = rows.reshape(-1)
    n = flat.size
    rank = _rank(n, q)
    value = np.partition(flat, rank)[rank]
    reach = _reach((rows <= value).mean(axis=1), confidence)
    below, above = q - reach, q + reach
    ranks = [_rank(n, share) for share in (below, above) if 0 < share < 1]
    ordered = np.partition(flat, ranks) if ranks else flat
    low = float(ordered[_rank(n, below)]) if below > 0 else -math.inf
    high = float(ordered[_rank(n, above)]) if above < 1 else math.inf
    return Interval(float(value), low, high)


def requests_for(half_width_share: float, load: float, servers: int = 1, scv: float = 1.0, confidence: float = 0.95) -> int:
    """How many requests a run needs for a mean sojourn time whose half-width is `half_width_share` of it, at `load` (share of capacity, below 1).

    From the asymptotic variance of M/M/1 (`relative_variance`), scaled for `scv`, the squared coefficient of variation of the service time, and for
    the `servers` that share the queue; planning before the run as in Whitt, *Planning queueing simulations*, Management Science 35 (1989).
    """
    return length_for(half_width_share, relative_variance(load, servers, scv), confidence)


def length_for(half_width_share: float, variance_share: float, confidence: float = 0.95) -> int:
    """How many samples give a half-width of `half_width_share` of the mean when the mean of n samples has variance `variance_share` x mean² / n."""
    if not half_width_share > 0:
        raise ValueError(f"the wished half-width is a positive share of the mean; got {half_width_share}")
    z = float(ndtri(0.5 + confidence / 2))
    return math.ceil((z / half_width_share) ** 2 * variance_share)


def relative_variance(load: float, servers: int = 1, scv: float = 1.0) -> float:
    """n x Var(mean sojourn time of n successive requests) / mean², for large n, at `load`.

    For M/M/1 it is exact: 2(1+r)/(1-r)² + 1 - 2/(1-r), from the asymptotic variance of the number in system, 2r(1+r)/(1-r)^4 (Whitt 1989, section 4),
    Little's law, and Cov(time integral of N, arrivals) = load x dE[N]/dload. The queueing part grows with (1 + scv) / 2, as in heavy traffic, and what
    is left of it with `servers` is at most that of M/M/1: the answer errs on the side of longer runs.
    """
    if not 0 <= load < 1:
        raise ValueError(f"the load is a share of capacity, at least 0 and below 1; got {load}")
    if servers < 1 or scv < 0:
        raise ValueError(f"servers are at least 1 and scv at least 0; got {servers} and {scv}")
    alone = scv
    queueing = (2 * (1 + load) / (1 - load) ** 2 - 2 / (1 - load)) * (1 + scv) / 2
    return alone + queueing


def _split(samples: NDArray[Any], batches: int) -> NDArray[Any]:
    """`samples` as rows, one a batch, without the oldest samples that fill no batch."""
    if batches < 2:
        raise ValueError(f"an interval needs at least 2 batches; got {batches}")
    n = len(samples)
    if n == 0:
        raise ValueError("there are no samples: the run or its warm-up is too long or too short")
    rows = min(batches, n)
    return np.asarray(samples)[n % rows :].reshape(rows, -1)


def _reach(means: NDArray[np.float64], confidence: float) -> float:
    """Half the width of Student's interval for the mean of independent `means`; infinite when there is but one."""
    if means.size < 2:
        return math.inf
    t = float(stdtrit(means.size - 1, 0.5 + confidence / 2))
    return t * float(means.std(ddof=1)) / math.sqrt(means.size)


def _rank(n: int, share: float) -> int:
    """The index, from 0, of the order statistic that estimates the `share`-quantile of `n` samples."""
    return min(n - 1, max(0, math.ceil(n * share) - 1))
