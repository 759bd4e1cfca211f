"""Guests: the right kernel is chosen, what a guest does stays in it, and nothing of one is left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import kernels
import machine
import pytest

from waveos.errors import MissingError

VERSIONS = ["6.17.8+deb13-amd64", "6.17.13+deb13-amd64", "6.19.6+deb13-amd64", "7.2.12+deb13-amd64", "7.2.9+deb13-amd64"]


@pytest.mark.parametrize(
    ("series", "chosen"),
    [
        ("6.17", "6.17.13+deb13-amd64"),
        ("7.2", "7.2.12+deb13-amd64"),
        ("6.16", "6.17.13+deb13-amd64"),
        ("6.18", "6.19.6+deb13-amd64"),
        ("9.1", "7.2.12+deb13-amd64"),
    ],
)
def test_the_newest_of_the_series_is_chosen_or_of_the_nearest_that_is_there(series, chosen):
    assert kernels._choose(VERSIONS, series) == chosen


def test_a_mirror_without_kernels_is_told(monkeypatch):
    with pytest.raises(MissingError, match="is it a mirror of Debian's"):
        kernels._choose([], "7.2")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "waveos/kernels").mkdir(parents=True)
    return tmp_path / "waveos/kernels"


class Mirror:
    """apt, as far as `kernels` asks it; every download is cut off at first."""

    cut_off = 0

    def __init__(self, folder: Path):
        self.folder = folder

    def versions(self) -> list[str]:
        return VERSIONS

    def packages(self, version: str) -> dict[str, int]:
        return {f"linux-image-{version}": 1000}

    def download(self, packages: list[str], folder: Path) -> list[Path]:
        folder.mkdir(exist_ok=True)
        file = folder / f"{packages[0]}.deb"
        file.touch()
        if not Mirror.cut_off:
            Mirror.cut_off = 1
            raise MissingError("cut off")
        return [file]


def unpack(*command: str, cwd: Path | None = None) -> str:
    """Stands for dpkg-deb and depmod: a folder with what a kernel's has."""
    if command[0] == "dpkg-deb":
        boot = Path(command[-1], "boot")
        boot.mkdir(parents=True)
        (boot / "vmlinuz-6.17.13").touch()
        (boot / "config-6.17.13").write_text("CONFIG_SCHED_CLASS_EXT=y\n")
    return ""


def test_a_kernel_is_in_the_cache_whole_or_not_at_all(cache, monkeypatch):
    monkeypatch.setattr(kernels, "_Apt", Mirror)
    monkeypatch.setattr(kernels, "_run", unpack)
    monkeypatch.setattr(Mirror, "cut_off", 0)
    with pytest.raises(MissingError, match="cut off"):
        kernels.kernel("6.17")
    (cache / "partial-6.17.13+deb13-amd64").mkdir()  # as a killed run leaves it
    found = kernels.kernel("6.17")
    assert found.image == cache / "6.17.13+deb13-amd64/boot/vmlinuz-6.17.13"
    assert sorted(path.name for path in cache.iterdir()) == ["6.17.13+deb13-amd64", "lock"]
    monkeypatch.setattr(kernels, "_Apt", None)  # a second time nobody is asked
    assert kernels.kernel("6.17") == found


def test_a_disk_that_is_too_full_is_told_before_the_download(cache, monkeypatch):
    monkeypatch.setattr(kernels, "_Apt", Mirror)
    monkeypatch.setattr(Mirror, "cut_off", 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "total used free")(1, 1, 5 << 20))
    with pytest.raises(MissingError, match=r"has 5 MiB free; a kernel needs 1024 MiB there: make room"):
        kernels.kernel("7.2")
    assert [path.name for path in cache.iterdir()] == ["lock"]


def test_a_tool_that_is_not_installed_is_named_with_its_package(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingError, match="apt-get install qemu-system-x86"):
        machine.run(kernels.Kernel("7.2.12", tmp_path), ["true"], timeout_s=1)


class Guests:
    """Boots that end as they are told to; each tells of as many of the tests that it was given as it has time for."""

    def __init__(self, config: pytest.Config, *boots: tuple[int, machine.Ended]):
        self._config, self._boots = config, list(boots)
        self.given: list[list[str]] = []

    def run(self, kernel, command, *, share: Path, **_) -> machine.Ended:
        tests = (share / "tests").read_text().splitlines()
        self.given.append(tests)
        tells, ended = self._boots.pop(0)
        with (share / "reports").open("w") as file:
            for when, test in [("teardown", test) for test in tests[:tells]] + [("setup", test) for test in tests[tells : tells + 1]]:
                report = pytest.TestReport(test, ("", None, ""), {}, "passed", None, when)
                file.write(json.dumps(self._config.hook.pytest_report_to_serializable(config=self._config, report=report)) + "\n")
        return ended


WELL = machine.Ended(0, "", "", 8.0, 20.0)
PANIC = machine.Ended(None, "", "Kernel panic - not syncing", 8.0, 20.0)
HANGS = machine.Ended(None, "", "", 8.0, 900.0)
NEVER = machine.Ended(None, "", "", 0.0, 240.0)


