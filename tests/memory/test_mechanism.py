"""The memory mechanism over a made-up /proc and cgroup: what it tells, what it enforces, what it leaves behind."""

from __future__ import annotations

import os

import numpy as np
import pytest

from waveos.errors import ConfigError
from waveos.host.memory.advise import PAGEOUT, WILLNEED
from waveos.host.memory.cgroup import MemoryCgroup
from waveos.host.memory.mechanism import MemoryMechanism
from waveos.host.memory.procfs import parse
from waveos.host.memory.referenced import find_runs
from waveos.host.restore import Journal, read, restore
from waveos.memory import DECISION, MESSAGE, OUTCOME, SUBSYSTEM, Decision, Message
from waveos.outcome import Outcome

BATCH = 2 << 20
MS = 1_000_000
UNLIMITED = "9223372036854771712"
PID = 321


class Host:
    """A /proc with one process, a cgroup, and the mechanism over both. Batches are `pages[k]`: KiB resident, referenced and in swap."""

    def __init__(self, folder, batches=130):
        self.proc, self.group, self.run = folder / "proc", folder / "cgroup", folder / "run"
        self.batches = np.zeros((batches, 3), int)
        self.batches[:, 0] = 2048
        self.start = 0x7F0000000000
        self.advised, self.said, self.now_ns = [], [], 10**9
        self.write("meminfo", "MemTotal: 1 kB\nSwapFree:        4194304 kB\n")
        self.write("pressure/memory", "some avg10=0.00 avg60=0.00 avg300=0.00 total=1000\nfull avg10=0.00 total=5\n")
        self.begin(PID)
        self.group.mkdir()
        self.cgroup("memory.limit_in_bytes", UNLIMITED + "\n")
        self.cgroup("memory.usage_in_bytes", "300000000\n")
        self.cgroup("cgroup.procs", f"{PID}\n")
        self.journal = Journal("test", self.run)
        self.mechanism = self.new_mechanism()

    def new_mechanism(self, **more):
        return MemoryMechanism(
            MemoryCgroup(self.group, self.journal),
            pass_ms=100,
            root=self.proc,
            advisor=lambda pid: self,
            say=self.said.append,
            clock_ns=lambda: self.now_ns,
            **more,
        )

    # What stands in for the kernel's calls.
    def advise(self, advice, ranges):
        self.advised.append((advice, ranges))
        return sum(size for _, size in ranges)

    def close(self):
        pass

    def write(self, name, text):
        path = self.proc / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def cgroup(self, name, text=None):
        path = self.group / name
        if text is not None:
            path.write_text(text)
        return path.read_text()

    def begin(self, pid, started=77):
        self.write(f"{pid}/stat", f"{pid} (data base) S " + " ".join(["0"] * 18) + f" {started} 0\n")
        self.write(f"{pid}/clear_refs", "")
        self.draw(pid)

    def draw(self, pid=PID):
        def mapping(start, size, rss, referenced, swap, rights="rw-p", name=""):
            return (
                f"{start:x}-{start + size:x} {rights} 00000000 00:00 0 {name}\nSize: {size >> 10} kB\nRss: {rss} kB\n"
                f"Referenced: {referenced} kB\nAnonymous: {rss} kB\nSwap: {swap} kB\nSwapPss: 0 kB\nVmFlags: rd wr\n"
            )

        text = mapping(0x400000, 8192, 8, 8, 0, "r-xp", "/usr/bin/database") + mapping(0x600000, BATCH, 4, 4, 0, name="[heap]")
        text += "".join(mapping(self.start + k * BATCH, BATCH, *row) for k, row in enumerate(self.batches.tolist()))
        text += mapping(0x7FFF00000000, 1 << 20, 12, 12, 0, name="[stack]")
        self.write(f"{pid}/smaps", text)

    # What the tests say.
    def touch(self, *batches, back=False):
        """These were accessed; with `back`, from swap."""
        self.batches[:, 1] = 0
        for batch in batches:
            self.batches[batch, 1] = 4
            if back:
                self.batches[batch] = [4, 4, self.batches[batch, 2] - 4]
        self.draw()

    def swap_out(self, *batches):
        for batch in batches:
            self.batches[batch] = [0, 0, 2048]
        self.draw()

    def pass_by(self):
        self.now_ns += 100 * MS
        self.mechanism.tick()
        return self.mechanism.take_messages()

    def order(self, kind, *, first=0, batches=1, quota=1 << 40, region=0, seq=10**6):
        made = np.zeros(1, DECISION)
        made["type"], made["subsystem"], made["region"], made["first"] = kind, SUBSYSTEM, region, first
        made["batches"], made["bytes"], made["seq"], made["txn"] = batches, quota, seq, 5
        self.mechanism.apply(made)
        told = self.mechanism.take_messages().view(OUTCOME)
        assert told["txn"].tolist() == [5]
        return Outcome(int(told["outcome"][0]))


