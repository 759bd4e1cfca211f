"""What hostd waits for, in one place: descriptors with what to do about them, a clock tick, signals."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Callable

_CLOCK_MONOTONIC, _SECOND_NS = 1, 1_000_000_000
_TIMERSPEC = struct.Struct("=qqqq")  # interval and first expiry, each in s and ns
_libc = ctypes.CDLL(None, use_errno=True)


class Poll:
    """An epoll set whose members have a function each, called when they can be read."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._calls: dict[int, Callable[[], None]] = {}
        self._timer = -1
        self._signals: tuple[socket.socket, socket.socket] | None = None
        self.wakeups = 0

    def add(self, fd: int, call: Callable[[], None]) -> None:
        """Call it whenever the descriptor can be read, or its other side is gone."""
        self._calls[fd] = call
        self._epoll.register(fd, select.EPOLLIN)

    def remove(self, fd: int) -> None:
        """Before the descriptor is closed."""
        if self._calls.pop(fd, None) is not None:
            with contextlib.suppress(OSError):
                self._epoll.unregister(fd)

    def every(self, period_ms: float, call: Callable[[], None], *, rest: float = 0.0) -> None:
        """A tick; ticks that were missed are one. After one comes a rest of `rest` times its length, or the period if that is longer: with 3, ticks take at
        most a quarter of a CPU, however slow it is (an emulated one, say)."""
        self._timer = _libc.timerfd_create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._timer < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        period_ns = round(period_ms * 1e6)

        def begin(first_ns: int) -> None:
            if _libc.timerfd_settime(self._timer, 0, _TIMERSPEC.pack(*divmod(period_ns, _SECOND_NS), *divmod(first_ns, _SECOND_NS)), None):
                raise OSError(ctypes.get_errno(), "timerfd_settime")

        def tick() -> None:
            with contextlib.suppress(BlockingIOError):
                os.read(self._timer, 8)
            begun_ns = time.monotonic_ns()
            call()
            if (rest_ns := round(rest * (time.monotonic_ns() - begun_ns))) > period_ns:
                begin(rest_ns)

        begin(period_ns)
        self.add(self._timer, tick)

    def on_signals(self, numbers: list[signal.Signals], call: Callable[[int], None]) -> None:
        """Call it, from the loop, with the number of each signal that has come. The main thread's alone."""
        ours, theirs = self._signals = socket.socketpair()
        for end in self._signals:
            end.setblocking(False)
        signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        for number in numbers:
            signal.signal(number, lambda _number, _frame: None)

        def heard() -> None:
            with contextlib.suppress(BlockingIOError):
                for number in ours.recv(64):
                    call(number)

        self.add(ours.fileno(), heard)

    def once(self) -> None:
        """Wait, and do what is to be done."""
        for fd, _ in self._epoll.poll():
            self.wakeups += 1
            if (call := self._calls.get(fd)) is not None:  # one before it may have removed it
                call()

    def close(self) -> None:
        """Forget all; signals do nothing any more."""
        if self._signals is not None:
            signal.set_wakeup_fd(-1)
            for end in self._signals:
                end.close()
        if self._timer >= 0:
            os.close(self._timer)
        self._epoll.close()
