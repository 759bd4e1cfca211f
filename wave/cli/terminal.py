"""How commands speak: data on stdout as JSON or tables, talk on stderr. Colours only where a terminal listens."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout instead of tables.")]

_PIPE_WIDTH = 400


def print_json(value: Any) -> None:
    """One JSON document on stdout. NumPy scalars and arrays become numbers and lists; what has no finite value becomes null."""
    print(json.dumps(_plain(value), indent=2, allow_nan=False, ensure_ascii=False))


def stdout() -> Console:
    """Where data goes. Into a pipe or file a table is as wide as it needs to be."""
    from rich.console import Console

    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=_PIPE_WIDTH)


def talk(line: str) -> None:
    """A line for the person who waits, on stderr."""
    print(line, file=sys.stderr, flush=True)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str = "", numbers: Sequence[str] = ()) -> None:
    """One table on stdout; the columns in `numbers` are flush right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = stdout()
    if console.is_terminal:
        console.print(table)
        return
    with console.capture() as text:
        console.print(table)
    print("\n".join(line.rstrip() for line in text.get().splitlines()).strip("\n"))


def show_number(value: Any) -> str:
    """A figure for people: thousands apart, four significant digits."""
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        return str(value)
    number = float(value)
    if not math.isfinite(number):
        return str(number)
    return f"{number:,.0f}" if number == int(number) or abs(number) >= 10_000 else f"{number:.4g}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(inner) for inner in value]
    if hasattr(value, "tolist"):  # NumPy's
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
