"""The journal: the machine is as it was, whoever died when."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from waveos.cli import run
from waveos.errors import ConfigError
from waveos.host import changes, restore
from waveos.host.restore import Journal
from waveos.host.sched import attributes
from waveos.host.sched.attributes import Attributes
from waveos.process import start_time

root = pytest.mark.skipif(os.geteuid() != 0, reason="real-time priorities are given by root alone")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(restore, "RUN", tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def sleeper():
    process = subprocess.Popen(["sleep", "1000"])
    yield process.pid
    process.kill()
    process.wait()


START = """
import os, signal, sys
from pathlib import Path
from waveos.host import changes
from waveos.host.restore import Journal
from waveos.host.sched import attributes
journal = Journal(sys.argv[1], Path(sys.argv[2]))
"""


def dead_owner(folder: Path, name: str, code: str) -> None:
    """A process that makes a journal, runs the code, and dies without a word."""
    code = START + code + "\nos.kill(os.getpid(), signal.SIGKILL)"
    process = subprocess.run([sys.executable, "-P", "-c", code, name, str(folder)], capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr


def test_a_change_is_put_back_and_the_journal_is_gone(folder, tmp_path):
    limit = tmp_path / "limit"
    limit.write_text("100\n")
    journal = Journal("a")
    changes.note_file(journal, limit)
    limit.write_text("5\n")
    assert journal.close() == []
    assert limit.read_text() == "100\n"
    assert not folder.joinpath("a").exists()


def test_nothing_of_an_owner_that_was_killed_stays(folder):
    dead_owner(
        folder,
        "a",
        """
import socket
for name in ("agent", "control"):
    socket.socket(socket.AF_UNIX).bind(str(journal.path.with_name(f"{name}.sock")))
""",
    )
    assert len(list(folder.joinpath("a").iterdir())) == 3
    assert restore.restore() == ([], [])
    assert not folder.joinpath("a").exists()


def test_the_newest_change_is_put_back_first(folder, tmp_path):
    limit = tmp_path / "limit"
    limit.write_text("100")
    journal = Journal("a")
    for value in ("5", "6", "7"):
        changes.note_file(journal, limit)
        limit.write_text(value)
    assert journal.undo_all() == []
    assert limit.read_text() == "100"


def test_a_settled_entry_is_left_alone(folder, tmp_path):
    limit = tmp_path / "limit"
    limit.write_text("100")
    journal = Journal("a")
    number = changes.note_file(journal, limit)
    limit.write_text("5")
    journal.settle(number)
    assert journal.close() == []
    assert limit.read_text() == "5"


def test_one_change_is_put_back_and_the_others_stay(folder, tmp_path):
    limits = [tmp_path / name for name in "abc"]
    journal, numbers = Journal("a"), []
    for limit in limits:
        limit.write_text("100")
        numbers.append(changes.note_file(journal, limit))
        limit.write_text("5")
    assert journal.undo() == []
    assert [limit.read_text() for limit in limits] == ["5", "5", "5"]
    assert journal.undo(numbers[1]) == []
    assert [limit.read_text() for limit in limits] == ["5", "100", "5"]
    assert [entry["n"] for entry in journal.entries] == [numbers[0], numbers[2]]
    assert journal.close() == []
    assert [limit.read_text() for limit in limits] == ["100", "100", "100"]


@root
def test_a_thread_gets_back_policy_priority_nice_value_slice_and_affinity(folder, sleeper):
    os.sched_setaffinity(sleeper, {0})
    attributes.write(sleeper, Attributes("BATCH", nice=3, slice_ns=300_000))
    before = attributes.read(sleeper)
    assert before == Attributes("BATCH", nice=3, slice_ns=300_000)
    journal = Journal("a")
    changes.note_thread(journal, sleeper)
    attributes.write(sleeper, Attributes("FIFO", priority=7, flags=attributes.RESET_ON_FORK))
    os.sched_setaffinity(sleeper, os.sched_getaffinity(0))
    assert attributes.read(sleeper).priority == 7
    journal.close()
    assert attributes.read(sleeper) == before
    assert attributes.affinity(sleeper) == [0]


def test_the_kernels_own_slice_is_nobodys(sleeper):
    assert attributes.read(sleeper).slice_ns == 0


def test_a_thread_that_is_gone_says_so(folder):
    gone = subprocess.Popen(["true"])
    gone.wait()
    with pytest.raises(ProcessLookupError, match="ESRCH"):
        attributes.write(gone.pid, Attributes())
    with pytest.raises(ProcessLookupError):
        changes.note_thread(Journal("a"), gone.pid)


def test_a_combination_the_kernel_refuses_is_named(sleeper):
    with pytest.raises(OSError, match=rf"thread {sleeper} \(.*\), setting FIFO 1000: EINVAL"):
        attributes.write(sleeper, Attributes("FIFO", priority=1000))


@root
def test_a_thread_that_was_given_a_dead_ones_number_is_left_alone(folder, sleeper):
    journal = Journal("a")
    journal.note("thread", "waveos.host.changes", what=sleeper, start=1, was=Attributes("FIFO", priority=3).facts(), cpus=[0])
    assert journal.close() == []
    assert attributes.read(sleeper) == attributes.read(1) or attributes.read(sleeper).policy == "OTHER"
    assert attributes.read(sleeper).priority == 0


FAMILY = r"""
import os, sys, time, threading
def beget():
    if os.fork() == 0:
        os.write(1, b"%d\n" % os.getpid())
        time.sleep(1000)
