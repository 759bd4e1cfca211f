"""A file is there whole or not at all, and the error says which, why and what to do."""

from __future__ import annotations

import os
import resource
import signal
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from waveos.errors import ConfigError
from waveos.output import make_folder, replace_file, write_file


@pytest.fixture
def small_files() -> Iterator[int]:
    """A process that may write files of 64 kB at most: the kernel refuses the rest, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, before[1]))
    yield 65_536
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 kB, where the machine lets us mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"mounting a small disk needs privilege: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_file_gets_its_content_and_the_permissions_of_any_other(tmp_path: Path) -> None:
    write_file(tmp_path / "report.html", "dépôt")
    (tmp_path / "other").write_text("")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == "dépôt"
    assert stat.S_IMODE((tmp_path / "report.html").stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)
    assert sorted(os.listdir(tmp_path)) == ["other", "report.html"]


def test_a_replaced_file_keeps_its_permissions_and_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "real").chmod(0o640)
    (tmp_path / "link").symlink_to("real")
    write_file(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"
    assert stat.S_IMODE((tmp_path / "real").stat().st_mode) == 0o640


def test_a_full_disk_leaves_nothing_and_is_named(tiny_disk: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        write_file(tiny_disk / "report.html", b"x" * 1_000_000)
    message = str(caught.value)
    assert str(tiny_disk / "report.html") in message and "no space left" in message and "free some space" in message
    assert os.listdir(tiny_disk) == []


def test_a_full_disk_leaves_the_old_file_as_it_was(tiny_disk: Path) -> None:
    write_file(tiny_disk / "report.html", b"old")
    with pytest.raises(ConfigError, match="no space left"):
        write_file(tiny_disk / "report.html", b"x" * 1_000_000)
    assert os.listdir(tiny_disk) == ["report.html"] and (tiny_disk / "report.html").read_bytes() == b"old"


def test_a_limit_on_file_size_leaves_the_old_file_as_it_was(tmp_path: Path, small_files: int) -> None:
    write_file(tmp_path / "report.html", b"old")
    with pytest.raises(ConfigError, match=r"report\.html: file too large.*ulimit -f"):
        write_file(tmp_path / "report.html", b"x" * (small_files + 1))
    assert os.listdir(tmp_path) == ["report.html"] and (tmp_path / "report.html").read_bytes() == b"old"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_device_is_written_to_and_not_replaced() -> None:
    with pytest.raises(ConfigError, match="/dev/full: no space left"):
        write_file("/dev/full", b"x")
    write_file("/dev/null", b"x")
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode) and stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, ValueError])
def test_whatever_interrupts_the_writing_leaves_nothing(tmp_path: Path, interruption: type[BaseException]) -> None:
    with pytest.raises(interruption), replace_file(tmp_path / "report.html") as file:
        file.write(b"half")
        raise interruption
    assert os.listdir(tmp_path) == []


def test_a_missing_folder_is_said_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere/report\.html: no such file or directory.*make the folder first"):
        write_file(tmp_path / "nowhere" / "report.html", "x")
    assert os.listdir(tmp_path) == []


def test_a_folder_is_not_a_file_to_write(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="name a file, not a folder"):
        write_file(tmp_path, "x")


def test_an_error_of_another_file_is_not_blamed_on_this_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replace_file(tmp_path / "report.html"):
        (tmp_path / "input.json").read_text()
    assert os.listdir(tmp_path) == []


def test_a_folder_for_output_is_made_with_its_parents_or_the_error_says_why_not(tmp_path: Path) -> None:
    assert make_folder(tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file/b"):
        make_folder(tmp_path / "file" / "b")
