"""`wave sweep` as typed: what it prints, what it keeps, how it goes on after any death, what it refuses."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("pyarrow", reason="sweeps need pyarrow (pip install 'waveos[sweep]')")

from waveos.cli import run
from waveos.ipu_emulator.sweep import rows_of
from waveos.parquet import read_parquet, write_parquet

SCENARIO = """\
name = "small"
[host]
workers = 4
[agent]
message_ns = 40
[workload]
loads_per_s = [40000]
[[workload.classes]]
name = "GET"
service = { fixed_us = 10 }
[policies]
names = ["fifo"]
[run]
duration_ms = 5
warmup_ms = 1
replications = 1
resolution_share = 0.2
"""
MEMORY = """\
name = "little"
subsystem = "memory"
[memory]
gib = 0.0625
[access]
move_s = 0
[agent]
message_ns = 50
[policies]
names = ["clock"]
[run]
warmup_s = 1.2
duration_s = 2.4
"""
WAVE = [sys.executable, "-P", "-c", "from waveos.cli import main; main()"]
SWEEP = ["sweep", "small.toml", "--grid", "run.seed=1,2,3", "--loads", "20k", "--out", "r.parquet"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "small.toml").write_text(SCENARIO)
    (tmp_path / "little.toml").write_text(MEMORY)
    return tmp_path


def wave(folder, *arguments, code=0):
    done = subprocess.run([*WAVE, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture
def complaint(folder, capsys, monkeypatch):
    """A command's one line on stderr; it prints nothing on stdout."""

    def complain(*arguments, code=2):
        monkeypatch.chdir(folder)
        capsys.readouterr()
        assert run(arguments) == code
        said = capsys.readouterr()
        [line] = [line for line in said.err.splitlines() if line.startswith("wave: ")]
        assert said.out == ""
        return line

    return complain


def test_every_combination_is_a_row_and_the_file_has_what_is_printed(folder):
    arguments = ["sweep", "small.toml", "--grid", "host.workers=2,4", "--grid", "agent.speed=0.5,1", "--loads", "20k,30k", "--placement", "all"]
    results = json.loads(wave(folder, *arguments, "--out", "r.parquet", "--report", "r.html", "--json").stdout)
    keys = ("host.workers", "agent.speed", "load_per_s", "id")
    assert [tuple(row[key] for key in keys) for row in results["rows"] if row["world"] == "offload"] == [
        (w, s, load, "fifo/offload") for w in (2, 4) for s in (0.5, 1) for load in (20_000, 30_000)
    ]
    assert {row["world"] for row in results["rows"]} == {"kernel", "on-host", "offload"}
    assert all(row["GET.p50_us"] >= 10 for row in results["rows"])
    rows, about = read_parquet(folder / "r.parquet")
    assert [(row["point"], row["GET.p99_us"]) for row in rows] == [(row["point"], row["GET.p99_us"]) for row in results["rows"]]
    assert (about["points_done"], about["points"], about["timing"]) == (4, 4, "modelled")
    page = (folder / "r.html").read_text()
    assert "<svg" in page and not re.search(r'(src|href)="(?!#)|@import|url\((?!#)', page)
    assert wave(folder, "report", "r.parquet", "--out", "again.html").stdout.strip() == "again.html"
    assert (folder / "again.html").read_text() == page


def test_without_loads_each_point_is_searched_for_its_saturation(folder):
    done = wave(folder, "sweep", "small.toml", "--grid", "host.workers=2,4", "--json")
    two, four = (row["saturation_per_s"] for row in json.loads(done.stdout)["rows"])
    assert 1.5 < four / two < 2.5
    [path] = folder.glob("small-sweep-*.parquet")
    assert f"results: {path.name}" in done.stderr


def test_a_point_is_what_run_says_of_the_same_scenario(folder):
    one = json.loads(wave(folder, "run", "small.toml", "--set", "run.seed=2", "--load", "20k", "--json").stdout)["configs"][0]["points"][0]
    rows = json.loads(wave(folder, *SWEEP, "--json").stdout)["rows"]
    assert rows[1]["trace_hash"] == one["trace_hash"]


