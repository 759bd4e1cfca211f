"""The report's figures as SVG text that takes its colours from the page.

Policies differ by colour and marker, worlds by line style. Colours are CSS variables (`--ink`, `--policy-1`, ...), so one drawing
reads in light and dark; text stays text and takes the page's font.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from waveos.report.quantities import show_time
from waveos.report.reading import QUANTILES, SAME_MACHINE, Configuration, Reading

ROLES = {"ink": "#0a0b01", "muted": "#0a0b02", "grid": "#0a0b03", "paper": "#0a0b04", "kernel": "#0a0b05", "goal": "#0a0b06"}
"""Stand-ins that matplotlib draws with; `_to_page` turns each into the CSS variable of its name."""
POLICY_COLOURS = tuple(f"#0a0c{number:02x}" for number in range(1, 7))
_MARKERS = {
    "o": "M7 0a3 3 0 1 1-6 0a3 3 0 1 1 6 0",
    "s": "M1-3h6v6h-6z",
    "^": "M4-4l3.5 7h-7z",
    "D": "M4-4l4 4l-4 4l-4-4z",
    "v": "M4 4l3.5-7h-7z",
    "P": "M3-4h2v3h3v2h-3v3h-2v-3h-3v-2h3z",
}
"""matplotlib's name of a marker, and the same shape for the legend, in a box of 8 by 8 about (4, 0)."""
_DASHES = {"kernel": (1.0, 1.4), "on-host": (5.0, 2.0), SAME_MACHINE: (5.0, 1.5, 1.0, 1.5)}
"""Line styles in line widths, on and off; a world that is not here has a full line."""
_STALENESS = ("stale_share", "decision_age_p99_us", "stale_age_p99_us")
_WIDTH = 11.0
_RIGHT = 0.25


@dataclass(frozen=True)
class Key:
    """One entry of a figure's legend, for the page to draw."""

    label: str
    colour: str
    dashes: str = ""
    marker: str = ""


def world_keys(reading: Reading) -> list[Key]:
    """The legend of `draw_policies`: line styles."""
    shown = {_world(each): each for each in reading.configurations}
    keys = [Key(name, "var(--kernel)" if each.world == "kernel" else "var(--ink)", _dashes(each)) for name, each in shown.items()]
    return keys + _goal_keys(reading)


def configuration_keys(reading: Reading) -> list[Key]:
    """The legend of `draw_quantiles`: every configuration."""
    return [_key(reading, each) for each in reading.configurations] + _goal_keys(reading)


def staleness_keys(reading: Reading) -> list[Key]:
    """The legend of `draw_staleness`: the configurations that say anything of it."""
    return [_key(reading, each) for each in reading.configurations if _says(each, _STALENESS)]


def draw_policies(reading: Reading, quantile: str = "p99_us") -> str:
    """One column a policy, one row a class: latency against load in each world, with saturation as a vertical line."""
    policies = reading.policies or ["kernel"]
    figure, axes = _grid(len(reading.classes), len(policies), 2.7)
    for row, name in enumerate(reading.classes):
        for column, policy in enumerate(policies):
            panel = axes[row][column]
            shown = [each for each in reading.configurations if each.world == "kernel" or each.policy == policy]
            _draw_latency(panel, reading, shown, name, quantile)
            if row == 0:
                panel.set_title(policy, color=_colour(reading, policy), fontweight="bold", fontsize=10, loc="left")
                for each in shown:
                    if each.saturation_per_s is not None:
                        panel.axvline(each.saturation_per_s / 1e3, color=_colour_of(reading, each), linestyle=_style(each), linewidth=0.8, alpha=0.75)
        _share_limits(axes[row], reading, name)
        axes[row][0].set_ylabel(f"{name} {QUANTILES[quantile]}", color=ROLES["ink"])
    for panel in axes[-1]:
        panel.set_xlabel("offered load, 1000 requests/s")
    return _to_page(figure, "policies", "Latency against offered load, one column a policy")


