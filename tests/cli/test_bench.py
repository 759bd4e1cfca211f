"""`wave bench`: finds benchmarks by what they declare, checks their options, prints one object or one table and verdict."""

from __future__ import annotations

import json
import sys

import pytest

import waveos.bench
from waveos.cli import run
from waveos.cli.bench import bench_names

TOY = '''"""A toy that counts. It measures nothing else."""

OPTIONS = {"seed": (1, "any number"), "rounds": 5, "share": 0.5, "quick": (False, "less of it"), "peer": "zmq"}


def run(**options):
    values = {"seed": 1, "rounds": 5, "share": 0.5, "quick": False, "peer": "zmq"} | options
    numbers = {key: value for key, value in values.items() if key != "peer"}
    return {"name": "toy", "metrics": numbers | {"length": len(values["peer"])}, "machine": {"cpu": "abacus", "cores": 1}, "timing": "measured",
            "verdict": "toy: it counts"}
'''


@pytest.fixture
def toys(tmp_path, monkeypatch):
    """A folder with benchmarks beside Wave's own: toy, and one whose peer is not installed."""
    (tmp_path / "toy.py").write_text(TOY)
    (tmp_path / "peerless.py").write_text('"""Wants a peer."""\nimport no_such_peer\nOPTIONS = {}\ndef run(**options): return no_such_peer.run()\n')
    (tmp_path / "late.py").write_text('"""Wants a peer when it runs."""\nOPTIONS = {}\ndef run(**options):\n    import no_such_peer\n')
    (tmp_path / "shelf.py").write_text("def run(): ...\n")
    monkeypatch.setattr(waveos.bench, "__path__", [*waveos.bench.__path__, str(tmp_path)])
    yield
    for name in ("toy", "peerless", "late", "shelf"):
        sys.modules.pop(f"waveos.bench.{name}", None)


@pytest.mark.usefixtures("toys")
class TestBench:
    def test_a_benchmark_is_a_module_with_run_and_options(self):
        assert {"toy", "peerless"} <= set(bench_names())
        assert "shelf" not in bench_names()
        assert "machine" not in bench_names()

    def test_json_is_the_object_that_the_benchmark_returned(self, capsys):
        assert run(["bench", "toy", "--json", "--seed", "7", "--rounds=3", "--share", "0.25", "--quick", "--peer", "none"]) == 0
        said = capsys.readouterr()
        assert json.loads(said.out)["metrics"] == {"seed": 7, "rounds": 3, "share": 0.25, "quick": True, "length": 4}
        assert said.err == ""

    def test_people_get_a_table_and_the_verdict_as_last_line(self, capsys):
        assert run(["bench", "toy"]) == 0
        said = capsys.readouterr()
        assert said.out.splitlines()[-1] == "toy: it counts"
        assert "abacus" in said.out
        assert "A toy that counts" in said.err

    @pytest.mark.parametrize(
        ("arguments", "code", "line"),
        [
            (["toi"], 2, "wave: no benchmark 'toi' (did you mean 'toy'?); there are: "),
            (["toy", "--round", "3"], 2, "wave: bench 'toy' has no option --round (did you mean '--rounds'?); it has: --seed, --rounds"),
            (["toy", "--rounds", "3.5"], 2, "wave: --rounds 3.5: wants a whole number"),
            (["toy", "--share", "half"], 2, "wave: --share half: wants a number"),
            (["toy", "--rounds"], 2, "wave: --rounds of bench 'toy' wants a value"),
            (["toy", "--quick=maybe"], 2, "wave: --quick maybe: wants true or false"),
            (["late"], 5, "late: Wants a peer when it runs ...\nwave: bench 'late' needs the Python package 'no_such_peer': pip install"),
            (["peerless", "--seed", "1"], 5, "wave: bench 'peerless' needs the Python package 'no_such_peer': pip install"),
        ],
    )
    def test_what_cannot_be_run_is_one_line(self, capsys, arguments, code, line):
        assert run(["bench", *arguments]) == code
        said = capsys.readouterr()
        assert said.err.startswith(line)
        assert said.err.count("\n") == line.count("\n") + 1

    def test_the_list_has_every_option_with_its_default_and_survives_a_missing_peer(self, capsys):
        assert run(["bench", "--json"]) == 0
        rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
        assert rows["toy"]["options"]["quick"] == {"default": False, "about": "less of it"}
        assert "no_such_peer" in rows["peerless"]["about"]
        assert run(["bench"]) == 0
        assert "--rounds 5" in capsys.readouterr().out


def test_every_benchmark_of_wave_says_what_it_is_and_what_it_takes(capsys):
    assert run(["bench", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows
    for row in rows:
        assert row["about"]
        assert all(option["about"] for option in row["options"].values())
