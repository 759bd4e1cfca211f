"""Some seconds of a live enclave, as its two queues tell: what `wave trace --live` draws. Daemons, threads and queues are not touched: the memory is looked at.

hostd hands the queues' memory to root alone, once at the begin; then it is asked no more, but for names at the end.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from waveos.errors import ConfigError, LinkError, WaveError
from waveos.record import WORDS
from waveos.sched.records import DECISION, MESSAGE
from waveos.watch.rings import Onlooker

LOOK_S = 0.001
ANEW_LOOKS = 100
"""Looks between two questions whether hostd is still there."""
MOST_RECORDS = 2_000_000
"""Of a recording: 128 MB, and as much as Perfetto's page draws in reasonable time."""
_GONE = "the hostd of"


@dataclass
class Recording:
    """What was seen. `over`: why it ended before its time, or nothing; `gone`: because hostd did."""

    messages: npt.NDArray[np.void]
    decisions: npt.NDArray[np.void]
    lost: int
    seconds: float
    about: dict[str, Any]
    over: str = ""
    gone: bool = False
    names: dict[int, str] = field(default_factory=dict)


def record(name: str, seconds: float, tick: Callable[[float], None] = lambda share: None) -> Recording:
    """Look on for so long. Raises ConfigError if there is no such enclave or this user may not, LinkError if its queues cannot be had.

    Ctrl-C ends it as time does, and so does the end of hostd. `tick` hears how much is done, 0 to 1.
    """
    doors = import_module("waveos.host.doors")
    about, descriptors = doors.ask_for(name, {"do": "watch"})
    try:
        if not about.pop("ok"):
            raise ConfigError(about["error"])
        if about["subsystem"] != "sched":
            raise ConfigError(f"the enclave {name!r} is one of {about['subsystem']}; live traces are of scheduling")
        if len(descriptors) != 2:
            raise LinkError(f"hostd handed over {len(descriptors)} descriptors, not 2; install the same waveos for both")
        up, down = (Onlooker(fd, size) for fd, size in zip(descriptors, about["bytes"], strict=True))
    finally:
        for fd in descriptors:
            os.close(fd)
    names = _names(about["pids"])
    said, decided, over = _watch(name, up, down, seconds, tick, lambda: doors.running())
    with contextlib.suppress(WaveError):
        names |= _names(doors.ask(name, {"do": "watch"}).get("pids", {}))
    return Recording(_join(said, MESSAGE), _join(decided, DECISION), up.lost + down.lost, seconds, about, over, over.startswith(_GONE), names)


def _watch(
    name: str, up: Onlooker, down: Onlooker, seconds: float, tick: Callable[[float], None], running: Callable[[], list[str]]
) -> tuple[list[Any], list[Any], str]:
    said, decided = [up.take()], [down.take()]
    begin, looks, records = time.monotonic(), 0, 0
    try:
        while (gone := time.monotonic() - begin) < seconds:
            time.sleep(min(LOOK_S, seconds - gone))
            said.append(up.take())
            decided.append(down.take())
            records += len(said[-1]) + len(decided[-1])
            if records > MOST_RECORDS:
                return said, decided, f"{MOST_RECORDS:,} records are as many as one trace holds"
            looks += 1
            if looks % ANEW_LOOKS == 0:
                tick(gone / seconds)
                if name not in running():
                    return said, decided, f"{_GONE} {name!r} has ended"
    except KeyboardInterrupt:
        return said, decided, "interrupted"
    return said, decided, ""


def _join(parts: list[Any], dtype: Any) -> npt.NDArray[np.void]:
    words = np.concatenate(parts) if parts else np.zeros((0, 8), WORDS)
    joined: npt.NDArray[np.void] = np.ascontiguousarray(words).view(dtype).reshape(-1)
    return joined


def _names(pids: dict[str, int]) -> dict[int, str]:
    """ "NAME (pid)" of the enclave's threads, by number; of those that have ended, the number alone."""
    found = {}
    for tid, pid in pids.items():
        try:
            found[int(tid)] = f"{Path(f'/proc/{pid}/comm').read_text().strip()} ({pid})"
        except OSError:
            found[int(tid)] = f"({pid})"
    return found
