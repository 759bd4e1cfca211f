"""Service times of a real RocksDB on this machine: the measured input of the `rocksdb` scenario.

`measure()` loads a database, serves GET and RANGE requests from it one at a time, as one worker of a server does, and times each.
A request is the whole of the worker's part: find the key, read the value(s), build the reply and checksum every byte of it. What
is not in these times: threads, queues, the network; those are the emulator's to model.

The set-up follows the RocksDB harness of the ghOSt authors (specs/wave.md, 4.1): 1,000,000 entries, no compression, memory-mapped
files, everything in memory, RANGE over 5,000 entries whose values are joined by commas. Keys and values have the sizes that
RocksDB's own db_bench takes by default: 16 and 100 bytes.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import io
import json
import os
import platform
import resource
import shutil
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from waveos.errors import ConfigError, MissingError
from waveos.output import write_file
from waveos.paths import cache_dir

ENTRIES = 1_000_000
RANGE_ENTRIES = 5_000
KEY_BYTES = 16
VALUE_BYTES = 100

Progress = Callable[[str, int, int], None]
"""Called as (what is being done, how much of it is done, how much there is)."""

_LAYOUT = 1
"""Of the saved file and of what is measured: raised when either changes, so that old caches are not read."""
_FILE_ENTRIES = 250_000
_GET_BATCH = 200
_AWAY_NS = 100_000
"""Real time beyond the thread's own CPU time that shows that a hypervisor took the CPU; a timer tick is well below."""
_LEAST_GETS = 1_000
_LEAST_RANGES = 50


