"""numba's decorators with types, so that strict checking sees through them; and the address tricks the compiled parts share."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable

from waveos.paths import cache_dir

F = TypeVar("F", bound=Callable[..., Any])
_IMPORT = re.compile(rb"^\s*(?:from|import) (waveos[\w.]*)(?: import ([^(\n]+|\([^)]*\)))?", re.MULTILINE)
KEPT = 8
"""Generations of compiled code that stay on disk."""


def _choose_cache() -> None:
    """Keep compiled code in a folder named by a hash of all sources that may be part of it: those that name `jit`, and what they import.

    numba looks at a function's own file only: a change in a function that it calls would go unnoticed.
    """
    if "NUMBA_CACHE_DIR" in os.environ:
        root = Path(os.environ["NUMBA_CACHE_DIR"])
    else:
        root = cache_dir("compiled")
    texts = _texts()
    digest = hashlib.sha256(numba.__version__.encode())
    for module in sorted(_reached(texts)):
        digest.update(module.encode() + texts[module])
    folder = root / digest.hexdigest()[:16]
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        others = sorted((each for each in root.iterdir() if each.is_dir() and each != folder), key=lambda each: each.stat().st_mtime, reverse=True)
        for old in others[KEPT - 1 :]:
            shutil.rmtree(old, ignore_errors=True)
    numba.config.CACHE_DIR = str(folder)


def _texts() -> dict[str, bytes]:
    """The sources by module name. Installed, the other rooms are folders in this one; in a checkout they lie beside it."""
    here = Path(__file__).resolve().parent
    top = here if (here / "agents").is_dir() else here.parent
    texts = {}
    for name, folder in {"waveos": here, **{f"waveos.{room}": top / room for room in ("agents", "host", "ipu_emulator", "bench")}}.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            texts[".".join([name, *(part for part in parts if part != "__init__")])] = path.read_bytes()
    return texts


def _reached(texts: dict[str, bytes]) -> set[str]:
    """Modules whose text may be compiled, and all that they import from the project."""
    new = {module for module, text in texts.items() if b"jit" in text and ".cli" not in module}
    reached: set[str] = set()
    while new:
        reached |= new
        named = set()
        for module in new:
            for package, names in _IMPORT.findall(texts[module]):
                named |= {package.decode(), *(f"{package.decode()}.{name}" for name in re.findall(r"\w+", names.decode()))}
        new = named & texts.keys() - reached
    return reached


_choose_cache()


def sources_hash() -> str:
    """The hash of everything that compiled code is made of."""
    return Path(numba.config.CACHE_DIR).name


def jit(function: F) -> F:
    """Compile without Python objects and without the GIL, once; the result is kept on disk beside the source."""
    compiled: F = njit(cache=True, nogil=True, error_model="numpy")(function)
    return compiled


def jit_inline(function: F) -> F:
    """As `jit`, and always made part of its caller: for the small steps of a hot path (about a fifth faster in the engine, a quarter in the laws)."""
    compiled: F = njit(cache=True, nogil=True, error_model="numpy", forceinline=True)(function)
    return compiled


def jitable(function: F) -> F:
    """Let compiled code call this function; called from Python it stays plain Python."""
    plain: F = register_jitable(function)
    return plain


def jitable_inline(function: F) -> F:
    """As `jitable`, and copied into its caller before types are known."""
    plain: F = register_jitable(inline="always")(function)
    return plain


def jitable_checked(function: F) -> F:
    """Likewise for authors of policies: compiled where the handlers are, and an index that is out of bounds raises, as in them."""
    plain: F = register_jitable(boundscheck=True)(function)
    return plain


def jit_wanted() -> bool:
    """False when WAVE_JIT=0: policies then run as plain Python."""
    return os.environ.get("WAVE_JIT", "1") != "0"


@intrinsic
def as_pointer(_context: Any, _address: Any) -> Any:
    """An address as a void pointer, for carray."""
    return types.voidptr(types.int64), lambda _c, builder, _s, args: builder.inttoptr(args[0], cgutils.voidptr_t)


@intrinsic
def call_dispatch(_context: Any, _function: Any, _state: Any, _message: Any, _orders: Any) -> Any:
    """Call `int64 dispatch(int64 state, int64 message, int64 orders)` at an address, so that no engine is compiled anew for a policy."""

    def generate(_c: Any, builder: Any, _s: Any, args: Any) -> Any:
        word = ir.IntType(64)
        pointer = builder.inttoptr(args[0], ir.FunctionType(word, [word] * 3).as_pointer())
        return builder.call(pointer, args[1:])

    return types.int64(types.int64, types.int64, types.int64, types.int64), generate


@intrinsic
def store_word(_context: Any, _address: Any, _value: Any) -> Any:
    """Store a 64-bit word at an address that another process watches; 0 as address: nothing is watched."""

    def generate(_c: Any, builder: Any, _s: Any, args: Any) -> Any:
        with builder.if_then(builder.icmp_unsigned("!=", args[0], ir.Constant(ir.IntType(64), 0))):
            pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
            builder.store_atomic(args[1], pointer, "monotonic", 8)

    return types.void(types.int64, types.int64), generate
