"""The evaluation as a Markdown table and as an HTML page: `make evaluation` writes docs/evaluation.md, and nobody else does."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from waveos.report import page as pages

COLUMNS = ("figure", "here", "low", "high", "published", "how", "moves most with")
_ABOUT = (
    "The Wave paper's headline figures (arXiv 2408.17351) beside what this software obtains. `here` is with the data as it is; `low` and `high` are "
    "the least and the most when the assumptions of the models behind it are halved and doubled. No figure is tuned: the data "
    "lay in the repository before the first run, and a figure that is not reached says so."
)
_MEANING = (
    "Costs and gains are shares; cores are cores. Published are only these figures, not the set-ups in which they were measured, so a figure inside the "
    "range is no reproduction, and one outside it says that the assumptions differ by more than a factor of two, or the workload does."
)


def write(result: Mapping[str, Any], markdown: str, page: str) -> None:
    """Write the table to the file `markdown` and the page to `page`, each unless it is empty."""
    if markdown:
        Path(markdown).write_text(_markdown(result))
    if page:
        path = Path(page)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_page(result))


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    how = row["how"] + (f"; no answer with {', '.join(row['unanswered'])}" if row["unanswered"] else "")
    return (row["name"], *(_number(row[key]) for key in ("value", "low", "high", "published")), how, row["moves_most"])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if abs(value) < 1 else f"{value:.2f}"


def _notes(result: Mapping[str, Any]) -> list[str]:
    machine = result["machine"]
    made = f"Timing: {result['timing']}. Link profile: assumed. Made on {machine['cpu']}, {machine['cores']} cores, by `make evaluation`."
    together = "only all at once, the short form (`--quick`), so the range may be too narrow"
    made += f" Assumptions were varied {together if result['quick'] else 'one at a time, and all at once'}."
    told = {row["name"]: row for row in result["rows"] if row["published"] is not None}
    reached = [
        f"{name}: {_number(row['value'])} here, {_number(row['published'])} published ({row['published_source']}). "
        + ("The published figure lies inside the range." if row["low"] <= row["published"] <= row["high"] else "The range does not reach it.")
        for name, row in told.items()
    ]
    return [made, _MEANING, *reached]


def _markdown(result: Mapping[str, Any]) -> str:
    rule = "|---|--:|--:|--:|--:|---|---|"
    rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in _cells(row)) + " |" for row in result["rows"]]
    table = "\n".join(["| " + " | ".join(COLUMNS) + " |", rule, *rows])
    made, meaning, *reached = _notes(result)
    bullets = "\n".join(f"- {line}" for line in reached)
    return f"# Evaluation\n\n<!-- written by `make evaluation`; not by hand -->\n\n{_ABOUT}\n\n{made}\n\n{table}\n\n{meaning}\n\n{bullets}\n"


def _page(result: Mapping[str, Any]) -> str:
    parts = [
        pages.paragraphs([_ABOUT.replace("`", "")]),
        pages.table(COLUMNS, [_cells(row) for row in result["rows"]]),
        pages.paragraphs(line.replace("`", "") for line in _notes(result)),
    ]
    for name, values in result["variations"].items():
        if len(values) > 1:
            parts.append(f"<h2>{html.escape(name)}</h2><figure>{_tornado(values)}</figure>")
    return pages.page("The Wave paper's figures, and this software's", *parts)


def _tornado(values: Mapping[str, float | None]) -> str:
    """How far the figure moves with each assumption halved and doubled, the most first."""
    from matplotlib.figure import Figure

    base = next(iter(values.values())) if "as it is" not in values else values["as it is"]
    moves: dict[str, list[float | None]] = {}
    for name, value in values.items():
        key, found, factor = name.rpartition(" x ")
        if found:
            moves.setdefault(key, [None, None])[factor == "2"] = value
    assert base is not None  # the run would have ended
    shown: Sequence[str] = sorted(moves, key=lambda key: max(abs((each if each is not None else base) - base) for each in moves[key]))[-12:]
    figure = Figure(figsize=(10, 0.6 + 0.28 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for side, (label, colour) in enumerate((("x 0.5", "#56b4e9"), ("x 2", "#d55e00"))):
        widths = [(moves[key][side] if moves[key][side] is not None else base) - base for key in shown]  # type: ignore[operator]
        axes.barh(list(shown), widths, left=base, height=0.6, color=colour, label=label)
    axes.axvline(base, color="#1c2026", linewidth=0.8)
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5))
    axes.tick_params(labelsize="small")
    return pages.svg(figure)
