"""Memory in guests with other kernels (cgroups of version 2, DAMON): `WAVE_GUESTS=6.17 pytest tests/memory/test_guest.py`, 3 minutes each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SERIES = [series for series in os.environ.get("WAVE_GUESTS", "").split(",") if series]
COMPILED = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}


@pytest.mark.parametrize("series", SERIES or [pytest.param("", marks=pytest.mark.skip(reason="boots a guest: WAVE_GUESTS=6.17 says which kernel"))])
def test_cold_pages_are_found_by_damon_and_a_killed_hostd_leaves_nothing_that_restore_does_not_put_back(series):
    sys.path.insert(0, str(HERE.parent / "vm"))
    import kernels
    import machine

    subprocess.run([sys.executable, "-P", str(HERE / "compiled.py")], env={**os.environ, **COMPILED}, check=True)
    command = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib --strict-markers", "-q"]
    command += [str(HERE / "test_live.py"), "-k", "in_a_vm_or_here"]
    ended = machine.run(kernels.kernel(series), command, timeout_s=900, environment=COMPILED)
    assert ended.code == 0, f"{ended}\n{ended.output[-8000:]}"
    assert "2 passed" in ended.output
