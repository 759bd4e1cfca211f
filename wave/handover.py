"""How hostd hands an enclave's queues to an agent: JSON messages and descriptors over a UNIX socket that keeps messages apart (SOCK_SEQPACKET).

    agent   {"hello": {"version": 1, "policy": ...}}         who may connect, hostd knows from the socket (SO_PEERCRED)
    hostd   {"facts": {"enclave", "subsystem", "cpus", "threads", "ahead", "policy", "params"}}       or {"refused": why, "final": ...}
    agent   {"ready": {"policy": ..., "params": {...}}}      its policy is compiled; only now hostd makes empty rings and replays the state
    hostd   {"attached": {"generation", "bytes": [of messages, of txns]}} with the descriptors [messages, txns, doorbell]

Then at any time: hostd asks {"set-policy": {...}}, and the agent, once the new policy is compiled, says `ready` again, or {"unwilling": why}; hostd asks
{"report": {}} and is told {"report": {...}}. Whoever goes away closes the socket: that is how the other side knows.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from typing import Any

from waveos.ending import Look
from waveos.errors import LinkError

MAX_BYTES = 1 << 17
MAX_DESCRIPTORS = 8
LOOK_S = 0.02
"""Between two looks while one waits to be told."""
MAX_DEPTH = 8
"""Tables and lists within each other. What was read from JSON is written as JSON again, which recursion may forbid only then; ours are 4 deep."""
Message = dict[str, Any]


def tell(line: socket.socket, message: Message, descriptors: list[int] | None = None) -> None:
    """Send one message. Raises LinkError if the other side is gone, or does not take in what it is told."""
    data = json.dumps(message).encode()
    if len(data) > MAX_BYTES:
        raise LinkError(f"a message of {len(data)} bytes ({next(iter(message))}); at most {MAX_BYTES}")
    try:
        socket.send_fds(line, [data], descriptors or [], socket.MSG_NOSIGNAL)
    except BlockingIOError as error:
        raise LinkError("the other side does not take in what it is told") from error
    except OSError as error:
        raise LinkError(f"the other side is gone ({error.strerror})") from error


def hear(line: socket.socket, max_bytes: int = MAX_BYTES, max_descriptors: int = MAX_DESCRIPTORS) -> tuple[Message, list[int]]:
    """The next message and the descriptors with it. Raises LinkError if the other side is gone, speaks nonsense, or sends more than that; BlockingIOError if
    there is none yet."""
    try:
        try:
            data, descriptors, flags, _ = socket.recv_fds(line, max_bytes, max_descriptors, socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:  # it went without having read what it was told: what it said before, why it refuses, comes after that
            data, descriptors, flags, _ = socket.recv_fds(line, max_bytes, max_descriptors, socket.MSG_CMSG_CLOEXEC)
    except (BlockingIOError, TimeoutError):
        raise
    except OSError as error:
        raise LinkError(f"the other side is gone ({error.strerror})") from error
    try:
        if not data:
            raise LinkError("the other side is gone")
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise ValueError
        message = json.loads(data)
        if not isinstance(message, dict) or not message or not _is_flat(message):
            raise ValueError
    except (ValueError, RecursionError, LinkError) as error:
        for descriptor in descriptors:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        if isinstance(error, LinkError):
            raise
        raise LinkError(f"the other side speaks another language: {data[:60]!r}") from None
    return message, descriptors


def await_message(line: socket.socket, timeout_s: float, look: Look) -> tuple[Message, list[int]]:
    """The next message and its descriptors, as `hear`; what `look` raises ends the wait. Raises TimeoutError."""
    end_s = time.monotonic() + timeout_s
    line.settimeout(LOOK_S)
    while True:
        look()
        try:
            return hear(line)
        except TimeoutError:
            if time.monotonic() >= end_s:
                raise


def _is_flat(message: Message) -> bool:
    """Whether it is at most MAX_DEPTH deep."""
    level: list[Any] = [message]
    for _ in range(MAX_DEPTH):
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each) if isinstance(inner, dict | list)]
    return not level
