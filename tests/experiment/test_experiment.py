"""What a comparison runs, how saturation is searched, and what is kept; on an engine whose saturation is known."""

from dataclasses import dataclass

import pytest

from waveos.ipu_emulator.experiment import (
    Comparison,
    Saturation,
    ablation_steps,
    capacity_per_s,
    configurations,
    drive,
    find_saturation,
    limits_us,
    loads,
    meets,
)
from waveos.ipu_emulator.inputs import Inputs
from waveos.ipu_emulator.job import Ask, Configuration, Job
from waveos.scenario import MITIGATIONS, Goal, check_scenario


def scenario(**changes):
    raw = {
        "name": "test",
        "host": {"workers": 8},
        "workload": {
            "loads_per_s": [100_000, 200_000, 400_000, 600_000],
            "classes": [
                {"name": "GET", "share": 0.995, "service": {"fixed_us": 8, "exponential_us": 2}, "slo_us": 200},
                {"name": "RANGE", "share": 0.005, "service": {"fixed_us": 1000}},
            ],
        },
        "policies": {"names": ["fifo", "shinjuku"]},
        "run": {"seed": 7, "replications": 3},
        "objective": {"GET": {"p99_us": 200}, "RANGE": {"p99_x_mean": 10}},
    }
    return check_scenario(raw | changes)


@dataclass
class Engine:
    """A pool whose runs meet a p99 of 200 us of GET up to a load that the configuration and the seed set; jobs end last in, first out."""

    stop_after: int = 10**9

    def __post_init__(self):
        self.queue, self.asked, self.number = [], [], 0

    def limit(self, ask):
        mitigations = len(ask.configuration.mitigations) if ask.configuration.world == "offload" else 5
        return {"kernel": 50_000, "on-host": 300_000, "offload": 240_000 + 10_000 * mitigations}[ask.configuration.world] * (
            1 + 0.001 * (ask.seed - 8)
        )

    def submit(self, job):
        self.queue.append((self.number, job.ask if isinstance(job, Job) else job))
        self.number += 1
        return self.number - 1

    def finished(self):
        while self.queue:
            if len(self.asked) == self.stop_after:
                raise KeyboardInterrupt
            number, ask = self.queue.pop()
            self.asked.append(ask)
            yield number, (point(ask, 200 * ask.load_per_s / self.limit(ask)), None)


def point(ask, p99_us):
    classes = {"GET": {"count": 1000, "p50_us": 10.0, "p99_us": p99_us, "p999_us": 300.0, "mean_us": 20.0}}
    return {
        "load_per_s": ask.load_per_s,
        "seed": ask.seed,
        "throughput_per_s": ask.load_per_s,
        "saturated": False,
        "classes": classes,
        "ready_to_running_p50_us": 2.5,
    }


def compare(engine, *, saturation=True, ablation="", **changes):
    comparison = Comparison(scenario(**changes), Inputs(), link={"name": "test"})
    comparison.run(engine, comparison.searches(saturation=saturation, ablation=ablation))
    return comparison.results()


def test_a_comparison_has_the_kernel_and_each_policy_in_three_places():
    found = [(each.id, each.workers) for each in configurations(scenario())]
    assert found == [
        ("kernel", 8),
        ("fifo/on-host same workers", 8),
        ("fifo/on-host same machine", 7),
        ("fifo/offload", 8),
        ("shinjuku/on-host same workers", 8),
        ("shinjuku/on-host same machine", 7),
        ("shinjuku/offload", 8),
    ]


def test_one_worker_leaves_no_core_for_an_agent_on_the_same_machine():
    assert "same machine" not in {each.column for each in configurations(scenario(host={"workers": 1}))}


def test_the_ablation_takes_each_mitigation_away_and_adds_them_in_order_and_repeats_none():
    steps = ablation_steps()
    sets = [frozenset(mitigations) for _, mitigations in steps]
    assert len(set(sets)) == len(sets)
    assert {frozenset(MITIGATIONS), frozenset()} <= set(sets)
    assert all(frozenset(MITIGATIONS) - {each} in sets for each in MITIGATIONS)
    assert all(frozenset(MITIGATIONS[:count]) in sets for count in range(5))


def test_saturation_lies_within_its_resolution_of_the_truth_for_every_seed():
    results = compare(Engine())
    by_id = {each["id"]: each for each in results["configs"]}
    for name, truth in (("kernel", 50_000), ("fifo/offload", 280_000), ("shinjuku/on-host same workers", 300_000)):
        found = by_id[name]
        assert found["saturation_per_s"] == pytest.approx(truth, rel=0.01)
        assert found["saturation_low_per_s"] <= truth <= found["saturation_high_per_s"]


