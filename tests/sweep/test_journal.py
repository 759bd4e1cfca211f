"""The journal outlives the process that writes it, and belongs to one at a time."""

import errno
import json
import os
import subprocess
import sys

import pytest

from waveos.errors import ConfigError
from waveos.journal import Journal

HEADER = {"sweep": "a"}


def same(theirs):
    return "" if theirs == HEADER else "is another's"


def test_what_was_added_is_there_when_it_is_opened_again(tmp_path):
    path = tmp_path / "j"
    with Journal(path, HEADER, same) as journal:
        journal.add(3, {"rows": [1]})
        journal.add(1, {"rows": []})
    with Journal(path, HEADER, same) as journal:
        assert {number: entry["rows"] for number, entry in journal.entries.items()} == {3: [1], 1: []}


@pytest.mark.parametrize("cut", range(1, 30))
def test_half_a_line_is_dropped_and_the_next_one_is_whole(tmp_path, cut):
    path = tmp_path / "j"
    with Journal(path, HEADER, same) as journal:
        journal.add(0, {"rows": ["kept"]})
        journal.add(1, {"rows": ["a line that is cut off in the middle"]})
    path.write_bytes(path.read_bytes()[:-cut])
    with Journal(path, HEADER, same) as journal:
        assert set(journal.entries) == {0}
        journal.add(2, {"rows": ["new"]})
    with Journal(path, HEADER, same) as journal:
        assert set(journal.entries) == {0, 2}


def test_what_was_being_written_when_ctrl_c_came_counts_and_what_the_disk_did_not_take_does_not(tmp_path, monkeypatch):
    def busy(error):
        def fsync(fd):
            raise error

        return fsync

    with Journal(tmp_path / "j", HEADER, same) as journal:
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(os, "fsync", busy(KeyboardInterrupt()))
            journal.add(0, {"rows": ["a"]})
        with monkeypatch.context() as patched, pytest.raises(ConfigError, match="the 1 that were finished before"):
            patched.setattr(os, "fsync", busy(OSError(errno.ENOSPC, "no space")))
            journal.add(1, {"rows": ["b"]})
        assert set(journal.entries) == {0}
    with Journal(tmp_path / "j", HEADER, same) as journal:
        assert set(journal.entries) == {0}


def test_a_header_that_is_cut_off_begins_anew(tmp_path):
    path = tmp_path / "j"
    path.write_bytes(b'{"swe')
    with Journal(path, HEADER, same) as journal:
        assert journal.entries == {}
    assert json.loads(path.read_text()) == HEADER


def test_another_runs_journal_is_refused_and_left_as_it_is(tmp_path):
    path = tmp_path / "j"
    Journal(path, {"sweep": "b"}, lambda theirs: "").__exit__(None, None, None)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="is another's"):
        Journal(path, HEADER, same)
    assert path.read_bytes() == before


def test_a_file_that_is_no_journal_is_refused_and_left_as_it_is(tmp_path):
    path = tmp_path / "j"
    path.write_text("something\nelse\n")
    with pytest.raises(ConfigError, match="is no journal of a sweep"):
        Journal(path, HEADER, same)
    assert path.read_text() == "something\nelse\n"


def test_two_processes_do_not_write_one_journal(tmp_path):
    path = tmp_path / "j"
    script = f"""
import sys
from pathlib import Path
from waveos.journal import Journal
with Journal(Path({str(path)!r}), {HEADER}, lambda theirs: ""):
    print("mine", flush=True)
    sys.stdin.read()
"""
    other = subprocess.Popen([sys.executable, "-P", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "mine\n"
    with pytest.raises(ConfigError, match="is being written by another process"):
        Journal(path, HEADER, same)
    other.communicate("")
    with Journal(path, HEADER, same) as journal:
        assert journal.entries == {}


def test_a_disk_that_is_full_is_one_line_and_keeps_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "j"
    with Journal(path, HEADER, same) as journal:
        journal.add(0, {"rows": []})

        def full(handle):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(ConfigError, match=r"no space left on device.*the 1 that were finished before are kept there"):
                journal.add(1, {"rows": []})
    with Journal(path, HEADER, same) as journal:
        assert set(journal.entries) == {0}


def test_a_folder_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot write .*make the folder first"):
        Journal(tmp_path / "no" / "j", HEADER, same)
