"""No bytes make a decoder fail: good inputs cut and changed, what once made one fail, and (slow) some thousand that coverage guides."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # beside this file, found by its path

from targets import TARGETS, corpus, run_one  # noqa: E402


@pytest.mark.parametrize("name", TARGETS)
def test_no_input_makes_a_decoder_raise_anything_but_its_own_error(name):
    rng = np.random.default_rng(5)
    for seed in TARGETS[name].seeds():
        run_one(name, seed)
        for _ in range(60):
            data = bytearray(seed)
            for _ in range(int(rng.integers(1, 4))):
                at = int(rng.integers(0, len(data) + 1))
                data[at : at + int(rng.integers(0, 9))] = rng.bytes(int(rng.integers(0, 9)))
            run_one(name, bytes(data))
        run_one(name, seed[: int(rng.integers(0, len(seed)))])
    for size in (0, 1, 64, 1_024):
        run_one(name, rng.bytes(size))


def test_what_once_made_a_decoder_fail_does_not_again():
    for name, data in corpus(HERE / "corpus"):
        run_one(name, data)


def test_a_decoder_that_raises_what_it_must_not_is_found(monkeypatch):
    monkeypatch.setitem(TARGETS, "json", TARGETS["json"]._replace(read=lambda data: data.decode()))
    with pytest.raises(UnicodeDecodeError):
        run_one("json", b"\xff")


@pytest.mark.slow
def test_inputs_guided_by_coverage_find_no_failure():
    pytest.importorskip("atheris", reason="atheris is not installed: pip install 'waveos[dev]'")
    done = subprocess.run([sys.executable, "-P", str(HERE / "fuzz.py"), "--inputs", "26000"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
