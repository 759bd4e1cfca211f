"""Memory policies, on a small machine in virtual time and on streams made by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from waveos.agents.memory import posteriors
from waveos.agents.memory.batches import Batches, Quota
from waveos.agents.memory.sol import Sol
from waveos.bench import memory_safeguards
from waveos.ipu_emulator.memory import NOTHING, ORACLE, SECOND, STEP_NS, Setup, simulate
from waveos.ipu_emulator.memory.access import Moving
from waveos.ipu_emulator.memory.machine import load_costs
from waveos.ipu_emulator.profile import load_link
from waveos.memory import MESSAGE, OUTCOME, Decision, Message
from waveos.outcome import Outcome
from waveos.policy import load_policy, policy_names
from waveos.policy.plain import PlainRuntime

COSTS, LINK = load_costs("zram", Path()), load_link("mount-evans")
BATCHES = 2_048


def setup(policy, *, move_s=60.0, access=None, **more):
    access = access or Moving(BATCHES, 0.3, int(move_s * SECOND), 1e-4, False, 1)
    settings = {"batches": BATCHES, "workers": 1, "warmup_ns": 60 * SECOND, "duration_ns": 120 * SECOND, "message_ns": 50.0}
    return Setup(policy, access, COSTS, LINK, **(settings | more))


def run(policy, **more):
    return simulate(setup(policy, **more))


# What each saves


@pytest.fixture(scope="module")
def oracle():
    return run(ORACLE).figures


@pytest.mark.parametrize(("policy", "share"), [("sol", 0.7), ("region_age", 0.7), ("clock", 0.5), ("psi_backoff", 0.2)])
def test_a_policy_saves_its_share_of_what_the_oracle_does_at_5_percent_of_throughput_or_less(policy, share, oracle):
    figures = run(policy).figures
    assert figures["saved_share"] >= share * oracle["saved_share"]
    assert figures["throughput_ratio"] >= 0.95


def test_what_sol_reclaims_is_cold_and_what_is_cold_it_reclaims():
    figures = run("sol").figures
    assert figures["precision"] > 0.95
    assert figures["recall"] > 0.8


def test_static_keeps_to_its_limit():
    limit = BATCHES * 256 // 1024 // 2
    run_ = run("static", params={"limit_mib": limit})
    resident = run_.maps["resident"][-1]
    assert float(np.mean(resident)) <= 0.51
    assert run_.outcomes["committed"] == 1


def test_equal_seeds_give_equal_runs():
    first, second = run("sol"), run("sol")
    assert first.figures == second.figures
    assert first.series == second.series
    assert run("sol", seed=2).series != first.series


@pytest.mark.parametrize("policy", ["sol", "region_age", "clock"])
def test_where_everything_is_hot_nothing_is_reclaimed(policy):
    access = Moving(BATCHES, 1.0, 0, 0.0, False, 1)
    assert run(policy, access=access).figures["saved_share"] < 0.005


def test_a_region_that_is_unmapped_is_forgotten_and_its_places_are_used_again():
    of = Batches(mark="u1")

    def region(number, count):
        told = np.zeros(1, MESSAGE)
        told["region"], told["count"], told["bytes"] = number, count, 4096
        return told[0]

    class Told:
        def __init__(self, record):
            self.region, self.count, self.bytes = int(record["region"]), int(record["count"]), int(record["bytes"])

    first = of.map(Told(region(0, 100)))
    second = of.map(Told(region(1, 70)))
    of.mark[second] = 7
    of.unmap(Told(region(0, 100)))
    third = of.map(Told(region(2, 128)))
    assert third.start == first.start
    assert of.mark[second].tolist() == [7] * 70
    assert of.mark[third].tolist() == [0] * 128
    where = of.where(of.live)
    assert sorted(zip(where[0].tolist(), where[1].tolist(), strict=True)) == [(1, 0), (1, 64), (2, 0), (2, 64)]
    assert sum(int(word).bit_count() for word in where[2]) == 70 + 128


def test_words_of_batches_that_a_region_does_not_have_are_passed_over():
    of = Batches()

    class Told:
        region, count, bytes = 0, 10, 4096

    of.map(Told)
    msgs = np.zeros(3, MESSAGE)
    msgs["region"], msgs["first"], msgs["batches"], msgs["touched"] = (0, 0, 5), (0, 640, 0), 2**64 - 1, 2**64 - 1
    of.hear(msgs)
    scanned, touched = of.take()
    assert scanned.sum() == touched.sum() == 10
    assert of.take()[0].sum() == 0


def test_a_quota_is_saved_up_for_its_burst_and_no_longer():
    of = Batches()

    class Told:
        region, count, bytes = 0, 1000, 1 << 20

    of.map(Told)
    quota = Quota(0.05, burst_s=2.0)
    assert quota.choose(of, of.live, 5 * SECOND).sum() == 0  # nothing has been saved up before the first look
    assert quota.choose(of, of.live, 6 * SECOND).sum() == 50
    assert quota.choose(of, of.live, 60 * SECOND).sum() == 100
    quota.allowed_bytes_per_s = 10 << 20
    assert quota.choose(of, of.live, 61 * SECOND).sum() == 10
    quota.allowed_bytes_per_s = 0
    assert quota.choose(of, of.live, 90 * SECOND).sum() == 0


# The step


def test_a_draw_from_the_table_has_the_distribution_of_beta():
    table = posteriors.table() / posteriors.SCALE
    for a, b in [(1, 1), (3, 9), (12, 4), (1, 15)]:
        assert table[a, b].mean() == pytest.approx(a / (a + b), abs=2e-3)
        assert table[a, b].var() == pytest.approx(a * b / ((a + b) ** 2 * (a + b + 1)), rel=0.02)


def test_periods_grow_where_nothing_changes_and_shrink_where_things_do():
    n = 6_400
    rng = np.random.default_rng(3)
    counts, arm = np.ones((n, 2 * posteriors.ARMS), np.uint8), np.full(n, 5, np.uint8)
    idle, due, last = (np.zeros(n, np.uint32) for _ in range(3))
    quantiles, weight = posteriors.table(), posteriors.weights(0.5)
    words = np.zeros(n // 64, np.uint64)
    restless = np.arange(n) < n // 2
    for tick in range(1, 600):
        posteriors.due_words(due, tick, words)
        bits = np.where(restless, rng.random(n) < 1 - 0.5 ** (1 + tick - last), False)
        touched = np.packbits(bits, bitorder="little").view(np.uint64)
        posteriors.learn(words, touched, tick, 1, counts, arm, idle, due, last, quantiles, weight)
    assert arm[~restless].mean() > 3.5
    assert counts.max() <= posteriors.COUNTS
    assert counts.min() >= 1
    assert (counts[:, : posteriors.ARMS] + counts[:, posteriors.ARMS :].astype(int) <= posteriors.COUNTS).all()
    assert (due > last).all()


def test_a_batch_that_is_not_due_is_left_as_it_is():
    n = 128
    due = np.full(n, 9, np.uint32)
    due[5] = 3
    words = np.zeros(2, np.uint64)
    assert posteriors.due_words(due, 3, words) == 1
    assert words.tolist() == [1 << 5, 0]


# The safeguards


@pytest.fixture(scope="module")
def guarded():
    metrics: dict[str, float] = {}
    for _ in memory_safeguards.measure(metrics):
        pass
    return metrics


@pytest.mark.parametrize("what", ["jump", "adversary", "nonsense"])
def test_the_actuator_stops_within_one_assessment_and_throughput_is_back_within_one_epoch(what, guarded):
    assert guarded[f"safeguard_{what}_stop_assessments"] <= 1
    assert guarded[f"safeguard_{what}_throughput_after_epoch"] >= 0.95
    assert "do NOT" not in memory_safeguards.judge(guarded)


def test_without_its_safeguards_a_model_of_nonsense_costs_much(guarded):
    assert guarded["safeguard_nonsense_unguarded_throughput"] < 0.95


def test_a_hot_set_that_stays_stops_nothing_before_it_jumps():
    stops = [at_s for at_s, _ in memory_safeguards.simulate_jump().stops]
    assert not any(50 < at_s < memory_safeguards.JUMP_S for at_s in stops)


def stream(*rows):
    made = np.zeros(len(rows), MESSAGE)
    for record, row in zip(made, rows, strict=True):
        for name, value in row.items():
            record[name] = value
    return made


def agent(count=128):
    """A Sol that knows one region, at 0 s, and a function that gives it messages and lets time pass."""
    runtime = PlainRuntime(Sol)
    runtime.feed(stream({"type": Message.REGION_MAPPED, "seq": 1, "count": count, "bytes": 4096}, {"type": Message.BATCH_END, "region": -1}))

    def at(now_ns, *rows):
        return runtime.feed(stream(*rows, {"type": Message.BATCH_END, "region": -1, "time_ns": now_ns}))

    return runtime, at


def test_data_that_says_that_nothing_is_hot_any_more_is_not_believed_until_it_was_said_three_times():
    runtime, at = agent(count=64 * 64)
    believed = []
    for step in range(1, 40):
        asked = at(step * STEP_NS)
        rows = [scanned(each) for each in asked[asked["type"] == Decision.SCAN]]
        if rows:
            at(step * STEP_NS + 1, *rows)
            believed.append((runtime.policy.suspicious, bool(runtime.policy.batches.idle.any())))
    assert believed[:3] == [(1, False), (2, False), (3, True)]


def scanned(order, touched=0):
    return {"type": Message.ACCESSED, "seq": 2, "first": int(order["first"]), "batches": int(order["batches"]), "touched": touched}


@pytest.mark.parametrize(("stall_us", "stops"), [(100_000, 0), (130_000, 1)])
def test_an_application_that_stalls_for_more_than_5_percent_of_the_time_stops_the_actuator(stall_us, stops):
    runtime, at = agent()
    at(1, {"type": Message.PRESSURE, "region": -1, "stall_us": stall_us})
    at(2_400 * 1_000_000 + 1)
    assert len(runtime.policy.stops) == stops
    assert (runtime.policy.stopped_until > 2_400 * 1_000_000) == bool(stops)


def test_a_scan_that_failed_is_asked_for_again():
    runtime, at = agent()
    asked = np.concatenate([at(step * STEP_NS) for step in range(1, 40)])
    assert np.isin(asked["type"], [Decision.SCAN]).any()
    assert len(at(40 * STEP_NS)) == 0  # all have been asked, and nothing was answered
    record = np.zeros(1, OUTCOME)
    record["type"], record["batches"], record["outcome"], record["decision"] = Message.TXN_OUTCOME, 0b101, Outcome.CONGESTED, Decision.SCAN
    runtime.feed(record.view(MESSAGE))
    again = at(41 * STEP_NS)
    assert again["type"].tolist() == [Decision.SCAN]
    assert again["batches"].tolist() == [0b101]


def test_a_reclaim_that_failed_leaves_its_batches_resident_and_hot():
    runtime, _at = agent()
    of = runtime.policy.batches
    of.resident[:128] = False
    record = np.zeros(1, OUTCOME)
    record["type"], record["batches"], record["outcome"], record["decision"] = Message.TXN_OUTCOME, 0b11, Outcome.STALE, Decision.RECLAIM
    runtime.feed(record.view(MESSAGE))
    assert np.flatnonzero(of.resident).tolist() == [0, 1]
    assert not runtime.policy.predict()[:2].any()


def test_a_budget_of_nothing_stops_reclaiming_and_scanning_goes_on():
    runtime, at = agent()
    at(1, {"type": Message.BUDGET_CHANGED, "region": -1, "bytes": 0, "stall_us": 50_000})
    decided = []
    for step in range(1, 300):
        asked = at(step * STEP_NS)
        decided.append(asked)
        # one batch stays hot, so that the data are believed
        rows = [scanned(each, touched=int(each["batches"]) & 1) for each in asked[asked["type"] == Decision.SCAN]]
        if rows:
            decided.append(at(step * STEP_NS + 1, *rows))
    kinds = np.concatenate(decided)["type"]
    assert runtime.policy.predict().sum() >= 126
    assert (kinds == Decision.SCAN).sum() > 10
    assert (kinds == Decision.RECLAIM).sum() == 0


@pytest.mark.parametrize("policy", policy_names("memory"))
def test_every_policy_begins_anew_at_a_resync_and_does_the_same_again(policy):
    params = {"limit_mib": 1} if policy == "static" else {}
    runtime = PlainRuntime(load_policy(policy), params)

    def once():
        made = [runtime.feed(stream({"type": Message.RESYNC, "region": -1}))]
        made.append(runtime.feed(stream({"type": Message.REGION_MAPPED, "seq": 1, "count": 200, "bytes": 1 << 18})))
        for step in range(1, 120):
            end = {"type": Message.BATCH_END, "region": -1, "time_ns": step * STEP_NS}
            told = runtime.feed(stream({"type": Message.PRESSURE, "region": -1, "bytes": 50 << 20}, end))
            made.append(told)
            made += [runtime.feed(stream(scanned(each, touched=1), end)) for each in told[told["type"] == Decision.SCAN]]
        decided = np.concatenate(made)
        decided["txn"] = 0
        return decided

    first, second = once(), once()
    assert len(first) > 0
    assert first.tobytes() == second.tobytes()


def test_nothing_is_reclaimed_without_a_policy():
    assert run(NOTHING).figures["saved_share"] == 0
