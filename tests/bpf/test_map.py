"""Maps: as dictionaries of bytes, as memory, kept under a path."""

from __future__ import annotations

import ctypes
import errno
import os
import struct

import numpy as np
import pytest

from waveos.host.bpf import BpfError


class Request(ctypes.Structure):
    _fields_ = [("number", ctypes.c_uint32), ("times", ctypes.c_uint32), ("answer", ctypes.c_int64)]


def test_it_knows_what_it_is(bpf):
    named = bpf.map("named")
    assert (named.name, named.key_size, named.value_size, named.max_entries) == ("named", 4, 8, 16)
    assert named.fd > 2
    assert bpf.map("named") is named


def test_what_is_set_is_got_iterated_and_deleted(bpf):
    named = bpf.map("named")
    assert named.get(1) is None
    named.set(1, 10)
    named.set(np.uint32(2), struct.pack("=Q", 20))
    assert named.get(1) == (10).to_bytes(8, "little")
    assert {struct.unpack("=I", key)[0]: struct.unpack("=Q", value)[0] for key, value in named.items()} == {1: 10, 2: 20}
    assert named.delete(1)
    assert not named.delete(1)
    assert [key for key, _ in named.items()] == [(2).to_bytes(4, "little")]


def test_a_key_or_value_of_the_wrong_size_is_an_error_before_the_kernel_reads_it(bpf):
    named = bpf.map("named")
    for ask in (lambda: named.get(b"123"), lambda: named.get(1 << 32), lambda: named.set(1, b"1"), lambda: named.delete(b"12345")):
        with pytest.raises(ValueError, match="of map named has"):
            ask()
    with pytest.raises(TypeError, match="not per CPU"):
        named.set(1, [1, 2])


def test_a_full_map_is_the_kernels_error(bpf):
    named = bpf.map("named")
    with pytest.raises(OSError, match="map named") as error:
        for key in range(1_000):
            named.set(key, key)
    assert error.value.errno == errno.E2BIG


def test_a_per_cpu_map_has_a_value_for_each_cpu(bpf):
    percpu, times = bpf.map("percpu"), 50
    assert set(percpu.get(0)) == {bytes(4)}
    for _ in range(times):
        assert bpf.program("count_here").run(Request(0)) > 0
    assert sum(struct.unpack("=I", value)[0] for value in percpu.get(1)) == times
    cpus = len(percpu.get(0))
    assert cpus >= len(os.sched_getaffinity(0))
    percpu.set(0, 9)
    assert percpu.get(0) == [struct.pack("=I", 9)] * cpus
    percpu.set(0, list(range(cpus)))
    assert [struct.unpack("=I", value)[0] for value in percpu.get(0)] == list(range(cpus))


def test_an_mmapable_map_is_memory_that_both_sides_see(bpf):
    table = bpf.map("table")
    memory = table.mmap(np.uint32)
    assert memory.shape == (1_000,)
    memory[999] = 41
    assert bpf.program("count_here").run(Request(999)) == 42
    assert memory[999] == 42
    assert table.get(999) == struct.pack("=I", 42)
    assert table.mmap().dtype == np.uint8
    assert table.mmap()[999 * 8] == 42
    with pytest.raises(ValueError, match="values of 4 bytes"):
        table.mmap("V16")


def test_other_maps_say_how_they_become_memory(bpf):
    with pytest.raises(BpfError, match="map named is not mmap-able: give it the flag BPF_F_MMAPABLE"):
        bpf.map("named").mmap()


def test_a_pinned_map_and_program_stay_under_their_path(bpf, bpffs):
    bpf.map("named").pin(bpffs / "named")
    bpf.program("nothing").pin(bpffs / "nothing")
    bpf.close()
    assert {path.name for path in bpffs.iterdir()} >= {"named", "nothing"}


def test_a_pin_where_none_can_be_is_told(bpf, bpffs):
    bpf.map("named").pin(bpffs / "named")
    with pytest.raises(BpfError, match=r"map table: .*named is there already"):
        bpf.map("table").pin(bpffs / "named")
    with pytest.raises(BpfError, match=r"map percpu: /tmp/wave.* is not in a BPF file system: mount -t bpf"):
        bpf.map("percpu").pin(f"/tmp/wave-test-{os.getpid()}")