@pytest.fixture
def host(tmp_path):
    made = Host(tmp_path)
    yield made
    made.mechanism.close()
    made.journal.close()


def of(messages, kind):
    return messages[messages["type"] == kind]


def test_a_run_of_mappings_of_one_batch_each_is_a_region_and_nothing_else_is(host):
    told = of(host.pass_by(), Message.REGION_MAPPED)
    assert told["count"].tolist() == [130]
    assert told["bytes"].tolist() == [BATCH]
    runs = find_runs(parse((host.proc / f"{PID}/smaps").read_bytes()), BATCH)
    assert list(runs) == [host.start]


def test_access_bits_are_told_of_what_was_asked_about_and_what_was_touched_before_is_not_forgotten(host):
    host.touch(3, 65)
    host.pass_by()
    host.touch()
    host.pass_by()
    assert host.order(Decision.SCAN, batches=0b11000) == Outcome.COMMITTED
    assert host.order(Decision.SCAN, first=64, batches=0b110) == Outcome.COMMITTED
    told = of(host.pass_by(), Message.ACCESSED)
    assert told["first"].tolist() == [0, 64]
    assert told["batches"].tolist() == [0b11000, 0b110]
    assert told["touched"].tolist() == [0b01000, 0b010]
    host.order(Decision.SCAN, batches=0b11000)
    assert of(host.pass_by(), Message.ACCESSED)["touched"].tolist() == [0]
    assert (host.proc / f"{PID}/clear_refs").read_text() == "1"


def test_a_cold_batch_is_paged_out_and_its_return_is_told(host):
    host.pass_by()
    assert host.order(Decision.RECLAIM, first=64, batches=0b101) == Outcome.COMMITTED
    assert host.advised == [(PAGEOUT, [(host.start + 64 * BATCH, BATCH), (host.start + 66 * BATCH, BATCH)])]
    host.swap_out(64, 66)
    assert len(of(host.pass_by(), Message.REFAULTED)) == 0
    host.touch(66, back=True)
    told = of(host.pass_by(), Message.REFAULTED)
    assert told["first"].tolist() == [64]
    assert told["batches"].tolist() == [0b100]
    assert len(of(host.pass_by(), Message.REFAULTED)) == 0


class Counted:
    """A stand-in for the kernel's count of faults."""

    def __init__(self):
        self.came, self.watched = np.zeros(130, int), []

    def watch(self, region, tgid, start, batches, batch_bytes):
        self.watched.append((region, tgid, start, batches, batch_bytes))
        return True

    def forget(self, region):
        self.watched = [each for each in self.watched if each[0] != region]

    def take(self, region):
        came, self.came = self.came, np.zeros(130, int)
        return came

    def close(self):
        self.watched = []


def test_a_fault_in_a_reclaimed_batch_is_told_before_the_next_pass_and_others_are_not(tmp_path):
    host, counted = Host(tmp_path), Counted()
    host.mechanism = host.new_mechanism(faults=counted)
    host.pass_by()
    host.mechanism.pass_ns = 10**12
    assert counted.watched == [(0, PID, host.start, 130, BATCH)]
    host.order(Decision.RECLAIM, first=64, batches=0b1)
    counted.came[[3, 64]] = 7
    host.now_ns += 300 * MS
    told = of(host.pass_by(), Message.REFAULTED)
    assert told["first"].tolist() == [64]
    assert told["batches"].tolist() == [0b1]
    assert told["count"].tolist() == [7]
    host.mechanism.close()
    assert counted.watched == []
    host.journal.close()


