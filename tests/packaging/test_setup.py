"""`make setup` does its work when something changed, and nothing when nothing did."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STUB = """#!/bin/sh
echo "$*" >>{log}
"""


@pytest.fixture
def checkout(tmp_path):
    """A small checkout whose .venv has a Python that only writes down what it is told."""
    (tmp_path / ".ci").mkdir()
    for name in (".ci/setup", "Makefile", "setup.cfg", "setup.py", "pyproject.toml", "system-packages.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".ci" / "packages").write_text(STUB.format(log=tmp_path / "packages"))
    (tmp_path / ".ci" / "packages").chmod(0o755)
    for room in ("wave", "agents", "host", "ipu_emulator", "bench", "scenarios"):
        (tmp_path / room).mkdir()
    (tmp_path / "wave" / "errors.py").write_text("")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / "build" / "__editable__.waveos-0").mkdir(parents=True)
    for name in ("python", "wave"):
        (tmp_path / ".venv" / "bin" / name).write_text(STUB.format(log=tmp_path / "log"))
        (tmp_path / ".venv" / "bin" / name).chmod(0o755)
    (tmp_path / ".venv" / "bin" / "pip").write_text(f"#!{tmp_path}/.venv/bin/python\n")
    return tmp_path


def installs(checkout):
    """Run setup; returns what it told pip to install Wave with, one line each."""
    (checkout / "log").write_text("")
    done = subprocess.run([checkout / ".ci" / "setup"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    lines = [line for line in (checkout / "log").read_text().splitlines() if " -e ." in line]
    assert bool(lines) == bool(done.stderr)
    return lines


def test_it_installs_once_strictly_editable_with_all_extras_and_then_keeps_quiet(checkout):
    (line,) = installs(checkout)
    assert "editable_mode=strict" in line
    assert line.endswith("-e .[dev,bench,host,serving,sweep]")
    assert installs(checkout) == []


@pytest.mark.parametrize("path", ["wave/new.py", "agents/sched/new.py", "ipu_emulator/data/links/new.toml", "scenarios/new.toml"])
def test_a_new_packaged_file_makes_it_install_again(checkout, path):
    installs(checkout)
    (checkout / path).parent.mkdir(parents=True, exist_ok=True)
    (checkout / path).write_text("")
    assert len(installs(checkout)) == 1
    (checkout / path).unlink()
    assert len(installs(checkout)) == 1


def test_what_is_live_is_optional_when_its_system_packages_cannot_be_had_the_rest_is_installed(checkout):
    (checkout / ".ci" / "packages").write_text('#!/bin/sh\necho "missing: $*" >&2\nexit 1\n')
    done = subprocess.run([checkout / ".ci" / "setup"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "missing: live guest" in done.stderr
    assert " -e ." in (checkout / "log").read_text()


def test_an_object_of_a_bpf_program_that_setup_makes_is_installed_too(checkout):
    (checkout / "Makefile").write_text(
        "bpf:\n\t@grep -q -e ' -e ' log && touch host/probe.bpf.o || true  # the records' header wants an installed Wave\n"
    )
    (checkout / ".ci" / "setup").write_text((checkout / ".ci" / "setup").read_text().replace("command -v clang-19 clang", "command -v sh"))
    assert [line.split(" -e ")[1] for line in installs(checkout)] == [".[dev,bench,host,serving,sweep]", "."]
    assert installs(checkout) == []


def test_an_edit_inside_a_file_does_not(checkout):
    installs(checkout)
    (checkout / "wave" / "errors.py").write_text("edited = True\n")
    assert installs(checkout) == []


@pytest.mark.parametrize("name", ["setup.cfg", "setup.py", "pyproject.toml", "system-packages.txt"])
def test_a_changed_declaration_makes_it_install_again(checkout, name):
    installs(checkout)
    (checkout / name).write_text((checkout / name).read_text() + "\n# changed\n")
    assert len(installs(checkout)) == 1


def test_a_lost_build_folder_makes_it_install_again(checkout):
    installs(checkout)
    shutil.rmtree(checkout / "build")
    assert len(installs(checkout)) == 1


def test_a_failed_install_is_told_and_tried_again_next_time(checkout):
    python = checkout / ".venv" / "bin" / "python"
    python.write_text(f'{STUB.format(log=checkout / "log")}case "$*" in *" -e ."*) echo "no such index"; exit 1;; esac\n')
    for _ in range(2):
        done = subprocess.run([checkout / ".ci" / "setup"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "no such index" in done.stderr
        assert done.stderr.splitlines()[-1].startswith("setup: failed: ")


def test_system_packages_are_one_a_line_with_a_reason():
    lines = [line for line in (ROOT / "system-packages.txt").read_text().splitlines() if line and line[0] not in "#["]
    assert lines
    for line in lines:
        package, reason = line.split("#", 1)
        assert package.split() == [package.strip()]
        assert reason.strip()
