"""A wheel built from the checkout is whole: in an empty environment the command works, from another directory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = {"wave": "waveos", **{room: f"waveos/{room}" for room in ("agents", "host", "ipu_emulator", "bench", "scenarios")}}
SUFFIXES = (".py", ".proto", ".c", ".o", ".toml", ".html", ".j2", ".typed")

pytestmark = pytest.mark.slow


def do(*command, cwd):
    """Run a command without what this process has in its environment for Python; returns stdout."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the checkout, so that nothing of an earlier build gets in, and what is generated is generated."""
    checkout = tmp_path_factory.mktemp("checkout") / "wave"
    checkout.mkdir()
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    for room in ROOMS:
        shutil.copytree(ROOT / room, checkout / room, ignore=shutil.ignore_patterns("__pycache__", "*_pb2*"))
    out = tmp_path_factory.mktemp("dist")
    do(sys.executable, "-P", "-m", "build", "--wheel", "--outdir", out, checkout, cwd=out)
    (built,) = out.glob("waveos-*.whl")
    return built


def test_the_wheel_holds_every_module_and_data_file_of_the_checkout(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    for room, package in ROOMS.items():
        for path in (ROOT / room).rglob("*"):
            if path.suffix in SUFFIXES and "__pycache__" not in path.parts:
                assert f"{package}/{path.relative_to(ROOT / room)}" in inside


def test_the_wheel_holds_every_bpf_program_compiled_so_that_a_host_needs_no_compiler(wheel):
    sources = [path.relative_to(ROOT / "host") for path in (ROOT / "host").rglob("*.bpf.c")]
    assert sources
    if not all((ROOT / "host" / source).with_suffix(".o").exists() for source in sources):
        pytest.skip("the BPF programs are not compiled: make bpf (with clang)")
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert {f"waveos/host/{source.with_suffix('.o')}" for source in sources} <= inside


def test_the_wheel_holds_nothing_but_waveos(wheel):
    inside = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in inside if not name.endswith(".dist-info")} == {"waveos"}


def test_installed_into_an_empty_environment_the_command_works_from_another_directory(wheel, tmp_path):
    venv.create(tmp_path / "empty", with_pip=True)
    bin_folder = tmp_path / "empty" / "bin"
    do(bin_folder / "pip", "install", "-q", wheel, cwd=tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert "Usage" in do(bin_folder / "wave", "--help", cwd=elsewhere)
    names = {row["name"] for row in json.loads(do(bin_folder / "wave", "policies", "list", "--json", cwd=elsewhere))}
    assert {"fifo", "shinjuku", "shinjuku_mq"} <= names
    scenarios = do(bin_folder / "python", "-c", "from waveos.scenario import scenario_names; print(*scenario_names())", cwd=elsewhere).split()
    assert set(scenarios) == {path.stem for path in (ROOT / "scenarios").glob("*.toml")}
