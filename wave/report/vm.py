"""The report of a comparison of virtual machines: how they perform, at what frequency, and what no ticks gives, taken apart."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from waveos.errors import ConfigError
from waveos.report import page, perfetto

EFFECTS = ("ticks", "sleep", "turbo")
TICKS = {"periodic": "all CPUs", "nohz_idle": "busy CPUs", "off": "none"}
_COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#b83280", "#744210")
_DASHES = {"kernel": ":", "on-host": "--", "offload": "-"}


def write_trace(events: Any, path: Path, meta: Mapping[str, Any]) -> int:
    """Which vCPU ran where, for Perfetto. Returns the number of events."""
    perfetto.write_trace(events, path, meta)
    return len(events)


def table(results: Mapping[str, Any]) -> tuple[Sequence[str], list[list[str]]]:
    """The comparison as (columns, rows) of text. Raises ConfigError if these are no results of virtual machines.

    Performance is the work of a busy vCPU in a second, next to that of one alone on a core at base frequency; the rest is at the middle share of busy ones.
    """
    if results.get("subsystem") != "vm" or "configs" not in results:
        raise ConfigError("these are no results of virtual machines; `wave compare vm --out FILE` writes some")
    shares = results["busy_shares"]
    middle = len(shares) // 2
    columns = [
        "policy",
        "agent",
        "ticks on",
        *(f"{share:.0%} busy" for share in shares),
        f"MHz at {shares[middle]:.0%}",
        "deep cores",
        "wake p99, us",
    ]
    rows = []
    for each in results["configs"]:
        point = each["points"][middle]
        ticks = TICKS[each["ticks"]] + (f" ({each['only']})" if each["only"] else "")
        rows.append(
            [
                each["policy"],
                "" if each["placement"] == "kernel" else each["placement"],
                ticks,
                *(f"{at['performance']:.3f}" for at in each["points"]),
                f"{point['mhz']:,.0f}",
                f"{point['deep_cores']:.1f}",
                f"{point['wake_p99_us']:,.1f}",
            ]
        )
    return columns, rows


def render_report(results: Mapping[str, Any]) -> str:
    """The report's HTML: nothing is fetched when it is opened. Raises ConfigError if these are no results of virtual machines."""
    columns, rows = table(results)
    part, link = results["part"], results["link"]
    notes = [
        f"Timing: {results['timing']}. Part: {part['about']}. Link profile: {link['name'] if link['verified'] else 'assumed (' + link['name'] + ')'}.",
        "Performance: work of a busy vCPU, next to one alone on a core at base frequency. Ticks on busy CPUs: Linux's default. (time alone), (time and "
        "sleep): of no ticks only these effects are let in, the others stay as with ticks.",
        *results["notes"],
    ]
    return page.page(
        str(results["name"]),
        page.paragraphs([str(results.get("about", ""))]),
        page.table(columns, rows),
        page.paragraphs(notes),
        f"<h2>Performance of busy vCPUs</h2><figure>{_performance(results)}</figure>",
        *(
            f"<h2>What {html.escape(row['policy'])}, offloaded, gains without ticks</h2><figure>{_gain(results, row)}</figure>"
            for row in results["gains"]
            if "ticks" in row
        ),
        "<h2>Where the part's figures come from</h2>",
        page.table(("figure", "source"), sorted(part["sources"].items())),
    )


def _performance(results: Mapping[str, Any]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    axes = figure.subplots()
    shown = [each for each in results["configs"] if not each["only"]]
    kinds = list(dict.fromkeys((each["policy"], each["ticks"]) for each in shown))
    for each in shown:
        axes.plot(
            [100 * share for share in results["busy_shares"]],
            [point["performance"] for point in each["points"]],
            label=each["id"],
            color="#4a5568" if each["placement"] == "kernel" else _COLOURS[kinds.index((each["policy"], each["ticks"])) % len(_COLOURS)],
            linestyle=_DASHES[each["placement"]],
            marker="o",
            markersize=3.5,
            linewidth=1.3,
        )
    axes.set_xlabel("busy machines, %")
    axes.set_ylabel("performance")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return page.svg(figure)


def _gain(results: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """A bar for each effect at each share of busy machines, and the whole gain beside them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    axes = figure.subplots()
    shares = results["busy_shares"]
    width = 0.2
    for number, (name, colour) in enumerate((*zip(EFFECTS, _COLOURS, strict=False), ("gain", "#4a5568"))):
        at = [index + (number - 1.5) * width for index in range(len(shares))]
        bars = axes.bar(at, [100 * value for value in row[name]], width, color=colour, label="all of it" if name == "gain" else name)
        axes.bar_label(bars, fmt="%.1f", fontsize="x-small", padding=1)
    axes.axhline(0, color="#1c2026", linewidth=0.8)
    axes.set_xticks(range(len(shares)), [f"{share:.0%}" for share in shares])
    axes.set_xlabel("busy machines")
    axes.set_ylabel("gain, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize="small", frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return page.svg(figure)
