"""The ring on coherent memory: compiled it does what it does interpreted, and between two threads nothing is lost."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from waveos import ring
from waveos.jit import jit
from waveos.primitives import CoherentMemory, clock_ns, load, pause, store

RUN = ring.compiled()


def joined(memory, capacity, functions):
    """A new ring's producer's and consumer's words."""
    functions.create(memory, capacity, 1, 1, 5)
    producer, consumer = np.zeros(ring.OWN_WORDS, np.int64), np.zeros(ring.OWN_WORDS, np.int64)
    assert functions.join_producer(memory, producer, 1, 1) == ring.JOINED
    assert functions.join_consumer(memory, consumer, 1, 1) == ring.JOINED
    return producer, consumer


STEP = st.one_of(
    st.tuples(st.just("send"), st.integers(1, 12)),
    st.tuples(st.just("poll"), st.integers(1, 12)),
    st.tuples(st.sampled_from(["send_one", "poll_one", "prefetch", "rejoin"]), st.just(1)),
)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(st.sampled_from([2, 4, 8]), st.lists(STEP, max_size=60))
def test_compiled_and_interpreted_leave_the_same_words(capacity, steps):
    words = [np.zeros(ring.words(capacity), np.int64) for _ in range(2)]
    sides = [(words[0], RUN, *joined(words[0], capacity, RUN)), (CoherentMemory(words[1]), ring, *joined(CoherentMemory(words[1]), capacity, ring))]
    number = 0
    for verb, n in steps:
        records = np.arange(number, number + 8 * n, dtype=np.int64) * -(2**35 + 1)
        number += 8 * n
        answers = []
        for memory, functions, producer, consumer in sides:
            out = np.zeros(8 * n, np.int64)
            if verb == "send":
                answer = functions.send(memory, producer, records, n)
            elif verb == "send_one":
                answer = functions.send_one(memory, producer, records, 0)
            elif verb == "poll":
                answer = functions.poll(memory, consumer, out, n)
            elif verb == "poll_one":
                answer = functions.poll_one(memory, consumer, out, 0)
            elif verb == "prefetch":
                answer = functions.prefetch(memory, consumer)
            else:
                answer = functions.join_producer(memory, producer, 1, 1)
            answers.append(
                (
                    answer,
                    out.tolist(),
                    producer.tolist(),
                    consumer.tolist(),
                    functions.overflowed(memory) if functions is RUN else ring.overflowed(memory),
                )
            )
        assert answers[0] == answers[1]
        assert words[0].tolist() == words[1].tolist()


@jit
def produce(memory, own, n, batch):
    records = np.zeros(8 * batch, np.int64)
    sent = 0
    while sent < n:
        for k in range(batch):
            for w in range(8):
                records[8 * k + w] = (sent + k) << 32 | w
        sent += ring.send(memory, own, records, min(batch, n - sent))


@jit
def consume(memory, own, n):
    out = np.zeros(8 * 64, np.int64)
    taken = 0
    while taken < n:
        got = ring.poll(memory, own, out, 64)
        for k in range(got):
            for w in range(8):
                if out[8 * k + w] != (taken + k) << 32 | (w if w else 0):
                    return taken + k
        taken += got
        if got == 0:
            pause()
    return -1


@pytest.mark.parametrize(("capacity", "batch"), [(2, 1), (8, 5), (1024, 64)])
def test_two_threads_lose_tear_and_reorder_nothing(capacity, batch):
    memory = np.zeros(ring.words(capacity), np.int64)
    producer, consumer = joined(memory, capacity, RUN)
    thread = threading.Thread(target=produce, args=(memory, producer, 100_000, batch))
    thread.start()
    wrong = consume(memory, consumer, 100_000)
    thread.join()
    assert wrong == -1
    assert RUN.overflowed(memory) == producer[ring.LOST]


def test_join_says_why_not():
    memory, own = np.zeros(ring.words(4), np.int64), np.zeros(ring.OWN_WORDS, np.int64)
    assert RUN.join_producer(memory, own, 1, 1) == ring.NO_RING
    RUN.create(memory, 4, 1, 1, 5)
    assert RUN.join_producer(memory, own, 2, 1) == ring.OTHER_VERSION
    assert RUN.join_consumer(memory, own, 1, 2) == ring.OTHER_SUBSYSTEM


def test_a_ring_made_anew_gives_its_old_consumer_nothing_and_is_noticed():
    memory = np.zeros(ring.words(4), np.int64)
    _, old = joined(memory, 4, RUN)
    assert not RUN.restarted(memory, old)
    RUN.create(memory, 4, 1, 1, 6)
    producer, out = np.zeros(ring.OWN_WORDS, np.int64), np.zeros(8, np.int64)
    RUN.join_producer(memory, producer, 1, 1)
    assert RUN.send_one(memory, producer, np.arange(8), 0) == 1
    assert RUN.poll_one(memory, old, out, 0) == 0
    assert RUN.restarted(memory, old)