def draw_quantiles(reading: Reading) -> str:
    """One row a class, one column a quantile: every configuration in each."""
    figure, axes = _grid(len(reading.classes), len(QUANTILES), 2.9)
    for row, name in enumerate(reading.classes):
        for column, quantile in enumerate(QUANTILES):
            panel = axes[row][column]
            _draw_latency(panel, reading, reading.configurations, name, quantile)
            panel.set_title(f"{name} {QUANTILES[quantile]}", color=ROLES["ink"], fontsize=10, loc="left")
        _share_limits(axes[row], reading, name)
        axes[row][0].set_ylabel("latency", color=ROLES["ink"])
    for panel in axes[-1]:
        panel.set_xlabel("offered load, 1000 requests/s")
    return _to_page(figure, "quantiles", "p50, p99 and p99.9 latency against offered load, every configuration")


def draw_one_load(reading: Reading) -> str:
    """For results at one load: p50, p99 and p99.9 of each configuration, one column a class."""
    rows = [row for row in reading.rows() if row.load_per_s is not None]
    labels = [row.configuration.label for row in rows]
    figure, (panels,) = _grid(1, len(reading.classes), 1.05 + 0.28 * len(rows), left=_room_for(labels), gap=0.3, sharey=True)
    for panel, name in zip(panels, reading.classes, strict=True):
        for place, row in enumerate(rows):
            found = [(label, us) for key, label in QUANTILES.items() if (us := row.latency_us[name][key])]
            colour = _colour_of(reading, row.configuration)
            panel.plot([us for _, us in found], [place] * len(found), color=colour, linewidth=1.6, linestyle=_style(row.configuration))
            for marker, (_, us) in zip(("o", "s", "D"), found, strict=False):
                panel.plot([us], [place], marker, color=colour, markersize=6)
        _draw_goals(panel, reading, name)
        _time_axis(panel, panel.xaxis, many=True)
        panel.set_title(f"{name} latency", color=ROLES["ink"], fontsize=10, loc="left")
        panel.grid(visible=False, axis="y")
    panels[0].set_yticks(range(len(rows)), labels)
    panels[0].set_ylim(len(rows) - 0.5, -1.2)
    return _to_page(figure, "one-load", "Latency of each configuration")


