"""`wave bench net`: what it must show is in it, and its figures hang together."""

from __future__ import annotations

import pytest

from waveos.bench import net, net_echo, net_model
from waveos.errors import ConfigError

DEFAULTS = {key: value[0] if isinstance(value, tuple) else value for key, value in net.OPTIONS.items()}


def test_the_model_agrees_with_theory() -> None:
    metrics: dict[str, float] = {}
    net_model.check_theory(metrics, seed=1, runs=5, requests=30_000)
    errors = {key: value for key, value in metrics.items() if key.endswith("_error")}
    assert len(errors) == 6
    assert all(abs(value) < 3 * metrics[key.replace("_error", "_interval")] + 0.02 for key, value in errors.items())


def test_cores_that_are_saved_are_those_that_the_stack_took() -> None:
    metrics: dict[str, float] = {}
    cheap = dict(metrics, mmsg_server_ns_per_packet=2_000.0)
    for each in (metrics, cheap):
        (line,) = net_model.account_cores(each, seed=1, requests=10_000)
        assert each["model_host_cores_on_host"] - each["model_host_cores_offloaded"] == each["model_host_cores_saved"] > 0
    assert "measured here" in line
    assert cheap["model_host_cores_saved"] < metrics["model_host_cores_saved"], "it is the stack's cost that counts"


def test_steering_by_class_is_worth_more_than_rss() -> None:
    metrics: dict[str, float] = {}
    net_model.compare_throughput(metrics, seed=1, requests=5_000)
    assert metrics["model_slo_throughput_gain"] > 2
    assert 1 < metrics["model_exponential_throughput_gain"] < 3


def test_a_payload_that_does_not_fit_words_is_refused() -> None:
    with pytest.raises(ConfigError, match="multiple of 8"):
        net_echo.compare_echoes({}, DEFAULTS | {"payload": 87})


def test_nothing_to_measure_is_one_line() -> None:
    with pytest.raises(ConfigError, match="nothing to measure"):
        net.run(live=False, model=False)


def test_costs_of_the_stack_are_labelled() -> None:
    rpc = net_model.read_rpc()
    assert rpc["verified"] is False and "assumed" in rpc["source"]
    assert 0 < rpc["service"]["rate_per_s"] * rpc["service"]["mean_ns"] / 1e9 < rpc["service"]["workers"]
