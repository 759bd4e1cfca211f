"""The screen of `wave top`: enclaves, and of the chosen one its CPUs, queues, latencies, staleness and faults. Plain characters: it works over ssh."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

from rich.text import Text
from textual import events, work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.widgets import DataTable, Footer, Static

from waveos.watch.cells import BLOCKS, ENCLAVES, enclave_cells
from waveos.watch.view import Look, compare

WIDTH, HEIGHT = 80, 20
"""Smaller terminals are told so."""


class Top(App[str]):
    """Looks every `interval_s`; ends with a line why when there is nothing left to look at, and without one when it is told to."""

    CSS = """
    Screen { layout: vertical; }
    #head { height: 1; }
    #small { display: none; content-align: center middle; height: 1fr; }
    #enclaves { height: auto; max-height: 40%; border-top: solid $primary; }
    #below { height: 1fr; }
    #left { width: 1fr; }
    #right { width: 1fr; }
    .block { height: 1fr; border-top: solid $primary; }
    .small #small { display: block; }
    .small #enclaves, .small #below, .small #head { display: none; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+c", "quit", show=False, priority=True),
        ("q", "quit", "quit"),
        ("space", "pause", "pause"),
        ("plus", "slower", "slower"),
        ("minus", "faster", "faster"),
    ]
    ENABLE_COMMAND_PALETTE = False
    TITLE = "wave top"

    def __init__(self, look: Callable[[], Look], interval_s: float = 1.0, name: str | None = None) -> None:
        super().__init__()
        self._look, self._interval_s, self._name = look, interval_s, name
        self._before: Look | None = None
        self._rows: list[dict[str, Any]] = []
        self._paused = False
        self._chosen = name or ""

    def compose(self) -> ComposeResult:
        """The widgets, from above."""
        yield Static(id="head")
        yield Static(id="small")
        yield _table("enclaves", ENCLAVES, cursor="row")
        with Horizontal(id="below"):
            with Vertical(id="left"):
                for title, columns, _ in BLOCKS[:2]:
                    yield _table(title, columns, title)
            with Vertical(id="right"):
                for title, columns, _ in BLOCKS[2:]:
                    yield _table(title, columns, title)
        yield Footer()

    def on_mount(self) -> None:
        """Begin to look."""
        self._timer = self.set_interval(self._interval_s, self.look)
        self.look()

    def on_resize(self, event: events.Resize) -> None:
        """Say so where it is too small to read."""
        small = event.size.width < WIDTH or event.size.height < HEIGHT
        self.screen.set_class(small, "small")
        self.query_one("#small", Static).update(f"{event.size.width}x{event.size.height} is too small: wants {WIDTH}x{HEIGHT}, or wave top --once")

    @work(thread=True, exclusive=True)
    def look(self) -> None:
        """Ask the daemons, beside the screen."""
        if not self._paused:
            found = self._look()
            self.call_from_thread(self.show, found)

    def show(self, found: Look) -> None:
        """Draw what was found, against what was before."""
        there = [each for each in found.statuses if "error" not in each]
        if not there:
            self.exit(next((each["error"] for each in found.statuses), "no hostd runs on this machine: `wave hostd` starts one"))
            return
        self._rows, self._before = compare(found, self._before), found
        if self._chosen not in [row["enclave"] for row in self._rows]:
            self._chosen = there[0]["enclave"]
        at = time.strftime("%H:%M:%S", time.localtime(found.time_s)) if found.time_s > 1e9 else f"{found.time_s:g}"
        pause = "  paused" if self._paused else ""
        self.query_one("#head", Static).update(f"wave top  {at}  every {self._interval_s:g} s  enclaves: {len(there)}{pause}")
        _fill(self.query_one("#enclaves", DataTable), [enclave_cells(row) for row in self._rows])
        self._show_chosen()

    def on_data_table_row_highlighted(self, event: DataTable.RowHighlighted) -> None:
        """Another enclave was chosen."""
        if event.data_table.id == "enclaves" and 0 <= event.cursor_row < len(self._rows):
            self._chosen = self._rows[event.cursor_row]["enclave"]
            self._show_chosen()

    def _show_chosen(self) -> None:
        row = next((each for each in self._rows if each["enclave"] == self._chosen), None)
        if row is None:
            return
        for title, _, cells in BLOCKS:
            _fill(self.query_one(f"#{title}", DataTable), [] if "error" in row else cells(row))
            self.query_one(f"#{title}").border_title = f"{title} of {self._chosen}"

    def action_pause(self) -> None:
        """Stand still, or go on."""
        self._paused = not self._paused
        head = self.query_one("#head", Static)
        if self._paused and self._before:
            head.update(f"wave top  paused  enclaves: {len(self._rows)}")

    def action_slower(self) -> None:
        """Half as often."""
        self._every(min(60.0, 2 * self._interval_s))

    def action_faster(self) -> None:
        """Twice as often."""
        self._every(max(0.25, self._interval_s / 2))

    def _every(self, seconds: float) -> None:
        self._interval_s = seconds
        self._timer.stop()
        self._timer = self.set_interval(seconds, self.look)


def _table(name: str, columns: Sequence[str], title: str = "", cursor: Any = "none") -> DataTable[Text]:
    table: DataTable[Text] = DataTable(id=name, cursor_type=cursor, zebra_stripes=False, show_cursor=cursor != "none")
    table.can_focus = cursor != "none"
    table.border_title = title or name
    if title:
        table.add_class("block")
    table.add_columns(*columns)
    return table


def _fill(table: DataTable[Text], rows: Iterable[Sequence[str]]) -> None:
    """Put these rows in; the cursor stays where it is."""
    at = table.cursor_row
    table.clear()
    for row in rows:
        table.add_row(*(Text(cell, justify="right" if _is_figure(cell) else "left") for cell in row))
    if at < table.row_count:
        table.move_cursor(row=at)


def _is_figure(cell: str) -> bool:
    return cell[:1].isdigit() or cell[:1] in "-+"
