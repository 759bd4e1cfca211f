"""Draw the README's picture from a results file: tail latency of one request class against offered load.

    wave compare ghost-rocksdb --policy fifo --policy shinjuku --no-saturation --out latency.json
    python docs/draw_latency.py latency.json GET docs/latency.svg

Equal results give an equal file.
"""

from __future__ import annotations

import json
import sys
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


def draw(reading: Reading, name: str) -> Figure:
    """p99 of class `name` in every configuration but those with a worker less."""
    figure = Figure(figsize=(7.6, 3.5), layout="constrained")
    panel = figure.subplots()
    for each in reading.configurations:
        if each.column == SAME_MACHINE and each.world == "on-host":
            continue
        found = [(point.load_per_s / 1e3, p99) for point in each.points if (p99 := point.middle("classes", name, "p99_us")) is not None]
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


def main(arguments: list[str]) -> None:
    """RESULTS.json CLASS PICTURE.svg"""
    source, name, out = arguments
    results: dict[str, Any] = json.loads(Path(source).read_text())
    with mpl.rc_context({"svg.hashsalt": "wave", "font.size": 9}):
        draw(read_results(results), name).savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    main(sys.argv[1:])
