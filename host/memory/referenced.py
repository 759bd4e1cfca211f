"""A sensor for any kernel: `clear_refs`, and the referenced bytes of each mapping in `smaps`.

The kernel clears the bits of a whole process at once and has one count a mapping, so a server that wants to be managed splits its arena into mappings of
one batch each; a run of such mappings is what is seen.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy.typing as npt

from waveos.host.memory.procfs import Mappings, Process


class Seen(NamedTuple):
    """A run of batches of a process, from the address `start` on; an element a batch, sizes in KiB."""

    start: int
    rss: npt.NDArray[Any]
    swap: npt.NDArray[Any]
    touched: npt.NDArray[Any] | None
    """Since the last look, bool; None: it cannot be told yet."""


class Referenced:
    """Looks at processes one after the other; clears what it has seen."""

    name = "referenced bits by mapping"

    def __init__(self, batch_bytes: int) -> None:
        self.batch_bytes = batch_bytes

    def follow(self, processes: Iterable[Process]) -> None:
        """Who is looked at from now on."""

    def look(self, process: Process) -> list[Seen]:
        """Raises ProcessLookupError if it is gone, PermissionError if it may not be looked into."""
        found = process.mappings()
        process.clear_referenced()
        rows = {start: slice(row, row + count) for start, (row, count) in find_runs(found, self.batch_bytes).items()}
        return [Seen(start, found.rss[each], found.swap[each], found.referenced[each] > 0) for start, each in rows.items()]

    def close(self) -> None:
        """Twice does no harm."""


def find_runs(mappings: Mappings, batch_bytes: int) -> dict[int, tuple[int, int]]:
    """Runs of two or more adjacent mappings of exactly one batch: (first row, mappings) by address."""
    fits = mappings.end - mappings.start == batch_bytes
    runs: dict[int, tuple[int, int]] = {}
    row = 0
    while row < len(fits):
        end = row
        while end < len(fits) and fits[end] and (end == row or mappings.start[end] == mappings.end[end - 1]):
            end += 1
        if end - row > 1:
            runs[int(mappings.start[row])] = (row, end - row)
        row = max(end, row + 1)
    return runs
