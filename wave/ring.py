"""The ring: 64-byte records from one producer to one consumer through shared memory that need not be coherent.

Written once over the five primitives of `waveos.primitives`. Called from Python the functions run interpreted, over the strict memory model
or a `CoherentMemory`; called from compiled code they are compiled into it; `compiled()` has them for Python callers.

The memory, in words of 8 bytes (`words(capacity)` of them):

========  =======================================================================================================================
line 0    word 0 identity: magic 16 bits, version 8, subsystem 8, log2 of the capacity 8, generation 24. One word, so never half
line 2    the producer's: records that found the ring full; how many producers have joined; its clock, as a sign of life
line 4    the consumer's: position up to which slots are free again (credits); how many consumers have joined
line 8..  `capacity` slots of one line each
========  =======================================================================================================================

A record is there when the low 32 bits of its first word are the mark of this generation and lap: the consumer needs no other line
to know it. The producer writes the other words first, then flush and fence, then the first word. Credits come back a quarter of a ring
at a time (so a send may find that much less room than there is), and a record costs one line transfer and little more. A full ring is
never overwritten: what does not fit is counted where the other side sees it.

Each side keeps its own position in a small array of its own (`own`, OWN_WORDS of int64) that the other never touches.
Any doorbell or interrupt that announces records must come after `settle`.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

from waveos.jit import jit, jitable
from waveos.primitives import LINE_WORDS, clock_ns, fence, flush, invalidate, load, pause, store

MAGIC = 0x5776
IDENTITY_AT, OVERFLOW_AT, PRODUCERS_AT, HEARTBEAT_AT, CREDIT_AT, CONSUMERS_AT = 0, 16, 17, 18, 32, 33
HEADER_WORDS = 64
MAX_GENERATION = (1 << 24) - 1

OWN_WORDS = 16
NEXT, CREDIT, CAPACITY, SHIFT, BASE, SHARE, LOST, IDENTITY = range(8)
"""A side's own words: next position; credit last seen (producer) or given (consumer); slots; log2 of slots; mark before the first
lap; records a credit; records that found no room (producer); identity when it joined."""

JOINED, NO_RING, OTHER_VERSION, OTHER_SUBSYSTEM, OTHER_CAPACITY, NO_POSITION = range(6)
"""Answers of `join_producer` and `join_consumer`. The last two: the ring is not of the capacity that is expected, its credits are none."""

MAX_SHIFT = 30
MOST = (1 << 62) - 1
"""Positions and counters in shared memory end here: what the peer has written there may be anything, and no sum of this side's is to overflow."""

LOW, HIGH = 0xFFFF_FFFF, -0x1_0000_0000
POLLS_A_CLOCK = 64


def words(capacity: int) -> int:
    """The size of a ring's memory in words. Raises ValueError unless `capacity` is a power of two from 2 to 2**30."""
    if not 2 <= capacity <= 1 << MAX_SHIFT or capacity & (capacity - 1):
        raise ValueError(f"a ring has a power of two of slots, 2 to 2**30, not {capacity}")
    return HEADER_WORDS + capacity * LINE_WORDS


