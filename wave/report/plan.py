"""The report of a plan: a verdict in plain words, the links side by side, and maps of where offload pays."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from waveos.errors import ConfigError
from waveos.report import page
from waveos.report.quantities import show_rate, show_share, show_share_interval, show_time

COLUMNS = ("link", "profile", "one way", "IPU core", "sustained", "than on host", "cores freed", "breaks even at", "decision p50")
ANSWERS = {
    "yes": "Offload it",
    "no": "Keep it on the host",
    "even": "It makes no difference that can be told",
    "kernel": "Leave it to the kernel",
    "open": "There is no answer",
}
_MATTERS_SHARE = 0.01
"""Load that a cost's absence lets in and that is more than the searches' own resolution."""


def verdict(results: Mapping[str, Any]) -> dict[str, Any]:
    """`answer` (a key of ANSWERS), the `headline`, the `limit` (the most limiting cost, "" where none matters), and `sentences` that say why."""
    _check(results)
    if not results["answered"]:
        why = f"with {results['policy']}'s agent on a host core the objective is met at no load that was tried"
        return {"answer": "open", "headline": f"{ANSWERS['open']}: {why}.", "limit": "", "sentences": []}
    low, high = results["gain_interval"]
    answer = "yes" if low > 0 else "no" if high < 0 else "even"
    if results["kernel_per_s"] >= max(results["offload_per_s"], results["host_per_s"]):
        answer = "kernel"
    limit = next((row["cost"] for row in results["costs"] if row["relief_share"] > _MATTERS_SHARE), "")
    return {"answer": answer, "headline": _headline(results, answer), "limit": limit, "sentences": list(_sentences(results))}


def table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The links as (columns, rows) of text. Raises ConfigError if these are no results of a plan."""
    _check(results)
    name = results["latency_class"]
    rows = []
    for row in results.get("links", []):
        latency = row["latency"]
        rows.append(
            [
                row["kind"] + ("" if not row["own"] else " *"),
                row["profile"],
                show_time(row["one_way_ns"] / 1000),
                f"{row['speed']:g}",
                show_rate(row["saturation_per_s"]),
                show_share(row["gain_share"], sign=True),
                _cores(row["cores_freed"]),
                _speed(results, row["breakeven_speed"]),
                show_time(latency["decision_p50_us"]),
                *(show_time(latency[key]) + (" (saturated)" if latency["saturated"] else "") for key in ("p50_us", "p99_us")),
            ]
        )
    return [*COLUMNS, f"{name} p50", f"{name} p99"], rows


def render_report(results: Mapping[str, Any]) -> str:
    """The report's HTML: nothing is fetched when it is opened. Raises ConfigError if these are no results of a plan."""
    said, (columns, rows) = verdict(results), table(results)
    title = f"{results['name']}: should {results['policy']} be offloaded?"
    if not results["answered"]:
        return page.page(title, page.paragraphs([said["headline"], _how(results)]))
    return page.page(
        title,
        f"<p><strong>{html.escape(said['headline'])}</strong></p>",
        page.paragraphs(said["sentences"]),
        "<h2>The links</h2>",
        page.table(columns, rows),
        page.paragraphs([_legend(results)]),
        *_maps(results),
        "<h2>What each cost is worth</h2>",
        page.paragraphs(
            ["Load sustained more if that cost alone were nothing, all else as in the scenario. Searches end within 1 %: less says nothing."]
        ),
        page.table(("cost", "now", "if it were free", "seeds"), [_cost_row(row) for row in results["costs"]]),
        "<h2>What each mitigation is worth</h2>",
        page.table(("mitigations", "sustained", "than on host", "cores freed"), [_mitigation_row(row) for row in results["mitigations"]]),
        "<h2>How this was made</h2>",
        page.paragraphs([_how(results)]),
    )


# ── in words ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _headline(results: Mapping[str, Any], answer: str) -> str:
    policy, workers, gain = results["policy"], results["workers"], results["gain_share"]
    where = f"with {policy} on the IPU ({results['link']['name']}, a core of {results['speed']:g} of the host's speed)"
    than = f"than with its agent on {'one of them' if workers > 1 else 'another'}"
    interval = show_share_interval(results["gain_interval"])
    much = f"{show_share(abs(gain))} {'more' if gain >= 0 else 'less'} (95 % interval {interval})"
    if answer == "kernel":
        return (
            f"{ANSWERS[answer]}: its own scheduler sustains {show_rate(results['kernel_per_s'])}, {policy} {show_rate(results['host_per_s'])} "
            f"from the host and {show_rate(results['offload_per_s'])} from the IPU."
        )
    return f"{ANSWERS[answer]}: {where} the machine's {workers} cores sustain {show_rate(results['offload_per_s'])}, {much}, {than}."


