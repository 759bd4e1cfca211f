"""What the tests of the binding need of a machine, and the objects they load (`make bpf` compiles them)."""

from __future__ import annotations

import fcntl
import os
import subprocess
from pathlib import Path

import pytest

from waveos.host.bpf import BpfError, Object
from waveos.host.bpf.library import BTF, libbpf

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def objects() -> Path:
    """The folder of the compiled objects, on a machine that can load them."""
    if os.geteuid() != 0:
        pytest.skip("the kernel lets root alone load BPF programs")
    if not BTF.exists():
        pytest.skip(f"this kernel has no BTF ({BTF})")
    try:
        libbpf()
    except BpfError as error:
        pytest.skip(str(error))
    if not all(source.with_suffix(".o").exists() for source in HERE.glob("*.bpf.c")):
        pytest.skip("the BPF programs are not compiled: make bpf (with clang)")
    return HERE


@pytest.fixture
def bpf(objects):
    """maps.bpf.o, loaded."""
    with Object(objects / "maps.bpf.o") as loaded:
        yield loaded


@pytest.fixture
def bpffs(objects, tmp_path):
    """A BPF file system of our own."""
    done = subprocess.run(["mount", "-t", "bpf", f"wave-test-{os.getpid()}", tmp_path], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no BPF file system can be mounted here: {done.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


@pytest.fixture
def congestion(objects):
    """congestion.bpf.o, whose struct_ops one process at a time can register."""
    path = objects / "congestion.bpf.o"
    with path.open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield path
