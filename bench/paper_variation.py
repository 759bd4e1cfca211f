"""The emulator's data files with some of their numbers halved or doubled: what a figure is worth that rests on assumptions."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from waveos import ipu_emulator
from waveos.errors import ConfigError

DATA = Path(ipu_emulator.__path__[0]) / "data"
FACTORS = (0.5, 2.0)


@dataclass(frozen=True)
class Variation:
    """Keys (as FILE:KEY, `links/mount-evans:wire.one_way_ns`) whose numbers are multiplied by `factor`. Without keys: everything as it is."""

    name: str = "as it is"
    keys: tuple[str, ...] = ()
    factor: float = 1.0

    def file(self, name: str, folder: Path) -> str:
        """What a scenario names for this data file: its own name, or the path of a changed copy that is written to `folder`."""
        changed = {key.partition(":")[2] for key in self.keys if key.startswith(f"{name}:")}
        if not changed:
            return name.partition("/")[2]
        path = folder / f"{name.replace('/', '-')}.toml"
        path.write_text(_toml(_scaled(tomllib.loads((DATA / f"{name}.toml").read_text()), changed, self.factor)))
        return str(path)

    def read(self, name: str) -> dict[str, Any]:
        """The data file's content, changed."""
        changed = {key.partition(":")[2] for key in self.keys if key.startswith(f"{name}:")}
        return _scaled(tomllib.loads((DATA / f"{name}.toml").read_text()), changed, self.factor)


def variations(assumed: Mapping[str, Sequence[str]], left_out: Mapping[str, str]) -> list[Variation]:
    """Each key of `assumed["each"]` halved and doubled, each entry of `assumed["together"]` as one, and all at once.

    Raises ConfigError for a pattern that matches no number.
    """
    groups: list[tuple[str, ...]] = [(key,) for pattern in assumed.get("each", ()) for key in _matches(pattern, left_out)]
    groups += [tuple(_matches(pattern, left_out)) for pattern in assumed.get("together", ())]
    everything = tuple(dict.fromkeys(key for group in groups for key in group))
    named = [(_name(group), group) for group in dict.fromkeys(groups)] + [("all of them", everything)]
    return [Variation(f"{name} x {factor:g}", keys, factor) for name, keys in named for factor in FACTORS]


def _name(group: Sequence[str]) -> str:
    return group[0] if len(group) == 1 else f"{group[0].partition(':')[0]}, {len(group)} keys"


def _matches(pattern: str, left_out: Mapping[str, str]) -> Iterator[str]:
    file, _, keys = pattern.partition(":")
    found = False
    for key, value in _leaves(tomllib.loads((DATA / f"{file}.toml").read_text())):
        full = f"{file}:{key}"
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not any(fnmatchcase(key, each) for each in keys.split("+")):
            continue
        found = True
        if value and not any(fnmatchcase(full, each) for each in left_out):
            yield full
    if not found:
        raise ConfigError(f"paper.toml: {pattern} matches no number of {file}.toml")


def _leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _scaled(table: dict[str, Any], keys: set[str], factor: float, prefix: str = "") -> dict[str, Any]:
    scaled: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            scaled[key] = _scaled(value, keys, factor, f"{prefix}{key}.")
        elif prefix + key in keys:
            scaled[key] = max(1, round(value * factor)) if isinstance(value, int) else value * factor
        else:
            scaled[key] = value
    return scaled


def _toml(table: Mapping[str, Any], prefix: str = "") -> str:
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in table.items() if not isinstance(value, dict)]
    for key, value in table.items():
        if isinstance(value, dict):
            lines += [f"[{prefix}{key}]", _toml(value, f"{prefix}{key}.")]
    return "\n".join(lines) + "\n"
