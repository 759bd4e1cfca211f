"""What /proc tells of a process's memory: its mappings, how much of each is resident, in swap, and was referenced since the bits were last cleared.

`root` is /proc, or a tree made for tests.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

ROOT = Path("/proc")
_MAPPING = re.compile(
    rb"^([0-9a-f]+)-([0-9a-f]+) rw-p 00000000 00:00 0 *(\[heap\]|\[anon[^\n]*)?\n"
    rb".*?^Rss: +(\d+) kB\n.*?^Referenced: +(\d+) kB\n.*?^Swap: +(\d+) kB\n",
    re.MULTILINE | re.DOTALL,
)


class Mappings(NamedTuple):
    """A process's private anonymous writable mappings, in address order; sizes in KiB."""

    start: npt.NDArray[np.int64]
    end: npt.NDArray[np.int64]
    rss: npt.NDArray[np.int64]
    referenced: npt.NDArray[np.int64]
    swap: npt.NDArray[np.int64]


class Process:
    """One process, by its pid and when it started: another one that gets the number later is none of ours."""

    def __init__(self, pid: int, root: Path = ROOT) -> None:
        self.pid, self.folder = pid, root / str(pid)
        self.started = self._start_time()

    def alive(self) -> bool:
        """True while it is the process it was."""
        return self.started is not None and self._start_time() == self.started

    def mappings(self) -> Mappings:
        """Raises ProcessLookupError if it is gone, PermissionError if it may not be looked into."""
        try:
            text = (self.folder / "smaps").read_bytes()
        except FileNotFoundError:
            raise ProcessLookupError(self.pid) from None
        return parse(text)

    def clear_referenced(self) -> None:
        """Clear the referenced bits of all its pages. Raises as `mappings`."""
        try:
            (self.folder / "clear_refs").write_text("1")
        except FileNotFoundError:
            raise ProcessLookupError(self.pid) from None

    def _start_time(self) -> int | None:
        try:
            fields = (self.folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else int(fields[19])


def parse(smaps: bytes) -> Mappings:
    """The text of smaps as arrays."""
    rows: list[tuple[int, ...]] = []
    for found in _MAPPING.finditer(smaps):
        start, end, _, rss, referenced, swap = found.groups()
        rows.append((int(start, 16), int(end, 16), int(rss), int(referenced), int(swap)))
    columns: Any = np.array(rows, np.int64).reshape(-1, 5).T
    return Mappings(*columns)


def swap_free_kib(root: Path = ROOT) -> int:
    """Room in swap, KiB; 0 where there is none."""
    found = re.search(r"^SwapFree: +(\d+) kB", (root / "meminfo").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


def stall_us(root: Path = ROOT) -> int | None:
    """How long some task of this machine has stalled on memory so far, microseconds; None where the kernel does not tell (PSI is off)."""
    try:
        found = re.search(r"^some .*total=(\d+)", (root / "pressure" / "memory").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None
