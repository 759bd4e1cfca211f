"""The report of serving: curves, hits by tier, a timeline, balance and recovery, as one HTML page."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from waveos.errors import ConfigError
from waveos.report import page

_TIERS = {"device": "#0072b2", "host": "#56b4e9", "storage": "#a23b8c", "computed": "#c9ced6"}
_TRACKS = {
    "prefill": "#0072b2",
    "stall": "#c44e00",
    "decode": "#00845f",
    "load": "#56b4e9",
    "back up": "#8a6a00",
    "storage": "#a23b8c",
    "agent": "#5b6470",
}


def render_report(results: Mapping[str, Any]) -> str:
    """The report's HTML: nothing is fetched when it is opened. Raises ConfigError if these are no results of serving."""
    if results.get("subsystem") != "serving" or "curves" not in results:
        raise ConfigError("these are no results of serving; `wave bench serving_report --out FILE` draws some")
    parts = [
        (
            "TTFT against throughput",
            _curves(results["curves"]),
            "Each point is one offered load; a curve ends where more load brings no more tokens.",
        ),
        ("Where the tokens of prompts came from", _hits(results["hits"]), "At the load at which each system is saturated; the last with storage."),
        (
            "What an instance does, for some seconds",
            _timeline(results["timeline"]),
            "Strata: a batch waits for KV where stalls are drawn. The agent's bars are the way there, the decision and the way back.",
        ),
        (
            "Work of the ranks",
            _balance(results["balance"]),
            "Attention of each rank over an even share; 1 is balance, and all wait for the highest bar.",
        ),
        (
            "After the loss of a GPU",
            _recovery(results["recovery"]),
            "Llama-3.1-70B on eight H100s, seven from 0 s on, a request of 4,000 tokens each 0.5 s. Flat: nobody gets a token. Recompute repeats tokens.",
        ),
        (
            "What an iteration costs the host",
            _costs(results["costs"]),
            "Written and read across the link, beside what the policy would take of the host.",
        ),
    ]
    body = "".join(f"<h2>{html.escape(title)}</h2><p>{html.escape(note)}</p><figure>{figure}</figure>" for title, figure, note in parts)
    return page.page(str(results["name"]), page.paragraphs([f"Timing: {results['timing']}. The emulated engine in virtual time."]), body)


def _figure(height: float = 3.4, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _curves(curves: Mapping[str, Any]) -> str:
    figure, (axes,) = _figure(4.0)
    for name, points in curves.items():
        axes.plot([each["throughput"] for each in points], [each["ttft_s"] for each in points], marker="o", markersize=4, label=name)
    axes.set_xlabel("output tokens/s")
    axes.set_ylabel("mean TTFT, s")
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
    return page.svg(figure)


def _hits(hits: Mapping[str, Any]) -> str:
    figure, (axes,) = _figure(0.5 * len(hits) + 1.0)
    names = list(hits)[::-1]
    left = [0.0] * len(names)
    for tier, colour in _TIERS.items():
        shares = [max(0.0, hits[name].get(tier, 0.0)) for name in names]
        axes.barh(names, shares, left=left, color=colour, label=tier, height=0.6)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the prompts' tokens")
    axes.legend(frameon=False, fontsize="small", ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return page.svg(figure)


def _timeline(spans: Mapping[str, Any]) -> str:
    figure, (axes,) = _figure(3.2)
    tracks = [track for track in _TRACKS if spans.get(track)][::-1]
    for at, track in enumerate(tracks):
        axes.broken_barh(spans[track], (at - 0.35, 0.7), facecolors=_TRACKS[track], linewidth=0)
    axes.set_yticks(range(len(tracks)), tracks)
    axes.set_xlabel("virtual time, s")
    begin = min((each[0] for track in tracks for each in spans[track]), default=0.0)
    axes.set_xlim(max(0.0, begin), begin + 6.0)
    axes.grid(alpha=0.3, axis="x")
    return page.svg(figure)


def _balance(balance: Mapping[str, Any]) -> str:
    figure, panels = _figure(2.8, len(balance))
    for axes, (name, each) in zip(panels, balance.items(), strict=True):
        ranks = range(len(each["uneven"]))
        axes.bar([rank - 0.2 for rank in ranks], each["uneven"], 0.38, color="#c9ced6", label="uneven sharding")
        axes.bar([rank + 0.2 for rank in ranks], each["failsafe"], 0.38, color="#0072b2", label="FailSafe: homes")
        axes.axhline(1.0, color="0.4", linewidth=0.8, linestyle=":")
        axes.set_title(name, fontsize="small")
        axes.set_xlabel("rank")
    panels[0].set_ylabel("attention over an even share")
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, fontsize="small", ncols=2, loc="outside upper center")
    return page.svg(figure)


def _recovery(recovery: Mapping[str, Any]) -> str:
    figure, (axes,) = _figure()
    for name, points in recovery.items():
        axes.plot(*zip(*points, strict=True), label=name, linewidth=1.3)
    axes.axvline(0.0, color="0.4", linewidth=0.8, linestyle=":")
    axes.set_xlabel("s since the failure")
    axes.set_ylabel("tokens decoded since -1 s")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small", ncols=4)
    return page.svg(figure)


def _costs(costs: Mapping[str, Any]) -> str:
    columns = ("system", "link, µs of the host an iteration", "policy, µs of the host freed an iteration")
    return page.table(columns, [(name, f"{each['link_us']:.2f}", f"{each['freed_us']:.1f}") for name, each in costs.items()])
