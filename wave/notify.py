"""What systemd is told by a service of Type=notify (sd_notify): that it is ready, that its loop goes round, that it stops. Without systemd nothing happens.

One datagram to the socket that $NOTIFY_SOCKET names; libsystemd's own function does no more, and its Python package wants a compiler.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time

_SHARE = 4
"""The loop is told of this often within the time that the watchdog allows."""


class _Line:
    """The socket, once it was looked for."""

    socket: socket.socket | None = None
    looked = False
    every_s = 0.0  # between two signs of life; 0: nobody wants any
    next_s = 0.0


def look() -> None:
    """Find where to tell, and how often, once. The variables are taken out: call it before there are children, so that they do not speak for us."""
    if _Line.looked:
        return
    _Line.looked = True
    path = os.environ.pop("NOTIFY_SOCKET", "")
    usec, pid = os.environ.pop("WATCHDOG_USEC", ""), os.environ.pop("WATCHDOG_PID", "")
    if not path:
        return
    with contextlib.suppress(OSError):
        _Line.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        _Line.socket.setblocking(False)
        _Line.socket.connect("\0" + path[1:] if path.startswith("@") else path)
        if usec.isdigit() and pid in ("", str(os.getpid())):
            _Line.every_s = int(usec) / 1e6 / _SHARE


def ready(status: str = "") -> None:
    """The service can be used. `status` is a line for `systemctl status`."""
    _tell("READY=1" + (f"\nSTATUS={status}" if status else ""))


def stopping() -> None:
    """It is told to end, and does."""
    _tell("STOPPING=1")


def alive() -> None:
    """The loop goes round: to be called from the loop itself, as often as it likes. Costs a look at the clock most times."""
    look()
    if _Line.every_s and (now_s := time.monotonic()) >= _Line.next_s:
        _Line.next_s = now_s + _Line.every_s
        _tell("WATCHDOG=1")


def _tell(text: str) -> None:
    look()
    if _Line.socket is not None:
        with contextlib.suppress(OSError):  # systemd is being restarted, or its buffer is full: the next one counts
            _Line.socket.send(text.encode())
