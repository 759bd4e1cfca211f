"""The emulator's parts by themselves: clock, histogram, random streams, distributions."""

import heapq
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from waveos.histogram import BINS, count_ns, filled_ns, middles_ns, quantile_ns
from waveos.ipu_emulator.arrivals import ARRIVAL, CLASS, SERVICE, draw_class, draw_service_ns, exponential, seed_streams, uniform
from waveos.ipu_emulator.clock import CLOCK, NEVER, first_due, reset_clock, set_due
from waveos.ipu_emulator.sched import RequestClass, Service, _class_records


class TestClock:
    """The winner tree."""

    @settings(max_examples=150, deadline=None)
    @given(slots=st.integers(1, 40), steps=st.lists(st.tuples(st.integers(0, 39), st.integers(0, 50) | st.just(NEVER)), max_size=80))
    def test_the_first_due_is_what_a_heap_says_whatever_was_set_and_set_again(self, slots, steps):
        clock = np.zeros(1, CLOCK)
        reset_clock(clock, slots)
        due = dict.fromkeys(range(slots), NEVER)
        for slot, time_ns in steps:
            slot %= slots
            set_due(clock[0], slot, time_ns)
            due[slot] = time_ns
            heap = [(at, each) for each, at in due.items()]
            heapq.heapify(heap)
            assert (clock[0]["time_ns"][first_due(clock[0])], first_due(clock[0])) == heap[0]

    def test_a_clock_made_anew_has_nothing_due(self):
        clock = np.zeros(1, CLOCK)
        reset_clock(clock, 4)
        set_due(clock[0], 3, 5)
        reset_clock(clock, 4)
        assert clock[0]["time_ns"][first_due(clock[0])] == NEVER

    def test_more_slots_than_there_are_is_refused(self):
        with pytest.raises(ValueError, match="at most 4096"):
            reset_clock(np.zeros(1, CLOCK), 5_000)


@njit
def count_all(histogram, values):
    for value in values:
        count_ns(histogram, value)


class TestHistogram:
    """Quantiles from bins."""

    @settings(max_examples=80, deadline=None)
    @given(values=st.lists(st.integers(0, 10**13), min_size=1, max_size=200), q=st.floats(0.001, 1.0))
    def test_a_quantile_is_within_half_a_percent_of_the_value_itself(self, values, q):
        histogram = np.zeros(BINS, np.int64)
        count_all(histogram, np.array(values))
        exact = float(np.quantile(values, q, method="inverted_cdf"))
        assert quantile_ns(histogram, q) == pytest.approx(exact, rel=1 / 256, abs=0.5)

    def test_small_values_are_exact(self):
        histogram = np.zeros(BINS, np.int64)
        count_all(histogram, np.arange(512))
        assert histogram[:512].tolist() == [1] * 512
        assert quantile_ns(histogram, 0.5) == 255

    def test_what_is_told_of_a_full_one_is_short_and_whole(self):
        told = filled_ns(np.ones(BINS, np.int64), 100)
        assert 50 < len(told) <= 100 and sum(count for _, count in told) == BINS
        edges = [edge for edge, _ in told]
        assert edges[0] == 0 and edges == sorted(set(edges))
        assert filled_ns(np.zeros(BINS, np.int64)) == []
        assert filled_ns(np.eye(1, BINS, 300, dtype=np.int64)[0]) == [(300, 1)]

    def test_nothing_counted_has_no_quantile(self):
        assert math.isnan(quantile_ns(np.zeros(BINS, np.int64), 0.5))

    def test_every_bin_holds_its_own_middle_and_the_longest_time_has_a_bin(self):
        for value in (0, 1, 511, 512, 513, 1_000_000, 2**40 + 12345, 2**62 - 1):
            histogram = np.zeros(BINS, np.int64)
            count_all(histogram, np.array([value]))
            [at] = np.flatnonzero(histogram)
            assert middles_ns(np.array([at]))[0] == pytest.approx(value, rel=1 / 256)

    def test_a_negative_time_counts_as_none(self):
        histogram = np.zeros(BINS, np.int64)
        count_all(histogram, np.array([-5]))
        assert histogram[0] == 1


@njit
def draw_uniform(streams, stream, n):
    out = np.empty(n)
    for i in range(n):
        out[i] = uniform(streams, stream)
    return out


@njit
def draw_exponential(streams, n):
    out = np.empty(n)
    for i in range(n):
        out[i] = exponential(streams, ARRIVAL)
    return out


@njit
def draw_classes(streams, classes, count, n):
    out = np.empty(n, np.int64)
    for i in range(n):
        out[i] = draw_class(streams, classes, count)
    return out


