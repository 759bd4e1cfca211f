"""A real RocksDB whose memory is to be managed: it holds all its data in its block cache, and one client asks for keys of a hot set that moves.

    python -m waveos.bench.memory_database FOLDER [--gib 2] [--seconds 60] [--scrambled] ...

With --map it finds out first which parts of the keys lie in which batches, by reading one part after the other and looking at referenced bits.
The keys that are hot are `hot_share` of all, side by side in key order (or, scrambled, runs of 64 keys all over), and every `move_s` seconds the next ones
are. It splits its heap into mappings of one batch, as `waveos.host.memory` wants it: the kernel merges neighbours that are alike, so every other one is
marked to be left out of core dumps. It says {"ready": ...} when all is loaded, waits for a line, and then tells each second what it served.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from waveos.host.memory.procfs import Process
from waveos.host.memory.referenced import find_runs

VALUE_BYTES = 1_000
BLOCK_BYTES = 4_096
RUN_KEYS = 64
CHUNK = 2_000
HOT_SHARE, MOVE_S = 0.3, 60.0
PARTS = 50
"""Of the keys, in `map_parts`: a hot set of 30 % is a whole number of them."""
_DONTDUMP = 16
_libc = ctypes.CDLL(None, use_errno=True)


def key_of(number: int) -> bytes:
    return b"%016d" % number


def build(folder: Path, gib: float, seed: int = 1) -> int:
    """Make the database of so many GiB, if it is not there; how many keys it has."""
    from rocksdict import Rdict, SstFileWriter

    keys = int(gib * 2**30 / (VALUE_BYTES + 40)) // RUN_KEYS * RUN_KEYS
    done = folder / "done"
    if done.exists() and done.read_text() == str(keys):
        return keys
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    options = _options(0)
    rng = np.random.default_rng(seed)
    files = []
    per_file = 250_000
    for first in range(0, keys, per_file):
        writer = SstFileWriter(options=options)
        path = folder / f"load-{first}.sst"
        writer.open(str(path))
        half = VALUE_BYTES // 2
        for number in range(first, min(first + per_file, keys)):
            writer[key_of(number)] = rng.bytes(half) + bytes(VALUE_BYTES - half)  # half of it can be compressed
        writer.finish()
        files.append(str(path))
    database = Rdict(str(folder / "db"), options)
    database.ingest_external_file(files)
    database.close()
    for name in files:
        Path(name).unlink(missing_ok=True)
    done.write_text(str(keys))
    return keys


def _options(cache_bytes: int) -> Any:
    from rocksdict import BlockBasedOptions, Cache, DBCompressionType, Options

    options = Options(raw_mode=True)
    options.create_if_missing(True)
    table = BlockBasedOptions()
    table.set_block_size(BLOCK_BYTES)
    if cache_bytes:
        # An LRU cache would walk chains of handles that lie among the blocks, cold ones too; this one has a table of its own.
        table.set_block_cache(Cache.new_hyper_clock_cache(cache_bytes, BLOCK_BYTES))
    options.set_block_based_table_factory(table)
    options.set_compression_type(DBCompressionType.none())  # zram compresses; a block in the cache is as it was written
    return options


class HotKeys:
    """Which keys are hot, and draws of them."""

    def __init__(self, keys: int, hot_share: float, move_s: float, scrambled: bool, seed: int) -> None:
        self.keys, self.move_s, self.hot_share = keys, move_s, hot_share
        self.runs = keys // RUN_KEYS
        self._order = np.random.default_rng(seed).permutation(self.runs) if scrambled else np.arange(self.runs)
        self._rng = np.random.default_rng(seed + 1)

    def hot_runs(self, at_s: float) -> Any:
        """The hot runs of keys at that time."""
        size = int(self.runs * self.hot_share)
        return self._order[(int(at_s // self.move_s) * size + np.arange(size)) % self.runs]

    def draw(self, at_s: float, n: int) -> list[int]:
        """n hot keys."""
        hot = self.hot_runs(at_s)
        return (hot[self._rng.integers(0, len(hot), n)] * RUN_KEYS + self._rng.integers(0, RUN_KEYS, n)).tolist()


def split_heap(batch_bytes: int, least_bytes: int = 64 << 20) -> int:
    """Split every large private anonymous mapping of this process into mappings of one batch; how many there are."""
    made = 0
    text = Path("/proc/self/maps").read_text()
    for found in re.finditer(r"^([0-9a-f]+)-([0-9a-f]+) rw-p 00000000 00:00 0 *(\[heap\])?$", text, re.MULTILINE):
        start, end = int(found[1], 16), int(found[2], 16)
        if end - start < least_bytes:
            continue
        first = -(-start // batch_bytes) * batch_bytes
        for number, address in enumerate(range(first, end - batch_bytes + 1, batch_bytes)):
            if number % 2 == 0 and _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(batch_bytes), _DONTDUMP):
                raise OSError(ctypes.get_errno(), "madvise(MADV_DONTDUMP)")
            made += 1
    return made


def warm(folder: Path) -> None:
    """Have the files in the page cache, on the account of whoever calls this: the database reads each block once, and then never again."""
    for path in (folder / "db").glob("*.sst"):
        with path.open("rb") as file:
            while file.read(1 << 20):
                pass


def map_parts(database: Any, keys: int, batch_bytes: int) -> dict[str, list[list[int]]]:
    """Where each of PARTS equal parts of the keys lies, in key order: numbers of mappings, by address of the run of mappings."""
    process = Process(os.getpid())
    places: dict[str, list[list[int]]] = {}
    for part in range(PARTS):
        process.clear_referenced()
        for number in range(part * keys // PARTS, (part + 1) * keys // PARTS, 3):
            database[key_of(number)]
        found = process.mappings()
        for start, (row, count) in find_runs(found, batch_bytes).items():
            touched = np.flatnonzero(found.referenced[row : row + count] > 64)  # not what holds a few of its tables
            places.setdefault(f"{start:x}", [[] for _ in range(PARTS)])[part] = touched.tolist()
    return places


def rss_kib() -> int:
    """This process's resident memory, KiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4


