"""The live benchmark knows when the host CPU was not itself, and leaves out what that has to do with."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest

from waveos.bench.live_watch import find_disturbed, find_slow, watching
from waveos.bench.live_window import Usage, look_back
from waveos.host.service import Served

MS = 1_000_000
IDLE = Usage(0, 0, 0.0, 0.0)


def looks(slow_ms: list[int], n: int = 1_000) -> np.ndarray:
    """One a millisecond, of 3 us; those of `slow_ms` take 30."""
    took = np.full(n, 3_000)
    took[slow_ms] = 30_000
    return np.stack([np.arange(n) * MS, took], axis=1)


def served(begin_ms: list[float], end_ms: list[float]) -> Served:
    begin, end = (np.round(np.array(each) * MS).astype(np.int64) for each in (begin_ms, end_ms))
    return Served(np.zeros(len(begin), bool), begin, begin, end)


def test_a_cpu_is_slow_where_several_looks_together_took_long() -> None:
    found = find_slow(looks([200, 201, 203, 500, 700, 701, 702, 720, 721, 722]), 0, 1_000 * MS)
    assert (found // MS).tolist() == [[197, 206], [697, 705], [717, 725]]


def test_a_look_that_met_an_interrupt_is_no_slow_cpu() -> None:
    assert not len(find_slow(looks([100, 104, 300, 301]), 0, 1_000 * MS))


def test_only_what_overlaps_with_the_window_is_told() -> None:
    every = looks([200, 201, 202, 700, 701, 702])
    assert len(find_slow(every, 0, 100 * MS)) == 0
    assert (find_slow(every, 203 * MS, 600 * MS) // MS).tolist() == [[197, 205]]


def test_a_busy_period_that_was_slow_in_part_is_left_out_whole_and_no_other() -> None:
    begin, end = [1, 10, 11, 12, 30, 50], [2, 20, 13, 25, 31, 51]
    assert find_disturbed(served(begin, end), np.array([[14 * MS, 15 * MS]])).tolist() == [False, True, True, True, False, False]
    assert not find_disturbed(served(begin, end), np.array([[26 * MS, 29 * MS]])).any()  # nothing was to be done meanwhile


def test_a_request_that_never_ends_keeps_its_busy_period_open() -> None:
    assert find_disturbed(served([1, 10, 30], [2, 0, 31]), np.array([[60 * MS, 70 * MS]])).tolist() == [False, True, True]


def test_figures_of_time_are_of_what_was_not_disturbed() -> None:
    begin = [float(each) for each in range(1_000)]
    end = [each + (0.9 if 400 <= each < 450 else 0.01) for each in begin]
    window = look_back(served(begin, end), IDLE, IDLE, np.array([[400 * MS, 450 * MS]]))
    assert window.get_p99_us == pytest.approx(10.0) and window.disturbed_share == pytest.approx(0.05, abs=0.002)
    assert look_back(served(begin, end), IDLE, IDLE).get_p99_us == pytest.approx(900.0)


@pytest.mark.skipif(os.geteuid() != 0, reason="the watch is real-time, for which one must be root")
def test_a_watch_looks_every_millisecond_and_leaves_nothing_behind() -> None:
    core = min(os.sched_getaffinity(0))
    with watching(core) as watch:
        before = int(watch._words[0])
        deadline = time.monotonic() + 30
        while int(watch._words[0]) < before + 50:
            assert time.monotonic() < deadline, "no looks"
            time.sleep(0.01)
        at = watch._words[2:].reshape(-1, 2)[: int(watch._words[0])]
        assert np.all(np.diff(at[:, 0]) > 0) and np.all(at[:, 1] > 0)
