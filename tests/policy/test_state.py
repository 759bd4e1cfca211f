"""The queues a policy declares, against the plainest model of each; as plain Python and compiled."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from waveos.policy import array, discard, heap, heap_key, heap_pop, heap_push, heaps, per_cpu, per_thread, pop, push, ring, rings, size
from waveos.policy.bind import _plain
from waveos.sched.records import MAX_CPUS, MAX_THREADS

CAPACITY = 5
BACK, FRONT, POP = range(3)


def play_ring(queue, ops, values, out):
    """Do the operations; `out` gets what each pop gave. -1: it raised."""
    for i in range(len(ops)):
        try:
            if ops[i] == POP:
                out[i] = pop(queue)
            else:
                push(queue, values[i], front=ops[i])
        except Exception:  # numba knows no narrower handler
            out[i] = -1


def play_heap(queue, ops, values, out):
    """As above; a value's key is its tens."""
    for i in range(len(ops)):
        try:
            if ops[i] == POP:
                out[i] = heap_pop(queue)
            else:
                heap_push(queue, values[i] // 10, values[i], front=ops[i])
        except Exception:
            out[i] = -1


compiled_ring, compiled_heap = njit(lambda records, *rest: play_ring_(records[0], *rest)), njit(lambda records, *rest: play_heap_(records[0], *rest))
play_ring_, play_heap_ = njit(play_ring), njit(play_heap)
steps = st.lists(st.tuples(st.sampled_from([BACK, FRONT, POP]), st.integers(0, 99)), max_size=40)


def on_list(ops, values, heaped):
    """The model: a Python list, for a heap kept sorted by key, stably."""
    queue, out = [], np.zeros(len(ops), np.int64)
    for i, (op, value) in enumerate(zip(ops, values, strict=True)):
        if op == POP:
            out[i] = queue.pop(0) if queue else -1
        elif len(queue) == CAPACITY:
            out[i] = -1
        elif heaped:
            queue.insert(0 if op == FRONT else len(queue), value)
            queue.sort(key=lambda each: each // 10)
        else:
            queue.insert(0 if op == FRONT else len(queue), value)
    return out.tolist(), queue


def drain(queue, take):
    left = []
    while size(queue):
        left.append(int(take(queue)))
    return left


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("kind", ["ring", "heap"])
@settings(max_examples=150, deadline=None)
@given(steps=steps)
def test_a_queue_does_what_a_list_does(kind, compiled, steps):
    ops, values = np.array([op for op, _ in steps], np.int64), np.array([value for _, value in steps], np.int64)
    heaped = kind == "heap"
    records, out = np.zeros(1, heap(CAPACITY) if heaped else ring(CAPACITY)), np.zeros(len(ops), np.int64)
    if compiled:
        (compiled_heap if heaped else compiled_ring)(records, ops, values, out)
    else:
        (play_heap if heaped else play_ring)(_plain(records), ops, values, out)
    expected, left = on_list(ops.tolist(), values.tolist(), heaped)
    assert out.tolist() == expected
    queue = _plain(records)
    assert size(queue) == len(left)
    if heaped and left:
        assert heap_key(queue) == left[0] // 10
    assert drain(queue, heap_pop if heaped else pop) == left


def test_a_full_queue_says_so_and_keeps_what_it_holds():
    for dtype, add, take in ((ring(2), push, pop), (heap(2), lambda q, v: heap_push(q, v, v), heap_pop)):
        queue = _plain(np.zeros(1, dtype))
        add(queue, 1)
        add(queue, 2)
        with pytest.raises(OverflowError, match="full"):
            add(queue, 3)
        assert drain(queue, take) == [1, 2]
        with pytest.raises(IndexError, match="empty"):
            take(queue)


@given(before=st.lists(st.integers(0, 5), max_size=CAPACITY), value=st.integers(0, 5), laps=st.integers(0, 20))
def test_what_is_discarded_is_the_first_of_its_kind_and_the_others_keep_their_order(before, value, laps):
    queue = _plain(np.zeros(1, ring(CAPACITY)))
    queue.head = queue.tail = laps
    for each in before:
        push(queue, each)
    assert discard(queue, value) == (value in before)
    if value in before:
        before.remove(value)
    assert drain(queue, pop) == before


def test_a_ring_works_over_many_laps_in_both_directions():
    queue = _plain(np.zeros(1, ring(3)))
    for i in range(100):
        push(queue, i, front=1)
        push(queue, 100 + i)
        assert (pop(queue), pop(queue)) == (i, 100 + i)
    for i in range(100):
        push(queue, i)
        assert pop(queue) == i


def test_declared_state_has_the_shape_it_says():
    assert rings(4, 8).shape == (4,)
    assert heaps(3, 8).shape == (3,)
    assert array(5).shape == (5,)
    assert array(5, "u1").base == np.uint8
    assert (per_cpu().shape, per_thread().shape) == ((MAX_CPUS,), (MAX_THREADS,))


@pytest.mark.parametrize("make", [ring, heap, array, lambda n: rings(n, 4), lambda n: rings(4, n), lambda n: heaps(n, 4)])
def test_a_size_below_one_is_refused(make):
    for count in (0, -3):
        with pytest.raises(ValueError, match="at least 1 is needed"):
            make(count)
