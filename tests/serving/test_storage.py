"""The storage tier by policy: what is used often is written, it is fetched while its request waits, and given up when waiting would not pay."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from waveos import serving
from waveos.ipu_emulator.serving.cost import load_constants
from waveos.ipu_emulator.serving.simulate import Setup, Simulation, load_system
from waveos.ipu_emulator.serving.workload import make_workload
from waveos.policy import load_policy
from waveos.policy.plain import PlainRuntime
from waveos.serving import Decision, Tier

sys.path.insert(0, str(Path(__file__).parent))
from engines import Host

MS = 1_000_000
WAIT_MS, KI_MS = 10, 100


class Pair:
    """A host with storage, and a policy that hears it at the times of the test."""

    def __init__(self, policy="fcfs_tiered"):
        self.host = Host(device=20_000, host=20_000, storage=50_000)
        self.runtime = PlainRuntime(load_policy(policy), {"prefetch_wait_ms": WAIT_MS, "prefetch_wait_ki_ms": KI_MS, "store_threshold": 1})

    def turn(self, now_ms):
        """Tell and be told; names of the decisions."""
        end = np.zeros(1, serving.MESSAGE)
        end["type"], end["request"], end["time_ns"] = serving.Message.BATCH_END, -1, now_ms * MS
        decided = self.runtime.feed(np.concatenate([self.host.mechanism.take_messages(), end]))
        self.host.mechanism.commit(decided)
        return [Decision(each).name for each in decided["type"].tolist()]

    def settle(self):
        """All copies arrive."""
        for transfer in self.host.engine.transfers:
            if not transfer.done:
                self.host.mechanism.transfer_done(transfer)

    def only_in_storage(self):
        """A prompt of 1,000 tokens was served and written to storage, and left the other tiers."""
        self.host.arrive(1, [11, 12], size=500)
        assert "FORM_BATCH" in self.turn(0)
        self.host.run_batch()
        assert "BACK_UP" in self.turn(1)
        self.settle()
        assert self.turn(2).count("BACK_UP") == 2
        self.settle()
        self.turn(3)
        for tier in (Tier.DEVICE, Tier.HOST):
            self.host.mechanism.lose(0, [11, 12], tier)
        self.turn(4)
        assert {block.tiers for block in self.host.instance.blocks.values()} == {int(Tier.STORAGE)}


@pytest.fixture(params=["fcfs_tiered", "strata"])
def pair(request):
    made = Pair(request.param)
    made.only_in_storage()
    return made


def test_what_storage_has_is_fetched_before_its_request_begins(pair):
    pair.host.arrive(2, [11, 12, 21], size=500)
    assert pair.turn(10) == ["PREFETCH"]
    assert pair.turn(10 + WAIT_MS) == []
    pair.settle()
    assert "FORM_BATCH" in pair.turn(40)
    assert pair.host.mechanism.requests[2].hit == 1_000


def test_a_request_waits_its_time_then_the_rest_is_cancelled_and_it_begins_with_what_came(pair):
    pair.host.arrive(2, [11, 12, 21], size=500)
    assert pair.turn(10) == ["PREFETCH"]
    last_ms = 10 + WAIT_MS + KI_MS * 1_000 / 1_024
    assert pair.runtime.next_timer_ns == pytest.approx(last_ms * MS)
    assert pair.turn(int(last_ms) - 1) == []
    assert pair.turn(int(last_ms) + 1) == ["CANCEL"]
    assert pair.turn(int(last_ms) + 2) == []  # once is enough
    transfer = pair.host.engine.stopped
    pair.host.mechanism.give_back(transfer, transfer.blocks[1:])
    pair.host.mechanism.transfer_done(transfer)
    assert "FORM_BATCH" in pair.turn(200)
    assert pair.host.mechanism.requests[2].hit == 500


def test_others_do_not_wait_for_a_request_that_fetches(pair):
    pair.host.arrive(2, [11, 12, 21], size=500)
    pair.host.arrive(3, [31], size=500)
    assert pair.turn(10) == ["PREFETCH", "FORM_BATCH", "PART"]
    assert pair.host.mechanism.requests[3].computed == 500


def test_too_little_is_not_worth_fetching(pair):
    pair.runtime.policy.prefetch_threshold = 2_000
    pair.host.arrive(2, [11, 12, 21], size=500)
    assert pair.turn(10) == ["FORM_BATCH", "PART"]
    assert pair.host.mechanism.requests[2].hit == 0


def test_a_client_that_leaves_while_its_prefix_comes_leaves_nothing_behind(pair):
    pair.host.arrive(2, [11, 12, 21], size=500)
    pair.turn(10)
    pair.host.mechanism.leave(2)
    transfer = pair.host.engine.stopped
    pair.host.mechanism.give_back(transfer, list(transfer.blocks))
    pair.host.mechanism.transfer_done(transfer)
    assert pair.turn(20) == []
    assert pair.host.instance.free[int(Tier.HOST)] == 20_000
    assert not pair.runtime.policy.fetching and not pair.runtime.policy.here[0].coming
    pair.host.arrive(3, [11, 12, 31], size=500)
    assert pair.turn(30) == ["PREFETCH"]


def test_storage_spares_computing_in_a_whole_run_and_every_request_is_served():
    """Host memory holds a fifth of the contexts."""
    constants = load_constants()
    runs = {}
    for storage in (0.0, 1e12):
        setup = Setup(load_system("strata"), in_flight=32, host_bytes=4e10, storage_bytes=storage)
        simulation = Simulation(setup, make_workload("loogle", 1.0, constants.fitted, queries=400))
        result = simulation.run()
        assert result.requests == 400
        runs[storage] = sum(batch.computed for batch in result.batches), simulation.node.executors[0].storage.tokens
    assert runs[0.0][1] == 0 and runs[1e12][1] > 100_000
    assert runs[1e12][0] < 0.9 * runs[0.0][0]
