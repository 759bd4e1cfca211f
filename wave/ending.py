"""How a process ends at a signal between two of its steps, and not in the middle of one."""

from __future__ import annotations

import signal
from collections.abc import Callable

Look = Callable[[], None]
"""To be called between two steps, also of waiting: what it raises ends them."""


def end_between_steps() -> Look:
    """From now on SIGTERM and SIGINT are noted, and the process ends, by SystemExit(0), where it looks.

    An exception from the handler itself could come anywhere: with a hand-over half done, or in a callback of compiled code, where it is swallowed.
    """
    told: list[int] = []

    def look() -> None:
        if told:
            raise SystemExit(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _frame: told.append(number))
    return look


def never() -> None:
    """The look of one that no signal ends."""
