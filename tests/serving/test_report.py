"""The report of serving: one page and one timeline, from a short run."""

from __future__ import annotations

import gzip
import json

import pytest

from waveos.bench import serving_report
from waveos.errors import ConfigError
from waveos.report.serving import render_report


def test_the_page_and_the_timeline_are_drawn_from_runs(tmp_path):
    page, trace = tmp_path / "report.html", tmp_path / "trace.json.gz"
    made = serving_report.run(out=str(page), trace=str(trace), queries=40, systems="strata,sglang-hicache")
    assert made["timing"] == "modelled" and made["metrics"]["strata_peak_tokens_per_s"] > 0
    assert made["metrics"]["strata_link_us_per_iteration"] < made["metrics"]["strata_host_us_freed_per_iteration"]
    text = page.read_text()
    assert text.count("<svg") == 5 and "http://" not in text.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert {"prefill", "decode", "agent"} <= {event.get("cat") for event in events}
    for tid in {event["tid"] for event in events if event.get("cat") in ("prefill", "decode")}:
        ends = 0.0
        for event in sorted((each for each in events if each["ph"] == "X" and each["tid"] == tid), key=lambda each: each["ts"]):
            assert event["ts"] >= ends - 0.01  # one thing at a time on a track
            ends = event["ts"] + event["dur"]


def test_hits_of_all_tiers_and_what_is_computed_are_all_there_is():
    shares = serving_report.by_tier(serving_report.Simulation(*_small()).run())
    assert sum(shares.values()) == pytest.approx(1.0)
    assert all(share >= 0 for share in shares.values())


def _small():
    setup = serving_report.Setup(serving_report.load_system("strata"), in_flight=16)
    return setup, serving_report.make_workload("loogle", 5.0, serving_report.load_constants().fitted, queries=60)


def test_other_results_and_folders_that_are_not_there_are_one_line(tmp_path):
    with pytest.raises(ConfigError, match="no results of serving"):
        render_report({"subsystem": "memory"})
    with pytest.raises(ConfigError, match="there is no folder"):
        serving_report.run(out=str(tmp_path / "nowhere" / "report.html"))