@pytest.mark.parametrize(
    ("boots", "given", "told"),
    [
        ([(3, WELL)], [3], 3),
        ([(1, PANIC), (2, WELL)], [3, 2], 3),
        ([(0, NEVER), (3, WELL)], [3, 3], 3),
        ([(1, PANIC), (1, PANIC)], [3, 2], 2),
        ([(3, PANIC)], [3], 3),
        ([(1, HANGS)], [3], 1),
    ],
)
def test_what_a_guest_that_failed_did_not_tell_runs_in_another_once(monkeypatch, request, tmp_path, boots, given, told):
    tests = ["a", "b", "c"]
    plugin = next(each for each in request.config.pluginmanager.get_plugins() if hasattr(each, "InGuest"))
    guests = Guests(request.config, *boots)
    monkeypatch.setattr(machine, "run", guests.run)
    monkeypatch.setattr(plugin.Run, "_say", lambda self, line: None)
    here = SimpleNamespace(first_boot=lambda series: plugin.boot(kernels.Kernel(series, tmp_path), tests))
    run = plugin.Run("7.2", tests, request.config, here)
    assert [run.reports(test)[-1].outcome for test in tests] == ["passed"] * told + ["failed"] * (3 - told)
    assert guests.given == [tests[-n:] for n in given]


@pytest.fixture
def kernel(request) -> kernels.Kernel:
    """A real one, if one is here already: the fast tests fetch nothing."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "waveos/kernels")
    found = [found for series in kernels.SERIES if root.is_dir() and (found := kernels._cached(root, series))]
    if not found:
        pytest.skip("no kernel is in the cache: make test-vm fetches one")
    try:
        machine._check_tools()
    except MissingError as error:
        pytest.skip(str(error))
    return found[0]


def left_over(owner: int) -> list[str]:
    """Processes of guests that this process started."""
    mine = f"wave-guest-{owner}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if mine in command.split(b"\0"):
            found.append(command.decode(errors="replace"))
    return found


@pytest.mark.slow
def test_a_guest_sees_this_machines_files_and_leaves_none_of_its_own(kernel, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs").write_text("as it was")
    script = "cat theirs; echo changed > theirs; echo new > mine; uname -r; echo $COLOUR; exit 7"
    ended = machine.run(kernel, ["/bin/sh", "-c", script], timeout_s=200, environment={"COLOUR": "two words"})
    assert (ended.code, ended.output.split("\n")) == (7, ["as it was" + kernel.version, "two words", ""]), ended.console[-2000:]
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]
    assert (tmp_path / "theirs").read_text() == "as it was"
    assert not left_over(os.getpid())


@pytest.mark.slow
def test_a_guest_that_does_not_end_is_stopped_and_its_share_tells_how_far_it_came(kernel, tmp_path):
    ended = machine.run(kernel, ["/bin/sh", "-c", "echo before; sleep 1000"], timeout_s=25, share=tmp_path)
    assert ended.code is None
    assert ended.output == "before\n"
    assert str(ended) == "it was stopped, or it died"
    assert not left_over(os.getpid())
    assert not (tmp_path / "scratch").exists()


@pytest.mark.slow
def test_a_kernel_that_panics_is_told_as_such(kernel):
    ended = machine.run(kernel, ["/bin/sh", "-c", "echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger"], timeout_s=200)
    assert ended.code is None
    assert str(ended) == "the kernel panicked"


def test_a_guest_ends_with_the_process_that_started_it_however_that_ends(kernel, tmp_path):
    owner = subprocess.Popen([sys.executable, machine.__file__, kernel.series, "sleep", "1000"], env={**os.environ, "TMPDIR": str(tmp_path)})
    until(lambda: any("qemu" in command for command in left_over(owner.pid)))
    owner.kill()
    owner.wait()
    until(lambda: not left_over(owner.pid))


SESSION = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import conftest, kernels
def boot(kernel, tests):
    try:
        Path(tests[0]).touch()
        time.sleep(1000)
    finally:
        Path(tests[0]).unlink()
kernels.kernel, conftest.boot, conftest._compile = str, boot, lambda: None
conftest.Guests(["7.2"], [sys.argv[2]], None).first_boot("7.2")
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_what_boots_a_guest_clears_up_after_it_when_the_session_is_ended_in_mid_run(tmp_path, number):
    running = tmp_path / "running"
    session = subprocess.Popen([sys.executable, "-c", SESSION, str(Path(machine.__file__).parent), str(running)])
    until(running.exists)
    session.send_signal(number)
    session.wait()
    until(lambda: not running.exists())


def test_ctrl_c_ends_the_session_and_clears_up(tmp_path):
    running = tmp_path / "running"
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # as at a terminal, also where these tests run in the background
    try:
        command = [sys.executable, "-c", SESSION, str(Path(machine.__file__).parent), str(running)]
        session = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    finally:
        signal.signal(signal.SIGINT, ignored)
    until(running.exists)
    os.killpg(session.pid, signal.SIGINT)
    assert session.wait(60) != 0
    assert not running.exists()


def until(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
