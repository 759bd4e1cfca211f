"""A session: what one host and one agent have said to each other since the host's whole state was last on its way. No input or output here.

Frames of records are numbered, so a gap shows, and the session is over: the host opens another and replays its state. Each side says in every frame how
many records of the other's it has taken; a sender never has more than `window` records out that were not taken, so a queue cannot overflow unseen.
"""

from __future__ import annotations

from waveos.link.frames import Frame, Kind, pack
from waveos.record import RECORD_BYTES, VERSION


class Broken(Exception):
    """The session is over, and why."""


class Session:
    """One side of a session. `out` and `into` are the windows of the two directions, in records."""

    __slots__ = ("_into", "_out", "_said", "frames_in", "frames_out", "got", "lost", "number", "peer_lost", "peer_took", "sent", "subsystem", "taken")

    def __init__(self, number: int, subsystem: int, out: int, into: int) -> None:
        self.number, self.subsystem, self._out, self._into = number, subsystem, out, into
        self.frames_out = self.frames_in = 0
        self.sent = self.peer_took = 0  # records; sent - peer_took <= out
        self.got = self.taken = 0  # records; got - taken <= into
        self.lost = self.peer_lost = 0
        self._said = 0  # `taken` as the peer knows it

    @property
    def room(self) -> int:
        """Records that may be sent now."""
        return self._out - (self.sent - self.peer_took)

    @property
    def owes_credit(self) -> bool:
        """The peer may soon wait to hear how much was taken: send something, a BEAT if there is nothing else."""
        return (self.taken - self._said) * 4 >= self._into

    def data(self, body: bytes) -> bytes:
        """The next frame of records. There must be room."""
        self.frames_out += 1
        self.sent += len(body) // RECORD_BYTES
        return self.say(Kind.DATA, body)

    def say(self, kind: Kind, body: bytes = b"") -> bytes:
        """A frame of that kind, with all that this side has to tell."""
        self._said = self.taken
        return pack(kind, VERSION, self.subsystem, self.number, self.frames_out, self.taken, self.lost, body)

    def hear(self, frame: Frame) -> memoryview | None:
        """The records of a frame of this session, or None if it has none, or is late. Raises Broken where one is missing, or makes no sense."""
        if frame.taken > self.sent:
            raise Broken("the peer has taken more than was sent")
        if frame.taken > self.peer_took:
            self.peer_took = frame.taken
        if frame.lost > self.peer_lost:
            self.peer_lost = frame.lost
        if frame.kind != Kind.DATA:
            if frame.number > self.frames_in:
                raise Broken(f"{frame.number - self.frames_in} frames are lost")
            return None
        if frame.number <= self.frames_in:
            return None
        if frame.number != self.frames_in + 1:
            raise Broken(f"{frame.number - self.frames_in - 1} frames are lost")
        records = len(frame.body) // RECORD_BYTES
        if self.got + records - self.taken > self._into:
            raise Broken("the peer sends more than there is room for")
        self.frames_in += 1
        self.got += records
        return frame.body