def test_scenarios_of_other_subsystems_are_swept_by_their_own_keys(folder):
    done = wave(folder, "sweep", "little.toml", "--grid", "access.hot_share=0.2,0.6", "--json")
    rows = json.loads(done.stdout)["rows"]
    assert {(row["access.hot_share"], row["id"]) for row in rows} >= {(0.2, "clock/offload"), (0.6, "clock/offload")}
    assert all("saved_share" in row for row in rows)


def test_a_sweep_that_is_whole_runs_nothing_again(folder):
    first = json.loads(wave(folder, *SWEEP, "--json").stdout)
    written = (folder / "r.parquet").stat().st_mtime_ns
    again = wave(folder, *SWEEP, "--json")
    assert json.loads(again.stdout)["rows"] == first["rows"]
    assert "all 3 points are there already" in again.stderr
    assert (folder / "r.parquet").stat().st_mtime_ns == written


def wait_for(condition, deadline_s=60.0):
    end = time.monotonic() + deadline_s
    while not (found := condition()):
        assert time.monotonic() < end, "the condition did not come true in time"
        time.sleep(0.01)
    return found


def finished(path):
    """Whole lines of a journal but the first."""
    return max(0, path.read_bytes().count(b"\n") - 1) if path.exists() else 0


def points_of(lines):
    return [json.loads(line)["number"] for line in lines[1:]]


def many(points):
    """A sweep of so many points of some 50 ms each."""
    seeds = ",".join(map(str, range(points)))
    run = ["--loads", "200k", "--set", "run.duration_ms=250", "--processes", "2", "--out", "r.parquet"]
    return ["sweep", "small.toml", "--grid", f"run.seed={seeds}", *run]


def test_killed_at_any_moment_it_goes_on_and_repeats_no_finished_point(folder):
    journal = folder / "r.parquet.journal"
    kept = []
    for wanted in (0, 3, 9):
        with (folder / "talk").open("w") as talk:
            process = subprocess.Popen([*WAVE, *many(40)], cwd=folder, stdout=subprocess.DEVNULL, stderr=talk)
            wait_for(lambda least=wanted, died=process.poll: (journal.exists() and finished(journal) >= least) or died() is not None)
            process.kill()
            process.wait()
        lines = journal.read_bytes().split(b"\n")[:-1]
        assert lines[: len(kept)] == kept, "a finished point was lost, or written again"
        kept = lines
    before = points_of(kept)
    assert 9 <= len(before) == len(set(before)) < 40
    done = wave(folder, *many(40), "--json")
    assert f"{len(before)} of 40 points are there already" in done.stderr
    assert "of 40 points done, about " in done.stderr
    results = json.loads(done.stdout)
    assert [(row["point"], row["run.seed"]) for row in results["rows"]] == [(number, number) for number in range(40)]
    assert not results["interrupted"]
    assert not journal.exists()