@jitable
def create(memory: Any, capacity: int, version: int, subsystem: int, generation: int) -> None:
    """Make an empty ring in memory that may hold anything, say an older ring; `generation` (1 to MAX_GENERATION) is not that ring's.

    A peer that is still joined to an older ring takes no record of this one (the marks differ) and sees `restarted`.
    """
    store(memory, HEARTBEAT_AT, 0)
    for line in range(1, HEADER_WORDS // LINE_WORDS + capacity):
        store(memory, line * LINE_WORDS, 0)
        store(memory, line * LINE_WORDS + 1, 0)
        flush(memory, line * LINE_WORDS)
    fence(memory)
    shift = 0
    while 1 << shift < capacity:
        shift += 1
    store(memory, IDENTITY_AT, MAGIC << 48 | version << 40 | subsystem << 32 | shift << 24 | generation)
    flush(memory, IDENTITY_AT)


@jitable
def retire(memory: Any) -> None:
    """Take the ring out of service: both sides see `restarted`, nobody can join."""
    store(memory, IDENTITY_AT, 0)
    flush(memory, IDENTITY_AT)


@jitable
def identity(memory: Any) -> int:
    """The identity word as it is now: bits 48 up MAGIC, 40 version, 32 subsystem, 24 log2 of the capacity, 0 generation."""
    invalidate(memory, IDENTITY_AT)
    return load(memory, IDENTITY_AT)


@jitable
def restarted(memory: Any, own: Any) -> bool:
    """True once the ring is retired or has been made anew since this side joined it."""
    return identity(memory) != own[IDENTITY]  # type: ignore[no-any-return]


@jitable
def _join(memory: Any, own: Any, version: int, subsystem: int, capacity: int) -> int:
    found = identity(memory)
    if found >> 48 != MAGIC:
        return NO_RING
    if (found >> 40) & 0xFF != version:
        return OTHER_VERSION
    if (found >> 32) & 0xFF != subsystem:
        return OTHER_SUBSYSTEM
    shift = (found >> 24) & 0xFF
    if not 1 <= shift <= MAX_SHIFT or (capacity != 0 and 1 << shift != capacity):
        return OTHER_CAPACITY
    own[IDENTITY] = found
    own[SHIFT] = shift
    own[CAPACITY] = 1 << shift
    own[SHARE] = max(1, own[CAPACITY] >> 2)
    own[BASE] = (found & 0xFFFF) << 16
    # Copies from before this ring was made may show a mark of this generation that an older ring, or chance, has left there.
    for line in range(1, HEADER_WORDS // LINE_WORDS + own[CAPACITY]):
        invalidate(memory, line * LINE_WORDS)
    own[CREDIT] = load(memory, CREDIT_AT)
    own[NEXT] = own[CREDIT]
    return JOINED if 0 <= own[CREDIT] <= MOST else NO_POSITION


@jitable
def join_producer(memory: Any, own: Any, version: int, subsystem: int, capacity: int = 0) -> int:
    """Become the producer, the first or the next after one that died at any point; JOINED, or why not.

    What the one before published stays published; what it had not finished is as if never sent. (The stores of a dead process all
    arrive, so the records of its last batch have come up to some record, without a gap.)
    `capacity`: the slots that this side has memory for; a ring of another is not joined. 0: any, where nobody else can have written what the ring says.
    """
    answer = _join(memory, own, version, subsystem, capacity)
    if answer != JOINED:
        return answer
    end = own[CREDIT] + own[CAPACITY]
    while own[NEXT] < end and _is_there(memory, own, own[NEXT]):
        own[NEXT] += 1
    own[LOST] = load(memory, OVERFLOW_AT) & MOST
    store(memory, PRODUCERS_AT, (load(memory, PRODUCERS_AT) & MOST) + 1)
    flush(memory, PRODUCERS_AT)
    return JOINED


@jitable
def join_consumer(memory: Any, own: Any, version: int, subsystem: int, capacity: int = 0) -> int:
    """Become the consumer, the first or the next after one that died; JOINED, or why not. `capacity` as for `join_producer`.

    After a death records that were taken but not yet credited (less than a quarter of the ring) come again.
    """
    answer = _join(memory, own, version, subsystem, capacity)
    if answer == JOINED:
        store(memory, CONSUMERS_AT, (load(memory, CONSUMERS_AT) & MOST) + 1)
        flush(memory, CONSUMERS_AT)
    return answer


@jitable
def joins(memory: Any, at: int) -> int:
    """How many producers (`at` = PRODUCERS_AT) or consumers (CONSUMERS_AT) have joined; one more than before: the peer restarted."""
    invalidate(memory, at)
    return load(memory, at)


@jitable
def overflowed(memory: Any) -> int:
    """How many records found the ring full since it was made; for the consumer (the producer has own[LOST])."""
    invalidate(memory, OVERFLOW_AT)
    return load(memory, OVERFLOW_AT)


@jitable
def beat(memory: Any, now_ns: int) -> None:
    """The producer says that it lives: its clock, for a consumer that wants to know although there are no records."""
    store(memory, HEARTBEAT_AT, now_ns)
    flush(memory, HEARTBEAT_AT)


@jitable
def heartbeat(memory: Any) -> int:
    """The producer's clock at its newest sign of life, ns; 0: none yet."""
    invalidate(memory, HEARTBEAT_AT)
    return load(memory, HEARTBEAT_AT)


@jitable
def settle(memory: Any) -> None:
    """Make all that was sent visible now: call it before a doorbell or interrupt, which would otherwise overtake the records."""
    fence(memory)


@jitable
def send(memory: Any, own: Any, records: Any, n: int) -> int:
    """Send the first n records (8 words each) in order; how many fitted. The rest is counted as overflow, not sent."""
    fit = min(n, room(memory, own, n))
    if fit < n:
        _count_overflow(memory, own, n - fit)
    for k in range(fit):
        _place(memory, own, own[NEXT] + k, records, k * LINE_WORDS)
    fence(memory)
    for k in range(fit):
        _publish(memory, own, own[NEXT] + k, records[k * LINE_WORDS])
    own[NEXT] += fit
    return fit


@jitable
def send_one(memory: Any, own: Any, records: Any, at: int) -> int:
    """Send the one record that starts at word `at` of `records`; 1, or 0 and counted as overflow."""
    if own[NEXT] - own[CREDIT] >= own[CAPACITY] and room(memory, own, 1) < 1:
        _count_overflow(memory, own, 1)
        return 0
    _place(memory, own, own[NEXT], records, at)
    fence(memory)
    _publish(memory, own, own[NEXT], records[at])
    own[NEXT] += 1
    return 1


@jitable
def poll(memory: Any, own: Any, out: Any, n: int) -> int:
    """Take up to n records into `out` (8 words each, mark 0); how many there were."""
    got = 0
    while got < n and poll_one(memory, own, out, got * LINE_WORDS):
        got += 1
    return got


@jitable
def poll_one(memory: Any, own: Any, out: Any, at: int) -> int:
    """Take one record to word `at` of `out`; 1, or 0 if there is none."""
    if not _is_there(memory, own, own[NEXT]):
        return 0
    slot = _slot(own, own[NEXT])
    out[at] = load(memory, slot) & HIGH
    for w in range(1, LINE_WORDS):
        out[at + w] = load(memory, slot + w)
    own[NEXT] += 1
    # The loads above are acquire loads, so the slot is free only after they are done.
    if own[NEXT] - own[CREDIT] >= own[SHARE]:
        own[CREDIT] = own[NEXT]
        store(memory, CREDIT_AT, own[NEXT])
        flush(memory, CREDIT_AT)
    return 1


@jitable
def prefetch(memory: Any, own: Any) -> bool:
    """Bring the next record's line near, so that the next poll need not wait for it; True if a record is there."""
    return _is_there(memory, own, own[NEXT])


@jitable
def wait(memory: Any, own: Any, wait_ns: int) -> bool:
    """Poll until a record is there or `wait_ns` have passed; True if one is. At 0 it looks once."""
    if _is_there(memory, own, own[NEXT]):
        return True
    if wait_ns <= 0:
        return False
    end_ns = clock_ns() + wait_ns
    while True:
        for _ in range(POLLS_A_CLOCK):
            if _is_there(memory, own, own[NEXT]):
                return True
            pause()
        if clock_ns() >= end_ns:
            return False


@jitable
def _slot(own: Any, position: int) -> int:
    return HEADER_WORDS + (position & (own[CAPACITY] - 1)) * LINE_WORDS  # type: ignore[no-any-return]


@jitable
def _mark(own: Any, position: int) -> int:
    return (own[BASE] + (position >> own[SHIFT]) + 1) & LOW  # type: ignore[no-any-return]


@jitable
def _is_there(memory: Any, own: Any, position: int) -> bool:
    slot, mark = _slot(own, position), _mark(own, position)
    # A copy of the line that has the mark is good, however it came here (prefetch); one that has not may be stale.
    if load(memory, slot) & LOW == mark:
        return True
    invalidate(memory, slot)
    return load(memory, slot) & LOW == mark


@jitable
def room(memory: Any, own: Any, n: int) -> int:
    """How many records surely fit, for a producer that would rather wait than overflow; the credit is read anew only where fewer than n seem to."""
    if own[CAPACITY] - (own[NEXT] - own[CREDIT]) < n:
        invalidate(memory, CREDIT_AT)
        credit = load(memory, CREDIT_AT)
        if own[CREDIT] <= credit <= own[NEXT]:  # else the consumer writes what cannot be: no more room is taken on its word
            own[CREDIT] = credit
    return own[CAPACITY] - (own[NEXT] - own[CREDIT])  # type: ignore[no-any-return]


@jitable
def _count_overflow(memory: Any, own: Any, n: int) -> None:
    own[LOST] += n
    store(memory, OVERFLOW_AT, own[LOST])
    flush(memory, OVERFLOW_AT)


@jitable
def _place(memory: Any, own: Any, position: int, records: Any, at: int) -> None:
    slot = _slot(own, position)
    for w in range(1, LINE_WORDS):
        store(memory, slot + w, records[at + w])
    flush(memory, slot)


@jitable
def _publish(memory: Any, own: Any, position: int, first_word: int) -> None:
    slot = _slot(own, position)
    store(memory, slot, (first_word & HIGH) | _mark(own, position))
    flush(memory, slot)


@cache
def compiled() -> SimpleNamespace:
    """The functions above for Python callers: compiled at the first call with int64 arrays and kept on disk."""
    set_up = (create, retire, identity, restarted, join_producer, join_consumer, joins, overflowed, beat, heartbeat, settle, room)
    public = (*set_up, send, send_one, poll, poll_one, prefetch, wait)
    return SimpleNamespace(**{function.__name__: jit(function) for function in public})
