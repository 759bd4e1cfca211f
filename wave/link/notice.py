"""A notice: a few words that one machine posts in memory which another reads, and reads whole or not at all; and a beat, which shows that it lives.

Line 0 of a notice has its stamp in word 0 (0: there is none), the lines behind it have the words. Each notice has one writer. It is written over the
five primitives, as the ring is, and tried on the same strict model: the reader's copy may be stale, and the writer's stores may arrive in any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from waveos.primitives import LINE_WORDS, fence, flush, invalidate, load, store


def withdraw(memory: Any, at: int) -> None:
    """Take the notice at word `at` away: whoever reads it from now on finds none, or knows that he read too late."""
    store(memory, at, 0)
    flush(memory, at)
    fence(memory)


def post(memory: Any, at: int, stamp: int, words: Sequence[int]) -> None:
    """Put up a notice where none is now. `stamp` is not 0, and not that of the one before."""
    first = at + LINE_WORDS
    for k, word in enumerate(words):
        store(memory, first + k, word)
    for line in range(first, first + len(words), LINE_WORDS):
        flush(memory, line)
    fence(memory)
    store(memory, at, stamp)
    flush(memory, at)


def stamp_of(memory: Any, at: int) -> int:
    """The stamp of the notice at word `at`; 0: there is none."""
    invalidate(memory, at)
    return load(memory, at)


def read(memory: Any, at: int, n: int) -> tuple[int, list[int]]:
    """Stamp and the n words of the notice at word `at`; (0, []) if there is none, or it was changed meanwhile."""
    stamp, first = stamp_of(memory, at), at + LINE_WORDS
    if stamp == 0:
        return 0, []
    for line in range(first, first + n, LINE_WORDS):
        invalidate(memory, line)
    words = [load(memory, first + k) for k in range(n)]
    return (stamp, words) if stamp_of(memory, at) == stamp else (0, [])


def beat(memory: Any, at: int, value: int) -> None:
    """Show a sign of life: a value that is not the one before."""
    store(memory, at, value)
    flush(memory, at)


def beat_of(memory: Any, at: int) -> int:
    """The newest sign of life."""
    invalidate(memory, at)
    return load(memory, at)
