"""A sweep on a Ray cluster: this machine as a cluster, reached as any other is."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from waveos.errors import LinkError, MissingError
from waveos.ipu_emulator.cluster import RayPool

WAVE = [sys.executable, "-P", "-c", "from waveos.cli import main; main()"]
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
"""
SWEEP = ["sweep", "small.toml", "--grid", "run.seed=1,2,3,4,5,6", "--loads", "20k", "--json"]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def start_head(logs, port):
    """A cluster of two cores: `ray start` as on any head, which stays in the foreground and takes all of it along when it ends."""
    ray = str(Path(sys.executable).with_name("ray"))
    options = ["--head", "--block", "--port=0", f"--ray-client-server-port={port}", "--num-cpus=2", "--object-store-memory=100000000"]
    quiet = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
    with (logs / "talk").open("w") as talk:
        head = subprocess.Popen([ray, "start", *options, "--include-dashboard=false"], stdout=talk, stderr=talk, env=quiet, cwd=logs)
    try:
        end = time.monotonic() + 120
        while not accepts(port):
            assert head.poll() is None and time.monotonic() < end, (logs / "talk").read_text()
            time.sleep(0.1)
        yield
    finally:
        head.terminate()
        head.wait(timeout=60)


def accepts(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "small.toml").write_text(SCENARIO)
    return tmp_path


@pytest.mark.parametrize("address", ["10.0.0.7", "http://10.0.0.7", "ray://", "ray:10.0.0.7"])
def test_what_is_no_address_of_a_cluster_is_one_line(address):
    with pytest.raises(LinkError, match=r"wants ray://HOST:PORT"):
        RayPool(address, factory="")


def test_without_ray_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingError, match=r"pip install 'waveos\[ray\]'"):
        RayPool("ray://127.0.0.1:1", factory="")


def test_a_cluster_that_is_not_there_is_one_line_and_leaves_nothing(folder):
    pytest.importorskip("ray", reason="needs the Python package ray (make setup EXTRAS=ray)")
    done = subprocess.run([*WAVE, *SWEEP, "--on", f"ray://127.0.0.1:{free_port()}"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 4
    [line] = [line for line in done.stderr.splitlines() if line.startswith("wave: ")]
    assert "cannot be reached (" in line and "ray start --head" in line
    assert sorted(each.name for each in folder.iterdir()) == ["small.toml"]


@pytest.mark.slow
def test_a_sweep_on_a_cluster_finds_what_one_on_this_machine_does(folder, tmp_path_factory):
    pytest.importorskip("ray", reason="needs the Python package ray (make setup EXTRAS=ray)")
    here = json.loads(subprocess.run([*WAVE, *SWEEP, "--out", "here.parquet"], cwd=folder, capture_output=True, check=True).stdout)
    port = free_port()
    with start_head(tmp_path_factory.mktemp("ray"), port):
        done = subprocess.run(
            [*WAVE, *SWEEP, "--on", f"ray://127.0.0.1:{port}", "--out", "there.parquet"], cwd=folder, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    there = json.loads(done.stdout)
    assert [row["trace_hash"] for row in there["rows"]] == [row["trace_hash"] for row in here["rows"]]
    assert "2 cores" in done.stderr
