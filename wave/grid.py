"""Grid: the keys of a scenario that a sweep varies, and every combination of their values.

grid = parse_grid(["host.workers=4,8", "agent.speed=0.3,0.6,1"])        # six points
grid.points()[4] == {"host.workers": 8, "agent.speed": 0.6}
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from waveos.errors import ConfigError
from waveos.scenario import parse_value

MOST_POINTS = 100_000
"""A larger grid is a slip of the hand: it would take days on any machine."""
_LISTS = ("names", "mitigations", "loads_per_s", "loads_share")
"""Keys that hold a list: each value of the grid becomes a list of one, unless it is one."""
_WANTS = "wants a key and its values, as --grid host.workers=4,8"


@dataclass(frozen=True)
class Grid:
    """Keys in the order in which they were given, and the values of each. The last key varies fastest."""

    values: dict[str, list[Any]]

    def __len__(self) -> int:
        return math.prod(len(values) for values in self.values.values())

    @property
    def keys(self) -> list[str]:
        """The scenario's keys that vary."""
        return list(self.values)

    def points(self) -> list[dict[str, Any]]:
        """Every combination, as value by key."""
        return [dict(zip(self.values, chosen, strict=True)) for chosen in itertools.product(*self.values.values())]


def parse_grid(texts: Sequence[str]) -> Grid:
    """The grid of `KEY=V1,V2` texts. Raises ConfigError for one without key or values, and for what is there twice."""
    values: dict[str, list[Any]] = {}
    for text in texts:
        key, found, listed = (part.strip() for part in text.partition("="))
        if not found or not key or not listed:
            raise ConfigError(f"--grid {text}: {_WANTS}")
        if key in values:
            raise ConfigError(f"--grid {text}: {key} is there twice; put its values side by side, as --grid {key}=1,2")
        values[key] = _values(text, key, listed)
    grid = Grid(values)
    if not values or not len(grid):
        raise ConfigError(f"the grid is empty: --grid {_WANTS}")
    if len(grid) > MOST_POINTS:
        raise ConfigError(f"the grid has {len(grid):,} points; at most {MOST_POINTS:,} can be swept: leave some values out")
    return grid


def _values(text: str, key: str, listed: str) -> list[Any]:
    parsed = parse_value(listed if listed.startswith("[") else f"[{listed}]")
    parsed = [parse_value(each.strip()) for each in listed.split(",")] if isinstance(parsed, str) else parsed
    if not isinstance(parsed, list) or not parsed or "" in parsed:
        raise ConfigError(f"--grid {text}: {_WANTS}")
    values = [[value] if key.rpartition(".")[2] in _LISTS and not isinstance(value, list) else value for value in parsed]
    for number, value in enumerate(values):
        if value in values[:number]:
            raise ConfigError(f"--grid {text}: the value {value!r} is there twice")
    return values
