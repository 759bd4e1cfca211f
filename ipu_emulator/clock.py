"""Virtual time: one pending instant for each slot (an arrival source, the agent, a CPU, ...), and the earliest of them in O(log n).

A winner tree over slots: setting a slot again replaces its instant, so nothing is ever cancelled and no stale event exists.
Equal instants go by slot number, which makes a run repeatable.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from waveos.jit import jit_inline

NEVER = 1 << 62


LEAVES = 4_096
CLOCK = np.dtype([("leaves", "i8"), ("time_ns", "i8", (LEAVES,)), ("winner", "i8", (2 * LEAVES,))])
"""`time_ns[slot]`, and `winner[node]`: the slot that is due first below a node of the tree over `leaves` slots; node 1 is the root."""


def reset_clock(clock: np.ndarray[Any, Any], slots: int) -> None:
    """Make `clock`, [1] CLOCK, one with `slots` slots, none of them due."""
    leaves = 1 << max(1, (slots - 1).bit_length())
    if leaves > LEAVES:
        raise ValueError(f"{slots} slots; a clock has at most {LEAVES}")
    clock["leaves"] = leaves
    clock["time_ns"] = NEVER
    winner = clock["winner"][0]
    winner[leaves : 2 * leaves] = np.arange(leaves)
    for node in range(leaves - 1, 0, -1):
        winner[node] = winner[2 * node]


@jit_inline
def set_due(clock: Any, slot: int, time_ns: int) -> None:
    """Slot `slot` is due at `time_ns`; NEVER: not at all."""
    if clock.time_ns[slot] == time_ns:
        return
    clock.time_ns[slot] = time_ns
    node = (slot + clock.leaves) >> 1
    while node >= 1:
        left, right = clock.winner[2 * node], clock.winner[2 * node + 1]
        first = left if clock.time_ns[left] <= clock.time_ns[right] else right
        if first == clock.winner[node] and first != slot:
            return  # nothing changes above
        clock.winner[node] = first
        node >>= 1


@jit_inline
def first_due(clock: Any) -> Any:
    """The slot that is due first; its instant is `clock.time_ns[slot]`."""
    return clock.winner[1]
