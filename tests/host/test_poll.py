"""hostd's loop: ticks come as asked, and more rarely where one takes long."""

from __future__ import annotations

import time

from waveos.host.poll import Poll

REST = 3


def ticks(length_s: float, seconds: float, rest: float) -> tuple[int, float]:
    """How many of 2 ms came in so long, each of which took `length_s`; and the share of the time that they took."""
    poll, spent = Poll(), []

    def tick() -> None:
        begin = time.monotonic()
        while time.monotonic() - begin < length_s:
            pass
        spent.append(time.monotonic() - begin)

    poll.every(2, tick, rest=rest)
    begin = time.monotonic()
    while time.monotonic() - begin < seconds:
        poll.once()
    poll.close()
    return len(spent), sum(spent) / (time.monotonic() - begin)


def test_ticks_that_take_long_leave_the_cpu_to_others_most_of_the_time():
    few, share = ticks(0.02, 0.5, REST)
    assert share <= 1 / (1 + REST) + 0.02 / 0.5
    many, _ = ticks(0.0, 0.5, REST)
    assert many > 2 * few


def test_without_a_rest_ticks_come_as_fast_as_they_can():
    _, share = ticks(0.02, 0.5, 0.0)
    assert share > 0.5
