"""A BPF object: the programs and maps of one compiled file, loaded into this kernel.

    with Object("host/sched/priority.bpf.o", rodata={"limit": 5}, without=["optional"]) as bpf:
        bpf.attach()
        table = bpf.section(".bss.host").view(HOST)
        bpf.program("start").run()

What was loaded and attached goes when the object is closed: at the end of `with`, by `close`, when Python ends, when nothing refers to it any more, and
if the process is killed (the kernel closes its descriptors). Only what was pinned stays.
"""

from __future__ import annotations

import ctypes
import errno
import os
import weakref
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np

from waveos.host.bpf.library import BpfError, BtfType, SectionVariable, last_errno, libbpf, listen, refused
from waveos.host.bpf.map import Bytes, Map, packed
from waveos.host.bpf.program import STRUCT_OPS, SYSCALL, Link, Program
from waveos.names import nearest

DATASEC = 15
DATA = (".rodata", ".data", ".bss")
STRUCT_OPS_MAP = 26


class Object:
    """A loaded object. Not safe for threads.

    `rodata`: values of global variables before the load, by name (the verifier takes constants as such); `sizes`: `max_entries` of maps;
    `without`: programs to leave out. Raises BpfError, with libbpf's log where it is of use; then nothing is left in the kernel. ValueError:
    a value of the wrong size.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        rodata: Mapping[str, Bytes] | None = None,
        sizes: Mapping[str, int] | None = None,
        without: Iterable[str] = (),
    ) -> None:
        self.path = Path(path)
        self._links: list[Link] = []
        library = libbpf()
        if not self.path.is_file():
            raise BpfError(f"{self.path} is not there: BPF programs are compiled by `make bpf` (with clang); an installed wheel brings them")
        with listen() as talk:
            pointer = library.bpf_object__open_file(os.fsencode(self.path), None)
            if not pointer:
                raise refused(f"open {self.path}", last_errno(), talk.log)
            self._pointer: int = pointer
            self._close = weakref.finalize(self, library.bpf_object__close, pointer)
            try:
                self._prepare(rodata or {}, sizes or {}, without)
                code = library.bpf_object__load(pointer)
                if code < 0:
                    raise refused(f"load {self.path.name}", code, talk.log)
            except BaseException:
                self._close()
                raise
        self._programs = {name: Program(self, at) for name, at in self._walk_programs().items() if library.bpf_program__autoload(at)}
        self._maps: dict[str, Map] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Detach all links, newest first, and let programs and maps go. Twice does no harm."""
        while self._links:
            self._links.pop().destroy()
        for program in self._programs.values():
            program.forget()
        self._close()

    @property
    def closed(self) -> bool:
        """`close` was called."""
        return not self._close.alive

    def check_open(self) -> None:
        """Raises ValueError if the object is closed."""
        if not self._close.alive:
            raise ValueError(f"{self.path.name} is closed")

    def program(self, name: str) -> Program:
        """The program of that name. Raises BpfError if there is none, or it was left out."""
        self.check_open()
        return self._programs.get(name) or self._unknown("program", name, self._programs)

    def map(self, name: str) -> Map:
        """The map of that name; that of a section (".bss", ".data.acts") goes by the section's. Raises BpfError if there is none."""
        self.check_open()
        if name not in self._maps:
            known = self._walk_maps()
            self._maps[name] = Map(self, known.get(name) or self._unknown("map", name, known))
        return self._maps[name]

    def section(self, name: str) -> np.ndarray[Any, Any]:
        """The memory of a section of global variables (".bss.host"), shared with the programs: bytes, of the section's exact size."""
        return self.map(name).mmap()

    def attach(self, *names: str) -> list[Link]:
        """Attach those programs, or all that attach by themselves (no syscall programs, no struct_ops). All, or none and an error."""
        chosen = [self.program(name) for name in names] or [each for each in self._programs.values() if each.type not in (SYSCALL, STRUCT_OPS)]
        links: list[Link] = []
        try:
            for program in chosen:
                links.append(program.attach())
        except BaseException:
            for link in reversed(links):
                link.destroy()
            raise
        return links

    def struct_ops(self, name: str) -> Link:
        """Register the struct_ops of that name (SEC(".struct_ops.link")) with the kernel, until the link is destroyed."""
        ops = self.map(name)
        if ops.type != STRUCT_OPS_MAP:
            raise BpfError(f"{name} of {self.path.name} is no struct_ops")
        with listen() as talk:
            pointer = libbpf().bpf_map__attach_struct_ops(ops.pointer)
        if not pointer:
            if (code := last_errno()) in (errno.EEXIST, errno.EBUSY):
                raise BpfError(f"cannot register {name} of {self.path.name}: the kernel has one already; stop its owner first", talk.log)
            raise refused(f"register {name} of {self.path.name}", code, talk.log)
        return Link(self, pointer, name)

    def keep(self, link: Link) -> None:
        """A link was made of a part of this object: it lives as long."""
        self._links = [each for each in self._links if each.attached] + [link]

    def _prepare(self, values: Mapping[str, Bytes], sizes: Mapping[str, int], without: Iterable[str]) -> None:
        """What can be changed only between open and load."""
        library = libbpf()
        programs, maps = self._walk_programs(), self._walk_maps()
        for name in without:
            library.bpf_program__set_autoload(programs.get(name) or self._unknown("program", name, programs), False)
        for name, size in sizes.items():
            if library.bpf_map__set_max_entries(maps.get(name) or self._unknown("map", name, maps), size) < 0:
                raise BpfError(f"map {name} of {self.path.name} cannot have {size} entries")
        if values:
            variables = self._variables(maps)
            for name, value in values.items():
                address, size = variables.get(name) or self._unknown("global variable", name, variables)
                ctypes.memmove(address, packed(value, size, f"{name} of {self.path.name}"), size)

    def _variables(self, maps: Mapping[str, int]) -> dict[str, tuple[int, int]]:
        """Global variables by name: where their value before the load is, and its size. From the object's BTF."""
        library, found, size = libbpf(), {}, ctypes.c_size_t()
        btf = library.bpf_object__btf(self._pointer)
        for section, at in maps.items():
            start = library.bpf_map__initial_value(at, ctypes.byref(size)) if section.startswith(DATA) else None
            number = library.btf__find_by_name_kind(btf, section.encode(), DATASEC) if start else -1
            if number < 0:
                continue
            place = library.btf__type_by_id(btf, number)
            variables = SectionVariable * (BtfType.from_address(place).info & 0xFFFF)
            for each in variables.from_address(place + ctypes.sizeof(BtfType)):
                variable = BtfType.from_address(library.btf__type_by_id(btf, each.type))
                found[library.btf__name_by_offset(btf, variable.name_off).decode()] = (start + each.offset, each.size)
        return found

    def _walk_programs(self) -> dict[str, int]:
        return {libbpf().bpf_program__name(at).decode(): at for at in _walk(partial(libbpf().bpf_object__next_program, self._pointer))}

    def _walk_maps(self) -> dict[str, int]:
        """Maps by name. The kernel's name of a plain section's map has the object's name in front ("priority.bss"): not ours."""
        found = {}
        for at in _walk(partial(libbpf().bpf_object__next_map, self._pointer)):
            name = libbpf().bpf_map__name(at).decode()
            if libbpf().bpf_map__is_internal(at) and not name.startswith("."):
                name = name[name.index(".") :]
            found[name] = at
        return found

    def _unknown(self, what: str, name: str, known: Iterable[str]) -> Any:
        known = sorted(known)
        raise BpfError(f"{self.path.name} has no {what} {name!r}{nearest(name, known)}; it has: {', '.join(known) or 'none'}")


def _walk(following: Any) -> Iterable[int]:
    at = following(None)
    while at:
        yield at
        at = following(at)
