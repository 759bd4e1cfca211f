"""DAMON as a sensor, over a made-up sysfs and /proc: how it is set up, what it says was accessed, and what is left when it ends."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from waveos.errors import ConfigError
from waveos.host.memory.damon import AGGREGATE_US, Damon, find_arenas, read_pages, touched_of
from waveos.host.memory.procfs import Process
from waveos.host.restore import Journal, restore

BATCH = 2 << 20
START = 0x7F0000000000
PID, OTHER = 321, 322


class Kernel:
    """A /sys with a DAMON that makes its folders when the numbers are written, and a /proc with processes."""

    def __init__(self, folder):
        self.admin, self.proc = folder / "kdamonds", folder / "proc"
        self.make("nr_kdamonds", "0\n")
        for name in ("state", "contexts/nr_contexts", "contexts/0/operations"):
            self.make(f"0/{name}", "off\n")
        self.make("0/contexts/0/avail_operations", "vaddr\nfvaddr\npaddr\n")
        for name in ("intervals/sample_us", "intervals/aggr_us", "intervals/update_us", "nr_regions/min", "nr_regions/max"):
            self.make(f"0/contexts/0/monitoring_attrs/{name}", "0")
        self.make("0/contexts/0/targets/nr_targets", "0")
        self.make("0/contexts/0/schemes/nr_schemes", "0")
        for number in range(2):
            self.make(f"0/contexts/0/targets/{number}/pid_target", "0")
            for name in ("action", "access_pattern/sz/max", "access_pattern/nr_accesses/max", "access_pattern/age/max", "filters/nr_filters"):
                self.make(f"0/contexts/0/schemes/{number}/{name}", "0")
            for name in ("type", "target_idx", "matching"):
                self.make(f"0/contexts/0/schemes/{number}/filters/0/{name}", "0")
            (self.admin / f"0/contexts/0/schemes/{number}/tried_regions").mkdir()
        self.begin(PID)

    def make(self, name, text):
        path = self.admin / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def read(self, name):
        return (self.admin / name).read_text().strip()

    def begin(self, pid, batches=64):
        folder = self.proc / str(pid)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "stat").write_text(f"{pid} (data base) S " + " ".join(["0"] * 18) + " 77 0\n")
        half = START + batches // 2 * BATCH
        maps = f"00400000-00500000 r-xp 00000000 08:01 7 /usr/bin/database\n{START - 4096:x}-{half:x} rw-p 00000000 00:00 0 \n"
        maps += f"{half:x}-{START + batches * BATCH + 8192:x} rw-p 00000000 00:00 0 [anon:arena]\n7ff000000000-7ff000100000 rw-p 00000000 00:00 0 [stack]\n"
        (folder / "maps").write_text(maps)

    def tell(self, *regions, number=0):
        """(first batch, batches, nr_accesses, age) of each region."""
        place = self.admin / f"0/contexts/0/schemes/{number}/tried_regions"
        for row, (first, count, accesses, age) in enumerate(regions):
            values = {"start": START + first * BATCH, "end": START + (first + count) * BATCH, "nr_accesses": accesses, "age": age}
            for name, value in values.items():
                self.make(place.relative_to(self.admin) / str(row) / name, f"{value}\n")


@pytest.fixture
def kernel(tmp_path):
    return Kernel(tmp_path)


@pytest.fixture
def journal(tmp_path):
    made = Journal("test", tmp_path / "run")
    yield made
    made.close()


def pagemap(kernel, pid, resident, swapped):
    entries = np.zeros((64, 512), np.uint64)
    entries[list(resident)] = 1 << 63
    entries[list(swapped)] = 1 << 62
    path = kernel.proc / str(pid) / "pagemap"
    with path.open("wb") as file:
        file.seek(START // 4096 * 8)  # sparse
        file.write(entries.tobytes())


def look(damon, process):
    """A look for which the kernel has told."""
    damon.look(process)
    damon._await_answer()
    [seen] = damon.look(process)
    damon._await_answer()
    return seen


def test_a_process_is_looked_at_with_regions_as_small_as_its_batches(kernel, journal):
    damon = Damon(BATCH, journal, kernel.admin)
    damon.follow([Process(PID, kernel.proc)])
    context = "0/contexts/0"
    assert (kernel.read("nr_kdamonds"), kernel.read("0/state"), kernel.read(f"{context}/operations")) == ("1", "on", "vaddr")
    assert kernel.read(f"{context}/targets/0/pid_target") == str(PID)
    assert int(kernel.read(f"{context}/monitoring_attrs/nr_regions/min")) >= 64
    assert kernel.read(f"{context}/schemes/0/action") == "stat"
    assert kernel.read(f"{context}/schemes/0/filters/nr_filters") == "0"
    damon.close()
    assert (kernel.read("nr_kdamonds"), kernel.read("0/state")) == ("0", "off")
    assert journal.entries == []


def test_each_of_two_processes_has_a_scheme_that_tells_of_it_alone(kernel, journal):
    kernel.begin(OTHER)
    damon = Damon(BATCH, journal, kernel.admin)
    damon.follow([Process(pid, kernel.proc) for pid in (PID, OTHER)])
    for number, pid in enumerate((PID, OTHER)):
        assert kernel.read(f"0/contexts/0/targets/{number}/pid_target") == str(pid)
        filters = [kernel.read(f"0/contexts/0/schemes/{number}/filters/0/{name}") for name in ("type", "target_idx", "matching")]
        assert filters == ["target", str(number), "N"]
    damon.follow([Process(OTHER, kernel.proc)])
    assert kernel.read("0/contexts/0/targets/0/pid_target") == str(OTHER)
    damon.close()


def test_what_the_kernel_has_not_told_yet_is_not_known_and_then_it_is(kernel, journal):
    process = Process(PID, kernel.proc)
    pagemap(kernel, PID, resident=range(32), swapped=range(32, 40))
    damon = Damon(BATCH, journal, kernel.admin)
    damon.follow([process])
    [first] = damon.look(process)
    assert first.touched is None
    damon._await_answer()
    kernel.tell((0, 32, 3, 0), (32, 32, 0, 10**6))
    seen = look(damon, process)
    assert seen.start == START
    assert seen.touched.tolist() == [True] * 32 + [False] * 32
    assert seen.rss.tolist() == [2048] * 32 + [0] * 32
    assert seen.swap.tolist() == [0] * 32 + [2048] * 8 + [0] * 24
    damon.close()


def test_a_region_that_was_accessed_since_the_answer_before_counts_as_touched_though_it_is_not_just_now(kernel, journal):
    process = Process(PID, kernel.proc)
    pagemap(kernel, PID, resident=range(64), swapped=())
    damon = Damon(BATCH, journal, kernel.admin)
    damon.follow([process])
    kernel.tell((0, 64, 0, 10**6))
    look(damon, process)
    damon._heard_s[PID] -= 10 * AGGREGATE_US / 1e6  # the answer before was ten counts ago
    kernel.tell((0, 10, 0, 3), (10, 54, 0, 10**6))
    assert look(damon, process).touched.tolist() == [True] * 10 + [False] * 54
    damon.close()


def test_small_mappings_code_and_the_stack_are_left_alone(kernel):
    process = Process(PID, kernel.proc)
    assert find_arenas(process, BATCH) == [(START, 64)]
    assert find_arenas(process, 16 << 20) == [(START, 8)]
    assert find_arenas(process, 32 << 20) == []


def test_a_process_that_is_gone_is_no_error(kernel, journal):
    process = Process(PID, kernel.proc)
    damon = Damon(BATCH, journal, kernel.admin)
    damon.follow([process])
    for path in (kernel.proc / str(PID)).iterdir():
        path.unlink()
    assert find_arenas(process, BATCH) == []
    with pytest.raises(ProcessLookupError):
        damon.look(process)
    with pytest.raises(ProcessLookupError):
        read_pages(process, START, 1, BATCH)
    damon.follow([])
    assert kernel.read("0/state") == "off"
    damon.close()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda kernel: kernel.make("nr_kdamonds", "1\n"), "DAMON is busy"),
        (lambda kernel: (kernel.admin / "nr_kdamonds").unlink(), "this kernel has no DAMON"),
        (lambda kernel: kernel.make("0/contexts/0/avail_operations", "paddr\n"), "knows no virtual addresses"),
    ],
)
def test_where_it_is_not_to_be_had_a_line_says_why_and_nothing_is_left(kernel, journal, change, says):
    change(kernel)
    before = [int(path.read_text()) for path in kernel.admin.glob("nr_kdamonds")]
    with pytest.raises(ConfigError, match=says):
        Damon(BATCH, journal, kernel.admin)
    assert journal.entries == []
    assert before == [int(path.read_text()) for path in kernel.admin.glob("nr_kdamonds")]


def test_damon_that_another_starts_meanwhile_is_said_to_be_busy(kernel, journal, monkeypatch):
    damon = Damon(BATCH, journal, kernel.admin)
    write = Path.write_text

    def refuse(path, text, *more):
        if path.name == "state" and text == "on":
            raise OSError(16, "Device or resource busy")
        return write(path, text, *more)

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(ConfigError, match="DAMON cannot begin: somebody else uses it"):
        damon.follow([Process(PID, kernel.proc)])
    damon.close()


def test_what_a_killed_hostd_left_of_it_is_put_back_by_restore(kernel, tmp_path):
    journal = Journal("dead", tmp_path / "run")
    Damon(BATCH, journal, kernel.admin).follow([Process(PID, kernel.proc)])
    path = tmp_path / "run" / "dead" / "journal"
    path.write_text(path.read_text().replace(f'"pid":{os.getpid()}', '"pid":4194303'))  # as if its owner were dead
    done, failed = restore(["dead"], folder=tmp_path / "run")
    assert (len(done), failed) == (1, [])
    assert (kernel.read("nr_kdamonds"), kernel.read("0/state")) == ("0", "off")


def test_regions_that_lie_across_batches_touch_all_of_them():
    told = np.array([[START + BATCH // 2, START + BATCH + 1, 1], [START + 5 * BATCH, START + 6 * BATCH, 0], [0, START, 1]], np.int64)
    assert touched_of(told, START, 8, BATCH).tolist() == [True, True] + [False] * 6
