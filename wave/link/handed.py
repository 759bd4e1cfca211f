"""Queues that hostd hands over: what `Segment` is to a link by name, `Handed` is to one by the path of hostd's socket, on the agent's side."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from waveos import ring
from waveos.ending import Look
from waveos.errors import LinkError, PolicyError
from waveos.handover import Message, await_message, hear, tell
from waveos.link import MESSAGES, TXNS
from waveos.link.segment import KINDS
from waveos.record import VERSION

Words = npt.NDArray[np.int64]
Prepare = Callable[[Message], Message]
"""Called with hostd's facts before the queues are asked for; what it returns is told with `ready`."""
ANSWER_S = 5.0


class Refused(LinkError):
    """hostd does not want this agent. `final`: asking again does not help."""

    def __init__(self, why: str, final: bool) -> None:
        super().__init__(why)
        self.final = final


class Handed:
    """An agent's place in an enclave; it ends when either side closes the socket. `facts` is what hostd says about the enclave."""

    owned = False

    def __init__(self, path: str, subsystem: int, prepare: Prepare, about: Message, look: Look) -> None:
        """Raises LinkError if nobody listens there, Refused if hostd does not want this agent, PolicyError if its policy is for another subsystem, and
        what `prepare` raises."""
        self.path, self.doorbell, self._look = path, -1, look
        self._queues: list[Words] = []
        self._capacities: list[int] = []
        self._requests: list[Message] = []
        self._line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            self._line.settimeout(ANSWER_S)
            try:
                self._line.connect(path)
            except FileNotFoundError:
                raise LinkError(f"there is no {path}: start `wave hostd` first, or mend the path") from None
            except PermissionError:
                raise LinkError(f"{path} is not for this user: run the agent as the user, or in the group, that hostd was told") from None
            except OSError as error:
                raise LinkError(f"nobody listens at {path} ({error.strerror}): start `wave hostd`") from None
            with contextlib.suppress(LinkError):  # who refuses may have gone already; the reason is still to be heard
                tell(self._line, {"hello": {"version": VERSION, **about}})
            self.facts: Message = self._answer("facts")[0]
            if self.facts["subsystem"] != subsystem:
                raise PolicyError(
                    f"{path} is of an enclave of subsystem {self.facts['subsystem']}, this policy is for {subsystem}: choose another policy"
                )
            self.attach(prepare(self.facts))
        except BaseException:
            self.close()
            raise

    def attach(self, about: Message) -> None:
        """Say that the policy is ready, and be given new, empty queues: at first, and again after each change of policy. Raises LinkError."""
        tell(self._line, {"ready": about})
        told, descriptors = self._answer("attached")
        if len(descriptors) != 3:
            raise LinkError(f"hostd handed over {len(descriptors)} descriptors, not 3; install the same waveos for both")
        self._drop()
        try:
            for descriptor, size in zip(descriptors, told["bytes"], strict=False):
                words = np.frombuffer(mmap.mmap(descriptor, size // 8 * 8), np.int64)
                capacity = 1 << (int(words[ring.IDENTITY_AT]) >> 24 & 0xFF)
                if ring.words(capacity) > len(words):
                    raise LinkError("a queue that hostd handed over is cut off; restart hostd")
                self._queues.append(words)
                self._capacities.append(capacity)  # what was found once: the memory is hostd's to change
        except (OSError, ValueError) as error:
            raise LinkError(f"a queue that hostd handed over cannot be used: {error}") from error
        finally:
            for descriptor in descriptors[:2]:
                os.close(descriptor)
            self.doorbell = descriptors[2]

    def _answer(self, wanted: str) -> tuple[Any, list[int]]:
        """hostd's answer of that kind; requests that come before it wait. Raises LinkError."""
        while True:
            try:
                message, descriptors = await_message(self._line, ANSWER_S, self._look)
            except TimeoutError:
                raise LinkError(f"hostd at {self.path} does not answer") from None
            if "refused" in message:
                raise Refused(message["refused"], bool(message.get("final")))
            if wanted in message:
                return message[wanted], descriptors
            self._requests.append(message)

    def requests(self) -> list[Message]:
        """What hostd has asked for since the last call. Raises LinkError if it is gone."""
        self._hear()
        found, self._requests = self._requests, []
        return found

    def _hear(self) -> None:
        self._line.settimeout(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                self._requests.append(hear(self._line)[0])

    def answer(self, message: Message) -> None:
        """Tell hostd. Raises LinkError if it is gone."""
        self._line.settimeout(ANSWER_S)
        tell(self._line, message)

    # As Segment:

    def queues(self) -> list[int]:
        """The numbers of the queues."""
        return [MESSAGES, TXNS]

    def entry(self, number: int) -> tuple[int, int, int]:
        """Kind (0: none), 0 and capacity of a queue."""
        if number not in (MESSAGES, TXNS):
            return 0, 0, 0
        return KINDS["messages" if number == MESSAGES else "txns"], 0, self._capacities[number]

    def map_queue(self, number: int) -> Words:
        """The memory of a queue's ring."""
        return self._queues[number]

    def owner_alive(self) -> bool:
        """True while hostd keeps the socket open."""
        try:
            self._hear()
        except LinkError:
            return False
        return True

    def agent(self) -> int:
        """This process."""
        return os.getpid()

    def close(self) -> None:
        """Leave the enclave."""
        self._line.close()
        self._drop()

    def _drop(self) -> None:
        self._queues, self._capacities = [], []
        if self.doorbell >= 0:
            os.close(self.doorbell)
            self.doorbell = -1