def _sentences(results: Mapping[str, Any]) -> Iterator[str]:
    freed, needed, workers = results["cores_freed"], results["workers_needed"], results["workers"]
    if freed is not None:
        amount = f"{abs(freed):.2f} of a host core" if abs(freed) < 1 else f"{abs(freed):.1f} host cores"
        spare = workers - needed if needed is not None else 0
        whole = f"; in whole cores, {needed} of {workers} serve the load that the host sustains with all" if spare > 0 else ""
        whole = f"; no whole core can go on a machine of this size: all {workers} are still needed" if spare == 0 and needed else whole
        whole = f"; {needed} cores would be needed for the load that the host sustains with {workers}" if spare < 0 else whole
        yield f"At the same load that {'frees' if freed >= 0 else 'costs'} {amount} of {workers}{whole}."
    yield _break_even(results)
    yield _latency(results)
    yield _limit(results)
    pays = [row["kind"] for row in results["links"] if row["gain_share"] > 0]
    others = [row["kind"] for row in results["links"] if row["gain_share"] <= 0]
    told = [f"over {_listed(pays)} it sustains more than the host"] if pays else []
    told += [f"over {_listed(others)} it does not"] if others else []
    yield f"By kind of link, each with its own IPU core: {'; '.join(told)}."
    if not results["link"]["verified"]:
        yield "link profile: assumed, so that orders and break-evens are firmer than figures."


def _break_even(results: Mapping[str, Any]) -> str:
    speed, interval = results["breakeven_speed"], results["breakeven_interval"]
    least, most = results["speed_bounds"]
    if speed is None:
        return f"No IPU core of up to {most:g} times a host core's speed makes it pay on this link."
    if speed == 0:
        return f"It pays with any IPU core down to {least:g} of a host core's speed."
    between = f" ({interval[0]:.3g} to {interval[1]:.3g})" if interval else ""
    return f"It breaks even with an IPU core of {speed:.3g}{between} of a host core's speed; this one has {results['speed']:g}."


def _latency(results: Mapping[str, Any]) -> str:
    own = next((row for row in results["links"] if row["own"]), None)
    name, host, share = results["latency_class"], results["on_host_latency"], results["latency_load_share"]
    if own is None or own["latency"]["saturated"] or host["saturated"]:
        return f"At {share:.0%} of the host's load it is saturated, so there is no latency to compare."
    told = [
        f"{name} {quantile} {show_time(own['latency'][key])} instead of {show_time(host[key])}"
        for key, quantile in (("p50_us", "p50"), ("p99_us", "p99"))
    ]
    decided = f"a decision takes {show_time(own['latency']['decision_p50_us'])} instead of {show_time(host['decision_p50_us'])} (median)"
    return f"Latency paid at {share:.0%} of the host's load, against an agent on the host beside as many workers: {told[0]}, {told[1]}; {decided}."


def _limit(results: Mapping[str, Any]) -> str:
    first = results["costs"][0] if results["costs"] else None
    if first is None or first["relief_share"] <= _MATTERS_SHARE:
        most = show_share(max(0.0, first["relief_share"] if first else 0.0))
        return f"No single cost limits it: without any one of them at most {most} more would be sustained, so the workers are the limit."
    return (
        f"The single most limiting cost is {first['cost']} ({first['ns']:,.0f} ns): if it were nothing, {show_share(first['relief_share'])} more "
        "would be sustained."
    )


def _how(results: Mapping[str, Any]) -> str:
    return (
        f"Timing: {results['timing']}, {results['runs']} runs; seeds {', '.join(map(str, results['seeds']))} for the verdict, the first alone for tables and "
        f"maps. The policy takes {results['message_ns']:g} ns a message on a host core. Link: {results['link']['source']}. Wave {results['wave_version']}. "
        "Sustained: the highest load that meets the objective. Cores freed: workers times (1 - on-host / offloaded load). Several IPU cores: an agent each, "
        "with an equal part of the CPUs and of the load."
    )


def _legend(results: Mapping[str, Any]) -> str:
    return (
        f"* the scenario's own. Latencies at {results['latency_load_share']:.0%} of the load that the host sustains with its agent on one of its "
        f"{results['workers']} cores ({show_rate(results['host_per_s'])}). The kernel's own scheduler sustains {show_rate(results['kernel_per_s'])}."
    )


# ── in pictures ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _maps(results: Mapping[str, Any]) -> Iterator[str]:
    surface, paid, name = results["map"], results["paid"], results["latency_class"]
    yield "<h2>Where it pays: host cores freed, over latency of the link and speed of the IPU core</h2>"
    yield f"<figure>{_figure(lambda axes: _freed(axes, results, surface))}</figure>"
    yield page.paragraphs(
        ["The heavy line is break-even; the cross is the scenario. Propagation is made longer or shorter, all else is the scenario's link."]
    )
    yield "<h2>The speed from which on it pays, by number of IPU cores</h2>"
    yield f"<figure>{_figure(lambda axes: _curves(axes, results))}</figure>"
    yield page.paragraphs(
        ["A line that ends: no speed within the bounds pays beyond it. Each IPU core has its own agent and an equal part of the CPUs."]
    )
    for quantile in ("p50", "p99"):
        yield f"<h2>Latency paid: {html.escape(name)} {quantile} against an agent on the host, over latency of the link and load</h2>"
        yield f"<figure>{_figure(partial(_paid, paid=paid, key=f'{quantile}_us'))}</figure>"
    yield page.paragraphs(["Loads are shares of what the host sustains with its agent on one of its cores. Blank: saturated."])