@njit
def draw_services(streams, classes, at, length, n):
    out = np.empty(n, np.int64)
    for i in range(n):
        out[i] = draw_service_ns(streams, classes[0], at, length)
    return out


N = 200_000


class TestStreams:
    """SplitMix64 and what is drawn with it."""

    @pytest.mark.parametrize("stream", [ARRIVAL, CLASS, SERVICE])
    def test_a_stream_is_uniform_and_its_neighbours_are_independent(self, stream):
        u = draw_uniform(seed_streams(3), stream, N)
        assert u.min() > 0
        assert u.max() <= 1
        for power in (1, 2, 3):
            assert np.mean(u**power) == pytest.approx(1 / (power + 1), abs=5 / math.sqrt(N))
        for lag in (1, 2, 7):
            assert abs(np.corrcoef(u[:-lag], u[lag:])[0, 1]) < 5 / math.sqrt(N)

    def test_streams_of_one_seed_and_of_neighbouring_seeds_do_not_follow_each_other(self):
        streams, others = seed_streams(1), seed_streams(2)
        drawn = [draw_uniform(streams, stream, 20_000) for stream in (ARRIVAL, CLASS, SERVICE)] + [draw_uniform(others, ARRIVAL, 20_000)]
        for i in range(4):
            for k in range(i):
                assert abs(np.corrcoef(drawn[i], drawn[k])[0, 1]) < 5 / math.sqrt(20_000)

    def test_the_generator_is_splitmix64_as_published(self):
        """First outputs for state 0 of the reference implementation (Vigna), in the upper 53 bits."""
        published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
        u = draw_uniform(np.zeros(3, np.uint64), ARRIVAL, 3)
        assert u.tolist() == [((word >> 11) + 1) / 2**53 for word in published]

    def test_an_exponential_has_its_moments(self):
        x = draw_exponential(seed_streams(5), N)
        assert x.mean() == pytest.approx(1, abs=5 / math.sqrt(N))
        assert x.var() == pytest.approx(1, abs=15 / math.sqrt(N))

    def test_classes_come_by_their_shares(self):
        records, _ = _class_records(tuple(RequestClass(f"c{share}", Service(), share) for share in (5, 1, 0.04, 3)))
        drawn = np.bincount(draw_classes(seed_streams(7), records, 4, N), minlength=4) / N
        for got, share in zip(drawn, np.array([5, 1, 0.04, 3]) / 9.04, strict=True):
            assert got == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / N))

    @pytest.mark.parametrize(
        ("service", "variance"),
        [
            (Service("fixed", fixed_ns=700), 0),
            (Service("exponential", fixed_ns=50, mean_ns=9_000), 9_000**2),
            (Service("erlang", mean_ns=9_000, stages=4), 9_000**2 / 4),
            (Service("hyperexponential", phases=((0.9, 1_000), (0.1, 50_000))), 2 * (0.9 * 1e6 + 0.1 * 2.5e9) - 5_900**2),
            (Service("lognormal", mean_ns=9_000, sigma=0.7), 9_000**2 * (math.exp(0.49) - 1)),
            (Service("samples", fixed_ns=10, samples=np.array([1_000, 2_000, 9_000])), (1 + 4 + 81) * 1e6 / 3 - 16e6),
        ],
        ids=lambda each: each.form if isinstance(each, Service) else "",
    )
    def test_a_service_time_has_its_mean_and_variance(self, service, variance):
        records, samples = _class_records((RequestClass("x", service),))
        x = draw_services(seed_streams(11), records, samples.ctypes.data, len(samples), N).astype(float)
        assert x.min() >= 1
        assert x.mean() == pytest.approx(service.average_ns(), abs=5 * math.sqrt(variance / N) + 0.01)
        assert x.var() == pytest.approx(variance, rel=0.1, abs=0.1)

    def test_no_service_takes_less_than_a_nanosecond(self):
        records, samples = _class_records((RequestClass("x", Service("fixed", fixed_ns=0)),))
        assert draw_services(seed_streams(1), records, samples.ctypes.data, len(samples), 3).tolist() == [1, 1, 1]

    def test_every_sample_is_drawn_equally_often(self):
        values = np.arange(1, 11) * 1_000
        records, samples = _class_records((RequestClass("x", Service("samples", samples=values)),))
        x = draw_services(seed_streams(2), records, samples.ctypes.data, len(samples), N)
        drawn, counts = np.unique(x, return_counts=True)
        assert drawn.tolist() == values.tolist()
        assert np.all(np.abs(counts - N / 10) < 5 * math.sqrt(N * 0.09))
