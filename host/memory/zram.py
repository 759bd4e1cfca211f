"""Swap in compressed memory, for as long as an experiment takes: what is made is in the journal first, so that a killed one leaves no swap behind."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path
from typing import Self

from waveos.errors import MissingError
from waveos.host.restore import Entry, Journal, kind

_libc = ctypes.CDLL(None, use_errno=True)
_PREFER, _PRIORITY = 0x8000, 100


class Zram:
    """A zram device as swap of so many bytes; a context manager. What was in it comes back to memory when it ends."""

    def __init__(self, journal: Journal, size_bytes: int, algorithm: str = "lz4") -> None:
        """Raises MissingError where no device is free, or the kernel refuses."""
        self._journal = journal
        free = [path for path in sorted(Path("/sys/block").glob("zram*")) if (path / "initstate").read_text().strip() == "0"]
        if not free:
            raise MissingError("no free zram device (/sys/block/zram*): the kernel needs CONFIG_ZRAM, or the one there is is in use")
        self.folder, self.device = free[0], Path("/dev") / free[0].name
        if not self.device.exists():
            raise MissingError(f"{self.device} is not there although the kernel has it: make the device node")
        self._number = journal.note("zram swap", __name__, what=str(self.device))
        try:
            (self.folder / "comp_algorithm").write_text(algorithm)
            (self.folder / "disksize").write_text(str(size_bytes))
            subprocess.run(["mkswap", str(self.device)], check=True, capture_output=True)
            if _libc.swapon(os.fsencode(self.device), _PREFER | _PRIORITY):
                raise OSError(ctypes.get_errno(), "swapon")
        except (OSError, subprocess.SubprocessError) as error:
            self.close()
            raise MissingError(f"{self.device} cannot be made swap: {error}") from error

    def used_bytes(self) -> int:
        """Memory that it takes itself."""
        return int((self.folder / "mm_stat").read_text().split()[2])

    def close(self) -> None:
        """No swap any more. Twice does no harm."""
        number, self._number = self._number, 0
        if number:
            self._journal.undo(number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@kind("zram swap")
def _undo(entry: Entry, dry_run: bool) -> str | None:
    device = Path(entry["what"])
    folder = Path("/sys/block") / device.name
    swapping = str(device) in Path("/proc/swaps").read_text()
    if not swapping and (folder / "initstate").read_text().strip() == "0":
        return None
    if not dry_run:
        if swapping and _libc.swapoff(os.fsencode(device)):
            raise OSError(ctypes.get_errno(), "swapoff")
        (folder / "reset").write_text("1")
    return f"{device}: swapped off and emptied"
