"""From a policy class to something that can be called: its state as one block of memory, and `dispatch` at an address.

Compiled, `dispatch` is generated, compiled by numba to a C function and kept on disk under a name that hashes everything it is made of.
With WAVE_JIT=0, or `compiled=False`, the same handlers run as plain Python behind a ctypes callback with the same signature.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FunctionType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
from numba import carray, cfunc, njit, types
from numba.core.errors import NumbaWarning

from waveos.errors import PolicyError
from waveos.jit import as_pointer, jit_wanted
from waveos.output import write_file
from waveos.paths import cache_dir
from waveos.policy.reason import is_raised_by, last_line, why_not_compiled

if TYPE_CHECKING:
    from waveos.policy.policy import Policy

RAISED = 1
_COMPILED: dict[str, Any] = {}  # by fingerprint: what this process has compiled or loaded
_SIGNATURE = types.int64(types.int64, types.int64, types.int64)
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)


@dataclass
class Bound:
    """A policy ready to run. `address` is `int64 dispatch(int64 state, int64 message, int64 orders)`; nonzero means that a handler raised."""

    policy: type[Policy]
    state: np.ndarray[Any, Any]  # one structured record: parameters, `cpus`, declared state
    initial: np.ndarray[Any, Any]  # the bytes of `state` that are not zero at first: parameters and `cpus`
    address: int
    handlers: int  # bit t set: there is a handler for message type t
    keep: Any  # what the address points into
    failure: list[BaseException]  # what a plain handler raised
    fingerprint: str  # of all that the handlers consist of

    @property
    def state_address(self) -> int:
        return int(self.state.ctypes.data)

    def explain(self, message: np.ndarray[Any, Any], orders: np.ndarray[Any, Any] | None = None) -> str:
        """Why the handler of `message` raised, found by running it once more as plain Python on a copy of the state, and of `orders` if it reads there.

        What only passed through a plain handler (Ctrl-C, the end of a process, a pipe that closed) is raised again here.
        """
        if self.failure:
            error = self.failure[-1]
            if _passes(error) and not (isinstance(error, SystemExit) and is_raised_by(self.policy, error)):
                raise error
            return last_line(error, self.policy)
        name = _handler_name(self.policy, int(message["type"][0]))
        given = np.zeros(1, self.policy.subsystem.ORDERS) if orders is None else orders.copy()
        given["n"] = 0
        try:
            self.policy.handlers[name](_plain(self.state.copy()), _plain_message(message), _plain(given))
        except Exception as error:
            return last_line(error, self.policy)
        return "run it with WAVE_JIT=0 for the traceback"


def bind(policy: type[Policy], n_cpus: int, params: dict[str, float]) -> Bound:
    """Memory and entry point for one user of `policy`."""
    dtype = _state_dtype(policy)
    state = np.zeros(1, dtype)
    state["cpus"] = n_cpus
    for key, value in params.items():
        state[key] = value
    handlers = sum(1 << code for name, code in policy.subsystem.HANDLERS.items() if name in policy.handlers)
    failure: list[BaseException] = []
    source = _dispatch_source(policy)
    fingerprint = _fingerprint(policy, source, dtype)
    if policy.compiled and jit_wanted():
        if fingerprint not in _COMPILED:
            _COMPILED[fingerprint] = _compile(policy, dtype, source, fingerprint)
        keep: Any = _COMPILED[fingerprint]
        address = int(keep.address)
    else:
        keep = _interpret(policy, dtype, failure)
        address = int(ctypes.cast(keep, ctypes.c_void_p).value or 0)
    return Bound(policy, state, state.view(np.uint8)[: _head_bytes(policy, dtype)].copy(), address, handlers, keep, failure, fingerprint)


def _state_dtype(policy: type[Policy]) -> np.dtype[Any]:
    """`cpus`, the parameters as float64, then the declared state."""
    scalars = [("cpus", "i8"), *((name, "f8") for name in policy.params)]
    return np.dtype([*scalars, *policy.fields.items()], align=True)


def _head_bytes(policy: type[Policy], dtype: np.dtype[Any]) -> int:
    """Where the declared state begins, which is zero at first."""
    return min((int(dtype.fields[name][1]) for name in policy.fields), default=dtype.itemsize)  # type: ignore[index]


def _handler_name(policy: type[Policy], code: int) -> str:
    names: dict[str, int] = policy.subsystem.HANDLERS
    return next(name for name, value in names.items() if value == code)


def _dispatch_source(policy: type[Policy]) -> str:
    arms = "".join(
        f"        {'elif' if i else 'if'} kind == {policy.subsystem.HANDLERS[name]}:\n            {name}(s, m, t)\n"
        for i, name in enumerate(policy.handlers)
    )
    return (
        f'"""Generated from policy {policy.name!r}."""\n\n'
        "def dispatch(state, message, orders):\n"
        "    s = carray(as_pointer(state), 1, STATE)[0]\n"
        "    m = carray(as_pointer(message), 1, MESSAGE)[0]\n"
        "    t = carray(as_pointer(orders), 1, ORDERS)[0]\n"
        "    kind = m.type\n"
        "    try:\n" + arms + "    except Exception:\n        return 1\n    return 0\n"
    )


def _compile(policy: type[Policy], dtype: np.dtype[Any], source: str, fingerprint: str) -> Any:
    path = cache_dir("policies") / f"{policy.name}_{fingerprint}.py"
    if not path.exists():
        write_file(path, source)
    space: dict[str, Any] = {
        "__name__": __name__,
        "carray": carray,
        "as_pointer": as_pointer,
        "STATE": dtype,
        "MESSAGE": policy.subsystem.MESSAGE,
        "ORDERS": policy.subsystem.ORDERS,
    }
    space.update({name: njit(boundscheck=True)(handler) for name, handler in policy.handlers.items()})
    exec(compile(source, str(path), "exec"), space)  # the text just made above
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NumbaWarning)  # they name the file generated above
            return cfunc(_SIGNATURE, cache=True)(space["dispatch"])
    except (OSError, MemoryError):  # the cache's, no fault of the policy
        raise
    except Exception as error:  # numba lets KeyError and AttributeError of its own through
        raise PolicyError(f"policy {policy.name!r} cannot be compiled: {why_not_compiled(policy, error)}") from error


def _fingerprint(policy: type[Policy], source: str, dtype: np.dtype[Any]) -> str:
    """A hash of all that goes into the compiled code: the handlers, what they call, the records, numba's and this layout's version; and the names of their
    modules, which numba imports when it loads compiled code again."""
    digest = hashlib.sha256(
        f"{numba.__version__} {np.__version__} {source} {dtype.descr} {policy.subsystem.MESSAGE.fields} {policy.subsystem.ORDERS.descr}".encode()
    )
    seen: set[int] = set()

    def add(function: Callable[..., Any]) -> None:
        function = getattr(function, "py_func", function)
        if not isinstance(function, FunctionType) or id(function) in seen:
            return
        seen.add(id(function))
        digest.update(f"{function.__module__} ".encode())
        _add_code(digest, function.__code__)
        digest.update(repr(function.__defaults__).encode())
        for name in _names(function.__code__):
            value = function.__globals__.get(name)
            if isinstance(value, np.ndarray):
                digest.update(name.encode() + value.tobytes())
            elif isinstance(value, (int, float, str, tuple, np.generic)):
                digest.update(f"{name}={value!r}".encode())
            elif callable(value):
                add(value)
            elif hasattr(value, "__name__"):  # a module: what is called through it
                for inner in _names(function.__code__):
                    called = getattr(value, inner, None)
                    if isinstance(called, (int, float)):
                        digest.update(f"{inner}={called!r}".encode())
                    elif callable(called):
                        add(called)

    for handler in policy.handlers.values():
        add(handler)
    return digest.hexdigest()[:16]


def _names(code: CodeType) -> list[str]:
    """Names that the code, and code inside it, may look up."""
    inner = [name for constant in code.co_consts if isinstance(constant, CodeType) for name in _names(constant)]
    return sorted({*code.co_names, *inner})


def _add_code(digest: Any, code: CodeType) -> None:
    digest.update(code.co_code)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            _add_code(digest, constant)
        else:
            digest.update(repr(constant).encode())


def _plain_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The same layout with attribute access at every level."""
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return np.dtype((_plain_dtype(base), shape))
    if dtype.fields is None:
        return dtype
    names = list(dtype.names or ())
    layout = {
        "names": names,
        "formats": [_plain_dtype(dtype.fields[name][0]) for name in names],
        "offsets": [dtype.fields[name][1] for name in names],
        "itemsize": dtype.itemsize,
    }
    return np.dtype((np.record, np.dtype(layout)))  # type: ignore[call-overload]


