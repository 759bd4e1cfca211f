"""The report of a network comparison: latency over load, throughput within the goals, and the cores that each side spends."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from waveos.errors import ConfigError
from waveos.report import page
from waveos.report.packets import write_trace

__all__ = ["render_report", "table", "write_trace"]
_COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#b83280", "#744210", "#285e61")
_DASHES = {"kernel": ":", "on-host": "--", "offload": "-"}


def table(results: Mapping[str, Any]) -> tuple[Sequence[str], list[list[str]]]:
    """The comparison as (columns, rows) of text. Raises ConfigError if these are no results of the network."""
    if results.get("subsystem") != "net" or "configs" not in results:
        raise ConfigError("these are no results of a network scenario; `wave compare net --out FILE` writes some")
    names = [each["name"] for each in results["scenario"]["workload"]["classes"]]
    middle = len(results["loads_per_s"]) // 2
    load = results["loads_per_s"][middle]
    has_goal = any("goal_per_s" in each["figures"] for each in results["configs"])
    base = next((each["figures"].get("goal_per_s") for each in results["configs"] if each["placement"] == "kernel"), None)
    columns = ["policy", *(["at the goals/s", "of kernel"] if has_goal else []), *(f"{name} p99, us at {load:,.0f}/s" for name in names)]
    columns += ["refused", "host cores", "IPU cores"]
    rows = []
    for each in results["configs"]:
        figures, point = each["figures"], each["points"][middle]
        goal = figures.get("goal_per_s")
        rows.append(
            [
                each["id"],
                *([f"{goal:,.0f}" if goal else "", f"{goal / base:.2f}x" if goal and base else ""] if has_goal else []),
                *(_us(point["classes"][name]["p99_us"], point["saturated"]) for name in names),
                f"{point['shed_share']:.2%}",
                f"{figures['host_cores']:.0f}",
                f"{figures['ipu_cores']:.0f}",
            ]
        )
    return columns, rows


def _us(value: float | None, saturated: bool) -> str:
    return "saturated" if saturated else "" if value is None else f"{value:,.1f}"


def render_report(results: Mapping[str, Any]) -> str:
    """The report's HTML: nothing is fetched when it is opened. Raises ConfigError if these are no results of the network."""
    columns, rows = table(results)
    classes = results["scenario"]["workload"]["classes"]
    figures = "".join(f"<h2>p99 of {html.escape(each['name'])} over load</h2><figure>{_latency(results, each['name'])}</figure>" for each in classes)
    costs = results["costs"]
    goals = ", ".join(
        f"{name} {', '.join(f'{key} <= {value:g}' for key, value in goal.items())}" for name, goal in results["scenario"]["objective"].items()
    )
    notes = [
        f"Timing: {results['timing']}. Costs of the stack, {costs['name']}: {'measured' if costs['verified'] else 'assumed'}. {costs['source']}",
        *([f"The goals: {goals}; within them nothing may be refused."] if goals else []),
        "kernel: the card's hash, stack and steering on the host. on-host: the policy on a host core of its own. offload: stack and policy on the IPU, "
        "whose cores are slower; the host keeps its workers.",
        *results["notes"],
    ]
    return page.page(
        str(results["name"]),
        page.paragraphs([str(results.get("about", ""))]),
        page.table(columns, rows),
        page.paragraphs(notes),
        figures,
        f"<h2>Cores</h2><figure>{_cores(results)}</figure>",
    )


def _latency(results: Mapping[str, Any], name: str) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots()
    policies = list(dict.fromkeys(each["policy"] for each in results["configs"]))
    for each in results["configs"]:
        shown = [(point["load_per_s"], point["classes"][name]["p99_us"]) for point in each["points"] if not point["saturated"]]
        shown = [(load, value) for load, value in shown if value is not None]
        if shown:
            colour = "#4a5568" if each["placement"] == "kernel" else _COLOURS[policies.index(each["policy"]) % len(_COLOURS)]
            axes.plot(
                *zip(*shown, strict=True),
                label=each["id"],
                color=colour,
                linestyle=_DASHES[each["placement"]],
                marker="o",
                markersize=3.5,
                linewidth=1.3,
            )
    goal = results["scenario"]["objective"].get(name, {}).get("p99_us")
    if goal:
        axes.axhline(goal, color="#9b2c2c", linewidth=0.8)
        axes.annotate("goal", (1, goal), xycoords=("axes fraction", "data"), xytext=(-4, 3), textcoords="offset points", ha="right", color="#9b2c2c")
    axes.set_yscale("log")
    axes.set_xlim(left=0)
    axes.set_xlabel("offered load, requests/s")
    axes.set_ylabel("p99, µs")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=1, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return page.svg(figure)


def _cores(results: Mapping[str, Any]) -> str:
    """Host cores to the right, IPU cores to the left, a bar each."""
    from matplotlib.figure import Figure

    configs = results["configs"][::-1]
    figure = Figure(figsize=(11, 0.6 + 0.3 * len(configs)), layout="constrained")
    axes = figure.subplots()
    host, ipu = ([each["figures"][name] for each in configs] for name in ("host_cores", "ipu_cores"))
    axes.barh([each["id"] for each in configs], host, color="#4a5568", height=0.62, label="host")
    axes.barh([each["id"] for each in configs], ipu, left=host, color="#2f855a", height=0.62, label="IPU")
    for row, (of_host, of_ipu) in enumerate(zip(host, ipu, strict=True)):
        axes.text(of_host - 0.2, row, f"{of_host:.0f}", va="center", ha="right", color="white", fontsize="small")
        if of_ipu:
            axes.text(of_host + of_ipu - 0.2, row, f"{of_ipu:.0f}", va="center", ha="right", color="white", fontsize="small")
    axes.set_xlabel("cores")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize="small", frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return page.svg(figure)
