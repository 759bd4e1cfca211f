"""What was decided on this kernel is decided again in every other world; where nothing can be recorded, that is said."""

from __future__ import annotations

import pytest

from waveos.bench import conformance
from waveos.bench.conformance_live import why_not

WAYS = 2 * len(conformance.WORLDS)
"""Each world, compiled and as plain Python."""


@pytest.mark.slow
@pytest.mark.skipif(bool(why_not()), reason=str(why_not()))
def test_what_was_decided_on_this_kernel_is_decided_again_byte_for_byte() -> None:
    metrics = conformance.run(policies="fifo,shinjuku", messages=200, quick=True)["metrics"]
    assert metrics["identical_share"] == 1
    assert (metrics["live_policies"], metrics["runs"]) == (2, 2 * (2 * WAYS + 1))
    assert metrics["live_messages"] > 200 and metrics["live_decisions"] > 20


def test_where_nothing_can_be_recorded_it_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(conformance, "why_not", lambda: "this kernel has no BTF")
    metrics = conformance.run(policies="fifo", messages=200)["metrics"]
    assert (metrics["identical_share"], metrics["runs"], metrics["live_policies"]) == (1, WAYS, 0)
    assert "live: nothing recorded: this kernel has no BTF\n" in capsys.readouterr().err


def test_one_decision_that_differs_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = conformance.record_stream("fifo", 200, seed=1)

    def recorded(_names: list[str], _each_s: float) -> dict[str, object]:
        decided = conformance.Replayed(conformance.load_policy("fifo"), 8, 512, 1).feed(stream)
        decided["tid"][-1] += 1
        return {"fifo": ({"cpus": 8, "threads": 512, "ahead": 1}, stream, decided)}

    monkeypatch.setattr(conformance, "why_not", lambda: None)
    monkeypatch.setattr(conformance, "record_live", recorded)
    result = conformance.run(policies="fifo", messages=200)
    assert result["metrics"]["identical_share"] == pytest.approx(2 * WAYS / (2 * WAYS + 1))
    assert "fifo on this kernel, decided again" in result["verdict"]
