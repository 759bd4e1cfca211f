"""The state a policy may declare: fixed size, typed, one block of memory; and the operations on it.

Every operation is plain Python on NumPy records, and numba compiles the same lines into the policy.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from waveos.jit import jitable, jitable_inline
from waveos.record import MAX_CPUS, MAX_THREADS

__all__ = ["array", "discard", "heap", "heap_key", "heap_pop", "heap_push", "heaps", "per_cpu", "per_thread", "pop", "push", "ring", "rings", "size"]

Dtype = np.dtype[Any]


def ring(capacity: int) -> Dtype:
    """A double-ended queue of up to `capacity` integers (thread ids). A push onto a full one is an error, never an overwrite."""
    return np.dtype([("head", "i8"), ("tail", "i8"), ("slot", "i8", (_positive(capacity),))], align=True)


def rings(count: int, capacity: int) -> Dtype:
    """`count` rings: `self.queues[k]` is one."""
    return np.dtype((ring(capacity), (_positive(count),)))


def heap(capacity: int) -> Dtype:
    """A min-heap of up to `capacity` (key, value) pairs; equal keys leave in the order they came, but for those put in front."""
    n = _positive(capacity)
    return np.dtype([("head", "i8"), ("tail", "i8"), ("order", "i8"), ("key", "i8", (n,)), ("rank", "i8", (n,)), ("slot", "i8", (n,))], align=True)


def heaps(count: int, capacity: int) -> Dtype:
    """`count` heaps: `self.queues[k]` is one."""
    return np.dtype((heap(capacity), (_positive(count),)))


def array(count: int, dtype: str = "i8") -> Dtype:
    """`count` numbers, zero at first."""
    return np.dtype((np.dtype(dtype), (_positive(count),)))


def per_cpu(dtype: str = "i8") -> Dtype:
    """One number for every CPU, indexed by `msg.cpu`."""
    return array(MAX_CPUS, dtype)


def per_thread(dtype: str = "i8") -> Dtype:
    """One number for every thread, indexed by `msg.tid`."""
    return array(MAX_THREADS, dtype)


def _positive(count: int) -> int:
    if count < 1:
        raise ValueError(f"a size of {count}; at least 1 is needed")
    return count


@jitable_inline
def size(queue: Any) -> Any:
    """How many entries a ring or heap holds."""
    return queue.tail - queue.head


@jitable
def push(queue: Any, value: int, front: int = 0) -> None:
    """Append to a ring, or put before all others with `front`. Raises OverflowError on a full ring."""
    if queue.tail - queue.head >= queue.slot.shape[0]:
        raise OverflowError("push onto a full ring")
    if front:
        queue.head -= 1
        queue.slot[queue.head % queue.slot.shape[0]] = value
    else:
        queue.slot[queue.tail % queue.slot.shape[0]] = value
        queue.tail += 1


@jitable
def pop(queue: Any) -> Any:
    """Take the first entry of a ring. Raises IndexError on an empty one."""
    if queue.tail == queue.head:
        raise IndexError("pop from an empty ring")
    value = queue.slot[queue.head % queue.slot.shape[0]]
    queue.head += 1
    return value


@jitable
def discard(queue: Any, value: int) -> Any:
    """Take `value` out of a ring, wherever it stands; what stands before it keeps its order. True if it was there. Takes as long as it stands far behind."""
    n = queue.slot.shape[0]
    for i in range(queue.head, queue.tail):
        if queue.slot[i % n] == value:
            for k in range(i, queue.head, -1):
                queue.slot[k % n] = queue.slot[(k - 1) % n]
            queue.head += 1
            return True
    return False


@jitable_inline
def heap_key(queue: Any) -> Any:
    """The smallest key of a heap that is not empty."""
    return queue.key[0]


@jitable
def _before(queue: Any, a: int, b: int) -> Any:
    return queue.key[a] < queue.key[b] or (queue.key[a] == queue.key[b] and queue.rank[a] < queue.rank[b])


@jitable
def _swap(queue: Any, a: int, b: int) -> None:
    key, rank, slot = queue.key[a], queue.rank[a], queue.slot[a]
    queue.key[a], queue.rank[a], queue.slot[a] = queue.key[b], queue.rank[b], queue.slot[b]
    queue.key[b], queue.rank[b], queue.slot[b] = key, rank, slot


@jitable
def heap_push(queue: Any, key: int, value: int, front: int = 0) -> None:
    """Insert `value` under `key`, after its equals, or before them with `front`. Raises OverflowError on a full heap."""
    i = queue.tail
    if i >= queue.slot.shape[0]:
        raise OverflowError("push onto a full heap")
    queue.key[i], queue.rank[i], queue.slot[i] = key, -1 - queue.order if front else queue.order, value
    queue.order += 1
    queue.tail += 1
    while i > 0 and _before(queue, i, (i - 1) // 2):
        _swap(queue, i, (i - 1) // 2)
        i = (i - 1) // 2


@jitable
def heap_pop(queue: Any) -> Any:
    """Take the value with the smallest key. Raises IndexError on an empty heap."""
    if queue.tail == 0:
        raise IndexError("pop from an empty heap")
    value = queue.slot[0]
    queue.tail -= 1
    n = queue.tail
    _swap(queue, 0, n)
    i = 0
    while 2 * i + 1 < n:
        child = 2 * i + 1
        if child + 1 < n and _before(queue, child + 1, child):
            child += 1
        if not _before(queue, child, i):
            break
        _swap(queue, child, i)
        i = child
    return value
