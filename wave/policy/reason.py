"""Why a policy cannot be compiled, or failed: one line, with the place in its author's own source."""

from __future__ import annotations

import ast
import builtins
import inspect
import os
import re
import sysconfig
import textwrap
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

from waveos.names import nearest

if TYPE_CHECKING:
    from waveos.policy.policy import Policy

_NOT_THE_AUTHORS = (str(Path(__file__).parent.parent) + os.sep, sysconfig.get_paths()["stdlib"] + os.sep)
_PLACES = re.compile(r'File "([^"\n]+)", line (\d+)|\b(?:at|Raised from) (\S[^\n]*?) \((\d+)\)')
_HIDDEN = ("mark", "version", "subsystem")  # fields of a message that are the transport's


def why_not_compiled(policy: type[Policy], error: Exception) -> str:
    """What numba could not compile. A name that does not exist is found in the source, as numba tells neither place nor alternative."""
    if found := _wrong_name(policy):
        return found
    return f"{_place(policy, str(error))}{_numba_says(policy, error)}; WAVE_JIT=0 runs it as plain Python"


def last_line(error: BaseException, policy: type[Policy]) -> str:
    """What was raised, and the last line of the author's own on the way there."""
    frames = traceback.extract_tb(error.__traceback__)
    own = _files(policy)
    where = next((frame for frame in reversed(frames) if frame.filename in own or _may_be_own(frame.filename)), frames[-1])
    return f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"


def is_raised_by(policy: type[Policy], error: BaseException) -> bool:
    """Whether the policy's own code raised it, and not what interrupted that code."""
    return traceback.extract_tb(error.__traceback__)[-1].filename in _files(policy)


def _files(policy: type[Policy]) -> set[str]:
    """The files that its methods come from."""
    classes = [each for each in policy.__mro__ if hasattr(each, "handlers")]
    return {value.__code__.co_filename for each in classes for value in vars(each).values() if isinstance(value, FunctionType)}


def _may_be_own(file: str) -> bool:
    return not file.startswith(_NOT_THE_AUTHORS) and not {"site-packages", "dist-packages"} & set(Path(file).parts) and not file.startswith("<")


# ── what numba says ──────────────────────────────────────────────────────────────────────────────────────────────────


def _place(policy: type[Policy], text: str) -> str:
    """`file:line: ` of the last place in numba's message that is the policy's own; the others are Wave's and numba's."""
    own = {os.path.realpath(file): file for file in _files(policy)}
    places = [(match[1] or match[3], match[2] or match[4]) for match in _PLACES.finditer(text)]
    return next((f"{own[real]}:{line}: " for file, line in reversed(places) if (real := os.path.realpath(file)) in own), "")


