"""The benchmarks of the link and the calibration, in small: what they say and what they refuse. No time is asserted."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest

from waveos.bench import calibrate, link, peers
from waveos.errors import ConfigError, MissingError
from waveos.ipu_emulator.profile import link_costs, load_host, load_link

TWO_CORES = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores, one a side")
KEYS = {
    "shm_rtt_p50_ns",
    "shm_rtt_p99_ns",
    "raw_rtt_p50_ns",
    "shm_python_rtt_p50_ns",
    "pyzmq_ipc_rtt_p50_ns",
    "iceoryx2_rtt_p50_ns",
    "socketpair_rtt_p50_ns",
    "shm_msgs_per_s",
    "pyzmq_ipc_msgs_per_s",
}


@TWO_CORES
def test_the_link_is_measured_against_every_peer_and_nothing_is_left_behind():
    pytest.importorskip("zmq")
    pytest.importorskip("iceoryx2")
    cores = os.sched_getaffinity(0)
    result = link.run(rounds=5, scale=0.01)
    assert result["metrics"].keys() >= KEYS
    assert all(value > 0 for value in result["metrics"].values())
    assert result["timing"] == "measured"
    assert os.sched_getaffinity(0) == cores
    assert [path for path in Path("/dev/shm").iterdir() if str(os.getpid()) in path.name] == []


def test_a_peer_that_is_not_installed_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: None if name == "iceoryx2" else name)
    with pytest.raises(MissingError, match=r"package iceoryx2: pip install 'waveos\[bench\]'"):
        link.run()


@pytest.mark.parametrize("options", [{"rounds": 4}, {"scale": 0.0}, {"cpus": 0}])
def test_impossible_options_are_refused(options):
    with pytest.raises(ConfigError):
        link.run(**options)


@TWO_CORES
def test_calibrating_writes_two_profiles_that_load_and_say_how_each_figure_came_about(tmp_path):
    result = calibrate.run(tmp_path / "mine.toml", rounds=3)
    profile, host = load_link(result["path"]), load_host(result["host_path"])
    assert profile.name == host.name == "this-machine"
    assert profile.coherent and profile.verified and host.verified
    assert link_costs(profile).host_read_ns == profile.host.wt_read_ns
    assert abs(profile.host.wt_read_ns - result["metrics"]["read_line_ns"]) <= 0.6, "the figure, rounded to whole ns"
    assert profile.wire.one_way_ns > 0 and host.switch_ns > 0 and host.entry_ns > 0
    raw = tomllib.loads(Path(result["path"]).read_text())
    sections = [section["source"] for section in raw.values() if isinstance(section, dict)]
    assert len(sections) == 5
    assert all("measured" in source for source in sections)
    assert "assumed" in profile.doorbell.source and "Assumed: interrupt" in host.source


@TWO_CORES
def test_a_calibrated_machine_is_found_by_name_from_then_on(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="run `wave calibrate`"):
        load_link("this-machine")
    calibrate.run(rounds=3)
    assert load_link("this-machine").name == load_host("this-machine").name == "this-machine"


def test_a_profile_is_a_toml_file():
    with pytest.raises(ConfigError, match=r"ends in \.toml"):
        calibrate.run("profile.txt")
