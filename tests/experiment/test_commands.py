"""`wave run|compare|trace|report|config`, as typed: what is on stdout, what is kept, what the exit code says."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCENARIO = """\
name = "small"
[host]
workers = 4
[agent]
message_ns = 40
[workload]
loads_per_s = [40000, 80000]
[[workload.classes]]
name = "GET"
share = 0.99
service = { fixed_us = 10 }
slo_us = 200
[[workload.classes]]
name = "RANGE"
share = 0.01
service = { fixed_us = 500 }
[policies]
names = ["fifo", "shinjuku"]
[run]
duration_ms = 20
warmup_ms = 2
replications = 2
resolution_share = 0.1
[objective]
GET = { p99_us = 200 }
"""
WAVE = [sys.executable, "-P", "-c", "from waveos.cli import main; main()"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "small.toml").write_text(SCENARIO)
    return tmp_path


def wave(folder, *arguments, code=0, **environment):
    done = subprocess.run([*WAVE, *arguments], cwd=folder, capture_output=True, text=True, check=False, env=os.environ | environment)
    assert done.returncode == code, done.stderr
    return done


def complaint(folder, *arguments, code=2):
    """The one line on stderr; nothing on stdout."""
    done = wave(folder, *arguments, code=code)
    lines = [line for line in done.stderr.splitlines() if line.startswith("wave: ")]
    assert done.stdout == ""
    assert len(lines) == 1
    return lines[0]


def test_run_prints_one_configuration(folder):
    results = json.loads(wave(folder, "run", "small.toml", "--policy", "fifo", "--load", "50k", "--json").stdout)
    [config] = results["configs"]
    assert (config["id"], config["workers"]) == ("fifo/offload", 4)
    [point] = config["points"]
    assert point["load_per_s"] == 50_000
    assert results["timing"] == "modelled"
    assert not results["link"]["verified"]


@pytest.mark.parametrize(("placement", "name"), [("kernel", "kernel"), ("on-host", "shinjuku/on-host same workers"), ("offload", "shinjuku/offload")])
def test_run_goes_where_it_is_placed(folder, placement, name):
    results = json.loads(wave(folder, "run", "small.toml", "--placement", placement, "--json").stdout)
    assert [config["id"] for config in results["configs"]] == [name]


def test_a_policy_can_be_run_as_plain_python_with_prints(folder):
    (folder / "loud.py").write_text(
        "from waveos.policy import Policy, ring, push, pop, size\n"
        "from waveos import sched\n"
        "class Loud(Policy, subsystem=sched, name='loud'):\n"
        "    runq = ring(65536)\n"
        "    def thread_runnable(self, msg, txns):\n"
        "        print('seen', msg.tid)\n"
        "        push(self.runq, msg.tid)\n"
        "    def cpu_idle(self, msg, txns):\n"
        "        if size(self.runq): sched.run(txns, tid=pop(self.runq), cpu=msg.cpu)\n"
    )
    done = wave(folder, "run", "small.toml", "--policy", "loud.py", "--load", "2000", "--set", "run.duration_ms=2", WAVE_JIT="0")
    assert "seen 0" in done.stderr


def test_compare_tells_every_configuration_and_both_columns(folder):
    results = json.loads(wave(folder, "compare", "small.toml", "--policy", "fifo", "--json", "--out", "r.json", "--report", "r.html").stdout)
    by_id = {config["id"]: config for config in results["configs"]}
    assert set(by_id) == {"kernel", "fifo/on-host same workers", "fifo/on-host same machine", "fifo/offload"}
    assert set(by_id["fifo/offload"]["cost_share"]) == {"same workers", "same machine"}
    assert all(config["saturation_low_per_s"] <= config["saturation_per_s"] <= config["saturation_high_per_s"] for config in by_id.values())
    assert {row["label"] for row in results["ablation"]} >= {"all", "none", "all but wb"}
    assert all(row["unloaded_decision_ns"] > 0 for row in results["ablation"])
    assert json.loads((folder / "r.json").read_text())["configs"] == results["configs"]
    assert "<html" in (folder / "r.html").read_text().lower()
    assert "small" in wave(folder, "report", "r.json", "--out", "again.html").stderr or (folder / "again.html").is_file()


def test_compare_at_given_loads_searches_nothing(folder):
    results = json.loads(wave(folder, "compare", "small.toml", "--loads", "30k,60k", "--json").stdout)
    assert all([point["load_per_s"] for point in config["points"]] == [30_000, 60_000] for config in results["configs"])
    assert results["ablation"] == []


def test_compare_prints_a_table(folder):
    shown = wave(folder, "compare", "small.toml", "--loads", "30k").stdout
    assert all(word in shown for word in ("fifo", "shinjuku", "offload", "on-host", "kernel", "assumed"))


def test_trace_writes_a_window_for_perfetto(folder):
    told = json.loads(wave(folder, "trace", "small.toml", "--out", "t.json", "--from-ms", "5", "--for-ms", "1", "--json").stdout)
    assert told["events"] > 50
    assert json.loads((folder / "t.json").read_text())["traceEvents"]


def test_config_show_tells_values_and_origin(folder):
    told = json.loads(wave(folder, "config", "show", "small.toml", "--origin", "--set", "run.seed=5", "--json").stdout)
    assert told["scenario"]["run"]["seed"] == 5
    assert told["origin"]["run.seed"] == "--set"
    assert told["origin"]["host.threads"] == "default"
    assert "small.toml" in told["origin"]["host.workers"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run", "smal.toml"], "no scenario file 'smal.toml'"),
        (["run", "small.toml", "--set", "host.worker=3"], "--set: host.worker: unknown key `worker` (did you mean 'workers'?)"),
        (["run", "small.toml", "--set", "workload.classes.GET.slo_ms=1"], "the key is `slo_us`, in microseconds: write slo_us = 1000"),
        (["run", "small.toml", "--load", "-5"], "load '-5': wants requests per second above 0"),
        (["run", "small.toml", "--load", "many"], "load 'many': wants requests per second above 0"),
        (["run", "small.toml", "--placement", "moon"], "--placement moon: no such place"),
        (["run", "small.toml", "--policy", "fifoo"], "no policy 'fifoo' (did you mean 'fifo'?)"),
        (["run", "small.toml", "--set", "policies.params.fifoo.x=1"], "policies.params.fifoo: no policy of that name"),
        (["run", "small.toml", "--set", "link.profile=mount-everest"], "no link profile 'mount-everest' (did you mean 'mount-evans'?)"),
        (["run", "small.toml", "--set", "workload.classes.GET.service={samples=\"rocks:get\"}"], 'samples = "rocks:get": nothing of that name can be measured'),
        (["run", "small.toml", "--out", "no/where.json"], "cannot write no/where.json: there is no folder"),
        (["trace", "small.toml", "--from-ms", "900"], "the window begins at 900 ms, but the run ends at 22"),
        (["report", "gone.json"], "cannot read gone.json"),
        (["report", "small.toml"], "small.toml is no results file"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_writes_nothing(folder, arguments, told):
    before = sorted(folder.iterdir())
    assert told in complaint(folder, *arguments)
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("world", "told", "code"),
    [
        ("local", "--world local runs scenarios of memory so far; small is one of sched: `wave bench live` has what runs for real of it", 5),
        ("remote", "--world remote: scenarios are not run there yet", 5),
        ("locl", "--world locl: no such world (did you mean 'local'?); there are: virtual, local", 2),
    ],
)
def test_a_world_that_a_scenario_cannot_be_run_in_is_told(folder, world, told, code):
    assert told in complaint(folder, "run", "small.toml", "--world", world, code=code)


def test_a_parameter_that_the_policy_does_not_have_is_refused(folder):
    told = complaint(folder, "run", "small.toml", "--set", "policies.params.shinjuku.quantum_ms=1", code=3)
    assert "has no parameter 'quantum_ms' (did you mean 'quantum_us'?)" in told


def test_a_full_disk_leaves_no_results_file_behind(folder):
    told = wave(folder, "run", "small.toml", "--out", "/dev/full", code=2)
    assert "wave: cannot write /dev/full: no space left on device" in told.stderr


def wait_for(condition, deadline_s=60.0):
    end = time.monotonic() + deadline_s
    while not (found := condition()):
        assert time.monotonic() < end, "the condition did not come true in time"
        time.sleep(0.02)
    return found


def test_ctrl_c_keeps_what_was_measured(folder):
    arguments = ["compare", "small.toml", "--set", "run.replications=100", "--set", "run.duration_ms=200", "--json"]
    with (folder / "talk").open("w") as talk, (folder / "data").open("w") as data:
        process = subprocess.Popen([*WAVE, *arguments], cwd=folder, stdout=data, stderr=talk)
        wait_for(lambda: "runs done" in (folder / "talk").read_text() or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
    results = json.loads((folder / "data").read_text())
    assert results["interrupted"]
    assert sum(len(config["points"]) for config in results["configs"]) > 0
    assert json.loads((folder / "small-stopped.json").read_text()) == results
    assert "kept in small-stopped.json" in (folder / "talk").read_text()
    assert not list(Path("/dev/shm").glob("wave-beat*"))