def _figure(draw: Callable[[Any], None]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    draw(figure.subplots())
    return page.svg(figure)


def _freed(axes: Any, results: Mapping[str, Any], surface: Mapping[str, Any]) -> None:
    rows = _numbers(surface["cores_freed"])
    workers = results["workers"]
    reach = max(1.0, 1.2 * max(value for row in rows for value in row if value == value))
    rows = [[max(-reach, value) if value == value else -reach for value in row] for row in rows]  # far below, how far says nothing
    drawn = axes.contourf(surface["one_way_ns"], surface["speeds"], rows, levels=[reach * step / 10 for step in range(-10, 11)], cmap="RdBu")
    axes.figure.colorbar(drawn, ax=axes, label=f"host cores freed, of {workers}")
    flat = [value for row in rows for value in row]
    if min(flat) < 0 < max(flat):
        line = axes.contour(surface["one_way_ns"], surface["speeds"], rows, levels=[0], colors="black", linewidths=2)
        axes.clabel(line, fmt={0: "breaks even"}, fontsize=9)
    own = next((row for row in results["links"] if row["own"]), None)
    if own is not None and own["one_way_ns"] > 0:
        axes.plot([own["one_way_ns"]], [results["speed"]], "x", color="black", markersize=10, markeredgewidth=2)
    _log(axes, surface["one_way_ns"], surface["speeds"], "speed of an IPU core, of a host core's")


def _curves(axes: Any, results: Mapping[str, Any]) -> None:
    of, bounds = results["breakeven"], results["speed_bounds"]
    for number, (count, speeds) in enumerate(zip(of["ipu_cores"], of["speeds"], strict=True)):
        known = [(ns, max(speed, bounds[0])) for ns, speed in zip(of["one_way_ns"], speeds, strict=True) if speed is not None]
        label = f"{count} IPU core{'s' if count > 1 else ''}" + ("" if known else ": at none")
        axes.plot([ns for ns, _ in known], [speed for _, speed in known], marker="o", color=f"C{number}", label=label)
    axes.axhline(results["speed"], color="grey", linewidth=1, linestyle="--", label="the scenario's IPU core")
    _log(axes, of["one_way_ns"], [0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5], "break-even speed, of a host core's")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", frameon=False)


def _paid(axes: Any, paid: Mapping[str, Any], key: str) -> None:
    import numpy as np

    rows = np.ma.masked_invalid(np.array(_numbers(paid[key])))
    if rows.count() < 4:
        axes.text(0.5, 0.5, "saturated nearly everywhere: nothing to draw", ha="center", transform=axes.transAxes)
        return
    drawn = axes.contourf(paid["one_way_ns"], paid["loads_share"], rows, levels=14, cmap="YlOrRd")
    axes.figure.colorbar(drawn, ax=axes, label="µs more")
    line = axes.contour(paid["one_way_ns"], paid["loads_share"], rows, levels=6, colors="black", linewidths=0.6)
    axes.clabel(line, fontsize=8)
    _across(axes, paid["one_way_ns"])
    axes.set_ylabel("load, as a share")


def _across(axes: Any, one_way_ns: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.set_xlim(min(one_way_ns), max(one_way_ns))
    axes.set_xticks(one_way_ns, [f"{ns:,}" for ns in one_way_ns], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("one way over the link, ns")


def _log(axes: Any, one_way_ns: Sequence[float], speeds: Sequence[float], label: str) -> None:
    _across(axes, one_way_ns)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    shown = [speed for speed in speeds if low <= speed <= high]
    axes.set_yticks(shown, [f"{speed:g}" for speed in shown], minor=False)
    axes.set_yticks([], minor=True)
    axes.set_ylabel(label)


def _numbers(rows: Sequence[Sequence[float | None]]) -> list[list[float]]:
    return [[float("nan") if value is None else float(value) for value in row] for row in rows]


# ── in cells ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _check(results: Mapping[str, Any]) -> None:
    if results.get("kind") != "plan" or "answered" not in results:
        raise ConfigError("these are no results of a plan; `wave plan SCENARIO --out FILE` writes some")


def _speed(results: Mapping[str, Any], speed: float | None) -> str:
    if speed is None:
        return "no speed"
    return f"{speed:.3g}" if speed else f"below {results['speed_bounds'][0]:g}"


def _cores(freed: float | None) -> str:
    return "–" if freed is None else f"{freed:+.2f}".replace("-", "−")


def _cost_row(row: Mapping[str, Any]) -> list[str]:
    return [row["cost"], f"{row['ns']:,.0f} ns", show_share(row["relief_share"], sign=True), str(row["seeds"])]


def _mitigation_row(row: Mapping[str, Any]) -> list[str]:
    return [row["label"], show_rate(row["saturation_per_s"]), show_share(row["gain_share"], sign=True), _cores(row["cores_freed"])]


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
