"""The reference engine: with caches, tiers, eight ranks, and some of them killed, each request gets the very tokens that the plain model gives it.

Rooms of the matrix: every policy; ranks that do not divide the heads, dealt in every way; tiers small enough that KV goes down and comes back; storage that
outlives its engine; one, two and three of eight ranks killed in mid-prefill and in mid-decode, by every recovery; ranks that come back. The smallest margin
by which a token led the second is printed: sums in another order would differ by some 1e-13.
"""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest

from waveos.errors import ConfigError, WaveError
from waveos.host.serving.model import SPOKEN, Dense, Shape, choose
from waveos.host.serving.reference import Reference
from waveos.serving import Placement, Recovery, Tier
from waveos.serving.driver import InProcess
from waveos.serving.text import name_blocks

DEADLINE_S = 120.0
OUTPUTS = 8
SHAPE = Shape()


def _prompts():
    """Two pairs that share 1,900 tokens each, one prompt alone; all of more than 2,000 tokens."""
    rng = np.random.default_rng(7)

    def text(count):
        return [int(each) for each in rng.integers(32, 127, count)]

    left, right = text(1_900), text(1_900)
    return [left + text(140), right + text(101), left + text(257), right + text(120), text(2_010)]


PROMPTS = _prompts()


@pytest.fixture(scope="module")
def wanted():
    """What the plain model says, without cache, tiers and ranks."""
    model = Dense(SHAPE)
    answers = [model.generate(prompt, OUTPUTS) for prompt in PROMPTS]
    print(f"smallest top-2 margin: {min(margin for _, margin in answers):.2e}")
    assert min(margin for _, margin in answers) > 1e-6
    return [tokens for tokens, _ in answers]


class Run:
    """An engine with a policy, and what it says."""

    def __init__(self, policy="strata", params=None, **options):
        self.engine = Reference(**options)
        self.agent = InProcess(policy, params)
        self.said, self.ended = {}, {}
        self.engine.on_token = lambda number, token: self.said.setdefault(number, []).append(token)
        self.engine.on_done = self.ended.__setitem__
        self.until = time.monotonic() + DEADLINE_S

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.engine.close()

    def submit(self, *which):
        for number in which:
            self.engine.submit(number, PROMPTS[number % len(PROMPTS)], OUTPUTS)

    def turn(self):
        assert time.monotonic() < self.until, f"{self.engine.open} requests are left"
        self.agent.exchange(self.engine.mechanism)
        self.engine.advance(0.01)

    def until_true(self, condition):
        while not condition():
            self.turn()

    def finish(self):
        self.until_true(lambda: not self.engine.open and not self.engine._paused and not self.engine.ranks.busy and not self.engine._copies)
        assert np.isfinite(self.engine.statistics.margin) and self.engine.statistics.margin > 1e-6
        self.check_accounts()

    def check_accounts(self):
        """Slots in use are those of blocks, as the mechanism counts them."""
        engine, instance = self.engine, self.engine.mechanism.instances[0]
        for slots, tier in ((engine._device, Tier.DEVICE), (engine._host, Tier.HOST)):
            held = {key: block.tokens for key, block in instance.blocks.items() if block.tiers & tier}
            assert {key: len(each) for key, each in slots.of.items()} == held
        assert engine._device.free == engine.device_tokens - sum(len(each) for each in engine._device.of.values())
        assert all(block.users == 0 for block in instance.blocks.values())

    def killed_in_a_step(self, *ranks):
        """SIGKILL them while a step is under way that cannot end without them: they are stopped first."""
        engine = self.engine
        pids = [engine.ranks.pid(rank) for rank in ranks]
        while True:
            self.until_true(lambda: engine.ranks.busy and engine._asked[0] == "step")
            step = engine.statistics.steps
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            for _ in range(5):
                self.turn()
            if engine.ranks.busy and engine._asked[0] == "step" and engine.statistics.steps == step:
                break
            for pid in pids:  # it had ended before
                os.kill(pid, signal.SIGCONT)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)


def answers(run, *which):
    return [run.said[number] for number in which]


@pytest.mark.parametrize("policy", ["fcfs_lru", "lpm", "strata", "failsafe"])
def test_tokens_are_the_same_with_every_policy_and_tiers_too_small_for_all(policy, wanted):
    """The device holds two of the prompts, so that KV is evicted to host memory, and comes back for the second round."""
    with Run(policy, {"write_threshold": 1}, device_tokens=5_000, host_tokens=12_000) as run:
        run.submit(0, 1, 4)
        run.finish()
        run.submit(2, 3, 5, 6)
        run.finish()
        assert answers(run, 0, 1, 2, 3, 4) == wanted
        assert answers(run, 5, 6) == wanted[:2]
        assert run.engine.statistics.loaded > 1_000_000
        assert run.engine.statistics.backed_up > 1_000_000
        assert run.engine.mechanism.requests == {}


@pytest.mark.parametrize(("ranks", "placement"), [(1, "HYBRID"), (3, "HYBRID"), (5, "STATIC"), (5, "CYCLIC"), (7, "HYBRID")])
def test_tokens_are_the_same_on_any_number_of_ranks_however_heads_are_dealt(ranks, placement, wanted):
    with Run("failsafe", {"most_replicated": 1.0}, ranks=ranks) as run:
        run.turn()
        if placement != "HYBRID":
            run.engine.place(0, Placement[placement])
        run.submit(0, 2)
        run.finish()
        assert answers(run, 0, 2) == [wanted[0], wanted[2]]
        assert (-1 in run.engine.sharding.heads[0]) == (placement == "HYBRID" and 8 % ranks != 0)


