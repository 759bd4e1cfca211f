"""Memory that engine and ranks share: the ranks' devices, host memory's KV, the weights, and what ranks exchange in a step.

It has no name in the file system: a rank opens the engine's descriptor through /proc, and whatever becomes of the engine, nothing stays behind.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from waveos.host.serving.model import SPOKEN, Floats, Shape

ROWS = 256
"""Tokens that a step computes at most: longer batches are several steps."""


@dataclass(frozen=True)
class Sizes:
    """What the shared memory is made for."""

    shape: Shape
    ranks: int
    device_tokens: int
    host_tokens: int

    def arrays(self) -> dict[str, tuple[int, ...]]:
        """By name; in the order in which they lie in memory."""
        shape = self.shape
        return {
            "abort": (1,),
            "logits": (ROWS, len(SPOKEN)),
            "attention": (shape.kv_heads, ROWS, shape.hidden),
            "feed": (shape.shards, ROWS, shape.hidden),
            "device": (self.ranks, shape.layers, 2, shape.kv_heads, self.device_tokens, shape.head_dim),
            "host": (self.host_tokens, shape.layers, 2, shape.kv_heads, shape.head_dim),
            **{f"weights.{name}": size for name, size in shape.arrays().items()},
        }


class Shared:
    """The arrays, in the engine (which makes them) or in a rank. A rank reads another's device only to take KV over from it."""

    def __init__(self, sizes: Sizes, path: str | None = None) -> None:
        total = sum(8 * int(np.prod(size)) for size in sizes.arrays().values())
        if path is None:
            self.descriptor = os.memfd_create("wave-serving")
            os.ftruncate(self.descriptor, total)
        else:
            self.descriptor = os.open(path, os.O_RDWR)
        self.path = f"/proc/{os.getpid()}/fd/{self.descriptor}"
        words: npt.NDArray[np.float64] = np.frombuffer(mmap.mmap(self.descriptor, total), np.float64)
        self._arrays, at = {}, 0
        for name, size in sizes.arrays().items():
            end = at + int(np.prod(size))
            self._arrays[name] = words[at:end].reshape(size)
            at = end

    def __getitem__(self, name: str) -> Floats:
        return self._arrays[name]

    def close(self) -> None:
        """Give up the descriptor; the memory goes with the last array."""
        self._arrays = {}
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
