"""The runtime's laws as plain Python, so that one can be broken at a time: the module's own source, without its compiler."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from waveos.policy.bind import _plain
from waveos.sched import laws
from waveos.sched.records import DECISION, Message

SOURCE = Path(laws.__file__).read_text()


def interpret_laws(old: str = "", new: str = "") -> dict[str, Any]:
    """The names of `waveos.sched.laws`, its functions interpreted, with `old` (which must be there once) replaced by `new`."""
    source = SOURCE
    if old:
        if source.count(old) != 1:  # no AssertionError: that is what a broken law raises
            raise LookupError(f"{old!r} is {source.count(old)} times in {laws.__file__}: mend this test")
        source = source.replace(old, new)
    assert "import as_pointer, call_dispatch, jit, jit_inline, store_word\n" in source
    # A module of its own name in sys.modules is what dataclasses and pickles look for; nothing here needs it.
    space: dict[str, Any] = {"__name__": "interpreted_laws", "__file__": laws.__file__}
    source = source.replace(
        "from waveos.jit import as_pointer, call_dispatch, jit, jit_inline, store_word\n", "jit = jit_inline = lambda function: function\n"
    )
    exec(compile(source, laws.__file__, "exec"), space)
    space["store_word"] = lambda address, value: None
    space["as_pointer"] = lambda address: address
    space["carray"] = lambda address, length, dtype: np.frombuffer((ctypes.c_uint8 * length).from_address(address), dtype)
    return space


def unpack(dtype: np.dtype[Any], sizes: dict[str, int]) -> Any:
    """A plain Python object with the fields of a dtype, all zero; arrays as lists, `sizes` long where a field is named there."""
    made = SimpleNamespace()
    for name in dtype.names or ():
        of = dtype.fields[name][0]
        if of.subdtype is None:
            setattr(made, name, unpack(of, {}) if of.fields else 0)
        else:
            base, (length,) = of.subdtype
            setattr(made, name, [unpack(base, {}) if base.fields else 0 for _ in range(sizes.get(name, length))])
    return made


def pack(objects: list[Any], dtype: np.dtype[Any]) -> Any:
    """The reverse for a list of them."""
    return np.array([tuple(getattr(each, name) for name in dtype.names or ()) for each in objects], dtype)


def values_of(record: np.void) -> SimpleNamespace:
    """A record as plain Python integers."""
    return SimpleNamespace(**dict(zip(record.dtype.names, record.tolist(), strict=True)))


@dataclass
class Interpreted:
    """What `waveos.testing.Replayed` is, over interpreted laws; `mutation` is the one in use."""

    policy: Any
    cpus: int
    threads: int
    ahead: int = 0
    params: dict[str, float] = field(default_factory=dict)

    mutation: ClassVar[tuple[str, str]] = ("", "")

    def __post_init__(self) -> None:
        self.laws = interpret_laws(*self.mutation)
        self.laws["call_dispatch"] = self._dispatch
        self.bound = self.policy.bind(n_cpus=self.cpus, params=self.params)
        self.state = _plain(self.bound.state)
        made = laws.make_runtime(self.bound, cpus=self.cpus, threads=self.threads, ahead=self.ahead)[0]
        self.tables = unpack(laws.RUNTIME, {"cpu": self.cpus, "thread": self.threads, "refusal": self.threads, "withheld_tid": self.threads})
        for name in made.dtype.names:
            if not made.dtype.fields[name][0].subdtype and not made.dtype.fields[name][0].fields:
                setattr(self.tables, name, int(made[name]))
        for cpu in self.tables.cpu:
            cpu.running = -1
        self._handlers = {Message[name.upper()]: handler for name, handler in self.policy.handlers.items()}

    @property
    def runtime(self) -> list[dict[str, Any]]:
        """The tables as the suite reads them."""
        tables = self.tables
        whole = {name: value for name, value in vars(tables).items() if isinstance(value, int)}
        return [whole | {"thread": pack(tables.thread, laws.THREAD), "cpu": pack(tables.cpu, laws.CPU)}]

    def _dispatch(self, dispatch: int, state: int, message: int, orders: int) -> int:
        self._handlers[self.tables.msg.type](self.state, self.tables.msg, self.tables.orders)
        return 0

    def feed(self, messages: Any) -> Any:
        made = []
        for message in messages:
            assert self.laws["feed"](self.tables, values_of(message)), f"the policy failed: code {self.tables.failed}"
            made += [tuple(getattr(d, name) for name in DECISION.names) for d in self.tables.out[: self.tables.made]]
            self.tables.made = 0
        return np.array(made, DECISION)
