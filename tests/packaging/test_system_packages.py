"""`.ci/packages`: what is missing is installed, from backports where the distribution is too old; what cannot be is told in a line."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STUBS = {
    "id": "echo ${UID_HERE:-0}",
    "dpkg-query": 'for last; do :; done; grep "^$last " "$MACHINE/installed" | sed "s/^[^ ]* /installed /"; grep -q "^$last " "$MACHINE/installed"',
    "dpkg": 'shift; [ "$(printf \'%s\\n%s\\n\' "$3" "$1" | sort -V | head -n 1)" = "$3" ]',
    "apt-cache": 'case $1 in policy) echo "  Candidate: $(sed -n "s/^$2 //p" "$MACHINE/candidates")";; '
    'madison) grep -qs backports "$MACHINE/apt/sources.list.d/waveos-backports.sources" && sed -n "s/^$2 \\(.*\\)/$2 | \\1 | http:\\/\\/mirror '
    '$CODENAME-backports\\/main amd64/p" "$MACHINE/backports";; esac; true',
    "apt-get": 'case "$*" in *indextargets*) ;; *) echo "$*" >>"$MACHINE/log";; esac',
}
DEB822 = "Types: deb\nURIs: http://mirror.example/debian\nSuites: {codename} {codename}-updates\nComponents: main\nSigned-By: /keys/debian.gpg\n"
ONE_LINE = "# the mirror\ndeb [signed-by=/keys/debian.gpg arch=amd64] http://mirror.example/debian {codename} main\n"
CODENAME = next(
    (line.split("=")[1].strip('"') for line in Path("/etc/os-release").read_text().splitlines() if line.startswith("VERSION_CODENAME=")), ""
)

pytestmark = pytest.mark.skipif(not CODENAME or not shutil.which("awk"), reason="this distribution has no code name, or no awk")


@pytest.fixture
def machine(tmp_path):
    """A checkout that wants two packages, and a machine whose apt only writes down what it is told."""
    (tmp_path / "bin").mkdir()
    for name, script in STUBS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "packages", tmp_path / ".ci")
    (tmp_path / "system-packages.txt").write_text(
        "# what\n[always]\npython3\n[live]  # this\nclang-19  # compiles\nlibbpf1>=1.4  # loads\n[guest]\ncpio\n"
    )
    (tmp_path / "apt" / "sources.list.d").mkdir(parents=True)
    (tmp_path / "apt" / "sources.list.d" / "debian.sources").write_text(DEB822.format(codename=CODENAME))
    for name, text in {"installed": "", "candidates": "clang-19 1:19.1\nlibbpf1 1:1.1.2\n", "backports": "libbpf1 1:1.4.6\n", "log": ""}.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def packages(machine, *groups, **environment):
    environment = {"PATH": f"{machine / 'bin'}:/usr/bin:/bin", "MACHINE": machine, "WAVE_APT": machine / "apt", "CODENAME": CODENAME} | environment
    done = subprocess.run(["/bin/bash", machine / ".ci/packages", *groups], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == ""
    return done.returncode, done.stderr.splitlines(), (machine / "log").read_text()


def test_where_nothing_is_missing_nothing_is_done_or_said(machine):
    (machine / "installed").write_text("clang-19 1:19.1\nlibbpf1 1:1.4.6\n")
    assert packages(machine, "live") == (0, [], "")


@pytest.mark.parametrize("sources", [("debian.sources", DEB822), ("debian.list", ONE_LINE), ("../sources.list", ONE_LINE)])
def test_what_is_too_old_comes_from_the_backports_of_the_machines_own_mirror(machine, sources):
    (machine / "apt/sources.list.d/debian.sources").unlink()
    (machine / "apt/sources.list.d" / sources[0]).write_text(sources[1].format(codename=CODENAME))
    (machine / "installed").write_text("libbpf1 1:1.1.2\n")
    code, said, log = packages(machine, "live")
    assert (code, len(said)) == (0, 2)
    made = (machine / "apt/sources.list.d/waveos-backports.sources").read_text().splitlines()
    assert made[1:] == [
        "Types: deb", "URIs: http://mirror.example/debian", f"Suites: {CODENAME}-backports", "Components: main", "Signed-By: /keys/debian.gpg",
    ]  # fmt: skip
    assert log.splitlines()[-1].endswith("install -y --no-install-recommends clang-19 libbpf1=1:1.4.6")


def test_backports_that_have_nothing_newer_do_not_stay_a_source(machine):
    (machine / "backports").write_text("libbpf1 1:1.3.0\n")
    code, said, log = packages(machine, "live")
    assert (code, log.splitlines()[-1].split()[-1]) == (1, "clang-19")
    assert "does not have: libbpf1>=1.4; what is live may not work here, the virtual world does" in said[-1]
    assert not (machine / "apt/sources.list.d/waveos-backports.sources").exists()


def test_whoever_is_not_root_gets_one_line_that_says_what_is_missing(machine):
    code, said, log = packages(machine, "live", "guest", UID_HERE="1000")
    assert (code, log) == (1, "")
    assert said == [
        "setup: missing system packages, which root installs (sudo .ci/packages live guest): clang-19 libbpf1>=1.4 cpio; "
        "what is live may not work here, the virtual world does"
    ]


def test_without_apt_it_names_the_packages_in_one_line(machine):
    for name in ("bash", "sh", "dirname", "awk", "grep", "sed"):
        os.symlink(shutil.which(name), machine / "bin" / name)
    (machine / "bin/apt-get").unlink()
    code, said, _ = packages(machine, "live", PATH=str(machine / "bin"))
    assert (code, len(said)) == (1, 1)
    assert "no apt-get here; with this system's package manager, by their names in Debian: clang-19 libbpf1>=1.4;" in said[0]