def test_a_decision_made_before_one_of_its_batches_came_back_is_stale_and_nothing_of_it_is_done(host):
    seq = int(of(host.pass_by(), Message.REGION_MAPPED)["seq"][0])
    host.order(Decision.RECLAIM, batches=0b1)
    host.swap_out(0)
    host.pass_by()
    host.touch(0, back=True)
    newest = int(of(host.pass_by(), Message.REFAULTED)["seq"][0])
    host.advised.clear()
    assert host.order(Decision.RECLAIM, batches=0b11, seq=seq) == Outcome.STALE
    assert host.advised == []
    assert host.order(Decision.RECLAIM, batches=0b10, seq=seq) == Outcome.COMMITTED
    assert host.order(Decision.RECLAIM, batches=0b01, seq=newest) == Outcome.COMMITTED


def test_bring_back_asks_for_the_pages_ahead(host):
    host.pass_by()
    assert host.order(Decision.BRING_BACK, batches=0b1) == Outcome.COMMITTED
    assert host.advised == [(WILLNEED, [(host.start, BATCH)])]


def test_no_more_than_the_quota_is_moved(host):
    host.pass_by()
    host.order(Decision.RECLAIM, batches=0b1111, quota=2 * BATCH + 5)
    assert len(host.advised[0][1]) == 2


@pytest.mark.parametrize(
    "wrong",
    [{"quota": 0}, {"quota": -1}, {"first": 1}, {"first": -64}, {"first": 1 << 20}, {"first": 128, "batches": 0b100}, {"kind": 99}],
)
def test_a_decision_that_makes_no_sense_is_invalid_and_nothing_is_done(host, wrong):
    host.pass_by()
    assert host.order(wrong.pop("kind", Decision.RECLAIM), **wrong) == Outcome.INVALID
    assert host.advised == []


def test_a_quota_of_zero_is_said_once(host):
    host.pass_by()
    for _ in range(3):
        host.order(Decision.RECLAIM, quota=0)
    assert [line for line in host.said if "quota of zero" in line] == host.said


def test_a_region_of_another_number_is_gone(host):
    host.pass_by()
    assert host.order(Decision.RECLAIM, region=7) == Outcome.TARGET_GONE


def test_without_room_in_swap_nothing_is_reclaimed_and_a_line_says_so(host):
    host.pass_by()
    host.write("meminfo", "SwapFree: 0 kB\n")
    assert host.order(Decision.RECLAIM) == Outcome.CONGESTED
    assert host.order(Decision.RECLAIM) == Outcome.CONGESTED
    assert host.advised == []
    assert len(host.said) == 1
    assert "no room in swap" in host.said[0]


def test_a_region_whose_mappings_change_is_unmapped_and_told_anew_with_another_number(host):
    host.pass_by()
    host.batches = host.batches[:80]
    host.draw()
    told = host.pass_by()
    assert told["type"].tolist()[:2] == [Message.REGION_UNMAPPED, Message.REGION_MAPPED]
    assert told["region"].tolist()[:2] == [0, 1]
    assert host.order(Decision.RECLAIM, region=0) == Outcome.TARGET_GONE
    assert host.order(Decision.RECLAIM, region=1) == Outcome.COMMITTED


def test_a_process_that_exits_takes_its_regions_with_it(host):
    host.pass_by()
    host.cgroup("cgroup.procs", "")
    told = host.pass_by()
    assert of(told, Message.REGION_UNMAPPED)["region"].tolist() == [0]
    assert host.order(Decision.RECLAIM) == Outcome.TARGET_GONE


def test_a_process_that_vanishes_between_two_looks_is_no_error(host):
    host.pass_by()
    (host.proc / f"{PID}/smaps").unlink()
    (host.proc / f"{PID}/stat").unlink()
    assert of(host.pass_by(), Message.REGION_UNMAPPED)["region"].tolist() == [0]
    assert host.said == []


def test_another_process_that_got_the_number_is_not_advised(host):
    host.pass_by()
    host.begin(PID, started=99)
    assert host.order(Decision.RECLAIM) == Outcome.TARGET_GONE
    assert host.advised == []


def test_pressure_is_told_as_what_has_been_added(host):
    host.pass_by()
    host.write("pressure/memory", "some avg10=0.00 avg60=0.00 avg300=0.00 total=7000\n")
    host.now_ns += 2_000 * MS
    told = of(host.pass_by(), Message.PRESSURE)
    assert told["stall_us"].tolist() == [6000]
    assert told["bytes"].tolist() == [300_000_000]