def serve(options: argparse.Namespace) -> None:
    """Load everything into the cache, then serve for as long as was asked; a JSON line a second."""
    from rocksdict import AccessType, Rdict

    keys = build(options.folder, options.gib)
    tuned = _options(int(options.gib * 1.2 * 2**30))
    families = {"default": tuned}  # else those it was made with count, without this cache
    database = Rdict(str(options.folder / "db"), tuned, column_families=families, access_type=AccessType.read_only())
    for first in range(0, keys, CHUNK):
        for number in range(first, min(first + CHUNK, keys), 3):  # each block once or twice, in key order
            database[key_of(number)]
    hot = HotKeys(keys, options.hot_share, options.move_s, options.scrambled, options.seed)
    batches = split_heap(options.batch_kib << 10)
    places = map_parts(database, keys, options.batch_kib << 10) if options.map else {}
    print(json.dumps({"ready": os.getpid(), "keys": keys, "batches": batches, "rss_kib": rss_kib(), "places": places}), flush=True)
    sys.stdin.readline()
    clock, begin = time.perf_counter_ns, time.perf_counter_ns()
    second, gets, latencies, cpu_s = 0, 0, [], time.process_time()
    while True:
        at_s = (clock() - begin) / 1e9
        names = [key_of(number) for number in hot.draw(at_s, CHUNK)]
        for name in names:
            before = clock()
            database[name]
            latencies.append(clock() - before)
        gets += CHUNK
        now_s = (clock() - begin) / 1e9
        if int(now_s) > second:
            times = np.sort(np.array(latencies))
            told = {"s": now_s, "gets": gets, "rss_kib": rss_kib(), "cpu_s": time.process_time() - cpu_s}
            told |= {f"p{q:g}_us": float(times[int(len(times) * q / 100)]) / 1e3 for q in (50, 99, 99.9)}
            print(json.dumps(told), flush=True)
            second, gets, latencies, cpu_s = int(now_s), 0, [], time.process_time()
            if now_s >= options.seconds:
                return


def main() -> None:
    parser = argparse.ArgumentParser(prog="memory_database")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--hot-share", type=float, default=HOT_SHARE)
    parser.add_argument("--move-s", type=float, default=MOVE_S)
    parser.add_argument("--batch-kib", type=int, default=2_048)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scrambled", action="store_true")
    parser.add_argument("--map", action="store_true")
    serve(parser.parse_args())


if __name__ == "__main__":
    main()
