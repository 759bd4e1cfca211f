"""The report of a memory comparison: what each policy saved, what it cost, what it believed against what was true."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from waveos.errors import ConfigError

COLUMNS = ("policy", "saved", "of oracle", "throughput", "GET p99, us", "precision", "recall", "scan", "reclaim", "policy", "host cores", "stale")
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
    oracle = next((each["figures"]["saved_share"] for each in results["configs"] if each["placement"] == "oracle"), 0.0)
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


def render_report(results: Mapping[str, Any]) -> str:
    """The report's HTML: nothing is fetched when it is opened. Raises ConfigError if these are no results of memory."""
    columns, rows = table(results)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    shown = [each for each in results["configs"] if each["placement"] != "on-host"]
    shown = shown if any(each["placement"] == "offload" for each in shown) else list(results["configs"])
    figures = "".join(f"<h2>{html.escape(title)}</h2><figure>{_lines(shown, name)}</figure>" for name, title in _SERIES)
    maps = "".join(
        f"<h3>{html.escape(each['id'])}</h3><figure>{_heat(each)}</figure>" for each in shown if each["maps"] and each["placement"] != "kernel"
    )
    stops = "".join(
        f"<li>{html.escape(each['id'])}, {at_s:.1f} s: {html.escape(why)}</li>" for each in results["configs"] for at_s, why in each["stops"]
    )
    link, costs = results["link"], results["costs"]
    notes = [
        f"Timing: {results['timing']}. Link profile {link['name']}: {'measured' if link['verified'] else 'assumed'}. {link['source']}",
        f"Costs of memory management, {costs['name']}: {costs['source']}",
        *results["notes"],
        "Cores are of the time after warm-up; host cores are scanning, reclaiming, the link, and on-host the policy itself.",
    ]
    return _PAGE.format(
        name=html.escape(str(results["name"])),
        about=html.escape(str(results.get("about", ""))),
        head=head,
        body=body,
        notes="".join(f"<p>{html.escape(note)}</p>" for note in notes),
        figures=figures,
        maps=maps,
        stops=f"<h2>What the safeguards did</h2><ul>{stops}</ul>" if stops else "",
    )


def _lines(configs: Sequence[Mapping[str, Any]], name: str) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.8), layout="constrained")
    axes = figure.subplots()
    for each in configs:
        values = each["series"].get(name)
        if values and any(values):
            axes.plot(each["series"]["time_s"], values, label=each["id"], linewidth=1.2)
    axes.set_xlabel("virtual time, s")
    axes.grid(alpha=0.3)
    axes.set_ylim(bottom=0)
    if axes.lines:
        axes.legend(fontsize="small", ncols=4, frameon=False)
    return _svg(figure)


def _heat(config: Mapping[str, Any]) -> str:
    """Accesses, and what is resident, over address and time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.0), layout="constrained")
    ends = config["series"]["time_s"][-1]
    for axes, name, title in zip(figure.subplots(1, 2), ("accesses", "resident"), ("accesses/s", "resident share"), strict=True):
        rows = list(zip(*config["maps"][name], strict=True))
        image = axes.imshow(rows, aspect="auto", origin="lower", extent=(0, ends, 0, 1), interpolation="nearest", vmin=0)
        figure.colorbar(image, ax=axes)
        axes.set_title(title, fontsize="small")
        axes.set_xlabel("virtual time, s")
        axes.set_ylabel("address, as a share")
    return _svg(figure)


def _svg(figure: Any) -> str:
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "wave", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return re.sub(r"^.*?(?=<svg)", "", text.getvalue(), flags=re.DOTALL)


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name} · Wave</title>
<style>
body {{ margin: 0 auto; max-width: 1240px; padding: 28px 24px 60px; background: #fff; color: #1c2026; font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif; }}
table {{ border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 4px 9px; text-align: right; white-space: nowrap; border-bottom: 1px solid #e4e7eb; }}
th:first-child, td:first-child {{ text-align: left; }}
svg {{ display: block; width: 100%; height: auto; }}
h2 {{ font-size: 1.15rem; margin: 2rem 0 .3rem; }}
figure {{ margin: .4rem 0 0; }}
.wide {{ overflow-x: auto; }}
</style>
</head>
<body>
<h1>{name}</h1>
<p>{about}</p>
<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>
{notes}
{figures}
<h2>Where the accesses were, and what stayed resident</h2>
{maps}
{stops}
</body>
</html>
"""
