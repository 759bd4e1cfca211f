"""`wave policies` shows what policies are; `wave new policy` makes a package that works as written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import waveos.policy.find
from waveos.cli import run

REFERENCE = {"edf", "fifo", "fifo_percpu", "round_robin", "shinjuku", "shinjuku_mq"}


def test_the_list_holds_the_reference_policies_with_their_parameters(capsys):
    assert run(["policies", "list", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) >= REFERENCE
    assert rows["shinjuku"]["params"] == {"quantum_us": 30}
    assert all(rows[name]["about"] for name in REFERENCE)


def test_a_plugin_that_cannot_be_loaded_does_not_hide_the_others(monkeypatch, capsys):
    installed = list(waveos.policy.find.entry_points(group="waveos.policies"))
    broken = EntryPoint("broken", "no_such_module:Broken", "waveos.policies")
    monkeypatch.setattr(waveos.policy.find, "entry_points", lambda group: [*installed, broken])
    assert run(["policies", "list"]) == 0
    text = capsys.readouterr().out
    assert "no_such_module" in text
    assert "shinjuku_mq" in text


def test_show_tells_what_a_policy_handles_keeps_and_can_be_told(capsys):
    assert run(["policies", "show", "shinjuku"]) == 0
    text = capsys.readouterr().out
    for words in ("quantum_us=30", "thread_runnable", "cpu_idle", "shinjuku.py", "runq"):
        assert words in text


def test_show_takes_a_file(tmp_path, capsys):
    assert run(["new", "policy", "mine", "--dir", str(tmp_path)]) == 0
    capsys.readouterr()
    assert run(["policies", "show", str(tmp_path / "mine" / "mine.py"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["handles"] == ["thread_runnable", "cpu_idle"]


def test_an_unknown_policy_is_told_with_the_nearest_name(capsys):
    assert run(["policies", "show", "shinjku"]) == 3
    told = capsys.readouterr().err
    assert "did you mean 'shinjuku'?" in told
    assert told.count("\n") == 1


@pytest.mark.parametrize("name", ["Fifo", "my-fifo", "1st", "a__b", "_a", "../up", "", "x" * 51, "class", "queue", "waveos", "fifo", "numpy"])
def test_a_name_that_cannot_be_one_is_refused_and_nothing_is_written(tmp_path, capsys, name):
    assert run(["new", "policy", name, "--dir", str(tmp_path / "here")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "here").exists()


def test_what_is_there_is_never_overwritten(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary").write_text("dear")
    assert run(["new", "policy", "mine", "--dir", str(tmp_path)]) == 2
    assert "is left as it is" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["diary"]


def test_a_disk_that_fails_half_way_leaves_nothing(tmp_path, capsys, monkeypatch):
    written = []

    def fill(path, text, **_):
        if written:
            raise OSError(28, "No space left on device")
        written.append(path)
        return len(text)

    monkeypatch.setattr(Path, "write_text", fill)
    assert run(["new", "policy", "mine", "--dir", str(tmp_path)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_new_policy_passes_its_test_as_written_once_it_is_installed(tmp_path):
    """In an environment of its own, which sees what this one has installed."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    site = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True, check=True)
    Path(site.stdout.strip(), "parent.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    quiet = {"env": os.environ | {"PYTHONWARNINGS": "", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}, "cwd": tmp_path}

    def do(*command):
        done = subprocess.run([python, "-P", *command], capture_output=True, text=True, check=False, **quiet)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    wave = ("-c", "from waveos.cli import main; main()")
    made = do(*wave, "new", "policy", "my_fifo")
    assert made.strip() == "my_fifo"
    do("-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "-e", "my_fifo")
    assert "passed" in do("-m", "pytest", "-q", "my_fifo")
    assert json.loads(do(*wave, "policies", "show", "my_fifo", "--json"))["about"].startswith("First come")


def test_a_new_policys_folder_runs_its_tests_without_an_installation(tmp_path, capsys):
    assert run(["new", "policy", "my_fifo", "--dir", str(tmp_path)]) == 0
    capsys.readouterr()
    environment = os.environ | {"PYTHONWARNINGS": ""}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "--collect-only"],
        cwd=tmp_path / "my_fifo", capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
