"""`wave bench net`: what it must show is in it, and its figures hang together."""

from __future__ import annotations

import pytest

from waveos.bench import net
from waveos.errors import ConfigError


def test_the_model_alone_accounts_for_cores_and_agrees_with_theory() -> None:
    metrics: dict[str, float] = {}
    net._theory(metrics, seed=1, runs=5, requests=30_000)
    errors = {key: value for key, value in metrics.items() if key.endswith("_error")}
    assert len(errors) == 6
    assert all(abs(value) < 3 * metrics[key.replace("_error", "_interval")] + 0.02 for key, value in errors.items())


def test_a_payload_that_does_not_fit_words_is_refused() -> None:
    with pytest.raises(ConfigError, match="multiple of 8"):
        net._echo({}, {key: value[0] if isinstance(value, tuple) else value for key, value in net.OPTIONS.items()} | {"payload": 87})


def test_costs_of_the_stack_are_labelled_assumed() -> None:
    rpc = net.read_rpc()
    assert rpc["verified"] is False and "Assumed" in rpc["source"]
    assert 0 < rpc["service"]["rate_per_s"] * rpc["service"]["mean_ns"] / 1e9 < rpc["service"]["workers"]