sys.stdin.readline()
beget()
threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
os.write(1, b"%d\n" % threading.enumerate()[-1].native_id)
time.sleep(1000)
"""


@pytest.fixture
def family():
    """A process that begets a child and a thread when asked; (pid, ask) where ask() gives their numbers."""
    process = subprocess.Popen([sys.executable, "-c", FAMILY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)

    def ask() -> list[int]:
        process.stdin.write("\n")
        process.stdin.flush()
        return [int(process.stdout.readline()) for _ in range(2)]

    yield process.pid, ask
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@root
def test_what_was_born_of_a_changed_thread_is_to_be_as_that_one_was(folder, family):
    pid, ask = family
    attributes.write(pid, Attributes("BATCH", nice=4))
    before, cpus = attributes.read(pid), attributes.affinity(pid)
    journal = Journal("a")
    changes.note_thread(journal, pid)
    attributes.write(pid, Attributes("FIFO", priority=7))
    os.sched_setaffinity(pid, {0})
    born = ask()
    for tid in born:
        changes.note_thread(journal, tid)
    assert [attributes.read(tid).policy for tid in born] == ["FIFO", "FIFO"]
    assert journal.close() == []
    assert [attributes.read(tid) for tid in (pid, *born)] == [before] * 3
    assert [attributes.affinity(tid) for tid in (pid, *born)] == [cpus] * 3


@root
@pytest.mark.parametrize("orphaned", [False, True])
def test_what_was_born_while_nobody_watched_is_put_back_too(folder, family, orphaned):
    pid, ask = family
    before, cpus = attributes.read(pid), attributes.affinity(pid)
    change = f"changes.note_heirs(journal, {pid}, {orphaned}); changes.note_thread(journal, {pid}); attributes.set_affinity({pid}, [0])"
    dead_owner(folder, "k", change + f"; attributes.write({pid}, attributes.Attributes('FIFO', 5))")
    born = ask()
    assert [attributes.affinity(tid) for tid in born] == [[0], [0]]
    if orphaned:
        os.kill(pid, signal.SIGKILL)
        until(lambda: start_time(pid) is None and None in map(start_time, born))  # its thread may end a little after it
        born = born[:1] if start_time(born[1]) is None else born[1:]
        assert start_time(born[0]) is not None
    assert run(["restore"]) == 0
    assert [attributes.affinity(tid) for tid in born] == [cpus] * len(born)
    assert [attributes.read(tid) for tid in born] == [before] * len(born)


@root
def test_what_bound_itself_before_stays_bound(folder, family):
    pid, ask = family
    born = ask()
    os.sched_setaffinity(born[0], {0})
    dead_owner(folder, "k", f"import time; time.sleep(0.05); changes.note_heirs(journal, {pid})")
    assert restore.restore() == ([], [])
    assert attributes.affinity(born[0]) == [0]


def until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@root
def test_after_a_kill_wave_restore_puts_back_everything_and_again_is_harmless(folder, sleeper, capsys):
    before = attributes.read(sleeper)
    dead_owner(folder, "k", f"changes.note_thread(journal, {sleeper}); attributes.write({sleeper}, attributes.Attributes('FIFO', 5))")
    assert attributes.read(sleeper).policy == "FIFO"
    assert run(["restore", "--dry-run"]) == 0
    assert f"k: thread {sleeper} (sleep): OTHER" in capsys.readouterr().out
    assert attributes.read(sleeper).policy == "FIFO", "a dry run changes nothing"
    assert run(["restore", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["failed"] == []
    assert attributes.read(sleeper) == before
    assert run(["restore"]) == 0
    assert "nothing to restore" in capsys.readouterr().err


def test_the_next_owner_puts_back_what_a_dead_one_left(folder, tmp_path):
    limit = tmp_path / "limit"
    limit.write_text("100")
    dead_owner(folder, "k", f"changes.note_file(journal, {str(limit)!r}); Path({str(limit)!r}).write_text('5')")
    journal = Journal("k")
    assert limit.read_text() == "100"
    assert journal.recovered == [f"{limit}: '100'"]
    assert journal.entries == []
    journal.close()


def test_an_entry_on_disk_outlives_its_writer_before_the_change_is_made(folder, tmp_path):
    limit = tmp_path / "limit"
    limit.write_text("100")
    dead_owner(folder, "k", f"changes.note_file(journal, {str(limit)!r})")
    _, entries = restore.read(restore.path_of("k"))
    assert [(entry["kind"], entry["was"]) for entry in entries] == [("file", "100")]
    assert restore.restore() == ([], [])


def test_a_live_owners_enclave_is_refused_and_its_journal_left_alone(folder, tmp_path):
    limit = tmp_path / "limit"
    limit.write_text("100")
    code = f"changes.note_file(journal, {str(limit)!r}); Path({str(limit)!r}).write_text('5'); print('ready', flush=True); input()"
    command = [sys.executable, "-P", "-c", START + code, "live", str(folder)]
    owner = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout.readline() == "ready\n"
        with pytest.raises(ConfigError, match=f"already has an owner, pid {owner.pid}"):
            Journal("live")
        assert restore.restore() == ([], [])
        assert restore.restore(["live"])[1] == [f"live: its owner lives, pid {owner.pid} (python); --force stops it first"]
        assert limit.read_text() == "5"
        done, failed = restore.restore(["live"], force=True)
        assert failed == [] and done == [f"live: stopped pid {owner.pid} (python)", f"live: {limit}: '100'"]
        assert limit.read_text() == "100"
        assert owner.wait(10) == -signal.SIGTERM
    finally:
        owner.kill()
        owner.communicate()


def test_a_line_that_was_cut_off_is_as_if_never_written(folder, tmp_path):
    limit = tmp_path / "limit"
    limit.write_text("100")
    dead_owner(folder, "k", f'changes.note_file(journal, {str(limit)!r}); os.write(journal._file, b\'{{"n":2,"kind":"fi\')')
    limit.write_text("5")
    assert restore.restore(["k"])[1] == []
    assert limit.read_text() == "100"


def test_what_cannot_be_put_back_is_told_and_stays_written_down(folder, tmp_path):
    lost, limit = tmp_path / "lost", tmp_path / "limit"
    limit.write_text("100")
    dead_owner(
        folder,
        "k",
        f"changes.note_file(journal, {str(limit)!r}); journal.note('riddle', 'waveos.host.changes', what='x'); Path({str(limit)!r}).write_text('5')",
    )
    done, failed = restore.restore()
    assert done == [f"k: {limit}: '100'"] and failed == ["k: riddle x: this Wave does not know how to undo it (waveos.host.changes)"]
    with pytest.raises(ConfigError, match="cannot all be put back: riddle x"):
        Journal("k")
    assert not lost.exists()
    assert run(["restore"]) == 1


def test_a_journal_names_no_code_outside_the_hosts_half(folder, tmp_path):
    dead_owner(folder, "k", "journal.note('theft', 'antigravity', what='x')")
    assert "does not know how" in restore.restore()[1][0]
    assert "antigravity" not in sys.modules


def test_a_damaged_journal_and_an_unknown_name_are_one_line_each(folder):
    dead_owner(folder, "k", "os.write(journal._file, b'nonsense\\n')")
    assert "is damaged" in restore.restore()[1][0]
    assert restore.restore(["nobody"])[1] == [f"nobody: there is no journal {folder}/nobody/journal; known: k"]
    with pytest.raises(ConfigError, match="cannot name an enclave"):
        Journal("../etc")


@contextlib.contextmanager
def room(bytes_: int) -> Iterator[None]:
    """Files end there: a write past it is short, and tells no error, as on a file system that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("spare", [0, 10])
