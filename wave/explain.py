"""What is wrong with a TOML file that a pydantic model refuses, as one line: where it stands, what was read, what to write instead.

Units are in the names of keys (`_ns`, `_us`, `_ms`, `_s`, `_per_s`, `_share`), so a value in another unit can be converted in the advice.
A field's `description` is what its error says is wanted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from waveos.names import nearest


def explain_errors(
    errors: ValidationError, model: type[BaseModel], raw: Mapping[str, Any], *, source: str, text: str = "", origin: Mapping[str, str] | None = None
) -> str:
    """The first error in one line, and how many more there are. `source` and `text` are the file's name and content, `origin` tells values of flags."""
    found = _distinct(errors, model, raw)
    path, explanation = found[0]
    more = f" ({len(found) - 1} more after this one)" if len(found) > 1 else ""
    return f"{_place(path, raw, source, text, origin or {})}: {explanation}{more}"


def explain_key(key: str, value: Any, allowed: Sequence[str]) -> str:
    """What to write instead of an unknown key: the same quantity in the unit that is meant, or the nearest name."""
    stem = _split_unit(key)[0]
    for candidate in allowed:
        candidate_stem, unit = _split_unit(candidate)
        if unit and candidate_stem == stem:
            amount = _convert(value, key, candidate)
            return f"unknown key `{key}`; the key is `{candidate}`, {_UNIT_WORDS[unit]}" + (f": write {candidate} = {amount}" if amount else "")
    return f"unknown key `{key}`{nearest(key, allowed)}; allowed: {', '.join(allowed)}"


def explain_value(key: str, value: Any, wanted: str) -> str:
    """Why a value does not fit its key, with the number in the key's unit if the value has a unit of its own ("30ms")."""
    amount = _convert(value, "", key) if isinstance(value, str) else ""
    return f"{key} = {_show(value)}: " + (f"the unit is in the key's name; write {key} = {amount}" if amount else f"wants {wanted}")


def lookup_origin(origin: Mapping[str, str], key: str) -> str:
    """Where the value of a dotted key came from: what is noted for it or for a table around it, else "default"."""
    steps = key.split(".")
    for depth in range(len(steps), 0, -1):
        if (found := origin.get(".".join(steps[:depth]))) is not None:
            return found
    return "default"


_UNIT_NS = {"ns": 1, "us": 1_000, "ms": 1_000_000, "s": 1_000_000_000}
_UNIT_WORDS = {
    "ns": "in nanoseconds",
    "us": "in microseconds",
    "ms": "in milliseconds",
    "s": "in seconds",
    "per_s": "per second",
    "share": "as a share of 1",
}
_QUANTITY = re.compile(r"\s*([-+]?[0-9][0-9_]*(?:\.[0-9]+)?)\s*(ns|us|µs|μs|ms|s|sec|k/s|/s|%)\s*$")


def _split_unit(key: str) -> tuple[str, str]:
    for unit in ("per_s", "share", "ns", "us", "ms", "s"):
        if key.endswith("_" + unit):
            return key[: -len(unit) - 1], unit
    return key, ""


def _convert(value: Any, key: str, target: str) -> str:
    """`value` of `key` in the unit of the key `target`, as text; empty if there is no saying."""
    unit, wanted = _split_unit(key)[1], _split_unit(target)[1]
    if isinstance(value, str):
        match = _QUANTITY.match(value)
        if not match:
            return ""
        value, unit = float(match[1]), {"µs": "us", "μs": "us", "sec": "s"}.get(match[2], match[2])
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    if unit in _UNIT_NS and wanted in _UNIT_NS:
        return f"{value * _UNIT_NS[unit] / _UNIT_NS[wanted]:.12g}"
    scale = {("/s", "per_s"): 1.0, ("k/s", "per_s"): 1000.0, ("%", "share"): 0.01}.get((unit, wanted))
    return f"{value * scale:.12g}" if scale else ""


