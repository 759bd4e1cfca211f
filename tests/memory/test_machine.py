"""The host of the memory model: pages are conserved, decisions are all or nothing, costs go where they belong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from waveos.errors import ConfigError
from waveos.ipu_emulator.memory import SECOND, STEP_NS
from waveos.ipu_emulator.memory.access import Moving, Recorded, Zipf
from waveos.ipu_emulator.memory.machine import Machine, load_costs
from waveos.memory import DECISION, OUTCOME, SUBSYSTEM, Decision, Message
from waveos.outcome import Outcome

COSTS = load_costs("zram", Path())
N, PAGES = 200, 64


def machine(hot_share=0.3, stray=0.0, **more):
    access = Moving(N, hot_share, 0, stray, False, 1)
    return Machine(access, COSTS, batches=N, pages=PAGES, workers=2, get_ns=5_000.0, seed=1, **more)


def order(kind, *, first=0, batches=1, quota=1 << 40, region=0, seq=10**6):
    made = np.zeros(1, DECISION)
    made["type"], made["subsystem"], made["region"], made["first"] = kind, SUBSYSTEM, region, first
    made["batches"], made["bytes"], made["seq"] = batches, quota, seq
    return made


def outcome_of(told):
    return [Outcome(int(each)) for each in told.view(OUTCOME)["outcome"]]


def test_what_is_reclaimed_comes_back_page_by_page_as_it_is_accessed():
    of = machine()
    _, told = of.apply(order(Decision.RECLAIM, batches=0b1), 0)
    assert outcome_of(told) == [Outcome.COMMITTED]
    assert told.view(OUTCOME)["kib"].tolist() == [PAGES * 4]
    assert of.resident[0] == 0
    assert of.resident_pages == (N - 1) * PAGES
    _, faults = of.advance(0, STEP_NS)
    assert of.resident[0] == faults
    assert 0 < faults <= PAGES
    told = of.tell_refaults(STEP_NS)
    assert told["batches"].tolist() == [1]
    assert len(of.tell_refaults(STEP_NS)) == 0


def test_a_cold_batch_stays_in_swap_and_takes_its_compressed_share():
    of = machine()
    of.reclaim_now(np.arange(N) == N - 1)
    of.advance(0, STEP_NS)
    assert of.resident[N - 1] == 0
    assert of.footprint_pages == pytest.approx(PAGES * (N - 1) + COSTS.page.compressed_share * PAGES)


def test_faults_cost_throughput_and_are_told_as_stall():
    calm, thrashing = machine(), machine()
    served, _ = calm.advance(0, STEP_NS)
    thrashing.reclaim_now(np.ones(N, bool))
    slower, faults = thrashing.advance(0, STEP_NS)
    assert slower < served
    assert thrashing.tell_pressure(STEP_NS)["stall_us"][0] > 0
    assert calm.tell_pressure(STEP_NS)["stall_us"][0] == 0
    assert faults == thrashing.faults


def test_a_decision_is_stale_if_one_of_its_batches_came_back_meanwhile_and_nothing_of_it_is_done():
    of = machine()
    seq = int(of.introduce(0)["seq"][0])
    of.apply(order(Decision.RECLAIM, batches=0b11), 0)
    of.advance(0, STEP_NS)
    before = of.resident.copy()
    cold = 1 << 63  # of the same group, and hot set is the first 60 batches: this one never changed
    _, told = of.apply(order(Decision.RECLAIM, batches=cold | 0b1, seq=seq), 0)
    assert outcome_of(told) == [Outcome.STALE]
    assert (of.resident == before).all()
    _, told = of.apply(order(Decision.RECLAIM, batches=cold, seq=seq), 0)
    assert outcome_of(told) == [Outcome.COMMITTED]


@pytest.mark.parametrize(
    ("wrong", "outcome"),
    [
        ({"quota": 0}, Outcome.INVALID),
        ({"kind": 77}, Outcome.INVALID),
        ({"region": 3}, Outcome.NOT_IN_ENCLAVE),
        ({"first": 63}, Outcome.NOT_IN_ENCLAVE),
        ({"first": 1 << 20}, Outcome.NOT_IN_ENCLAVE),
    ],
)
def test_a_decision_that_makes_no_sense_is_refused(wrong, outcome):
    of = machine()
    _, told = of.apply(order(wrong.pop("kind", Decision.RECLAIM), **wrong), 0)
    assert outcome_of(told) == [outcome]
    assert of.resident_pages == N * PAGES


def test_a_quota_ends_a_reclaim_at_a_whole_batch():
    of = machine()
    _, told = of.apply(order(Decision.RECLAIM, batches=2**64 - 1, quota=5 * PAGES * 4096 + 1), 0)
    assert of.resident_pages == (N - 5) * PAGES
    assert told.view(OUTCOME)["kib"].tolist() == [5 * PAGES * 4]


def test_the_last_group_names_only_batches_that_there_are():
    of = machine()
    of.apply(order(Decision.RECLAIM, first=192, batches=2**64 - 1), 0)
    assert of.resident_pages == 192 * PAGES


def test_access_bits_are_read_once_and_only_of_what_was_asked():
    of = machine()
    of.advance(0, STEP_NS)
    bits, _ = of.apply(order(Decision.SCAN, batches=0b11 | 1 << 62), 0)
    assert bits["type"].tolist() == [Message.ACCESSED]
    assert bits["batches"].tolist() == [0b11 | 1 << 62]
    assert bits["touched"].tolist() == [0b11]
    bits, _ = of.apply(order(Decision.SCAN, batches=0b11), 0)
    assert bits["touched"].tolist() == [0]
    assert of.host_ns["scan"] > 0


def test_a_scan_slows_the_workers_next_accesses():
    first, second = machine(), machine()
    for of in (first, second):
        of.advance(0, STEP_NS)
    second.apply(order(Decision.SCAN, batches=2**60 - 1), 0)
    assert second.advance(STEP_NS, STEP_NS)[0] < first.advance(STEP_NS, STEP_NS)[0]


def test_pages_read_ahead_cost_less_when_they_are_touched():
    cold, warm = machine(), machine()
    for of in (cold, warm):
        of.reclaim_now(np.arange(N) < 60)
    warm.apply(order(Decision.BRING_BACK, batches=2**60 - 1), 0)
    assert warm.footprint_pages == N * PAGES
    slow, faults = cold.advance(0, STEP_NS)
    fast, minor = warm.advance(0, STEP_NS)
    assert fast > slow
    assert faults == minor


def test_a_limit_holds_and_takes_what_was_not_touched_lately():
    of = machine(hot_share=0.3)
    for step in range(3):
        of.advance(step * STEP_NS, STEP_NS)
    of.apply(order(Decision.LIMIT, region=-1, quota=100 * PAGES * 4096), 0)
    assert of.resident_pages <= 100 * PAGES
    for step in range(3, 9):
        of.advance(step * STEP_NS, STEP_NS)
    assert of.resident_pages <= 100 * PAGES
    assert of.resident[:60].mean() > 0.9 * PAGES
    of.apply(order(Decision.LIMIT, region=-1, quota=0), 0)
    assert of.limit_pages == 0


def test_a_hot_set_moves_fully_and_takes_nearly_all_accesses():
    for scrambled in (False, True):
        access = Moving(1000, 0.3, 60 * SECOND, 0.01, scrambled, 1)
        first, second = access.hot(0), access.hot(60 * SECOND)
        assert first.sum() == second.sum() == 300
        assert not (first & second).any()
        assert access.rates(0)[first].sum() == pytest.approx(0.99 + 0.01 * 0.3, rel=1e-3)
        assert access.rates(0).sum() == pytest.approx(1, rel=1e-4)
        assert bool((np.diff(np.flatnonzero(first)) == 1).all()) is not scrambled


def test_zipf_ranks_lie_all_over():
    access = Zipf(1000, 1.0, 0.1, 3)
    rates = np.sort(access.rates(0))[::-1]
    assert rates[0] / rates[9] == pytest.approx(10, rel=1e-3)
    assert access.hot(0).sum() == 100
    assert access.rates(0)[access.hot(0)].min() > access.rates(0)[~access.hot(0)].max()


def test_recorded_accesses_are_played_and_repeat(tmp_path):
    path = tmp_path / "rates.npz"
    np.savez(path, rates=np.array([[1.0, 0, 3], [0, 1, 0]]), step_ms=500)
    access = Recorded(path, 3, 0.3)
    assert access.rates(0).tolist() == [0.25, 0, 0.75]
    assert access.hot(0).tolist() == [False, False, True]
    assert access.rates(600_000_000).tolist() == [0, 1, 0]
    assert access.rates(1_100_000_000).tolist() == [0.25, 0, 0.75]


@pytest.mark.parametrize("rates", [[[1.0, 2]], [[0.0, 0, 0]], [[-1.0, 1, 1]], [1.0, 2, 3]])
def test_recorded_accesses_that_cannot_be_are_refused(tmp_path, rates):
    path = tmp_path / "rates.npz"
    np.savez(path, rates=np.array(rates), step_ms=500)
    with pytest.raises(ConfigError, match=r"wants \[steps, 3\] of numbers"):
        Recorded(path, 3, 0.3)


def test_costs_that_are_not_there_or_broken_are_told(tmp_path):
    with pytest.raises(ConfigError, match=r"no costs 'zran' \(did you mean 'zram'\?\)"):
        load_costs("zran", tmp_path)
    (tmp_path / "mine.toml").write_text("name = 'mine'\n")
    with pytest.raises(ConfigError, match=r"mine.toml: verified: field required"):
        load_costs("mine.toml", tmp_path)
