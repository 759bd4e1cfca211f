"""`Port`: everything for the packets of one service on one interface, opened in one call and handed on in one message.

port = Port.open("veth0", port=5000)                       # root: the daemon
socket.send_fds(connection, [port.facts()], port.descriptors())
...
port = Port.attach(*socket.recv_fds(connection, 4096, 3)[:2])   # no privilege: whoever serves it
"""

from __future__ import annotations

import contextlib
import json
import os

from waveos.host.xsk.frames import Frames
from waveos.host.xsk.program import Redirect, map_control
from waveos.host.xsk.socket import Facts, XskSocket
from waveos.host.xsk.umem import Umem


class Port:
    """A UMEM, a socket, the stack of free frames, and the XDP program's control block. The opener has `redirect`, the program itself, too."""

    def __init__(self, umem: Umem, xsk: XskSocket, control_fd: int, redirect: Redirect | None = None, share: Port | None = None) -> None:
        self.umem, self.xsk, self.redirect = umem, xsk, redirect
        self.frames: Frames = Frames(umem) if share is None else share.frames
        self._own = share is None
        self._control_fd = control_fd
        self.control = map_control(control_fd)

    @classmethod
    def open(cls, interface: str, *, port: int, from_client: bool = True, queue: int = 0, ring_size: int = 2_048, share: Port | None = None) -> Port:
        """Sockets and program on that interface of the calling thread's network namespace; packets come once there is a heartbeat.

        `share`: another port whose frames this one uses, too, so that packets go from one to the other without a copy. Raises as `XskSocket.open` and
        `Redirect` do; then nothing is left behind.
        """
        with contextlib.ExitStack() as undo:
            if share is None:
                umem = Umem.make(4 * ring_size)
                undo.callback(umem.close)
            else:
                umem = share.umem
            xsk = XskSocket.open(interface, queue=queue, umem=umem, ring_size=ring_size, shares=share.xsk if share else None)
            undo.callback(xsk.close)
            redirect = Redirect(interface, port=port, from_client=from_client)
            undo.callback(redirect.close)
            redirect.add(xsk, queue)
            made = cls(umem, xsk, redirect.control_fd, redirect, share)
            undo.pop_all()
        return made

    def facts(self) -> bytes:
        """What goes with the descriptors."""
        return json.dumps([self.umem.frames, self.umem.frame_bytes, self.xsk.facts.ring_size, self.xsk.facts.zero_copy]).encode()

    def descriptors(self) -> list[int]:
        """UMEM, socket, control block."""
        return [self.umem.fd, self.xsk.fileno(), self._control_fd]

    @classmethod
    def attach(cls, facts: bytes, descriptors: list[int], share: Port | None = None) -> Port:
        """The port that another process opened; `share` as there. The descriptors are this object's from now on. There is one who serves: all frames that
        are in no ring are taken to be free, which holds for ports that nobody has served before.
        """
        frames, frame_bytes, ring_size, zero_copy = json.loads(facts)
        memory, xsk, control = descriptors
        if share is not None:
            os.close(memory)
        umem = share.umem if share else Umem.attach(memory, frames, frame_bytes)
        return cls(umem, XskSocket.attach(xsk, umem, Facts(ring_size, zero_copy)), control, share=share)

    @property
    def heartbeat_at(self) -> int:
        """Address of the word in which whoever serves stores CLOCK_MONOTONIC."""
        return int(self.control.ctypes.data)

    def close(self) -> None:
        """Leave the interface to the kernel, and close what this process has of it."""
        if self.redirect is not None:
            self.redirect.close()
        else:
            os.close(self._control_fd)
        self.xsk.close()
        if self._own:
            self.umem.close()

    def __enter__(self) -> Port:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
