"""Service times come from a real RocksDB that was really read. A small one here; how long it takes is not tested."""

from __future__ import annotations

import errno
import os
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from waveos.errors import ConfigError, MissingError
from waveos.host import rocksdb

rocksdict = pytest.importorskip("rocksdict")
SMALL: dict[str, Any] = {"entries": 3_000, "range_entries": 50, "get_samples": 2_000, "range_samples": 60, "budget_s": 2.0}


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders and the cache go."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "tmp").mkdir()
    return tmp_path


def test_both_requests_are_timed_and_the_temporary_database_is_gone(temporary: Path) -> None:
    times = rocksdb.measure(**SMALL)
    assert len(times.get_ns) == 2_000 and len(times.range_ns) == 60
    assert times.get_ns.dtype == times.range_ns.dtype == np.int64
    assert times.get_ns.min() > 0 and times.range_ns.min() > 0
    assert np.median(times.range_ns) > np.median(times.get_ns)
    assert list((temporary / "tmp").iterdir()) == []


def test_facts_are_those_of_the_samples(temporary: Path) -> None:
    times = rocksdb.measure(**SMALL)
    assert times.facts["timing"] == "measured" and times.facts["entries"] == 3_000 and times.facts["range_entries"] == 50
    assert times.facts["rocksdict"] and times.facts["machine"]["cpu"]
    for name, samples in (("GET", times.get_ns), ("RANGE", times.range_ns)):
        of = times.facts["classes"][name]
        assert of["samples"] == len(samples) and of["mean_ns"] == pytest.approx(samples.mean()) and of["p50_ns"] == np.percentile(samples, 50)
    assert times.describe().startswith("GET mean ")


def test_a_range_reads_every_value_and_its_reply_holds_their_bytes(temporary: Path) -> None:
    with rocksdb._database(rocksdict, temporary / "tmp", 300, 1, lambda *_: None) as database:
        values = [database[rocksdb.key_for(number)] for number in range(100, 150)]
        assert len(set(values)) == 50 and all(len(value) == rocksdb.VALUE_BYTES for value in values)
        reply = b",".join(values)
        assert rocksdb.scan(database, rocksdb.key_for(100), 50) == (len(reply), zlib.crc32(reply))
        assert rocksdb.get(database, rocksdb.key_for(100)) == (100, zlib.crc32(values[0]))


def test_progress_is_told_from_nothing_to_all_of_each_stage(temporary: Path) -> None:
    told: dict[str, list[tuple[int, int]]] = {}
    rocksdb.measure(**SMALL, progress=lambda stage, done, total: told.setdefault(stage, []).append((done, total)))
    assert list(told) == ["load", "warm up", "GET", "RANGE"]
    for steps in told.values():
        assert [done for done, _ in steps] == sorted(done for done, _ in steps) and steps[-1][0] == steps[-1][1]


def test_saved_times_come_back_as_they_were(temporary: Path) -> None:
    times = rocksdb.measure(**SMALL)
    times.save(temporary / "times.npz")
    back = rocksdb.ServiceTimes.load(temporary / "times.npz")
    assert np.array_equal(back.get_ns, times.get_ns) and np.array_equal(back.range_ns, times.range_ns) and back.facts == times.facts


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 torn"])
def test_a_file_that_holds_no_times_is_named(temporary: Path, content: bytes) -> None:
    (temporary / "times.npz").write_bytes(content)
    with pytest.raises(ConfigError, match=r"times\.npz holds no service times"):
        rocksdb.ServiceTimes.load(temporary / "times.npz")


def test_the_same_options_are_measured_once_and_others_again(temporary: Path) -> None:
    first = rocksdb.measure_once(**SMALL)
    again = rocksdb.measure_once(**SMALL)
    assert np.array_equal(first.get_ns, again.get_ns)
    assert rocksdb.cache_path(**SMALL) != rocksdb.cache_path(**SMALL | {"seed": 2})
    assert rocksdb.measure_once(**SMALL, refresh=True).facts["entries"] == 3_000


def test_a_broken_cache_is_measured_anew(temporary: Path) -> None:
    rocksdb.cache_path(**SMALL).write_bytes(b"torn")
    assert len(rocksdb.measure_once(**SMALL).range_ns) == 60
    assert len(rocksdb.ServiceTimes.load(rocksdb.cache_path(**SMALL)).range_ns) == 60


def test_without_rocksdict_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rocksdict", None)
    with pytest.raises(MissingError, match=r"pip install 'waveos\[host\]'"):
        rocksdb.measure(**SMALL)


def test_a_range_longer_than_the_database_is_refused() -> None:
    with pytest.raises(ConfigError, match="a range of 11 entries from a database of 10"):
        rocksdb.measure(entries=10, range_entries=11)


def test_a_folder_in_use_is_refused_and_a_named_one_is_left(temporary: Path) -> None:
    rocksdb.measure(temporary / "named", **SMALL)
    assert (temporary / "named" / "database").is_dir()
    with pytest.raises(ConfigError, match="not an empty folder"):
        rocksdb.measure(temporary / "named", **SMALL)


def test_a_disk_without_the_room_is_said_and_nothing_stays(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RocksDB itself meets the limit: an interrupted load must not leave its files behind."""
    import resource
    import signal

    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, before[1]))
    try:
        with pytest.raises(ConfigError, match=f"(?i)database cannot be built.*{os.strerror(errno.EFBIG)}.*TMPDIR"):
            rocksdb.measure(**SMALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list((temporary / "tmp").iterdir()) == []
