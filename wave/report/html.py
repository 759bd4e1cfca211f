"""The report as one self-contained HTML file: nothing is fetched when it is opened, and it reads in light and dark."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from waveos.output import write_file
from waveos.report import quantities
from waveos.report.reading import QUANTILES, WORLDS, Reading, read_results

_BARE = re.compile(r"[A-Za-z0-9_-]+")
"""A key that TOML wants no quotes for."""


def write_report(results: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write the report of `results` to `path`, whole or not at all.

    Raises ConfigError if these are no results, or if the file cannot be written.
    """
    write_file(path, render_report(results))


def render_report(results: Mapping[str, Any]) -> str:
    """The report's HTML. Raises ConfigError if these are no results."""
    from jinja2 import Environment, StrictUndefined

    from waveos.report import plots

    reading = read_results(results)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        time=quantities.show_time,
        rate=quantities.show_rate,
        share=quantities.show_share,
        shares=quantities.show_share_interval,
        count=quantities.show_count,
        facts=_as_facts,
        pretty=_as_toml,
    )
    template = environment.from_string((files("waveos.report") / "report.html.j2").read_text(encoding="utf-8"))
    points = [point for each in reading.configurations for point in each.points]
    drawn = any(point.value("classes", name, key) for point in points for name in reading.classes for key in QUANTILES)
    swept = any(len(each.points) > 1 for each in reading.configurations)
    return template.render(
        reading=reading,
        raw=reading.raw,
        rows=reading.rows(),
        columns=reading.cost_columns,
        quantiles=QUANTILES,
        worlds=WORLDS,
        interval=quantities.show_rate_interval,
        figures={
            "saturation": plots.draw_saturation(reading) if reading.has_saturation else "",
            "one_load": plots.draw_one_load(reading) if drawn and not swept else "",
            "policies": plots.draw_policies(reading) if drawn and swept else "",
            "quantiles": plots.draw_quantiles(reading) if drawn and swept else "",
            "ablation": plots.draw_ablation(reading) if reading.ablation else "",
            "staleness": plots.draw_staleness(reading) if swept else "",
        },
        keys={
            "policies": plots.world_keys(reading),
            "quantiles": plots.configuration_keys(reading),
            "staleness": plots.staleness_keys(reading),
        },
        about_link=_about_link(reading),
    )


def _about_link(reading: Reading) -> str:
    source = f" Source: {reading.link_source}." if reading.link_source else ""
    if reading.link_assumed:
        return "The costs of the link are assumed: nobody has measured them on that hardware for this profile." + source
    return ("The costs of the link were measured on that hardware." if reading.raw.get("link") else "No link was crossed.") + source


def _as_facts(value: Any) -> str:
    """A small mapping as "key value, key value"."""
    return ", ".join(f"{key} {inner}" for key, inner in value.items()) if isinstance(value, Mapping) else str(value)


def _as_toml(value: Any) -> str:
    """A scenario as it is written: TOML, tables after plain values. For reading, and it can be run again."""
    lines: list[str] = []
    _add_table(lines, "", value if isinstance(value, Mapping) else {"scenario": value})
    return "\n".join(lines).strip()


def _add_table(lines: list[str], name: str, table: Mapping[str, Any]) -> None:
    plain = {key: value for key, value in table.items() if value is not None and not _is_table(value) and not _is_tables(value)}
    if name and (plain or not table):
        lines.extend(["", f"[{name}]"])
    lines.extend(f"{key} = {_inline(value)}" for key, value in plain.items())
    for key, value in table.items():
        step = str(key) if _BARE.fullmatch(str(key)) else json.dumps(str(key), ensure_ascii=False)
        inner = f"{name}.{step}" if name else step
        if _is_table(value):
            _add_table(lines, inner, value)
        elif _is_tables(value):
            for each in value:
                lines.extend(["", f"[[{inner}]]"])
                lines.extend(f"{name} = {_inline(held)}" for name, held in each.items() if held is not None)


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, Mapping) for each in value)


def _inline(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {_inline(inner)}" for key, inner in value.items() if inner is not None) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_inline(each) for each in value) + "]"
    return json.dumps(value, ensure_ascii=False)