def test_a_change_that_finds_no_room_in_the_journal_is_refused_and_the_journal_stays_whole(folder, tmp_path, spare):
    limits = [tmp_path / name for name in "abc"]
    for limit in limits:
        limit.write_text("100")
    journal = Journal("k")
    changes.note_file(journal, limits[0])
    before = journal.path.read_bytes()
    with room(len(before) + spare), pytest.raises(OSError, match=f"{journal.path} cannot be written"):
        changes.note_file(journal, limits[1])
    assert journal.path.read_bytes() == before
    assert journal.find("file", str(limits[1])) is None and len(journal.entries) == 1
    changes.note_file(journal, limits[2])
    assert [entry["what"] for entry in restore.read(journal.path)[1]] == [str(limits[0]), str(limits[2])]
    limits[2].write_text("5")
    assert journal.close() == []
    assert limits[2].read_text() == "100"


def test_what_is_put_back_while_there_is_no_room_is_written_as_settled_with_the_next_line(folder, tmp_path):
    limit = tmp_path / "limit"
    limit.write_text("100")
    journal = Journal("k")
    first, second = changes.note_file(journal, limit), changes.note_file(journal, limit)
    limit.write_text("5")
    with room(journal.path.stat().st_size + 5):
        assert journal.undo(second) == []
    assert limit.read_text() == "100"
    assert [entry["n"] for entry in journal.entries] == [first]
    assert [entry["n"] for entry in restore.read(journal.path)[1]] == [first, second]
    third = changes.note_file(journal, limit)
    assert [entry["n"] for entry in restore.read(journal.path)[1]] == [first, third]
    assert journal.close() == []