def test_ctrl_c_keeps_what_was_measured_and_the_same_command_goes_on(folder):
    journal = folder / "r.parquet.journal"
    done = 0
    for _ in range(2):
        with (folder / "talk").open("w") as talk, (folder / "data").open("w") as data:
            process = subprocess.Popen([*WAVE, *many(400), "--json"], cwd=folder, stdout=data, stderr=talk)
            wait_for(lambda died=process.poll: finished(journal) >= 2 or died() is not None)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=30) == 130
        results, talk = json.loads((folder / "data").read_text()), (folder / "talk").read_text()
        assert results["interrupted"] and done + 2 <= results["points_done"] < 400
        assert "stopped; what was measured is kept in r.parquet" in talk
        assert (f"{done} of 400 points are there already" in talk) == (done > 0)
        rows, about = read_parquet(folder / "r.parquet")
        assert not journal.exists()
        done = results["points_done"]
        assert len({row["point"] for row in rows}) == len(rows) == about["points_done"] == done


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--grid", "host.worker=2,4"], "--grid: host.worker: unknown key `worker` (did you mean 'workers'?)"),
        (["--grid", "hots.workers=2,4"], "--grid: hots: unknown key `hots` (did you mean 'host'?)"),
        (["--grid", "host.workers="], "--grid host.workers=: wants a key and its values"),
        (["--grid", "host.workers=2,four"], '--grid: host.workers: workers = "four": wants'),
        (["--grid", "host.workers=0,4"], "--grid: host.workers: workers = 0: wants"),
        (["--grid", "link.profile=cxl,cxk"], "no link profile 'cxk' (did you mean 'cxl'?)"),
        (["--grid", "policies.names=fifo,fifoo"], "no policy 'fifoo' (did you mean 'fifo'?)"),
        (["--grid", "run.seed=1,2", "--placement", "moon"], "--placement moon: no such place"),
        (["--grid", "run.seed=1,2", "--out", "r.json"], "--out r.json: a sweep's results are a Parquet file"),
        (["--grid", "run.seed=1,2", "--out", "no/where.parquet"], "cannot write no/where.parquet: there is no folder"),
        (["--grid", "run.seed=1,2", "--out", "/dev/full"], "--out /dev/full: a sweep's results are a Parquet file"),
        ([], "Missing option '--grid'"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_writes_nothing(folder, complaint, arguments, told):
    before = sorted(folder.iterdir())
    assert told in complaint("sweep", "small.toml", *arguments)
    assert sorted(folder.iterdir()) == before


def test_the_file_of_another_sweep_or_version_is_refused_and_left_as_it_is(folder, complaint):
    wave(folder, *SWEEP)
    before = (folder / "r.parquet").read_bytes()
    other = ["sweep", "small.toml", "--grid", "run.seed=1,2", "--loads", "20k", "--out", "r.parquet"]
    assert "r.parquet holds another sweep (of small, over run.seed; or other values" in complaint(*other)
    assert (folder / "r.parquet").read_bytes() == before
    rows, about = read_parquet(folder / "r.parquet")
    write_parquet(folder / "r.parquet", rows, {**about, "code": "older"})
    assert "r.parquet holds points that another version of Wave made" in complaint(*SWEEP)
    write_parquet(folder / "r.parquet", rows, {**about, "format": 0})
    assert "r.parquet is of another version of wave sweep" in complaint(*SWEEP)


def test_a_parquet_file_that_is_cut_off_is_one_line_for_sweep_and_for_report(folder, complaint):
    wave(folder, *SWEEP)
    path = folder / "r.parquet"
    path.write_bytes(path.read_bytes()[:-40])
    assert "r.parquet is no whole Parquet file" in complaint(*SWEEP)
    assert "r.parquet is no whole Parquet file" in complaint("report", "r.parquet")


def test_a_full_disk_is_one_line_and_the_points_stay_in_the_journal(folder):
    """A limit on file size stands for the disk: the Parquet file does not fit, the journal does."""
    import resource

    process = subprocess.run(
        [*WAVE, *SWEEP],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: (signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, 6_000))),
    )
    assert process.returncode == 2
    [line] = [line for line in process.stderr.splitlines() if line.startswith("wave: ")]
    assert "cannot write" in line and "file too large" in line
    assert not (folder / "r.parquet").exists()
    assert json.loads(wave(folder, *SWEEP, "--json").stdout)["points_done"] == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_one_line(folder, complaint):
    folder.chmod(0o555)
    assert "permission denied" in complaint(*SWEEP)


def test_rows_have_the_tables_within_as_columns_and_no_lists():
    results = {
        "configs": [{"id": "a", "figures": {"x": 1.5}, "series": [1, 2], "points": [{"load_per_s": 1.0, "classes": {"GET": {"p50_us": None}}}]}]
    }
    assert rows_of(results) == [{"id": "a", "x": 1.5, "load_per_s": 1.0}]
