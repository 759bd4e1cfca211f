"""Every installed policy: the laws under a hostile host, and the same decisions in every world."""

from __future__ import annotations

import pytest

from waveos import testing
from waveos.bench import conformance
from waveos.errors import ConfigError
from waveos.policy import load_policy, policy_names

POLICIES = policy_names("sched")
MESSAGES = 1_500


def test_the_reference_policies_are_installed():
    assert {"fifo", "fifo_percpu", "shinjuku", "shinjuku_mq", "edf", "round_robin"} <= set(POLICIES)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_policy_keeps_the_laws_under_a_hostile_host(policy):
    testing.check_policy(policy, seeds=2, steps=800)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_policy_decides_the_same_through_the_virtual_link(policy):
    stream, expected = recorded(policy)
    assert conformance.replay("virtual", policy, stream, len(expected)).tobytes() == expected.tobytes()
    with testing.interpreted():
        assert conformance.replay("virtual", policy, stream, len(expected)).tobytes() == expected.tobytes()


@pytest.mark.parametrize("policy", POLICIES)
def test_the_policy_decides_the_same_in_an_agent_process_over_shared_memory(policy):
    stream, expected = recorded(policy)
    assert conformance.replay("shm", policy, stream, len(expected)).tobytes() == expected.tobytes()


def test_an_agent_that_runs_plain_python_decides_the_same_over_shared_memory():
    stream, expected = recorded("shinjuku_mq")
    with testing.interpreted():
        assert conformance.replay("shm", "shinjuku_mq", stream, len(expected)).tobytes() == expected.tobytes()


def test_the_recorded_load_preempts_and_its_length_is_what_was_asked():
    stream = conformance.record_stream("shinjuku", MESSAGES, seed=1)
    assert (stream["type"] != conformance.Message.BATCH_END).sum() == MESSAGES
    assert (stream["type"] == conformance.Message.THREAD_PREEMPTED).any()
    assert (stream["type"] == conformance.Message.BATCH_END).any()


def test_the_benchmark_counts_what_is_not_the_same(monkeypatch, capsys):
    def with_one_thread_changed(world, policy, stream, expected, *sizes):
        got = replay(world, policy, stream, expected, *sizes)
        got["tid"][7] ^= 1
        return got

    replay = conformance.replay
    assert conformance.WORLDS.keys() == {"virtual", "shm", "bar", "zmq"}
    monkeypatch.setattr(conformance, "WORLDS", {"virtual": conformance.WORLDS["virtual"]})
    assert conformance.run(messages=200, policies="fifo", live_s=0)["metrics"]["identical_share"] == 1.0
    monkeypatch.setattr(conformance, "replay", with_one_thread_changed)
    result = conformance.run(messages=200, policies="fifo", live_s=0)
    assert result["metrics"]["identical_share"] == 0.0
    assert result["verdict"].startswith("does not reach")
    assert "decision 7 of" in capsys.readouterr().err


def test_a_stream_too_short_to_mean_anything_is_refused():
    with pytest.raises(ConfigError, match="at least 100"):
        conformance.run(messages=3)


def recorded(policy):
    """A stream from the emulator that ends with a resynchronisation, and the decisions made on it without a link."""
    stream = conformance._with_end(conformance.record_stream(policy, MESSAGES, seed=2))
    return stream, testing.Replayed(load_policy(policy), conformance.CPUS, conformance.THREADS, conformance.AHEAD).feed(stream)
