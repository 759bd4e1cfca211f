"""The comparison on the terminal: one row a configuration, 120 columns wide or a little more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from waveos.report.quantities import NONE, show_count, show_rate, show_share
from waveos.report.reading import Reading, Row, read_results


def comparison_table(results: Mapping[str, Any]) -> Table:
    """The results of `wave compare` as a table; how the times were made and whether the link is assumed stand below it.

    Raises ConfigError if these are no results.
    """
    reading = read_results(results)
    rows = reading.rows()
    at = f", at {show_rate(reading.load_per_s)}" if reading.load_per_s else ""
    table = Table(title=escape(reading.name + at), box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    table.caption, table.caption_justify = escape(_caption(reading, rows)), "left"
    table.add_column("policy", no_wrap=True)
    table.add_column("world", no_wrap=True)
    table.add_column("wor-\nkers", justify="right", no_wrap=True)
    if reading.has_saturation:
        table.add_column("saturation\n1000/s", justify="right", no_wrap=True)
    scales = {name: _scale(rows, name) for name in reading.classes}
    for name, (unit, _) in scales.items():
        table.add_column(f"{escape(name)}, {unit}\np50/p99/p99.9", justify="right", no_wrap=True)
    table.add_column("host\ncores", justify="right", no_wrap=True)
    table.add_column("\nstale", justify="right", no_wrap=True)
    table.add_column("age, µs\np50/p99", justify="right", no_wrap=True)
    for column in reading.cost_columns:
        table.add_column("cost, same\n" + column.removeprefix("same "), justify="right", no_wrap=True)
    previous = None
    for row in rows:
        each = row.configuration
        if previous is not None and previous != each.policy:
            table.add_section()
        previous = each.policy
        table.add_row(
            escape(each.policy),
            each.world,
            NONE if each.workers is None else str(each.workers),
            *([_saturation(row)] if reading.has_saturation else []),
            *(_latencies(row, name, scale, reading.load_per_s) for name, (_, scale) in scales.items()),
            show_count(row.host_cores),
            show_share(row.stale_share),
            _ages(row),
            *(show_share(each.cost_share.get(column), sign=True) for column in reading.cost_columns),
        )
    return table


def _caption(reading: Reading, rows: Sequence[Row]) -> str:
    facts = [f"timing: {reading.timing}; {reading.link_text}"]
    if reading.objective_text and reading.has_saturation:
        facts.append(f"saturation: the highest load with {reading.objective_text}")
    facts.append("stale: decisions refused because the state had moved on; age: of the state behind a decision when the host acted on it")
    if reading.cost_columns:
        facts.append("cost: throughput lost (+) or gained (−) by moving the agent from a host core to the IPU")
    if any(row.saturated for row in rows):
        facts.append("*: this load is beyond its saturation")
    return "\n".join(facts)


def _saturation(row: Row) -> str:
    each = row.configuration
    if each.saturation_per_s is None:
        return NONE
    ends = (each.saturation_low_per_s, each.saturation_high_per_s)
    half = max((abs(end - each.saturation_per_s) for end in ends if end is not None), default=None)
    return f"{each.saturation_per_s / 1000:,.1f}" + ("" if half is None else f" ±{half / 1000:.1f}")


def _scale(rows: Sequence[Row], name: str) -> tuple[str, float]:
    """Milliseconds for a class whose p50 is mostly above one, else microseconds."""
    middles = [value for row in rows if (value := row.latency_us[name]["p50_us"]) is not None]
    return ("ms", 1e-3) if middles and median(middles) >= 1_000 else ("µs", 1.0)


def _latencies(row: Row, name: str, scale: float, load_per_s: float | None) -> str:
    text = "/".join(_plain(value, scale) for value in row.latency_us[name].values())
    if row.load_per_s is not None and row.load_per_s != load_per_s:
        text += f" at {row.load_per_s / 1000:.0f}k"
    return text + ("*" if row.saturated else "")


def _ages(row: Row) -> str:
    ages = (row.decision_age_p50_us, row.decision_age_p99_us)
    if ages[0] is None:
        ages = (row.stale_age_p50_us, row.stale_age_p99_us)
    return NONE if ages[0] is None and ages[1] is None else f"{_plain(ages[0], 1.0)}/{_plain(ages[1], 1.0)}"


def _plain(us: float | None, scale: float) -> str:
    """About three digits; the unit is in the column's head."""
    if us is None:
        return NONE
    value = us * scale
    return f"{value:.0f}" if abs(value) >= 99.5 else f"{value:.1f}" if abs(value) >= 9.95 else f"{value:.2f}"
