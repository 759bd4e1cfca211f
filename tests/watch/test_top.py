"""`wave top`: what it shows of two looks, the screen itself, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from statuses import gone, memory, net, sched
from textual.worker import WorkerCancelled

from waveos.cli import run
from waveos.watch import source
from waveos.watch.top import Top
from waveos.watch.view import Look, compare

SNAPSHOT = Path(__file__).with_name("top.txt")
"""The screen, 100 by 32. After a change that is meant: WAVE_SNAPSHOT=1 pytest tests/watch/test_top.py, and read the difference."""


def later(seconds: float = 2.0) -> dict[str, Any]:
    """The enclave `web` when it has gone on for so long."""
    status = sched()
    counters, report = status["counters"], status["report"]
    counters["messages"] += int(2_500 * seconds)
    counters["decisions"] += int(500 * seconds)
    counters["outcomes"]["committed"] += int(490 * seconds)
    counters["outcomes"]["stale"] += int(10 * seconds)
    counters["round_trip_ns"] = [[8_192, 1_400], [10_240, 150], [28_672, 1]]
    counters["age_ns"] = [[8_192, 1_500], [10_240, 330], [131_072, 100]]
    counters["enforced_ns"] = [[4_096, 1_551]]
    counters["overflow"] += 1
    report["event_ns"] = [[9_984, 8_900], [10_048, 900]]
    status["hostd"]["cpu_ns"] += int(4e7 * seconds)
    return status


# The data


def test_rates_and_latencies_are_those_between_two_looks():
    [row] = compare(Look(102.0, [later()]), Look(100.0, [sched()]))
    assert (row["messages_per_s"], row["decisions_per_s"], row["stale_share"]) == (2_500, 500, 0.02)
    assert row["latencies_us"]["round trip"] == {"p50": 8.192, "p99": 10.24, "most": 28.672, "per_s": 475.5}
    assert row["latencies_us"]["agent decides"] == {"p50": None, "p99": None, "most": None, "per_s": 0.0}
    assert row["faults_new"]["queue overflows"] == 1 and row["faults"]["queue overflows"] == 1
    assert row["hostd_cpu_share"] == pytest.approx(0.04)


def test_the_first_look_tells_counts_and_no_rates():
    [row] = compare(Look(100.0, [sched()]))
    assert row["messages_per_s"] is None and row["faults_new"] == {}
    assert row["latencies_us"]["staleness"]["p50"] == 8.192


def test_a_hostd_that_began_anew_counts_from_nothing():
    status = sched(pid=900)
    status["counters"]["messages"] = 10
    [row] = compare(Look(102.0, [status]), Look(100.0, [sched()]))
    assert row["messages_per_s"] is None and row["faults_new"] == {}


def test_each_subsystem_has_a_row_and_one_without_hostd_says_why():
    rows = compare(Look(2.0, [memory(), net(), gone()]), Look(0.0, [memory(), net(), gone()]))
    assert [row["enclave"] for row in rows] == ["cache", "lab", "old"]
    assert rows[0]["messages_per_s"] == 0.0 and rows[0]["latencies_us"] == {}
    assert rows[1]["messages_per_s"] is None
    assert "no hostd runs" in rows[2]["error"]


# The screen


def screen(
    looks: list[Look], then: Callable[[Top, Any], Any] | None = None, size: tuple[int, int] = (100, 32), name: str | None = None
) -> tuple[str, Any]:
    """What is on it after these looks (and after `then`), and what the application returned."""
    rest = iter(looks)

    async def drive() -> tuple[str, Any]:
        app = Top(lambda: next(rest), 1_000.0, name)
        async with app.run_test(size=size) as pilot:
            for number, _ in enumerate(looks):
                if number:
                    app.look()
                with contextlib.suppress(WorkerCancelled):  # by the application's end
                    await app.workers.wait_for_complete()
                await pilot.pause()
            if then is not None:
                await then(app, pilot)
            await pilot.pause()
            lines = ["".join(segment.text for segment in strip).rstrip() for strip in app.screen._compositor.render_strips()]
        return "\n".join(lines).rstrip() + "\n", app.return_value

    return asyncio.run(drive())


TWO = [Look(100.0, [sched(), memory(), gone()]), Look(102.0, [later(), memory(), gone()])]


def test_the_screen_is_as_it_was():
    shown, _ = screen(TWO)
    if os.environ.get("WAVE_SNAPSHOT"):
        SNAPSHOT.write_text(shown)
    assert shown == SNAPSHOT.read_text()


def test_another_enclave_is_chosen_with_the_cursor():
    async def down(_app: Top, pilot: Any) -> None:
        await pilot.press("down")

    shown, _ = screen(TWO, down)
    assert "CPUs of cache" in shown and "faults of cache" in shown


def test_a_terminal_that_is_too_small_is_told_so_and_what_fits():
    shown, _ = screen(TWO, size=(50, 12))
    assert "50x12 is too small: wants 80x20" in shown and "enclaves" not in shown


def test_it_pauses_and_ends_by_key():
    async def keys(app: Top, pilot: Any) -> None:
        await pilot.press("space")
        assert "paused" in str(app.query_one("#head").render())
        await pilot.press("q")

    _, returned = screen(TWO, keys)
    assert returned is None


def test_ctrl_c_ends_it():
    ended = []

    async def interrupt(app: Top, pilot: Any) -> None:
        await pilot.press("ctrl+c")
        await pilot.pause()
        ended.append(app._exit)

    screen(TWO, interrupt)
    assert ended == [True]


def test_when_the_last_hostd_dies_it_ends_and_says_so():
    _, returned = screen([Look(100.0, [sched("old")]), Look(101.0, [gone()])])
    assert returned == gone()["error"]
    _, returned = screen([Look(100.0, [sched("old")]), Look(101.0, [])])
    assert "no hostd runs on this machine" in returned


# The command


def fake(monkeypatch: pytest.MonkeyPatch, *looks: list[dict[str, Any]]) -> None:
    rest = iter(looks)
    monkeypatch.setattr(source, "statuses", lambda *_, **__: next(rest))


def test_once_is_a_table_and_json_the_same_as_data(monkeypatch, capsys):
    fake(monkeypatch, [sched()], [later()])
    assert run(["top", "--once", "--interval", "0.25"]) == 0
    out = capsys.readouterr().out
    assert "web" in out and "web: latencies" in out and "round trip" in out
    fake(monkeypatch, [sched()], [later()])
    assert run(["top", "--json", "--interval", "0.25"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["enclaves"][0]["faults"]["agents lost"] == 1 and told["interval_s"] >= 0.25


def test_into_a_pipe_it_says_what_to_write_instead(monkeypatch, capsys):
    fake(monkeypatch, [sched()])
    assert run(["top"]) == 2
    assert "wave top wants a terminal; write wave top --once" in capsys.readouterr().err


def test_an_enclave_that_is_none_is_said_in_a_line(monkeypatch, capsys, tmp_path):
    from waveos.host import restore

    monkeypatch.setattr(restore, "RUN", tmp_path)
    assert run(["top", "nosuch", "--once"]) == 2
    assert "no hostd runs for an enclave 'nosuch'" in capsys.readouterr().err
    assert run(["top", "--json"]) == 2
    assert "no hostd runs on this machine" in capsys.readouterr().err


def test_a_hostd_that_dies_between_two_looks_is_said_in_a_line(monkeypatch, capsys):
    fake(monkeypatch, [sched("old")], [gone()])
    assert run(["top", "--once", "--interval", "0.25"]) == 2
    assert "no hostd runs for an enclave 'old'" in capsys.readouterr().err
