"""How a command that serves ends: SIGTERM and Ctrl-C are its ordinary end."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType


class _Over(Exception):
    pass


def until_stopped(serve: Callable[[], None], close: Callable[[], None]) -> None:
    """Run `serve` until SIGTERM or SIGINT, then `close`."""

    def end(_number: int, _frame: FrameType | None) -> None:
        raise _Over

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        serve()
    except _Over:
        pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        close()
