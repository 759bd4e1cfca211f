"""Where KV lies: slots of one token each on the device and in host memory, and a file for each block in storage."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from waveos.errors import ConfigError
from waveos.host.serving.model import Floats, Ints
from waveos.serving.engine import Block, Transfer
from waveos.serving.records import Tier

_SUFFIX = ".kv"


class Slots:
    """Slots of one tier: free ones, and those of each block."""

    def __init__(self, count: int) -> None:
        self._free = list(range(count - 1, -1, -1))
        self.of: dict[int, Ints] = {}

    def take(self, count: int) -> Ints:
        """So many free slots. The mechanism's accounts say that they are there."""
        assert count <= len(self._free), "the mechanism gave away more than there is"
        taken = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        return np.array(taken, np.int64)

    def give(self, slots: Sequence[int] | Ints) -> None:
        """These are free again."""
        self._free.extend(int(each) for each in slots)

    def drop(self, block: int) -> None:
        """The block is not here any more."""
        if (slots := self.of.pop(block, None)) is not None:
            self.give(slots)

    @property
    def free(self) -> int:
        """How many are free."""
        return len(self._free)


class Files:
    """Storage: a folder with a file a block, read and written by a thread of its own. What was there before is still there: a cache outlives its engine."""

    def __init__(self, folder: Path, host: Floats, wake: int) -> None:
        self.folder, self._host, self._wake = folder, host, wake
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"storage {folder}: {error.strerror}") from error
        self.done: queue.SimpleQueue[tuple[Transfer, list[Block]]] = queue.SimpleQueue()
        self._work: queue.SimpleQueue[tuple[Transfer, list[tuple[Block, Ints]], threading.Event] | None] = queue.SimpleQueue()
        self._stops: dict[int, threading.Event] = {}
        self._thread = threading.Thread(target=self._serve, daemon=True, name="storage")
        self._thread.start()

    def held(self) -> list[tuple[int, int, int]]:
        """(block, parent, tokens) of what is there."""
        token = self._host[0].nbytes
        found = []
        for path in sorted(self.folder.glob(f"*{_SUFFIX}")):
            try:
                key, parent = (int(part, 16) for part in path.name.removesuffix(_SUFFIX).split("-"))
            except ValueError:
                continue
            size = path.stat().st_size
            if size and size % token == 0:
                found.append((key, parent, size // token))
        return found

    def begin(self, transfer: Transfer, host: dict[int, Ints]) -> None:
        """Copy between host memory and files; `done` tells of what has arrived."""
        stop = self._stops[id(transfer)] = threading.Event()
        self._work.put((transfer, [(block, host[block.id]) for block in transfer.blocks], stop))

    def stop(self, transfer: Transfer) -> None:
        """End it after the block that is under way."""
        if stop := self._stops.get(id(transfer)):
            stop.set()

    def forget(self, block: Block) -> None:
        """The block is not in storage any more."""
        self._path(block).unlink(missing_ok=True)

    def close(self) -> None:
        """End the thread."""
        self._work.put(None)
        self._thread.join(10.0)

    def _path(self, block: Block) -> Path:
        return self.folder / f"{block.id:016x}-{block.parent:016x}{_SUFFIX}"

    def _serve(self) -> None:
        while (work := self._work.get()) is not None:
            transfer, blocks, stop = work
            arrived = []
            for block, slots in blocks:
                if stop.is_set() or not (self._write(block, slots) if transfer.target is Tier.STORAGE else self._read(block, slots)):
                    break
                arrived.append(block)
            self._stops.pop(id(transfer), None)
            self.done.put((transfer, arrived))
            os.eventfd_write(self._wake, 1)

    def _write(self, block: Block, slots: Ints) -> bool:
        path = self._path(block)
        new = path.with_suffix(".new")
        try:
            new.write_bytes(self._host[slots].tobytes())
            new.replace(path)
        except OSError:
            new.unlink(missing_ok=True)
            return False
        return True

    def _read(self, block: Block, slots: Ints) -> bool:
        try:
            raw: Any = np.frombuffer(self._path(block).read_bytes(), np.float64)
            self._host[slots] = raw.reshape(len(slots), *self._host.shape[1:])
        except (OSError, ValueError):
            return False
        return True