def _show(value: Any) -> str:
    text = f'"{value}"' if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _distinct(errors: ValidationError, model: type[BaseModel], raw: Mapping[str, Any]) -> list[tuple[tuple[str | int, ...], str]]:
    """One (path, explanation) for each place that is wrong: the branches of a union are one place."""
    found: dict[tuple[str | int, ...], str] = {}
    for error in errors.errors():
        path, value, missing = _walk(model, raw, error["loc"])
        key = str(path[-1]) if path else ""
        owner, field = _field(model, path)
        if error["type"] == "extra_forbidden":
            text = explain_key(key, value, list(owner.model_fields) if owner else [])
        elif error["type"] == "value_error":
            text = str(error["ctx"]["error"])
        elif missing:
            text = f"{key} is missing; it wants {field}"
        else:
            name = next((str(each) for each in reversed(path) if isinstance(each, str)), "value")
            text = explain_value(name, value, field or error["msg"].lower())
        found.setdefault(path, text)
    return list(found.items())


def _walk(model: type[BaseModel], raw: Any, loc: tuple[str | int, ...]) -> tuple[tuple[str | int, ...], Any, bool]:
    """The part of an error's location that exists in the file, the value there, and whether a key is missing at that place.

    Pydantic appends the names of union branches to a location; they are dropped here.
    """
    value: Any = raw
    for depth, step in enumerate(loc):
        inside = (isinstance(value, Mapping) and step in value) or (isinstance(value, list) and isinstance(step, int) and step < len(value))
        if not inside:
            owner, _ = _field(model, (*loc[:depth], step))
            if isinstance(value, Mapping) and owner is not None and step in owner.model_fields:
                return (*loc[:depth], step), None, True
            return loc[:depth], value, False
        value = value[step]
    return loc, value, False


def _field(root: type[BaseModel], path: tuple[str | int, ...]) -> tuple[type[BaseModel] | None, str]:
    """The model that owns the last key of a path, and the description of that key's field."""
    owner: Any = None
    kind: Any = root
    wanted = ""
    for step in path:
        model = _model_in(kind)
        if isinstance(step, str) and model is not None and step in model.model_fields:
            owner, wanted, kind = model, model.model_fields[step].description or "", model.model_fields[step].annotation
        elif isinstance(step, str) and model is not None and get_origin(kind) is not dict:
            owner, wanted, kind = model, "", None
        else:
            owner, kind = model, next(iter(get_args(kind)[-1:]), None)
    return owner, wanted


def _model_in(kind: Any) -> type[BaseModel] | None:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return kind
    if get_origin(kind) is Union or type(kind).__name__ == "UnionType":
        return next((model for each in get_args(kind) if (model := _model_in(each))), None)
    return None


def _place(path: tuple[str | int, ...], raw: Any, source: str, text: str, origin: Mapping[str, str]) -> str:
    """File, line (where the key stands only once) and dotted key; or the flag, if the value came from one."""
    dotted = ".".join(_named_steps(path, raw))
    flag = next((flag for key, flag in origin.items() if flag != source and f"{key}.".startswith(f"{dotted}.")), "") or lookup_origin(origin, dotted)
    if flag not in ("", "default", source):
        return f"{flag}: {dotted}"
    key = next((step for step in reversed(path) if isinstance(step, str)), "")
    pattern = re.compile(rf"(^|[\s{{,]){re.escape(key)}\s*=|^\s*\[+[\w.]*\b{re.escape(key)}\]")
    lines = [number for number, line in enumerate(text.splitlines(), 1) if key and pattern.search(line)]
    return f"{source}{f':{lines[0]}' if len(lines) == 1 else ''}" + (f": {dotted}" if path else "")


def _named_steps(path: Sequence[str | int], raw: Any) -> Iterator[str]:
    """The path with tables of a list by their name; a number within a list of values is left out."""
    for step in path:
        try:
            raw = raw[step]
        except (KeyError, IndexError, TypeError):
            raw = None
        if not isinstance(step, int):
            yield step
        elif isinstance(raw, Mapping):
            yield str(raw.get("name", step))