def test_a_kernel_without_pressure_is_said_and_the_rest_works(tmp_path):
    host = Host(tmp_path)
    (host.proc / "pressure" / "memory").unlink()
    mechanism = host.new_mechanism()
    assert any("PSI is off" in line for line in host.said)
    mechanism.tick()
    assert len(of(mechanism.take_messages(), Message.REGION_MAPPED)) == 1
    host.journal.close()


def test_a_new_agent_hears_the_whole_state_and_the_budget(tmp_path):
    host = Host(tmp_path)
    host.mechanism = host.new_mechanism(quota_mib_per_s=100, stall_share=0.03)
    host.pass_by()
    host.mechanism.introduce()
    told = host.mechanism.take_messages()
    assert told["type"].tolist() == [Message.RESYNC, Message.REGION_MAPPED, Message.BUDGET_CHANGED]
    assert told["bytes"].tolist()[2] == 100 << 20
    assert told["stall_us"].tolist()[2] == 30_000
    host.journal.close()


# Limits


def test_a_limit_is_written_down_before_it_is_set_and_goes_with_the_agent(host):
    host.pass_by()
    assert host.order(Decision.LIMIT, region=-1, quota=200 << 20) == Outcome.COMMITTED
    assert host.cgroup("memory.limit_in_bytes") == str(200 << 20)
    [entry] = host.journal.entries
    assert entry["what"] == str(host.group / "memory.limit_in_bytes")
    assert entry["was"].strip() == UNLIMITED
    host.mechanism.agent_gone()
    assert host.cgroup("memory.limit_in_bytes").strip() == UNLIMITED
    assert host.journal.entries == []


def test_a_limit_that_a_killed_daemon_left_is_put_back_by_restore(host):
    host.pass_by()
    host.order(Decision.LIMIT, region=-1, quota=200 << 20)
    path = host.run / "test" / "journal"
    owner, entries = read(path)
    assert len(entries) == 1
    path.write_text(path.read_text().replace(f'"pid":{os.getpid()}', '"pid":4194303'))  # as if its owner were dead
    done, failed = restore(["test"], folder=host.run)
    assert failed == []
    assert len(done) == 1
    assert host.cgroup("memory.limit_in_bytes").strip() == UNLIMITED
    assert owner["name"] == "test"


def test_a_limit_of_zero_is_none(host):
    host.pass_by()
    host.order(Decision.LIMIT, region=-1, quota=200 << 20)
    host.order(Decision.LIMIT, region=-1, quota=0)
    assert host.cgroup("memory.limit_in_bytes").strip() == UNLIMITED


def test_the_operators_limit_is_never_exceeded(tmp_path):
    host = Host(tmp_path)
    host.cgroup("memory.limit_in_bytes", f"{250 << 20}\n")
    host.mechanism = host.new_mechanism()
    host.pass_by()
    assert host.order(Decision.LIMIT, region=-1, quota=1 << 30) == Outcome.COMMITTED
    assert int(host.cgroup("memory.limit_in_bytes")) == 250 << 20
    assert any("above the operator's own, 250 MiB" in line for line in host.said)
    host.journal.close()


def test_a_limit_for_which_there_is_no_swap_is_not_set(host):
    host.pass_by()
    host.write("meminfo", "SwapFree: 131072 kB\n")
    assert host.order(Decision.LIMIT, region=-1, quota=64 << 20) == Outcome.CONGESTED
    assert host.cgroup("memory.limit_in_bytes").strip() == UNLIMITED
    assert any("does not fit into swap" in line for line in host.said)


def test_a_cgroup_that_cannot_be_written_is_said_and_the_rest_goes_on(host, monkeypatch):
    host.pass_by()

    def refuse(limit_bytes):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(host.mechanism.cgroup, "set_limit", refuse)
    assert host.order(Decision.LIMIT, region=-1, quota=200 << 20) == Outcome.CONGESTED
    assert any("the limit cannot be set (Read-only file system)" in line for line in host.said)
    assert host.order(Decision.RECLAIM) == Outcome.COMMITTED


def test_a_folder_that_is_no_memory_cgroup_is_refused(tmp_path):
    host = Host(tmp_path)
    with pytest.raises(ConfigError, match="is no cgroup of the memory controller"):
        MemoryCgroup(tmp_path, host.journal)
    host.journal.close()


