"""What is made of a probe's tables, and of what a person writes on the command line: no kernel needed."""

from __future__ import annotations

import os
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from waveos.cli.probe import parse_length
from waveos.errors import ConfigError
from waveos.host.probes.histogram import doublings_us, lowest_us, percentile_us
from waveos.host.probes.probe import Probe, first_error
from waveos.host.probes.results import KINDS, Window
from waveos.host.probes.target import Target, find_cgroup, parse_numbers

SECOND = Window(5_000_000_000, 6_000_000_000)
COUNTS = st.dictionaries(st.integers(0, 300), st.integers(1, 1000), min_size=1, max_size=30)


def bucket_of(ns):
    """histogram.c, in Python."""
    units = ns * 1049 >> 10
    top = max(units | 1, 1).bit_length() - 1
    return units if top < 3 else (top - 2) * 8 + ((units >> (top - 3)) & 7)


@given(st.integers(0, 2**45))
def test_a_time_lies_in_its_bucket_and_the_bucket_is_an_eighth_wide(ns):
    bucket = bucket_of(ns)
    low, high = lowest_us(bucket), lowest_us(bucket + 1)
    time_us = (ns * 1049 >> 10) / 1024
    assert low <= time_us < high
    assert high - low <= max(low / 8, 1 / 1024) * 1.0001
    assert time_us == pytest.approx(ns / 1000, rel=0.001, abs=0.001)


@given(COUNTS)
def test_percentiles_rise_and_lie_within_what_was_counted(counts):
    shares = [percentile_us(counts, share) for share in (0.0, 0.5, 0.99, 1.0)]
    assert shares == sorted(shares)
    assert lowest_us(min(counts)) <= shares[0]
    assert shares[-1] == pytest.approx(lowest_us(max(counts) + 1))


@given(COUNTS)
def test_folding_into_doublings_loses_nothing_and_leaves_no_gap(counts):
    rows = doublings_us(counts)
    assert sum(row["count"] for row in rows) == sum(counts.values())
    assert all(row["to_us"] == after["from_us"] for row, after in pairwise(rows))
    assert rows[0]["count"] and rows[-1]["count"]


def test_nothing_measured_is_no_percentile_and_no_row():
    result = KINDS["runqlat"].summarize({"waits": [], "histogram": []}, SECOND)
    assert result["count"] == 0
    assert result["p50_us"] is result["mean_us"] is None
    assert result["histogram"] == []


def test_a_percentile_is_never_above_the_longest_time_seen():
    tables = {"waits": [[0, [{"count": 1, "total_ns": 9_000, "max_ns": 9_000}]]], "histogram": [[bucket_of(9_000), [1]]]}
    result = KINDS["runqlat"].summarize(tables, SECOND)
    assert result["p999_us"] <= result["max_us"] == 9.0


def test_cpus_add_up_and_the_longest_is_the_longest_of_any():
    percpu = [{"count": 2, "total_ns": 3_000, "max_ns": 2_000}, {"count": 1, "total_ns": 9_000, "max_ns": 9_000}]
    result = KINDS["runqlat"].summarize({"waits": [[0, percpu]], "histogram": []}, SECOND)
    assert (result["count"], result["mean_us"], result["max_us"]) == (3, 4.0, 9.0)


def test_who_has_not_come_back_was_away_until_the_end_but_not_from_before_the_beginning():
    absence = {"since": 4_000_000_000, "woken_at": 5_900_000_000, "state": 1, "name": "sleeper"}
    back = {"since": 0, "woken_at": 5_100_000_000, "state": 1, "name": "runner"}
    result = KINDS["offcpu"].summarize({"times": [], "absences": [[1, absence], [2, back]]}, SECOND)
    assert [(row["thread"], row["reason"], row["total_ms"]) for row in result["rows"]] == [
        ("sleeper", "asleep (S)", 900.0),
        ("sleeper", "woken, waits for a CPU", 100.0),
    ]


