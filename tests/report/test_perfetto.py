"""The trace is what ui.perfetto.dev reads, and says what happened."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from waveos.errors import ConfigError
from waveos.outcome import Outcome
from waveos.report.perfetto import AGENT, HOST, LINK, QUEUES, trace_events, write_trace
from waveos.trace import TRACE_EVENT, RunEnd, TraceKind

META = {"classes": ["GET", "RANGE"], "queues": ["messages"], "policy": "shinjuku", "world": "offload"}


def make_events(*events: tuple[int, int, int, int, int, int]) -> np.ndarray:
    return np.array(list(events), TRACE_EVENT)


ONE_REQUEST = make_events(
    (500, TraceKind.IDLE_BEGIN, 0, -1, 0, 0),
    (1_000, TraceKind.MESSAGE_SENT, 0, 7, 2, 41),
    (1_000, TraceKind.QUEUE_DEPTH, 0, -1, 1, 0),
    (1_800, TraceKind.AGENT_BEGIN, 0, -1, 0, 0),
    (1_850, TraceKind.MESSAGE_SEEN, 0, 7, 2, 41),
    (1_850, TraceKind.QUEUE_DEPTH, 0, -1, 0, 0),
    (1_900, TraceKind.DECISION_MADE, 0, 7, 1, 99),
    (1_950, TraceKind.KICK_SENT, 0, 7, 0, 99),
    (2_000, TraceKind.AGENT_END, 0, -1, 1, 1),
    (2_600, TraceKind.KICK_SEEN, 0, 7, 0, 99),
    (2_700, TraceKind.DECISION_APPLIED, 0, 7, 1_700, 99),
    (3_100, TraceKind.RUN_BEGIN, 0, 7, 1, 5),
    (6_100, TraceKind.RUN_END, 0, 7, RunEnd.PREEMPTED, 3_000),
)


def slices(drawn: list[dict[str, Any]], process: int) -> list[dict[str, Any]]:
    return [event for event in drawn if event["ph"] == "X" and event["pid"] == process]


def test_a_run_is_named_by_its_class_and_thread_and_lasts_as_long_as_it_ran() -> None:
    drawn = trace_events(ONE_REQUEST, META)
    idle, run = slices(drawn, HOST)
    assert (idle["name"], idle["ts"], idle["dur"]) == ("idle", 0.5, 2.6)
    assert (run["name"], run["ts"], run["dur"]) == ("RANGE · thread 7", 3.1, 3.0)
    assert run["args"] == {"tid": 7, "request": 5, "end": "preempted"}


def test_what_crosses_the_link_is_a_slice_from_sending_to_arrival_on_its_direction() -> None:
    drawn = trace_events(ONE_REQUEST, META)
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in drawn if e["name"] == "thread_name"}
    crossed = {names[LINK, e["tid"]]: (e["name"], e["ts"], e["dur"]) for e in slices(drawn, LINK)}
    assert crossed["host to agent"] == ("thread_runnable", 1.0, 0.85)
    assert crossed["agent to host"] == ("run 7 on CPU 0", 1.9, 0.8)
    assert crossed["doorbells"] == ("kick CPU 0", 1.95, 0.65)


def test_an_arrow_leads_from_the_batch_that_decided_to_the_run_it_led_to() -> None:
    drawn = trace_events(ONE_REQUEST, META)
    start, end = (next(event for event in drawn if event["ph"] == phase) for phase in ("s", "f"))
    assert start["id"] == end["id"] == 99 and end["bp"] == "e"
    (batch,), run = slices(drawn, AGENT), slices(drawn, HOST)[-1]
    assert start["tid"] == batch["tid"] and batch["ts"] <= start["ts"] <= batch["ts"] + batch["dur"]
    assert (end["pid"], end["tid"], end["ts"]) == (HOST, run["tid"], run["ts"])


def test_queues_are_counters_by_name() -> None:
    drawn = trace_events(ONE_REQUEST, META)
    counted = [(e["name"], e["ts"], e["args"]) for e in drawn if e["ph"] == "C" and e["pid"] == QUEUES]
    assert counted == [("messages", 1.0, {"entries": 1}), ("messages", 1.85, {"entries": 0})]


def test_a_refused_decision_says_why() -> None:
    drawn = trace_events(make_events((10, TraceKind.DECISION_MADE, 3, 4, 1, 1), (90, TraceKind.DECISION_REFUSED, 3, 4, Outcome.STALE, 1)), META)
    assert any(e["ph"] == "i" and e["name"] == "refused: stale" and e["pid"] == HOST for e in drawn)
    (crossing,) = slices(drawn, LINK)
    assert crossing["args"]["outcome"] == "stale"


def test_what_the_window_cuts_off_is_drawn_to_its_edge() -> None:
    drawn = trace_events(make_events((100, TraceKind.RUN_END, 0, 1, RunEnd.BLOCKED, 900), (50, TraceKind.RUN_BEGIN, 1, 2, 0, -1)), META)
    first, second = sorted(slices(drawn, HOST), key=lambda e: e["tid"])
    assert (first["ts"], first["dur"], first["name"]) == (0.05, 0.05, "thread 1")
    assert (second["ts"], second["dur"]) == (0.05, 0.05) and "cut off" in second["args"]["end"]


random_events = st.lists(
    st.tuples(
        st.integers(0, 3_000),
        st.sampled_from([kind.value for kind in TraceKind] + [77]),
        st.integers(0, 2),
        st.integers(-1, 4),
        st.integers(0, 12),
        st.integers(0, 6),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(random_events)
def test_any_events_make_a_trace_that_perfetto_reads(raw: list[tuple[int, int, int, int, int, int]]) -> None:
    """Every event has its phase's fields, metadata precedes, times are ordered, and slices of one track never overlap."""
    drawn = json.loads(json.dumps(trace_events(make_events(*raw), META), allow_nan=False))
    body = [event for event in drawn if event["ph"] != "M"]
    assert drawn == [event for event in drawn if event["ph"] == "M"] + body
    assert [event["ts"] for event in body] == sorted(event["ts"] for event in body)
    named = {(event["pid"], event["tid"]) for event in drawn if event["name"] == "thread_name"}
    tracks: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for event in body:
        assert isinstance(event["ts"], float) and event["name"] and event["pid"] in (HOST, AGENT, LINK, QUEUES)
        if event["ph"] == "X":
            assert event["dur"] >= 0
            tracks[event["pid"], event["tid"]].append((int(event["ts"] * 1000), int(event["ts"] * 1000) + int(event["dur"] * 1000)))
        elif event["ph"] in "sf":
            assert isinstance(event["id"], int)
        elif event["ph"] == "i":
            assert event["s"] == "t"
        else:
            assert event["ph"] == "C"
        assert event["ph"] == "C" or (event["pid"], event["tid"]) in named
    for key, spans in tracks.items():
        if key[0] != AGENT:  # batches begin and end by themselves; these random ones need not
            for (_, end), (begin, _) in zip(sorted(spans), sorted(spans)[1:], strict=False):
                assert end <= begin, f"slices of track {key} overlap"


