"""Kernels with sched_ext for the guests: Debian's own, fetched and unpacked into Wave's cache, never installed.

Debian 12's kernels have no sched_ext, those in `trixie-backports` do. Packages are fetched with apt from the machine's own mirror, checked against the
machine's own keys, through an apt state of ours: the machine's package sources, lists and packages stay as they are. A kernel that is in
the cache is used without asking the mirror again; to have a newer one, delete its folder.

`python tests/vm/kernels.py` fetches both series and says what it has.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from waveos.errors import MissingError, WaveError
from waveos.paths import cache_dir

SERIES = ("6.17", "7.2")
"""The oldest and the newest that the mechanisms are written for."""

SUITE = "trixie-backports"
_PARTS = re.compile(r"\blinux-(?:binary|modules|base)-[^\s,(]+")  # from 7.2 on what was one package is several
_SPARE_BYTES = 1 << 30  # left free on the disk, whatever comes


@dataclass(frozen=True)
class Kernel:
    """One unpacked kernel: its modules lie beside it, found by virtme-ng from where the image is."""

    version: str  # as `uname -r` says it
    folder: Path

    @property
    def series(self) -> str:
        return ".".join(self.version.split(".")[:2])

    @property
    def image(self) -> Path:
        """The bootable file."""
        return next(path for pattern in ("boot/vmlinuz-*", "usr/lib/modules/*/vmlinuz") for path in self.folder.glob(pattern))


def kernel(series: str) -> Kernel:
    """The newest kernel of the series, or what there is instead: from the cache, else fetched. Takes half a minute and 600 MB the first time."""
    with _locked(cache_dir("kernels")) as root:
        return _cached(root, series) or _fetch(root, series)


@contextmanager
def _locked(root: Path) -> Iterator[Path]:
    """One at a time: two that fetch would mix their files."""
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield root


def _cached(root: Path, series: str) -> Kernel | None:
    """A kernel is whole once its folder has its name, which it gets last."""
    found = [Kernel(path.name, path) for path in root.iterdir() if path.is_dir() and re.match(r"\d+\.\d+\.\d+", path.name)]
    same = [each for each in found if each.series == series]
    return max(same, key=lambda each: _number(each.version), default=None)


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0]))


# ── from the mirror ──


def _fetch(root: Path, series: str) -> Kernel:
    for tool in ("apt-get", "dpkg-deb", "depmod"):
        if not shutil.which(tool):
            raise MissingError(f"{tool} is not here, and the guests' kernels come as Debian packages: run this on Debian, with kmod installed")
    apt = _Apt(root / "apt")
    version = _choose(apt.versions(), series)
    if _number(version)[:2] != _number(series) and (instead := _cached(root, ".".join(version.split(".")[:2]))):
        return instead
    packages = apt.packages(version)
    needed = sum(packages.values()) + _SPARE_BYTES
    if (free := shutil.disk_usage(root).free) < needed:
        raise MissingError(
            f"{root} has {free >> 20} MiB free; a kernel needs {needed >> 20} MiB there: make room, or set XDG_CACHE_HOME to another disk"
        )
    downloads, partial = root / "downloads", root / f"partial-{version}"
    shutil.rmtree(partial, ignore_errors=True)
    for file in apt.download(list(packages), downloads):
        _run("dpkg-deb", "-x", str(file), str(partial))
    shutil.rmtree(partial / "usr/share", ignore_errors=True)
    _run("depmod", "-b", str(partial / "usr"), version)
    config = next(path for pattern in ("boot/config-*", "usr/lib/modules/*/config") for path in partial.glob(pattern))
    if "CONFIG_SCHED_CLASS_EXT=y" not in config.read_text():
        raise MissingError(f"{version} was built without sched_ext: of {SUITE}'s kernels those from 6.16 on should have it")
    shutil.rmtree(downloads)
    partial.rename(root / version)
    return Kernel(version, root / version)


def _choose(versions: list[str], series: str) -> str:
    """The series' newest; old ones leave the suite in time, so else of the nearest newer series, else of the newest there is."""
    if not versions:
        raise MissingError(f"{SUITE} of this machine's mirror has no kernels: is it a mirror of Debian's?")
    wanted = _number(series)
    nearest = min((_number(each)[:2] for each in versions if _number(each)[:2] >= wanted), default=max(_number(each)[:2] for each in versions))
    return max((each for each in versions if _number(each)[:2] == nearest), key=_number)


