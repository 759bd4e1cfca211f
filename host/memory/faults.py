"""Page faults by batch, as the kernel meets them: a BPF program on `page_fault_user` counts them for regions that are watched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from waveos.host.bpf import Object

PLACES, BATCHES = 16, 16_384
PLACE = np.dtype([("start", "<u8"), ("tgid", "<u4"), ("batches", "<u4"), ("shift", "<u4"), ("spare", "<u4")])


class Faults:
    """Counts for up to PLACES regions of up to BATCHES batches; others are not watched."""

    def __init__(self) -> None:
        """Raises BpfError, MissingError where this kernel or machine cannot."""
        self._object = Object(Path(__file__).with_name("faults.bpf.o"))
        self._places = self._object.section(".bss.places")[: PLACES * PLACE.itemsize].view(PLACE)
        self._counts = self._object.section(".bss.counts")[: PLACES * BATCHES * 4].view(np.uint32).reshape(PLACES, BATCHES)
        self._seen = np.zeros((PLACES, BATCHES), np.uint32)
        self._of: dict[int, int] = {}  # place by region
        self._object.attach()

    def watch(self, region: int, tgid: int, start: int, batches: int, batch_bytes: int) -> bool:
        """Count this region's faults from now on; False if there is no place for it."""
        free = np.flatnonzero(self._places["tgid"] == 0)
        if not len(free) or batches > BATCHES or batch_bytes & (batch_bytes - 1):
            return False
        place = int(free[0])
        self._places[place] = (start, 0, batches, batch_bytes.bit_length() - 1, 0)
        self._seen[place] = self._counts[place]
        self._places["tgid"][place] = tgid  # last: the program looks at this first
        self._of[region] = place
        return True

    def forget(self, region: int) -> None:
        """Nothing if it is not watched."""
        if (place := self._of.pop(region, None)) is not None:
            self._places["tgid"][place] = 0

    def take(self, region: int) -> Any:
        """[batches] faults since the last call, or None if it is not watched."""
        place = self._of.get(region)
        if place is None:
            return None
        now = self._counts[place].copy()
        came, self._seen[place] = now - self._seen[place], now
        return came[: int(self._places["batches"][place])]

    def close(self) -> None:
        """Twice does no harm."""
        self._of.clear()
        self._object.close()
