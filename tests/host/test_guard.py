"""The guard: what a killed process's journal says is put back at once; one that ended well needs none."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from waveos.process import start_time

CHANGER = """
import sys
from pathlib import Path
from waveos.host import changes
from waveos.host.guard import guarded
from waveos.host.restore import Journal
with guarded("changer") as guard:
    journal = Journal("changer")
    changes.note_new_folder(journal, sys.argv[1])
    Path(sys.argv[1]).mkdir()
    print(guard, flush=True)
    sys.stdin.read()
    journal.close()
"""


@pytest.fixture
def changer(tmp_path):
    """(process that has made a folder, the folder, its guard's pid)."""
    folder = tmp_path / "made"
    environment = {**os.environ, "WAVE_RUN": str(tmp_path / "run")}
    command = [sys.executable, "-P", "-c", CHANGER, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    with process:
        yield process, folder, int(process.stdout.readline())
        process.kill()


def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_what_a_process_that_is_killed_had_changed_is_put_back_without_anybody_asking(changer, how):
    process, folder, guard = changer
    assert folder.is_dir()
    process.send_signal(how)
    until(lambda: start_time(guard) is None)
    assert not folder.exists()
    assert not (folder.parent / "run" / "changer").exists()


def test_a_process_that_ends_well_takes_its_guard_along(changer):
    process, folder, guard = changer
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert not folder.exists()
    assert start_time(guard) is None
