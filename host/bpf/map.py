"""A map: a table that BPF programs and we share; as a dictionary of bytes, or as memory where it is mmap-able."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from waveos.host.bpf.library import BpfError, libbpf, listen, refused

if TYPE_CHECKING:
    from waveos.host.bpf.object import Object

Bytes = bytes | bytearray | memoryview | int | np.ndarray | np.void
"""A key or a value: memory of its size, or an integer, which is stored in that size."""

RDONLY_PROG, MMAPABLE = 1 << 7, 1 << 10
PERCPU = {5, 6, 10, 21}
"""BPF_MAP_TYPE_PERCPU_HASH, _PERCPU_ARRAY, _LRU_PERCPU_HASH and _PERCPU_CGROUP_STORAGE: a value for each CPU the kernel may have."""


class Map:
    """A map of a loaded object. What fails at run time is an OSError with the kernel's errno."""

    def __init__(self, owner: Object, pointer: int) -> None:
        library = libbpf()
        self._owner, self._pointer = owner, pointer
        self.name: str = library.bpf_map__name(pointer).decode()
        """Its name in C; of a section's map, the section's."""
        self.type: int = library.bpf_map__type(pointer)
        self.key_size: int = library.bpf_map__key_size(pointer)
        self.value_size: int = library.bpf_map__value_size(pointer)
        self.max_entries: int = library.bpf_map__max_entries(pointer)
        self.flags: int = library.bpf_map__map_flags(pointer)
        self._fd: int = library.bpf_map__fd(pointer)
        self._cpus = library.libbpf_num_possible_cpus() if self.type in PERCPU else 0
        self._stride = -(-self.value_size // 8) * 8
        self._mapped: np.ndarray[Any, Any] | None = None

    @property
    def fd(self) -> int:
        """Its descriptor, which the object owns: good until that is closed."""
        self._owner.check_open()
        return self._fd

    def mmap(self, dtype: Any = None) -> np.ndarray[Any, Any]:
        """The map's own memory, shared with the kernel: no system call to read or write it.

        Bytes (uint8) of all its values, or one element of `dtype` an entry. Each value starts at a multiple of 8 bytes. Read-only for `.rodata`.
        The array stays good after the object is closed, though no program is left to share it with. Raises BpfError if the map is not mmap-able.
        """
        if not self.flags & MMAPABLE:
            raise BpfError(f"map {self.name} is not mmap-able: give it the flag BPF_F_MMAPABLE, or make it a global variable that is not static")
        if self._mapped is None:
            rights = mmap.PROT_READ | (0 if self.flags & RDONLY_PROG else mmap.PROT_WRITE)
            bytes_ = self.max_entries * self._stride
            self._mapped = np.frombuffer(mmap.mmap(self.fd, -(-bytes_ // mmap.PAGESIZE) * mmap.PAGESIZE, mmap.MAP_SHARED, rights), np.uint8)
        if dtype is None:
            return self._mapped[: (self.max_entries - 1) * self._stride + self.value_size]
        form = np.dtype(dtype)
        if form.itemsize > self._stride:
            raise ValueError(f"map {self.name} has values of {self.value_size} bytes, not {form.itemsize}")
        return np.ndarray((self.max_entries,), form, self._mapped, strides=(self._stride,))

    def get(self, key: Bytes) -> Any:
        """The value of a key in bytes, or None; for a per-CPU map a list of them, one for each CPU the kernel may have."""
        value = ctypes.create_string_buffer(self._stride * self._cpus or self.value_size)
        code = libbpf().bpf_map_lookup_elem(self.fd, self._key(key), value)
        if code == -errno.ENOENT:
            return None
        self._check(code)
        if self._cpus:
            return [value.raw[cpu * self._stride :][: self.value_size] for cpu in range(self._cpus)]
        return value.raw

    def set(self, key: Bytes, value: Bytes | list[Bytes]) -> None:
        """Set the value of a key; for a per-CPU map, of each CPU (a list), or one value for all."""
        if self._cpus:
            values = value if isinstance(value, list) else [value] * self._cpus
            memory = b"".join(self._value(each).ljust(self._stride, b"\0") for each in values)
        elif isinstance(value, list):
            raise TypeError(f"map {self.name} is not per CPU: it takes one value")
        else:
            memory = self._value(value)
        self._check(libbpf().bpf_map_update_elem(self.fd, self._key(key), memory, 0))

    def delete(self, key: Bytes) -> bool:
        """Remove a key; False if it was not there."""
        code = libbpf().bpf_map_delete_elem(self.fd, self._key(key))
        if code != -errno.ENOENT:
            self._check(code)
        return code == 0

    def items(self) -> Iterator[tuple[bytes, Any]]:
        """All keys with their values, as `get` returns them. Entries that come or go meanwhile may be missed, or be seen twice."""
        key, following = None, ctypes.create_string_buffer(self.key_size)
        while True:
            code = libbpf().bpf_map_get_next_key(self.fd, key, following)
            if code == -errno.ENOENT:
                return
            self._check(code)
            key = following.raw
            value = self.get(key)
            if value is not None:
                yield key, value

    def pin(self, path: str | Path) -> None:
        """Keep the map under that path of a BPF file system (/sys/fs/bpf), also without us; `Path.unlink` lets it go."""
        with listen() as talk:
            code = libbpf().bpf_map__pin(self.pointer, os.fsencode(path))
        if code < 0:
            raise pin_refused(f"map {self.name}", path, code, talk.log)

    @property
    def pointer(self) -> int:
        """What libbpf knows the map by."""
        self._owner.check_open()
        return self._pointer

    def _key(self, key: Bytes) -> bytes:
        return packed(key, self.key_size, f"a key of map {self.name}")

    def _value(self, value: Bytes) -> bytes:
        return packed(value, self.value_size, f"a value of map {self.name}")

    def _check(self, code: int) -> None:
        if code < 0:
            raise OSError(-code, f"map {self.name}: {os.strerror(-code)}")


def packed(value: Any, size: int, what: str) -> bytes:
    """The `size` bytes of a value. Raises ValueError if it has more or fewer, or is too large an integer."""
    if isinstance(value, int):
        if value.bit_length() + (value < 0) > 8 * size:
            raise ValueError(f"{what} has {size} bytes, too few for {value}")
        return value.to_bytes(size, sys.byteorder, signed=value < 0)
    made = memoryview(value).tobytes()
    if len(made) != size:
        raise ValueError(f"{what} has {size} bytes, not {len(made)}")
    return made


def pin_refused(what: str, path: str | Path, code: int, log: str) -> BpfError:
    """The error for a pin that failed."""
    if abs(code) == errno.EEXIST:
        return BpfError(f"cannot pin {what}: {path} is there already; remove it, or take another path")
    if "not on BPF" in log or "not in BPF FS" in log:
        return BpfError(f"cannot pin {what}: {path} is not in a BPF file system: mount -t bpf bpf /sys/fs/bpf")
    return refused(f"pin {what} to {path}", code, log)
