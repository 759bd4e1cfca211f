"""The host's half of serving: what is committed is applied whole, what is stale or impossible not at all, and memory is accounted for."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from waveos import serving
from waveos.errors import ConfigError
from waveos.serving import Tier

sys.path.insert(0, str(Path(__file__).parent))
from engines import Host


def state(host):
    """Everything a refused transaction must leave as it was."""
    instance = host.instance
    blocks = {key: (block.tiers, block.users, block.readers, block.transfer is None) for key, block in instance.blocks.items()}
    requests = {number: (each.state, each.computed, each.reserved, each.locked, each.chunks) for number, each in host.mechanism.requests.items()}
    return dict(instance.free), blocks, requests, instance.staged, len(host.engine.batches), len(host.engine.transfers)


class TestABatch:
    def test_is_computed_and_its_kv_is_cache_for_the_next_request(self):
        host = Host()
        host.serve(1, [11, 12])
        host.arrive(2, [11, 12, 13])
        assert host.batch((2, 200, 100)) == ["COMMITTED", "COMMITTED"]
        assert host.mechanism.requests[2].hit == 200
        assert host.engine.transfers == []

    def test_that_builds_on_host_memory_loads_what_it_needs_once_for_all_its_parts(self):
        host = Host()
        host.serve(1, [11, 12])
        host.order(lambda txns: serving.back_up(txns, 0, [11, 12]))
        for transfer in host.engine.transfers:
            host.mechanism.transfer_done(transfer)
        assert host.order(lambda txns: serving.evict(txns, 0, [12, 11])) == ["COMMITTED"] * 2
        host.arrive(2, [11, 12, 13])
        host.arrive(3, [11, 12, 14])
        assert host.batch((2, 200, 100), (3, 200, 100)) == ["COMMITTED"] * 3
        (load,) = host.engine.transfers[2:]
        assert ([block.id for block in load.blocks], load.target) == ([11, 12], Tier.DEVICE)

    def test_on_a_cache_that_lost_a_block_unasked_aborts_whole(self):
        host = Host()
        host.serve(1, [11, 12])
        host.arrive(2, [11, 12, 13])
        host.arrive(3, [31])
        host.mechanism.lose(0, [12], Tier.DEVICE)
        before = state(host)
        assert host.batch((3, 0, 100), (2, 200, 100), cache_seq=0) == ["STALE"] * 3
        assert state(host) == before

    def test_is_stale_even_where_the_lost_block_was_none_of_its_own(self):
        host = Host()
        host.serve(1, [11])
        host.arrive(2, [21])
        host.mechanism.lose(0, [11], Tier.DEVICE)
        assert host.batch((2, 0, 100), cache_seq=0) == ["STALE"] * 2
        assert host.batch((2, 0, 100), cache_seq=1) == ["COMMITTED"] * 2

    def test_that_names_a_request_whose_state_moved_on_aborts_whole(self):
        host = Host()
        host.arrive(1, [11])
        host.arrive(2, [21])
        txns = serving_batch([(1, 0, 100), (2, 0, 100)])
        txns["seq"] = [-1, 1, 0]
        before = state(host)
        assert host.commit(txns) == ["STALE"] * 3
        assert state(host) == before

    @pytest.mark.parametrize(
        ("parts", "outcome"),
        [
            ([(1, 0, 100), (9, 0, 100)], "TARGET_GONE"),
            ([(1, 0, 101)], "INVALID"),
            ([(1, 0, 0)], "INVALID"),
            ([(1, 0, 50), (1, 50, 50)], "INVALID"),
            ([(1, 100, 1)], "INVALID"),
            ([(1, 50, 50)], "STALE"),  # it builds on KV that nobody has
            ([(1, 0, 100), (2, 0, 950)], "CONGESTED"),
        ],
    )
    def test_that_cannot_be_changes_nothing(self, parts, outcome):
        host = Host()
        host.arrive(1, [11])
        host.arrive(2, [21], size=950)
        before = state(host)
        assert host.batch(*parts) == [outcome] * (len(parts) + 1)
        assert state(host) == before

    def test_is_refused_while_another_one_is_staged(self):
        host = Host()
        host.arrive(1, [11])
        host.arrive(2, [21])
        assert host.batch((1, 0, 100)) == ["COMMITTED"] * 2
        assert host.batch((2, 0, 100)) == ["CONGESTED"] * 2

    def test_of_which_a_part_is_missing_waits_for_it_and_dies_with_its_agent(self):
        host = Host()
        host.arrive(1, [11])
        records = serving_batch([(1, 0, 100)])
        records["seq"] = [-1, 1]
        assert host.commit(records[:1]) == []
        assert host.commit(records[1:]) == ["COMMITTED"] * 2
        host.run_batch()
        host.arrive(2, [21])
        host.commit(records[:1])
        host.mechanism.agent_lost()
        assert host.batch((2, 0, 100)) == ["COMMITTED"] * 2


def serving_batch(parts):
    from waveos.policy.plain import Txns

    txns = Txns(serving)
    serving.form_batch(txns, 0, parts, 0)
    return np.concatenate(txns.ordered)


class TestEviction:
    def test_of_what_a_request_uses_is_stale_and_the_agent_is_told_where_it_is(self):
        host = Host()
        host.arrive(1, [11, 12])
        host.batch((1, 0, 200))
        host.mechanism.batch_started(host.engine.batches[0])
        host.mechanism.batch_done(host.engine.batches[0])
        host.told.clear()
        assert host.order(lambda txns: serving.evict(txns, 0, [12])) == ["STALE"]
        assert "KV_HELD" in host.told

    def test_of_many_blocks_as_one_record_goes_up_the_prefix(self):
        host = Host()
        host.serve(1, [11, 12, 13])
        assert host.order(lambda txns: txns.order("evict", request=-1, instance=0, key=13, tokens=2, how=int(Tier.DEVICE))) == ["COMMITTED"]
        assert set(host.instance.blocks) == {11}
        assert host.order(lambda txns: txns.order("evict", request=-1, instance=0, key=11, tokens=2, how=int(Tier.DEVICE))) == ["STALE"]
        assert set(host.instance.blocks) == {11}


class TestRequests:
    def test_a_context_longer_than_the_pool_is_an_error_to_its_client_alone(self):
        host = Host()
        with pytest.raises(ConfigError, match=r"a request of 1000 \+ 10 tokens; the KV pool holds 1000"):
            host.arrive(1, [11], size=1_000)
        host.serve(2, [21])

    def test_a_client_that_leaves_gives_back_all_it_had(self):
        host = Host()
        host.arrive(1, [11, 12])
        host.batch((1, 0, 100))
        host.mechanism.leave(1)
        host.run_batch()
        assert host.mechanism.requests == {}
        assert host.instance.waiting == 0
        assert host.account()[0] == host.account()[1] == 1_000  # what was computed for it is kept for nobody: no policy knows of it
        assert host.batch((1, 100, 100)) == ["TARGET_GONE"] * 2

    def test_storage_is_told_of_and_what_arrived_of_a_cancelled_prefetch_stays(self):
        host = Host(storage=5_000)
        host.serve(1, [11, 12])
        for tier in (Tier.HOST, Tier.STORAGE):
            host.order(lambda txns, tier=tier: serving.back_up(txns, 0, [11, 12], tier))
            for transfer in host.engine.transfers[-2:]:
                host.mechanism.transfer_done(transfer)
        host.order(lambda txns: serving.evict(txns, 0, [12, 11]), lambda txns: serving.evict(txns, 0, [12, 11], Tier.HOST))
        host.told.clear()
        host.arrive(2, [11, 12, 13])
        host.messages()
        assert "PREFIX_MATCHED" in host.told
        assert host.order(lambda txns: serving.prefetch(txns, 2, 0, 200)) == ["COMMITTED"]
        prefetch = host.engine.transfers[-1]
        assert host.order(lambda txns: serving.cancel(txns, 2, 0)) == ["COMMITTED"]
        assert host.engine.stopped is prefetch
        host.mechanism.give_back(prefetch, prefetch.blocks[1:])
        host.mechanism.transfer_done(prefetch)
        assert host.instance.blocks[11].tiers & Tier.HOST
        assert not host.instance.blocks[12].tiers & Tier.HOST
        assert host.batch((2, 100, 200)) == ["COMMITTED"] * 2

    def test_the_instance_asks_once_and_again_when_something_has_changed(self):
        host = Host()
        host.arrive(1, [11])
        host.messages()
        host.messages()
        assert host.told.count("BATCH_WANTED") == 1
        host.arrive(2, [21])
        host.messages()
        assert host.told.count("BATCH_WANTED") == 2


def test_requests_starve_only_while_nothing_but_a_decision_can_help_them():
    host = Host(device=500)
    starved = []

    def look():
        starved.append(host.mechanism.starved)

    look()
    host.arrive(1, [11, 12])
    look()  # it waits
    assert host.batch((1, 0, 200)) == ["COMMITTED"] * 2
    host.arrive(2, [21, 22, 23])
    look()  # a batch is staged
    batch = host.engine.batches[-1]
    host.mechanism.batch_started(batch)
    look()  # and runs
    host.mechanism.batch_done(batch)
    look()  # the first decodes: the second may wait for its memory
    host.mechanism.request_done(host.mechanism.requests[1])
    look()
    assert starved == [False, True, False, False, False, True]


def test_a_replay_tells_a_new_agent_everything_and_it_goes_on():
    from waveos.policy import load_policy
    from waveos.policy.plain import PlainRuntime

    host = Host()
    host.serve(1, [11, 12])
    host.arrive(2, [11, 12, 13])
    host.arrive(3, [31])
    host.mechanism.replay()
    runtime = PlainRuntime(load_policy("fcfs_lru"))
    end = np.zeros(1, serving.MESSAGE)
    end["type"] = serving.Message.BATCH_END
    decisions = runtime.feed(np.concatenate([host.mechanism.take_messages(), end]))
    parts = decisions[decisions["type"] == serving.Decision.PART]
    assert parts["request"].tolist() == [2, 3]
    assert parts["key"].tolist() == [200, 0]
    assert set(host.commit(decisions)) == {"COMMITTED"}


@given(
    st.lists(
        st.tuples(st.sampled_from(["arrive", "batch", "run", "backup", "evict", "lose", "leave"]), st.integers(0, 5), st.integers(0, 3)), max_size=60
    )
)
@settings(max_examples=150, deadline=None)
def test_no_order_of_events_loses_or_invents_memory(events):
    """Device memory as kept is what a count finds, after every step, whatever is decided; and a refused transaction changes nothing."""
    host = Host(device=800, host=400)
    number = 0
    for what, which, more in events:
        waiting = [each for each in host.mechanism.requests.values() if each.state == "waiting"]
        blocks = list(host.instance.blocks)
        before = state(host)
        told = []
        if what == "arrive":
            number += 1
            host.arrive(number, [100 * (which % 3) + level + 1 for level in range(more + 1)])
        elif what == "batch" and waiting:
            request = waiting[which % len(waiting)]
            begin = request.computed or 100 * (more % len(request.blocks))
            told = host.batch((request.number, begin, request.prompt - begin if which % 2 else 50), cache_seq=host.instance.cache_seq)
        elif what == "run" and host.instance.staged:
            host.run_batch()
        elif what in ("backup", "evict") and blocks:
            key = blocks[which % len(blocks)]
            tier = Tier.HOST if more % 2 else Tier.DEVICE
            told = host.order(
                lambda txns, key=key, tier=tier, what=what: (serving.evict if what == "evict" else serving.back_up)(txns, 0, [key], tier)
            )
            if what == "backup" and told == ["COMMITTED"]:
                host.mechanism.transfer_done(host.engine.transfers[-1])
        elif what == "lose" and blocks:
            host.mechanism.lose(0, [blocks[which % len(blocks)]], Tier.DEVICE)
        elif what == "leave" and number:
            host.mechanism.leave(which % number + 1)
        if told and told[0] != "COMMITTED":
            assert state(host) == before
        counted, kept = host.account()
        assert counted == kept
        assert kept >= 0
        assert host.instance.waiting == sum(
            each.state == "waiting" or (each.state == "gone" and each.computed < each.prompt) for each in host.mechanism.requests.values()
        )
