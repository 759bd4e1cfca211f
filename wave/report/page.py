"""What the reports of the subsystems share: one HTML page that fetches nothing, a table, and figures drawn into it."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any


def page(name: str, *parts: str) -> str:
    """A whole page under the headline `name`; `parts` are HTML."""
    return _PAGE.format(name=html.escape(name), body="\n".join(parts))


def paragraphs(lines: Iterable[str]) -> str:
    """Plain text, a paragraph each."""
    return "".join(f"<p>{html.escape(line)}</p>" for line in lines)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Plain text in cells; a wide table scrolls by itself."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def svg(figure: Any) -> str:
    """A matplotlib figure as SVG for the page: equal figures give equal text."""
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
{body}
</body>
</html>
"""
