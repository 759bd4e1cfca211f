"""Draw the README's picture from a results file: tail latency of one request class against offered load.

    wave compare ghost-rocksdb --out results.json
    python docs/draw_latency.py results.json GET docs/latency.svg --policy fifo --policy shinjuku

Loads off the scenario's grid, which the search for saturation adds, are left out. Equal results give an equal file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from waveos.report.quantities import show_time
from waveos.report.reading import SAME_MACHINE, Reading, read_results

COLOURS = {"kernel": "#6b7280", "fifo": "#c2410c", "shinjuku": "#1d4ed8"}
STYLES = {"kernel": ":", "on-host": (0, (5, 2)), "offload": "-"}
PLACES = {"kernel": "", "on-host": ", agent on a host core", "offload": ", agent on the IPU"}


def draw(reading: Reading, name: str, policies: list[str]) -> Figure:
    """p99 of class `name` in every configuration of the kernel and of `policies` (none: all) but those with a worker less."""
    figure = Figure(figsize=(7.6, 3.5), layout="constrained")
    panel = figure.subplots()
    grid = reading.raw["scenario"]["workload"]["loads_per_s"]
    for each in reading.configurations:
        if each.column == SAME_MACHINE and each.world == "on-host":
            continue
        if each.world != "kernel" and policies and each.policy not in policies:
            continue
        points = [point for point in each.points if not grid or point.load_per_s in grid]
        found = [(point.load_per_s / 1e3, p99) for point in points if (p99 := point.middle("classes", name, "p99_us")) is not None]
        panel.plot(
            [load for load, _ in found],
            [p99 for _, p99 in found],
            color=COLOURS.get(each.policy, "#15803d"),
            linestyle=STYLES[each.world],
            marker="." if each.world != "kernel" else "",
            label="the kernel's own policy" if each.world == "kernel" else each.policy + PLACES[each.world],
        )
    goal = reading.objective_us.get(name, {}).get("p99_us")
    if goal:
        panel.axhline(goal, color="#111827", linewidth=0.8)
        panel.annotate(f"objective {show_time(goal)}", (1, goal), (2, 3), xycoords=("data", "data"), textcoords="offset points", fontsize=8)
    panel.set_yscale("log")
    panel.set_xlim(left=0)
    panel.yaxis.set_major_formatter(FuncFormatter(lambda us, _: show_time(us).replace(".00 ", " ").replace(".0 ", " ")))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.grid(color="#e5e7eb", linewidth=0.7)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_xlabel("offered load, 1000 requests/s")
    panel.set_ylabel(f"{name} p99")
    panel.set_title(f"{reading.name}   timing: {reading.timing}; {reading.link_text}", fontsize=9, loc="left")
    figure.legend(*panel.get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside right center")
    return figure


def main() -> None:
    """From the command line."""
    parser = argparse.ArgumentParser(description="Tail latency of one request class against offered load, as SVG.")
    parser.add_argument("results", type=Path, help="as `wave compare --out` writes it")
    parser.add_argument("request_class", help="whose p99")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--policy", action="append", default=[], help="draw this one; may be given again")
    told = parser.parse_args()
    results: dict[str, Any] = json.loads(told.results.read_text())
    with mpl.rc_context({"svg.hashsalt": "wave", "font.size": 9}):
        draw(read_results(results), told.request_class, told.policy).savefig(told.picture, metadata={"Date": None})


if __name__ == "__main__":
    main()