def _draw_goals(panel: Any, reading: Reading, name: str) -> None:
    for quantile, us in reading.objective_us.get(name, {}).items():
        panel.axvline(us, color=ROLES["goal"], linewidth=1.1, zorder=1.5)
        text, place = (
            f"{QUANTILES.get(quantile, '')} objective {show_time(us)}",
            {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"},
        )
        panel.annotate(text, (us, 1), (-3, -9), **place, color=ROLES["goal"], fontsize=8, ha="right")


def draw_saturation(reading: Reading) -> str:
    """Saturation throughput of each configuration with its interval."""
    shown = [each for each in reading.configurations if each.saturation_per_s is not None]
    labels = [f"{each.label}, {each.workers} workers" if each.workers else each.label for each in shown]
    figure, ((panel,),) = _grid(1, 1, 0.65 + 0.27 * len(shown), left=_room_for(labels), above=0.05)
    for place, each in enumerate(shown):
        colour, marker = _colour_of(reading, each), "o" if each.world == "kernel" else _marker(reading, each)
        ends = (each.saturation_low_per_s, each.saturation_high_per_s)
        _draw_interval(panel, place, each.saturation_per_s, *ends, colour, marker, filled=each.world == "offload")
    panel.set_yticks(range(len(shown)), labels)
    panel.set_ylim(len(shown) - 0.5, -0.5)
    panel.set_xlim(0, 1.1 * panel.dataLim.x1)
    panel.grid(visible=False, axis="y")
    panel.set_xlabel("saturation throughput, 1000 requests/s" + (" (filled: offloaded)" if any(each.world == "offload" for each in shown) else ""))
    return _to_page(figure, "saturation", "Saturation throughput of each configuration")


def draw_ablation(reading: Reading) -> str:
    """The mitigations one by one: the unloaded cost of a decision, and the throughput at saturation with its interval."""
    rows = reading.ablation
    figure, ((left, right),) = _grid(1, 2, 0.65 + 0.3 * len(rows), left=_room_for([row.label for row in rows]), gap=0.25, above=0.05, sharey=True)
    for place, row in enumerate(rows):
        if row.unloaded_us is not None:
            left.barh([place], [row.unloaded_us], height=0.5, color=POLICY_COLOURS[0], alpha=0.85)
            _write_beside(left, show_time(row.unloaded_us), row.unloaded_us, place)
        if row.saturation_per_s is not None:
            _draw_interval(right, place, row.saturation_per_s, row.low_per_s, row.high_per_s, POLICY_COLOURS[0], "o")
    left.set_yticks(range(len(rows)), [row.label for row in rows])
    left.set_ylim(len(rows) - 0.5, -0.5)
    for panel in (left, right):
        panel.set_xlim(0, 1.18 * panel.dataLim.x1 if panel.dataLim.x1 > 0 else 1)
    left.set_xlabel("unloaded cost of a decision, µs (ready to switch done)")
    right.set_xlabel("saturation throughput, 1000 requests/s")
    for panel in (left, right):
        panel.grid(visible=False, axis="y")
    return _to_page(figure, "ablation", "Ablation of the mitigations")


def draw_staleness(reading: Reading) -> str:
    """Share of decisions refused as stale, and age of the state behind decisions, against load; empty if nothing says them."""
    aged = "decision_age_p99_us" if any(_says(each, ("decision_age_p99_us",)) for each in reading.configurations) else "stale_age_p99_us"
    wanted = [key for key in ("stale_share", aged) if any(_says(each, (key,)) for each in reading.configurations)]
    if not wanted:
        return ""
    figure, (panels,) = _grid(1, len(wanted), 2.7)
    shown = [each for each in reading.configurations if _says(each, wanted)]
    for panel, key in zip(panels, wanted, strict=True):
        scale = 100.0 if key == "stale_share" else 1.0
        for each in shown:
            _draw_line(panel, reading, each, (key,), scale)
        if key == "stale_share":
            panel.set_ylabel("decisions refused as stale, %")
            panel.set_ylim(bottom=0)
            panel.set_xlim(left=0)
        else:
            panel.set_ylabel("age of state, p99")
            _time_axis(panel, many=True)
        panel.set_xlabel("offered load, 1000 requests/s")
    return _to_page(figure, "staleness", "Staleness against offered load")


def _says(each: Configuration, keys: Iterable[str]) -> bool:
    return any(point.value(key) for point in each.points for key in keys)


# ── what panels are made of ──────────────────────────────────────────────────────────────────────────────────────────


def _grid(
    rows: int, columns: int, height: float, *, left: float = 0.86, gap: float = 0.7, above: float = 0.3, sharey: bool = False
) -> tuple[Any, Any]:
    """A figure with `rows` x `columns` panels, `height` inches each with their labels, and `left` inches for the first axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height * rows + 0.1))
    axes = figure.subplots(rows, columns, squeeze=False, sharey="row" if sharey else False)
    panel_width = (_WIDTH - left - _RIGHT - gap * (columns - 1)) / columns
    below, between = 0.5, 0.62
    panel_height = (figure.get_figheight() - above - below - between * (rows - 1)) / rows
    figure.subplots_adjust(
        left=left / _WIDTH,
        right=1 - _RIGHT / _WIDTH,
        top=1 - above / figure.get_figheight(),
        bottom=below / figure.get_figheight(),
        wspace=gap / panel_width,
        hspace=between / panel_height,
    )
    figure.patch.set_alpha(0)
    for panel in axes.flat:
        panel.set_facecolor("none")
        panel.grid(visible=True, color=ROLES["grid"], linewidth=0.7)
        panel.set_axisbelow(True)
        panel.tick_params(colors=ROLES["muted"], length=3, labelcolor=ROLES["muted"], labelsize=9)
        panel.xaxis.label.set_color(ROLES["ink"])
        panel.yaxis.label.set_color(ROLES["ink"])
        for side, spine in panel.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(ROLES["muted"])
            spine.set_linewidth(0.8)
    return figure, axes


def _room_for(labels: Iterable[str]) -> float:
    """Inches that the longest of these labels takes beside an axis, in 9 point type of whatever font the page has."""
    return 0.25 + 0.078 * max(map(len, labels), default=0)


def _draw_latency(panel: Any, reading: Reading, shown: Iterable[Configuration], name: str, quantile: str) -> None:
    for each in shown:
        _draw_line(panel, reading, each, ("classes", name, quantile), 1.0)
    goal = reading.objective_us.get(name, {}).get(quantile)
    if goal is not None:
        panel.axhline(goal, color=ROLES["goal"], linewidth=1.1, zorder=1.5)
        panel.annotate(
            f"objective {show_time(goal)}",
            (0.01, goal),
            (0, 4),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            color=ROLES["goal"],
            fontsize=8,
            zorder=5,
            bbox={"facecolor": ROLES["paper"], "edgecolor": "none", "pad": 0.8, "alpha": 0.8},
        )
    _time_axis(panel)


def _draw_line(panel: Any, reading: Reading, each: Configuration, path: Sequence[str], scale: float) -> None:
    """The medians over seeds as a line, their range as a band."""
    found = [(point.load_per_s / 1e3, spread) for point in each.points if (spread := point.value(*path)) is not None]
    if not found:
        return
    loads = [load for load, _ in found]
    colour = _colour_of(reading, each)
    (line,) = panel.plot(
        loads,
        [spread.middle * scale for _, spread in found],
        linestyle=_style(each),
        color=colour,
        linewidth=1.9 if each.world == "kernel" else 1.6,
        marker=_marker(reading, each),
        markersize=3.2 if len(found) > 1 else 7,
        zorder=2 if each.world == "kernel" else 3,
    )
    line.set_gid(f"title:{each.label}")
    if any(spread.high > spread.low for _, spread in found):
        low, high = [spread.low * scale for _, spread in found], [spread.high * scale for _, spread in found]
        panel.fill_between(loads, low, high, color=colour, alpha=0.13, linewidth=0)


def _draw_interval(
    panel: Any, place: int, middle: float | None, low: float | None, high: float | None, colour: str, marker: str, *, filled: bool = True
) -> None:
    """A rate with its interval (per second, drawn in thousands) in row `place`, and the number beside it."""
    if middle is None:
        return
    if low is not None and high is not None:
        panel.plot([low / 1e3, high / 1e3], [place, place], color=colour, linewidth=2.2, solid_capstyle="butt", zorder=2)
        for end in (low, high):
            panel.plot([end / 1e3] * 2, [place - 0.18, place + 0.18], color=colour, linewidth=1.4, zorder=2)
    panel.plot([middle / 1e3], [place], marker, color=colour, markersize=7, zorder=3, markerfacecolor=colour if filled else ROLES["paper"])
    _write_beside(panel, f"{middle / 1e3:,.1f}", (high or middle) / 1e3, place)


def _write_beside(panel: Any, text: str, x: float, y: float) -> None:
    panel.annotate(text, (x, y), (7, 0), textcoords="offset points", va="center", color=ROLES["ink"], fontsize=9)


def _time_axis(panel: Any, axis: Any = None, *, many: bool = False) -> None:
    """Logarithmic, each label with its unit; with `many`, a label at 3 between two powers of ten. The y axis, or the axis given."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    if axis is None:
        axis = panel.yaxis
        panel.set_yscale("log")
        panel.set_xlim(left=0)
    else:
        low, high = panel.dataLim.intervalx
        panel.set_xscale("log")
        panel.set_xlim(low / 1.5, max(high * 1.5, low * 10))
    axis.set_major_locator(LogLocator(subs=(1.0, 3.0) if many else (1.0,), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda us, _: show_time(us).replace(".00 ", " ").replace(".0 ", " ")))
    axis.set_minor_locator(NullLocator())


def _share_limits(panels: Sequence[Any], reading: Reading, name: str) -> None:
    """The same range of latencies in a row's panels: what is far beyond the objective leaves the picture."""
    values = [
        spread.middle
        for each in reading.configurations
        for point in each.points
        for quantile in QUANTILES
        if (spread := point.value("classes", name, quantile)) is not None and spread.middle > 0
    ]
    if not values:
        return
    goals = reading.objective_us.get(name, {}).values()
    top = max(values)
    ceiling = 50 * max([*goals, min(values)]) if goals else 1_000 * min(values)
    for panel in panels:
        panel.set_ylim(min(values) / 1.5, max(min(top * 1.5, ceiling), min(values) * 4, *(2 * goal for goal in goals), 0))
    right = max(panel.get_xlim()[1] for panel in panels)
    for panel in panels:
        panel.set_xlim(0, right)


def _key(reading: Reading, each: Configuration) -> Key:
    return Key(each.label, _to_variables(_colour_of(reading, each)), _dashes(each), _MARKERS.get(_marker(reading, each), ""))


def _goal_keys(reading: Reading) -> list[Key]:
    return [Key("objective", "var(--goal)")] if reading.objective_us else []


def _world(each: Configuration) -> str:
    names = {"kernel": "the kernel's own policy", "on-host": "agent on a host core", "offload": "agent on the IPU"}
    return names.get(each.world, each.world) + (f", {each.column}" if each.column and each.world == "on-host" else "")


def _style(each: Configuration) -> Any:
    dashes = _DASHES.get(_line_name(each))
    return (0, dashes) if dashes else "-"


def _dashes(each: Configuration) -> str:
    """As `stroke-dasharray` for a line 2 wide."""
    return " ".join(f"{2 * length:g}" for length in _DASHES.get(_line_name(each), ()))


def _line_name(each: Configuration) -> str:
    return SAME_MACHINE if each.column == SAME_MACHINE and each.world == "on-host" else each.world


def _colour(reading: Reading, policy: str) -> str:
    order = reading.policies
    return POLICY_COLOURS[order.index(policy) % len(POLICY_COLOURS)] if policy in order else ROLES["kernel"]


def _colour_of(reading: Reading, each: Configuration) -> str:
    return ROLES["kernel"] if each.world == "kernel" else _colour(reading, each.policy)


def _marker(reading: Reading, each: Configuration) -> str:
    if each.world == "kernel":
        return "x" if len(each.points) == 1 else ""
    return list(_MARKERS)[reading.policies.index(each.policy) % len(_MARKERS)]


# ── from matplotlib to the page ──────────────────────────────────────────────────────────────────────────────────────


def _to_page(figure: Any, salt: str, title: str) -> str:
    """The figure as an inline <svg> without fixed size, fonts or colours. The same results give the same text."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "path.simplify": True}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font: (?:(\d+|bold) )?([\d.]+)px [^;\"]*", lambda m: f"font-size: {m[2]}px" + (f"; font-weight: {m[1]}" if m[1] else ""), svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?| transform=\"rotate\(-0 [^\"]*\"", "", svg)
    svg = _replace_head(svg, title)
    svg = re.sub(r'<g id="title:([^"]*)">', r"<g><title>\1</title>", svg)
    svg = re.sub(r' id="(?!p[0-9a-f]{10}|m[0-9a-f]{10}|[CD]\d)[^"]*"', "", svg)
    return _shorten(_to_variables(svg))


def _to_variables(text: str) -> str:
    for name, colour in ROLES.items():
        text = text.replace(colour, f"var(--{name})")
    for number, colour in enumerate(POLICY_COLOURS, 1):
        text = text.replace(colour, f"var(--policy-{number})")
    return text


def _replace_head(svg: str, title: str) -> str:
    box = re.search(r'viewBox="([^"]*)"', svg)
    end = svg.index(">") + 1
    size = box[1] if box else "0 0 792 300"
    return f'<svg viewBox="{size}" role="img" aria-label="{title}" xmlns:xlink="http://www.w3.org/1999/xlink">' + svg[end:]


def _shorten(svg: str) -> str:
    """Coordinates to a hundredth of a point, paths on one line, a style that all points of a line share said once; no comments."""
    rounded: Callable[[re.Match[str]], str] = lambda match: f"{float(match[0]):.2f}".rstrip("0").rstrip(".")  # noqa: E731
    svg = re.sub(r"-?\d+\.\d{3,}", rounded, svg)
    svg = re.sub(r"<!--.*?-->|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' d="([^"]*)"', _one_line, svg)
    svg = re.sub(r'<g( clip-path="[^"]*")>\s*((?:<use [^>]*( style="[^"]*")/>\s*)(?:<use [^>]*\3/>\s*)*)</g>', _share_style, svg)
    return re.sub(r"\n\s*", "\n", svg)


def _one_line(match: re.Match[str]) -> str:
    return ' d="' + re.sub(r" ?([A-Za-z]) ?", r"\1", " ".join(match[1].split())) + '"'


def _share_style(match: re.Match[str]) -> str:
    clip, style = match[1], match[3]
    return match[0].replace(style, "").replace(f"<g{clip}>", f"<g{clip}{style}>")