@given(st.integers(0, 10**15))
def test_times_survive_a_reader_that_multiplies_and_cuts_off(time_ns: int) -> None:
    (event,) = [e for e in trace_events(make_events((time_ns, TraceKind.QUEUE_DEPTH, 0, -1, 1, 0)), META) if e["ph"] == "C"]
    assert int(event["ts"] * 1000.0) == time_ns


def test_the_file_holds_the_events_and_what_the_caller_says_of_them(tmp_path: Path) -> None:
    count = write_trace(ONE_REQUEST, tmp_path / "trace.json", META)
    plain = json.loads((tmp_path / "trace.json").read_text())
    assert len(plain["traceEvents"]) == count and plain["otherData"] == {"policy": "shinjuku", "world": "offload"}
    write_trace(ONE_REQUEST, tmp_path / "trace.json.gz", META)
    assert json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes())) == plain


def test_an_empty_trace_is_a_trace(tmp_path: Path) -> None:
    write_trace(make_events(), tmp_path / "trace.json", {})
    assert all(event["ph"] == "M" for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"])


def test_other_arrays_are_refused_with_the_fields_that_are_wanted(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="time_ns, kind, cpu"):
        write_trace(np.zeros(3), tmp_path / "trace.json", {})
    assert not list(tmp_path.iterdir())