@pytest.mark.parametrize("recovery", [Recovery.RECOMPUTE, Recovery.HOST, Recovery.FULL])
@pytest.mark.parametrize("killed", [(3,), (0, 5), (1, 2, 7)])
def test_ranks_killed_in_mid_decode_do_not_change_a_token_and_come_back(killed, recovery, wanted):
    kept = {"write_threshold": 1e9} if recovery is Recovery.RECOMPUTE else {}
    with Run("failsafe", {"recovery": int(recovery), **kept}) as run:
        run.submit(0, 1)
        run.until_true(lambda: all(len(run.said.get(number, ())) >= 2 for number in (0, 1)) and not run.engine._copies)
        prefilled = run.engine.statistics.prefilled
        run.killed_in_a_step(*killed)
        run.until_true(lambda: len(run.engine.sharding.ranks) == 8 - len(killed))
        run.submit(2)
        run.finish()
        again = run.engine.statistics.prefilled - prefilled - len(PROMPTS[2])
        assert (again > 1_000) == (recovery is Recovery.RECOMPUTE)  # what they share is computed once more, or not at all
        for rank in killed:
            run.engine.come_back(rank)
        run.submit(3)
        run.until_true(lambda: len(run.engine.sharding.ranks) == 8)
        run.finish()
        assert answers(run, 0, 1, 2, 3) == wanted[:4]


@pytest.mark.parametrize("killed", [(6,), (0, 1), (2, 3, 4)])
def test_ranks_killed_in_mid_prefill_do_not_change_a_token(killed, wanted):
    with Run("failsafe") as run:
        run.submit(0)
        run.until_true(lambda: run.engine.statistics.prefilled > 600)
        run.killed_in_a_step(*killed)
        run.submit(3)
        run.finish()
        assert run.engine.ranks.alive == [rank for rank in range(8) if rank not in killed]
        assert answers(run, 0, 3) == [wanted[0], wanted[3]]


def test_one_rank_after_another_dies_until_one_is_left_and_then_it_is_said(wanted):
    with Run("failsafe") as run:
        run.engine.submit(1, PROMPTS[1], 60)
        for rank in range(7):
            said = len(run.said.get(1, ()))
            run.until_true(lambda said=said: len(run.said.get(1, ())) > said)
            run.killed_in_a_step(rank)
            run.until_true(lambda rank=rank: len(run.engine.sharding.ranks) == 7 - rank)
        run.finish()
        assert run.said[1][:OUTPUTS] == wanted[1] and len(run.said[1]) == 60
        run.engine.kill(7)
        with pytest.raises(WaveError, match="the last rank has died"):
            run.until_true(lambda: False)


def test_ordinary_tensor_parallelism_computes_everything_again_and_says_the_same(wanted):
    with Run("fcfs_lru") as run:
        run.submit(0, 1)
        run.until_true(lambda: len(run.said.get(0, ())) >= 2)
        run.killed_in_a_step(4)
        run.finish()
        assert answers(run, 0, 1) == wanted[:2]


def test_kv_of_a_lost_rank_that_was_wrongly_thought_to_be_there_would_change_the_tokens(wanted):
    """The matrix can fail: one block's KV of one head, spoilt on one device, is a wrong answer."""
    with Run("strata") as run:
        run.submit(0)
        run.finish()
        key = name_blocks(PROMPTS[0], run.engine.block)[0][3]
        run.engine.ranks.shared["device"][2, :, :, 2, run.engine._device.of[key]] = 0.0
        run.submit(2)
        run.finish()
        assert answers(run, 2) != [wanted[2]]


def test_a_cache_in_files_outlives_its_engine_and_its_tokens_are_the_same(tmp_path, wanted):
    with Run("strata", {"write_threshold": 1, "store_threshold": 1}, storage=tmp_path) as run:
        run.submit(0)
        run.finish()
        stored = run.engine.mechanism.instances[0]
        run.until_true(lambda: sum(bool(block.tiers & Tier.STORAGE) for block in stored.blocks.values()) >= 15)
    with Run("strata", {"prefetch_wait_ms": 60_000}, storage=tmp_path) as run:
        run.submit(2)
        run.finish()
        assert answers(run, 2) == [wanted[2]]
        assert run.engine.statistics.prefilled < 800


def test_a_client_that_leaves_at_any_time_leaves_nothing_behind(wanted):
    with Run("strata") as run:
        run.submit(0, 1, 2, 4)
        run.until_true(lambda: run.engine.statistics.prefilled > 300)
        run.engine.leave(0)
        run.until_true(lambda: len(run.said.get(1, ())) >= 2)
        run.engine.leave(1)
        run.engine.leave(1)
        run.finish()
        assert answers(run, 2, 4) == [wanted[2], wanted[4]]


class TestBadInput:
    def test_a_request_longer_than_the_pool(self):
        with Run(device_tokens=1_024, ranks=1) as run, pytest.raises(ConfigError, match=r"a request of 2040 \+ 8 tokens; the KV pool holds 1024"):
            run.submit(0)

    def test_more_ranks_than_heads(self):
        with pytest.raises(ConfigError, match="9 ranks: the reference engine has 1 to 8"):
            Reference(ranks=9)

    def test_tokens_that_are_none(self):
        with Run(ranks=1) as run, pytest.raises(ConfigError, match="at least one each, below"):
            run.engine.submit(1, [9_999], 3)


def test_the_coldest_temperature_says_the_likeliest():
    assert choose(np.arange(len(SPOKEN)) * 1.0, 5e-324, lambda: 0.999) == choose(np.arange(len(SPOKEN)) * 1.0) == (int(SPOKEN[-1]), 1.0)
