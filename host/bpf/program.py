"""A program in the kernel, and the link that holds it where it was attached."""

from __future__ import annotations

import ctypes
import os
import weakref
from ctypes import addressof, byref, sizeof
from pathlib import Path
from typing import TYPE_CHECKING

from waveos.host.bpf.library import TestRun, last_errno, libbpf, listen, refused, test_run
from waveos.host.bpf.map import pin_refused

if TYPE_CHECKING:
    from waveos.host.bpf.object import Object

SYSCALL, STRUCT_OPS = 31, 27
"""BPF_PROG_TYPE_SYSCALL and BPF_PROG_TYPE_STRUCT_OPS: run by hand, and attached through their map."""


class Link:
    """Something attached. `destroy` detaches; so does closing the object, leaving Python, or being killed (the kernel closes the descriptor)."""

    def __init__(self, owner: Object, pointer: int, name: str) -> None:
        self.name = name
        self._pointer, self._owner = pointer, owner
        self._destroy = weakref.finalize(self, libbpf().bpf_link__destroy, pointer)
        owner.keep(self)

    @property
    def fd(self) -> int:
        """Its descriptor: good until it is destroyed."""
        return libbpf().bpf_link__fd(self._alive())

    @property
    def attached(self) -> bool:
        """Not destroyed yet."""
        return self._destroy.alive

    def destroy(self) -> None:
        """Detach. Twice does no harm."""
        self._destroy()

    def pin(self, path: str | Path) -> None:
        """Stay attached, also without us, while that path of a BPF file system is there; `Path.unlink` lets go."""
        with listen() as talk:
            code = libbpf().bpf_link__pin(self._alive(), os.fsencode(path))
        if code < 0:
            raise pin_refused(f"link {self.name}", path, code, talk.log)

    def _alive(self) -> int:
        if not self.attached:
            raise ValueError(f"link {self.name} is destroyed")
        return self._pointer


class Program:
    """A program of a loaded object."""

    def __init__(self, owner: Object, pointer: int) -> None:
        library = libbpf()
        self._owner, self._pointer = owner, pointer
        self.name: str = library.bpf_program__name(pointer).decode()
        self.section: str = library.bpf_program__section_name(pointer).decode()
        self.type: int = library.bpf_program__type(pointer)
        self._fd: int = library.bpf_program__fd(pointer)
        self._options = TestRun(sz=sizeof(TestRun))
        self._pointer_to_options = byref(self._options)
        self._context: ctypes.Structure | ctypes.Array | None = None
        self._test_run = test_run()

    @property
    def fd(self) -> int:
        """Its descriptor, which the object owns: good until that is closed."""
        self._owner.check_open()
        return self._fd

    def attach(self) -> Link:
        """Attach where its section says (tracepoint, function, cgroup, ...)."""
        with listen() as talk:
            pointer = libbpf().bpf_program__attach(self.pointer)
        if not pointer:
            raise refused(f"attach program {self.name!r}", last_errno(), talk.log)
        return Link(self._owner, pointer, self.name)

    def run(self, context: ctypes.Structure | ctypes.Array | bytes | None = None) -> int:
        """Run a SEC("syscall") program now, in this thread; what it returns. It may write into a `ctypes` context.

        About as cheap as a system call from Python can be, and cheapest with the same context as the last time. Raises OSError
        if the kernel does not run it: EINVAL if the context is smaller than what the program reads of it.
        """
        options = self._options
        if context is not self._context:
            self._point_at(context)
        code = self._test_run(self._fd, self._pointer_to_options)
        if code < 0:
            self._owner.check_open()
            raise OSError(-code, f"program {self.name}: {os.strerror(-code)}")
        return options.retval

    def pin(self, path: str | Path) -> None:
        """Keep the program under that path of a BPF file system, also without us; `Path.unlink` lets it go."""
        with listen() as talk:
            code = libbpf().bpf_program__pin(self.pointer, os.fsencode(path))
        if code < 0:
            raise pin_refused(f"program {self.name}", path, code, talk.log)

    def forget(self) -> None:
        """The object was closed: its descriptor may soon be another's."""
        self._fd = -1

    @property
    def pointer(self) -> int:
        """What libbpf knows the program by."""
        self._owner.check_open()
        return self._pointer

    def _point_at(self, context: ctypes.Structure | ctypes.Array | bytes | None) -> None:
        memory = ctypes.create_string_buffer(context, len(context)) if isinstance(context, bytes) else context
        self._options.ctx_in = addressof(memory) if memory is not None else None
        self._options.ctx_size_in = sizeof(memory) if memory is not None else 0
        self._context = memory
