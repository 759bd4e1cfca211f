"""A daemon's status as protobuf and back: tables of figures by name become a list of paths with values that keep their kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from waveos.proto import admin_pb2 as pb

Status = dict[str, Any]
_PLAIN = ("enclave", "pid", "subsystem", "mechanism", "cpus", "members", "policy", "attachments", "agents_lost", "agents_refused")
_FIGURES = ("counters", "report", "hostd")


def to_message(status: Mapping[str, Any]) -> pb.EnclaveStatus:
    """What hostd tells, as JSON says it, for the wire. What has no place there is left out. Raises ValueError, naming the figure, for what does not fit in its
    place: an agent may report anything."""
    message = pb.EnclaveStatus(**{name: status[name] for name in _PLAIN if status.get(name) is not None})
    message.params.update(status.get("params") or {})
    if agent := status.get("agent"):
        message.agent.CopyFrom(pb.Agent(pid=agent["pid"], uid=agent["uid"], for_s=agent["for_s"]))
    for name in _FIGURES:
        if status.get(name) is not None:
            getattr(message, name).SetInParent()
            getattr(message, name).figures.extend(_flatten(status[name], name))
    return message


def from_message(message: pb.EnclaveStatus) -> Status:
    """As `wave status --json` prints it; of an enclave that cannot be asked {"enclave", "error"}."""
    if message.error:
        return {"enclave": message.enclave, "error": message.error}
    status: Status = {name: getattr(message, name) for name in _PLAIN}
    status["policy"] = message.policy or None
    status["params"] = dict(message.params)
    agent = message.agent
    status["agent"] = {"pid": agent.pid, "uid": agent.uid, "for_s": agent.for_s} if message.HasField("agent") else None
    for name in _FIGURES:
        status[name] = _nest(getattr(message, name).figures) if message.HasField(name) else None
    return status


def _flatten(table: Mapping[str, Any], of: str, path: str = "") -> Iterator[pb.Figure]:
    for key, value in table.items():
        name = f"{path}{key}"
        try:
            if kind := _kind(value):
                yield pb.Figure(name=name, **kind)
        except (OverflowError, TypeError, ValueError):
            raise ValueError(
                f"in its {of}, {name!r} is {value!r:.40}: an integer has 64 bits, a histogram pairs of a lower edge and a count, a text Unicode"
            ) from None
        if isinstance(value, dict):
            yield from _flatten(value, of, f"{name}/")


def _kind(value: Any) -> dict[str, Any]:
    """The value under the name of its field; empty if there is none for it."""
    if isinstance(value, bool):
        return {"flag": value}
    if isinstance(value, int):
        return {"integer": value}
    if isinstance(value, float):
        return {"real": value}
    if isinstance(value, str):
        return {"text": value}
    if isinstance(value, list) and value and all(isinstance(each, list) and len(each) == 2 for each in value):
        return {"histogram": pb.Histogram(lower=[int(edge) for edge, _ in value], count=[int(n) for _, n in value])}
    if isinstance(value, list) and all(isinstance(each, int | float) for each in value):
        return {"numbers": pb.Numbers(values=value)}
    return {}


def _nest(figures: Any) -> Status:
    table: Status = {}
    for figure in figures:
        *path, last = figure.name.split("/")
        inner = table
        for key in path:
            if not isinstance(inner.get(key), dict):  # a name of an agent's own may have a '/', and then be another's place
                inner[key] = {}
            inner = inner[key]
        kind = figure.WhichOneof("value")
        if kind == "numbers":
            inner[last] = [int(each) if each.is_integer() else each for each in figure.numbers.values]
        elif kind == "histogram":
            inner[last] = [list(each) for each in zip(figure.histogram.lower, figure.histogram.count, strict=True)]
        else:
            inner[last] = getattr(figure, kind)
    return table