class _Apt:
    """apt with a state of its own in `folder`, and the machine's mirror and keys."""

    def __init__(self, folder: Path):
        lists, cache = folder / "lists", folder / "cache"
        (lists / "partial").mkdir(parents=True, exist_ok=True)
        (cache / "archives/partial").mkdir(parents=True, exist_ok=True)
        self.architecture = _run("dpkg", "--print-architecture").strip()
        source = folder / "kernels.sources"
        source.write_text(f"Types: deb\nURIs: {_mirror()}\nSuites: {SUITE}\nComponents: main\nSigned-By: {_keyring()}\n")
        options = {
            "Dir::State": folder,
            "Dir::State::Lists": lists,
            "Dir::State::Status": "/dev/null",  # what is installed here does not matter
            "Dir::Cache": cache,
            "Dir::Etc::SourceList": source,
            "Dir::Etc::SourceParts": "/dev/null",
            "APT::Sandbox::User": "root",  # the cache may lie where apt's own user cannot look
            "APT::Update::Post-Invoke-Success": "",
        }
        self._options = [part for key, value in options.items() for part in ("-o", f"{key}={value}")]
        self._call("apt-get", "update", "-q")

    def _call(self, command: str, *arguments: str, cwd: Path | None = None) -> str:
        return _run(command, *self._options, *arguments, cwd=cwd)

    def versions(self) -> list[str]:
        """Of the plain flavour: the one for clouds has no 9p file system."""
        names = self._call("apt-cache", "pkgnames", "linux-image-").split()
        matches = (re.fullmatch(rf"linux-image-(\d+\.\d+\.\d+\+deb\d+-{self.architecture})", name) for name in names)
        return [match[1] for match in matches if match]

    def packages(self, version: str) -> dict[str, int]:
        """The packages that make up a kernel, each with the bytes it takes packed and unpacked."""
        names = [f"linux-image-{version}"]
        names += [name for name in _PARTS.findall(self._field(names[0], "Depends")) if version in name]
        return {name: int(self._field(name, "Size")) + 1024 * int(self._field(name, "Installed-Size")) for name in names}

    def _field(self, package: str, field: str) -> str:
        match = re.search(rf"^{field}: (.*)$", self._call("apt-cache", "show", "--no-all-versions", package), re.MULTILINE)
        return match[1] if match else "0"

    def download(self, packages: list[str], folder: Path) -> list[Path]:
        """apt goes on where it was cut off. It takes a file of the right size for the right one, so their hashes are checked here."""
        folder.mkdir(exist_ok=True)
        for _ in range(2):
            self._call("apt-get", "download", "-q", *packages, cwd=folder)
            files = {name: next(folder.glob(f"{name}_*.deb")) for name in packages}
            spoiled = [file for name, file in files.items() if _hash(file) != self._field(name, "SHA256")]
            if not spoiled:
                return list(files.values())
            for file in spoiled:
                file.unlink()
        raise MissingError(f"{', '.join(file.name for file in spoiled)}: not what the mirror's signed list says, twice; try again later")


def _hash(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _mirror() -> str:
    """Where the machine has its own packages from."""
    form = "$(REPO_URI) $(ORIGIN) $(RELEASE)"
    for line in _run("apt-get", "indextargets", "--format", form, "Created-By: Packages").splitlines():
        address, origin, release = line.split()[0], line.split()[1:-1], line.split()[-1]
        if origin == ["Debian"] and "-" not in release:
            return address
    raise MissingError("none of this machine's package sources (apt-get indextargets) is a mirror of Debian, where the guests' kernels are")


def _keyring() -> Path:
    path = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
    if not path.exists():
        raise MissingError(f"{path} is not here, so a kernel from the mirror cannot be checked: install debian-archive-keyring")
    return path


def _run(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise MissingError(f"a kernel for the guests could not be had: {command[0]} failed: {said[-1] if said else f'exit code {done.returncode}'}")
    return done.stdout


if __name__ == "__main__":
    try:
        print(json.dumps({series: {"version": (found := kernel(series)).version, "image": str(found.image)} for series in SERIES}, indent=2))
    except WaveError as error:
        sys.exit(f"kernels: {error}")
