"""`wave bench paper`: what is assumed is varied, one number at a time, nothing else is; and the table says what came out, reached or not."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from waveos.bench import paper, paper_figures, paper_page
from waveos.bench.paper_variation import DATA, Variation, variations
from waveos.errors import ConfigError

PAPER = tomllib.loads(Path(paper.__file__).with_name("paper.toml").read_text())
BASE = "links/mount-evans"
QUICK = paper_figures.Effort(replications=1, resolution_share=0.01, requests=50_000)


def test_every_number_of_a_profile_is_halved_and_doubled_but_those_left_out_with_a_reason():
    found = variations({"each": [f"{BASE}:*"]}, {"links/*:doorbell.ioctl_ns": "not charged"})
    keys = {key for each in found for key in each.keys}
    text = tomllib.loads((DATA / f"{BASE}.toml").read_text())
    numbers = {
        f"{BASE}:{table}.{key}" for table, of in text.items() if isinstance(of, dict) for key, value in of.items() if not isinstance(value, str)
    }
    assert keys == numbers - {f"{BASE}:doorbell.ioctl_ns"} | {f"{BASE}:relative_speed"}
    assert {each.factor for each in found} == {0.5, 2.0}


def test_a_variation_changes_its_keys_and_nothing_else(tmp_path):
    changed = Variation("", (f"{BASE}:wire.one_way_ns",), 2.0)
    path = changed.file(BASE, tmp_path)
    before, after = tomllib.loads((DATA / f"{BASE}.toml").read_text()), tomllib.loads(Path(path).read_text())
    assert after["wire"]["one_way_ns"] == 2 * before["wire"]["one_way_ns"]
    after["wire"]["one_way_ns"] = before["wire"]["one_way_ns"]
    assert after == before
    assert changed.file("links/on-host", tmp_path) == "on-host"


def test_keys_that_ask_one_question_go_up_and_down_as_one():
    [one, *_] = variations({"together": ["net/rpc:service.rate_per_s+service.workers"]}, {})
    assert one.keys == ("net/rpc:service.workers", "net/rpc:service.rate_per_s")


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(ConfigError, match="matches no number of links/mount-evans"):
        variations({"each": [f"{BASE}:host.nothing"]}, {})


def test_what_paper_toml_assumes_is_there_and_each_figure_it_publishes_is_evaluated():
    for assumed in PAPER["assumed"].values():
        assert variations(assumed, PAPER["left_out"])
    assert paper_figures.vm_variations()
    names = {each.name for each in paper.figures_of(PAPER)} | {"offload_cost_min", "offload_cost_max"}
    assert set(PAPER["published"]) <= names


def test_without_mitigations_a_decision_takes_longer_and_the_longer_the_slower_the_link():
    workload = {"subsystem": "sched", "scenario": "ghost-rocksdb", "policy": "fifo"}
    slowdown = [
        paper_figures.unmitigated_slowdown(workload, Variation("", (f"{BASE}:host.uc_read_ns",), factor), QUICK) for factor in (0.5, 1.0, 2.0)
    ]
    assert 1 < slowdown[0] < slowdown[1] < slowdown[2]


def test_the_table_gives_the_ends_over_all_workloads_and_says_what_is_not_reached(tmp_path):
    wanted = [each for each in paper.figures_of(PAPER) if each.name in ("offload_cost_fifo", "offload_cost_rpc")]
    half, double = Variation("a x 0.5", ("a",), 0.5), Variation("a x 2", ("a",), 2.0)
    values = {
        "offload_cost_fifo": {paper.AS_IT_IS: 0.02, half: 0.019, double: 0.03},
        "offload_cost_rpc": {paper.AS_IT_IS: 0.13, half: 0.10, double: None},
    }
    rows = {row["name"]: row for row in paper._offload_rows(wanted, values, PAPER)}
    least, most = rows["offload_cost_min"], rows["offload_cost_max"]
    assert (least["value"], least["low"], least["high"]) == (0.02, 0.019, 0.03)
    assert (most["value"], most["low"], most["high"]) == (0.13, 0.10, 0.13)
    assert rows["offload_cost_rpc"]["unanswered"] == ["a x 2"]
    result = {
        "rows": list(rows.values()),
        "timing": "modelled",
        "quick": False,
        "machine": {"cpu": "x", "cores": 2},
        "variations": {name: {each.name: value for each, value in of.items()} for name, of in values.items()},
    }
    paper_page.write(result, str(tmp_path / "evaluation.md"), str(tmp_path / "out" / "evaluation.html"))
    text = (tmp_path / "evaluation.md").read_text()
    assert "| offload_cost_max | 0.1300 | 0.1000 | 0.1300 | 0.0740 |" in text
    assert "offload_cost_max: 0.1300 here, 0.0740 published" in text
    assert "The range does not reach it." in text
    assert "<svg" in (tmp_path / "out" / "evaluation.html").read_text()
