"""Random numbers and the distributions requests are drawn from, compiled. Equal seeds give equal requests, whatever serves them.

The generator is SplitMix64 (Steele, Lea, Flood 2014), one stream each for inter-arrival times, classes and services, so that two
configurations compared under one seed see the same requests at the same times.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import carray

from waveos.jit import as_pointer, jit, jit_inline

FIXED, EXPONENTIAL, ERLANG, HYPEREXPONENTIAL, LOGNORMAL, SAMPLES = range(6)
PHASES = 8
ARRIVAL, CLASS, SERVICE, STREAMS = range(4)

REQUEST_CLASS = np.dtype(
    [
        ("until", "f8"),  # cumulative share
        ("slo_ns", "i8"),
        ("qos", "i8"),
        ("form", "i8"),
        ("fixed_ns", "f8"),  # added to what is drawn
        ("mean_ns", "f8"),
        ("sigma", "f8"),
        ("stages", "i8"),
        ("phases", "i8"),
        ("phase_until", "f8", (PHASES,)),
        ("phase_mean_ns", "f8", (PHASES,)),
        ("first", "i8"),  # samples[first : first + count]
        ("count", "i8"),
    ],
    align=True,
)


def seed_streams(seed: int) -> np.ndarray[Any, Any]:
    """The generator's states for `seed`, one a stream."""
    return np.random.SeedSequence(seed).generate_state(STREAMS, np.uint64)


@jit_inline
def uniform(streams: Any, stream: int) -> Any:
    """A number in (0, 1]."""
    streams[stream] += np.uint64(0x9E3779B97F4A7C15)
    z = streams[stream]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return (float(z >> np.uint64(11)) + 1.0) * (1.0 / 9007199254740992.0)


@jit_inline
def exponential(streams: Any, stream: int) -> Any:
    """Exponential with mean 1."""
    return -math.log(uniform(streams, stream))


@jit_inline
def draw_class(streams: Any, classes: Any, count: int) -> Any:
    """A class by its share."""
    if count == 1:
        return 0
    u = uniform(streams, CLASS)
    k = 0
    while k < count - 1 and u > classes[k].until:
        k += 1
    return k


@jit
def draw_service_ns(streams: Any, c: Any, samples_at: int, samples_n: int) -> Any:
    """A service time of class record `c`, at least 1 ns; measured ones lie at an address, as int64."""
    x = c.fixed_ns
    if c.form == EXPONENTIAL:
        x += c.mean_ns * exponential(streams, SERVICE)
    elif c.form == SAMPLES:
        x += carray(as_pointer(samples_at), samples_n, np.int64)[c.first + int((1.0 - uniform(streams, SERVICE)) * c.count)]
    elif c.form == ERLANG:
        for _ in range(c.stages):
            x += c.mean_ns / c.stages * exponential(streams, SERVICE)
    elif c.form == HYPEREXPONENTIAL:
        u = uniform(streams, SERVICE)
        k = 0
        while k < c.phases - 1 and u > c.phase_until[k]:
            k += 1
        x += c.phase_mean_ns[k] * exponential(streams, SERVICE)
    elif c.form == LOGNORMAL:
        normal = math.sqrt(-2.0 * math.log(uniform(streams, SERVICE))) * math.cos(2.0 * math.pi * uniform(streams, SERVICE))
        x += c.mean_ns * math.exp(c.sigma * normal - 0.5 * c.sigma * c.sigma)
    return max(1, int(x + 0.5))