def test_wait_ends_with_a_record_or_with_the_time():
    memory = np.zeros(ring.words(4), np.int64)
    producer, consumer = joined(memory, 4, RUN)
    assert not RUN.wait(memory, consumer, 0)
    assert not RUN.wait(memory, consumer, 1_000)
    assert not ring.wait(CoherentMemory(memory), consumer, 1_000)
    RUN.send_one(memory, producer, np.arange(8), 0)
    assert RUN.wait(memory, consumer, 10**12)
    assert RUN.wait(memory, consumer, 0)


@pytest.mark.parametrize("forged", [-(2**63), -1, 3, 2**62, 2**63 - 1])
def test_a_credit_that_cannot_be_gives_no_room_and_moves_nothing(forged):
    memory = np.zeros(ring.words(2), np.int64)
    producer, _ = joined(memory, 2, RUN)
    assert RUN.send(memory, producer, np.zeros(16, np.int64), 2) == 2
    memory[ring.CREDIT_AT] = forged
    assert RUN.send(memory, producer, np.zeros(16, np.int64), 2) == RUN.send_one(memory, producer, np.zeros(8, np.int64), 0) == 0
    assert (producer[ring.NEXT], producer[ring.LOST]) == (2, 3)
    memory[ring.CREDIT_AT] = 1
    assert RUN.send(memory, producer, np.zeros(16, np.int64), 2) == 1


def test_laps_may_run_past_the_mark():
    memory = np.zeros(ring.words(2), np.int64)
    producer, consumer = joined(memory, 2, RUN)
    far = (1 << 33) - 4  # lap 2**32 - 2 of a ring of 2
    for own in (producer, consumer):
        own[ring.NEXT] = own[ring.CREDIT] = far
    store(CoherentMemory(memory), ring.CREDIT_AT, far)
    out = np.zeros(8, np.int64)
    for number in range(20):
        assert RUN.poll_one(memory, consumer, out, 0) == 0
        assert RUN.send_one(memory, producer, np.full(8, number << 32), 0) == 1
        assert RUN.poll_one(memory, consumer, out, 0) == 1
        assert set(out) == {number << 32}


@pytest.mark.parametrize("capacity", [0, 1, 3, 100, 1 << 31])
def test_a_capacity_is_a_power_of_two(capacity):
    with pytest.raises(ValueError, match="power of two"):
        ring.words(capacity)


@jit
def times():
    return clock_ns(), clock_ns()


def test_the_compiled_clock_is_the_interpreters():
    before = clock_ns()
    first, second = times()
    assert before <= first <= second <= clock_ns()


@jit
def store_then_load(words):
    store(words, 1, 7)
    return load(words, 1)


def test_primitives_reach_the_array():
    words = np.zeros(3, np.int64)
    assert store_then_load(words) == 7
    assert words.tolist() == [0, 7, 0]


WORD = st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(-3, 12))


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.sampled_from(["join_producer", "join_consumer"]), st.integers(0, 255), WORD, WORD, st.lists(WORD, min_size=4, max_size=4))
def test_a_ring_in_which_the_peer_wrote_what_cannot_be_is_not_joined_and_no_slot_beyond_it_is_touched(verb, shift, credit, count, marks):
    left = []
    for functions, as_memory in ((RUN, np.asarray), (ring, CoherentMemory)):
        words, own = np.zeros(ring.words(4), np.int64), np.zeros(ring.OWN_WORDS, np.int64)
        memory = as_memory(words)
        functions.create(memory, 4, 1, 1, 5)
        words[ring.IDENTITY_AT] = ring.MAGIC << 48 | 1 << 40 | 1 << 32 | shift << 24 | 5
        words[ring.CREDIT_AT], words[[ring.OVERFLOW_AT, ring.PRODUCERS_AT, ring.CONSUMERS_AT]] = credit, count
        words[ring.HEADER_WORDS :: 8] = marks
        before = words.copy()
        answer = getattr(functions, verb)(memory, own, 1, 1, 4)
        assert answer == (ring.OTHER_CAPACITY if shift != 2 else ring.JOINED if 0 <= credit <= ring.MOST else ring.NO_POSITION)
        if answer == ring.JOINED:
            assert functions.room(memory, own, 4) + own[ring.NEXT] - own[ring.CREDIT] == own[ring.CAPACITY] == 4
            functions.send(memory, own, np.arange(64), 8)
            functions.poll(memory, own, np.zeros(64, np.int64), 8)
        else:
            assert words.tobytes() == before.tobytes()
            assert own[ring.CAPACITY] in (0, 4)
        left.append((answer, words.tolist(), own.tolist()))
    assert left[0] == left[1]


@pytest.mark.parametrize("shift", [0, 31, 40, 255])
def test_a_ring_of_no_capacity_is_not_joined_though_none_is_expected(shift):
    words = np.zeros(ring.words(4), np.int64)
    words[ring.IDENTITY_AT] = ring.MAGIC << 48 | 1 << 40 | 1 << 32 | shift << 24 | 5
    for functions, memory in ((RUN, words), (ring, CoherentMemory(words))):
        for join in (functions.join_producer, functions.join_consumer):
            assert join(memory, np.zeros(ring.OWN_WORDS, np.int64), 1, 1) == ring.OTHER_CAPACITY
