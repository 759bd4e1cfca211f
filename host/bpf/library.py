"""libbpf through ctypes: the functions we use with their types, what libbpf says, and errors that explain.

libbpf comes from the system (1.4 or newer: links of struct_ops). It is loaded at the first use, so that importing costs nothing and a machine
without it can be told so. What it says is kept while one of its functions runs (`Talk`) and shown only if that fails.
"""

from __future__ import annotations

import ctypes
import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import CFUNCTYPE, POINTER, c_bool, c_char_p, c_int, c_int32, c_size_t, c_uint32, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

from waveos.errors import MissingError

LEAST = (1, 4)
GET_LIBBPF = "install libbpf1 >= 1.4 (Debian 12: from bookworm-backports; `make setup` as root does it)"
GET_RIGHTS = "be root, or have CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN (for schedulers CAP_SYS_ADMIN)"
BTF = Path("/sys/kernel/btf/vmlinux")
TOLD_LINES = 12
"""So many last lines of libbpf's log are part of an error's message; `BpfError.log` has all."""


class BpfError(MissingError):
    """This kernel or its libbpf cannot, or may not, do what was asked. `log`: what libbpf said, the verifier's words included."""

    def __init__(self, message: str, log: str = "") -> None:
        tail = [line for line in log.splitlines() if line.strip()][-TOLD_LINES:]
        super().__init__("\n  ".join([message, *tail]))
        self.log = log


class TestRun(ctypes.Structure):
    """struct bpf_test_run_opts."""

    _fields_ = [
        ("sz", c_size_t),
        ("data_in", c_void_p),
        ("data_out", c_void_p),
        ("data_size_in", c_uint32),
        ("data_size_out", c_uint32),
        ("ctx_in", c_void_p),
        ("ctx_out", c_void_p),
        ("ctx_size_in", c_uint32),
        ("ctx_size_out", c_uint32),
        ("retval", c_int32),  # u32 in C; programs return int
        ("repeat", c_int),
        ("duration", c_uint32),
        ("flags", c_uint32),
        ("cpu", c_uint32),
        ("batch_size", c_uint32),
    ]


class BtfType(ctypes.Structure):
    """struct btf_type; for a section (BTF_KIND_DATASEC) as many `SectionVariable` follow as the low 16 bits of `info` say."""

    _fields_ = [("name_off", c_uint32), ("info", c_uint32), ("size", c_uint32)]


class SectionVariable(ctypes.Structure):
    """struct btf_var_secinfo."""

    _fields_ = [("type", c_uint32), ("offset", c_uint32), ("size", c_uint32)]


SAMPLE = CFUNCTYPE(c_int, c_void_p, c_void_p, c_size_t)
"""ring_buffer_sample_fn: context, data, size; a negative answer ends the round."""
_PRINT = CFUNCTYPE(c_int, c_int, c_char_p, c_void_p)

_POINTER, _CODE = c_void_p, c_int  # what is returned: NULL and errno, or a negative errno
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "bpf_object__open_file": (_POINTER, c_char_p, c_void_p),
    "bpf_object__load": (_CODE, c_void_p),
    "bpf_object__close": (None, c_void_p),
    "bpf_object__btf": (_POINTER, c_void_p),
    "bpf_object__next_program": (_POINTER, c_void_p, c_void_p),
    "bpf_object__next_map": (_POINTER, c_void_p, c_void_p),
    "bpf_program__name": (c_char_p, c_void_p),
    "bpf_program__section_name": (c_char_p, c_void_p),
    "bpf_program__type": (c_int, c_void_p),
    "bpf_program__set_autoload": (_CODE, c_void_p, c_bool),
    "bpf_program__autoload": (c_bool, c_void_p),
    "bpf_program__fd": (c_int, c_void_p),
    "bpf_program__attach": (_POINTER, c_void_p),
    "bpf_program__pin": (_CODE, c_void_p, c_char_p),
    "bpf_map__name": (c_char_p, c_void_p),
    "bpf_map__fd": (c_int, c_void_p),
    "bpf_map__type": (c_int, c_void_p),
    "bpf_map__key_size": (c_uint32, c_void_p),
    "bpf_map__value_size": (c_uint32, c_void_p),
    "bpf_map__max_entries": (c_uint32, c_void_p),
    "bpf_map__map_flags": (c_uint32, c_void_p),
    "bpf_map__is_internal": (c_bool, c_void_p),
    "bpf_map__set_max_entries": (_CODE, c_void_p, c_uint32),
    "bpf_map__initial_value": (_POINTER, c_void_p, POINTER(c_size_t)),
    "bpf_map__attach_struct_ops": (_POINTER, c_void_p),
    "bpf_map__pin": (_CODE, c_void_p, c_char_p),
    "bpf_link__fd": (c_int, c_void_p),
    "bpf_link__destroy": (_CODE, c_void_p),
    "bpf_link__pin": (_CODE, c_void_p, c_char_p),
    "bpf_map_lookup_elem": (_CODE, c_int, c_void_p, c_void_p),
    "bpf_map_update_elem": (_CODE, c_int, c_void_p, c_void_p, ctypes.c_uint64),
    "bpf_map_delete_elem": (_CODE, c_int, c_void_p),
    "bpf_map_get_next_key": (_CODE, c_int, c_void_p, c_void_p),
    "btf__find_by_name_kind": (_CODE, c_void_p, c_char_p, c_uint32),
    "btf__type_by_id": (_POINTER, c_void_p, c_uint32),
    "btf__name_by_offset": (c_char_p, c_void_p, c_uint32),
    "ring_buffer__new": (_POINTER, c_int, SAMPLE, c_void_p, c_void_p),
    "ring_buffer__consume": (_CODE, c_void_p),
    "ring_buffer__free": (None, c_void_p),
    "user_ring_buffer__new": (_POINTER, c_int, c_void_p),
    "user_ring_buffer__reserve": (_POINTER, c_void_p, c_uint32),
    "user_ring_buffer__submit": (None, c_void_p, c_void_p),
    "user_ring_buffer__free": (None, c_void_p),
    "libbpf_num_possible_cpus": (_CODE,),
    "libbpf_strerror": (_CODE, c_int, c_char_p, c_size_t),
    "libbpf_set_print": (c_void_p, _PRINT),
}