def _plain(record: np.ndarray[Any, Any]) -> Any:
    """[1] records as one whose fields are attributes that can be assigned to."""
    return record.view(_plain_dtype(record.dtype)).view(np.recarray)[0]


def _plain_message(record: np.ndarray[Any, Any]) -> Any:
    """A message for reading: Python's integers, which do not wrap, as compiled code has 64 bits where the record has 8."""
    return SimpleNamespace(**dict(zip(record.dtype.names or (), record[0].item(), strict=True)))


def _interpret(policy: type[Policy], dtype: np.dtype[Any], failure: list[BaseException]) -> Any:
    """The handlers as they stand, behind a C callback. What they raise is kept and told by the one who runs them."""
    views: dict[int, Any] = {}
    message_dtype, orders_dtype = policy.subsystem.MESSAGE, policy.subsystem.ORDERS
    arms = {code: policy.handlers[name] for name, code in policy.subsystem.HANDLERS.items() if name in policy.handlers}

    def memory(address: int, layout: np.dtype[Any]) -> Any:
        if address not in views:
            views[address] = np.frombuffer(memoryview((ctypes.c_char * layout.itemsize).from_address(address)), layout)
        return views[address]

    def record(address: int, layout: np.dtype[Any]) -> Any:
        if -address not in views:
            views[-address] = _plain(memory(address, layout))
        return views[-address]

    def dispatch(state: int, message: int, orders: int) -> int:
        try:
            msg = _plain_message(memory(message, message_dtype))
            arms[msg.type](record(state, dtype), msg, record(orders, orders_dtype))
        except BaseException as error:  # nothing may pass through the C frame
            failure.append(error)
            if os.environ.get("WAVE_DEBUG") and not _passes(error):
                traceback.print_exc()
            return RAISED
        return 0

    return _CALLBACK(dispatch)


def _passes(error: BaseException) -> bool:
    """Whether it ends more than the handler in which it came up."""
    return not isinstance(error, Exception) or isinstance(error, BrokenPipeError)
