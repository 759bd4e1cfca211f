"""`Policy`: a class whose methods are handlers of messages and whose attributes are its declared state."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from types import FunctionType, ModuleType
from typing import Any, ClassVar

import numpy as np

from waveos.errors import PolicyError
from waveos.names import nearest
from waveos.policy.bind import Bound, bind


class Param(float):
    """Annotation of a parameter: `quantum_us: Param = 30`. Without a value it must be given where the policy is used."""


class Policy:
    """Base of all policies. `class Fifo(Policy, subsystem=sched, name="fifo")`; the class docstring's first line describes it.

    A method named as a message type handles it: `(self, msg, txns)`. An attribute is declared state (`ring`, `heap`, `array`, `per_cpu`, `per_thread`)
    or a `Param`. `self.cpus` is the number of CPUs. `work_conserving=False` says that it may leave a CPU idle while a thread waits;
    `compiled=False` that it runs as plain Python (for decisions made in milliseconds, not microseconds); `forgets=True` that it takes threads that have left
    out of its queues itself, and not when it comes to them.

    In a subsystem whose policies are always plain (`memory`, `serving`) a policy is an ordinary object: any state, made in `start`, any methods besides
    its handlers; one that handles `(self, msgs, txns)` gets a run of messages of its type as one array. It may be inherited from.
    """

    name: ClassVar[str]
    subsystem: ClassVar[ModuleType]
    compiled: ClassVar[bool]
    work_conserving: ClassVar[bool]
    forgets: ClassVar[bool]
    handlers: ClassVar[dict[str, FunctionType]]
    fields: ClassVar[dict[str, np.dtype[Any]]]
    params: ClassVar[dict[str, float | None]]

    def __init_subclass__(
        cls, *, subsystem: ModuleType, name: str, compiled: bool = True, work_conserving: bool = True, forgets: bool = False
    ) -> None:
        declared = dict(vars(cls))
        _check_name(cls, name)
        cls.name, cls.subsystem, cls.compiled, cls.work_conserving, cls.forgets = name, subsystem, compiled, work_conserving, forgets
        cls.handlers, cls.fields, cls.params = {}, {}, {}
        if getattr(subsystem, "PLAIN", False):
            _declare_plain(cls)
            return
        _check_form(cls)
        for attribute, annotation in inspect.get_annotations(cls).items():
            if annotation is not Param and annotation != "Param":
                raise PolicyError(f"{_where(cls, attribute)}: {attribute!r} is annotated {annotation!r}; only `Param` is known")
            _check_free(cls, attribute, "parameter")
            cls.params[attribute] = None
        for attribute, value in declared.items():
            if attribute.startswith("__"):
                continue
            if not isinstance(value, FunctionType):
                _check_free(cls, attribute, "state")
            if attribute in cls.params:
                cls.params[attribute] = _number(cls, attribute, value)
            elif isinstance(value, FunctionType):
                _check_handler(cls, attribute, value)
                cls.handlers[attribute] = value
            elif isinstance(value, np.dtype):
                cls.fields[attribute] = value
            else:
                raise PolicyError(
                    f"{_where(cls, attribute)}: state {attribute!r} is a {type(value).__name__}; "
                    "declare ring(n), rings(k, n), heap(n), array(n), per_cpu(), per_thread(), or a parameter as `name: Param = value`"
                )
        _check_any(cls)
        if forgets and not hasattr(subsystem, "LEAVING"):
            raise PolicyError(f"{_where(cls, 'class')}: a policy of {_short(subsystem)} has nothing to forget; leave out forgets=True")
        for handler in subsystem.LEAVING if forgets else ():
            if handler not in cls.handlers:
                raise PolicyError(f"{_where(cls, 'class')}: policy {cls.name!r} forgets threads that have left, so it must handle {handler}, too")

    def start(self) -> None:
        """Make the state of a plain policy: called before its first message, and again when the host's state is told anew."""

    @classmethod
    def bind(cls, *, n_cpus: int, params: dict[str, float] | None = None) -> Bound:
        """State and entry point for `n_cpus` CPUs, with `params` over the defaults. Raises PolicyError on an unknown or missing parameter."""
        return bind(cls, n_cpus, cls.param_values(params))

    @classmethod
    def param_values(cls, params: dict[str, float] | None = None) -> dict[str, float]:
        """The parameters with `params` over the defaults. Raises PolicyError on an unknown or missing one."""
        values = dict(cls.params)
        for key, value in (params or {}).items():
            if key not in values:
                known = ", ".join(values) or "none"
                raise PolicyError(f"policy {cls.name!r} has no parameter {key!r}{nearest(key, values)}; it has: {known}")
            values[key] = _number(cls, key, value)
        for key, given in values.items():
            if given is None:
                raise PolicyError(f"policy {cls.name!r} needs parameter {key!r}; give it as policies.params.{cls.name}.{key} in the scenario")
        return {key: float(value) for key, value in values.items() if value is not None}