@cache
def libbpf() -> Any:
    """The library, with the types of what we call. Raises BpfError if it is missing or too old."""
    try:
        library = ctypes.CDLL("libbpf.so.1", use_errno=True)
    except OSError:
        raise BpfError(f"libbpf is missing, which loads BPF programs: {GET_LIBBPF}") from None
    found = (library.libbpf_major_version(), library.libbpf_minor_version())
    if found < LEAST:
        raise BpfError(f"libbpf {found[0]}.{found[1]} is too old to load our BPF programs: {GET_LIBBPF}")
    for name, (answer, *arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = answer, arguments
    library.libbpf_set_print(_hear)
    return library


def version() -> str:
    """The version of the library ("1.4"). Raises BpfError as `libbpf` does."""
    return f"{libbpf().libbpf_major_version()}.{libbpf().libbpf_minor_version()}"


@cache
def test_run() -> Any:
    """bpf_prog_test_run_opts, called without giving up the interpreter's lock: a program's run is short, and getting the lock back may not be."""
    libbpf()
    function = ctypes.PyDLL("libbpf.so.1").bpf_prog_test_run_opts
    function.restype, function.argtypes = c_int, [c_int, c_void_p]
    return function


class Talk:
    """What libbpf says while the `with` block runs."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    @property
    def log(self) -> str:
        """All of it."""
        return "".join(self.parts)


_listening: list[Talk] = []


@contextmanager
def listen() -> Iterator[Talk]:
    """Keep what libbpf says, instead of having it on stderr."""
    talk = Talk()
    _listening.append(talk)
    try:
        yield talk
    finally:
        _listening.remove(talk)


@_PRINT
def _hear(level: int, form: bytes, arguments: int) -> int:
    """Where libbpf's words go; it knows C's printf. Its debugging (level 2) is not kept."""
    if level < 2 and _listening:
        room = 4_096
        if form.find(b"LOG --") >= 0:  # the verifier's log comes as one string
            room = 1 << 24
        text = ctypes.create_string_buffer(room)
        _printf()(text, room, form, arguments)
        _listening[-1].parts.append(text.value.decode(errors="replace"))
    return 0


@cache
def _printf() -> Any:
    function = ctypes.CDLL(None).vsnprintf
    function.restype, function.argtypes = c_int, [c_char_p, c_size_t, c_char_p, c_void_p]
    return function


def last_errno() -> int:
    """Of the function of libbpf's that has just returned NULL."""
    return ctypes.get_errno()


def refused(what: str, code: int, log: str) -> BpfError:
    """The error for `what` ("load x.bpf.o") that failed with an errno: the reason in one line, first."""
    code = abs(code)
    reason, advice = _reason(code, log)
    return BpfError(f"cannot {what}: {reason}" + (f"; {advice}" if advice else ""), log)


def _reason(code: int, log: str) -> tuple[str, str]:
    """The reason, and what to do about it where that is known."""
    program = re.search(r"prog '([^']+)': -- BEGIN PROG LOAD LOG --", log)
    if program:
        return f"the kernel's verifier refuses program {program[1]!r}: {_verdict(log)}", ""
    ops = re.search(r"struct_ops init_kern[^\n]*?: struct (?:bpf_struct_ops_)?(\w+) is not found", log)
    if ops and ops[1] == "sched_ext_ops":
        return "this kernel has no sched_ext", "it takes Linux 6.12 or newer, built with CONFIG_SCHED_CLASS_EXT"
    if ops:
        return f"this kernel has no struct_ops {ops[1]}", "it takes a newer kernel, or one built with it"
    target = re.search(r"failed to find kernel BTF type ID of '([^']+)'", log)
    if target:
        return f"this kernel has no {target[1]!r} to attach to", "leave that program out, or use another kernel"
    if code == errno.EPERM:
        return "not allowed", GET_RIGHTS
    if not BTF.exists():
        return f"this kernel has no BTF ({BTF})", "it takes one built with CONFIG_DEBUG_INFO_BTF, as distributions ship"
    text = ctypes.create_string_buffer(256)
    libbpf().libbpf_strerror(code, text, len(text))  # it has codes of its own, too
    return text.value.decode(), ""


def _verdict(log: str) -> str:
    """What the verifier says last, before its statistics."""
    inside = log.split("-- BEGIN PROG LOAD LOG --", 1)[1].split("-- END PROG LOAD LOG --", 1)[0]
    lines = [line.strip() for line in inside.splitlines() if line.strip()]
    lines = [line for line in lines if not re.match(r"processed \d+ insns|verification time|stack depth|max_states", line)]
    return lines[-1] if lines else "it gives no reason"
