"""What the live benchmark makes of what it measured; the measuring itself is tried by `wave bench live`."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from waveos.bench import live, live_costs, live_prediction
from waveos.bench.live_costs import Costs
from waveos.bench.live_window import NEVER, Usage, gaps_ns, look_back, quantiles_us, read_usage
from waveos.errors import ConfigError, WaveError
from waveos.host.service import Served
from waveos.ipu_emulator.sched import RequestClass, Service, Setup, eevdf, simulate

IDLE = Usage(0, 0, 0.0, 0.0)
MS = 1_000_000


def served(intended: list[int], done: list[int], is_range: list[bool] | None = None, sent: list[int] | None = None) -> Served:
    times = np.array(intended, np.int64)
    return Served(np.array(is_range or [False] * len(intended)), times, times if sent is None else np.array(sent, np.int64), np.array(done, np.int64))


def costs(**changes: object) -> Costs:
    get, ranges, wave_get, wave_range, late = (np.array([each]) for each in (7_000, 750_000, 7_500, 760_000, 9_000))
    pace = np.full(1_000, 3_000)
    plain = Costs(get, ranges, wave_get, wave_range, (0,), late, 10_000.0, 1_700.0, 1_500.0, 0.0, 1_400_000, 4_000_000, 30_000.0, pace)
    return replace(plain, **changes)  # type: ignore[arg-type]


def test_latency_counts_from_when_a_request_was_to_be_sent() -> None:
    n = 1_000
    at = [10_000 * i for i in range(1, n + 1)]
    window = look_back(served(at, [t + 50_000 for t in at], sent=[t + 20_000 for t in at]), IDLE, IDLE)
    assert (window.get_p50_us, window.get_p99_us, window.late_p50_us) == (50.0, 50.0, 20.0)
    assert window.backlog_ns == 50_000 and window.throughput_per_s == pytest.approx(window.offered_per_s, rel=0.01)


def test_the_warm_up_is_not_counted_and_classes_are_kept_apart() -> None:
    at = [MS * i for i in range(1, 101)]
    done = [t + (900_000 if i < 10 else 5_000) for i, t in enumerate(at)]
    kinds = [i % 2 == 1 for i in range(100)]
    done = [d + 70_000 * kind for d, kind in zip(done, kinds, strict=True)]
    window = look_back(served(at, done, kinds), IDLE, IDLE)
    assert (window.get_p99_us, window.range_p50_us) == (5.0, 75.0)


def test_what_was_never_done_is_infinitely_late() -> None:
    window = look_back(served([MS, 2 * MS, 3 * MS], [MS + 1, 2 * MS + 1, 0]), IDLE, IDLE)
    assert window.get_p99_us == float("inf") and window.backlog_ns == float("inf")


def test_a_long_gap_counts_as_throttled_only_while_a_request_waits_at_a_worker() -> None:
    waiting = served([1, MS, 2 * MS], [2, MS + 60 * MS, MS + 61 * MS])
    idle = served([1, 60 * MS, 61 * MS], [2, 60 * MS + 5, 61 * MS + 5])
    assert gaps_ns(idle) == 0
    assert gaps_ns(served([1, 1, MS], [2, 60 * MS, 61 * MS])) == 60 * MS - 2
    assert gaps_ns(waiting) == 0, "the core idled when the gap began"


def test_shares_of_the_cpu_are_of_the_time_until_all_was_done() -> None:
    at = [MS * i for i in range(1, 1_001)]
    window = look_back(served(at, [t + MS for t in at]), Usage(0, 0, 5.0, 0.0), Usage(500 * MS, 1_100, 5.8, 0.1, 100 * MS))
    assert window.busy_share == pytest.approx(0.5) and window.switches == pytest.approx(1.1)
    assert window.foreign_share == pytest.approx(0.2) and window.stolen_share == pytest.approx(0.1)


def test_usage_is_that_of_the_processes_and_the_cpu() -> None:
    before = read_usage([os.getpid()], min(os.sched_getaffinity(0)))
    while (after := read_usage([os.getpid()], min(os.sched_getaffinity(0)))).workers_ns == before.workers_ns:
        pass
    assert after.workers_ns > before.workers_ns > 0 and after.cpu_s >= before.cpu_s > 0


def test_quantiles_of_nothing_are_not_numbers() -> None:
    assert all(np.isnan(quantiles_us(np.array([]))))
    assert quantiles_us(np.arange(1, 101) * 1_000) == (50.0, 100.0)


def test_a_decision_is_the_sum_of_its_parts() -> None:
    report = {"event_ns": [[1_000, 99], [9_000, 1]], "wakeup_ns": [[9_000, 1]], "decide_ns": [[200, 5]]}
    told = [{"report": report, "counters": {"enforced_ns": [[4_000, 7]]}}]
    times = live.decision_times(told, seed=1)
    assert (times["decision_event_same_core_p50_ns"], times["decision_event_other_core_p999_ns"]) == (9_000, 1_000)
    assert (times["decision_event_p50_ns"], times["decision_decide_p50_ns"], times["decision_enforce_p99_ns"]) == (1_000, 200, 4_000)
    assert times["decision_rtt_p50_ns"] == 5_200 and times["decision_rtt_p999_ns"] == 13_200
    assert live.decision_times([{"report": None, "counters": {"enforced_ns": []}}], seed=1) == {}


def test_the_verdict_says_who_won_and_when_the_machine_was_noisy() -> None:
    metrics = {"kernel_get_p99_us": 900.0, "kernel_tuned_get_p99_us": 150.0, "wave_get_p99_us": 300.0}
    metrics |= {"kernel_saturation_per_s": 80_000.0, "wave_saturation_per_s": 60_000.0}
    metrics |= {"wave_mlfq_get_p99_us": 100.0, "wave_mlfq_saturation_per_s": 76_000.0}
    quiet = {f"{name}_foreign_share": 0.01 for name in ("kernel", "kernel_tuned", "wave", "wave_mlfq")}
    first, second = live.conclude(metrics | quiet, "kernel_slice").split("; ")
    assert "shinjuku" in first and "3.00x below the kernel's default, 0.50x below the tuned kernel (kernel_slice), saturation 0.75x" in first
    assert "mlfq" in second and "9.00x below the kernel's default, 1.50x below the tuned kernel (kernel_slice), saturation 0.95x" in second
    assert "quiet" not in live.conclude(metrics | quiet, "kernel_slice")
    assert "30%" in live.conclude(metrics | quiet | {"kernel_foreign_share": 0.3}, "kernel_slice")


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"workers": 1}, {"seconds": 0.01}, {"quantum_us": 0.0}])
def test_options_that_cannot_be_are_refused_in_one_line(wrong: dict[str, float]) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one CPU: the benchmark refuses for that reason first")
    with pytest.raises(ConfigError, match="at least"):
        live.run(**wrong)  # type: ignore[arg-type]


# The emulator's part


def test_an_idle_machine_is_predicted_from_the_costs_alone() -> None:
    predicted = live_prediction.predict(costs(), None, 500.0, 16, seed=1)
    expected_us = (9_000 + 10_000 + 7_000) / 1_000
    assert predicted["get_p50_us"] == pytest.approx(expected_us, rel=0.05)
    assert predicted["throughput_per_s"] == pytest.approx(500, rel=0.1)


def test_saturation_is_what_the_cpu_can_do() -> None:
    given = costs()
    assert given.capacity_per_s == pytest.approx(1e9 / (0.995 * 7_000 + 0.005 * 750_000))
    assert 0.85 * given.capacity_per_s < live_prediction.saturation(given, None, 16, seed=1) < 1.02 * given.capacity_per_s


def test_where_the_cpu_stands_still_for_a_while_its_requests_wait_for_that_long_and_no_others() -> None:
    still = np.full(500_000, 3_000)
    still[::5_000] = 900_000  # 0.9 ms in every 16: shorter than what the watch sees
    steady, stumbling = (live_prediction.predict(costs(pace_ns=pace), None, 4_000.0, 16, seed=1) for pace in (still[1:2], still))
    assert stumbling["get_p50_us"] == pytest.approx(steady["get_p50_us"], rel=0.05)
    assert steady["get_p99_us"] < 200 < 600 < stumbling["get_p99_us"] < 1_200
    most = [live_prediction.saturation(costs(pace_ns=pace), None, 16, seed=1) for pace in (still[1:2], still)]
    assert most[1] == pytest.approx(most[0] * 15 / 15.9, rel=0.001)


def test_what_the_watch_sees_of_a_slow_cpu_is_left_out_of_the_prediction_as_of_the_measurement() -> None:
    slow = np.full(500_000, 3_000)
    slow[100_000:103_000] = 30_000  # for 90 ms
    steady, told = (live_prediction.predict(costs(pace_ns=pace), None, 4_000.0, 16, seed=1) for pace in (slow[:1], slow))
    assert told["get_p99_us"] == pytest.approx(steady["get_p99_us"], rel=0.2)


def test_requests_are_late_for_as_long_and_as_often_as_those_that_came_apart() -> None:
    late = np.full(50_000, 9_000)  # of three seconds
    late[:5_000] = 2_000_000  # for 0.3 s of them
    windows = [live_prediction.predict(costs(late_ns=late), None, 4_000.0, 16, seed, seconds=0.5)["get_p99_us"] for seed in range(1, 13)]
    late_windows = sum(each > 1_900 for each in windows)
    assert 1 <= late_windows <= 9 and sum(each < 1_000 for each in windows) == len(windows) - late_windows, windows


def test_a_get_that_met_a_slow_moment_is_none_of_the_times_of_service() -> None:
    took = np.full(2_000, 8_000)
    took[::50] = 400_000
    done_ns = np.cumsum(took)
    service = SimpleNamespace(pids=range(3), serve=lambda *_, **__: served([0] * len(took), done_ns.tolist()))
    watch = SimpleNamespace(slow=lambda *_: NEVER)
    gets, ranges = live_costs._service(service, watch, seed=1)  # type: ignore[arg-type]
    assert set(gets.tolist()) == {8_000} and not len(ranges)


def test_what_does_not_come_to_its_end_beside_is_an_error_and_not_a_second_benchmark() -> None:
    with pytest.raises(WaveError, match="did not come to its end"), live_costs._beside(min(os.sched_getaffinity(0)), lambda: 1 // 0):
        pass


def test_pace_and_clock_are_each_others_inverse() -> None:
    pieces = np.random.default_rng(1).integers(1_000, 9_000, 1_000)
    pace, times = live_prediction.Pace(pieces), np.sort(np.random.default_rng(2).integers(0, 50_000_000, 1_000))
    assert np.abs(pace.time(pace.progress(times)) - times).max() < 10
    assert pace.progress(np.array([0, pieces.sum(), 2 * pieces.sum()])).tolist() == [
        0,
        int(1_000 * np.median(pieces)),
        int(2_000 * np.median(pieces)),
    ]


def test_a_preemption_that_cools_caches_costs_throughput() -> None:
    mlfq = live_prediction.Enforcement("mlfq", delay_ns=10_000, cpu_ns=60_000, quantum_us=100)
    most = [live_prediction.saturation(costs(resume_ns=each), mlfq, 64, seed=1) for each in (0.0, 5_000.0)]
    assert most[1] < 0.95 * most[0]


def run_eevdf(classes: tuple[RequestClass, ...], load_per_s: float, **more: object) -> object:
    policy = f"{Path(eevdf.__file__)}:Eevdf"
    plain = {"placement": "kernel", "workers": 1, "threads": 16, "host": "ideal", "duration_ns": 1_000 * MS, "samples": 200_000}
    return simulate(Setup(policy=policy, params={"slice_us": 1_400, "tick_us": 4_000}, load_per_s=load_per_s, classes=classes, **(plain | more)))  # type: ignore[arg-type]


def test_eevdf_serves_everybody_and_never_idles_while_somebody_waits() -> None:
    short, long = (
        RequestClass("short", Service("exponential", mean_ns=8_000), share=0.99),
        RequestClass("long", Service(fixed_ns=600_000), share=0.01),
    )
    result = run_eevdf((short, long), 65_000.0)
    assert sum(each.unfinished for each in result.classes.values()) == 0  # type: ignore[attr-defined]
    offered = 65_000 * (0.99 * 8e-6 + 0.01 * 600e-6)
    assert result.worker_busy_share * result.virtual_ns / 1e9 == pytest.approx(offered, rel=0.05)  # type: ignore[attr-defined]


def test_eevdf_lets_short_work_pass_long_work() -> None:
    short, long = RequestClass("short", Service(fixed_ns=8_000), share=0.99), RequestClass("long", Service(fixed_ns=800_000), share=0.01)
    fair = run_eevdf((short, long), 30_000.0).classes["short"].p99_ns  # type: ignore[attr-defined]
    first_come = simulate(
        Setup("fifo", 30_000.0, (short, long), placement="kernel", workers=1, threads=16, host="ideal", duration_ns=1_000 * MS)
    ).classes["short"].p99_ns  # fmt: skip
    assert fair < 0.7 * first_come


def test_equal_hogs_share_the_cpu_equally_under_eevdf() -> None:
    """Two of 20 ms that arrive together end together; first come, first served would have them 20 ms apart."""
    from waveos.ipu_emulator.sched.machine import REQUEST

    arrivals = np.zeros(2, REQUEST)
    arrivals["service_ns"] = 20 * MS
    result = run_eevdf((RequestClass("hog", Service(fixed_ns=1)),), 0.0, arrivals=arrivals)
    sojourns = np.sort(result.samples["sojourn_ns"])  # type: ignore[attr-defined]
    assert sojourns[1] == pytest.approx(40 * MS, rel=0.01) and sojourns[0] > 33 * MS


def test_under_eevdf_a_thread_that_is_looked_at_anew_and_is_still_the_best_goes_on() -> None:
    given = costs(get_ns=np.array([14_000, 27_000]), range_ns=np.array([2_000_000]), slice_ns=700_000, tick_ns=1_000_000)
    for seed in range(1, 6):
        predicted = live_prediction.predict(given, None, 8_000.0, 64, seed)
        assert predicted["throughput_per_s"] == pytest.approx(8_000, rel=0.05)


def test_wave_keeps_gets_from_waiting_for_ranges_and_pays_for_it() -> None:
    wave = live_prediction.Enforcement("shinjuku", delay_ns=40_000, cpu_ns=15_000, quantum_us=200)
    without, within = (live_prediction.predict(costs(), each, 40_000.0, 16, seed=1, seconds=1.0) for each in (replace(wave, quantum_us=10_000), wave))
    assert within["get_p99_us"] < 0.9 * without["get_p99_us"]
    assert within["range_p50_us"] > without["range_p50_us"]
    assert live_prediction.saturation(costs(), wave, 16, seed=1) < live_prediction.saturation(costs(), replace(wave, cpu_ns=0), 16, seed=1)


def test_an_act_of_hostd_costs_what_it_spent_for_all() -> None:
    told = [{"counters": {"acts": acts}, "hostd": {"spent_ns": spent}} for acts, spent in ((100, 2_000_000), (300, 6_000_000))]
    assert live.enforcement("wave", told, 50_000.0, 200.0) == live_prediction.Enforcement("shinjuku", 50_000.0, 20_000.0, 200.0)


def test_one_demotion_is_predicted_to_cost_less_than_many_preemptions_and_to_keep_gets_shorter() -> None:
    given = costs(range_ns=np.array([2_000_000]), wave_range_ns=np.array([2_000_000]))
    shinjuku = live_prediction.Enforcement("shinjuku", delay_ns=10_000, cpu_ns=60_000, quantum_us=200)
    many, once = (live_prediction.predict(given, each, 25_000.0, 64, seed=1, seconds=1.0) for each in (shinjuku, replace(shinjuku, policy="mlfq")))
    assert once["get_p99_us"] < 0.7 * many["get_p99_us"]
    most = [live_prediction.saturation(given, each, 64, seed=1) for each in (shinjuku, replace(shinjuku, policy="mlfq"))]
    assert most[0] < most[1]
