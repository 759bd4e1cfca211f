"""A sensor for kernels with DAMON for virtual addresses: the kernel samples which parts of a process are accessed, so nothing is asked of the application.

DAMON divides a process's memory into regions that it splits and merges as accesses differ, looks at one page of each every `SAMPLE_US`, and counts over
`AGGREGATE_US`. It is driven through sysfs (Documentation/admin-guide/mm/damon/usage.rst): one kdamond, a target a process, and a scheme a target that does
nothing but tell its regions. Somebody else who uses DAMON is left alone. What is resident and in swap comes from `pagemap`.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from waveos.errors import ConfigError
from waveos.host.memory.procfs import Process
from waveos.host.memory.referenced import Seen
from waveos.host.restore import Entry, Journal, kind

ADMIN = Path("/sys/kernel/mm/damon/admin/kdamonds")
SAMPLE_US, AGGREGATE_US, UPDATE_US = 20_000, 400_000, 2_000_000
MOST_REGIONS = 20_000
LEAST_BATCHES = 8
"""Smaller runs of mappings are left alone."""
PAGE_BYTES = 4_096
_ANYTHING = str(2**64 - 1)
_MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) rw-p 00000000 00:00 0 *(\[heap\]|\[anon[^\n]*)?$", re.MULTILINE)
_PRESENT, _SWAPPED = np.uint64(1 << 63), np.uint64(1 << 62)


class Damon:
    """Looks at processes through one kdamond. The kernel tells at its own times, so a look shows what it told last, and asks anew."""

    name = "DAMON"

    def __init__(self, batch_bytes: int, journal: Journal, admin: Path = ADMIN) -> None:
        """Raises ConfigError, one line, where DAMON is not to be had: it is not in the kernel, it is in use, or it knows no virtual addresses."""
        self.batch_bytes, self._journal, self._admin = batch_bytes, journal, admin
        self._pids: list[int] = []
        self._runs: dict[int, list[tuple[int, int]]] = {}  # (start, batches) by pid
        self._told: dict[int, Any] = {}  # [n, 3] by pid: start, end, whether it was touched since the answer before
        self._heard_s: dict[int, float] = {}
        self._asking: threading.Thread | None = None
        self._number = 0
        count = admin / "nr_kdamonds"
        try:
            if int(count.read_text()):
                raise ConfigError("DAMON is busy: somebody else has set it up")
            self._number = journal.note("damon", __name__, what=os.fspath(admin))
            count.write_text("1")
            (admin / "0/contexts/nr_contexts").write_text("1")
            if "vaddr" not in (admin / "0/contexts/0/avail_operations").read_text().split():
                raise ConfigError("this kernel's DAMON knows no virtual addresses (CONFIG_DAMON_VADDR)")
        except FileNotFoundError:
            self.close()
            raise ConfigError("this kernel has no DAMON (CONFIG_DAMON_SYSFS)") from None
        except OSError as error:
            self.close()
            raise ConfigError(f"DAMON cannot be set up ({error.strerror})") from error
        except ConfigError:
            self.close()
            raise

    def follow(self, processes: Iterable[Process]) -> None:
        """Who is looked at from now on; DAMON begins anew when they are others than before. Raises ConfigError if it cannot begin, as when it is busy."""
        alive = {process.pid: process for process in processes}
        runs = {pid: find_arenas(process, self.batch_bytes) for pid, process in alive.items()}
        if runs == self._runs:
            return
        self._runs, again = runs, sorted(pid for pid in runs if runs[pid]) != self._pids
        if again:
            self._pids = sorted(pid for pid in runs if runs[pid])
            self._begin()

    def _begin(self) -> None:
        """One context with a target and a scheme for each process."""
        self._await_answer()
        kdamond = self._admin / "0"
        self._told.clear()
        self._heard_s.clear()
        with contextlib.suppress(OSError):
            (kdamond / "state").write_text("off")
        if not self._pids:
            return
        context = kdamond / "contexts/0"
        batches = sum(count for runs in self._runs.values() for _, count in runs)
        try:
            _write(
                context,
                {
                    "operations": "vaddr",
                    "monitoring_attrs/intervals/sample_us": SAMPLE_US,
                    "monitoring_attrs/intervals/aggr_us": AGGREGATE_US,
                    "monitoring_attrs/intervals/update_us": UPDATE_US,
                    "monitoring_attrs/nr_regions/max": min(MOST_REGIONS, 8 * batches + 100),
                    "monitoring_attrs/nr_regions/min": min(MOST_REGIONS // 4, 2 * batches + 10),
                    "targets/nr_targets": len(self._pids),
                    "schemes/nr_schemes": len(self._pids),
                },
            )
            for number, pid in enumerate(self._pids):
                (context / f"targets/{number}/pid_target").write_text(str(pid))
                scheme = context / f"schemes/{number}"
                _write(scheme, {"action": "stat", **{f"access_pattern/{name}/max": _ANYTHING for name in ("sz", "nr_accesses", "age")}})
                if len(self._pids) > 1:
                    _write(scheme / "filters", {"nr_filters": 1, "0/type": "target", "0/target_idx": number, "0/matching": "N"})
            (kdamond / "state").write_text("on")
        except OSError as error:
            why = "somebody else uses it (Debian's damon_stat? /sys/module/damon_stat/parameters/enabled)" if error.errno == 16 else error.strerror
            raise ConfigError(f"DAMON cannot begin: {why}") from error

    def look(self, process: Process) -> list[Seen]:
        """Raises ProcessLookupError if it is gone, PermissionError if it may not be looked into."""
        if not process.alive():
            raise ProcessLookupError(process.pid)
        self._ask()
        told = self._told.pop(process.pid, None)
        return [
            Seen(start, *read_pages(process, start, count, self.batch_bytes), touched_of(told, start, count, self.batch_bytes))
            for start, count in self._runs.get(process.pid, [])
        ]

    def _ask(self) -> None:
        """Have the kernel tell its regions; it takes up to AGGREGATE_US, so beside."""
        if self._pids and (self._asking is None or not self._asking.is_alive()):
            self._asking = threading.Thread(target=self._hear, args=(list(self._pids),), daemon=True)
            self._asking.start()

    def _hear(self, pids: list[int]) -> None:
        with contextlib.suppress(OSError, ValueError):
            (self._admin / "0/state").write_text("update_schemes_tried_regions")
            now_s = time.monotonic()
            for number, pid in enumerate(pids):
                rows = []
                for start, end, accesses, age in _read_regions(self._admin / f"0/contexts/0/schemes/{number}/tried_regions"):
                    idle_s = 0.0 if accesses else age * AGGREGATE_US / 1e6
                    rows.append((start, end, idle_s <= now_s - self._heard_s.get(pid, now_s)))
                if rows:
                    self._told[pid] = np.array(rows, np.int64)
                    self._heard_s[pid] = now_s

    def _await_answer(self) -> None:
        if self._asking is not None:
            self._asking.join()
        self._asking = None

    def close(self) -> None:
        """Nobody is looked at any more, and DAMON is as it was. Twice does no harm."""
        self._await_answer()
        number, self._number = self._number, 0
        if number:
            self._journal.undo(number)


def _read_regions(folder: Path) -> Iterator[tuple[int, ...]]:
    """(start, end, accesses, age) of each. By the plainest calls: they are four files a region, and there are thousands of regions."""
    with os.scandir(folder) as entries:
        numbers = [entry.name for entry in entries if entry.is_dir()]
    here = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def read(path: str) -> int:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=here)
        try:
            return int(os.read(file, 32))
        finally:
            os.close(file)

    try:
        for number in numbers:
            yield tuple(read(f"{number}/{name}") for name in ("start", "end", "nr_accesses", "age"))
    finally:
        os.close(here)


def find_arenas(process: Process, batch_bytes: int) -> list[tuple[int, int]]:
    """(start, batches) of each long run of a process's private anonymous writable mappings; [] if it is gone or may not be looked into."""
    try:
        text = (process.folder / "maps").read_text()
    except OSError:
        return []
    runs: list[list[int]] = []
    for found in _MAPPING.finditer(text):
        start, end = int(found[1], 16), int(found[2], 16)
        if runs and runs[-1][1] == start:
            runs[-1][1] = end
        else:
            runs.append([start, end])
    whole = [(-(-start // batch_bytes) * batch_bytes, end) for start, end in runs]
    return [(start, (end - start) // batch_bytes) for start, end in whole if (end - start) // batch_bytes >= LEAST_BATCHES]


def read_pages(process: Process, start: int, count: int, batch_bytes: int) -> tuple[Any, Any]:
    """([count] KiB resident, [count] KiB in swap) by the kernel's map of its pages. Raises ProcessLookupError, PermissionError."""
    pages = batch_bytes // PAGE_BYTES
    try:
        with (process.folder / "pagemap").open("rb") as file:
            file.seek(start // PAGE_BYTES * 8)
            entries = np.frombuffer(file.read(8 * count * pages).ljust(8 * count * pages, b"\0"), np.uint64).reshape(count, pages)
    except FileNotFoundError:
        raise ProcessLookupError(process.pid) from None
    kib = PAGE_BYTES >> 10
    return kib * (entries & _PRESENT > 0).sum(axis=1), kib * (entries & _SWAPPED > 0).sum(axis=1)


def touched_of(told: Any, start: int, count: int, batch_bytes: int) -> Any:
    """[count] bool: batches that lie in some region, of [n, 3] start, end and whether it was touched, that was; None if nothing was told."""
    if told is None:
        return None
    touched = np.zeros(count, bool)
    for begin, end, is_touched in told.tolist():
        if is_touched and end > start:
            touched[max(0, begin - start) // batch_bytes : max(0, -(-(end - start) // batch_bytes))] = True
    return touched


def _write(folder: Path, values: dict[str, Any]) -> None:
    for name, value in values.items():
        (folder / name).write_text(str(value))


@kind("damon")
def _undo(entry: Entry, dry_run: bool) -> str | None:
    admin = Path(entry["what"])
    with contextlib.suppress(FileNotFoundError):
        if int((admin / "nr_kdamonds").read_text()) == 0:
            return None
        if not dry_run:
            if (admin / "0/state").read_text().strip() == "on":
                (admin / "0/state").write_text("off")
            (admin / "nr_kdamonds").write_text("0")
        return f"{admin}: nobody is looked at any more"
    return None