def _check_name(cls: type[Policy], name: str) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
        raise PolicyError(f"{_where(cls, 'class')}: policy name {name!r}; it also names files: letters, digits, '_', and after the first '-' and '.'")


def _check_form(cls: type[Policy]) -> None:
    """Refuse what would be lost silently: only handlers and state declared in the class itself are compiled."""
    if "__init__" in vars(cls):
        raise PolicyError(
            f"{_where(cls, 'def __init__')}: policy {cls.name!r} has an __init__, which nobody calls; "
            "declare state in the class, where it is zero at first, or a parameter as `name: Param = value`"
        )
    for base in cls.__mro__[1:]:
        if issubclass(base, Policy) and base is not Policy:
            raise PolicyError(
                f"{_where(cls, 'class')}: policy {cls.name!r} inherits from policy {base.name!r}, whose handlers it would not have; "
                "derive from Policy, and share code in @jitable functions"
            )
    _check_once(cls)


def _check_once(cls: type[Policy]) -> None:
    """Of what a class declares twice Python keeps the last, so it is looked for in the source, where that can be had."""
    try:
        lines, first = inspect.getsourcelines(cls)
        body = ast.parse(textwrap.dedent("".join(lines))).body[0].body  # type: ignore[attr-defined]
    except (OSError, TypeError, SyntaxError):
        return
    at: dict[str, int] = {}
    for node in body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) and node.value else []
        names = (
            [node.name]
            if isinstance(node, ast.FunctionDef) and not node.decorator_list
            else [each.id for each in targets if isinstance(each, ast.Name)]
        )
        for name in names:
            line = first + node.lineno - 1
            if at.setdefault(name, line) != line:
                raise PolicyError(
                    f"{inspect.getsourcefile(cls)}:{line}: {name!r} is declared in line {at[name]} too; only the last would be there: rename one"
                )


def _check_free(cls: type[Policy], attribute: str, kind: str) -> None:
    taken = {"cpus"} if kind == "state" or not getattr(cls.subsystem, "PLAIN", False) else set()
    taken |= {name for name in (*vars(Policy), *inspect.get_annotations(Policy)) if not name.startswith("_")}
    if attribute in taken:
        raise PolicyError(f"{_where(cls, attribute)}: {kind} {attribute!r} has a name that Wave uses; taken are: {', '.join(sorted(taken))}")


def _check_any(cls: type[Policy]) -> None:
    if not cls.handlers:
        raise PolicyError(f"{_where(cls, 'class')}: policy {cls.name!r} handles no message; known: {', '.join(cls.subsystem.HANDLERS)}")


def _declare_plain(cls: type[Policy]) -> None:
    """Parameters and handlers of a plain policy, its bases' first. What takes `txns` is a handler, so a misspelt one is noticed."""
    if cls.compiled:
        raise PolicyError(f"{_where(cls, 'class')}: policies of {_short(cls.subsystem)} run as plain Python; say so: compiled=False")
    for base in reversed([each for each in cls.__mro__ if issubclass(each, Policy) and each is not Policy]):
        for attribute, annotation in inspect.get_annotations(base).items():
            if annotation is Param or annotation == "Param":
                _check_free(cls, attribute, "parameter")
                cls.params[attribute] = None
        for attribute, value in vars(base).items():
            if attribute in cls.params:
                cls.params[attribute] = _number(cls, attribute, value)
            elif isinstance(value, FunctionType) and (attribute in cls.subsystem.HANDLERS or _takes_txns(value)):
                _check_handler(cls, attribute, value)
                cls.handlers[attribute] = value
    _check_any(cls)


def _takes_txns(function: FunctionType) -> bool:
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return len(names) == 3 and names[1] in ("msg", "msgs") and names[2] == "txns"


def _check_handler(cls: type[Policy], attribute: str, function: FunctionType) -> None:
    line = f"{inspect.getsourcefile(function)}:{function.__code__.co_firstlineno}"
    known = cls.subsystem.HANDLERS
    if attribute not in known:
        raise PolicyError(f"{line}: {attribute!r} is not a message of {_short(cls.subsystem)}{nearest(attribute, known)}; known: {', '.join(known)}")
    if function.__code__.co_argcount != 3:
        raise PolicyError(f"{line}: handler {attribute!r} takes {function.__code__.co_argcount} arguments; it gets three: (self, msg, txns)")


def _number(cls: type[Policy], key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value):
        raise PolicyError(f"policy {cls.name!r}: parameter {key!r} is {value!r}; a finite number is needed")
    return value


def _short(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


def _where(cls: type[Policy], attribute: str) -> str:
    """file:line of an attribute in the source of its class, as well as it can be told."""
    try:
        lines, first = inspect.getsourcelines(cls)
        offset = next((n for n, line in enumerate(lines) if line.strip().startswith(attribute)), 0)
        return f"{inspect.getsourcefile(cls)}:{first + offset}"
    except (OSError, TypeError):
        return cls.__qualname__