def test_reasons_are_the_sum_over_threads():
    def tally(name, state, ns):
        return [{"name": name, "state": state}, [{"count": 1, "total_ns": ns, "max_ns": ns}]]

    result = KINDS["offcpu"].summarize({"times": [tally("a", 2, 1_000), tally("b", 2, 3_000), tally("b", 0x4000, 500)], "absences": []}, SECOND)
    assert [(row["reason"], row["count"], row["max_us"]) for row in result["reasons"]] == [
        ("asleep, not to be disturbed (D)", 2, 3.0),
        ("0x4000", 1, 0.5),
    ]


def test_switches_are_told_by_cpu_and_per_second():
    result = KINDS["switches"].summarize({"switches": [[0, [10, 0, 4]], [1, [1, 0, 0]]]}, Window(0, 2_000_000_000))
    assert result["rows"] == [{"cpu": 0, "voluntary": 10, "involuntary": 1}, {"cpu": 2, "voluntary": 4, "involuntary": 0}]
    assert result["per_second"] == {"voluntary": 7.0, "involuntary": 0.5}


def test_numbers_are_lists_and_ranges():
    assert parse_numbers("0, 2-4,2", "--cpus") == (0, 2, 3, 4)
    assert parse_numbers("", "--cpus") == ()


@pytest.mark.parametrize("text", ["x", "3-1", "-1", "1-", "1.5", "²", "0-99999999"])
def test_what_is_no_number_is_said_with_its_flag(text):
    with pytest.raises(ConfigError, match=r"--cpus .* write for example 0,2-3"):
        parse_numbers(text, "--cpus")


@pytest.mark.parametrize(("text", "seconds"), [("5s", 5.0), ("500ms", 0.5), ("2m", 120.0), ("0.25", 0.25), (" 1 s ", 1.0)])
def test_a_time_has_a_unit_or_is_seconds(text, seconds):
    assert parse_length(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "0", "0ms", "-1", "5h", "s", "1e3", "inf", "90000"])
def test_a_time_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match="for example 500ms"):
        parse_length(text)


def test_the_filter_is_compiled_in_and_absent_where_all_is_meant():
    assert Target().prelude() == "#define CPU_COUNTS(cpu) (1)\n"
    assert Target(pids=(7,), cpus=(0, 3)).prelude() == "#define CPU_COUNTS(cpu) ((cpu) == 0 || (cpu) == 3)\n#define ONLY_WATCHED\n"


def test_a_target_that_is_not_there_is_named():
    gone = os.fork()
    if gone == 0:
        os._exit(0)
    os.waitpid(gone, 0)
    with pytest.raises(ConfigError, match=f"no process {gone}"):
        Target(pids=(gone,)).check()
    with pytest.raises(ConfigError, match=r"no CPU 100000; this machine has 0 to"):
        Target(cpus=(100_000,)).check()
    with pytest.raises(ConfigError, match="no control group nosuch"):
        find_cgroup("nosuch")


def test_threads_of_a_group_are_those_of_all_groups_below_in_either_version(tmp_path):
    for group, listing, threads in (("", "tasks", "1\n2\n"), ("below", "tasks", "3\n0\n"), ("new", "cgroup.threads", "4\n")):
        (tmp_path / group).mkdir(exist_ok=True)
        (tmp_path / group / "cgroup.procs").write_text("")
        (tmp_path / group / listing).write_text(threads)
    assert find_cgroup(str(tmp_path)) == tmp_path
    assert Target(cgroup=tmp_path).threads() == {1, 2, 3, 4}


def test_the_threads_of_a_process_are_found_by_its_pid():
    assert os.getpid() in Target(pids=(os.getpid(),)).threads()


def test_an_unknown_probe_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'runqlat'"):
        Probe("runlat")


def test_of_clangs_words_the_first_error_counts_and_of_the_verifiers_the_last():
    assert first_error("x.c:1:2: warning: w\n\nrunqlat.c:3:4: error: use of 'x'\nmore.c:1: error: y\n") == "runqlat.c:3:4: error: use of 'x'"
    assert (
        first_error("bpf: Failed to load program: Permission denied\n0: R1\nR2 invalid mem access\nprocessed 9 insns (limit 1)\n\n")
        == "R2 invalid mem access"
    )
    assert first_error("") == ""
