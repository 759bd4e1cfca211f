"""Live traces: looking on at a ring loses nothing that is still there, and what was said becomes runs, messages and decisions on their tracks."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
import pytest

from waveos.cli import run
from waveos.errors import LinkError
from waveos.host.rings import Ring
from waveos.outcome import Outcome
from waveos.record import RECORD_WORDS
from waveos.report.perfetto import HOST, LINK, QUEUES, trace_events
from waveos.sched.records import DECISION, KICKED, MESSAGE, OUTCOME, Decision, Message
from waveos.trace import RunEnd, TraceKind
from waveos.watch.events import QUEUES as LENGTHS
from waveos.watch.events import events_of
from waveos.watch.rings import HEADER_WORDS, Onlooker

CAPACITY = 16


@pytest.fixture
def ring():
    made = Ring("test", CAPACITY, 1)
    made.begin(1, 17)
    yield made
    made.close()


def records(first: int, n: int) -> np.ndarray:
    """Records that tell their number in each word."""
    found = np.arange(first, first + n, dtype=np.int64)[:, None].repeat(RECORD_WORDS, 1)
    found[:, 0] = 2 << 48
    return found


def send(ring: Ring, first: int, n: int) -> None:
    ring.words[32] = first  # the consumer has read all
    assert ring.send(records(first, n)) == n


def numbers(taken: np.ndarray) -> list[int]:
    assert (taken[:, 0] == 2 << 48).all() and (taken[:, 1:] == taken[:, 1:2]).all()
    return taken[:, 1].tolist()


def test_an_onlooker_sees_what_comes_after_it_came_in_order_and_once(ring):
    send(ring, 0, 5)
    onlooker = Onlooker(ring.fd, ring.bytes)
    assert numbers(onlooker.take()) == []
    send(ring, 5, 14)
    assert numbers(onlooker.take()) == list(range(5, 19))
    assert numbers(onlooker.take()) == [] and onlooker.lost == 0


def test_what_was_written_over_is_counted_as_lost(ring):
    onlooker = Onlooker(ring.fd, ring.bytes)
    for first in range(0, 48, 12):
        send(ring, first, 12)
    assert numbers(onlooker.take()) == list(range(48 - CAPACITY + 1, 48))  # one place may be half written
    assert onlooker.lost == 48 - CAPACITY + 1


def test_a_record_that_is_not_whole_yet_is_not_taken(ring):
    onlooker = Onlooker(ring.fd, ring.bytes)
    send(ring, 0, 2)
    ring.words[HEADER_WORDS + 2 * RECORD_WORDS + 1 : HEADER_WORDS + 3 * RECORD_WORDS] = 99  # the payload of the third, without its mark
    assert numbers(onlooker.take()) == [0, 1]


def test_a_ring_that_is_made_anew_is_followed_from_its_begin(ring):
    onlooker = Onlooker(ring.fd, ring.bytes)
    send(ring, 0, 7)
    onlooker.take()
    ring.retire()
    assert numbers(onlooker.take()) == []
    ring.begin(2, 17)
    send(ring, 0, 3)
    assert numbers(onlooker.take()) == [0, 1, 2] and onlooker.lost == 0


def test_nothing_is_written_into_the_ring(ring):
    send(ring, 0, 3)
    before = ring.words.copy()
    onlooker = Onlooker(ring.fd, ring.bytes)
    onlooker.take()
    assert (ring.words == before).all()
    with pytest.raises(ValueError, match="read-only"):
        onlooker._words[0] = 1


def test_marks_go_on_beyond_65_536_laps(ring):
    onlooker = Onlooker(ring.fd, ring.bytes)
    ring._next = ring._credit = CAPACITY * 70_000
    ring.words[32] = ring._next
    assert ring.send(records(0, 3)) == 3
    assert numbers(onlooker.take()) == [0, 1, 2]


def test_what_is_no_queue_is_an_error_in_a_line(tmp_path):
    path = tmp_path / "empty"
    path.touch()
    fd = os.open(path, os.O_RDONLY)
    with pytest.raises(LinkError, match="a queue cannot be looked at"):
        Onlooker(fd, 4_096)
    os.close(fd)


# From records to events


def said(*lines: dict[str, Any]) -> np.ndarray:
    made = np.zeros(len(lines), MESSAGE)
    made["tid"] = made["cpu"] = -1
    for number, line in enumerate(lines):
        for key, value in line.items():
            made.view(OUTCOME if line["type"] == Message.TXN_OUTCOME else MESSAGE)[key][number] = value
    return made


def decided(*lines: dict[str, Any]) -> np.ndarray:
    made = np.zeros(len(lines), DECISION)
    for row, line in zip(made, lines, strict=True):
        for key, value in line.items():
            row[key] = value
    return made


RUNNABLE = {"type": Message.THREAD_RUNNABLE, "time_ns": 1_000, "tid": 7}
COMMITTED = {"type": Message.TXN_OUTCOME, "time_ns": 4_000, "tid": 7, "cpu": 1, "outcome": Outcome.COMMITTED, "txn": 5, "age_ns": 3_000}
BLOCKED = {"type": Message.THREAD_BLOCKED, "time_ns": 9_000, "tid": 7, "cpu": 1}
IDLE = {"type": Message.CPU_IDLE, "time_ns": 9_000, "cpu": 1}
RUN = {"type": Decision.RUN, "time_ns": 1_000, "decided_ns": 2_000, "tid": 7, "cpu": 1, "txn": 5, "flags": KICKED}


def kinds(events: np.ndarray) -> list[tuple[int, str]]:
    order = np.argsort(events["time_ns"], kind="stable")
    return [(int(each["time_ns"]), TraceKind(int(each["kind"])).name) for each in events[order]]


def test_one_turn_of_a_thread_is_drawn_from_its_waking_to_its_sleep():
    events = events_of(said(RUNNABLE, COMMITTED, BLOCKED, IDLE), decided(RUN))
    assert [each for each in kinds(events) if each[1] != "QUEUE_DEPTH"] == [
        (1_000, "MESSAGE_SENT"),
        (2_000, "DECISION_MADE"),
        (2_000, "KICK_SENT"),
        (2_000, "AGENT_BEGIN"),
        (2_000, "AGENT_END"),
        (2_000, "MESSAGE_SEEN"),
        (4_000, "DECISION_APPLIED"),
        (4_000, "RUN_BEGIN"),
        (9_000, "MESSAGE_SENT"),
        (9_000, "RUN_END"),
        (9_000, "MESSAGE_SENT"),
        (9_000, "IDLE_BEGIN"),
    ]
    [end] = events[events["kind"] == TraceKind.RUN_END]
    assert end["value"] == RunEnd.BLOCKED
    drawn = trace_events(events, {"threads": {7: "redis (412)"}, "cpus": [2, 3], "queues": LENGTHS})
    names = {(each["pid"], each["tid"]): each["args"]["name"] for each in drawn if each["name"] == "thread_name"}
    slices = {(each["pid"], each["name"]): (names[each["pid"], each["tid"]], each["ts"], each["dur"]) for each in drawn if each["ph"] == "X"}
    assert slices[HOST, "redis (412)"] == ("CPU 3", 4.0, 5.0)
    assert slices[LINK, "thread_runnable"] == ("host to agent", 1.0, 1.0)
    assert slices[LINK, "run 7 on CPU 1"] == ("agent to host", 2.0, 2.0)
    points = [each for each in drawn if each["ph"] == "i" and each["pid"] == LINK]
    assert [each["name"] for each in points] == ["thread_blocked", "cpu_idle"], "of these it is not known when they were read"
    lengths = [(each["name"], each["ts"], each["args"]["entries"]) for each in drawn if each["ph"] == "C" and each["pid"] == QUEUES]
    assert lengths == [
        ("runnable threads", 1.0, 1),
        ("decisions on the way or staged", 2.0, 1),
        ("runnable threads", 4.0, 0),
        ("decisions on the way or staged", 4.0, 0),
    ]


def test_decisions_without_an_outcome_are_not_counted_as_staged():
    silent = [RUN | {"type": kind, "tid": -1, "txn": 6 + kind} for kind in (Decision.KICK, Decision.DEMOTE)]
    events = events_of(said(RUNNABLE, COMMITTED, BLOCKED, IDLE), decided(RUN, *silent))
    drawn = trace_events(events, {"queues": LENGTHS})
    lengths = [each["args"]["entries"] for each in drawn if each["name"] == "decisions on the way or staged"]
    assert lengths == [1, 0]


def test_a_stale_decision_is_drawn_as_refused_and_nothing_runs():
    events = events_of(said(RUNNABLE, COMMITTED | {"outcome": Outcome.STALE}), decided(RUN))
    assert (4_000, "DECISION_REFUSED") in kinds(events) and "RUN_BEGIN" not in dict(kinds(events)).values()


def test_a_thread_that_the_kernel_ran_by_itself_is_drawn_as_running():
    events = events_of(said({"type": Message.THREAD_RUNNING, "time_ns": 500, "tid": 3, "cpu": 0}), decided())
    assert (500, "RUN_BEGIN") in kinds(events)


def test_an_enclave_in_which_nothing_happened_makes_an_empty_trace():
    assert len(events_of(said(), decided())) == 0
    assert trace_events(events_of(said(), decided())) != [], "its tracks are named"


# The command


def test_live_wants_an_enclave_a_time_and_a_place(tmp_path, monkeypatch, capsys):
    from waveos.host import restore

    monkeypatch.setattr(restore, "RUN", tmp_path)
    for arguments, line in (
        (["trace", "--live", "5s"], "no hostd runs on this machine"),
        (["trace", "nosuch", "--live", "5s"], "no hostd runs for an enclave 'nosuch'"),
        (["trace", "nosuch", "--live", "soon"], "--live soon: wants a time"),
        (["trace", "nosuch", "--live", "1s", "--out", "/nowhere/trace.json"], "there is no folder /nowhere"),
        (["trace", "nosuch", "--live", "1s", "--seed", "3"], "only --out and --json go with it"),
        (["trace"], "name a scenario"),
    ):
        assert run(arguments) == 2, arguments
        assert line in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_is_said_in_a_line(monkeypatch, capsys):
    from waveos.watch import recording

    about = {"policy": "fifo", "params": {}, "mechanism": "priority", "cpus": [0]}
    seen = recording.Recording(said(RUNNABLE), decided(), 0, 1.0, about)
    monkeypatch.setattr(recording, "record", lambda *_: seen)
    assert run(["trace", "web", "--live", "1s", "--out", "/dev/full"]) == 2
    assert "cannot write /dev/full: no space left" in capsys.readouterr().err


def test_what_was_seen_is_kept_when_hostd_dies_and_the_exit_code_says_so(monkeypatch, capsys, tmp_path):
    from waveos.watch import recording

    about = {"policy": "fifo", "params": {}, "mechanism": "priority", "cpus": [0]}
    seen = recording.Recording(said(RUNNABLE), decided(), 0, 1.0, about, "the hostd of 'web' has ended", True)
    monkeypatch.setattr(recording, "record", lambda *_: seen)
    out = tmp_path / "trace.json"
    assert run(["trace", "web", "--live", "1s", "--out", str(out), "--json"]) == 4
    said_ = capsys.readouterr()
    assert json.loads(said_.out)["messages"] == 1 and "has ended; what was seen before is in" in said_.err
    assert json.loads(out.read_text())["otherData"]["timing"] == "measured"
