"""The kernel's count of faults by batch, on this machine."""

from __future__ import annotations

import mmap
import os

import numpy as np
import pytest

from waveos.errors import WaveError
from waveos.host.memory.faults import PLACES, Faults

BATCH = 2 << 20


@pytest.fixture
def faults():
    if os.geteuid() != 0:
        pytest.skip("loading a BPF program needs root")
    try:
        made = Faults()
    except WaveError as error:
        pytest.skip(f"no BPF here: {str(error).splitlines()[0]}")
    yield made
    made.close()


@pytest.fixture
def memory():
    return np.frombuffer(mmap.mmap(-1, 4 * BATCH, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)


def test_first_touches_are_counted_in_their_batch_and_once(faults, memory):
    assert faults.watch(5, os.getpid(), memory.ctypes.data, 4, BATCH)
    for at in (BATCH, BATCH + 8192, 3 * BATCH):
        memory[at] = 1
    memory[BATCH] = 2
    assert faults.take(5).tolist() == [0, 2, 0, 1]
    assert faults.take(5).tolist() == [0, 0, 0, 0]


def test_what_is_not_watched_or_of_another_process_is_not_counted(faults, memory):
    assert faults.take(1) is None
    assert faults.watch(1, 1, memory.ctypes.data, 4, BATCH)
    memory[0] = 1
    assert faults.take(1).tolist() == [0, 0, 0, 0]
    faults.forget(1)
    assert faults.take(1) is None


def test_a_place_is_used_again_and_begins_at_zero(faults, memory):
    for region in range(PLACES):
        assert faults.watch(region, os.getpid(), memory.ctypes.data, 4, BATCH)
    assert not faults.watch(99, os.getpid(), memory.ctypes.data, 4, BATCH)
    memory[0] = 1
    faults.forget(3)
    assert faults.watch(99, os.getpid(), memory.ctypes.data, 4, BATCH)
    assert faults.take(99).tolist() == [0, 0, 0, 0]
    assert faults.take(4).tolist() == [1, 0, 0, 0]
