"""The report of a memory comparison, modelled or live: what each policy saved, what it cost, what it believed against what was true."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from waveos.errors import ConfigError
from waveos.report import page

COLUMNS = ("policy", "saved", "of oracle", "throughput", "GET p99, us", "precision", "recall", "scan", "reclaim", "policy", "host cores", "stale")
LIVE_COLUMNS = (
    "policy",
    "saved",
    "of oracle",
    "throughput",
    "by the wall",
    "GET p99, us",
    "precision",
    "recall",
    "hostd, cores",
    "agent, cores",
    "stale",
)
_LIVE_SERIES = (
    ("resident_mib", "resident memory of the database, MiB"),
    ("zram_mib", "memory that zram takes for what is in swap, MiB"),
    ("kgets_per_cpu_s", "thousand GETs for each second of the database's CPU time"),
    ("get_p50_us", "median of GET, µs"),
    ("get_p99_us", "p99 of GET, µs"),
    ("precision", "what was reclaimed and truly cold, as a share of what was reclaimed"),
    ("recall", "what was reclaimed and truly cold, as a share of what was cold"),
    ("agent_cores", "CPU time of the policy (agentd), cores"),
    ("hostd_cores", "CPU time of the mechanism (hostd: passes over access bits, and moving pages), cores"),
)
_SERIES = (
    ("footprint_share", "memory in use, as a share (resident and in zram)"),
    ("get_p99_us", "p99 of GET, µs"),
    ("precision", "what was reclaimed and truly cold, as a share of what was reclaimed"),
    ("recall", "what was reclaimed and truly cold, as a share of what was cold"),
    ("policy_ms", "CPU time of the policy in each step of 0.3 s, ms"),
)


def table(results: Mapping[str, Any]) -> tuple[Sequence[str], list[list[str]]]:
    """The comparison as (columns, rows) of text. Raises ConfigError if these are no results of memory."""
    if results.get("subsystem") != "memory" or "configs" not in results:
        raise ConfigError("these are no results of a memory scenario; `wave compare memory --out FILE` writes some")
    saved = [each["figures"]["saved_share"] for each in results["configs"] if each["placement"] == "oracle"]
    return _live_table(results) if results.get("world") == "local" else _model_table(results, saved[0] if saved else 0.0)


def _model_table(results: Mapping[str, Any], oracle: float) -> tuple[Sequence[str], list[list[str]]]:
    rows = []
    for each in results["configs"]:
        figures = each["figures"]
        rows.append(
            [
                each["id"],
                f"{figures['saved_share']:.1%}",
                f"{figures['saved_share'] / oracle:.0%}" if oracle > 0 else "",
                f"{figures['throughput_ratio']:.4f}",
                f"{figures['get_p99_us']:.2f}",
                f"{figures['precision']:.3f}",
                f"{figures['recall']:.3f}",
                f"{figures['scan_cores']:.4f}",
                f"{figures['reclaim_cores']:.4f}",
                f"{figures['policy_cores']:.4f}",
                f"{figures['host_cores']:.4f}",
                f"{figures['stale_share']:.2%}",
            ]
        )
    return COLUMNS, rows


def _live_table(results: Mapping[str, Any]) -> tuple[Sequence[str], list[list[str]]]:
    """Of each hot set its own oracle is what others are compared with."""
    oracles = {each["scrambled"]: each["figures"]["saved_share"] for each in results["configs"] if each["placement"] == "oracle"}
    rows = []
    for each in results["configs"]:
        figures, oracle = each["figures"], oracles.get(each["scrambled"], 0.0)
        outcomes = each["outcomes"]
        rows.append(
            [
                each["id"],
                f"{figures['saved_share']:.1%}",
                f"{figures['saved_share'] / oracle:.0%}" if oracle > 0 else "",
                f"{figures['throughput_ratio']:.4f}",
                f"{figures['wall_throughput_ratio']:.4f}",
                f"{figures['get_p99_us']:.2f}",
                *(f"{figures[name]:.3f}" if name in figures else "" for name in ("precision", "recall")),
                f"{figures['hostd_cores']:.4f}",
                f"{figures['agent_cores']:.4f}",
                f"{outcomes['stale'] / max(1, sum(outcomes.values())):.2%}" if outcomes else "",
            ]
        )
    return LIVE_COLUMNS, rows


def render_report(results: Mapping[str, Any]) -> str:
    """The report's HTML: nothing is fetched when it is opened. Raises ConfigError if these are no results of memory."""
    columns, rows = table(results)
    live = results.get("world") == "local"
    shown = [each for each in results["configs"] if each["placement"] != "on-host"]
    shown = shown if live or any(each["placement"] == "offload" for each in shown) else list(results["configs"])
    clock = "s since the database began to serve" if live else "virtual time, s"
    series = _LIVE_SERIES if live else _SERIES
    drawn = ((title, _lines(shown, name, clock)) for name, title in series)
    figures = "".join(f"<h2>{html.escape(title)}</h2><figure>{figure}</figure>" for title, figure in drawn if figure)
    maps = "".join(
        f"<h3>{html.escape(each['id'])}</h3><figure>{_heat(each, clock)}</figure>" for each in shown if each["maps"] and each["placement"] != "kernel"
    )
    stops = "".join(
        f"<li>{html.escape(each['id'])}, {at_s:.1f} s: {html.escape(why)}</li>" for each in results["configs"] for at_s, why in each["stops"]
    )
    notes = [f"Timing: {results['timing']}.", *_sources(results), *results["notes"]]
    return page.page(
        str(results["name"]),
        page.paragraphs([str(results.get("about", ""))]),
        page.table(columns, rows),
        page.paragraphs(notes),
        figures,
        f"<h2>Where the accesses were, and what stayed resident</h2>{maps}",
        f"<h2>What the safeguards did</h2><ul>{stops}</ul>" if stops else "",
    )


