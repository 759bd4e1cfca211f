"""What each kind of change does to put a thread back: with CPUs that are gone, numbers that were given again, and parents that have ended."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from waveos.host import changes, kin, restore
from waveos.host.restore import Journal
from waveos.host.sched import attributes
from waveos.host.sched.attributes import RESET_ON_FORK, Attributes
from waveos.process import start_time

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="real-time priorities are given by root alone")
BY = "waveos.host.changes"
NO_CPU = 4_000
ORDINARY = Attributes()
FAMILY = r"""
import ctypes, os, signal, sys
def beget():
    if pid := os.fork():
        return pid
    signal.pause()
for order in sys.stdin:
    if order == "child\n":
        print(beget(), flush=True)
    elif order == "grandchild of nobody\n":
        middle = os.fork()
        if middle == 0:
            print(beget(), flush=True)
            os._exit(0)
        os.waitpid(middle, 0)
    elif order == "name\n":
        ctypes.CDLL(None).prctl(15, b"\xff) \xfe", 0, 0, 0)
        print(0, flush=True)
"""


@pytest.fixture
def journal(tmp_path, monkeypatch) -> Journal:
    monkeypatch.setattr(restore, "RUN", tmp_path)
    return Journal("a")


@pytest.fixture
def parent():
    """A process that does as it is told; (pid, ask) where ask(order) gives the number that it answers."""
    process = subprocess.Popen([sys.executable, "-S", "-c", FAMILY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)

    def ask(order: str) -> int:
        process.stdin.write(order + "\n")
        process.stdin.flush()
        return int(process.stdout.readline())

    yield process.pid, ask
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def now(tid: int) -> tuple[Attributes, list[int]]:
    return attributes.read(tid), attributes.affinity(tid)


def change(tid: int) -> None:
    """As a mechanism does, to a member."""
    attributes.write(tid, Attributes("FIFO", priority=5))
    attributes.set_affinity(tid, [min(os.sched_getaffinity(tid))])


def tick_over() -> None:
    """Who is born from here on is born later than all that was noted, as the kernel counts."""
    before = kin.boot_ticks()
    while kin.boot_ticks() == before:
        time.sleep(0.001)


def test_a_thread_whose_cpus_are_all_gone_gets_its_policy_back_and_all_cpus_that_are_left(journal, parent):
    pid, _ = parent
    usual, cpus = now(pid)
    journal.note("thread", BY, what=pid, start=start_time(pid), at=0, was=usual.facts(), cpus=[NO_CPU])
    change(pid)
    before = journal.path.read_bytes()
    assert journal.undo_all() == []
    assert now(pid) == (usual, cpus)
    change(pid)
    journal.path.write_bytes(before.replace(b'"pid":%d,' % os.getpid(), b'"pid":4194303,'))  # its owner has died
    assert restore.restore()[0] == [f"a: thread {pid} (python): OTHER, CPUs {changes.show_cpus(cpus)} (it may not use {NO_CPU} any more)"]
    assert restore.restore() == ([], [])


def test_a_thread_gets_those_of_its_cpus_that_are_left(journal, parent):
    pid, _ = parent
    usual, cpus = now(pid)
    entry = {"what": pid, "start": start_time(pid), "was": usual.facts(), "cpus": [cpus[0], NO_CPU]}
    change(pid)
    assert changes._undo_thread(entry, False) == f"thread {pid} (python): OTHER, CPUs {cpus[0]} (it may not use {NO_CPU} any more)"
    assert now(pid) == (usual, cpus[:1])


@pytest.mark.parametrize("stuck", ["set_affinity", "write"])
def test_policy_and_affinity_are_put_back_one_although_the_other_cannot_be(journal, parent, monkeypatch, stuck):
    pid, _ = parent
    usual, cpus = now(pid)
    changes.note_thread(journal, pid)
    change(pid)

    def refuse(tid, wish):
        raise OSError(errno.EBUSY, f"no {stuck}")

    with monkeypatch.context() as patch:
        patch.setattr(attributes, stuck, refuse)
        assert journal.undo_all() == [f"thread {pid}: no {stuck}"]
    assert now(pid)[stuck == "write"] == (usual, cpus)[stuck == "write"]
    assert len(journal.entries) == 1, "it is tried again"
    assert journal.close() == []
    assert now(pid) == (usual, cpus)


def test_a_deadline_thread_gets_its_cpus_first_because_the_kernel_wants_them(journal, parent):
    pid, _ = parent
    cpus = attributes.affinity(pid)
    deadline = Attributes("DEADLINE", slice_ns=1_000_000, deadline_ns=100_000_000, period_ns=100_000_000)
    try:
        attributes.write(pid, deadline)
    except OSError as error:
        pytest.skip(f"no deadlines here: {error}")
    was = attributes.read(pid)
    changes.note_thread(journal, pid)
    change(pid)
    assert journal.close() == []
    assert now(pid) == (was, cpus)


def test_an_heir_that_cannot_be_put_back_keeps_no_other_from_it(journal, parent, monkeypatch):
    pid, ask = parent
    usual, cpus = now(pid)
    changes.note_heirs(journal, pid)
    changes.note_thread(journal, pid)
    change(pid)
    born = [ask("child") for _ in range(3)]
    write = attributes.write

    def refuse(tid, wish):
        if tid == born[0]:
            raise OSError(errno.EPERM, "not that one")
        write(tid, wish)

    with monkeypatch.context() as patch:
        patch.setattr(attributes, "write", refuse)
        assert journal.undo_all() == [f"heirs {pid}: not that one"]
    assert [now(tid)[0].policy for tid in born] == ["FIFO", "OTHER", "OTHER"]
    assert [now(tid)[1] for tid in (pid, *born)] == [cpus] * 4
    assert journal.close() == []
    assert [now(tid) for tid in (pid, *born)] == [(usual, cpus)] * 4


@pytest.mark.parametrize(
    ("start", "younger", "session"),
    [(1, False, False), (1, True, False), (1, True, True), (None, True, False), (None, True, True)],
)
def test_a_process_that_was_given_a_dead_ones_number_has_no_heirs(journal, parent, start, younger, session):
    pid, ask = parent
    usual, cpus = now(pid)
    dated = {} if start is None else {"start": start}  # journals of before have none
    at, of = 0 if younger else kin.boot_ticks(), os.getsid(pid) if session else 0
    journal.note("heirs", BY, what=pid, at=at, session=of, was=usual.facts(), cpus=cpus, **dated)
    change(pid)
    child = ask("child")
    assert journal.close() == []
    assert now(pid)[0].policy == now(child)[0].policy == "FIFO"
    assert len(attributes.affinity(child)) == 1


@pytest.mark.parametrize("dated", [False, True])
def test_heirs_are_put_back_by_journals_with_and_without_the_elders_birth(journal, parent, dated):
    pid, ask = parent
    usual, cpus = now(pid)
    tick_over()
    if dated:
        changes.note_heirs(journal, pid)
    else:
        journal.note("heirs", BY, what=pid, at=kin.boot_ticks(), session=0, was=usual.facts(), cpus=cpus)
    change(pid)
    child = ask("child")
    assert journal.close() == []
    assert now(child) == (usual, cpus)


def test_an_elder_whose_first_thread_has_ended_is_known_by_its_birth(journal):
    code = "import ctypes, threading, time; threading.Thread(target=time.sleep, args=(1000,)).start(); ctypes.CDLL(None).syscall(60, 0)"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        deadline = time.monotonic() + 30
        while start_time(process.pid) is not None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        changes.note_heirs(journal, process.pid)
        (entry,) = journal.entries
        assert entry["start"] == kin.birth(process.pid) and 0 < entry["start"] <= entry["at"]
    finally:
        process.kill()
        process.wait()


def test_a_grandchild_whose_parent_has_ended_is_to_be_as_the_elder_was_that_is_named(journal, parent):
    pid, ask = parent
    usual, cpus = now(pid)
    elder = changes.note_thread(journal, pid)
    change(pid)
    grandchild = ask("grandchild of nobody")
    changes.note_thread(journal, grandchild, elder=elder)
    assert journal.close() == []
    assert now(grandchild) == (usual, cpus)


def test_an_elder_that_is_settled_is_as_none(journal, parent):
    pid, ask = parent
    elder = changes.note_thread(journal, pid)
    journal.settle(elder)
    child = ask("child")
    change(child)
    changes.note_thread(journal, child, elder=elder)
    assert [(entry["what"], entry["was"]["policy"]) for entry in journal.entries] == [(child, "FIFO")]


@pytest.mark.parametrize("forked", [True, False])
def test_what_ends_at_fork_ends_at_fork_and_not_at_exec(journal, parent, forked):
    pid, ask = parent
    attributes.write(pid, Attributes("RR", priority=3, flags=RESET_ON_FORK))
    was = attributes.read(pid)
    elder = changes.note_thread(journal, pid)
    tick_over()
    tid = ask("child") if forked else pid
    changes.note_thread(journal, tid, elder=elder)  # exec gives a thread the number and the birth of its process
    attributes.write(tid, Attributes("FIFO", priority=5))
    assert journal.close() == []
    assert attributes.read(tid) == (ORDINARY if forked else was)


def test_a_thread_may_call_itself_by_any_bytes(journal, parent):
    pid, ask = parent
    usual, cpus = now(pid)
    changes.note_heirs(journal, pid)
    ask("name")
    change(pid)
    child = ask("child")
    assert kin.family(child) == (child, pid)
    assert journal.close() == []
    assert now(child) == (usual, cpus)