def test_a_journal_that_finds_no_room_to_be_written_anew_stays_as_it_was(folder, tmp_path):
    journal = Journal("k")
    for name in "abc":
        changes.note_new_file(journal, tmp_path / name)
    before = journal.path.read_bytes()
    with room(len(before) - 20), pytest.raises(OSError, match="No space left"):
        journal._rewrite()
    assert journal.path.read_bytes() == before
    assert os.listdir(journal.path.parent) == ["journal"]
    changes.note_new_file(journal, tmp_path / "d")
    assert [entry["n"] for entry in restore.read(journal.path)[1]] == [1, 2, 3, 4]


def test_an_owner_that_finds_no_room_says_so_and_leaves_what_a_dead_one_wrote(folder, tmp_path):
    dead_owner(folder, "k", f"changes.note_new_file(journal, {str(tmp_path / 'never-made')!r})")
    before = restore.path_of("k").read_bytes()
    with room(40), pytest.raises(ConfigError, match=r"k cannot be used \(.*journal.new cannot be written: No space left on device\)"):
        Journal("k")
    assert restore.path_of("k").read_bytes() == before
    assert restore.restore() == ([], [])


def test_new_files_and_folders_are_removed(folder, tmp_path):
    journal = Journal("a")
    changes.note_new_folder(journal, tmp_path / "made")
    (tmp_path / "made").mkdir()
    changes.note_new_file(journal, tmp_path / "made" / "pin")
    (tmp_path / "made" / "pin").write_text("")
    changes.note_new_file(journal, tmp_path / "never-made")
    assert journal.close() == []
    assert not (tmp_path / "made").exists()


def test_a_journal_of_an_earlier_boot_is_over(folder, tmp_path):
    limit = tmp_path / "limit"
    limit.write_text("100")
    dead_owner(folder, "k", f"changes.note_file(journal, {str(limit)!r})")
    path = restore.path_of("k")
    path.write_text(path.read_text().replace(restore._boot(), "another"))
    limit.write_text("5")
    assert restore.restore() == ([], [])
    assert limit.read_text() == "5"


@given(steps=st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=30), kept=st.integers(1, 4))
def test_what_is_read_back_is_what_was_noted_and_not_settled(tmp_path_factory, steps, kept):
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(restore, "_SETTLED_KEPT", kept)
        journal, open_ = Journal("p", folder), {}
        for value, settles in steps:
            if settles and open_:
                number = sorted(open_)[value % len(open_)]
                del open_[number]
                journal.settle(number)
            else:
                open_[journal.note("file", "waveos.host.changes", what=f"/nowhere/{value}", was="")] = value
            owner, entries = restore.read(journal.path)
            assert (owner["pid"], owner["start"]) == (os.getpid(), start_time(os.getpid()))
            assert {entry["n"]: entry["what"] for entry in entries} == {number: f"/nowhere/{value}" for number, value in open_.items()}
        assert journal.close() == []


def test_the_journal_and_its_kinds_bring_no_compiler_with_them():
    code = "import sys; import waveos.host.restore, waveos.host.changes; sys.exit(bool({'numba', 'numpy'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-P", "-c", code]).returncode == 0