def test_the_cost_of_offload_is_told_for_both_columns():
    found = next(each for each in compare(Engine())["configs"] if each["id"] == "fifo/offload")
    for column in ("same workers", "same machine"):
        low, high = found["cost_interval"][column]
        assert low <= 1 - 280 / 300 <= high
        assert low <= found["cost_share"][column] <= high


def test_each_seed_and_load_runs_once():
    engine = Engine()
    compare(engine, ablation="shinjuku")
    assert len(set(engine.asked)) == len(engine.asked)


def test_all_configurations_meet_the_same_seeds():
    engine = Engine()
    compare(engine)
    seeds = {}
    for ask in engine.asked:
        seeds.setdefault(ask.configuration, set()).add(ask.seed)
    assert set(map(frozenset, seeds.values())) == {frozenset({7, 8, 9})}


def test_the_ablation_tells_saturation_for_every_step():
    rows = compare(Engine(), ablation="shinjuku")["ablation"]
    assert [row["label"] for row in rows][:2] == ["all", "none"]
    by_label = {row["label"]: row["saturation_per_s"] for row in rows}
    assert by_label["none"] < by_label["+ wb"] < by_label["+ wb + wc_wt"] < by_label["all"]


def test_points_rise_in_load_and_are_of_the_first_seed():
    for config in compare(Engine())["configs"]:
        offered = [each["load_per_s"] for each in config["points"]]
        assert offered == sorted(set(offered))
        assert {each["seed"] for each in config["points"]} == {7}


def test_the_table_is_at_the_highest_load_that_half_of_the_configurations_serve():
    assert compare(Engine())["table_load_per_s"] == 200_000

    class Hopeless(Engine):
        def limit(self, ask):
            return 1e-9

    assert compare(Hopeless())["table_load_per_s"] is None


def test_without_a_search_only_the_given_loads_run():
    engine = Engine()
    results = compare(engine, saturation=False)
    assert len(engine.asked) == 7 * 4
    assert all(config["saturation_per_s"] is None and config["cost_share"] == {} for config in results["configs"])


def test_what_was_measured_before_an_interrupt_is_kept():
    comparison = Comparison(scenario(), Inputs(), link={"name": "test"})
    with pytest.raises(KeyboardInterrupt):
        comparison.run(Engine(stop_after=20), comparison.searches())
    results = comparison.results()
    assert results["interrupted"]
    assert sum(len(config["points"]) + len(config["replicas"]) for config in results["configs"]) == 20
    assert any("stopped by hand after 20 runs" in note for note in results["notes"])


def test_where_no_load_meets_the_objective_saturation_is_zero_and_said():
    class Hopeless(Engine):
        def limit(self, ask):
            return 1e-9

    results = compare(Hopeless())
    assert {config["saturation_per_s"] for config in results["configs"]} == {0.0}
    assert any("objective is met at no load by kernel" in note for note in results["notes"])


def test_where_every_load_of_the_grid_is_met_higher_ones_are_tried():
    class Fast(Engine):
        def limit(self, ask):
            return 1_500_000

    assert [config["saturation_per_s"] for config in compare(Fast())["configs"]] == [pytest.approx(1_500_000, rel=0.01)] * 7


def test_a_search_for_a_step_function_ends_at_the_step():
    found = Saturation()
    configuration = Configuration("fifo", "offload", 8)
    engine = Engine()
    drive(
        engine,
        [find_saturation(configuration, [1000.0], [1], lambda answer: answer["load"] <= 777, 0.01, found)],
        lambda ask: ask,
        lambda ask, _result: {"load": ask.load_per_s},
        lambda done, expected, ask: None,
        {},
    )
    assert found.value == pytest.approx(777, rel=0.005)
    low, high = found.interval()
    assert low <= 777 <= high


def test_a_run_in_which_requests_are_left_waiting_does_not_meet_the_objective():
    answer = point(Ask(Configuration("fifo", "offload", 8), 1.0, 1), 10.0)
    assert meets(answer, {"GET": {"p99_us": 200.0}})
    assert not meets(answer | {"saturated": True}, {"GET": {"p99_us": 200.0}})
    assert not meets(answer, {"GET": {"p99_us": 9.0}})


def test_a_goal_in_means_is_a_multiple_of_the_mean_service_time():
    assert limits_us(Goal(p99_x_mean=10, p999_us=5.0), 20_000.0) == {"p99_us": 200.0, "p999_us": 5.0}
    assert limits_us(Goal(p99_x_mean=10, p99_us=5.0), 20_000.0) == {"p99_us": 5.0}


def test_shares_of_capacity_become_loads():
    workload = {"loads_share": [0.5, 0.1], "classes": [{"name": "x", "service": {"exponential_us": 10}}]}
    half = check_scenario({"host": {"workers": 4}, "workload": workload})
    assert capacity_per_s(half, Inputs()) == pytest.approx(400_000)
    assert loads(half, Inputs()) == [40_000, 200_000]
