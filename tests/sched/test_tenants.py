"""The proof of core scheduling: it finds every moment that two tenants share a core, and says nothing of a trace that is not whole."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from waveos.errors import WaveError
from waveos.sched.tenants import shared
from waveos.trace import TRACE_EVENT, TraceKind

BEGIN, END = TraceKind.RUN_BEGIN, TraceKind.RUN_END


def trace(*events):
    """(time, kind, cpu, tid) each."""
    return np.array([(at, kind, cpu, tid, 0, 0) for at, kind, cpu, tid in events], TRACE_EVENT)


def found(events, tenants=lambda tid: tid // 10):
    """CPUs 0 and 2 are a core, 1 and 3 another; threads 0..9 are tenant 0's, and so on."""
    return shared(events, lambda cpu: cpu % 2, tenants)


def test_two_tenants_on_siblings_are_found_with_their_time():
    [one] = found(trace((10, BEGIN, 0, 1), (20, BEGIN, 2, 11), (35, END, 0, 1), (50, END, 2, 11)))
    assert (one.core, one.begin_ns, one.end_ns, one.tenants) == (0, 20, 35, (0, 1))
    assert "thread 1 of tenant 0 beside thread 11 of tenant 1" in str(one)


def test_one_tenant_on_siblings_and_two_on_different_cores_are_in_order():
    assert found(trace((1, BEGIN, 0, 1), (2, BEGIN, 2, 2), (3, BEGIN, 1, 11), (9, END, 0, 1), (9, END, 2, 2), (9, END, 1, 11))) == []


def test_a_thread_that_leaves_as_another_comes_has_left():
    assert found(trace((1, BEGIN, 0, 1), (5, BEGIN, 2, 11), (5, END, 0, 1), (9, END, 2, 11))) == []


def test_a_run_that_has_no_end_lasts_until_the_trace_ends():
    [one] = found(trace((1, BEGIN, 0, 1), (5, BEGIN, 2, 11), (7, BEGIN, 1, 3)))
    assert (one.begin_ns, one.end_ns) == (5, 8)


def test_other_events_do_not_count_and_the_order_of_the_array_does_not_matter():
    assert len(found(trace((20, BEGIN, 2, 11), (50, END, 2, 11), (30, TraceKind.IDLE_BEGIN, 0, -1), (35, END, 0, 1), (10, BEGIN, 0, 1)))) == 1


@pytest.mark.parametrize(
    "events",
    [[(5, END, 0, 1)], [(1, BEGIN, 0, 1), (5, END, 0, 2)], [(1, BEGIN, 0, 1), (5, BEGIN, 0, 2)]],
    ids=["an end without a begin", "the end of another thread", "a begin while another runs"],
)
def test_nothing_is_proved_over_a_trace_that_is_not_whole(events):
    with pytest.raises(WaveError, match="not whole"):
        found(trace(*events))


def test_an_empty_trace_shares_nothing():
    assert found(trace()) == []


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 29), st.integers(1, 9), st.integers(0, 5)), max_size=30))
def test_it_finds_what_looking_at_every_moment_finds(runs):
    """Runs one after the other on each CPU; the check by brute force samples every nanosecond."""
    free, events = [0] * 4, []
    spans = []
    for cpu, tid, length, gap in runs:
        begin = free[cpu] + gap
        free[cpu] = begin + length
        spans.append((cpu, tid, begin, begin + length))
        events += [(begin, BEGIN, cpu, tid), (begin + length, END, cpu, tid)]
    broken = any(
        one[0] % 2 == two[0] % 2 and one[0] != two[0] and one[1] // 10 != two[1] // 10 and max(one[2], two[2]) < min(one[3], two[3])
        for one in spans
        for two in spans
    )
    assert bool(found(trace(*events))) == broken