def _sources(results: Mapping[str, Any]) -> list[str]:
    """Where a model's constants come from."""
    if results.get("world") == "local":
        return ["Cores are of the time that counts: hostd looks at access bits and moves pages, the agent is the policy in its own process."]
    link, costs = results["link"], results["costs"]
    return [
        f"Link profile {link['name']}: {'measured' if link['verified'] else 'assumed'}. {link['source']}",
        f"Costs of memory management, {costs['name']}: {costs['source']}",
        "Cores are of the time after warm-up; host cores are scanning, reclaiming, the link, and on-host the policy itself.",
    ]


def _lines(configs: Sequence[Mapping[str, Any]], name: str, clock: str) -> str:
    """A line a configuration; "" if there is nothing to draw."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.8), layout="constrained")
    axes = figure.subplots()
    for number, each in enumerate(configs):  # a configuration has its colour in every figure
        values = each["series"].get(name)
        if values and any(values):
            axes.plot(each["series"]["time_s"], values, label=each["id"], linewidth=1.2, color=f"C{number % 10}")
    if not axes.lines:
        return ""
    axes.set_xlabel(clock)
    axes.grid(alpha=0.3)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small", ncols=4, frameon=False)
    return page.svg(figure)


_MAPS = {"accesses": "accesses/s", "hot": "hot in truth, share", "resident": "resident share"}


def _heat(config: Mapping[str, Any], clock: str) -> str:
    """Accesses, or what was hot, and what is resident, over address and time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.0), layout="constrained")
    ends = config["series"]["time_s"][-1]
    for axes, name in zip(figure.subplots(1, 2), config["maps"], strict=True):
        rows = list(zip(*config["maps"][name], strict=True))
        image = axes.imshow(rows, aspect="auto", origin="lower", extent=(0, ends, 0, 1), interpolation="nearest", vmin=0)
        figure.colorbar(image, ax=axes)
        axes.set_title(_MAPS[name], fontsize="small")
        axes.set_xlabel(clock)
        axes.set_ylabel("address, as a share")
    return page.svg(figure)