def _numba_says(policy: type[Policy], error: Exception) -> str:
    """The sentence that gives the reason, whole, out of many lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    at = next((n for n, line in enumerate(lines) if not line.startswith(("Failed in", "During", "-", "File"))), None)
    if at is None:
        return f"numba raised {type(error).__name__}: {error}".rstrip(": ")
    reason = re.sub(r" *Raised from .*", "", lines[at])
    if named := re.match(r"Untyped global name '(\w+)'", reason):
        function = next((each.__globals__.get(named[1]) for each in policy.handlers.values() if named[1] in each.__globals__), None)
        if isinstance(function, FunctionType):
            return f"{named[1]!r} is a plain function; mark it @jitable (from waveos.policy import jitable)"
    if reason.startswith("No implementation of function") and (call := next((line for line in lines[at:] if line.startswith(">>> ")), "")):
        return f"nothing compiled takes these types: {_short_types(call[4:])}"
    if type(error).__module__.partition(".")[0] != "numba":
        reason = f"{type(error).__name__}: {reason}"
    return _short_types(reason).rstrip(" .")


def _short_types(text: str) -> str:
    """Types as an author thinks of them: a record without its layout, a constant as it is written."""
    text = re.sub(r"Literal\[str\]\((.*?)\)", r"'\1'", text)
    text = re.sub(r"Literal\[\w+\]\((.*?)\)", r"\1", text)
    text = re.sub(r"nestedarray\((\w+), \([\d, ]*\)\)", r"array of \1", text)
    return re.sub(r"Record\([^()]*\)", "record", text)


# ── names that do not exist ──────────────────────────────────────────────────────────────────────────────────────────


def _wrong_name(policy: type[Policy]) -> str:
    """The first attribute, name or argument in a handler, or in a function of its file that it calls, that does not exist."""
    fields, orders = policy.subsystem.MESSAGE.names, policy.subsystem.ORDERS.names
    for function in _reached(policy):
        known: dict[str, tuple[str, ...]] = {}
        if function in policy.handlers.values():
            receiver, message, txns = function.__code__.co_varnames[:3]
            known = {receiver: ("cpus", *policy.params, *policy.fields), message: fields, txns: orders}
        for line, told in _complaints(function, known):
            return f"{function.__code__.co_filename}:{line}: {told}"
    return ""


def _reached(policy: type[Policy]) -> Iterator[FunctionType]:
    """The handlers, then what they call by name that stands in the same file."""
    found = list(policy.handlers.values())
    for function in found:
        yield function
        for name in function.__code__.co_names:
            called = _plain_function(function.__globals__.get(name))
            if called is not None and called not in found and called.__code__.co_filename == function.__code__.co_filename:
                found.append(called)


def _plain_function(value: Any) -> FunctionType | None:
    value = getattr(value, "py_func", value)
    return value if isinstance(value, FunctionType) else None


def _complaints(function: FunctionType, known: dict[str, tuple[str, ...]]) -> Iterator[tuple[int, str]]:
    """(line, what is wrong), from the top."""
    try:
        lines, first = inspect.getsourcelines(function)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, SyntaxError):  # typed in, or the file has changed
        return
    nodes = list(ast.walk(tree))
    local = {each.id for each in nodes if isinstance(each, ast.Name) and not isinstance(each.ctx, ast.Load)}
    local |= {each.arg for each in nodes if isinstance(each, ast.arg)} | {*function.__code__.co_freevars, *function.__code__.co_varnames}
    space = {**vars(builtins), **function.__globals__}

    def resolve(node: ast.expr) -> Any:
        if isinstance(node, ast.Name) and node.id not in local:
            return space.get(node.id)
        if isinstance(node, ast.Attribute) and isinstance(module := resolve(node.value), ModuleType):
            return getattr(module, node.attr, None)
        return None

    for node in sorted((each for each in nodes if isinstance(each, ast.expr)), key=lambda each: (each.lineno, each.col_offset)):
        told = ""
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in known:
            told = _missing(node.value.id, node.attr, known[node.value.id])
        elif isinstance(node, ast.Attribute) and isinstance(module := resolve(node.value), ModuleType) and not hasattr(module, node.attr):
            told = _missing(ast.unparse(node.value), node.attr, [name for name in getattr(module, "__all__", dir(module)) if name.islower()])
        elif isinstance(node, ast.Name) and node.id not in local and node.id not in space:
            told = f"name {node.id!r} is not defined{nearest(node.id, [*local, *function.__globals__])}"
        elif isinstance(node, ast.Call) and (called := _plain_function(resolve(node.func))) is not None:
            told = _wrong_arguments(node, called)
        if told:
            yield first + node.lineno - 1, told


def _missing(owner: str, attribute: str, known: tuple[str, ...] | list[str]) -> str:
    if attribute in known:
        return ""
    shown = [name for name in known if name not in _HIDDEN]
    listed = f"; it has: {', '.join(shown)}" if len(shown) <= 20 else ""
    return f"{owner!r} has no {attribute!r}{nearest(attribute, known)}{listed}"


def _wrong_arguments(call: ast.Call, function: FunctionType) -> str:
    if any(isinstance(each, ast.Starred) for each in call.args) or any(each.arg is None for each in call.keywords):
        return ""
    signature = inspect.signature(function)
    known = signature.parameters
    bare = inspect.Signature([each.replace(annotation=inspect.Parameter.empty) for each in known.values()])
    name = ast.unparse(call.func)
    if unknown := next((str(each.arg) for each in call.keywords if each.arg not in known), ""):
        return f"{name} takes no {unknown!r}{nearest(unknown, known)}; it takes {bare}"
    try:
        signature.bind(*call.args, **{str(each.arg): each.value for each in call.keywords})
    except TypeError as error:
        return f"{name}: {error}; it takes {bare}"
    return ""
