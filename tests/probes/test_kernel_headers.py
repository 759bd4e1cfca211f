"""Where kernel headers come from: the machine's own first, then Wave's cache; a package manager is played by scripts."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest

from waveos.cli import run
from waveos.errors import MissingError
from waveos.host.probes import headers

RELEASE = platform.release()


@pytest.fixture(autouse=True)
def empty(tmp_path, monkeypatch):
    """No cache, no variable of bcc's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("BCC_KERNEL_SOURCE", raising=False)


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """apt and dpkg as scripts over two packages, split as Debian splits them: generated files in one, the rest and a link in the other."""
    store = tmp_path / "store"
    for package, files in {
        "linux-headers-9.9-amd64": ["include/generated/autoconf.h", "Makefile"],
        "linux-headers-9.9-common": ["include/linux/types.h", "arch/x86/include/asm/a.h", "arch/arm64/include/asm/a.h", "scripts/x"],
    }.items():
        for file in files:
            path = store / package / "usr/src" / package / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(file)
        (store / package / "usr/src" / package / "include/escape").symlink_to("/etc/passwd")
    scripts = {
        "dpkg": "echo amd64",
        "apt-cache": 'depend() { echo "  Depends: $1"; }; case $3 in linux-headers-amd64) depend linux-headers-9.9-amd64;; '
        "linux-headers-9.9-amd64) depend linux-headers-9.9-common; depend linux-kbuild-9.9;; linux-headers-9.9-common) :;; *) exit 100;; esac",
        "apt-get": 'shift 3; for package in "$@"; do echo "$package" > "${package}_1.deb"; done',
        "dpkg-deb": f'exec tar -cf - -C {store}/$(cat "$2") ./usr',
    }
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    for name, body in scripts.items():
        (bin_ / name).write_text(f"#!/bin/sh\n{body}\n")
        (bin_ / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_}:/usr/bin:/bin")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    return bin_


def test_without_headers_one_line_says_how_to_get_them(tmp_path, capsys, monkeypatch):
    with pytest.raises(MissingError, match=r"wave probe headers --fetch .* linux-headers-"):
        headers.find(tmp_path)
    monkeypatch.setattr(headers, "find", lambda: (_ for _ in ()).throw(MissingError(headers.HOW)))
    assert run(["probe", "headers"]) == MissingError.exit_code
    assert capsys.readouterr().err.count("\n") == 1


def test_bccs_own_variable_is_obeyed_before_all(tmp_path, monkeypatch):
    monkeypatch.setenv("BCC_KERNEL_SOURCE", "/some/where")
    assert headers.find(tmp_path) == ("BCC_KERNEL_SOURCE=/some/where", Path("/some/where"))


def test_the_machines_own_headers_come_before_the_cache(tmp_path, packages):
    headers.fetch()
    (tmp_path / "lib/modules" / RELEASE / "build").mkdir(parents=True)
    label, folder = headers.find(tmp_path)
    assert folder is None and label.endswith(f"{RELEASE}/build")


def test_what_is_fetched_is_one_tree_of_what_bcc_reads_and_nothing_else(tmp_path, packages):
    tree = headers.fetch()
    held = {str(path.relative_to(tree)) for path in tree.rglob("*") if not path.is_dir()}
    assert held == {"packages", "include/generated/autoconf.h", "include/linux/types.h", "arch/x86/include/asm/a.h"}
    label, folder = headers.find(tmp_path)
    assert folder == tree and "linux-headers-9.9-common_1" in label
    assert [path.name for path in tree.parent.iterdir()] == ["x86_64"]


def test_what_was_fetched_is_not_fetched_again_and_can_be_removed(tmp_path, packages):
    headers.fetch()
    (packages / "apt-get").write_text("#!/bin/sh\nexit 1\n")
    headers.fetch()
    assert headers.remove() and not headers.remove()
    with pytest.raises(MissingError):
        headers.find(tmp_path)


def test_a_distribution_without_the_packages_is_one_line(packages):
    (packages / "apt-cache").write_text("#!/bin/sh\nexit 100\n")
    with pytest.raises(MissingError, match="run apt-get update"):
        headers.fetch()


def test_a_failed_download_is_one_line_and_leaves_nothing(tmp_path, packages):
    (packages / "apt-get").write_text("#!/bin/sh\necho 'E: 404 Not Found' >&2; exit 100\n")
    with pytest.raises(MissingError, match=r"apt-get download failed \(E: 404 Not Found\)"):
        headers.fetch()
    assert list((tmp_path / "cache/waveos/kernel-headers").iterdir()) == []


def test_packages_without_headers_are_not_taken_for_them(tmp_path, packages):
    (packages / "dpkg-deb").write_text("#!/bin/sh\nexec tar -cf - -T /dev/null\n")
    with pytest.raises(MissingError, match="hold no kernel headers"):
        headers.fetch()
    assert list((tmp_path / "cache/waveos/kernel-headers").iterdir()) == []


def test_another_distribution_is_told_to_use_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingError, match="apt-get, which is not here"):
        headers.fetch()


def test_asking_for_both_at_once_is_refused(capsys):
    assert run(["probe", "headers", "--fetch", "--remove"]) == 2
    assert "give one of them" in capsys.readouterr().err


def test_the_scripts_above_behave_as_the_tools_do(packages):
    """So that the tests above are about the real thing: apt-cache names what a package depends on in this form."""
    real = subprocess.run(["/usr/bin/apt-cache", "depends", "--important", "bash"], capture_output=True, text=True, check=False)
    if real.returncode:
        pytest.skip("apt has no package lists here")
    assert "\n  Depends: " in real.stdout or "\n  PreDepends: " in real.stdout
