"""The service of the live benchmark serves every request once, by the workers it was meant for, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from waveos.errors import WaveError
from waveos.host import rocksdb
from waveos.host.service import Load, Service, draw_load

pytest.importorskip("rocksdict")
ENTRIES, WORKERS = 6_000, 3
CORE = min(os.sched_getaffinity(0))


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with rocksdb.database(entries=ENTRIES) as built:
        yield built


@pytest.fixture
def service(folder: Path) -> Iterator[Service]:
    with Service(folder, workers=WORKERS, core=CORE, capacity=5_000) as made:
        yield made


def wait_for(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def switches(pid: int) -> int:
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[2])


def test_every_request_is_served_once_after_it_was_sent(service: Service) -> None:
    load = draw_load(2_000, 300_000_000, 0.05, ENTRIES, rocksdb.RANGE_ENTRIES, seed=1)
    served = service.serve(load, patience_s=30)
    assert len(served.done_ns) == len(load.keys) and served.is_range.sum() == (load.keys < 0).sum() > 0
    assert np.all(served.sent_ns >= served.intended_ns) and np.all(served.done_ns > served.sent_ns)
    assert np.array_equal(np.diff(served.intended_ns), np.diff(load.at_ns))


def test_a_second_load_is_not_mistaken_for_the_first(service: Service) -> None:
    first = service.serve(draw_load(1_000, 200_000_000, 0, ENTRIES, rocksdb.RANGE_ENTRIES, seed=1), patience_s=30)
    second = service.serve(draw_load(1_000, 100_000_000, 0, ENTRIES, rocksdb.RANGE_ENTRIES, seed=2), patience_s=30)
    assert second.intended_ns.min() > first.done_ns.max() and np.all(second.done_ns > second.sent_ns)


def test_more_requests_than_workers_wait_with_the_client(service: Service) -> None:
    n = 40 * WORKERS
    served = service.serve(Load(np.zeros(n, np.int64), np.full(n, -1)), patience_s=60)
    with_workers = [int(((served.sent_ns <= at) & (served.done_ns > at)).sum()) for at in served.sent_ns]
    assert np.all(served.done_ns) and max(with_workers) <= WORKERS


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may be real-time")
def test_the_client_is_real_time_while_it_sends_and_an_ordinary_process_before_and_after(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    checked = service._check
    monkeypatch.setattr(service, "_await", lambda *_: seen.append(os.sched_getscheduler(0)))
    monkeypatch.setattr(service, "_check", lambda: (seen.append(os.sched_getscheduler(0)), checked()))
    load = draw_load(1_000, 50_000_000, 0, ENTRIES, rocksdb.RANGE_ENTRIES, seed=3)
    assert np.all(service.serve(load, patience_s=30, heard=lambda: seen.append(os.sched_getscheduler(0))).done_ns)
    assert seen[:3] == [os.SCHED_OTHER, os.SCHED_FIFO, os.SCHED_FIFO]  # before; after a slice of sending, twice
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_each_class_is_served_by_its_own_group(service: Service) -> None:
    before = [switches(pid) for pid in service.pids]
    load = Load(np.arange(200) * 200_000, np.arange(200))
    assert np.all(service.serve(load, np.array([[1, 1], [2, 1]]), patience_s=30).done_ns)
    moved = [switches(pid) - old for pid, old in zip(service.pids, before, strict=True)]
    assert moved[1] >= 100 and moved[0] == moved[2] == 0


def test_the_workers_are_where_they_were_told_to_be(service: Service) -> None:
    assert [os.sched_getaffinity(pid) for pid in service.pids] == [{CORE}] * WORKERS


def test_nothing_is_left_when_the_service_is_closed(folder: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with Service(folder, workers=2, core=CORE, capacity=10) as service:
        pids = service.pids
        assert all(map(alive, pids))
    assert wait_for(lambda: not any(map(alive, pids)))
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_workers_go_with_a_supervisor_that_is_killed(folder: Path) -> None:
    with Service(folder, workers=2, core=CORE, capacity=10) as service:
        pids = service.pids
        os.kill(service.supervisor, signal.SIGKILL)
        assert wait_for(lambda: not any(map(alive, pids)))
        with pytest.raises(WaveError, match="workers have ended"):
            service.serve(draw_load(1_000, 10_000_000, 0, ENTRIES, rocksdb.RANGE_ENTRIES, seed=1))


def test_a_worker_that_dies_is_an_error_of_one_line(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Service(folder, workers=2, core=CORE, capacity=10_000) as service:
        os.kill(service.pids[1], signal.SIGKILL)
        with pytest.raises(WaveError, match="workers have ended"):
            service.serve(draw_load(1_000, 5_000_000_000, 0, ENTRIES, rocksdb.RANGE_ENTRIES, seed=1))
    assert "ended by itself" in capfd.readouterr().err


def test_a_folder_without_a_database_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WaveError, match="workers have ended"):
        Service(tmp_path, workers=1, core=CORE, capacity=10)


def test_a_load_that_does_not_fit_is_refused(service: Service) -> None:
    with pytest.raises(WaveError, match="5,001 requests on a board for 5,000"):
        service.serve(Load(np.zeros(5_001, np.int64), np.zeros(5_001, np.int64)))


def test_equal_seeds_draw_equal_loads() -> None:
    loads = [draw_load(50_000, 1_000_000_000, 0.005, ENTRIES, rocksdb.RANGE_ENTRIES, seed) for seed in (1, 1, 2)]
    assert np.array_equal(loads[0].at_ns, loads[1].at_ns) and np.array_equal(loads[0].keys, loads[1].keys)
    assert not np.array_equal(loads[0].at_ns[:100], loads[2].at_ns[:100])
    assert len(loads[0].at_ns) == pytest.approx(50_000, rel=0.02)
    assert (loads[0].keys < 0).mean() == pytest.approx(0.005, rel=0.3)
    assert np.all(np.diff(loads[0].at_ns) >= 0) and loads[0].keys.max() <= ENTRIES - rocksdb.RANGE_ENTRIES