def test_a_cgroup_of_version_2_is_limited_by_memory_high(tmp_path):
    host = Host(tmp_path)
    for name in ("memory.limit_in_bytes", "memory.usage_in_bytes"):
        (host.group / name).unlink()
    host.cgroup("memory.high", "max\n")
    host.cgroup("memory.current", "300000000\n")
    host.mechanism = host.new_mechanism()
    host.pass_by()
    assert host.order(Decision.LIMIT, region=-1, quota=200 << 20) == Outcome.COMMITTED
    assert host.cgroup("memory.high") == str(200 << 20)
    host.mechanism.close()
    assert host.cgroup("memory.high") == "max\n"
    host.journal.close()


def test_the_host_side_needs_no_numba():
    import subprocess
    import sys

    code = "import sys, waveos.host.memory.mechanism, waveos.host.memory.advise, waveos.host.memory.zram; assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


def test_messages_are_of_the_contract(host):
    told = host.pass_by()
    assert told.dtype == MESSAGE
    assert set(told["subsystem"].tolist()) == {SUBSYSTEM}


# What the operator does meanwhile


def test_a_limit_that_the_operator_sets_meanwhile_counts_and_is_not_put_back(host):
    host.pass_by()
    host.order(Decision.LIMIT, region=-1, quota=200 << 20)
    host.cgroup("memory.limit_in_bytes", f"{220 << 20}\n")
    host.order(Decision.LIMIT, region=-1, quota=300 << 20)
    assert int(host.cgroup("memory.limit_in_bytes")) == 220 << 20
    host.order(Decision.LIMIT, region=-1, quota=210 << 20)
    assert int(host.cgroup("memory.limit_in_bytes")) == 210 << 20
    host.cgroup("memory.limit_in_bytes", f"{400 << 20}\n")
    host.mechanism.agent_gone()
    assert int(host.cgroup("memory.limit_in_bytes")) == 400 << 20
    assert host.journal.entries == []


def test_a_process_that_runs_another_program_is_another_region(host):
    host.pass_by()
    host.start += 1 << 30  # exec: the same process, other mappings
    host.draw()
    told = host.pass_by()
    assert told["type"].tolist()[:2] == [Message.REGION_UNMAPPED, Message.REGION_MAPPED]
    assert host.order(Decision.RECLAIM, region=0) == Outcome.TARGET_GONE
    assert host.order(Decision.RECLAIM, region=1) == Outcome.COMMITTED


def test_version_2_is_brought_down_by_reclaim_before_the_limit_is_set(tmp_path):
    host = Host(tmp_path)
    for name in ("memory.limit_in_bytes", "memory.usage_in_bytes"):
        (host.group / name).unlink()
    host.cgroup("memory.high", "max\n")
    host.cgroup("memory.current", f"{300 << 20}\n")
    host.cgroup("memory.reclaim", "")
    host.mechanism = host.new_mechanism()
    host.pass_by()
    assert host.order(Decision.LIMIT, region=-1, quota=200 << 20) == Outcome.COMMITTED
    assert host.cgroup("memory.reclaim") == str(100 << 20)
    assert host.cgroup("memory.high") == str(200 << 20)
    host.mechanism.close()
    host.journal.close()


def test_nothing_is_brought_back_that_does_not_fit_under_the_limit(host):
    host.pass_by()
    host.cgroup("memory.usage_in_bytes", f"{190 << 20}\n")
    host.order(Decision.LIMIT, region=-1, quota=200 << 20)
    assert host.order(Decision.BRING_BACK, batches=0b1) == Outcome.CONGESTED
    assert host.advised == []
    assert any("does not fit under the cgroup's limit" in line for line in host.said)
    host.cgroup("memory.usage_in_bytes", f"{100 << 20}\n")
    assert host.order(Decision.BRING_BACK, batches=0b1) == Outcome.COMMITTED


def test_a_limit_that_the_kernel_refuses_is_not_set_by_a_second_write(host, monkeypatch):
    host.pass_by()
    writes = []

    def refuse(file, data):
        writes.append(data)
        host.cgroup("memory.limit_in_bytes", UNLIMITED + "\n")  # a file of the kernel's is not emptied when it is opened
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(os, "write", refuse)
    monkeypatch.setattr(host.journal, "_append", lambda line: None)  # it writes by os.write, too
    assert host.order(Decision.LIMIT, region=-1, quota=200 << 20) == Outcome.CONGESTED
    monkeypatch.undo()
    assert writes == [str(200 << 20).encode()]
    assert host.mechanism.cgroup.given >= 1 << 62
