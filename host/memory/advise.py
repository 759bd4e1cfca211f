"""process_madvise: what is to become of another process's pages. The kernel's calls alone; who may be advised is decided elsewhere."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence

PAGEOUT, WILLNEED = 21, 3
AT_ONCE = 64
"""Ranges of one call: a call cannot be interrupted, and a range of 2 MiB takes the kernel some milliseconds."""
_PROCESS_MADVISE = 440
_libc = ctypes.CDLL(None, use_errno=True)


class _Range(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("bytes", ctypes.c_size_t))


class Advisor:
    """Advises one process, which it holds by a descriptor, so that a number given out again means nobody else."""

    def __init__(self, pid: int) -> None:
        """Raises ProcessLookupError if there is none."""
        self.pidfd = os.pidfd_open(pid)

    def advise(self, advice: int, ranges: Sequence[tuple[int, int]]) -> int:
        """Give this advice for (address, bytes) ranges, in order; how many bytes it was taken for. What has been unmapped meanwhile is passed over.

        Raises ProcessLookupError if the process is gone, OSError for what the kernel refuses as a whole.
        """
        done = 0
        left = list(ranges)
        while left:
            part, left = left[:AT_ONCE], left[AT_ONCE:]
            vector = (_Range * len(part))(*(_Range(base, size) for base, size in part))
            taken = _libc.syscall(_PROCESS_MADVISE, self.pidfd, vector, ctypes.c_size_t(len(part)), advice, 0)
            if taken < 0:
                number = ctypes.get_errno()
                if number == 12 and len(part) > 1:  # ENOMEM: one of them is not mapped any more; find it
                    left = part[1:] + left
                    done += self.advise(advice, part[:1])
                elif number != 12:
                    raise OSError(number, os.strerror(number))
                continue
            done += taken
            for base, size in part:  # the kernel stops at the first it cannot do: go on behind that
                if taken < size:
                    left = part[part.index((base, size)) + 1 :] + left
                    break
                taken -= size
        return done

    def close(self) -> None:
        """Twice does no harm."""
        if self.pidfd >= 0:
            os.close(self.pidfd)
        self.pidfd = -1
