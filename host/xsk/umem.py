"""UMEM: the memory that packets lie in, shared between the kernel and every process that has its descriptor."""

from __future__ import annotations

import ctypes
import mmap
import os
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FRAME_BYTES = 2_048
"""A frame holds one packet; the kernel keeps 256 bytes in front of it. Larger packets never reach the socket: the kernel drops and counts them."""


@dataclass(frozen=True)
class Umem:
    """`frames` frames of `frame_bytes` in a memfd. Frame i begins at address i * frame_bytes; addresses are what rings carry."""

    fd: int
    frames: int
    frame_bytes: int
    memory: mmap.mmap

    @classmethod
    def make(cls, frames: int = 4_096, frame_bytes: int = FRAME_BYTES) -> Umem:
        """New memory. Raises ValueError unless a frame is 2048 or 4096 bytes."""
        if frame_bytes not in (2_048, 4_096) or frames < 1:
            raise ValueError(f"{frames} frames of {frame_bytes} bytes: frames are of 2048 or 4096 bytes")
        fd = os.memfd_create("waveos-umem")
        os.ftruncate(fd, frames * frame_bytes)
        return cls.attach(fd, frames, frame_bytes)

    @classmethod
    def attach(cls, fd: int, frames: int, frame_bytes: int = FRAME_BYTES) -> Umem:
        """The memory behind a descriptor, which this object owns from now on."""
        memory = mmap.mmap(fd, frames * frame_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        return cls(fd, frames, frame_bytes, memory)

    @property
    def address(self) -> int:
        """Where it lies in this process."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self.memory))

    @property
    def bytes(self) -> npt.NDArray[np.uint8]:
        """The whole of it."""
        return np.frombuffer(self.memory, np.uint8)

    def close(self) -> None:
        """Give the descriptor up; the mapping goes with its last user."""
        os.close(self.fd)
