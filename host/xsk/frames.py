"""The stack of frames that nobody has, for the one process that serves a UMEM."""

from __future__ import annotations

import numpy as np

from waveos.host.xsk import abi
from waveos.host.xsk.umem import Umem


class Frames:
    """`record` ([1] abi.FRAMES) is what compiled code takes. At first all frames of the UMEM are free: who serves it has new sockets."""

    def __init__(self, umem: Umem) -> None:
        self._free = np.arange(umem.frames, dtype=np.int64)[::-1] * umem.frame_bytes
        self._free = np.ascontiguousarray(self._free)
        self.record = np.zeros(1, abi.FRAMES)
        self.record["n"], self.record["room"], self.record["free_at"] = umem.frames, umem.frames, self._free.ctypes.data

    def __len__(self) -> int:
        return int(self.record["n"][0])