@dataclass(frozen=True)
class ServiceTimes:
    """What one worker needs for one request, ns each, and how that was found."""

    get_ns: NDArray[np.int64]  # one GET of a random key
    range_ns: NDArray[np.int64]  # one RANGE from a random key
    facts: dict[str, Any]  # entries, sizes, versions, machine, clocks, and mean, p50, p99, p999, max in ns by class

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one .npz: arrays `get`, `range` (ns) and `facts` (JSON). Raises ConfigError if it cannot be written."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, get=self.get_ns, range=self.range_ns, facts=np.array(json.dumps(self.facts)))
        write_file(path, buffer.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ServiceTimes:
        """Read what `save` wrote. Raises ConfigError if the file is not one of those."""
        try:
            with np.load(io.BytesIO(Path(path).read_bytes()), allow_pickle=False) as saved:
                return cls(saved["get"].astype(np.int64), saved["range"].astype(np.int64), json.loads(str(saved["facts"])))
        except (OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise ConfigError(f"{os.fspath(path)} holds no service times ({error}); measure them again, or name another file") from error

    def describe(self) -> str:
        """One line for people."""
        parts = []
        for name in ("GET", "RANGE"):
            of = self.facts["classes"][name]
            parts.append(
                f"{name} mean {of['mean_ns'] / 1e3:.2f} us, p50 {of['p50_ns'] / 1e3:.2f}, p99 {of['p99_ns'] / 1e3:.2f} ({of['samples']:,} samples)"
            )
        return "; ".join(parts)


def measure(
    directory: str | os.PathLike[str] | None = None,
    *,
    entries: int = ENTRIES,
    range_entries: int = RANGE_ENTRIES,
    get_samples: int = 200_000,
    range_samples: int = 2_000,
    budget_s: float = 8.0,
    seed: int = 1,
    progress: Progress | None = None,
) -> ServiceTimes:
    """Load a database of `entries` and measure up to `get_samples` GETs and `range_samples` RANGEs within about `budget_s` of real time.

    The database is built in a temporary folder that is removed afterwards, or in `directory`, which must be empty or absent and is
    left as it is then. Raises MissingError without rocksdict, ConfigError for a range longer than the database, a folder that is in
    use, or a disk without the room (about 130 bytes an entry).
    """
    if not 1 <= range_entries <= entries:
        raise ConfigError(f"a range of {range_entries:,} entries from a database of {entries:,}: a range has between 1 and that many")
    rocksdict = _import_rocksdict()
    report = progress or (lambda stage, done, total: None)
    with _folder(directory) as folder, _database(rocksdict, folder, entries, seed, report) as database:
        scanned = _warm_up(database, entries, range_entries, report)
        random = np.random.default_rng(seed)
        started = time.monotonic()
        gets, disturbed = _time_gets(database, random, entries, get_samples, budget_s * 0.3, report)
        ranges = _time_ranges(database, random, entries, range_entries, range_samples, budget_s - (time.monotonic() - started), report)
    facts: dict[str, Any] = {
        "timing": "measured",
        "store": "RocksDB through rocksdict, raw bytes, one thread",
        "rocksdict": rocksdict_version(),
        "entries": scanned,
        "key_bytes": KEY_BYTES,
        "value_bytes": VALUE_BYTES,
        "range_entries": range_entries,
        "seed": seed,
        "machine": machine(),
        "clocks": {
            "GET": f"monotonic clock, median cost {gets.clock_ns} ns subtracted",
            "RANGE": f"CPU time of the thread, median cost {ranges.clock_ns} ns subtracted",
        },
        "disturbed_share": disturbed,
        "classes": {"GET": _summary(gets.times_ns), "RANGE": _summary(ranges.times_ns)},
    }
    return ServiceTimes(gets.times_ns, ranges.times_ns, facts)


def measure_once(*, refresh: bool = False, progress: Progress | None = None, **options: Any) -> ServiceTimes:
    """The service times of this machine: measured now, or by an earlier call with the same options on the same machine and versions.

    `options` are those of `measure` but `directory`. The result is kept under the cache folder; `refresh` measures anew.
    """
    path = cache_path(**options)
    if not refresh and path.is_file():
        with contextlib.suppress(ConfigError):
            return ServiceTimes.load(path)
    times = measure(progress=progress, **options)
    times.save(path)
    return times


@contextlib.contextmanager
def database(*, entries: int = ENTRIES, seed: int = 1, progress: Progress | None = None) -> Iterator[Path]:
    """The folder of a database of `entries`, closed, for other processes to open; removed at the end. Raises as `measure` does."""
    rocksdict = _import_rocksdict()
    with _folder(None) as folder:
        with _database(rocksdict, folder, entries, seed, progress or (lambda stage, done, total: None)) as written:
            written.flush()
        yield folder / "database"


@contextlib.contextmanager
def open_read_only(folder: str | os.PathLike[str]) -> Iterator[Any]:
    """An existing database, for `get` and `scan`. Raises ConfigError if it cannot be opened, MissingError without rocksdict."""
    rocksdict = _import_rocksdict()
    try:
        opened = rocksdict.Rdict(os.fspath(folder), _options(rocksdict), access_type=rocksdict.AccessType.read_only())
    except Exception as error:  # rocksdict raises plain Exception with RocksDB's status as text
        raise ConfigError(f"no database can be opened in {os.fspath(folder)}: {error}") from error
    try:
        yield opened
    finally:
        opened.close()


def cache_path(**options: Any) -> Path:
    """Where `measure_once` keeps the result of these options on this machine."""
    key = json.dumps([_LAYOUT, machine(), platform.python_version(), rocksdict_version(), sorted(options.items())], sort_keys=True)
    return cache_dir("rocksdb") / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"


def machine() -> dict[str, Any]:
    """What the times depend on: CPU model, number of CPUs, kernel, architecture."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return {"cpu": model, "cpus": os.cpu_count() or 1, "kernel": platform.release(), "architecture": platform.machine()}


def rocksdict_version() -> str:
    """The installed version of rocksdict, or an empty string."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("rocksdict")
    except PackageNotFoundError:
        return ""


def _import_rocksdict() -> Any:
    try:
        import rocksdict
    except ImportError as error:
        raise MissingError(
            "measuring RocksDB needs the package rocksdict, which is not installed; get it with: pip install 'waveos[host]'"
        ) from error
    return rocksdict


@contextlib.contextmanager
def _folder(directory: str | os.PathLike[str] | None) -> Iterator[Path]:
    if directory is not None:
        folder = Path(directory)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{folder} is not an empty folder; name one that is empty or does not exist yet")
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    folder = Path(tempfile.mkdtemp(prefix="waveos-rocksdb-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _options(rocksdict: Any) -> Any:
    """Those of the harness: no compression, memory-mapped reads, a clock cache that holds everything."""
    table = rocksdict.BlockBasedOptions()
    table.set_block_cache(rocksdict.Cache.new_hyper_clock_cache(1 << 30, 4096))
    table.set_bloom_filter(10, False)
    options = rocksdict.Options(raw_mode=True)
    options.set_compression_type(rocksdict.DBCompressionType.none())
    options.set_allow_mmap_reads(True)
    options.set_block_based_table_factory(table)
    return options


def key_for(number: int) -> bytes:
    """Fixed width, so that neighbours in number are neighbours in the database."""
    return b"%0*d" % (KEY_BYTES, number)


@contextlib.contextmanager
def _database(rocksdict: Any, folder: Path, entries: int, seed: int, report: Progress) -> Iterator[Any]:
    """The open database with all entries in it: written as sorted tables and taken in at once, RocksDB's way to load in bulk."""
    random = np.random.default_rng([seed, 1])
    database = None
    try:
        tables = []
        for first in range(0, entries, _FILE_ENTRIES):
            report("load", first, entries)
            count = min(_FILE_ENTRIES, entries - first)
            tables.append(str(folder / f"load-{first}.sst"))
            writer = rocksdict.SstFileWriter(_options(rocksdict))
            writer.open(tables[-1])
            values = random.bytes(count * VALUE_BYTES)
            for number in range(count):
                writer[key_for(first + number)] = values[number * VALUE_BYTES : (number + 1) * VALUE_BYTES]
            writer.finish()
        database = rocksdict.Rdict(str(folder / "database"), _options(rocksdict))
        moving = rocksdict.IngestExternalFileOptions()
        moving.set_move_files(True)
        database.ingest_external_file(tables, moving)
        report("load", entries, entries)
    except Exception as error:  # rocksdict raises plain Exception with RocksDB's status as text
        if database is not None:
            database.close()
        raise ConfigError(
            f"the database cannot be built in {folder}: {error}; free some space there, or set TMPDIR to a folder on another disk"
        ) from error
    try:
        yield database
    finally:
        database.close()


def _warm_up(database: Any, entries: int, range_entries: int, report: Progress) -> int:
    """Read every entry once, so that nothing is measured cold, and try both requests. Returns how many entries there are; raises if any is gone."""
    report("warm up", 0, entries)
    found = sum(1 for value in database.values() if len(value) == VALUE_BYTES)
    if found != entries:
        raise ConfigError(f"the database holds {found:,} entries after {entries:,} were loaded; the disk or the installed rocksdict is broken")
    for number in range(0, entries, max(1, entries // 5_000)):
        get(database, key_for(number))
    for _ in range(10):
        scan(database, key_for(entries - range_entries), range_entries)
    report("warm up", entries, entries)
    return found


def get(database: Any, key: bytes) -> tuple[int, int]:
    """Serve one GET: the reply's length and checksum."""
    reply = database[key]
    return len(reply), zlib.crc32(reply)


def scan(database: Any, key: bytes, count: int) -> tuple[int, int]:
    """Serve one RANGE: read `count` values from `key` on, join them to one reply; the reply's length and checksum."""
    reply = b",".join(islice(database.values(from_key=key), count))
    return len(reply), zlib.crc32(reply)


@dataclass(frozen=True)
class _Samples:
    times_ns: NDArray[np.int64]
    clock_ns: int


def _time_gets(database: Any, random: np.random.Generator, entries: int, samples: int, budget_s: float, report: Progress) -> tuple[_Samples, float]:
    """Samples, and the share of batches that were left out because the kernel or the hypervisor took the CPU away meanwhile.

    Such a batch holds other programs' time, and waiting for a CPU is the emulator's to model. Interrupts and timer ticks stay in.
    If nearly every batch is disturbed, all are kept: then this is what the machine is like.
    """
    clock = time.perf_counter_ns
    clock_ns = _clock_cost(clock)
    kept: list[NDArray[np.int64]] = []
    left_out: list[NDArray[np.int64]] = []
    deadline = time.monotonic() + budget_s
    with _no_collection():
        while len(kept) * _GET_BATCH < samples and (time.monotonic() < deadline or (len(kept) + len(left_out)) * _GET_BATCH < _LEAST_GETS):
            keys = [key_for(number) for number in random.integers(0, entries, _GET_BATCH).tolist()]
            batch = [0] * _GET_BATCH
            switches, away_ns = _switches(), clock() - time.thread_time_ns()
            for index, key in enumerate(keys):
                before = clock()
                get(database, key)
                batch[index] = clock() - before
            away_ns = clock() - time.thread_time_ns() - away_ns
            (kept if _switches() == switches and away_ns < _AWAY_NS else left_out).append(np.array(batch, np.int64))
            if len(kept) % 50 == 0:
                report("GET", len(kept) * _GET_BATCH, samples)
    disturbed = len(left_out) / (len(kept) + len(left_out))
    times = np.concatenate(kept if len(kept) * _GET_BATCH >= _LEAST_GETS else kept + left_out)[:samples]
    report("GET", len(times), len(times))
    return _Samples(np.maximum(times - clock_ns, 1), clock_ns), disturbed


def _time_ranges(
    database: Any, random: np.random.Generator, entries: int, range_entries: int, samples: int, budget_s: float, report: Progress
) -> _Samples:
    """Samples in CPU time of the thread: a RANGE is long enough for that clock, and long enough to be interrupted by other programs."""
    clock = time.thread_time_ns
    clock_ns = _clock_cost(clock)
    expected = range_entries * (VALUE_BYTES + 1) - 1
    times: list[int] = []
    deadline = time.monotonic() + budget_s
    with _no_collection():
        while len(times) < samples and (time.monotonic() < deadline or len(times) < _LEAST_RANGES):
            key = key_for(int(random.integers(0, entries - range_entries + 1)))
            before = clock()
            length, _ = scan(database, key, range_entries)
            times.append(clock() - before)
            if length != expected:
                raise ConfigError(f"a RANGE of {range_entries:,} entries gave {length:,} bytes, not {expected:,}; the installed rocksdict is broken")
            if len(times) % 100 == 0:
                report("RANGE", len(times), samples)
    report("RANGE", len(times), len(times))
    return _Samples(np.maximum(np.array(times, np.int64) - clock_ns, 1), clock_ns)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's cycle collector out: what is timed makes no cycles, so a collection would be somebody else's garbage."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _switches() -> int:
    """How often this thread has left its CPU."""
    usage = resource.getrusage(resource.RUSAGE_THREAD)
    return usage.ru_nivcsw + usage.ru_nvcsw


def _clock_cost(clock: Callable[[], int]) -> int:
    """Median of what two readings in a row differ by, ns."""
    differences = []
    for _ in range(5_000):
        before = clock()
        differences.append(clock() - before)
    return int(np.median(differences))


def _summary(times_ns: NDArray[np.int64]) -> dict[str, Any]:
    p50, p99, p999 = np.percentile(times_ns, [50, 99, 99.9])
    return {
        "samples": len(times_ns),
        "mean_ns": float(times_ns.mean()),
        "p50_ns": float(p50),
        "p99_ns": float(p99),
        "p999_ns": float(p999),
        "max_ns": int(times_ns.max()),
    }
