"""How many requests of a class are let in: what `set_rate` orders, kept by who lets requests in, the same way in every world.

A class has a gap, the time between two requests at its rate, and the time at which its next one is due. One that asks for little saves up what `BURST_NS`
of its rate allows, and no more (the generic cell rate algorithm).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from waveos.jit import jit_inline
from waveos.net.records import CLASSES

BURST_NS = 10_000_000
RATES = np.dtype([("gap_ns", "i8", (CLASSES,)), ("due_ns", "i8", (CLASSES,))])


@jit_inline
def limit(rates: Any, request_class: int, per_s: int) -> None:
    """At most so many requests of the class a second from now on; 0: any number."""
    rates.gap_ns[request_class] = 1_000_000_000 // per_s if per_s > 0 else 0


@jit_inline
def admit(rates: Any, request_class: int, now_ns: int) -> Any:
    """Whether a request of the class that comes now is let in."""
    gap_ns = rates.gap_ns[request_class]
    if gap_ns == 0:
        return True
    due_ns = max(rates.due_ns[request_class], now_ns - BURST_NS)
    if due_ns > now_ns:
        return False
    rates.due_ns[request_class] = due_ns + gap_ns
    return True
