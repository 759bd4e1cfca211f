"""What a scenario reads besides itself: measured service times and traces of arrivals, each checked before anything runs."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from waveos.errors import ConfigError
from waveos.names import nearest
from waveos.scenario import Scenario, Service

Nanoseconds = NDArray[np.int64]


class Arrivals(NamedTuple):
    """A trace of requests in order of arrival; classes by their number in the scenario."""

    time_ns: Nanoseconds
    request_class: NDArray[np.int64]
    service_ns: Nanoseconds


@dataclass(frozen=True)
class Inputs:
    """Everything outside the scenario's file. `samples` by the scenario's `samples = ...` text; `message_ns` by policy, on a host-speed core."""

    samples: Mapping[str, Nanoseconds] = field(default_factory=dict)
    message_ns: Mapping[str, float] = field(default_factory=dict)
    arrivals: Arrivals | None = None


def wanted_samples(scenario: Scenario) -> list[str]:
    """The scenario's `samples = ...` texts."""
    return sorted({each.service.samples for each in scenario.workload.classes if each.service.samples is not None})


def is_file(spec: str) -> bool:
    """Whether a `samples` text names a file (`times.csv`, `times.npz:get`) and not a measurement (`rocksdb:get`)."""
    return spec.partition(":")[0].endswith((".csv", ".npz"))


def read_samples(spec: str, base: Path) -> Nanoseconds:
    """Service times in ns from a CSV file with a column `service_ns`, or from an array of ns in an .npz file (`file.npz:name`)."""
    name, _, key = spec.partition(":")
    path = base / name
    if not path.is_file():
        raise ConfigError(f"samples = {spec!r}: there is no file {path}")
    values = _read_npz(path, key) if name.endswith(".npz") else np.array([int(row[0]) for row in _read_rows(path, ["service_ns"])], np.int64)
    if not len(values) or values.min() < 0 or values.max() == 0:
        raise ConfigError(
            f"samples = {spec!r}: service times are nanoseconds, 0 or more and not all 0; {path} has {len(values)} values" + _span(values)
        )
    return values


def read_arrivals(path: Path, classes: Sequence[str]) -> Arrivals:
    """A trace of arrivals: a CSV file with the columns time_ns, class, service_ns, in order of time. Raises ConfigError with the line."""
    if not path.is_file():
        raise ConfigError(f"arrivals: there is no trace {path}")
    number = {name: index for index, name in enumerate(classes)}
    rows = _read_rows(path, ["time_ns", "class", "service_ns"])
    for line, row in enumerate(rows, 2):
        if row[1] not in number:
            raise ConfigError(f"{path}:{line}: no class {row[1]!r} in the scenario{nearest(row[1], number)}; it has {', '.join(number)}")
    times = np.array([int(row[0]) for row in rows], np.int64)
    if len(times) < 2:
        raise ConfigError(f"{path}: a trace needs at least two requests; this one has {len(times)}")
    backwards = np.flatnonzero(np.diff(times) < 0)
    if len(backwards):
        raise ConfigError(f"{path}:{int(backwards[0]) + 3}: time_ns goes back; sort the trace by time")
    return Arrivals(times - times[0], np.array([number[row[1]] for row in rows], np.int64), np.array([int(row[2]) for row in rows], np.int64))


def mean_service_ns(service: Service, samples: Mapping[str, Nanoseconds]) -> float:
    """The mean of a service time, ns."""
    fixed = 1000 * (service.fixed_us or 0.0)
    if service.samples is not None:
        return fixed + float(samples[service.samples].mean())
    if service.hyperexponential_us is not None and service.shares is not None:
        return fixed + 1000 * sum(mean * share for mean, share in zip(service.hyperexponential_us, service.shares, strict=True))
    return fixed + 1000 * (service.exponential_us or service.erlang_us or service.lognormal_us or 0.0)


def _read_rows(path: Path, columns: list[str]) -> list[list[str]]:
    """The rows of a CSV file, its columns in this order; every column but `class` holds whole numbers, 0 or more."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not text.endswith("\n"):
        line = text.count("\n") + 1
        raise ConfigError(f"{path}:{line}: the file ends in the middle of a line, so it may be cut off; if it is whole, end it with a newline")
    rows = list(csv.reader(text.splitlines()))
    header = [name.strip() for name in rows[0]]
    if missing := [name for name in columns if name not in header]:
        raise ConfigError(f"{path}:1: no column {', '.join(missing)}; the first line has to name the columns: {', '.join(columns)}")
    order = [header.index(name) for name in columns]
    numbers = [index for index, name in enumerate(columns) if name != "class"]
    kept = []
    for line, row in enumerate(rows[1:], 2):
        if len(row) != len(header):
            raise ConfigError(f"{path}:{line}: {len(row)} fields where {len(header)} are named in the first line; is the file cut off?")
        picked = [row[index].strip() for index in order]
        for index in numbers:
            if not picked[index].isdecimal():
                raise ConfigError(f"{path}:{line}: {columns[index]} = {picked[index]!r}; it is a whole number, 0 or more")
        kept.append(picked)
    return kept


def _read_npz(path: Path, key: str) -> Nanoseconds:
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            if key not in arrays:
                raise ConfigError(
                    f'{path} has no array {key!r}{nearest(key, arrays)}; it has {", ".join(arrays)}; write samples = "{path.name}:NAME"'
                )
            values = arrays[key]
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; is it cut off?") from None
    except Exception as error:  # zipfile.BadZipFile and zlib.error have no common base
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} cannot be read: {error}; is it cut off?") from None
    if values.ndim != 1 or values.dtype.kind not in "iuf" or not np.isfinite(values).all():
        raise ConfigError(f"{path}:{key} has shape {values.shape} and type {values.dtype}; service times are one row of finite numbers, in ns")
    return np.rint(values).astype(np.int64)


def _span(values: Nanoseconds) -> str:
    return f" from {values.min()} to {values.max()}" if len(values) else ""
