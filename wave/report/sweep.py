"""The report of a sweep: its rows as a table, and what matters of them drawn over the keys that were swept."""

from __future__ import annotations

import html
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from waveos.errors import ConfigError
from waveos.report import page
from waveos.report.quantities import number

PANELS = 6
"""Figures at most; the file has everything."""
LINES = 8
_ABOUT = ("id", "policy", "world", "placement", "column", "seed", "trace_hash")
_SATURATION = ("saturation_per_s", "saturation_low_per_s", "saturation_high_per_s")
_QUANTILES = ("p50_us", "p99_us", "p999_us")
_METRICS = 8


def table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The rows as (columns, rows) of text: the keys, the configuration, and what matters. Raises ConfigError if these are no results of a sweep."""
    keys, shown = _keys(results), metrics(results)
    columns = [*keys, "configuration", *shown]
    rows = [[*(_text(row[key]) for key in keys), str(row.get("id", "")), *(_number(row.get(name)) for name in shown)] for row in results["rows"]]
    return columns, rows


def metrics(results: Mapping[str, Any]) -> list[str]:
    """The columns that matter: saturation with its interval; else load and latencies; else what varies."""
    rows = results["rows"]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if "saturation_per_s" in columns:
        return list(_SATURATION)
    latencies = [name for name in columns if name.rpartition(".")[2] in _QUANTILES and "." in name]
    if latencies:
        return ["load_per_s", *(name for name in columns if name == "goal_per_s"), *latencies]
    fixed = {"point", *_keys(results), *_ABOUT}
    varied = [name for name in columns if name not in fixed and len({number(row.get(name)) for row in rows}) > 1]
    return varied[:_METRICS]


def render_report(results: Mapping[str, Any]) -> str:
    """The report's HTML: nothing is fetched when it is opened. Raises ConfigError if these are no results of a sweep."""
    columns, rows = table(results)
    missing = results["points"] - results["points_done"]
    notes = [f"Timing: {results['timing']}. Wave {results['wave_version']}. {results['points_done']} of {results['points']} points."]
    if missing:
        notes.append(f"{missing} points were not measured: the same command goes on with them.")
    return page.page(
        f"{results['name']}: a sweep over {', '.join(results['grid'])}",
        page.paragraphs(notes),
        *_figures(results),
        "<h2>All rows</h2>",
        page.table(columns, rows),
    )


def _figures(results: Mapping[str, Any]) -> list[str]:
    """One panel a metric and group, the key with the most numbers along the x axis, a line for each value of the next."""
    keys, rows = _keys(results), results["rows"]
    numeric = [key for key in keys if len({number(row[key]) for row in rows} - {None}) > 1 and all(number(row[key]) is not None for row in rows)]
    drawn = [name for name in metrics(results) if name not in _SATURATION[1:] and name != "load_per_s"]
    over_load = "saturation_per_s" not in metrics(results) and len({row.get("load_per_s") for row in rows}) > 1
    along = "load_per_s" if over_load else max(numeric, key=lambda key: len(results["grid"][key]), default="")
    if not along or not drawn:
        return []
    others = [key for key in keys if key != along]
    groups: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        if number(row.get(along)) is not None:
            line = ", ".join(f"{key.rpartition('.')[2]} {_text(row[key])}" for key in others)
            groups.setdefault(str(row.get("id", "")), {}).setdefault(line, []).append(row)
    panels = list(itertools.product(drawn, groups.items()))
    figures = [f"<h2>{html.escape(f'{name}, {group}')}</h2><figure>{_panel(along, name, lines)}</figure>" for name, (group, lines) in panels[:PANELS]]
    if len(panels) > PANELS:
        figures.append(page.paragraphs([f"{PANELS} of {len(panels)} figures are drawn."]))
    return figures


def _panel(along: str, name: str, lines: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots()
    few = list(lines.items())
    few = few[:: max(1, -(-len(few) // LINES))]
    for place, (label, rows) in enumerate(few):
        points = sorted((float(row[along]), row) for row in rows if number(row.get(name)) is not None)
        xs, ys = [x for x, _ in points], [float(row[name]) for _, row in points]
        colour = f"C{place % 10}"
        axes.plot(xs, ys, marker="o", markersize=3.5, linewidth=1.4, label=label or None, color=colour)
        if name == "saturation_per_s":
            low, high = ([float(row[end]) for _, row in points] for end in _SATURATION[1:])
            axes.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)
    everything = [float(row[along]) for rows in lines.values() for row in rows]
    if min(everything) > 0 and max(everything) / min(everything) >= 20:
        axes.set_xscale("log")
    axes.set_xlabel(along)
    axes.set_ylabel(name)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if any(label for label, _ in few):
        axes.legend(fontsize="small", ncols=4, frameon=False)
    return page.svg(figure)


def _keys(results: Mapping[str, Any]) -> list[str]:
    if results.get("kind") != "sweep" or "rows" not in results:
        raise ConfigError("these are no results of a sweep; `wave sweep SCENARIO --grid KEY=V1,V2` writes some")
    return list(results["grid"])


def _number(value: Any) -> str:
    found = number(value)
    return "" if found is None else f"{found:,.0f}" if found == int(found) or abs(found) >= 1_000 else f"{found:.4g}"


def _text(value: Any) -> str:
    """A key's value. Whole numbers may have come back from the file as floats, beside others: they look the same."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return json.dumps(value, ensure_ascii=False)
    return value if isinstance(value, str) else f"{value:g}"
