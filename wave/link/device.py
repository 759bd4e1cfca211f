"""What `bar://DEVICE` names: a BAR of a PCI device (`bar://0000:00:04.0`, BAR 2; `bar://0000:00:04.0/4`, BAR 4), or a file of that memory by its path.

The host maps what it reads through sysfs's `resource2`, which is not cached, and what it alone writes through `resource2_wc`, which combines writes; a BAR
that is not prefetchable has no such file, and is written through the first. Page by page it is one or the other: Linux on x86 keeps one type for a page of
memory, and who maps it with another gets the first one, and is not told. The agent, on the device, maps that memory by the path of a file; where the
agent's machine has it as a PCI device as well (two guests that share memory) it reads and writes through `resource2`, in order. A lock on the file keeps a
second process of the same machine and side out, and goes with the process, however that ends.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import re
import struct
import weakref
from pathlib import Path

import numpy as np

from waveos.errors import LinkError
from waveos.names import nearest
from waveos.primitives import Words

PCI = Path("/sys/bus/pci/devices")
_ADDRESS = re.compile(r"([0-9a-f]{4}:)?([0-9a-f]{2}:[0-9a-f]{2}\.[0-7])(?:/([0-5]))?")
DEFAULT_BAR = 2
_LOCK = "hhqqi4x"
"""struct flock: type, whence, start, length, pid."""


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long
_libc.munmap.argtypes = ctypes.c_void_p, ctypes.c_size_t
_NONE, _FIXED = 0, 0x10  # PROT_NONE, MAP_FIXED
_FAILED = ctypes.c_void_p(-1).value


class DeviceError(LinkError):
    """The device cannot be used as it is; to ask again does not help."""

    final = True


class Device:
    """An open device. `bytes`: how large it is."""

    def __init__(self, url: str, side: str) -> None:
        """Raises DeviceError."""
        self.url, self.side = url, side
        self._descriptors: list[int] = []
        try:
            self.path, combining = self._find(url.removeprefix("bar://"))
            self.is_file = combining is None and not self.path.is_relative_to(PCI)
            self._fd = self._combining = self._open(self.path)
            self._lock(self._fd)
            if combining is not None and side == "host":
                self._combining = self._open(combining)
            self.bytes = os.fstat(self._fd).st_size // 8 * 8
        except BaseException:
            self.close()
            raise

    def _find(self, name: str) -> tuple[Path, Path | None]:
        """The file to read it by, and the one that combines writes, if it has one."""
        if name.startswith("/"):
            return Path(name), None
        match = _ADDRESS.fullmatch(name.lower())
        if not match:
            raise DeviceError(
                f"{self.url}: {name!r} is no device: write a PCI address (`lspci -D`), as in bar://0000:00:04.0, or the path of the device's memory, "
                "as in bar:///dev/shm/wave-bar"
            )
        address, number = (match[1] or "0000:") + match[2], int(match[3] or DEFAULT_BAR)
        folder = PCI / address
        if not folder.is_dir():
            known = sorted(found.parent.name for found in PCI.glob(f"*/resource{number}"))
            raise DeviceError(
                f"{self.url}: this machine has no PCI device {address}{nearest(address, known)}; with a BAR {number} it has: {', '.join(known) or 'none'}"
            )
        path, combining = folder / f"resource{number}", folder / f"resource{number}_wc"
        if not path.exists():
            has = sorted(found.name.removeprefix("resource") for found in folder.glob("resource[0-5]"))
            raise DeviceError(f"{self.url}: {address} has no BAR {number}; it has: {', '.join(has) or 'none'}: write bar://{address}/NUMBER")
        try:
            enabled = int((folder / "enable").read_text())
        except (OSError, ValueError):
            enabled = 1
        if not enabled:
            raise DeviceError(f"{self.url}: {address} is not enabled, so its memory does not answer: echo 1 >{folder}/enable")
        return path, combining if combining.exists() else None

    def _open(self, path: Path) -> int:
        try:
            self._descriptors.append(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        except FileNotFoundError:
            raise DeviceError(
                f"{self.url}: there is no {path}: it is the device's memory, and has to be there before; to try without a device: truncate -s 1M {path}"
            ) from None
        except PermissionError as error:
            raise DeviceError(
                f"{self.url}: {path} is not for this user ({error.strerror}): run as root, or give this user the file (a kernel in lockdown gives it to nobody)"
            ) from None
        except OSError as error:
            raise DeviceError(f"{self.url}: cannot open {path}: {error.strerror}") from None
        return self._descriptors[-1]

    def _lock(self, fd: int, kind: int = fcntl.F_WRLCK) -> None:
        """Of one byte, which is the side's."""
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack(_LOCK, kind, os.SEEK_SET, 0 if self.side == "host" else 1, 1, 0))
        except (BlockingIOError, PermissionError):
            raise DeviceError(
                f"{self.url} already has its {self.side} on this machine, a process that lives: stop that one (`fuser {self.path}` names it), "
                "or use another device"
            ) from None

    def map(self, start: int, n: int, alone: bool = False) -> Words:
        """n words from word `start` on, which is the first of a page. `alone`: from its second page on this side writes it, and nobody else.

        They hold for as long as anything refers to them, also when the device was closed. Raises DeviceError.
        """
        size = -(-8 * n // mmap.PAGESIZE) * mmap.PAGESIZE
        first = min(size, mmap.PAGESIZE) if alone else size
        base = _libc.mmap(None, size, _NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        words = (ctypes.c_int64 * n).from_address(base)
        weakref.finalize(words, _libc.munmap, base, size).atexit = False
        for fd, at, part in ((self._fd, 0, first), (self._combining, first, size - first)):
            flags = mmap.MAP_SHARED | _FIXED
            if part and _libc.mmap(base + at, part, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 8 * start + at) == _FAILED:
                raise DeviceError(
                    f"{self.url}: {self.path} cannot be mapped ({part} bytes from {8 * start + at} on): {os.strerror(ctypes.get_errno())}"
                )
        return np.frombuffer(memoryview(words).cast("B"), np.int64)

    def need(self, size: int, what: str) -> None:
        """Raises DeviceError unless so many bytes are there."""
        if size > self.bytes:
            raise DeviceError(f"{self.url} is too small: {self.bytes} bytes, and {what} take {size}: ask for smaller queues, or use a larger BAR")

    def close(self) -> None:
        """Let go, and let another have it. Twice does no harm."""
        for fd in self._descriptors[:1]:
            self._lock(fd, fcntl.F_UNLCK)  # by hand, for a mapping that somebody still holds keeps the file open
        while self._descriptors:
            os.close(self._descriptors.pop())
