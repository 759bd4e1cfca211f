"""Kernel headers for bcc: the machine's own, or a neighbouring version's in Wave's cache. Nothing of the machine is changed for them.

bcc wants some kernel's headers to compile anything; the probes use no structure of the kernel's, so they need not be those of the
running one (headers of 6.1 serve on 6.18). `fetch` downloads the distribution's packages, without installing them, and unpacks what
bcc reads into one folder of the cache (about 80 MB), which the probes name to bcc by its own variable BCC_KERNEL_SOURCE; `remove` deletes it.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from waveos.errors import MissingError
from waveos.paths import cache_dir

HOW = f"wave probe headers --fetch (into Wave's cache; installs nothing), or apt-get install linux-headers-{platform.release()} where the distribution has it"
_ARCHITECTURES = {"x86_64": "x86", "aarch64": "arm64", "armv7l": "arm", "ppc64le": "powerpc", "s390x": "s390", "riscv64": "riscv"}
_PACKAGE = re.compile(r"Depends:\s+<?(linux-headers-[^\s>]+)")


def find(root: Path = Path("/")) -> tuple[str, Path | None]:
    """What bcc will compile against, for people; and the folder to name to it, None where it finds the headers by itself.

    `root` is where /lib and /sys are looked for. Raises MissingError that says how to get them.
    """
    named = os.environ.get("BCC_KERNEL_SOURCE")
    if named:
        return f"BCC_KERNEL_SOURCE={named}", Path(named)
    modules = root / "lib/modules" / platform.release()
    for own in (modules / "source", modules / "build", root / "sys/kernel/kheaders.tar.xz"):
        if own.exists():
            return str(own), None
    cached = _cached()
    if cached is None:
        raise MissingError(f"bcc needs kernel headers, and this machine has none: {HOW}")
    return f"{cached} ({(cached / 'packages').read_text().strip()})", cached


def fetch() -> Path:
    """Put the headers into the cache, if they are not there, and return their folder. Raises MissingError that says what to do instead."""
    cached = _cached()
    if cached is not None:
        return cached
    for tool in ("apt-get", "apt-cache", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise MissingError(
                f"headers are fetched with {tool}, which is not here; install this distribution's headers package for {platform.release()}"
            )
    packages = _packages()
    place = cache_dir("kernel-headers")
    with tempfile.TemporaryDirectory(prefix=".part-", dir=place) as part:
        _run(["apt-get", "download", "-o", "APT::Sandbox::User=root", *packages], part)
        tree = Path(part, "tree")
        tree.mkdir()
        archives = sorted(Path(part).glob("*.deb"))
        for archive in archives:
            _unpack(archive, tree)
        if not (tree / "include/linux/types.h").is_file() or not (tree / "include/generated/autoconf.h").is_file():
            raise MissingError(f"{', '.join(packages)} hold no kernel headers as bcc wants them; install this distribution's headers package")
        (tree / "packages").write_text(" ".join(archive.stem for archive in archives) + "\n")
        target = place / platform.machine()
        try:
            os.rename(tree, target)
        except OSError:  # another process was faster
            if _cached() is None:
                raise
    return target


def remove() -> bool:
    """Delete the cached headers; False if there were none."""
    cached = _cached()
    if cached is not None:
        shutil.rmtree(cached)
    return cached is not None


def _cached() -> Path | None:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "waveos/kernel-headers" / platform.machine()
    return folder if (folder / "packages").is_file() else None


def _packages() -> list[str]:
    """The running kernel's headers packages if the distribution has them, else those of its default kernel; each with what it depends on."""
    architecture = _run(["dpkg", "--print-architecture"]).strip()
    for name in (f"linux-headers-{platform.release()}", f"linux-headers-{architecture}", "linux-headers-generic"):
        found = list(dict.fromkeys(_dependencies(name)))
        if found:
            return found
    raise MissingError("apt knows no headers package; run apt-get update, then this again")


def _dependencies(name: str) -> Iterator[str]:
    """The package and the headers packages below it; nothing if apt does not know it. One that only names others (a metapackage) is left out."""
    listed = subprocess.run(["apt-cache", "depends", "--important", name], capture_output=True, text=True, check=False)
    if listed.returncode:
        return
    below = _PACKAGE.findall(listed.stdout)
    if re.search(r"-\d", name):
        yield name
    for each in below:
        yield from _dependencies(each)


def _unpack(archive: Path, tree: Path) -> None:
    """include/ and arch/ARCH/include/ of a package's folder below usr/src, and no links: where a package links, another has the files."""
    wanted = ("include/", f"arch/{_ARCHITECTURES.get(platform.machine(), platform.machine())}/include/")
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE) as unpacked:
        assert unpacked.stdout is not None
        with tarfile.open(fileobj=unpacked.stdout, mode="r|") as files:
            for member in files:
                inner = re.sub(r"^\./usr/src/[^/]+/", "", member.name)
                if not member.isfile() or inner == member.name or not inner.startswith(wanted) or ".." in inner.split("/"):
                    continue
                source = files.extractfile(member)
                assert source is not None
                (tree / inner).parent.mkdir(parents=True, exist_ok=True)
                (tree / inner).write_bytes(source.read())
    if unpacked.returncode:
        raise MissingError(f"dpkg-deb could not read {archive.name}; run this again")


def _run(command: list[str], folder: str | None = None) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
        raise MissingError(f"{' '.join(command[:2])} failed ({said}); run apt-get update, then this again")
    return done.stdout
